"""Which of the model's own parameters learn: what is said of each parameter, and one rule.

    a technique claims     what it trains: its own parameters (LoRA), some of the model's (BitFit)
    a technique forbids    some of the model's (freeze), and never what another technique added
    the user sets          `requires_grad`

A parameter of the model learns if nothing forbids it, and if something claims it or nothing claims
anything. What the user sets while techniques claim or forbid is kept, until a technique names that
very parameter. Without such techniques, the user's `requires_grad` decides.

`settle` applies the rule at the end of each verb, so the order of the verbs does not matter. The
module that owns a parameter keeps what is said of it, as a Say in `says`: it goes with the module
into a copy and into a pickle. A tied parameter has a Say for each of its names, and all of them
count. The weight that a Format stores is no parameter meanwhile: the Format keeps its Say.

Some parameters learn beside a mask and are stopped later, by LoRA for example. They still belong in
the mask's file. So when a technique comes, a Say notes the version of its parameter, and when the
parameter is stopped, whether it has changed since. (torch's version counts every change in place,
except those through `.data`.)
"""

import dataclasses

import torch

from minillm.registry.foreign import mark
from minillm.registry.kinds import Format, Patch, version
from minillm.registry.layer import Layer, dense
from minillm.registry.past import birth
from minillm.registry.sites import bare, parameters, walk

CHANGED = -1  # no version


@dataclasses.dataclass
class Say:
    """What is said of one parameter."""

    user: bool  # whether the user lets it learn
    last: bool  # whether it learned after the last `settle`
    firm: bool = False  # whether the user set it while techniques claimed or forbade something
    claims: set = dataclasses.field(default_factory=set)  # the names that claim it
    forbids: set = dataclasses.field(default_factory=set)  # the names that forbid it
    since: dict = dataclasses.field(default_factory=dict)  # {name: version, or CHANGED}
    brought: str = ""  # the name of the technique from whose file the value is


def slots(model):
    """[(name, owner, key, parameter)] of the model's own; None for a weight stored in a Format."""
    sites = walk(model)
    stored = [(f"{site.name}.weight", site.module, "weight", None)
              for site in sites if isinstance(site.module, Format)]
    return parameters(model, sites) + stored


def buffers(model):
    """[(name, buffer)] of the model's own persistent buffers, under their author's names.

    Training changes them without a gradient: BatchNorm's running mean. The buffers of a technique
    are not among them, for they never change.
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
    """The Say of a parameter of `owner`. p: the parameter; None while a Format stores it."""
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
        if p is not None and p.requires_grad != one.last:  # the user has set it since the last time
            one.user, one.firm = p.requires_grad, True
        groups.setdefault(i if p is None else id(p), (p, []))[1].append(one)
    claimed = (any(one.claims for *_, one in every)
               or any(claims(patch) for patch in patches(model)))
    busy = claimed or any(one.forbids for *_, one in every)
    for p, says in groups.values():
        learns = decided(says, claimed)
        if p is not None and p.requires_grad and not learns:
            note_changes(p, says)
            p.grad = None  # else an existing optimizer would take one more step
        if p is not None and p.requires_grad != learns:
            p.requires_grad_(learns)
        for one in says:
            one.last, one.firm = learns, one.firm and busy
            one.user = one.user if busy else learns
    mark(model)
    return model


def decided(says, claimed):
    """Whether a parameter learns. says: a Say for each name; claimed: whether any is claimed."""
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


def patches(model):
    return [module for module in bare(model).modules() if isinstance(module, Patch)]


def claims(patch):
    """Whether a patch has parameters of its own to train."""
    return not patch.fixed and any(True for _ in patch.parameters())


def note(model, name, which, claim):
    """Claim (or forbid) the parameters where which(name) is true; returns the model."""
    settle(model)  # records what the user has set until now, as said earlier
    for slot, _, one in said(model):
        if which(slot):
            (one.claims if claim else one.forbids).add(name)
            one.firm = False  # the user's setting was earlier than this
    return settle(model)


def came(model, name):
    """Note that a technique has come, with the parameters' versions; returns the model."""
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
    """The names of what learned beside a technique before another one stopped it."""
    return {slot for slot, _, one in said(model) if one.since.get(name) == CHANGED}


def stopped_by(model, name):
    """The names of the parameters that a technique forbids."""
    return {slot for slot, _, one in said(model) if name in one.forbids}


def claimed_by(model, name):
    """The names of the parameters that a technique claims."""
    return {slot for slot, _, one in said(model) if name in one.claims}


def frozen(model, name="freeze"):
    """The names that `freeze` forbids, without those that the user has let learn again."""
    again = {slot for slot, p, _ in said(model) if p is not None and p.requires_grad}
    return stopped_by(model, name) - again


def left_to_learn(model):
    """{name: tensor} of the parameters that `freeze` left to learn; {} if it is not attached.

    A tied parameter counts as stopped if one of its names is, unless the user has let it learn
    again. The weight that a Format stores is dense, in the layout of its leaf.
    """
    stopped = frozen(model)
    return of_names(model, lambda names: not names & stopped) if stopped else {}


def held_by(model, name):
    """{name: tensor} of the model's own parameters that the file of the technique `name` holds."""
    claimed = claimed_by(model, name)
    found = (left_to_learn(model) if stopped_by(model, name)
             else of_names(model, lambda names: bool(names & claimed)))
    return found | whole_again(model, name, found)


@torch.no_grad()
def whole_again(model, name, slots):
    """{slot: weight} of the leaves from which a patch took a part after the technique `name` came.

    slots: the names of parameters. The weight has that part in it again.
    """
    found = {}
    for site in walk(model):
        record, slot = birth(site.module), f"{site.name}.weight"
        if record is None or name not in record.patch.before or slot not in slots:
            continue
        W, _ = dense(record.base)
        part = record.patch.part().to(W.dtype)
        if not isinstance(site.module, Format) and not torch.equal(site.stored()[0], W - part):
            W = site.stored()[0] + part  # the rest has changed since
        found[slot] = W.T if site.leaf.transposed else W
    return found


def of_names(model, which):
    """{first name: tensor} of the parameters where which(set of names) is true, in leaf layout."""
    every = {}
    for name, owner, _, p in slots(model):
        every.setdefault(id(owner if p is None else p), (owner, p, []))[2].append(name)
    return {names[0]: owner.weight if p is None else p
            for owner, p, names in every.values() if which(set(names))}
