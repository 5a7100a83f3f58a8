"""The arguments of `train`, checked before any work and completed with their defaults."""

import math
import numbers
import pathlib
import types

from minillm import data, distributed
from minillm.train import schedules

WHOLE = dict(steps=1, batch_size=1, accumulate=1, every=1, patience=1, save_every=0, keep=1,
             pad=0, seed=None)  # whole numbers, and the least that each can be
OPTIONAL = ("steps", "every", "patience", "save_every")
COMPARED = ("steps", "lr", "batch_size", "accumulate", "schedule", "warmup", "weight_decay",
            "betas", "clip", "rates", "seed", "pad", "every", "patience", "restore_best",
            "last_accumulate")


def resolve(examples, given):
    """A namespace of all settings, from the given arguments; ValueError for a wrong one."""
    o = types.SimpleNamespace(**given)
    for name, least in WHOLE.items():
        if getattr(o, name) is not None or name not in OPTIONAL:
            setattr(o, name, whole(name, getattr(o, name), least))
    if not -(2**63) <= o.seed < 2**63:
        raise ValueError(f"seed={o.seed} has more than the 64 bits that torch keeps")
    o.lr = number("lr", o.lr, lambda x: x > 0, "a number above 0")
    o.weight_decay = number("weight_decay", o.weight_decay, lambda x: x >= 0, "a number from 0")
    if o.clip is not None:
        o.clip = number("clip", o.clip, lambda x: x > 0, "a number above 0, or None: never clip")
    betas(o)
    if o.rates is not None:
        o.rates = {pattern: number(f"rates[{pattern!r}]", factor, lambda x: x >= 0,
                                   "a factor from 0") for pattern, factor in o.rates.items()}
    data.batches(examples, o.batch_size)  # makes its own checks
    distributed.check_rows(len(examples), o.batch_size)
    o.steps = number_of_steps(o, examples)
    warmup(o)
    o.schedule = schedules.checked(o.schedule, o.steps, o.warmup)
    evaluation(o)
    functions(o)
    files_of(o)
    return o


def whole(name, value, least):
    """The value as an int."""
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or least is not None and value < least:
        from_ = "" if least is None else f" from {least}"
        raise ValueError(f"{name}={value!r} is not a whole number{from_}")
    return int(value)


def number(name, value, possible, what):
    """The value as a float."""
    right = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not possible(value):
        raise ValueError(f"{name}={value!r} is not {what}")
    return float(value)


def betas(o):
    if not isinstance(o.betas, (tuple, list)) or len(o.betas) != 2:
        raise ValueError(f"betas={o.betas!r}: AdamW takes two numbers, such as (0.9, 0.999)")
    what = "a number from 0 up to (but not) 1"
    o.betas = tuple(number(f"betas[{i}]", beta, lambda x: 0 <= x < 1, what)
                    for i, beta in enumerate(o.betas))


def number_of_steps(o, examples):
    """`steps` as given, or the steps that `epochs` passes through the examples take.

    If the epochs end within the last step, `last_accumulate` is the number of its batches.
    """
    o.last_accumulate = None
    if (o.steps is None) == (o.epochs is None):
        raise ValueError(f"steps={o.steps!r} and epochs={o.epochs!r}: give exactly one of the two")
    if o.steps is not None:
        return o.steps
    epochs = number("epochs", o.epochs, lambda x: x > 0, "a number above 0")
    batches = math.ceil(len(examples) / o.batch_size)
    batches = max(1, math.ceil(round(epochs * batches, 6)))
    o.last_accumulate = batches % o.accumulate or None
    return math.ceil(batches / o.accumulate)


def warmup(o):
    """Check `warmup`, and turn a share of the steps into a number of steps."""
    what = f"a whole number of steps from 0 to {o.steps}, or a share of them below 1"
    number("warmup", o.warmup, lambda x: x >= 0, what)
    if o.warmup < 1:
        o.warmup = round(o.warmup * o.steps)
    elif not isinstance(o.warmup, numbers.Integral) or o.warmup > o.steps:
        raise ValueError(f"warmup={o.warmup!r} is not {what}")
    o.warmup = int(o.warmup)


def evaluation(o):
    """Check the evaluation; `every` is a tenth of the steps by default."""
    if o.held_out is not None and o.evaluate is not None:
        raise ValueError("held_out= and evaluate= both choose the evaluation: give one of them")
    if o.evaluate is not None and not callable(o.evaluate):
        raise ValueError(f"evaluate={o.evaluate!r} is not a function of the model")
    if o.held_out is not None:
        data.check_examples(o.held_out, "held_out")
        try:
            data.batches(o.held_out, 1)
        except ValueError as error:
            raise ValueError(f"held_out: {error}") from error
    if o.held_out is not None or o.evaluate is not None:
        o.every = o.every or max(1, o.steps // 10)
        return
    for name in ("every", "patience"):
        if getattr(o, name) is not None:
            raise ValueError(f"{name}={getattr(o, name)} needs something to evaluate: "
                             "give held_out= examples, or a function evaluate=")


def functions(o):
    """Check the arguments that are functions. A class in place of its object is an error."""
    for name, takes in (("loss", "model, ids, labels, mask"), ("on_step", "model, step, steps"),
                        ("write", "model"), ("evaluate", "model")):
        value = getattr(o, name)
        if isinstance(value, type):
            raise ValueError(f"{name}={value.__name__} is a class: give an object of it, "
                             f"{name}={value.__name__}(...)")
        if value is not None and not callable(value):
            raise ValueError(f"{name}={shortly(value)} is not a function {name}({takes})")


def shortly(value):
    """The value as text on one line, or its type if that is long."""
    written = repr(value)
    return written if len(written) <= 60 and "\n" not in written else f"a {type(value).__name__}"


def files_of(o):
    """Check the checkpoints; `save_every` is a tenth of the steps by default, and 0 stays 0."""
    if o.checkpoints is not None:
        if pathlib.Path(o.checkpoints).is_file():
            raise ValueError(f"checkpoints={str(o.checkpoints)!r} is a file, not a directory")
        if o.save_every is None:
            o.save_every = max(1, o.steps // 10)
    elif o.save_every is not None:
        raise ValueError(f"save_every={o.save_every} needs a directory: give checkpoints=")
    elif o.resume:
        raise ValueError(f"resume={o.resume!r} needs a directory to go on from: give checkpoints=")
