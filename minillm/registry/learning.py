"""Which of the model's own parameters learn: what is said of each, and one rule.

    a technique claims     the parameters that it trains: its own (LoRA), or some of the model's (BitFit)
    a technique forbids    some of the model's (freeze), and never what another technique added
    the user sets          `requires_grad`

A parameter of the model learns if nothing forbids it, and if something claims it or nothing claims
anything. What the user sets while techniques have a say is kept, until a technique names that very
parameter. Where no technique has a say, the user's `requires_grad` is what holds.

`settle` computes this anew at the end of each verb, so the order of the verbs does not matter. What is
said of a parameter is kept on the module that owns it, as `says`: it goes with the module into a copy
and into a pickle. A tied parameter has a Say for each of its names, and all of them count. The weight
that a Format stores is no parameter meanwhile. Its Say waits on the Format.

What learned beside a mask and is stopped later, by LoRA for example, still belongs into the mask's
file. So a Say also notes the version of a parameter (torch counts every change in place, but those
through `.data`) when a technique comes, and whether it has changed by the time at which it stops
learning.
"""

import dataclasses

from minillm.registry.foreign import mark
from minillm.registry.kinds import Format, Patch
from minillm.registry.layer import Layer
from minillm.registry.sites import bare, parameters, walk

CHANGED = -1  # no version


@dataclasses.dataclass
class Say:
    """What is said of one parameter."""

    user: bool  # what the user set
    last: bool  # what the last `settle` computed
    firm: bool = False  # whether the user set it while techniques had a say
    claims: set = dataclasses.field(default_factory=set)  # the names that claim it
    forbids: set = dataclasses.field(default_factory=set)
    since: dict = dataclasses.field(default_factory=dict)  # {name: version when it came, or CHANGED}
    brought: str = ""  # the name of the technique whose file the value is from


def slots(model):
    """[(name, owner, key, parameter)] of the model's own parameters; None for a weight that a Format stores."""
    sites = walk(model)
    stored = [(f"{site.name}.weight", site.module, "weight", None)
              for site in sites if isinstance(site.module, Format)]
    return parameters(model, sites) + stored


def buffers(model):
    """[(name, buffer)] of what training changes without a gradient: BatchNorm's running mean.

    These are the model's own persistent buffers, under their author's names. The buffers of a
    technique never change.
    """
    model = bare(model)
    owners = [("", model.base if isinstance(model, Layer) else model)]
    owners += [
        (f"{site.name}.", site.module)
        for site in walk(model)
        if not isinstance(site.module, Format)
    ]
    return [
        (prefix + key, b)
        for prefix, owner in owners
        for key, b in owner._buffers.items()
        if b is not None and key not in owner._non_persistent_buffers_set
    ]


def say(owner, key, p=None):
    """The Say of a parameter of `owner`. p: the parameter, None while a Format stores it."""
    says = owner.__dict__.setdefault("says", {})
    if key not in says:
        says[key] = Say(p.requires_grad, p.requires_grad)
    return says[key]


def said(model):
    """[(name, parameter or None, Say)] of the model's own parameters."""
    return [(name, p, say(owner, key, p)) for name, owner, key, p in slots(model)]


def settle(model):
    """Compute which of the model's own parameters learn; returns the model."""
    every, groups = said(model), {}
    for i, (name, p, one) in enumerate(every):
        if p is not None and p.requires_grad != one.last:  # since the last time the user has set it
            one.user, one.firm = p.requires_grad, True
        groups.setdefault(i if p is None else id(p), (p, []))[1].append(one)
    claimed = any(one.claims for *_, one in every) or any(claims(patch) for patch in patches(model))
    busy = claimed or any(one.forbids for *_, one in every)
    for p, says in groups.values():
        learns = decided(says, claimed)
        if p is not None and p.requires_grad and not learns:
            note_changes(p, says)
            p.grad = None  # an optimizer that was made before would take one more step
        if p is not None and p.requires_grad != learns:
            p.requires_grad_(learns)
        for one in says:
            one.last, one.firm = learns, one.firm and busy
            one.user = one.user if busy else learns
    mark(model)
    return model


