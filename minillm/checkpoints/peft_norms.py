"""peft's LN_TUNING and `minillm.freeze.norms`: the norms in peft's adapter files (see `peft`).

peft has a copy of each norm, and here the model's own norms learn. So a file's norms take the
place of the model's, as those of `minillm.freeze.load` do.
"""

from minillm.registry import KINDS, walk
from minillm.registry.claiming import say_of
from minillm.registry.learned import check_learned, put_back
from minillm.registry.learning import claimed_by

SUFFIXES = {key: f"ln_tuning_layers.{key}" for key in ("weight", "bias")}


class Norm:
    """What `peft.save` asks of a patch: norm tuning adds none to the model."""

    name = kind = "norms"
    shares, start = (), False

    def __init__(self, site):
        vars(self).update(site.module.named_parameters(recurse=False))


def norms(model):
    """[(site, Norm)] of what `minillm.freeze.norms` claims."""
    owners = {slot.rpartition(".")[0] for slot in claimed_by(model, "norms")}
    return [(site, Norm(site)) for site in walk(model) if site.name in owners]


def check(found):
    """ValueError for a claimed module that is no norm: peft's file would need another form."""
    for site, _ in found:
        if not KINDS["norms"].accepts(site):
            raise ValueError(f"{site.name!r} is no norm, and minillm writes norms alone to a file "
                             "of peft's LN_TUNING: minillm.freeze.save(model, path) holds it")


def put_in(model, name, own, directory):
    """Give the norms the values of a file, and let them learn; in place, returns the model.

    own: {parameter: tensor}, what learned beside the norms among them.
    """
    if name not in (None, "norms"):
        raise ValueError(f"name={name!r}: {directory} holds norms, which have no other name")
    if claimed_by(model, "norms"):
        raise ValueError(f"the model has norms already, and {directory} would take their place: "
                         "minillm.freeze.unwrap(model, name='norms') first")
    check_learned(model, own, {}, {}, directory)
    put_back(model, own, {}, {}, "norms")
    return say_of(model, KINDS["norms"], lambda slot: slot in own)
