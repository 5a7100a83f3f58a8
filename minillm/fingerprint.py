"""Which model a file belongs to: samples of the parameters that the file itself does not hold.

An adapter is a change of one base model. Loaded onto another model of the same shapes it computes
nonsense, and no shape betrays it. So every file that a technique or the training loop writes carries
four values of each parameter that it relies on, and reading it compares them.

    same dtype      the values must be equal, bit for bit
    another dtype   they must agree within the coarser dtype's rounding (a cast keeps the model)
    not comparable  what a format stores on either side, and what learns: the file holds it, or another
                    technique's file does

A hash of all weights would see a single changed value too. It would also refuse the same model in
bfloat16, and take a second for each gigabyte.
"""

import hashlib
import json

import torch

from minillm import distributed
from minillm.registry import Format, parameters, walk

SAMPLES = 4  # values of each parameter


def of(model, without=None):
    """A dict for JSON: the model's name and samples of its own parameters, but those in `without`.

    By default those that learn are left out, for whoever asks saves them.
    """
    every = own(model)
    without = {name for name, p in every.items() if p.requires_grad} if without is None else without
    return dict(model=name_of(model), samples={name: sample(p) for name, p in every.items() if name not in without})


def own(model):
    """{name: parameter} of the model's own dense parameters; a tied one once, under its first name."""
    first = {}
    for name, _, _, p in parameters(model):
        first.setdefault(id(p), (name, p))
    return dict(first.values())


@torch.no_grad()
def sample(p):
    """[dtype, shape, values] of a parameter, from places spread evenly over it."""
    p = distributed.whole(p.detach())
    places = [p.numel() * (2 * i + 1) // (2 * SAMPLES) for i in range(min(SAMPLES, p.numel()))]
    values = p.flatten()[torch.tensor(places, dtype=torch.long, device=p.device)]
    return [str(p.dtype).removeprefix("torch."), list(p.shape), values.double().tolist()]


def name_of(model):
    """What to call the model in an error: where it was loaded from, else its class."""
    told = getattr(model, "source", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(told or type(model).__name__)


def differs(model, then):
    """A sentence that names both models, if the fingerprint `then` is not this model's; else None.

    ValueError where `then` is no fingerprint.
    """
    try:
        theirs = {name: (str(dtype), list(shape), [float(v) for v in values])
                  for name, (dtype, shape, values) in then["samples"].items()}
        called = str(then["model"])
        for dtype, _, _ in theirs.values():
            torch.finfo(getattr(torch, dtype))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the fingerprint of its model is not whole ({type(error).__name__}: {error})") from error
    ours = {name: sample(p) for name, p in own(model).items() if name in theirs}
    elsewhere = {name for name, *_ in parameters(model)}
    elsewhere |= {f"{site.name}.weight" for site in walk(model) if isinstance(site.module, Format)}
    odd = [name for name in theirs if name not in elsewhere]
    odd += [name for name in ours if not agree(ours[name], theirs[name])]
    if not odd:
        return None
    mine = digest({name: ours[name] for name in theirs if name in ours})
    return (f"it was made for {called!r} (fingerprint {digest(theirs)}), this model is {name_of(model)!r} "
            f"(fingerprint {mine}): {len(odd)} of {len(theirs)} parameters differ, first {odd[0]!r}")


def agree(ours, theirs):
    """Whether two samples can be of one parameter, up to a cast."""
    (dtype, shape, values), (other_dtype, other_shape, others) = ours, theirs
    if shape != other_shape or len(values) != len(others):
        return False
    if dtype == other_dtype:
        return all(a == b or a != a and b != b for a, b in zip(values, others))
    rounding = [torch.finfo(getattr(torch, name)) for name in (dtype, other_dtype)]
    relative, absolute = max(f.eps for f in rounding), max(f.smallest_normal for f in rounding)
    return all(abs(a - b) <= relative * max(abs(a), abs(b)) + absolute for a, b in zip(values, others))


def digest(samples):
    """Eight hex digits for an error message; a cast changes them."""
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:8]
