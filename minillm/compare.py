"""All techniques side by side on one model and one task: what each costs, and what it gives, before and after making it small.

For each technique, in a process of its own (so that its peak of memory is its own):

    load, measure | for each learning rate: wrap, train a little, measure on the validation split, unwrap | wrap, train at the best
    rate, measure on the test split | merge where it can be | int8: measure | half of the weights pruned: measure

The learning rate is chosen for each technique by itself, for a technique at another's rate says nothing: the sweep starts
with three rates around a usual one and moves on while the best stands at its edge. Nine variants of LoRA, each so tuned, end within 2%
of each other (arXiv 2602.04998).
"""

import concurrent.futures
import copy
import json
import math
import multiprocessing
import pathlib
import time

import torch
from tqdm.auto import tqdm

from minillm import data, evaluate, files, hub, report, train
from minillm.registry import CannotMerge, techniques

# The usual learning rate of each, where its sweep begins. "full" trains everything, "none" nothing.
RATES = {"none": None, "full": 3e-4, "freeze": 1e-3, "prompts": 3e-2, "lora": 2e-3, "adapters": 2e-3}
WORSE = math.inf
SIZES = {  # what a run takes by default: the tiny model needs more steps and has the speed for them
    "tiny": dict(steps=150, sweep_steps=40, batch_size=8, windows=24, limit=64),
    "smollm2": dict(steps=40, sweep_steps=10, batch_size=4, windows=8, limit=32),
}


def compare(model="tiny", task="language", names=None, *, length=128, seed=0, threads=None, progress=True, **sizes):
    """The table: a list of rows, a dict each. See SIZES for what `sizes` may hold. ValueError for an unknown technique or task."""
    names = list(RATES) if names is None else names
    for name in names:
        if name not in RATES:
            raise ValueError(f"technique {name!r} is not one that trains; known: {', '.join(RATES)}")
    data.check(task)  # now, not after hours of work
    settings = dict(SIZES.get(str(model), SIZES["smollm2"]), **{k: v for k, v in sizes.items() if v is not None})
    settings |= dict(model=str(model), task=task, length=length, seed=seed, threads=threads, progress=progress)
    hub.load(model)  # makes the tiny model, or says now what is missing
    spawn, rows = multiprocessing.get_context("spawn"), []
    for name in tqdm(names, desc="compare", unit="technique", disable=not progress):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            rows.append(pool.submit(measure, name, settings).result())
    return rows


