"""The command line: `minillm compare | train | eval | generate | show | export | fetch`."""

import argparse
import ast
import sys

from minillm import compare, data, distributed, evaluate, files, hub, report, techniques, train
from minillm.show import show
from minillm.verbs import read


def main(argv=None):
    """Run one command; returns the exit code. An error of ours is one line, without a traceback."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"minillm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser():
    top = argparse.ArgumentParser(prog="minillm", description="Fine-tune a language model and make it small.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, text):
        sub = commands.add_parser(run.__name__.removeprefix("run_"), help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def model(sub):
        sub.add_argument("--model", default="tiny", help="tiny, smollm2, a Hugging Face directory or a .gguf file")
        sub.add_argument("--adapter", action="append", default=[], metavar="FILE", help="what a technique saved; repeatable")

    def task(sub):
        sub.add_argument("--task", choices=data.TASKS, default="language", help="what to learn from Python's own documentation")

    sub = command(run_compare, "run all techniques side by side: the main job")
    sub.add_argument("--model", default="tiny", help="tiny, smollm2, a Hugging Face directory or a .gguf file")
    task(sub)
    sub.add_argument("--techniques", nargs="+", metavar="NAME", help=f"some of: {' '.join(compare.RATES)}")
    sub.add_argument("--out", default="results", help="the directory of table.json, table.md and table.png")
    for name, text in (("steps", "optimizer steps of each training"), ("sweep-steps", "steps for each learning rate tried"),
                       ("batch-size", "examples a step"), ("windows", "windows of held-out text"), ("seed", "the seed of everything")):
        sub.add_argument(f"--{name}", type=int, help=text)

    sub = command(run_train, "train one technique and save what it learnt")
    model(sub)
    task(sub)
    sub.add_argument("--data", metavar="FILE", help="your own .txt, .jsonl or .csv, instead of --task")
    sub.add_argument("--technique", default="lora", choices=list(techniques()), help="what to wrap the model with")
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an argument of its wrap, such as r=16")
    sub.add_argument("--steps", type=int, default=100)
    sub.add_argument("--rate", type=float, help="the peak learning rate")
    sub.add_argument("--batch-size", type=int, default=8)
    sub.add_argument("--length", type=int, default=128, help="tokens of an example")
    sub.add_argument("--schedule", choices=list(train.SCHEDULES), default="cosine")
    sub.add_argument("--checkpoints", metavar="DIR", help="save the whole state there as it goes")
    sub.add_argument("--save-every", type=int, metavar="STEPS")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    sub.add_argument("--log", metavar="FILE", help="a JSON line for each step")
    sub.add_argument("--pack", action="store_true", help="fill rows of that length with several examples")
    sub.add_argument("--recompute", action="store_true", help="keep no activations: less memory, a third more time")
    sub.add_argument("--shard", action="store_true", help="under torchrun: spread the weights over the processes (FSDP2)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", required=True, metavar="FILE", help="where to save what was learnt (.safetensors)")

    sub = command(run_eval, "measure a model on held-out text")
    model(sub)
    task(sub)
    sub.add_argument("--text", metavar="FILE", help="perplexity of this text, instead of --task")
    sub.add_argument("--length", type=int, default=256, help="tokens of a window")
    sub.add_argument("--windows", type=int, help="at most so many windows")

    sub = command(run_generate, "continue a prompt, as it comes")
    model(sub)
    sub.add_argument("prompt")
    sub.add_argument("--chat", action="store_true", help="the prompt is a user's message; use the model's chat template")
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--min-p", type=float)
    sub.add_argument("--seed", type=int, default=0)

    sub = command(run_show, "the model as a tree, and what it costs")
    model(sub)
    sub.add_argument("--cost", action="store_true", help="also what training needs and the time a token takes")

    sub = command(run_export, "write the model, with what was learnt merged into it, for other programs")
    model(sub)
    sub.add_argument("--out", required=True, help="a directory (Hugging Face layout) or a .gguf file")
    sub.add_argument("--type", choices=["f32", "f16", "q8_0"], default="f32", help="how a GGUF stores its matrices")

    sub = command(run_fetch, "get a model once and keep it in the cache")
    sub.add_argument("name", choices=["smollm2"])
    return top


def load(args):
    model, tokenizer = hub.load(args.model)
    for path in args.adapter:
        name = read(path)[1].get("technique")
        if name not in techniques():
            raise ValueError(f"{path} is not a file that a technique of minillm saved")
        techniques()[name].load(model, path)
    return model, tokenizer


def run_compare(args):
    files.need("matplotlib", "plot")  # rather now than after the work
    sizes = dict(steps=args.steps, sweep_steps=args.sweep_steps, batch_size=args.batch_size, windows=args.windows)
    rows = compare.compare(args.model, args.task, args.techniques, seed=args.seed or 0, **sizes)
    print(report.table(compare.shown(rows)))
    for row in rows:
        if row["rate"]:
            tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in row["sweep"].items())
            print(f"{row['technique']}: learning rate {row['rate']:.2g}, the best of {tried} on the validation split")
    compare.write(rows, args.out, f"minillm compare --model {args.model} --task {args.task}")
    print(f"wrote table.json, table.md and table.png to {args.out}")


def run_train(args):
    device = distributed.start()
    model, tokenizer = load(args)
    examples = (data.read(args.data, tokenizer, length=args.length) if args.data
                else data.task(args.task, tokenizer, "train", length=args.length).examples)
    if args.pack:
        examples = data.pack(examples, args.length)
    options = dict(option.split("=", 1) for option in args.option)
    techniques()[args.technique].wrap(model, **{key: literal(value) for key, value in options.items()})
    model.to(device).recompute = args.recompute
    if args.shard:
        distributed.shard(model)
    history = train.train(
        model, examples, steps=args.steps, lr=args.rate or compare.RATES.get(args.technique) or 1e-3, batch_size=args.batch_size,
        schedule=args.schedule, warmup=max(1, args.steps // 20), pad=tokenizer.pad or 0, seed=args.seed, checkpoints=args.checkpoints,
        save_every=args.save_every, resume=args.resume, log=args.log, name=args.technique)
    techniques()[args.technique].save(model, args.out)
    if distributed.place()[0] == 0:
        print(f"loss {history[0]['loss']:.3f} at the first step, {history[-1]['loss']:.3f} at the last; saved {args.out}")


def literal(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def run_eval(args):
    model, tokenizer = load(args)
    if args.text:
        with open(args.text, encoding="utf-8") as file:
            print(repr(evaluate.perplexity(model, tokenizer, file.read(), length=args.length, windows=args.windows)))
        return
    part = data.task(args.task, tokenizer, "test", limit=64, length=args.length)
    print(repr(compare.score(model, tokenizer, part, args.length // 2, args.windows)))


def run_generate(args):
    import torch

    model, tokenizer = load(args)
    text = tokenizer.chat([{"role": "user", "content": args.prompt}], generate=True) if args.chat else args.prompt
    shown, new = "", []

    def stream(tokens):
        nonlocal shown
        new.append(int(tokens[0]))
        whole = tokenizer.decode([t for t in new if t != tokenizer.eos])
        if not whole.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(whole[len(shown):], end="", flush=True)
            shown = whole

    model.generate([tokenizer.encode(text)], args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                   min_p=args.min_p, stop=() if tokenizer.eos is None else tokenizer.eos, stream=stream,
                   generator=torch.Generator().manual_seed(args.seed))
    print()


def run_show(args):
    model, _ = load(args)
    print(show(model))
    if args.cost:
        print(report.report(model).table())


def run_export(args):
    model, tokenizer = load(args)
    for name in dict.fromkeys(read(path)[1]["technique"] for path in args.adapter):
        techniques()[name].merge(model, keep=False)
    hub.save(model, args.out, tokenizer=tokenizer, type=args.type)
    print(f"wrote {args.out}")


def run_fetch(args):
    print(hub.fetch(args.name))
