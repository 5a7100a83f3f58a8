"""Train several LoRAs at once over one frozen base: read `update` first.

    theta_i  <-  AdamW_i(theta_i, gradient of the mean cross-entropy per learnt token of run i)

    for name, r in (("a", 8), ("b", 16)):
        torch.manual_seed(0)
        minillm.lora.wrap(model, name=name, r=r)
    logs = minillm.train.many(model, {"a": dict(lr=1e-3), "b": dict(lr=3e-3, steps=50)},
                              examples=examples, steps=100)
    minillm.use(model, "b")
    minillm.lora.save(model, "a.safetensors", name="a")

The base is in memory once, in any format, and each of its products runs once over the rows of all
runs (see `lora.many`). A run has everything else for itself: its examples and their order, its
batches, the mean over its own tokens, the clipping, AdamW's state, the schedule, the last step. So
each ends where it ends when trained alone, within the rounding of the products:

    minillm.use(model, "a")
    minillm.train.train(model, examples, lr=1e-3, steps=100)

What remains of the other runs: all rows are padded to the longest of them, which takes time. The
masks of dropout are drawn for all rows at once, so with dropout a run ends near, not where it ends
alone. A run that is over leaves the batch, and the others go on faster.

Not included: evaluation during the training, checkpoints, several processes. peft refuses to train
rows of several adapters. mLoRA (VLDB 2025) does, in its own classes of Llama.
"""

import contextlib
import inspect
import itertools
import math
import time
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from minillm import data, distributed
from minillm.calling import logits, native
from minillm.lora.many import check, together
from minillm.model.loss import cross_entropy_sum, learnt, wide
from minillm.registry import layers, parameters, prepare
from minillm.registry.names import by_rows
from minillm.train import masters
from minillm.train.groups import groups
from minillm.train.loop import check_compiled, forked, train, training_mode
from minillm.train.losses import NotFinite
from minillm.train.room import check_room
from minillm.train.schedules import rate
from minillm.train.settings import resolve

SETTINGS = ("examples", "steps", "epochs", "lr", "batch_size", "accumulate", "schedule", "warmup",
            "weight_decay", "betas", "clip", "rates", "seed")


class Diverged(NotFinite):
    """Some of the runs have a loss that is no number; the others are complete.

    runs: {name: what happened}. logs: {name: log} of all runs.
    """

    def __init__(self, runs, logs):
        whole = [repr(name) for name in logs if name not in runs]
        rest = f"complete: {', '.join(whole)}" if whole else "no run is complete"
        super().__init__("; ".join(f"run {name!r}, {text}" for name, text in runs.items())
                         + f" ({rest})")
        self.runs, self.logs = runs, logs


def many(model, runs, *, pad=0, progress=True, name="train", **shared):
    """Train the LoRAs that `runs` names, all at once; returns {name: its log} (see `history`).

    runs       {name of a LoRA: its settings, a dict}, or pairs of the two. The settings are those
               of `train` with the same defaults: examples, steps or epochs, lr, batch_size,
               accumulate, schedule, warmup, weight_decay, betas, clip, rates, seed
    shared     settings of all runs; a run's own count more
    pad, progress, name    as in `train`, for all runs

    Only these LoRAs take part meanwhile, each in its own rows; other adapters take none. After the
    training the same adapters as before take part. In a log, `seconds` are those of the whole step,
    which its runs share. A run whose loss is no number ends before that step. The others go on to
    their end, and then a Diverged (ValueError) names it.

    ValueError for a wrong or an unknown setting, with the name of the run; two runs of one name, a
    name that no adapter has, an adapter that is no LoRA (and see `lora.many.together`); anything
    else that learns, because the runs would share it; BatchNorm, several processes.
    """
    job = Job(model, pad, checked(model, runs, shared))
    with contextlib.ExitStack() as stack:
        job.cut = stack.enter_context(together(model, [run.name for run in job.runs]))
        stack.enter_context(training_mode(job))
        stack.enter_context(forked(job.device))
        torch.manual_seed(job.runs[0].options.seed)  # of the dropout
        steps = max(run.options.steps for run in job.runs)
        bar = stack.enter_context(tqdm(total=steps, desc=name, unit="step", disable=not progress,
                                       leave=False))
        while job.going():
            update(job)
            bar.set_postfix_str(f"{len(job.going())} runs going on", refresh=False)
            bar.update()
    logs = {run.name: run.history for run in job.runs}
    if diverged := {run.name: run.diverged for run in job.runs if run.diverged}:
        raise Diverged(diverged, logs)
    return logs


