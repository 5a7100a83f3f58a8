"""The common half of every technique's verbs: wrap, unwrap, merge, unmerge, save, load.

A technique's file says which sites it wraps by default and builds its Patch or Format; the rest is the same for all and
stands here. `verbs(name, cls)` enters the class in the table and returns the five functions that the file publishes.

Nothing is ever subtracted: `merge` makes a new base and keeps the old one (and the patch) on it, `unmerge` puts them back.
The price is a second copy of what was merged, which `merge(model, keep=False)` saves. peft subtracts the delta instead,
which costs no memory and returns weights that differ in their last bits, or wholly where the base is quantized.
"""

import copy
import json
import logging

import safetensors
import safetensors.torch
import torch
from torch import nn

from minillm import distributed, files
from minillm.registry import (CannotMerge, Format, Layer, Patch, dense, freeze, hidden_linears, hint, leaf, register, select, thaw,
                              ties, walk)

log = logging.getLogger("minillm")


def attach(cls, model, targets=None, default=hidden_linears, what="leaf", **kwargs):
    """Wrap what `targets` names (see `registry.select`) with cls(site, **kwargs); in place, returns the model."""
    sites = select(model, targets, cls.accepts, default(model), what)
    if issubclass(cls, Format):
        return store(cls, model, sites, lambda site: cls(site, **kwargs))
    for site in sites:
        if site.layer and cls.technique in site.layer.patches:
            raise ValueError(f"{site.name!r} is already wrapped with {cls.technique}: unwrap or merge it first")
    return ring(model, [(site, cls(site, **kwargs)) for site in sites])


def ring(model, pairs):
    """Put each patch around its site, in place of one of its own technique if that stands there; returns the model."""
    for site, patch in pairs:
        if site.layer is None:
            site.replace(Layer(site.module).train(site.module.training))
        site.layer.add(patch)
    refreeze(model)
    return model


def refreeze(model):
    """Below a technique that learns, the model does not."""
    for name in {name for site in walk(model) if site.layer for name, patch in site.layer.patches.items() if learns(patch)}:
        freeze(model, name)


def learns(patch):
    return any(True for _ in patch.parameters())


def store(cls, model, sites, make):
    """Replace leaves by the Format that `make` gives for each site.

    The emptied leaf waits in it as `shell`, outside the module tree, for unwrap.
    """
    tied = ties(model)
    for site in sites:
        if isinstance(site.module, Format):
            raise ValueError(f"{site.name!r} is already stored as {site.module.technique}: "
                             f"minillm.{site.module.technique}.unwrap(model) first gives its dense weight back")
        if site.name in tied:
            raise ValueError(f"{site.name!r} shares its matrix with {', '.join(tied[site.name])}: stored as {cls.technique} "
                             "it would be a second matrix. minillm.untie(model) first gives each its own")
        if not torch.isfinite(site.module.weight).all():
            raise ValueError(f"the weight of {site.name!r} holds nan or infinity, which {cls.technique} cannot store")
    for site in sites:
        shell, new = site.module, make(site).train(site.module.training)
        stopped = shell.__dict__.setdefault("_frozen_by", {})
        new.__dict__.update(shell=shell, learns=shell.weight.requires_grad or bool(stopped.pop("weight", None)), _frozen_by=stopped)
        shell.weight = None
        put(site, new)
    return model


def put(site, base):
    """Make `base` the site's module: in its Layer, or in the model where there is none left to hold a patch."""
    if site.layer is not None and len(site.layer.patches):
        site.layer.base = base
    else:
        site.replace(base)
    site.module = base


def patches_of(technique, model):
    """[(site, patch)] of one technique."""
    return [(site, site.layer.patches[technique]) for site in walk(model) if site.layer and technique in site.layer.patches]


def attached(model):
    """The names of all techniques in the model, to be named in an error."""
    names = {name for site in walk(model) if site.layer for name in site.layer.patches}
    names |= {site.module.technique for site in walk(model) if isinstance(site.module, Format)}
    return ", ".join(sorted(names)) or "nothing"