def decided(says, claimed):
    """Whether a parameter learns. says: one Say for each of its names; claimed: whether anything is."""
    firm = [one.user for one in says if one.firm]
    if firm:
        return firm[0]
    if any(one.forbids for one in says):
        return False
    if claimed:
        return any(one.claims for one in says)
    return all(one.user for one in says)


def note_changes(p, says):
    for one in says:
        one.since.update({name: CHANGED for name, then in one.since.items() if then != version(p)})


def version(p):
    """Which tensor it is, and how often it was changed in place: another one may have any values."""
    return id(p), p._version


def patches(model):
    return [module for module in bare(model).modules() if isinstance(module, Patch)]


def claims(patch):
    """Whether a patch has parameters of its own to train."""
    return not patch.fixed and any(True for _ in patch.parameters())


def note(model, name, which, claim):
    """Claim (or forbid) the parameters whose name `which` says yes to; returns the model."""
    settle(model)  # what the user has set until now was said earlier
    for slot, _, one in said(model):
        if which(slot):
            (one.claims if claim else one.forbids).add(name)
            one.firm = False  # this is said later than what the user set
    return settle(model)


def came(model, name):
    """Note that a technique has come: what changes from now on changes beside it; returns the model."""
    for _, p, one in said(model):
        if p is not None:
            one.since.setdefault(name, version(p))
    return settle(model)


def gone(model, name):
    """Forget what a technique said; returns the model."""
    for *_, one in said(model):
        one.claims.discard(name)
        one.forbids.discard(name)
        one.since.pop(name, None)
        one.brought = "" if one.brought == name else one.brought
    return settle(model)


def noted(model):
    """The names of the techniques that claim or forbid parameters of the model's own."""
    says = [module.__dict__.get("says", {}) for module in bare(model).modules()]
    return {name for known in says for one in known.values() for name in one.claims | one.forbids}


def changed_beside(model, name):
    """{parameter's name: parameter} of what learned beside a technique before another one stopped it."""
    return {slot: p for slot, p, one in said(model) if p is not None and one.since.get(name) == CHANGED}


def stopped_by(model, name):
    """The names of the parameters that a technique forbids."""
    return {slot for slot, _, one in said(model) if name in one.forbids}


def claimed_by(model, name):
    """The names of the parameters that a technique claims."""
    return {slot for slot, _, one in said(model) if name in one.claims}


def frozen(model, name="freeze"):
    """The names of the parameters that `freeze` forbids, without what the user has let learn again."""
    again = {slot for slot, p, _ in said(model) if p is not None and p.requires_grad}
    return stopped_by(model, name) - again


def left_to_learn(model):
    """{name: tensor} of what `freeze`, where it is attached, left to learn; {} where it is not.

    A tied parameter counts as stopped if either of its names is; one that the user has let learn
    again does not. The weight that a Format stores is given dense, in the layout of its leaf.
    """
    stopped = frozen(model)
    return of_names(model, lambda names: not names & stopped) if stopped else {}


def held_by(model, name):
    """{name: tensor} of the model's own parameters that are in the file of `name`, which claims or forbids."""
    if stopped_by(model, name):
        return left_to_learn(model)
    claimed = claimed_by(model, name)
    return of_names(model, lambda names: bool(names & claimed))


def of_names(model, which):
    """{first name: tensor} of the parameters for whose set of names `which` says yes, as their leaf keeps them."""
    every = {}
    for name, owner, _, p in slots(model):
        every.setdefault(id(owner if p is None else p), (owner, p, []))[2].append(name)
    return {names[0]: owner.weight if p is None else p for owner, p, names in every.values() if which(set(names))}
