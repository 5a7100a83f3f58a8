"""Which of the model's own parameters learn, and which technique stopped the others.

A technique that trains parameters of its own stops the model's; `freeze` stops those that its user
names. Each parameter's owner notes who stopped it. It learns again when nobody is left who did, and
only if it learned before.

The weight of a leaf that a Format stores is no parameter while it is stored. Its note waits on the
Format, so that `unwrap` of the format gives back a weight that learns, or not, as it should.

What learned beside a mask and is stopped later, by LoRA for example, still belongs into the mask's
file. So each owner also notes the version of a parameter (torch counts every change of it in place)
when a technique came. Whoever stops the parameter sees whether it has changed since.
"""

from minillm.registry.layer import Format, Layer
from minillm.registry.sites import parameters, walk


CHANGED = -1  # no version


def slots(model):
    """[(name, owner, key, parameter)] of the model's own parameters; None for a weight that a Format stores."""
    stored = [(f"{site.name}.weight", site.module, "weight", None)
              for site in walk(model) if isinstance(site.module, Format)]
    return parameters(model) + stored


def buffers(model):
    """[(name, buffer)] of what training changes without a gradient: BatchNorm's running mean.

    These are the model's own persistent buffers, under their author's names. The buffers of a
    technique never change.
    """
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


def notes(owner):
    """{key: the techniques that stopped this parameter of `owner`}; writing to it is noting."""
    return owner.__dict__.setdefault("_frozen_by", {})


def freeze(model, technique, which=lambda name: True):
    """Stop the model's own parameters, of those whose name `which` says yes to."""
    for name, owner, key, p in slots(model):
        stopped = notes(owner)
        learns = owner.__dict__["learns"] if p is None else p.requires_grad
        if which(name) and learns and p is not None:
            seen = since(owner, key)
            seen.update({other: CHANGED for other, version in seen.items() if version != p._version})
        if which(name) and (learns or stopped.get(key)):
            stopped[key] = stopped.get(key, frozenset()) | {technique}
            if p is not None:
                p.requires_grad_(False)


def since(owner, key):
    """{technique: the parameter's version when it came, or CHANGED}; writing to it is noting."""
    return owner.__dict__.setdefault("_since", {}).setdefault(key, {})


def came(model, technique):
    """Note that a technique has come: what changes from now on changes beside it."""
    for _, owner, key, p in parameters(model):
        since(owner, key).setdefault(technique, p._version)


def changed_beside(model, technique):
    """{name: parameter} of what learned beside a technique before another one stopped it."""
    return {name: p for name, owner, key, p in parameters(model)
            if since(owner, key).get(technique) == CHANGED}


def thaw(model, technique):
    """Let learn what `technique` alone had stopped; it has gone."""
    for _, owner, key, p in slots(model):
        since(owner, key).pop(technique, None)
        stopped = notes(owner)
        if technique in stopped.get(key, ()):
            stopped[key] -= {technique}
            if not stopped[key] and p is not None:
                p.requires_grad_(True)


def refreeze(model):
    """Stop the model below every attached technique that has parameters of its own."""
    for name in {name for site in walk(model) if site.layer
                 for name, patch in site.layer.patches.items() if learns(patch)}:
        freeze(model, name)


def learns(patch):
    return any(True for _ in patch.parameters())


def stopped_by(model, technique):
    """The names of the parameters that `technique` stopped, also those that others stopped as well."""
    return {name for name, owner, key, _ in slots(model) if technique in notes(owner).get(key, ())}


def frozen(model):
    """The names of the parameters that `freeze` stopped, without what the user has let learn again."""
    again = {name for name, _, _, p in slots(model) if p is not None and p.requires_grad}
    return stopped_by(model, "freeze") - again


def left_to_learn(model):
    """{name: tensor} of what `freeze`, where it is attached, left to learn; {} where it is not.

    A tied parameter counts as stopped if either of its names is; one that the user has let learn
    again does not. The weight that a Format stores is given
    dense, in the layout of its leaf.
    """
    stopped, every = frozen(model), slots(model)
    if not stopped:
        return {}
    seen, found = {id(p) for name, _, _, p in every if name in stopped and p is not None}, {}
    for name, owner, _, p in every:
        if name in stopped or p is not None and id(p) in seen:
            continue
        seen.add(id(p))
        found[name] = owner.weight if p is None else p
    return found
