"""Two tables: the kinds, which are classes in a model's tree and in files, and the methods, which a user calls.

    kind      a class: LoRA, Mask, Integer, CSR           new arithmetic is a new kind
    method    a `wrap`, with a paper                      a new way to choose the numbers is a new method
    family    a module with verbs: minillm.lora           its kinds share unwrap, merge, save, load

PiSSA and LoRA are two methods that end as one kind. README's table, the choices of the command line
and the laws all come from here.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable

from minillm.registry.kinds import Format
from minillm.registry.learning import noted
from minillm.registry.sites import walk

KINDS = {}  # {kind: its class}
METHODS = {}  # {name: Method}


@dataclasses.dataclass(frozen=True)
class Method:
    """What a user calls as `minillm.FAMILY.wrap` or `minillm.FAMILY.NAME.wrap`."""

    name: str
    kind: str  # what it puts into the tree
    wrap: Callable
    does: str  # one line for the tables
    paper: str
    rates: dict  # {"tiny": ..., "smollm2": ...}: the usual learning rate; {}: nothing is learnt at one
    small: dict  # {variant: options}: what the laws run it with, on models that are 16 wide

    @property
    def module(self):
        return sys.modules[self.wrap.__module__]

    @property
    def family(self):
        return KINDS[self.kind].family

    @property
    def path(self):
        """What a user writes before `.wrap`: minillm.lora, minillm.lora.dora."""
        return self.wrap.__module__

    @property
    def calibrated(self):
        """Whether `wrap` takes examples, after the model."""
        return "examples" in inspect.signature(self.wrap).parameters


def register(kind, cls, family=None):
    """Enter a class in the table of kinds. The family is the module that has its verbs, by default the kind's name."""
    cls.kind, cls.family = kind, family or kind
    KINDS[kind] = cls


def method(name, wrap, *, does, paper, kind=None, rates=None, small=None):
    """Enter a `wrap` in the table of methods; `kind` where it is not the method's own name."""
    METHODS[name] = Method(name, kind or name, wrap, does, paper, rates or {}, small or {"": {}})


def techniques():
    """{family: the module that holds its verbs}, in the order of `import minillm`."""
    return {cls.family: sys.modules[KINDS[cls.family].__module__] for cls in KINDS.values()}


def patches_of(family, model, name=None):
    """[(site, patch)] of one family, or of one name in it, in the order of the sites, innermost first."""
    return [(site, patch) for site in walk(model) if site.layer for patch in site.layer.patches.values()
            if patch.family == family and name in (None, patch.name)]


def formats_of(family, model, name=None):
    """[site] of the leaves that the Formats of one family store; the name of a Format is its kind."""
    return [site for site in walk(model) if isinstance(site.module, Format)
            and site.module.family == family and name in (None, site.module.name)]


def attached(model):
    """The names of all that is attached to the model, to be listed in an error."""
    names = {patch.name for site in walk(model) if site.layer for patch in site.layer.patches.values()}
    names |= {site.module.name for site in walk(model) if isinstance(site.module, Format)}
    return ", ".join(sorted(names | noted(model))) or "nothing"
