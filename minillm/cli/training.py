"""`minillm train`: check every output and option, show the data, then train the model."""

import contextlib
import functools
import os
import pathlib
import sys

from minillm import checkpoints, compare, data, distributed, files, options, registry, train
from minillm.registry import store
from minillm.cli.paths import check_paths
from minillm.cli.rates import check_find, find_rate, pairs, schedule_of, steps_of
from minillm.cli.using import (
    given, load, needs_tokenizer, read_records, refuse_second, summary, with_option,
)
from minillm.cli.words import of_technique
from minillm.cli.wrapping import wrap

TECHNIQUES = [name for name, method in registry.METHODS.items() if method.tokens]


def run(args):
    check(args)
    technique = registry.METHODS.get(args.technique)  # None: full fine-tuning
    keywords, trains = wrap_options(technique, args), args.out or args.find_rate
    if not trains and not args.preview:
        args.parser.error("--out is missing: the path to save what is learnt (or give --preview, "
                          "to see the data without training, or --find-rate)")
    device = distributed.start()
    args.device = args.device or str(device)
    model, tokenizer = load(args)
    needs_tokenizer(tokenizer, args)
    if args.out and technique is None:
        checkpoints.check_save(model, args.out, tokenizer, force=args.force)
    if trains and technique is not None and not technique.calibrated:
        args.name = wrap(model, technique, keywords, args)
    examples, held_out = read(args, tokenizer, model)
    if trains and technique is not None and technique.calibrated:
        args.name = wrap(model, technique, dict(keywords, examples=examples), args)
    preview(examples, tokenizer, args)
    if not trains:
        return
    model.recompute = args.recompute
    if args.find_rate:
        return find_rate(model, examples, tokenizer, args)
    check_disk(model, technique, held_out, args)
    if args.shard:
        train.shard(model)
    done = False
    try:
        try:
            history = fit(model, examples, held_out, technique, tokenizer, args)
            done = True
        finally:
            tidy(args, done)
        if distributed.place()[0] == 0:
            print(f"{train.summary(history)}\n{ending(history, args)}")
            if args.picture:
                train.picture(history, args.picture, args.force)
    except KeyboardInterrupt as error:
        if not done:
            raise
        raise KeyboardInterrupt(f"interrupted; saved {args.out}") from error


def preview(examples, tokenizer, args):
    """Print the examples that --preview asks for."""
    if args.preview and distributed.place()[0] == 0:
        shown = data.preview(examples, tokenizer, args.preview, color=sys.stdout.isatty())
        print(with_option(shown))


def check(args):
    """Make every check that needs no model."""
    check_options(args)
    check_files(args)


def check_options(args):
    """Exit with one line if options contradict each other, or would be ignored."""
    check_find(args)
    for pair in (("--steps", "--epochs"), ("--eval-data", "--eval-share"), ("--task", "--data")):
        refuse_second(args, *pair)
    if (args.patience or args.every) and not (args.eval_data or args.eval_share):
        args.parser.error("--patience and --every need held-out data: --eval-data FILE or "
                          "--eval-share 0.1")
    if args.resume and not (args.checkpoints or args.out):
        args.parser.error("--resume needs --out PATH or --checkpoints DIR: what to go on with")
    if (args.save_every or args.keep) and not args.checkpoints:
        args.parser.error("--save-every and --keep need --checkpoints DIR: where to save")
    for option in ("--log", "--picture", "--checkpoints"):
        if args.preview and not args.find_rate and not args.out and given(args, option):
            args.parser.error(f"{option} needs --out PATH: without it, --preview trains nothing")
    steps = steps_of(args)
    if steps and args.warmup > steps:
        args.parser.error(f"--warmup {args.warmup} is more than the {steps} steps of the training")
    schedule_of(args)
    if args.skip_bad and not args.data:
        args.parser.error("--skip-bad needs --data FILE: the records to leave out")
    if args.technique == "full" and args.adapter:
        args.parser.error("--technique full trains the model itself: export it with its --adapter "
                          "first")


def check_files(args):
    """Raise an error for a file that cannot be read, or that an output would replace."""
    others = {"--log": args.log, "--picture": args.picture}
    check_paths(args, {"--out": args.out, "--checkpoints": args.checkpoints, **others})
    if args.out and not args.checkpoints:
        beside = of_interruption(args)
        check_paths(args, {"the directory of an interruption": beside, **others})
        if not args.resume and train.newest(beside) is not None:
            raise FileExistsError(f"{beside} holds an interrupted training with this --out: "
                                  "--resume continues it; for a new training choose another --out, "
                                  "or remove that directory")
    if args.out and args.technique != "full":
        store.check_writable(args.out, args.force)
        if pathlib.Path(args.out).suffix != ".safetensors":
            args.parser.error(f"--out {args.out}: a technique is saved as a .safetensors file; "
                              "minillm export makes a .gguf file or a directory from it")
    if args.picture:
        train.check_picture(args.picture, args.force)
    if args.log:
        train.check_log(args.log)
    for path in filter(None, (args.data, args.eval_data)):
        data.check_file(path, args.skip_bad)
    if args.resume and args.out:
        check_resume(args)


