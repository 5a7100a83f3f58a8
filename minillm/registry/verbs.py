"""The common half of every technique's verbs: wrap, unwrap, merge, unmerge, save, load.

A technique's file says which sites it wraps by default and builds its Patch or Format; the rest is the same for all and
stands here. `verbs(name, cls)` enters the class in the table and returns the five functions that the file publishes.

Nothing is ever subtracted: `merge` makes a new base and keeps the old one (and the patch) on it, `unmerge` puts them back.
The price is a second copy of what was merged, which `merge(model, keep=False)` saves. peft subtracts the delta instead,
which costs no memory and returns weights that differ in their last bits, or wholly where the base is quantized.
"""

import copy
import functools
import inspect
import logging

import torch
from torch import nn

from minillm.registry import store
from minillm.registry.attach import attach, put  # noqa: F401
from minillm.registry.past import Past, past
from minillm.registry.learning import notes, refreeze, thaw
from minillm.registry.layer import CannotMerge, Format, Layer, dense, leaf
from minillm.registry.sites import ties, walk
from minillm.registry.table import attached, patches_of, register

log = logging.getLogger("minillm")


def unwrap(cls, model):
    """Take the technique away; in place, returns the model.

    The original modules come back bit for bit, also from a merge that was kept. A Format gives its dense weight back, which is
    what it stores: what rounding lost stays lost.
    """
    name, found = cls.technique, 0
    for site in walk(model):
        if isinstance(site.module, Format) and site.module.technique == name:
            put(site, refill(site.module))
            found += 1
            continue
        base = site.module
        while past(base) and past(base).technique == name:
            base = restore(base)
        here = site.layer is not None and name in site.layer.patches
        if here:
            del site.layer.patches[name]
        if here or base is not site.module:
            put(site, base)
            found += 1
    if not found:
        raise ValueError(f"there is no {name} in this model to unwrap; attached: {attached(model)}")
    thaw(model, name)
    refreeze(model)  # a weight that came back does not learn beneath techniques that are still there
    return model


def refill(stored):
    """The leaf that a Format had replaced, with the dense weight in it.

    A merge into the Format stays a merge into the leaf, and can be undone.
    """
    if record := past(stored):
        patch, old = record.kept
        beneath = refill(old)
        leaf_above = twin(beneath)
        fill(leaf_above, stored)
        leaf_above.past = Past(record.technique, patch, beneath)
        return leaf_above
    return fill(stored.__dict__["shell"], stored)


def fill(shell, stored):
    """Give the emptied leaf the weight, the bias and the notes of the Format; returns the leaf."""
    learns = stored.__dict__["learns"] and not notes(stored).get("weight")
    shell.weight = nn.Parameter(stored.weight.detach().contiguous(), requires_grad=learns)
    if stored.bias is not None:
        shell.bias = stored.bias
    shell.__dict__["_frozen_by"] = dict(notes(stored))
    return shell.train(stored.training)


def restore(base):
    """The module that was there before the last merge into `base`, learning what `base` learns."""
    _, old = past(base).kept
    for key, p in old.named_parameters(recurse=False):
        if base._parameters.get(key) is not None:
            p.requires_grad_(base._parameters[key].requires_grad)
    old.__dict__["_frozen_by"] = dict(notes(base))  # who stopped what since the merge
    return old


