"""The commands that use a model: eval, generate, chat, show, export, fetch."""

import math
import sys

import torch

from minillm import checkpoints, compare, data, measure, registry, train, zoo
from minillm.calling import limit
from minillm.measure import report
from minillm.cli.adapters import held, load, place
from minillm.cli.paths import check_paths
from minillm.cli.words import said
from minillm.model.generate import check_options
from minillm.measure.show import show
from minillm.registry import sites


def needs_tokenizer(tokenizer, args):
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer (tokenizer.json or tokenizer.model), "
                         f"which {args.command} needs")
    return tokenizer


def read_records(path, tokenizer, model, args):
    """The Reading of a file. An error suggests a larger --length only if the model has room."""
    most = limit(model)
    try:
        return data.read(path, tokenizer, length=args.length, skip_bad=args.skip_bad)
    except ValueError as error:
        if most is None or args.length < most:
            raise
        instead = f"and the model has no more than {most} positions"
        raise ValueError(str(error).replace("a larger length= keeps it", instead)) from error


def summary(reading):
    """The summary of a Reading, in the words of the command line."""
    return with_option(reading.summary())


def with_option(text):
    """The text with --length in place of length=."""
    return text.replace("a larger length= keeps", "a larger --length keeps")


# --- eval -------------------------------------------------------------------------------------


def run_eval(args):
    records = check_eval(args)
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    if records:
        return answers(model, tokenizer, args)
    if args.text or args.data:
        text = data.text(args.text or args.data)
    else:
        task = args.task or "language"
        part = data.task(task, tokenizer, "test", limit=64, length=args.length)
        text = part.text
    if text:
        try:
            found = measure.perplexity(model, tokenizer, text, args.length, args.windows)
        except ValueError as error:
            length = f"--length {args.length}: " if "positions" in str(error) else ""
            raise ValueError(f"{length}{error}") from error
    else:
        found = compare.score(model, tokenizer, part, args.length, args.windows)
    print(repr(found))


def check_eval(args):
    """Whether --data holds records; exits with one line if an option would be ignored."""
    refuse_second(args, "--text", "--data", "--task")
    records = bool(args.data) and not args.data.lower().endswith(".txt")
    windows = not records and args.task in (None, "language")
    for option, fits, what in (
            ("--windows", windows, "running text: --text FILE or --task language"),
            ("--skip-bad", records, "records: --data FILE"),
            ("--examples", records, "records: --data FILE"),
            ("--max-new-tokens", records, "records: --data FILE")):
        value = given(args, option)
        if not fits and value is not None and value is not False:  # 0 is a value
            args.parser.error(f"{option} is for {what}")
    for path in filter(None, (args.text, args.data)):
        data.text(path) if not records else data.check_file(path, args.skip_bad)
    return records


def given(args, option):
    """The value of an option, such as --max-new-tokens."""
    return getattr(args, option.removeprefix("--").replace("-", "_"))


def refuse_second(args, *options):
    """Exit with one line if two of the options are given: one of them would be ignored."""
    found = [option for option in options if given(args, option) is not None]
    if len(found) > 1:
        args.parser.error(f"{found[0]} and {found[1]}: give one of them")


def answers(model, tokenizer, args):
    """Print the loss of the user's answers, metrics of generated answers, and some of both."""
    new = args.max_new_tokens or 64
    reading = read_records(args.data, tokenizer, model, args)
    most = measure.room(model, new)
    asked = data.questions(args.data, tokenizer, skip_bad=args.skip_bad, most=most)
    train.check_room(model, reading)
    print(summary(reading))
    found = measure.completions(model, reading, pad=tokenizer.pad or 0)
    print(f"loss {math.log(found):.4f} for each learnt token; {found!r}")
    uncounted = {reason.where for reason in reading.skipped}
    unasked = [one for one in asked.skipped + asked.unanswered if one.where not in uncounted]
    if unasked:
        print("\n".join(data.skips(unasked, title="of these, not answered", what="record")))
    if asked.prompts:
        got = measure.answers(model, tokenizer, asked.prompts, asked.references, ids=asked.ids,
                              max_new_tokens=new)
        print(got.summary())
        if args.examples != 0:
            print(report.table(got.rows(5 if args.examples is None else args.examples)))


# --- generate and chat ------------------------------------------------------------------------


def options(args):
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


def speak(model, tokenizer, ids, args, generator):
    """Print the continuation of `ids` token by token; returns its text."""
    shown, new = "", []

    def stream(tokens):
        nonlocal shown
        new.append(int(tokens[0]))
        whole = tokenizer.decode([t for t in new if t not in tokenizer.stops])
        if not whole.endswith("\ufffd"):  # else the last character lacks some of its bytes
            print(whole[len(shown):], end="", flush=True)
            shown = whole

    model.generate([ids], args.max_new_tokens, **options(args), stop=tokenizer.stops,
                   pad=tokenizer.pad, stream=stream, generator=generator)
    print()
    return tokenizer.decode([t for t in new if t not in tokenizer.stops])