def check_resume(args):
    """FileNotFoundError if --resume finds no checkpoint: a typo must not start from step 0."""
    beside = of_interruption(args)
    where = args.checkpoints or beside
    if train.newest(where) is None:
        other = train.newest(beside)
        hint = f"; --resume without --checkpoints goes on from {other}" if other else ""
        raise FileNotFoundError(f"--resume: there is no checkpoint in {where}{hint}")


def wrap_options(technique, args):
    """The keyword arguments of --option."""
    texts = pairs(args, "--option", "r=16")
    if technique is None:
        if texts:
            args.parser.error(f"--technique full has no options: remove --option {args.option[0]}")
        return {}
    try:
        return options.parse(technique.wrap, texts)
    except ValueError as error:
        raise ValueError(of_technique(error, texts)) from error


def read(args, tokenizer, model):
    """(training examples, held-out examples or None); prints what was cut or left out."""
    def file(path):
        reading = read_records(path, tokenizer, model, args)
        shown = args.preview and path == args.data  # the preview begins with its summary
        aside = reading.cut or reading.skipped or reading.unread or reading.ignored
        if aside and not shown and distributed.place()[0] == 0:
            print(f"{path}: {summary(reading)}", file=sys.stderr)
        return reading

    if args.data:
        examples = file(args.data)
    else:
        task = args.task or "language"
        examples = data.task(task, tokenizer, "train", length=args.length).examples
    held_out = file(args.eval_data) if args.eval_data else None
    if args.eval_share:
        examples, held_out = split(examples, args)
    return (data.pack(examples, args.length) if args.pack else examples), held_out


def split(examples, args):
    """(training examples, held-out examples) by --eval-share."""
    try:
        return data.held_out(examples, args.eval_share, args.seed)
    except ValueError as error:
        raise ValueError(str(error).replace("share=", "--eval-share ", 1)) from error


def of_interruption(args):
    """The directory beside --out in which Ctrl-C saves if there is no --checkpoints."""
    return args.out.rstrip("/") + ".interrupted"


def tidy(args, done):
    """Remove the directory of an interruption, unless --resume needs its checkpoints.

    A directory that another run uses stays.
    """
    where = of_interruption(args)
    if args.checkpoints or distributed.place()[0] > 0 or not os.path.isdir(where):
        return
    with contextlib.suppress(RuntimeError), files.lock(where):
        if done or not train.saved(where):
            train.clear(where)


def fit(model, examples, held_out, technique, tokenizer, args):
    return train.train(
        model, examples, steps=steps_of(args), epochs=args.epochs,
        lr=args.rate or compare.usual(args.technique, args.model) or 1e-3,
        batch_size=args.batch_size, accumulate=args.accumulate, schedule=schedule_of(args),
        warmup=args.warmup, weight_decay=args.weight_decay, clip=args.clip, pad=tokenizer.pad or 0,
        seed=args.seed, held_out=held_out, every=args.every, patience=args.patience,
        checkpoints=args.checkpoints or of_interruption(args),
        save_every=args.save_every if args.checkpoints else 0, keep=args.keep or 2,
        resume=args.resume, log=args.log, name=args.technique,
        write=functools.partial(write, technique=technique, tokenizer=tokenizer, args=args))


def check_disk(model, technique, held_out, args):
    """OSError if --out and --checkpoints together need more room than the disk has."""
    size = out_bytes(model, technique, args)
    shards = 1 if technique or checkpoints.is_gguf(args.out) else -(-size // 5_000_000_000)
    needs = [("--out", args.out, shards, size // shards)]
    if args.checkpoints:
        written = len(train.saved(args.checkpoints))
        keep, best = args.keep or 2, held_out is not None
        needs.append(train.checkpoint_needs("--checkpoints", args.checkpoints, keep, model, best,
                                            written))
    if distributed.place()[0] == 0:
        train.check_disk(needs)


def out_bytes(model, technique, args):
    """The bytes of the tensors that `write` will write."""
    gguf = technique is None and checkpoints.is_gguf(args.out)  # written in float32
    every = {id(p): p for p in model.parameters() if technique is None or p.requires_grad}
    for _, patch in registry.patches_of(technique.family, model, args.name) if technique else ():
        every |= {id(t): t for t in (*patch.parameters(), *patch.buffers())}
    for site in registry.formats_of(technique.family, model) if technique else ():
        every |= {id(t): t for t in site.module.buffers()}
    return sum(t.numel() * (4 if gguf else t.dtype.itemsize) for t in every.values())


def ending(history, args):
    """Lines for the user: whether --patience ended the training, and which step was saved."""
    best = history[-1].get("best")
    if best is None:
        return f"saved {args.out}"
    after = sum("held_out" in record for record in history[best["step"] + 1 :])
    stopped = f"stopped by --patience {args.patience} after {len(history)} steps\n"
    return (stopped if args.patience and after >= args.patience else "") + (
        f"saved {args.out}, as the model was after step {best['step'] + 1}")


def write(model, technique, tokenizer, args):
    if technique is None:
        checkpoints.save(model, args.out, tokenizer=tokenizer, force=args.force)
    else:
        registry.techniques()[technique.family].save(model, args.out, args.name, force=args.force)