def merged(module):
    """(technique, patch, old base) of the last merge into this module that was kept, or None."""
    return module.__dict__.get("merged_from")


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
        while merged(base) and merged(base)[0] == name:
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
    """The leaf that a Format had replaced, with the dense weight in it."""
    shell, W = stored.__dict__["shell"], stored.dense().detach()
    shell.weight = nn.Parameter((W.T if stored.leaf.transposed else W).contiguous(), requires_grad=stored.__dict__["learns"])
    if stored.bias is not None:
        shell.bias = stored.bias
    return shell.train(stored.training)


def restore(base):
    """The module that was there before the last merge into `base`, where `base` is now, learning what it learns."""
    _, _, old = merged(base)
    old.to(next((t.device for t in (*base.parameters(), *base.buffers())), None))
    for key, p in old.named_parameters(recurse=False):
        if base._parameters.get(key) is not None:
            p.requires_grad_(base._parameters[key].requires_grad)
    return old


def merge(cls, model, keep=True, tolerance=0.5):
    """Fold the technique into the base, stored back in the base's own format; in place, returns the model.

    What the base then stores is compared with what was to be stored: where the rounding of the base's format is more than
    `tolerance` of the change (as norms), the merged model would be another one, and nothing is merged. keep=False lets the old
    base go, to save its memory: then nothing can be unmerged. CannotMerge where the technique is no change of a weight.
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
        base = rebased(site.module, wanted, bias)
        error, change = (dense(base)[0].to(W.dtype) - wanted).norm().item(), (wanted - W).norm().item()
        if error > tolerance * change + 1e-6 * wanted.norm().item():
            raise ValueError(f"merging {name} into {site.name!r} ({storage(base)}) would lose it: the rounding is {error / change:.2f} "
                             f"of the change, more than tolerance={tolerance}. Merge into a dense base (unwrap the format first), or "
                             "keep the patch")
        worst = max(worst, error / change if change else 0.0)
        if keep:
            base.__dict__["merged_from"] = (name, patch, site.module)
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


def rebased(base, W, b):
    """A copy of the leaf `base`, in its own format, that holds W (out, in) and b instead."""
    new = copy.copy(base)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(base.__dict__[table])
    if isinstance(new, Format):
        new.pack(W.to(base.dense().dtype))
    else:
        W = W.T if leaf(base).transposed else W
        new.weight = nn.Parameter(W.to(base.weight.dtype).contiguous(), requires_grad=base.weight.requires_grad)
    if b is not None and b is not base.bias:
        new.bias = nn.Parameter(b.to(W.dtype))
    return new


def unmerge(cls, model):
    """Put back the base that `merge` kept, and the patch around it; in place, returns the model."""
    if issubclass(cls, Format):
        raise CannotMerge(f"{cls.technique} is a format: it has nothing to fold, so nothing to put back")
    name, plan = cls.technique, []
    for site in walk(model):
        record = merged(site.module)
        if record and record[0] == name:
            if site.layer and name in site.layer.patches:
                raise ValueError(f"{site.name!r} has another {name} around the merged one: unwrap or merge that first")
            plan.append(site)
        while record and record[0] != name:
            over, record = record[0], merged(record[2])
            if record and record[0] == name:
                raise ValueError(f"{over} was merged into {site.name!r} after {name}: unmerge {over} first")
    if not plan:
        raise ValueError(f"no {name} is merged in this model, or it was merged with keep=False; attached: {attached(model)}")
    for site in plan:
        _, patch, _ = merged(site.module)
        old, others = restore(site.module), dict(site.layer.patches) if site.layer else {}
        patch.to(next((t.device for t in (*old.parameters(), *old.buffers())), None))
        layer = Layer(old).train(site.module.training)
        for one in (patch, *others.values()):  # it was the innermost, or it could not have been merged
            layer.add(one)
        site.replace(layer)
    refreeze(model)
    return model


def added(module):
    """The tensors that a technique added: a Patch's parameters and buffers, a Format's buffers (the bias is the model's)."""
    return dict(module.state_dict()) if isinstance(module, Patch) else dict(module.named_buffers())


def save(cls, model, path):
    """Write what the technique added, and nothing else, to a safetensors file; the old file stays until the new is whole."""
    name = cls.technique
    modules = {site.name: patch for site, patch in patches_of(name, model)}
    modules |= {site.name: site.module for site in walk(model) if isinstance(site.module, Format) and site.module.technique == name}
    if not modules:
        raise ValueError(f"there is no {name} in this model to save; attached: {attached(model)}")
    tensors = {f"{where}.{key}": distributed.whole(t).contiguous() for where, module in modules.items() for key, t in added(module).items()}
    sites = {where: module.config() for where, module in modules.items()}
    if distributed.place()[0] == 0:  # of several processes the first writes
        with files.atomic(path) as new:
            safetensors.torch.save_file(tensors, new, {"format": "pt", "technique": name, "sites": json.dumps(sites)})
    distributed.wait()


def load(cls, model, path):
    """Attach what `save` wrote; in place, returns the model. Every name and shape is checked before the model is touched."""
    name = cls.technique
    tensors, metadata = read(path)
    if metadata.get("technique") != name:
        holds = metadata.get("technique")
        remedy = f"it holds {holds}: use minillm.{holds}.load" if holds else "it says no technique: was it written by minillm?"
        raise ValueError(f"{path} is not a file of {name}; {remedy}")
    configs, sites = configs_of(metadata, path), {site.name: site for site in walk(model)}
    for where in configs:
        if where not in sites or not cls.accepts(sites[where]):
            possible = [site for site in sites.values() if cls.accepts(site)]
            raise ValueError(f"{path} has {name} for {where!r}, which this model lacks; {hint(where, possible)}")
    extra = [site.name for site, _ in patches_of(name, model) if site.name not in configs]
    if extra:
        raise ValueError(f"the model has {name} at {extra[0]!r} ({len(extra)} such), which {path} lacks: unwrap it first")

    parts = {where: {} for where in configs}
    for key, tensor in tensors.items():
        where = max((w for w in configs if key.startswith(w + ".")), key=len, default=None)
        if where is None:
            raise ValueError(f"{path} has the tensor {key!r}, which belongs to none of its sites")
        parts[where][key.removeprefix(where + ".")] = tensor
    made = {where: remake(cls, sites[where], config, parts[where], f"{path}, {where!r}") for where, config in configs.items()}
    if not issubclass(cls, Format):
        return ring(model, [(sites[where], patch) for where, patch in made.items()])
    for where in [where for where in made if isinstance(sites[where].module, cls)]:
        sites[where].module._buffers.update(made.pop(where)._buffers)
    return store(cls, model, [sites[where] for where in made], lambda site: made[site.name])


def remake(cls, site, config, tensors, where):
    """The Patch or Format that a file holds for a site, which is not touched."""
    most = max([1 << 16, *(t.numel() for t in tensors.values())])
    if any(type(value) is int and value > most for value in config.values()):  # memory is asked for only where the file has as much
        raise ValueError(f"{where}: the settings do not fit the tensors: {config}")
    try:
        new = copy.deepcopy(site.module) if isinstance(site.module, cls) else cls(site, **config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {cls.technique} does not take the settings {config} ({error})") from error
    if isinstance(new, Format):
        new.fill(tensors, where)
        return new
    ours, theirs = (describe(d) for d in (new.state_dict(), tensors))
    if ours != theirs:
        raise ValueError(f"{where} does not fit this model, which needs {ours}; the file has {theirs}")
    new.load_state_dict(tensors)
    return new


def describe(tensors):
    return {key: f"{tuple(t.shape)} of {'floats' if t.is_floating_point() else 'integers'}" for key, t in tensors.items()}


def configs_of(metadata, path):
    """{site: the arguments of its technique} that a file tells."""
    try:
        configs = json.loads(metadata["sites"])
        if not all(isinstance(config, dict) for config in configs.values()):
            raise ValueError("settings are objects")
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not say where its tensors belong ({type(error).__name__}: {error})") from error
    return configs


def read(path):
    """(tensors, metadata) of a safetensors file; ValueError if it is anything else. Nothing is unpickled."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); other formats are not opened") from error


def verbs(name, cls):
    """Enter `cls` in the table of techniques; its unwrap, merge, unmerge, save and load."""
    register(name, cls)

    def bound(verb):
        def call(model, *args, **kwargs):
            return verb(cls, model, *args, **kwargs)

        call.__name__, call.__qualname__, call.__doc__, call.__module__ = verb.__name__, verb.__name__, verb.__doc__, cls.__module__
        return call

    return tuple(bound(verb) for verb in (unwrap, merge, unmerge, save, load))
