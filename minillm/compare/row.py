"""One row of the table: load, sweep the learning rate, train once for each seed, measure,
quantize and prune, measure again.
"""

import copy
import hashlib
import statistics
import time

import torch

from minillm import data, measure, train, zoo
from minillm.compare.rates import number, sweep, usual
from minillm.measure import report
from minillm.registry import METHODS, CannotMerge, techniques, use

AT_ONCE = {"lora"}  # these leave the base as it is; pissa and loftq change it, each for itself


def make_row(name, settings, splits):
    """One row of the table, a dict for JSON. Runs in a process of its own.

    splits: the result of `parts`, which is read once for all rows.
    """
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    bench = Bench(name, settings, splits)
    before = bench.quality(bench.model)
    main = next(iter(before))  # the metric that the sweep and the table use
    row = dict(technique=name, metric=main, rate=None, before=before[main].record())
    row |= dict(trainable=0, peak_bytes=0, seconds=0.0)
    if name != "none":
        row |= sweep(
            usual(name, settings["model"]),
            lambda lr: bench.attempt(lr)[main],
            measure.metric(main).better,
            (lambda rates: bench.together(rates, main)) if name in AT_ONCE else None,
        )
    after, less = [], {"int8": [], "pruned": []}
    for model in bench.trained(row):
        after.append(bench.quality(model) if name != "none" else before)
        row["bytes"] = report.total_bytes(model)
        whole = merged(name, copy.deepcopy(model))
        for column, small in (("int8", int8), ("pruned", pruned)):
            smaller = small(copy.deepcopy(whole))
            less[column].append(bench.quality(smaller)[main])
            row[f"{column}_bytes"] = report.total_bytes(smaller)
    of_seeds = {metric: [found[metric] for found in after] for metric in before}
    row |= changes("after", before[main], of_seeds[main])
    for column, found in less.items():
        row |= changes(column, of_seeds[main], found)
    row["scores"] = {
        metric: dict(before=one.record(), **changes("after", one, of_seeds[metric]))
        for metric, one in before.items()
    }
    return row


