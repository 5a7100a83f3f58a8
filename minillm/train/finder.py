"""The learning-rate range test: which rates does this training take?

    1. Train a copy of the model. The rate grows from step to step, s = 0, ..., T - 1:
           rate(s) = low (high / low)^(s / (T - 1))
    2. Smooth the loss of each step, because every batch has another one:
           a(s) = beta a(s - 1) + (1 - beta) loss(s),   smooth(s) = a(s) / (1 - beta^(s + 1))
    3. Stop as soon as smooth(s) > explode * (the lowest smooth so far), or a loss is no number.
    4. Suggest a tenth of the rate at which smooth is lowest.

                    Smith 2017, "Cyclical learning rates", arXiv 1506.01186, section 3.3

    code       formula   meaning
    low, high            the first and the last rate
    steps      T         as many rates are tried, each for one step
    smooth     beta      0: no smoothing
    explode              1.5: half more than the lowest loss

At first the rates are too low and the loss stays as it is. Then it falls, and then it explodes.
Smith lets the rate grow linearly, looks at the accuracy, and reads the lowest and the highest good
rate from the picture. The exponential growth, the smoothed loss and the end at an explosion are
those of fastai's `lr_find`. At its lowest the loss begins to suffer from the rate, so the rate to
train with is lower: a tenth of it is the usual advice.

It is where a search starts, and it is careful. `minillm train --technique NAME --find-rate` on the
tiny model, beside the best rate of the sweep of `minillm compare`:

                full     pissa    lora     adapters  prompts  ia3
    suggested   0.00038  0.00038  0.0015   0.0027    0.0027   0.0027
    swept       0.0004   0.002    0.006    0.005     0.03     0.1

What begins at zero, or is small, has hardly begun to learn when the rates of the test become too
high for it: a soft prompt, (IA)3. There the swept rate is far above the suggested one.

    found = minillm.train.find_rate(model, examples)
    print(found)
    found.picture("rates.png")
    minillm.train.train(model, examples, steps=1000, lr=found.rate)

The copy shares with the model what does not learn: frozen weights, the buffers of formats and
masks. So the model stays as it is, to the last bit, with its gradients and its modes; and so do
torch's random numbers. (A hook that itself holds the model still acts on the model, not on the
copy.) Cost: `steps` steps of training, and a copy of what learns.

Not included: several processes, and rates that differ between parameters (`rates=` gives factors,
which all grow together).
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import math

from torch.distributed.fsdp import FSDPModule

from minillm import distributed, files, options
from minillm.registry import Format, Patch
from minillm.train.history import SIGN, check_picture
from minillm.train.loop import Run, begin, show, train, update
from minillm.train.losses import NotFinite
from minillm.train.schedules import rate
from minillm.train.settings import resolve

FIRST = 5  # steps without a stop: a mean of fewer losses says little


@dataclasses.dataclass
class Found:
    """The result of `find_rate`; `str()` gives it as text.

    rate: the suggested rate. history: [{"step", "rate", "loss", "smooth"}] of each step.
    lowest: the entry with the lowest smoothed loss. ended: the rate at which the loss exploded, or
    None if it did not.
    """

    rate: float
    history: list
    lowest: dict
    ended: float | None

    def __str__(self):
        first, last, low = self.history[0], self.history[-1], self.lowest
        lines = [f"{len(self.history)} rates from {first['rate']:.2g} to {last['rate']:.2g}: the "
                 f"smoothed loss was {first['smooth']:.3f} at the first, {low['smooth']:.3f} at "
                 f"{low['rate']:.2g}"]
        if self.ended is not None:
            lines.append(f"it exploded at {self.ended:.2g}")
        else:
            lines.append("it has not exploded: train.find_rate(..., high=) in Python tries higher "
                         "rates")
        return "\n".join([*lines, f"suggested rate: {self.rate:.2g}"])

    def picture(self, path, force=False):
        """Draw the loss against the rate, raw and smoothed, with the suggestion.

        path: a .png, .svg or .pdf file. ImportError without matplotlib; `check_picture` says which
        files it does not replace.
        """
        kind = check_picture(path, force)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        rates = [r["rate"] for r in self.history]
        axes.plot(rates, [r["loss"] for r in self.history], color="C0", alpha=0.3, linewidth=1,
                  label="loss of each step")
        axes.plot(rates, [r["smooth"] for r in self.history], color="C0", label="smoothed")
        axes.plot(self.lowest["rate"], self.lowest["smooth"], "*", color="C1", markersize=12,
                  label=f"lowest: {self.lowest['rate']:.2g}")
        axes.axvline(self.rate, color="C2", linestyle="--", label=f"suggested: {self.rate:.2g}")
        top = 1.5 * max(r["smooth"] for r in self.history[:FIRST])
        axes.set(xscale="log", xlabel="learning rate", ylabel="nats per learnt token")
        axes.set_ylim(top=min(top, axes.get_ylim()[1]))  # else the explosion hides the rest
        axes.legend(fontsize="small")
        with files.atomic(path) as new:
            figure.savefig(new, format=kind, dpi=120, metadata={"Creator": SIGN})


def find_rate(model, examples, *, low=1e-6, high=1.0, steps=100, smooth=0.9, explode=1.5,
              batch_size=8, accumulate=1, weight_decay=0.0, betas=(0.9, 0.999), clip=1.0,
              rates=None, seed=0, pad=0, loss=None, progress=True):
    """Try rates on a copy of the model with a list of `data.Example`; returns a `Found`.

    low, high    the first and the last rate
    steps        how many rates are tried, one at each step
    smooth       beta of the smoothed loss, from 0 up to (but not) 1
    explode      the test stops when the smoothed loss is this many times its lowest value
    the rest     as in `train`: give what you train with

    ValueError for a wrong setting, a test whose loss explodes in its first steps, a model in
    which nothing learns, and several processes.
    """
    low, high = options.positive("low", low), options.positive("high", high)
    smooth = options.share("smooth", smooth)
    explode = options.real("explode", explode, lambda x: 1 < x < math.inf, "a number above 1")
    steps = options.whole("steps", steps, FIRST + 1)
    if not low < high:
        raise ValueError(f"low={low:g}, high={high:g}: the rates grow, so low is below high")
    if distributed.place()[1] > 1 or isinstance(model, FSDPModule):
        raise ValueError("the range test trains a copy of the model in one process: find the rate "
                         "without torchrun, and before train.shard(model)")
    defaults = {p.name: p.default for p in inspect.signature(train).parameters.values()
                if p.default is not p.empty}
    growing = functools.partial(grown, ratio=low / high)
    given = defaults | dict(
        steps=steps, lr=high, schedule=growing, batch_size=batch_size, accumulate=accumulate,
        weight_decay=weight_decay, betas=betas, clip=clip, rates=rates, seed=seed, pad=pad,
        loss=loss, progress=progress, name="rates")
    return tried(Run(copied(model), examples, resolve(examples, given)), smooth, explode)


def grown(step, steps, warmup, *, ratio):
    """A schedule: (low / high)^(1 - s / (T - 1)), which is 1 at the last step.

    >>> [round(grown(step, 5, 0, ratio=1e-4), 6) for step in range(5)]
    [0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    return ratio ** (1 - step / (steps - 1))


def tried(run, beta, explode):
    """The Found of a Run: one step for each rate, until the loss explodes."""
    history, mean, best, ended = [], 0.0, math.inf, None
    with contextlib.ExitStack() as stack:
        _, bar, _ = begin(run, stack)
        while not run.over() and ended is None:
            try:
                record = update(run)
            except NotFinite:
                o = run.options
                ended = o.lr * rate(len(run.history), o.steps, o.schedule)
                break
            run.history.append(record)
            show(bar, record)
            mean = beta * mean + (1 - beta) * record["loss"]
            value = mean / (1 - beta ** len(run.history))
            history.append(dict(step=record["step"], rate=record["rate"], loss=record["loss"],
                                smooth=value))
            best = min(best, value)
            if value > explode * best and len(history) > FIRST:
                ended = record["rate"]
    if len(history) <= FIRST + 1 and ended is not None:
        raise ValueError(f"the loss exploded after {len(history)} steps, at the rate {ended:.2g}: "
                         "begin with a lower low=")
    lowest = min(history[FIRST:], key=lambda r: r["smooth"])
    return Found(lowest["rate"] / 10, history, lowest, ended)


def copied(model):
    """A copy of the model that shares with it all that a training does not change."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's copy would compile anew
    kept = [p for p in model.parameters() if not p.requires_grad]
    kept += [b for module in model.modules() if isinstance(module, (Format, Patch))
             for b in module.buffers(recurse=False)]
    return copy.deepcopy(model, {id(t): t for t in kept})