def update(job):
    """Make one optimizer step of every run that is not over."""
    began, going = time.perf_counter(), job.going()

    # Each run draws the examples of its next step, one list for each micro-batch.
    for run in going:
        run.draw()

    # One batch has a micro-batch of every run, one under the other. Each loss is divided by the
    # tokens that its own run learns in this step. The sum has the gradients of all runs, because
    # no LoRA changes another one's loss.
    for parts in itertools.zip_longest(*(run.micro for run in going)):
        here = [(run, part) for run, part in zip(going, parts) if part]
        sizes = {run.name: len(part) for run, part in here}
        batch = data.collate([example for _, part in here for example in part], job.pad)
        ids, labels, mask = (None if t is None else t.to(job.device) for t in batch)
        job.cut(**sizes)
        found = losses(job.given, ids, labels, mask, list(sizes.values()))
        sum(loss / run.count for (run, _), loss in zip(here, found)).backward()
        for (run, _), loss in zip(here, torch.stack(found).tolist()):
            run.total += loss
            masters.collect(run.masters)

    # Each run clips its own gradients and steps its own AdamW.
    for run in going:
        run.step()
    seconds = time.perf_counter() - began
    for run in going:
        if not run.diverged:
            run.history[-1]["seconds"] = seconds


def losses(model, ids, labels, mask, sizes):
    """The summed loss of each run, a list of tensors (); as `losses.loss_sum`, run by run.

    ids, labels, mask (b, t); sizes: how many of the b rows each run has.
    """
    labels = labels.clone()
    labels[:, 0] = data.NOT_LEARNT
    ids, labels, mask = prepare(model, ids, labels, mask)
    if native(model):
        model = getattr(model, "_orig_mod", model)
        h, head = model.hidden(ids, mask)[:, :-1], model.lm_head  # (b, t - 1, width)
        if not by_rows(head):
            parts = [(h_i, *learnt(y_i, model.config.vocab_size))
                     for h_i, y_i in zip(h.split(sizes), labels.split(sizes))]
            return [cross_entropy_sum(h_i[keep], y, head) for h_i, keep, y in parts]
        every = head(h)
    else:
        every = logits(model, ids, mask, alone=False)[:, :-1]  # (b, t - 1, vocab)
    return [F.cross_entropy(wide(p_i).flatten(0, 1), y_i.flatten(), reduction="sum",
                            ignore_index=data.NOT_LEARNT)
            for p_i, y_i in zip(every.split(sizes), labels[:, 1:].split(sizes))]


class Job:
    """What all runs share: the model with its frozen base, and the rows of a batch."""

    def __init__(self, model, pad, runs):
        self.given, self.pad, self.runs = model, pad, runs
        self.model = getattr(model, "_orig_mod", model)
        self.device = runs[0].learning[0][1].device
        self.cut = None  # the function of `together`

    def going(self):
        return [run for run in self.runs if not run.over()]