def run_generate(args):
    if args.system and not args.chat:
        raise ValueError("--system is the prompt of a conversation: add --chat")
    check_seed(args)
    check_options(args.max_new_tokens, **options(args))
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    if args.chat:
        messages = opening(args) + [dict(role="user", content=args.prompt)]
        ids = tokenizer.chat_spans(messages, generate=True)[1]
    else:
        ids = tokenizer.encode(args.prompt)
    speak(model, tokenizer, ids, args, generator(args))


def generator(args):
    return torch.Generator(place(args.device)).manual_seed(args.seed or 0)


def check_seed(args):
    if args.seed is not None and args.temperature == 0:
        args.parser.error(f"--seed {args.seed} has no effect at --temperature 0, which is greedy: "
                          "give a temperature above 0")


def opening(args):
    return [dict(role="system", content=args.system)] if args.system else []


def run_chat(args):
    """A conversation: each turn sees all earlier turns. An empty line or end of input ends it."""
    check_seed(args)
    check_options(args.max_new_tokens, **options(args))
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    messages, numbers = opening(args), generator(args)
    # A missing chat template is an error now, before the first message.
    tokenizer.chat([*messages, dict(role="user", content="hello")], generate=True)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # `turn` refuses what is not UTF-8
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not line:
            break
        try:
            messages += turn(model, tokenizer, messages, line, args, numbers)
        except (ValueError, IndexError) as error:
            print(f"minillm chat: {said(error, args)}. The conversation goes on without this "
                  "message", file=sys.stderr)


def turn(model, tokenizer, messages, line, args, numbers):
    """[the user's message, the assistant's]; the assistant's is printed token by token.

    ValueError if the line is not UTF-8, or leaves no room for an answer.
    """
    data.utf8(line)
    asked = dict(role="user", content=line)
    ids = tokenizer.chat_spans([*messages, asked], generate=True)[1]
    return [asked, dict(role="assistant", content=speak(model, tokenizer, ids, args, numbers))]


# --- show, export, fetch ----------------------------------------------------------------------


def run_show(args):
    model, _ = load(args)
    print(show(model))
    if args.cost:
        print(report.report(model).table())


def run_export(args):
    """Write the model with every adapter in it.

    Formats are unwrapped to dense weights and patches are merged. A tied head that a patch
    changes gets a matrix of its own. What `freeze` trained is part of the model already.
    """
    check_paths(args, {"--out": args.out})
    if args.type == "peft":
        return export_to_peft(args)
    for path in args.adapter:
        kind = registry.KINDS[held(path)[0]]
        if issubclass(kind, registry.Patch) and kind.fold is registry.Patch.fold:
            raise ValueError(f"{path} holds {kind.kind}, which does not change a weight: it cannot "
                             "be merged into the model, and the file formats of other programs "
                             "have no place for it")
    model, tokenizer = load(args)
    tied = sites.ties(model).keys() & registry.layers(model).keys()
    if tied:
        sites.untie(model)
    checkpoints.check_save(model.config, args.out, tokenizer, args.type, args.force)
    for name, verbs in registry.techniques().items():
        for one in {site.module.name for site in registry.formats_of(name, model)}:
            verbs.unwrap(model, one)
    while registry.layers(model):
        patch = innermost(model)
        registry.techniques()[patch.family].merge(model, patch.name, keep=False)
    checkpoints.save(model, args.out, tokenizer=tokenizer, type=args.type, force=args.force)
    if tied:
        print(f"{args.out} stores the head and the embedding apart: --adapter changes "
              f"{' and '.join(sorted(tied))}, which shared a matrix")
    print(f"wrote {args.out}")


def export_to_peft(args):
    """Write the one --adapter as a directory of peft's, unmerged."""
    if len(args.adapter) != 1:
        raise ValueError("--type peft writes one adapter, and a directory holds one: give one "
                         f"--adapter FILE, not {len(args.adapter)}")
    model, _ = load(args)
    checkpoints.peft.save(model, args.out, force=args.force)
    print(f"wrote {args.out}")


def innermost(model):
    """A patch whose name is innermost in every stack that holds it."""
    stacks = [list(layer.patches.values()) for layer in registry.layers(model).values()]
    outer = {patch.name for stack in stacks for patch in stack[1:]}
    lowest = [stack[0] for stack in stacks]
    # Where there is none, `merge` raises an error that says why.
    return next((patch for patch in lowest if patch.name not in outer), lowest[0])


def run_fetch(args):
    print(zoo.fetch(args.name))
