"""What the three pages of structured pruning share: cut a leaf, and note the new size."""

import dataclasses

import torch
from torch import nn

from minillm import options
from minillm.registry import attached
from minillm.registry.sites import check_whole, ties


def check_plain(model):
    """ValueError for a model with techniques attached: their tensors have the old shapes."""
    check_whole(model, "remove")
    if (here := attached(model)) != "nothing":
        raise ValueError(f"this model has {here}, which knows the old shapes: unwrap or merge it "
                         "(keep=False) first, and wrap the smaller model")


@torch.no_grad()
def cut(site, rows=None, columns=None):
    """Keep only these outputs (rows) and inputs (columns) of a plain leaf, in place.

    rows, columns: rising indices, or None for all.
    """
    module, transposed = site.module, site.leaf.transposed
    W, b = site.stored()  # (out, in)
    if rows is not None:
        W = W[rows]
        module.bias = b if b is None else nn.Parameter(b[rows], b.requires_grad)
    if columns is not None:
        W = W[:, columns]
    learns = module.weight.requires_grad
    module.weight = nn.Parameter((W.T if transposed else W).contiguous(), learns)
    out, into = W.shape
    for name, size in (("out_features", out), ("in_features", into), ("nf", out), ("nx", into)):
        if hasattr(module, name):
            setattr(module, name, size)


def check_free(model, sites):
    """ValueError where a leaf that is to be cut shares its matrix with another one."""
    tied = ties(model)
    for site in sites:
        if others := tied.get(site.name):
            raise ValueError(f"{site.name!r} shares its matrix with {', '.join(others)}: "
                             "minillm.untie(model) first")


def kept(scores, count):
    """The indices of the `count` largest of the scores (n,), rising; of equal ones the first.

    ValueError for scores that are not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("a weight or an activation is nan or infinity, which has no rank")
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def left(share, size, what, multiple=1):
    """How many of `size` parts stay when a share goes, rounded up to a multiple.

    ValueError if none would go.
    """
    options.share("share", share)
    count = -(-round((1 - share) * size) // multiple) * multiple
    if not 0 < count < size:
        raise ValueError(f"share={share} of {size} {what} leaves {min(count, size)}: "
                         + ("nothing would be removed" if count >= size else "no model"))
    return count


def resize(model, **sizes):
    """Write the new sizes into the model's configuration: {field: value}.

    A model without a configuration has none to correct.
    """
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        model.config = dataclasses.replace(config, **sizes)
        return
    for field, value in sizes.items():
        setattr(config, field, value)


def field_of(model, names, what):
    """The first of `names` that the model's configuration has; None without a configuration.

    ValueError if it has none of them.
    """
    config = getattr(model, "config", None)
    found = next((name for name in names if hasattr(config, name)), None)
    if found is None and config is not None:
        raise ValueError(f"the configuration of this {type(model).__name__} has no number of "
                         f"{what} ({', '.join(names)}), so a smaller model could not be loaded "
                         "again")
    return found