def measure(name, settings):
    """One row of the table."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    program = report.peak_memory()
    model, tokenizer = hub.load(settings["model"])
    parts = {split: data.task(settings["task"], tokenizer, split, length=settings["length"], limit=limit)
             for split, limit in (("train", None), ("validation", settings["limit"]), ("test", settings["limit"]))}

    def quality(model, split, windows=settings["windows"]):
        return score(model, tokenizer, parts[split], settings["length"], windows)

    row = dict(technique=name, metric=parts["test"].metric, rate=None, trainable=0)
    before = quality(model, "test")
    sign = 1 if parts["test"].metric == "perplexity" else -1  # the sweep wants the least
    seconds = 0.0
    if name != "none":
        row["rate"], row["sweep"] = sweep(name, model, parts["train"], tokenizer, settings,
                                          lambda m: sign * quality(m, "validation", max(2, settings["windows"] // 2)))
        began = time.perf_counter()
        model = fit(name, model, parts["train"], tokenizer, settings, row["rate"], settings["steps"])
        seconds = time.perf_counter() - began
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row |= dict(peak_bytes=report.peak_memory() - program, seconds=seconds, before=before.record())
    row |= dict(after=quality(model, "test").record(), bytes=report.total_bytes(model))
    try:
        if name in techniques():
            techniques()[name].merge(model, keep=False)
    except CannotMerge:
        pass
    for column, small in (("int8", int8), ("pruned", pruned)):
        less = small(copy.deepcopy(model))
        row |= {column: quality(less, "test").record(), f"{column}_bytes": report.total_bytes(less)}
    return row


def int8(model):
    return techniques()["quant"].wrap(model)


def pruned(model):
    prune = techniques()["prune"]
    return prune.merge(prune.wrap(model, sparsity=0.5), keep=False)


def fit(name, model, part, tokenizer, settings, lr, steps):
    """Wrap and train; returns the model."""
    torch.manual_seed(settings["seed"])
    if name in techniques():
        techniques()[name].wrap(model)
    train.train(model, part.examples, steps=steps, lr=lr, batch_size=settings["batch_size"], warmup=max(1, steps // 10),
                seed=settings["seed"], pad=tokenizer.pad or 0, progress=settings["progress"], name=f"{name} at {lr:.2g}")
    return model


def sweep(name, model, part, tokenizer, settings, loss):
    """(the best learning rate, {rate: loss}); the model is left as it was."""
    found, grid = {}, [RATES[name] * factor for factor in (10**-0.5, 1, 10**0.5)]
    before = {key: t.clone() for key, t in model.state_dict().items()} if name in ("full", "freeze") else None
    while grid:
        lr = grid.pop(0)
        try:
            found[lr] = float(loss(fit(name, model, part, tokenizer, settings, lr, settings["sweep_steps"])))
        except ValueError as error:  # the loss or the logits are no longer numbers
            if "nan" not in str(error) and "inf" not in str(error):
                raise
            found[lr] = WORSE
        if name in techniques():
            techniques()[name].unwrap(model)
        if before is not None:
            model.load_state_dict(before)
        best = min(found, key=found.get)
        if not grid and len(found) < 6 and best in (min(found), max(found)):
            grid.append(best * 10**0.5 if best == max(found) else best / 10**0.5)
    return best, {f"{lr:.2g}": value for lr, value in sorted(found.items())}


def score(model, tokenizer, part, length, windows):
    """The task's measure on one split, an evaluate.Score."""
    if part.metric == "perplexity":
        return evaluate.perplexity(model, tokenizer, part.text, length=2 * length, windows=windows)
    if part.choices:
        return evaluate.accuracy(evaluate.choose(model, tokenizer, part.prompts, part.choices), part.references)
    return evaluate.rouge(evaluate.generate_text(model, tokenizer, part.prompts), part.references)


def shown(rows):
    """The rows as they are printed."""
    metric = rows[0]["metric"]
    return [{
        "technique": r["technique"], "rate": f"{r['rate']:.1g}" if r["rate"] else "", "trainable": f"{r['trainable']:,}",
        "peak MB": f"{r['peak_bytes'] / 1e6:,.0f}", "seconds": f"{r['seconds']:.1f}",
        f"{metric} before": f"{r['before']['value']:.3f}", "after": f"{r['after']['value']:.3f}", "int8": f"{r['int8']['value']:.3f}",
        "half pruned": f"{r['pruned']['value']:.3f}", "MB": f"{r['bytes'] / 1e6:,.1f}", "int8 MB": f"{r['int8_bytes'] / 1e6:,.1f}",
    } for r in rows]


def write(rows, directory, title=""):
    """table.json, table.md and table.png (quality against cost) in the directory."""
    directory = pathlib.Path(directory)
    with files.atomic(directory / "table.json") as new:
        new.write_text(json.dumps(rows, indent=2) + "\n")
    with files.atomic(directory / "table.md") as new:
        new.write_text((f"{title}\n\n" if title else "") + report.table(shown(rows)) + "\n")
    picture(rows, directory / "table.png", title)


def picture(rows, path, title=""):
    """Quality against what learns and against memory: a dot a technique, its ends after int8 and after pruning."""
    files.need("matplotlib", "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        after = row["after"]
        interval = [[max(0.0, after["value"] - after["low"])], [max(0.0, after["high"] - after["value"])]]
        for axes, x in ((left, row["trainable"]), (right, row["peak_bytes"] / 1e6)):
            axes.errorbar(x, after["value"], yerr=interval, fmt="o", color=f"C{i}", label=row["technique"])
            axes.plot(x, row["int8"]["value"], "v", color=f"C{i}", alpha=0.5)
    left.set(xscale="symlog", xlabel="trainable parameters", ylabel=f"{rows[0]['metric']}, held-out text")
    right.set(xlabel="peak memory beyond the program, MB")
    left.axhline(rows[0]["before"]["value"], ls=":", color="grey", label="before")
    right.plot([], [], "v", color="grey", alpha=0.5, label="after int8")
    right.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    with files.atomic(path) as new:
        figure.savefig(new, format="png", dpi=120)
