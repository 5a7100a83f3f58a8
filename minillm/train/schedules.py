"""Schedules: the learning rate over the steps of a training, as a share of its peak.

    rate at step s  =  lr * share(s, T, w)          s = 0, ..., T - 1

    code      formula   meaning
    step      s         counted from 0
    steps     T         of the whole training
    warmup    w         the steps in which the rate rises, 0 <= w <= T
              x         (s - w) / (T - w), from 0 after the warm-up up to, but not, 1

A schedule is a plain function of (step, steps, warmup), with its options as keywords. All rise in
the first w steps, by (s + 1) / (w + 1), so that no step has a rate of 0. They differ afterwards.
`slanted_triangular` has a rise of its own.

    train(model, examples, ..., schedule="cosine", warmup=0.05)
    train(model, examples, ..., schedule=functools.partial(schedules.cosine, floor=0.1))
    train(model, examples, ..., schedule=lambda step, steps, warmup: 1 - (step / steps) ** 2)

A schedule needs no state: a resumed training asks it for the next step. transformers keeps a
scheduler object beside the optimizer, and its state in every checkpoint. Its schedules start at a
rate of 0, so its first step changes nothing. Ours are the same functions one step later:

    share(s, T, w)  =  transformers' share(s + 1, T + 1, w + 1)

Not included: restarts (Loshchilov & Hutter 2017), and rates that follow the loss.

>>> for name, share in SCHEDULES.items():
...     print(f"{name:20}", *(f"{share(step, 10, 2):.2f}" for step in range(10)))
constant             0.33 0.67 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00
linear               0.33 0.67 1.00 0.88 0.75 0.62 0.50 0.38 0.25 0.12
cosine               0.33 0.67 1.00 0.96 0.85 0.69 0.50 0.31 0.15 0.04
inverse_sqrt         0.33 0.67 1.00 0.87 0.77 0.71 0.65 0.61 0.58 0.55
warmup_stable_decay  0.33 0.67 1.00 1.00 1.00 1.00 1.00 1.00 1.00 0.50
slanted_triangular   0.03 0.52 1.00 0.88 0.76 0.64 0.52 0.39 0.27 0.15
"""

import functools
import inspect
import math
import numbers

from minillm import options
from minillm.train.openings import named

