"""The model's own parameters and buffers in a technique's file: what training changed of the model.

A file holds them under their author's names, a tied parameter once. They are checked before the
model changes, and then copied into it.
"""

import torch

from minillm import distributed
from minillm.registry.learning import buffers, said, settle
from minillm.registry.kinds import Format
from minillm.registry.sites import parameters, walk


def tied_names(model):
    """{first name of a parameter: its other names}."""
    names = {}
    for name, _, _, p in parameters(model):
        names.setdefault(id(p), []).append(name)
    return {first: others for first, *others in names.values() if others}


def shapes(tensors):
    return {
        key: f"{tuple(t.shape)} of {'floats' if t.is_floating_point() else 'integers'}"
        for key, t in tensors.items()
    }


def check_learned(model, tensors, kept, shared, path):
    """ValueError if a learned parameter or a buffer of a file does not fit one of this model's.

    shared: {learned parameter: its other names}; these must fit too.
    """
    ours = {name: tuple(p.shape) for name, _, _, p in parameters(model)}
    ours |= {
        f"{site.name}.weight": tuple(site.module.weight.shape)
        for site in walk(model)
        if isinstance(site.module, Format)
    }
    for name, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{path}: {name!r} holds nan or infinity")
        if ours.get(name) != tuple(t.shape) or not t.is_floating_point():
            here = f"has {ours[name]}" if name in ours else "lacks it"
            raise ValueError(
                f"{path} does not fit this model: {name!r} is {tuple(t.shape)} of {t.dtype} in "
                f"the file, the model {here}"
            )
    ours, theirs = shapes(dict(buffers(model))), shapes(kept)
    for name, shape in theirs.items():
        if ours.get(name) != shape:
            here = f"has {ours[name]}" if name in ours else "lacks it"
            raise ValueError(
                f"{path} does not fit this model: the buffer {name!r} is {shape} in the file, "
                f"the model {here}"
            )
    check_shared(model, tensors, shared, path)


def check_shared(model, tensors, shared, path):
    """ValueError if a learned parameter cannot have the other names that the file gives it."""
    ties = {}
    for name, _, _, p in parameters(model):
        ties.setdefault(id(p), set()).add(name)
    ours = {name: (p.shape, ties[id(p)]) for name, _, _, p in parameters(model)}
    for name, others in shared.items():
        if (
            name not in tensors
            or not isinstance(others, list)
            or not all(isinstance(one, str) for one in others)
        ):
            raise ValueError(
                f"{path} says that {name!r} is also {others!r}: these are no names of a parameter "
                "that it holds"
            )
        alone = ours.get(name, (None, ()))[1] == {name}  # nothing is tied to it here: it was untied
        for one in others:
            shape, tied = ours.get(one, (None, ()))
            if shape != tensors[name].shape or not (alone or name in tied):
                raise ValueError(
                    f"{path} says that {name!r} is also {one!r}, which this model does not share "
                    "with it"
                )


@torch.no_grad()
def put_back(model, tensors, kept, shared, technique):
    """Copy learned parameters and the buffers `kept` into the model, and note their technique.

    A tied parameter is copied to all its names in the file. A Format packs a weight that changed.
    """
    here = dict(buffers(model))
    for name, t in kept.items():
        here[name].copy_(distributed.like(t, here[name]))
    ours = {name: p for name, _, _, p in parameters(model)}
    for name, t in tensors.items():
        for one in {name, *shared.get(name, ())} & ours.keys():
            ours[one].copy_(distributed.like(t, ours[one]))
    for site in walk(model):
        if isinstance(site.module, Format) and f"{site.name}.weight" in tensors:
            t = tensors[f"{site.name}.weight"].to(site.module.weight)
            if not torch.equal(t, site.module.weight):
                site.module.pack(t.T if site.module.leaf.transposed else t)
    for name, _, one in said(model):
        if name in tensors:
            one.brought = technique


def let_learn(model, names):
    """Let parameters that learned with the patches of a file learn again, as if the user set it."""
    for name, p, one in said(model):
        if name in names and p is not None:
            p.requires_grad_(True)
            one.user, one.firm = True, True
    settle(model)