class Bench:
    """The tools to measure one technique: the untuned model, the text, the settings."""

    def __init__(self, name, settings, splits):
        self.name, self.settings, self.splits = name, settings, splits
        self.model, self.tokenizer = zoo.load(
            settings["model"], settings["dtype"], settings["device"]
        )

    def quality(self, model, split="test", windows=None):
        """{metric: Score} of a model."""
        windows = windows or self.settings["windows"]
        part = self.splits[split]
        return scores(model, self.tokenizer, part, self.settings["length"], windows)

    def fit(self, lr, steps, seed):
        """(a copy of the model, wrapped and trained; a dict of its peak memory and seconds)."""
        model = copy.deepcopy(self.model)
        torch.manual_seed(seed)
        if self.name in METHODS:
            METHODS[self.name].wrap(model)
        with report.Peak(model) as peak:
            began = time.perf_counter()
            name = f"{self.name} at {lr:.2g}"
            train.train(model, lr=lr, name=name, **self.how(steps, seed))
            seconds = time.perf_counter() - began
        return model, dict(peak_bytes=peak.bytes, seconds=seconds)

    def how(self, steps, seed):
        """The settings that a training has at every rate."""
        return dict(
            examples=self.splits["train"].examples,
            steps=steps,
            batch_size=self.settings["batch_size"],
            warmup=max(1, steps // 10),
            seed=seed,
            pad=self.tokenizer.pad or 0,
            progress=self.settings["progress"],
        )

    def attempt(self, lr):
        """The metrics after training at a rate."""
        model, _ = self.fit(lr, self.settings["sweep_steps"], self.settings["seed"])
        return self.validated(model)

    def together(self, rates, metric):
        """{rate: the metric after training at it, or None}: all at once, over one frozen base.

        Each LoRA starts as `fit` starts it, because the seed is set anew before each wrap.
        """
        seed, model, lost = self.settings["seed"], copy.deepcopy(self.model), {}
        names = {f"rate{i}": lr for i, lr in enumerate(rates)}
        for name in names:
            torch.manual_seed(seed)
            METHODS[self.name].wrap(model, name=name)
        runs = {name: dict(lr=lr) for name, lr in names.items()}
        how = self.how(self.settings["sweep_steps"], seed)
        try:
            train.many(model, runs, name=f"{self.name} at {len(runs)} rates", **how)
        except train.Diverged as error:  # the other runs are complete
            lost = error.runs
        return {
            lr: None if name in lost
            else number(lambda: self.validated(use(model, name))[metric])
            for name, lr in names.items()
        }

    def validated(self, model):
        """The metrics on half of the validation split's windows."""
        return self.quality(model, "validation", max(2, self.settings["windows"] // 2))

    def trained(self, row):
        """Yield the model of each seed, at the row's rate; the row gets the cost of the last."""
        if self.name == "none":
            yield self.model
            return
        first = self.settings["seed"]
        for seed in range(first, first + self.settings["seeds"]):
            model, cost = self.fit(row["rate"], self.settings["steps"], seed)
            learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row.update(cost, trainable=learnt)
            yield model


def changes(column, before, after):
    """{column: the mean over the seeds, column_change: its change against `before`,
    column_seeds: the figure of each seed}, for JSON.

    The interval of the figure is that of the paired change, applied to the figure before.
    """
    change = measure.change(before, after)
    value = statistics.fmean(after)
    record = dict(name=after[0].name, value=value, n=after[0].n, low=None, high=None)
    if after == [before]:
        record = before.record()
    elif change.low is not None:
        start = statistics.fmean(before) if isinstance(before, list) else float(before)
        metric = measure.metric(record["name"])
        record |= dict(low=metric.moved(start, change.low), high=metric.moved(start, change.high))
    return {
        column: record,
        f"{column}_change": change.record(),
        f"{column}_seeds": [float(one) for one in after],
    }


# --- making small ---------------------------------------------------------------------------------


def merged(name, model):
    """Merge the technique into the weights, if it can be merged; in place, returns the model."""
    if name not in METHODS:
        return model
    try:
        return techniques()[METHODS[name].family].merge(model, keep=False)
    except CannotMerge:
        return model


def int8(model):
    return techniques()["quant"].wrap(model)


def pruned(model):
    prune = techniques()["prune"]
    return prune.merge(prune.wrap(model, sparsity=0.5), keep=False)


# --- the text and its metrics ---------------------------------------------------------------------


def parts(tokenizer, settings):
    """{split: Task} for the task in the settings, or for the user's own file."""
    if settings["data"]:
        return own(settings["data"], tokenizer, settings["length"])
    limits = dict(train=None, validation=settings["limit"], test=settings["limit"])
    return {
        split: data.task(settings["task"], tokenizer, split, length=settings["length"], limit=limit)
        for split, limit in limits.items()
    }


def own(path, tokenizer, length):
    """{split: Task} for the user's own file: a tenth of its different examples for test, a
    tenth for validation, the rest for training.

    A hash of ids and labels decides, so equal examples are in one split. The metric is the
    perplexity of the learnt tokens, such as the completions. ValueError for a file of
    fewer than 10 different examples.
    """
    groups = {}
    for example in data.read(path, tokenizer, length):
        groups.setdefault(
            hashlib.sha256(str((example.ids, example.labels)).encode()).digest(), []
        ).append(example)
    if len(groups) < 10:
        raise ValueError(
            f"{path} has {len(groups)} different examples: "
            "a comparison needs at least 10, to train, validate and test"
        )
    ordered = [groups[key] for key in sorted(groups)]
    tenth = len(ordered) // 10
    cut = dict(
        test=ordered[:tenth], validation=ordered[tenth : 2 * tenth], train=ordered[2 * tenth :]
    )
    return {
        split: data.Task("perplexity", [example for group in chosen for example in group])
        for split, chosen in cut.items()
    }


def scores(model, tokenizer, part, length, windows):
    """{name: Score} for all metrics of the task on one split; the first is its main metric."""
    if part.metric == "perplexity":
        one = (
            measure.perplexity(model, tokenizer, part.text, length=2 * length, windows=windows)
            if part.text
            else measure.completions(model, part.examples, tokenizer.pad or 0)
        )
        return {one.name: one}
    if part.choices:
        chosen = measure.choose(model, tokenizer, part.prompts, part.choices)
        found = [measure.accuracy(chosen, part.references), measure.f1(chosen, part.references)]
    else:
        texts = measure.generate_text(model, tokenizer, part.prompts, first_line=True)
        found = [
            measure.rouge(texts, part.references, kind) for kind in ("rougeL", "rouge1", "rouge2")
        ]
        found.append(measure.bleu(texts, part.references))
    return {one.name: one for one in found}


def score(model, tokenizer, part, length, windows):
    """The main metric of the task on one split, a measure.Score."""
    return next(iter(scores(model, tokenizer, part, length, windows).values()))
