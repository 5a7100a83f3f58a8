"""The names of adapters: which of them take part, and over which others each one was trained.

    minillm.lora.wrap(model, name="sql"); minillm.lora.wrap(model, name="chat")
    minillm.use(model, "sql")              # the model with the first alone

An adapter that was trained over another one is useless without it. So each patch keeps two sets of
names: `before`, all that the model had when it came, and `over`, those of them over which it was
filled or trained. Trained over means: active while the patch's parameters changed. `follow` updates
`over` before anything changes which adapters take part.
"""

import contextlib
import difflib
import re

import torch
from torch import nn

from minillm.registry.kinds import Patch
from minillm.registry.learning import noted, patches
from minillm.registry.table import KINDS


def check_name(name, kind, model):
    """The name of a new patch, by default its kind.

    ValueError if it is not a possible name, or if a patch of another kind has it in this model.
    """
    name = kind if name is None else name
    possible = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
    if not possible or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name={name!r}: a name has letters, digits, - and _, and is no word that "
                         "torch keeps for itself")
    if name in KINDS and name != kind:
        raise ValueError(f"name={name!r} is the name of another kind of technique: "
                         f"choose another one for {kind}")
    for patch in patches(model):
        if patch.name == name and patch.kind != kind:
            raise ValueError(f"name={name!r} is the name of a {patch.kind} in this model: "
                             f"choose another one for {kind}")
    return name


def names_of(model):
    """The names of all techniques in the model but the formats, which are named by their kind."""
    return {patch.name for patch in patches(model)} | noted(model)


def taking_part(model):
    """The names of the patches that are active and of the techniques that claim or forbid."""
    return {patch.name for patch in patches(model) if patch.active} | noted(model)


def follow(model):
    """Update `over` of each patch whose parameters have changed since the last time."""
    every, now = patches(model), taking_part(model)
    for patch in every:
        if patch.version != patch.versions():
            apart = {other.name for other in every if not meet(patch, other)}
            new = patch.over | patch.before & (now - apart)
            patch.over, patch.version = new, patch.versions()


def meet(patch, other):
    """Whether two patches take part in the same row of a batch."""
    if patch.rows is None or other.rows is None:
        return True
    return bool((patch.rows & other.rows.to(patch.rows.device)).any())


def by_rows(module):
    """Whether a patch in this module has its own rows of the batch (see `rows`)."""
    return any(isinstance(one, Patch) and one.rows is not None for one in module.modules())


def adapters(model, names):
    """The patches of each name that has parameters; ValueError for a name that none of them has.

    One of these patches may have none itself (the one at the embedding, of a prefix).
    """
    every = patches(model)
    known = sorted({patch.name for patch in every if any(True for _ in patch.parameters())})
    found = [patch for patch in every if patch.name in known]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known) or known
            there = f"there are: {', '.join(map(repr, close))}" if known else "the model has none"
            raise ValueError(f"no adapter is called {name!r}; {there}")
    return found


@contextlib.contextmanager
def rows(model, names):
    """A context in which each row of a batch has its own adapter.

        with minillm.rows(model, ["sql", "chat", None]): ...

    names: for each row a name, a list of names whose adapters add up, or None. An adapter computes
    for all rows, and its output is used in its own rows; the model beneath is computed once.
    Adapters that train in different rows do not count as trained over each other, if the
    optimizer's step is in the context too. ValueError for a name that no adapter here has. In the
    model's call, a batch of another size is an error, and so is a mask around the adapters.
    """
    asked = [[one] if isinstance(one, str) else list(one or ()) for one in names]
    found = adapters(model, [name for one in asked for name in one])
    before = [(patch, patch.rows, patch.active, patch.outside) for patch in found]
    devices = {patch.name: p.device for patch in found for p in patch.parameters()}
    follow(model)
    try:
        for patch in found:
            device = devices[patch.name]
            patch.outside = patch.active if patch.rows is None else patch.outside
            patch.rows = torch.tensor([patch.name in one for one in asked], device=device)
            patch.active = bool(patch.rows.any())
        yield model
    finally:
        follow(model)
        for patch, *was in before:
            patch.rows, patch.active, patch.outside = was


@contextlib.contextmanager
def taking(parts):
    """A context in which the patches take part as in parts, which `part` has made."""
    before = [part(patch) for patch, *_ in parts]
    try:
        for one in parts:
            take(*one)
        yield
    finally:
        for one in before:
            take(*one)


def part(patch):
    """(patch, active, rows, what it knows of the present call): how it takes part now."""
    return patch, patch.active, patch.rows, patch.facts and patch.facts.now


def take(patch, active, rows, known):
    patch.active, patch.rows = active, rows
    if patch.facts:
        patch.facts.now = known


def again(module):
    """The context in which the module is called again: its patches take part as now.

    A backward pass that recomputes calls it, and calibration, block by block. `minillm.use`, or
    the call of another batch, may come in between.
    """
    return taking([part(patch) for patch in patches(module)])


def use(model, *names):
    """Let the adapters with these names take part, and no others; in place, returns the model.

    An adapter is a patch with parameters of its own, so masks stay. Several adapters on one leaf
    add up in the order of their `wrap`. The parameters of one that takes no part get no gradient.
    A compiled model compiles once for each set of names. ValueError for a name that no adapter
    has, and inside of the context `rows`.
    """
    found = adapters(model, names)
    if any(patch.rows is not None for patch in found):
        raise ValueError(f"minillm.use{names}: each row has its own adapter here (minillm.rows); "
                         "call it outside of that context")
    follow(model)
    for patch in found:
        patch.active = patch.name in names
    return model
