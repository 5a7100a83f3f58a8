"""The commands that use a model: eval, generate, chat, show, export, fetch."""

import math
import sys

import torch

from minillm import compare, data, evaluate, hub, registry, report
from minillm.cli.paths import check_paths
from minillm.generate import check_options
from minillm.show import show
from minillm.store import holds


def load(args):
    """(model, tokenizer) of --model with every --adapter, on --device."""
    names = {}
    for path in args.adapter:
        name = holds(path)
        if name not in registry.techniques():
            raise ValueError(f"{path} is not a file that a technique of minillm saved")
        if name in names:
            raise ValueError(f"{names[name]} and {path} are both files of {name}, of which a model takes one")
        names[name] = path
    model, tokenizer = hub.load(args.model, dtype=args.dtype, device=place(args.device))
    for name, path in names.items():
        registry.techniques()[name].load(model, path, any_base=args.any_base)
    return model, tokenizer


def place(written):
    """The torch.device of --device; by default a GPU where there is one."""
    if written is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(written)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {written}: {reason}") from error
    return device


def needs_tokenizer(tokenizer, args):
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer (tokenizer.json or tokenizer.model), which {args.command} needs")
    return tokenizer


# --- eval --------------------------------------------------------------------------------------------


def run_eval(args):
    if args.text and args.data:
        raise ValueError("--text and --data: one of them")
    records = args.data and not args.data.endswith(".txt")
    if args.windows and records:
        raise ValueError("--windows is for running text, and --data holds records")
    if args.skip_bad and not records:
        raise ValueError("--skip-bad is for records: --data FILE")
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    if records:
        return answers(model, tokenizer, args)
    if args.text or args.data:
        text = data.text(args.text or args.data)
        print(repr(evaluate.perplexity(model, tokenizer, text, length=args.length, windows=args.windows)))
        return
    part = data.task(args.task, tokenizer, "test", limit=64, length=args.length)
    print(repr(compare.score(model, tokenizer, part, args.length // 2, args.windows)))


def answers(model, tokenizer, args):
    """The loss of the user's answers, the metrics of generated ones, and some of both side by side."""
    reading = data.read(args.data, tokenizer, length=args.length, skip_bad=args.skip_bad)
    print(reading.summary())
    found = evaluate.completions(model, reading, pad=tokenizer.pad or 0)
    print(f"loss {math.log(found):.4f} for each learnt token; {found!r}")
    asked = data.questions(args.data, tokenizer, skip_bad=args.skip_bad)
    if asked.prompts:
        got = evaluate.answers(model, tokenizer, asked.prompts, asked.references, ids=asked.ids,
                               max_new_tokens=args.max_new_tokens)
        print(got.summary())
        if args.examples:
            print(report.table(got.rows(args.examples)))


# --- generate and chat -----------------------------------------------------------------------------------


def options(args):
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


def speak(model, tokenizer, ids, args, generator):
    """Print the continuation of `ids` as it comes; returns its text."""
    shown, new = "", []

    def stream(tokens):
        nonlocal shown
        new.append(int(tokens[0]))
        whole = tokenizer.decode([t for t in new if t not in tokenizer.stops])
        if not whole.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(whole[len(shown):], end="", flush=True)
            shown = whole

    model.generate([ids], args.max_new_tokens, **options(args), stop=tokenizer.stops, pad=tokenizer.pad, stream=stream,
                   generator=generator)
    print()
    return tokenizer.decode([t for t in new if t not in tokenizer.stops])


def run_generate(args):
    if args.system and not args.chat:
        raise ValueError("--system is a part of a conversation: add --chat")
    check_options(args.max_new_tokens, **options(args))
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    if args.chat:
        ids = tokenizer.chat_spans(opening(args) + [dict(role="user", content=args.prompt)], generate=True)[1]
    else:
        ids = tokenizer.encode(args.prompt)
    speak(model, tokenizer, ids, args, generator(args))


def generator(args):
    return torch.Generator(place(args.device)).manual_seed(args.seed)


def opening(args):
    return [dict(role="system", content=args.system)] if args.system else []


def run_chat(args):
    """Several turns: each sees all before it. An empty line or the end of the input ends the conversation."""
    check_options(args.max_new_tokens, **options(args))
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    messages, numbers = opening(args), generator(args)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not line:
            break
        messages.append(dict(role="user", content=line))
        ids = tokenizer.chat_spans(messages, generate=True)[1]
        messages.append(dict(role="assistant", content=speak(model, tokenizer, ids, args, numbers)))


# --- show, export, fetch ------------------------------------------------------------------------------------


def run_show(args):
    model, _ = load(args)
    print(show(model))
    if args.cost:
        print(report.report(model).table())


def run_export(args):
    """Formats give their dense weights back, patches are merged, and what freeze trained is the model already."""
    check_paths(args, {"--out": args.out})
    classes = registry.TECHNIQUES
    for path in args.adapter:
        name = holds(path)
        if name in classes and issubclass(classes[name], registry.Patch) and classes[name].fold is registry.Patch.fold:
            raise ValueError(f"{path} holds {name}, which is no change of a weight: it cannot be merged into the model, and the "
                             "formats of other programs have no place for it")
    model, tokenizer = load(args)
    hub.check_save(model.config, args.out, tokenizer, args.type, args.force)
    for name in (name for name in registry.techniques() if issubclass(classes[name], registry.Format)):
        if registry.formats_of(name, model):
            registry.techniques()[name].unwrap(model)
    for name in list(dict.fromkeys(name for layer in registry.layers(model).values() for name in layer.patches)):
        registry.techniques()[name].merge(model, keep=False)
    hub.save(model, args.out, tokenizer=tokenizer, type=args.type, force=args.force)
    print(f"wrote {args.out}")


def run_fetch(args):
    print(hub.fetch(args.name))
