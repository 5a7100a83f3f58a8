"""New bases: of a merge, of an unwrapped format, and of a patch that starts with a part of W."""

import copy

import torch
from torch import nn

from minillm.registry.kinds import Format
from minillm.registry.layer import dense, leaf
from minillm.registry.past import Past, past


def storage(module):
    if isinstance(module, Format):
        return module.kind
    return str(module.weight.dtype).removeprefix("torch.")


def twin(base):
    """A copy of a leaf over the same tensors: setting a tensor on it does not change `base`."""
    new = copy.copy(base)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(base.__dict__[table])
    return new


def apart(new, base):
    """Give the twin `new` parameters of its own: training it does not change `base`; returns it."""
    for key, p in new._parameters.items():
        if p is not None and p is base._parameters.get(key):
            new._parameters[key] = nn.Parameter(p.detach().clone(), p.requires_grad)
    return new


def rebased(base, W, b):
    """A twin of the leaf `base`, in the same format and dtype, that holds W (out, in) and b."""
    new, dtype = twin(base), dense(base)[0].dtype
    if isinstance(new, Format):
        new.pack(W)
    else:
        W = W.T if leaf(base).transposed else W
        W = W.to(dtype).contiguous()
        new.weight = nn.Parameter(W, requires_grad=base.weight.requires_grad)
    if b is not None and b is not base.bias:
        new.bias = nn.Parameter(b.to(dtype))
    return new


@torch.no_grad()
def fold_in(site, patch, base, keep, tolerance):
    """(a new base with the patch folded in, its rounding error as a share of the change).

    `base` is not changed. ValueError if the rounding error is more than `tolerance`.
    """
    W, b = dense(base) if site.leaf else (None, None)
    W = W.to(torch.promote_types(W.dtype, torch.float32)) if site.leaf else None
    wanted, bias = patch.fold(W, b)
    changed = not torch.equal(wanted, W) or bias is not b
    if changed and not wanted.isfinite().all():
        raise ValueError(f"{patch.name} or the weight of {site.name!r} holds nan or infinity: "
                         "merged, it would be lost in them")
    new = rebased(base, wanted, bias) if changed else twin(base)
    new = apart(new, base)
    if changed and isinstance(new, Format):
        new.pays(site.name)
    error = (dense(new)[0].to(W.dtype) - wanted).norm().item()
    change = (wanted - W).norm().item()
    if error > tolerance * change + 1e-6 * wanted.norm().item():
        raise ValueError(f"merging {patch.name} into {site.name!r} ({storage(new)}) would lose it: "
                         f"the rounding is {error / change:.2f} of the change, more than "
                         f"tolerance={tolerance}. Merge into a dense base (unwrap the format "
                         "first), or keep the patch")
    new._modules.pop("past", None)  # the twin copied it from the base: the merges before this one
    if keep:
        names = list(site.layer.patches)
        new.past = Past(patch, base, names[: names.index(patch.name)])
    return new, error / change if change else 0.0


@torch.no_grad()
def remainder(site, patch, tied, biases):
    """The base without the part with which the patch starts.

    Its `past` keeps the old base, for unwrap.
    """
    if isinstance(site.module, Format):
        family = site.module.family
        raise ValueError(f"{site.name!r} is stored as {site.module.kind}, and {patch.name} takes a "
                         f"part out of the dense weight: minillm.{family}.unwrap(model) first, and "
                         "store it again afterwards")
    others = site.layer.patches.values() if site.layer else ()
    wrong = [one for one in others if one.touches == "weight" and (one.start or not one.additive)]
    if wrong or site.name in tied or site.name in biases:
        if site.name in tied:
            what = f"{', '.join(tied[site.name])} shares that weight: minillm.untie(model) first"
        elif site.name in biases:
            what = f"{', '.join(biases[site.name])} is its bias too: minillm.untie(model) first"
        if wrong:
            did = "has taken one" if wrong[0].start else "lies around it"
            what = f"{wrong[0].name} {did}: unwrap {wrong[0].name} first"
        raise ValueError(f"{patch.name} takes a part out of the weight of {site.name!r}, "
                         f"and {what}")
    W, b = dense(site.module)
    left = W - patch.part().to(W.dtype)
    base = apart(rebased(site.module, left, b), site.module)
    base._modules.pop("past", None)
    base.past = Past(patch, site.module, born=True)
    return base


def refill(stored):
    """The leaf that a Format had replaced, with the Format's dense weight in it.

    A merge into the Format becomes a merge into the leaf, and can still be undone.
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
    """Give the emptied leaf the weight, the bias and the Says of the Format; returns the leaf."""
    learns = stored.says["weight"].last
    shell.weight = nn.Parameter(stored.weight.detach().contiguous(), requires_grad=learns)
    if stored.bias is not None:
        shell.bias = stored.bias
    shell.says = stored.says
    return shell.train(stored.training)


def restored(now, base):
    """The earlier `base`, for the place of `now`: its parameters learn as those of `now` do."""
    if "says" in now.__dict__:
        base.says = now.says  # with what was said in the meantime
    for key, p in base.named_parameters(recurse=False):
        if (new := now._parameters.get(key)) is not None:
            p.requires_grad_(new.requires_grad)
    return base