def merge(cls, model, keep=True, tolerance=0.5):
    """Fold the technique into the base, stored back in the base's own format; in place, returns the model.

    What the base then stores is compared with what was to be stored: where the rounding of the base's format is more than
    `tolerance` of the change (as norms), the merged model would be another one, and nothing is merged. keep=False lets the old
    base go, to save its memory, and those of earlier merges: then nothing can be unmerged. CannotMerge where the technique is
    no change of a weight.
    """
    if issubclass(cls, Format):
        raise CannotMerge(f"{cls.technique} is a format: it has nothing to fold, and unwrap gives the dense weight back")
    name, plan, tied, worst = cls.technique, [], ties(model), 0.0
    for site, patch in patches_of(name, model):
        with torch.no_grad():
            W, b = dense(site.module) if site.leaf else (None, None)
            W = W.to(torch.promote_types(W.dtype, torch.float32)) if site.leaf else None
            wanted, bias = patch.fold(W, b)
        beneath = next(iter(site.layer.patches))
        if beneath != name:
            raise ValueError(f"{name} cannot be merged into {site.name!r} while {beneath} lies beneath it: "
                             f"merge or unwrap {beneath} first")
        if site.name in tied:
            raise ValueError(f"{site.name!r} shares its matrix with {', '.join(tied[site.name])}: merging {name} into it would change "
                             "them too. minillm.untie(model) first gives each its own")
        changed = not torch.equal(wanted, W) or bias is not b
        base = rebased(site.module, wanted, bias) if changed else twin(site.module)
        for key, p in base._parameters.items():  # what trains it from now on leaves the old base alone
            if p is not None and p is site.module._parameters.get(key):
                base._parameters[key] = nn.Parameter(p.detach().clone(), p.requires_grad)
        if changed and isinstance(base, Format):
            base.pays(site.name)
        error, change = (dense(base)[0].to(W.dtype) - wanted).norm().item(), (wanted - W).norm().item()
        if error > tolerance * change + 1e-6 * wanted.norm().item():
            raise ValueError(f"merging {name} into {site.name!r} ({storage(base)}) would lose it: the rounding is {error / change:.2f} "
                             f"of the change, more than tolerance={tolerance}. Merge into a dense base (unwrap the format first), or "
                             "keep the patch")
        worst = max(worst, error / change if change else 0.0)
        base._modules.pop("past", None)  # the copy's: of the merges before this one
        if keep:
            base.past = Past(name, patch, site.module)
        plan.append((site, base))
    if not plan:
        raise ValueError(f"there is no {name} in this model to merge; attached: {attached(model)}")
    for site, base in plan:
        del site.layer.patches[name]
        put(site, base)
    thaw(model, name)
    log.info("merged %s into %d leaves; the largest rounding is %.2g of the change", name, len(plan), worst)
    return model


def storage(module):
    return module.technique if isinstance(module, Format) else str(module.weight.dtype).removeprefix("torch.")


def twin(base):
    """A leaf of its own over the same tensors: what is set on it does not change `base`."""
    new = copy.copy(base)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(base.__dict__[table])
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


def unmerge(cls, model):
    """Put back the base that `merge` kept, and the patch around it; in place, returns the model."""
    if issubclass(cls, Format):
        raise CannotMerge(f"{cls.technique} is a format: it has nothing to fold, so nothing to put back")
    name, plan = cls.technique, []
    for site in walk(model):
        record = past(site.module)
        if record and record.technique == name:
            if site.layer and name in site.layer.patches:
                raise ValueError(f"{site.name!r} has another {name} around the merged one: unwrap or merge that first")
            plan.append(site)
        while record and record.technique != name:
            over, record = record.technique, past(record.kept[1])
            if record and record.technique == name:
                raise ValueError(f"{over} was merged into {site.name!r} after {name}: unmerge {over} first")
    if not plan:
        raise ValueError(f"no {name} is merged in this model, or it was merged with keep=False; attached: {attached(model)}")
    for site in plan:
        patch, _ = past(site.module).kept
        old, others = restore(site.module), dict(site.layer.patches) if site.layer else {}
        layer = Layer(old).train(site.module.training)
        for one in (patch, *others.values()):  # it was the innermost, or it could not have been merged
            layer.add(one)
        site.replace(layer)
    refreeze(model)
    return model


def verbs(name, cls):
    """Enter `cls` in the table of techniques; its unwrap, merge, unmerge, save and load."""
    register(name, cls)

    def bound(verb):
        def call(model, *args, **kwargs):
            return verb(cls, model, *args, **kwargs)

        functools.update_wrapper(call, verb).__module__ = cls.__module__
        signature = inspect.signature(verb)
        call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        return call

    return tuple(bound(verb) for verb in (unwrap, merge, unmerge, store.save, store.load))
