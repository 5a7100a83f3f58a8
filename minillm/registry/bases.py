"""New bases for old ones: what a merge makes, what a format gives back, what a patch leaves when it takes its part."""

import copy

import torch
from torch import nn

from minillm.registry.kinds import Format
from minillm.registry.layer import dense, leaf
from minillm.registry.past import Past, past


def storage(module):
    return module.kind if isinstance(module, Format) else str(module.weight.dtype).removeprefix("torch.")


def twin(base):
    """A leaf of its own over the same tensors: what is set on it does not change `base`."""
    new = copy.copy(base)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(base.__dict__[table])
    return new


def apart(new, base):
    """A twin with parameters of its own: what trains it from now on leaves `base` alone; returns it."""
    for key, p in new._parameters.items():
        if p is not None and p is base._parameters.get(key):
            new._parameters[key] = nn.Parameter(p.detach().clone(), p.requires_grad)
    return new


def rebased(base, W, b):
    """A twin of the leaf `base`, in its own format and dtype, that holds W (out, in) and b instead."""
    new, dtype = twin(base), dense(base)[0].dtype
    if isinstance(new, Format):
        new.pack(W)
    else:
        W = W.T if leaf(base).transposed else W
        new.weight = nn.Parameter(W.to(dtype).contiguous(), requires_grad=base.weight.requires_grad)
    if b is not None and b is not base.bias:
        new.bias = nn.Parameter(b.to(dtype))
    return new


@torch.no_grad()
def fold_in(site, patch, base, keep, tolerance):
    """(a new base with the patch folded in, the rounding as a share of the change); `base` stays as it is."""
    W, b = dense(base) if site.leaf else (None, None)
    W = W.to(torch.promote_types(W.dtype, torch.float32)) if site.leaf else None
    wanted, bias = patch.fold(W, b)
    changed = not torch.equal(wanted, W) or bias is not b
    new = rebased(base, wanted, bias) if changed else twin(base)
    new = apart(new, base)
    if changed and isinstance(new, Format):
        new.pays(site.name)
    error, change = (dense(new)[0].to(W.dtype) - wanted).norm().item(), (wanted - W).norm().item()
    if error > tolerance * change + 1e-6 * wanted.norm().item():
        raise ValueError(f"merging {patch.name} into {site.name!r} ({storage(new)}) would lose it: the rounding is "
                         f"{error / change:.2f} of the change, more than tolerance={tolerance}. Merge into a dense base (unwrap "
                         "the format first), or keep the patch")
    new._modules.pop("past", None)  # the copy's: of the merges before this one
    if keep:
        names = list(site.layer.patches)
        new.past = Past(patch, base, names[: names.index(patch.name)])
    return new, error / change if change else 0.0


@torch.no_grad()
def remainder(site, patch, tied):
    """The base without the part of it that the patch starts with; it keeps the base of before, for unwrap."""
    if isinstance(site.module, Format):
        raise ValueError(f"{site.name!r} is stored as {site.module.kind}, and {patch.name} takes a part out of the dense weight: "
                         f"minillm.{site.module.family}.unwrap(model) first, and store it again afterwards")
    others = site.layer.patches.values() if site.layer else ()
    wrong = [one.name for one in others if one.touches == "weight" and not one.additive]
    if wrong or site.name in tied:
        what = f"{wrong[0]} lies around it" if wrong else f"it is that of {', '.join(tied[site.name])} too"
        raise ValueError(f"{patch.name} takes a part out of the weight of {site.name!r}, and {what}: unwrap or untie that first")
    base = apart(rebased(site.module, patch.residual(dense(site.module)[0]), site.module.bias), site.module)
    base._modules.pop("past", None)
    base.past = Past(patch, site.module, born=True)
    return base


def refill(stored):
    """The leaf that a Format had replaced, with the dense weight in it.

    A merge into the Format stays a merge into the leaf, and can be undone.
    """
    if record := past(stored):
        beneath = refill(record.base)
        above = twin(beneath)
        above._modules.pop("past", None)
        fill(above, stored)
        above.past = Past(record.patch, beneath, record.beneath)
        return above
    return fill(stored.shell.kept[0], stored)


def fill(shell, stored):
    """Give the emptied leaf the weight, the bias and the notes of the Format; returns the leaf."""
    shell.weight = nn.Parameter(stored.weight.detach().contiguous(), requires_grad=stored.says["weight"].last)
    if stored.bias is not None:
        shell.bias = stored.bias
    shell.says = stored.says
    return shell.train(stored.training)


def restored(now, base):
    """The base of an earlier time, in the place of `now`: its parameters learn as those do."""
    if "says" in now.__dict__:
        base.says = now.says  # with what was said meanwhile
    for key, p in base.named_parameters(recurse=False):
        if (new := now._parameters.get(key)) is not None:
            p.requires_grad_(new.requires_grad)
        elif key in now.says:
            p.requires_grad_(now.says[key].last)
    return base
