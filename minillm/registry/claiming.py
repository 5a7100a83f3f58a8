"""Techniques that add no module: they say which of the model's own parameters learn.

    freeze    forbids some, and the others learn
    BitFit    claims some, and nothing else learns

The modules that own the parameters keep what these techniques say (see `learning`). Their file
holds the names, and the parameters that were left to learn.
"""

from minillm.registry.kinds import CannotMerge
from minillm.registry.learned import check_learned, put_back
from minillm.registry.learning import (
    buffers, claimed_by, frozen, gone, held_by, note, noted, slots, stopped_by,
)
from minillm.registry.names import follow
from minillm.registry.opening import (
    check_base, check_beside, check_complete, field, kind_of, opened, sorted_out,
)
from minillm.registry.store import write
from minillm.registry.table import KINDS, attached


class Claim:
    """A technique that claims or forbids parameters of the model: a subclass sets which."""

    kind = family = ""
    not_neutral = ""
    claim = False

    @classmethod
    def named(cls, model):
        """The names of the parameters that it claims or forbids."""
        return (claimed_by if cls.claim else stopped_by)(model, cls.kind)


def say_of(model, cls, which):
    """Claim or forbid the parameters where which(name) is true; in place, returns the model."""
    follow(model)
    return note(model, cls.kind, which, cls.claim)


def here(family, model, name=None):
    """The kinds of the family, or the one of this name, that claim or forbid parameters here."""
    found = [cls for kind, cls in KINDS.items() if cls.family == family and name in (None, kind)]
    return [cls for cls in found if cls.kind in noted(model)]


def unwrap(family, model, name=None):
    """Forget what the technique claims or forbids; in place, returns the model.

    Then the other techniques and the user's `requires_grad` decide what learns.
    """
    found = here(family, model, name)
    if not found:
        raise ValueError(f"nothing is frozen in this model by {name or family}; "
                         f"attached: {attached(model)}")
    follow(model)
    for cls in found:
        gone(model, cls.kind)
    return model


def merge(family, model, name=None, **_):
    """CannotMerge: these techniques add nothing to the model's own parameters."""
    raise CannotMerge(f"{name or family} cannot be merged: what it trained is the model itself")


def save(family, model, path, name=None, *, force=False):
    """Write the parameters that were left to learn, and the names of those claimed or forbidden.

    It writes a safetensors file. name: which one, if several of the family are attached. A weight
    that a format stores by now is written dense. FileExistsError as for every technique's `save`.
    """
    found = here(family, model, name)
    if not found:
        raise ValueError(f"nothing is frozen in this model by {name or family}: wrap it first; "
                         f"attached: {attached(model)}")
    if len(found) > 1:
        names = ", ".join(repr(cls.kind) for cls in found)
        raise ValueError(f"the model has {names}, and a file holds one: "
                         f"save(model, path, name={found[0].kind!r})")
    (cls,) = found
    names = cls.named(model) if cls.claim else frozen(model)
    own, kept = held_by(model, cls.kind), dict(buffers(model))
    write(path, family, cls.kind, cls.kind, model, {}, own, kept, force, frozen=sorted(names))


def load(family, model, path, name=None, *, replace=False, any_base=False):
    """Copy the parameters of the file into the model, and let only those learn.

    In place; returns the model. ValueError if the technique is attached already, unless
    `replace`; or if the file was made for another model, unless `any_base`.
    """
    return planned(family, model, path, name, replace=replace, any_base=any_base)(model)


def planned(family, model, path, name=None, *, replace=False, any_base=False, alone=True):
    """Check a file, and return the function that does to the model what it holds.

    The arguments are those of `store.planned`.
    """
    tensors, metadata = opened(path, family)
    cls = kind_of(metadata, path)
    if name not in (None, cls.kind):
        raise ValueError(f"name={name!r}: {path} holds {cls.kind}, which has no other name")
    if cls.named(model) and not replace:
        raise ValueError(f"the model has {cls.kind} already, and {path} would take its place: "
                         "unwrap it first, or say replace=True")
    _, own, kept, _ = sorted_out(tensors, {}, path)
    named = set(map(str, field(metadata, "frozen", path, list)))
    shared = field(metadata, "shared", path)
    missing = named - {slot for slot, *_ in slots(model)}
    if missing:
        does = "claims" if cls.claim else "freezes"
        raise ValueError(f"{path} {does} {sorted(missing)[0]!r}, which this model lacks "
                         f"({len(missing)} such)")
    check_complete(own, metadata, path)
    check_learned(model, own, kept, shared, path)
    if alone:
        check_base(model, metadata, path, any_base)
        check_beside(model, cls.kind, metadata, path, own, {}, any_base)

    def attach(model):
        put_back(model, own, kept, shared, cls.kind)
        gone(model, cls.kind)
        return say_of(model, cls, lambda slot: slot in named)

    return attach


VERBS = (unwrap, merge, merge, save, load)