SHAPES = {  # of a decay, from 1 at x = 0 to 0 at x = 1
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def rise(step, warmup):
    """(s + 1) / (w + 1): the share in the warm-up."""
    return (step + 1) / (warmup + 1)


def fall(x, shape, floor):
    """floor + (1 - floor) shape(x): from 1 at x = 0 down to `floor` at x = 1."""
    floor = options.real("floor", floor, lambda y: 0 <= y <= 1, "a share of the rate, from 0 to 1")
    return floor + (1 - floor) * SHAPES[shape](x)


def part(step, steps, warmup):
    """x = (s - w) / (T - w): the part of the steps after the warm-up that is over."""
    return (step - warmup) / max(1, steps - warmup)


def constant(step, steps, warmup):
    """1 after the warm-up.

    >>> [round(constant(step, 8, 3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return rise(step, warmup) if step < warmup else 1.0


def linear(step, steps, warmup, *, floor=0.0):
    """floor + (1 - floor) (1 - x) after the warm-up.

    >>> [round(linear(step, 8, 3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    if step < warmup:
        return rise(step, warmup)
    return fall(part(step, steps, warmup), "linear", floor)


def cosine(step, steps, warmup, *, floor=0.0):
    """floor + (1 - floor) (1 + cos(pi x)) / 2 after the warm-up.

    Loshchilov & Hutter 2017, "SGDR", arXiv 1608.03983, equation 5, without restarts. Pretraining
    often ends at a tenth of the peak: floor=0.1.

    >>> [round(cosine(step, 8, 3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.905, 0.655, 0.345, 0.095]
    >>> [round(cosine(step, 8, 3, floor=0.1), 3) for step in range(3, 8)]
    [1.0, 0.914, 0.689, 0.411, 0.186]
    """
    if step < warmup:
        return rise(step, warmup)
    return fall(part(step, steps, warmup), "cosine", floor)


def inverse_sqrt(step, steps, warmup):
    """min((s + 1) / (w + 1), sqrt((w + 1) / (s + 1))).

    Vaswani et al. 2017, arXiv 1706.03762, equation 3: lr ~ min(n^-0.5, n W^-1.5) with n = s + 1
    and W = w + 1, divided by its peak W^-0.5. It does not depend on T, so a training can go on
    for as long as it likes. Without a warm-up it falls to a tenth in 100 steps.

    >>> [round(inverse_sqrt(step, 8, 3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.894, 0.816, 0.756, 0.707]
    """
    return min(rise(step, warmup), math.sqrt((warmup + 1) / (step + 1)))


def warmup_stable_decay(step, steps, warmup, *, decay=0.2, shape="linear", floor=0.0):
    """1 after the warm-up, and floor + (1 - floor) shape(y) in the last D steps.

    y = (s - (T - D)) / D. Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4. decay: D, as a
    whole number of steps, or as a share of them below 1. shape: "linear", "cosine" or "1-sqrt",
    which is 1 - sqrt(y) (Hägele et al. 2024, arXiv 2405.18392, who find it the best). MiniCPM
    halves the rate again and again instead. The model before the decay can also start a longer
    training. ValueError if warm-up and decay are together longer than the training.

    >>> [round(warmup_stable_decay(step, 8, 3, decay=4), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    D = decay_steps(steps, warmup, decay)
    options.one_of("shape", shape, tuple(SHAPES))
    if step < warmup:
        return rise(step, warmup)
    return fall(max(0, step - (steps - D)) / max(1, D), shape, floor)


def decay_steps(steps, warmup, decay):
    """The number of steps of the decay."""
    possible = "a whole number of steps from 0, or a share of them below 1"
    decay = options.real("decay", decay, lambda x: 0 <= x < 1 or x >= 1 and x % 1 == 0, possible)
    D = round(decay * steps) if decay < 1 else int(decay)
    if warmup + D > steps:
        raise ValueError(f"decay={decay:g}: a decay of {D} steps after a warm-up of {warmup} is "
                         f"longer than the training of {steps} steps")
    return D


def slanted_triangular(step, steps, warmup, *, ratio=32):
    """(1 + p (ratio - 1)) / ratio, with p = s / w while s < w, and p = 1 - x afterwards.

    Howard & Ruder 2018, "ULMFiT", arXiv 1801.06146, equation 3. warmup is the paper's `cut`, so
    its cut_frac = 0.1 is warmup=0.1 of `train`. The lowest rate is 1 / ratio of the peak. The
    paper rounds `cut` down and not the part after it, so its p falls below 0 where T cut_frac is
    no whole number; ours is 0 at step T for each T.

    >>> [round(slanted_triangular(step, 8, 3), 3) for step in range(8)]
    [0.031, 0.354, 0.677, 1.0, 0.806, 0.612, 0.419, 0.225]
    """
    ratio = options.real("ratio", ratio, lambda y: 1 <= y < math.inf, "a number from 1")
    p = step / warmup if step < warmup else 1 - part(step, steps, warmup)
    return (1 + p * (ratio - 1)) / ratio


SCHEDULES = {each.__name__: each for each in (constant, linear, cosine, inverse_sqrt,
                                              warmup_stable_decay, slanted_triangular)}
TAKES = "a function schedule(step, steps, warmup)"


# --- what `train` asks --------------------------------------------------------------------------


def rate(step, steps, schedule="cosine", warmup=0):
    """The share of the peak learning rate at `step`, counted from 0.

    schedule: a name of SCHEDULES, or a function of (step, steps, warmup). ValueError for an
    unknown name, a warm-up that is longer than the steps, a step after them, and a function that
    gives no finite number from 0.
    """
    if warmup > steps:
        raise ValueError(f"warmup={warmup!r} is longer than the training of {steps} steps")
    if not 0 <= step <= steps:
        raise ValueError(f"step={step!r} is not a step of a schedule of {steps} steps")
    share = function_of(schedule)(step, steps, warmup)
    if not isinstance(share, numbers.Real) or not 0 <= share < math.inf:
        raise ValueError(f"schedule={named(schedule)} gives {share!r} at step {step}: the share of "
                         "the rate is a finite number from 0")
    return float(share)


def function_of(schedule):
    """The function of a schedule's name, or the given function."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        return SCHEDULES[schedule]
    if not callable(schedule):
        raise ValueError(f"schedule={schedule!r} is neither {TAKES} nor one of "
                         f"{', '.join(SCHEDULES)}")
    return schedule


def checked(schedule, steps, warmup):
    """The schedule, asked for every step, so that none fails later; one of SCHEDULES by name."""
    try:
        function_of(schedule)(0, steps, warmup)
    except TypeError as error:
        raise ValueError(f"schedule={named(schedule)} is not {TAKES}: {error}") from error
    for step in range(steps):
        rate(step, steps, schedule, warmup)
    names = [name for name, function in SCHEDULES.items() if function is schedule]
    return names[0] if names else schedule


def with_options(name, texts):
    """The schedule called `name` with options from the command line's {name: text}.

    ValueError for an option that it does not have, and for a text that is no value of it.

    >>> with_options("cosine", {"floor": "0.1"}).keywords
    {'floor': 0.1}
    """
    signature = inspect.signature(SCHEDULES[name]).parameters.values()
    known = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    for key in texts:
        if key not in known:
            shown = ", ".join(f"{key}={default}" for key, default in known.items()) or "none"
            raise ValueError(f"{name} has no option {key!r}; its options and their defaults: "
                             f"{shown}")
    found = {key: options.read(key, text, known[key]) for key, text in texts.items()}
    return functools.partial(SCHEDULES[name], **found) if found else name
