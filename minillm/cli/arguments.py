"""The arguments of every command. A wrong argument gives an error of one line, before any work."""

import argparse
import difflib
import importlib.metadata
import math
import sys

from minillm import compare, data, train
from minillm.cli import comparing, training, using


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which suggest the closest option for a misspelt one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def parse(self, argv=None):
        """The namespace of the arguments; exits with one line at an unknown argument."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in args.parser._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            args.parser.error(f"{unknown[0]!r} is not known" + (
                f"; did you mean {close[0]}?" if close else f"; see {args.parser.prog} --help"))
        return args


def whole(least, most=None):
    """A type for argparse: whole numbers from `least` to `most` (None: no limit)."""
    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or most is not None and value > most:
            possible = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {possible}")
        return value

    return read


seed = whole(0, 2**63 - 1)  # torch keeps it in 64 bits


def real(fits, possible):
    """A type for argparse: numbers for which `fits` holds; `possible` says the same in words."""
    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {possible}")
        return value

    return read


above_0 = real(lambda x: 0 < x < math.inf, "a number above 0")
from_0 = real(lambda x: 0 <= x < math.inf, "a number from 0")
share = real(lambda x: 0 < x < 1, "a number between 0 and 1")
up_to_1 = real(lambda x: 0 < x <= 1, "a number above 0, and at most 1")


def path(text):
    """A type for argparse: a path. An empty one would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty: a path is needed")
    return text


def warmup(text):
    """A type for argparse: a whole number of steps, or a share of all steps."""
    value = from_0(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of steps, nor a share of them below 1")
    return int(value) if value >= 1 else value


def parser():
    top = Parser(prog="minillm", description="Fine-tune a language model and make it small.")
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, parser=sub)
        return sub

    compare_arguments(command(
        "compare", comparing.run, "run all techniques and compare them in one table: the main job"))
    train_arguments(command(
        "train", training.run, "train one technique and save what it learnt"))
    eval_arguments(command(
        "eval", using.run_eval, "measure a model on held-out text, or on your own records"))
    generate_arguments(command(
        "generate", using.run_generate, "continue a prompt, word by word"))
    chat_arguments(command(
        "chat", using.run_chat,
        "talk with a model: each line is a message, an empty line ends the conversation"))
    show_arguments(command(
        "show", using.run_show,
        "print the model as a tree, with the parameters and bytes of each module"))
    export_arguments(command(
        "export", using.run_export,
        "write a model for other programs, with the adapters merged into its weights"))
    fetch = command("fetch", using.run_fetch, "download a model once and keep it in the cache")
    fetch.add_argument("name", choices=["smollm2"])
    return top


def version():
    import torch

    own, python = importlib.metadata.version("minillm"), sys.version.split()[0]
    return f"minillm {own}, torch {torch.__version__}, Python {python}"


def model(sub):
    sub.add_argument("--model", type=path, default="tiny",
                     help="tiny (the default), smollm2, a directory or a .gguf file")
    sub.add_argument("--adapter", action="append", default=[], type=path, metavar="PATH",
                     help="a file that a technique saved, or peft's directory; repeatable")
    sub.add_argument("--any-base", action="store_true",
                     help="load adapters that were made for another model")
    device(sub)


def device(sub):
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                     help="of the weights; by default the checkpoint's own")


def task(sub):
    sub.add_argument("--task", choices=data.TASKS,
                     help="what to learn from Python's own documentation (default language)")


def records(sub, text):
    sub.add_argument("--data", type=path, metavar="FILE", help=text)
    sub.add_argument("--skip-bad", action="store_true",
                     help="leave bad records out, and print a list of them")


def compare_arguments(sub):
    sub.add_argument("--model", type=path, default="tiny",
                     help="tiny (the default), smollm2, a directory or a .gguf file")
    device(sub)
    task(sub)
    sub.add_argument("--data", type=path, metavar="FILE",
                     help="your own .txt, .jsonl, .json or .csv, instead of --task")
    sub.add_argument("--techniques", nargs="+", metavar="NAME",
                     help=f"some of: {' '.join(compare.RATES)}")
    sub.add_argument("--out", default="results", type=path, metavar="DIR",
                     help="the directory for table.json, table.md and table.png")
    sub.add_argument("--force", action="store_true",
                     help="start again where --out holds a table with other settings")
    for name, text in (("steps", "optimizer steps of each training"),
                       ("batch-size", "examples per step"),
                       ("windows", "windows of held-out text"),
                       ("length", "tokens per example")):
        sub.add_argument(f"--{name}", type=whole(2 if name == "length" else 1), help=text)
    sub.add_argument("--seeds", type=whole(1),
                     help="trainings of each technique, each with its own seed")
    sub.add_argument("--seed", type=seed, default=0, help="the first seed")