class Run:
    """One LoRA and what it has for itself: data, schedule, optimizer, log."""

    def __init__(self, model, name, examples, options):
        o = options
        check_room(model, examples)
        self.name, self.options = name, o
        own = {id(p) for layer in layers(model).values() if name in layer.patches
               for p in layer.patches[name].parameters()}
        model = getattr(model, "_orig_mod", model)
        self.learning = [(n, p) for n, p in model.named_parameters()
                         if p.requires_grad and id(p) in own]
        if not self.learning:
            raise ValueError("nothing in this LoRA learns: requires_grad is False")
        alone = types.SimpleNamespace(named_parameters=lambda: self.learning)
        sets = groups(alone, o.lr, o.weight_decay, o.rates)
        for _, p in self.learning:
            p.grad = None  # remove older gradients
        self.masters = masters.copies(self.learning)
        self.stepped = [self.masters.get(p, p) for _, p in self.learning]
        for group in sets:
            group["params"] = [self.masters.get(p, p) for p in group["params"]]
        self.optimizer = torch.optim.AdamW(sets, betas=o.betas)
        self.batches = data.batches(examples, o.batch_size, o.seed)
        self.history, self.diverged = [], ""
        self.micro, self.count, self.total = [], 0, 0.0  # of this step

    def over(self):
        return bool(self.diverged) or len(self.history) >= self.options.steps

    def draw(self):
        """The micro-batches of the next step, and how many tokens it learns."""
        o = self.options
        cut = o.last_accumulate and len(self.history) == o.steps - 1
        parts = o.last_accumulate if cut else o.accumulate
        self.micro = [self.batches.draw() for _ in range(parts)]
        self.count = sum(label != data.NOT_LEARNT for part in self.micro for example in part
                         for label in example.labels[1:])
        self.total = 0.0

    def step(self):
        """Clip, step and note it in the log, as `loop.update` does; or end the run."""
        o, step = self.options, len(self.history)
        share = rate(step, o.steps, o.schedule, o.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        norm = nn.utils.clip_grad_norm_(self.stepped, o.clip or math.inf).item()
        if not math.isfinite(self.total) or not math.isfinite(norm):
            self.diverged = (f"step {step}: the loss is {self.total / self.count} and the "
                             f"gradient's norm {norm}; a lower learning rate than {o.lr} may help")
        else:
            self.optimizer.step()
            masters.write_back(self.masters)
            tokens = sum(len(example.ids) for part in self.micro for example in part)
            self.history.append(dict(step=step, loss=self.total / self.count, rate=o.lr * share,
                                     norm=norm, learnt=self.count, tokens=tokens))
        self.optimizer.zero_grad(set_to_none=True)


# --- checks -------------------------------------------------------------------------------------


def checked(model, runs, shared):
    """[Run] of the given settings; ValueError before any work."""
    check_compiled(model)
    check_model(model)
    if not isinstance(runs, (dict, list, tuple)):
        raise ValueError(f"runs={runs!r} is neither a dict {{name: settings}} nor a list of pairs")
    pairs = list(runs.items() if isinstance(runs, dict) else runs)
    names = [name for name, _ in pairs]
    if not names:
        raise ValueError("runs is empty: name at least one LoRA")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two runs are called {twice[0]!r}: a run is the training of one LoRA, "
                         "and its name is that LoRA's")
    check(model, names)
    return [run_of(model, name, shared, own) for name, own in pairs]


def run_of(model, name, shared, own):
    """A Run; the ValueError of a wrong setting names it."""
    if not isinstance(own, dict):
        raise ValueError(f"run {name!r}: {own!r} is not a dict of settings")
    given = shared | own
    known = inspect.signature(train).parameters
    for key in given:
        if key not in SETTINGS:
            why = "is not possible for runs at once" if key in known else "is unknown"
            raise ValueError(f"run {name!r}: {key}= {why}; a run has {', '.join(SETTINGS)}")
    for key in ("examples", "lr"):
        if key not in given:
            raise ValueError(f"run {name!r} has no {key}=")
    defaults = {p.name: p.default for p in known.values() if p.default is not p.empty}
    examples = given["examples"]
    try:
        return Run(model, name, examples, resolve(examples, defaults | given))
    except ValueError as error:
        raise ValueError(f"run {name!r}: {error}") from error


def check_model(model):
    """ValueError if runs would not be independent of each other in this model."""
    if distributed.place()[1] > 1 or any(isinstance(m, FSDPModule) for m in model.modules()):
        raise ValueError("runs at once need one process: without torchrun, and without train.shard")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name!r} is a {type(module).__name__}, which computes over all rows "
                             "of a batch: the runs would not be independent of each other")
    shared = [name for name, _, _, p in parameters(model) if p.requires_grad]
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise ValueError(f"{shared[0]!r}{more} of the model's own learns, and all runs would share "
                         "it: only LoRAs may learn here")
