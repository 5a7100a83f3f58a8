"""Two tables: kinds, the classes in a model's tree and in files; methods, which a user calls.

    kind      a class: LoRA, Mask, Integer, CSR     new arithmetic is a new kind
    method    a `wrap`, with a paper                a new way to choose the numbers is a new method
    family    a module with verbs: minillm.lora     its kinds share unwrap, merge, save, load

PiSSA and LoRA are two methods of one kind. README's table, the choices of the command line and the
laws come from these tables.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable

from minillm.registry.kinds import Format, Patch
from minillm.registry.learning import noted
from minillm.registry.sites import walk

KINDS = {}  # {kind: its class}
METHODS = {}  # {name: Method}
RATED = {"tiny", "smollm2"}  # the models with usual learning rates


@dataclasses.dataclass(frozen=True)
class Method:
    """What a user calls as `minillm.FAMILY.wrap` or `minillm.FAMILY.NAME.wrap`."""

    name: str
    kind: str  # the kind that it puts into the model
    wrap: Callable
    does: str  # one line for the tables
    paper: str
    rates: dict  # {"tiny": ..., "smollm2": ...}: the usual learning rate; {}: it has none
    small: dict  # {variant: options} with which the laws run it, on models of width 16

    @property
    def module(self):
        return sys.modules[self.wrap.__module__]

    @property
    def family(self):
        return KINDS[self.kind].family

    @property
    def tokens(self):
        """Whether the model still predicts tokens, as compare and the command line need it."""
        return not getattr(KINDS[self.kind], "instead", False)

    @property
    def path(self):
        """The module with `wrap`, as a user writes it: minillm.lora, minillm.lora.dora."""
        return self.wrap.__module__

    @property
    def calibrated(self):
        """Whether `wrap` takes examples as an argument."""
        return "examples" in inspect.signature(self.wrap).parameters


def register(kind, cls, family=None):
    """Enter a class in the table of kinds. family: the module with its verbs, by default `kind`."""
    known = KINDS.get(kind)
    if known is not None and known.__module__ != cls.__module__:
        raise ValueError(f"the kind {kind!r} is {known.__module__}.{known.__name__} already: "
                         f"give {cls.__name__} another name")
    if issubclass(cls, Patch) and cls.forward is Patch.forward and cls.fold is Patch.fold:
        raise TypeError(f"{cls.__name__} has neither a forward nor a fold, so it computes nothing")
    cls.kind, cls.family = kind, family or kind
    KINDS[kind] = cls


def method(name, wrap, *, does, paper, kind=None, rates=None, small=None):
    """Enter a `wrap` in the table of methods. kind: its kind, if that is not called `name`."""
    known = METHODS.get(name)
    if known is not None and known.path != wrap.__module__:
        raise ValueError(f"the method {name!r} is {known.path}.wrap already: choose another name")
    if unknown := (rates or {}).keys() - RATED:
        raise ValueError(f"rates={rates}: {min(unknown)!r} is none of the models {sorted(RATED)}")
    METHODS[name] = Method(name, kind or name, wrap, does, paper, rates or {}, small or {"": {}})


def techniques():
    """{family: the module with its verbs}, in the order of `import minillm`."""
    return {cls.family: sys.modules[KINDS[cls.family].__module__] for cls in KINDS.values()}


def patches_of(family, model, name=None):
    """[(site, patch)] of a family, or of one name in it, by site and then innermost first."""
    return [(site, patch)
            for site in walk(model) if site.layer for patch in site.layer.patches.values()
            if patch.family == family and name in (None, patch.name)]


def formats_of(family, model, name=None):
    """[site] of the leaves that Formats of a family store; the name of a Format is its kind."""
    return [site for site in walk(model) if isinstance(site.module, Format)
            and site.module.family == family and name in (None, site.module.name)]


def attached(model):
    """The names of all techniques attached to the model, as a text for an error."""
    names = {patch.name for site in walk(model) if site.layer
             for patch in site.layer.patches.values()}
    names |= {site.module.name for site in walk(model) if isinstance(site.module, Format)}
    return ", ".join(sorted(names | noted(model))) or "nothing"