def train_arguments(sub):
    model(sub)
    what = sub.add_argument_group("what to learn")
    task(what)
    records(what, "your own .txt, .jsonl, .json or .csv, instead of --task")
    what.add_argument("--length", type=whole(2), default=128,
                      help="tokens per example (default 128)")
    what.add_argument("--pack", action="store_true",
                      help="put several examples into one row of --length tokens")
    what.add_argument("--eval-data", type=path, metavar="FILE",
                      help="held-out records: their loss is measured during the training")
    what.add_argument("--eval-share", type=share, metavar="SHARE",
                      help="instead of --eval-data: hold out this share of the data")
    what.add_argument("--preview", nargs="?", type=whole(1), const=3, metavar="N",
                      help="show N examples, learnt text in green; without --out, train nothing")
    how = sub.add_argument_group("how to learn it")
    how.add_argument("--technique", default="lora", choices=["full", *training.TECHNIQUES],
                     help="what to wrap the model with; full wraps nothing and trains all weights")
    how.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                     help="an argument of the technique's wrap, such as r=16; repeatable")
    how.add_argument("--steps", type=whole(1),
                     help="optimizer steps (default 100 where --epochs is not given)")
    how.add_argument("--epochs", type=above_0,
                     help="instead of --steps: passes through the data")
    rate_arguments(how)
    how.add_argument("--batch-size", type=whole(1), default=8)
    how.add_argument("--accumulate", type=whole(1), default=1,
                     help="batches whose gradients make one step")
    how.add_argument("--weight-decay", type=from_0, default=0.0)
    how.add_argument("--clip", type=above_0, default=1.0, help="the largest norm of the gradient")
    how.add_argument("--every", type=whole(1), metavar="STEPS",
                     help="measure the held-out loss every so many steps")
    how.add_argument("--patience", type=whole(1),
                     help="stop after so many measures without a better one")
    how.add_argument("--seed", type=seed, default=0)
    how.add_argument("--recompute", action="store_true",
                     help="recompute activations in the backward pass: less memory, a third more "
                          "time")
    how.add_argument("--shard", action="store_true",
                     help="under torchrun: spread the weights over the processes (FSDP2)")
    where = sub.add_argument_group("where to write")
    where.add_argument("--out", type=path, metavar="PATH",
                       help="a .safetensors file; with --technique full a directory or .gguf file")
    where.add_argument("--force", action="store_true",
                       help="replace a file that minillm did not write")
    where.add_argument("--checkpoints", type=path, metavar="DIR",
                       help="save the whole state there during the training; without it, only "
                            "Ctrl-C saves, beside --out")
    where.add_argument("--save-every", type=whole(1), metavar="STEPS")
    where.add_argument("--keep", type=whole(1), help="how many of the last checkpoints stay (2)")
    where.add_argument("--resume", action="store_true",
                       help="continue from the newest checkpoint; an error where there is none")
    where.add_argument("--log", type=path, metavar="FILE", help="write a JSON line for each step")
    where.add_argument("--picture", type=path, metavar="FILE",
                       help="draw the loss and the learning rate, as .png, .svg or .pdf")


def rate_arguments(how):
    how.add_argument("--rate", type=above_0, help="the peak learning rate")
    how.add_argument("--find-rate", action="store_true",
                     help="try a growing rate in each of --steps steps, suggest one, train nothing")
    how.add_argument("--schedule", choices=list(train.SCHEDULES), default="cosine")
    how.add_argument("--schedule-option", action="append", default=[], metavar="KEY=VALUE",
                     help="an option of the schedule, such as floor=0.1; repeatable")
    how.add_argument("--warmup", type=warmup, default=0.05,
                     help="steps in which the rate rises; a number below 1 is a share of all steps")


def eval_arguments(sub):
    model(sub)
    task(sub)
    records(sub, "your own records: the loss of their answers, and generated answers beside them")
    sub.add_argument("--text", type=path, metavar="FILE",
                     help="measure the perplexity of this text")
    sub.add_argument("--length", type=whole(2), default=256,
                     help="tokens per window or example (default 256)")
    sub.add_argument("--windows", type=whole(1), help="the largest number of windows")
    sub.add_argument("--max-new-tokens", type=whole(1),
                     help="the most tokens of a generated answer (default 64)")
    sub.add_argument("--examples", type=whole(0), help="how many answers to show (default 5)")


def sampling(sub):
    sub.add_argument("--max-new-tokens", type=whole(1), default=64)
    sub.add_argument("--temperature", type=from_0, default=0.0, help="0 is greedy (the default)")
    sub.add_argument("--top-k", type=whole(1), help="draw from the k likeliest tokens only")
    sub.add_argument("--top-p", type=up_to_1,
                     help="draw from the fewest tokens whose probabilities sum to this share")
    sub.add_argument("--min-p", type=up_to_1,
                     help="draw from the tokens at least this share as likely as the likeliest")
    sub.add_argument("--seed", type=seed,
                     help="of the random draws at a temperature above 0 (default 0)")


def generate_arguments(sub):
    model(sub)
    sub.add_argument("prompt")
    sub.add_argument("--chat", action="store_true",
                     help="the prompt is a user's message; use the model's chat template")
    sub.add_argument("--system", metavar="TEXT", help="with --chat: the system prompt")
    sampling(sub)


def chat_arguments(sub):
    model(sub)
    sub.add_argument("--system", metavar="TEXT", help="the system prompt")
    sampling(sub)


def show_arguments(sub):
    model(sub)
    sub.add_argument("--cost", action="store_true",
                     help="also the memory that training needs and the time per token")


def export_arguments(sub):
    model(sub)
    sub.add_argument("--out", required=True, type=path, metavar="PATH",
                     help="a directory (Hugging Face layout) or a .gguf file")
    sub.add_argument("--type", choices=["f32", "f16", "bf16", "q8_0", "peft"],
                     help="of a GGUF file's matrices (default f32); peft: its adapter directory")
    sub.add_argument("--force", action="store_true",
                     help="replace a file, or write beside files that minillm did not write")
