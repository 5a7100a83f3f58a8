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

from minillm.registry.layer import Format
from minillm.registry.sites import walk

TECHNIQUES = {}  # {kind: its class}
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
        return TECHNIQUES[self.kind].family

    @property
    def calibrated(self):
        """Whether `wrap` takes examples, after the model."""
        return "examples" in inspect.signature(self.wrap).parameters


def register(kind, cls, family=None):
    """Enter a class in the table of kinds. The family is the module that has its verbs, by default the kind's name."""
    cls.technique, cls.family = kind, family or kind
    TECHNIQUES[kind] = cls


def method(name, wrap, *, does, paper, kind=None, rates=None, small=None):
    """Enter a `wrap` in the table of methods; `kind` where it is not the method's own name."""
    METHODS[name] = Method(name, kind or name, wrap, does, paper, rates or {}, small or {"": {}})


def techniques():
    """{family: the module that holds its verbs}, in the order of `import minillm`."""
    return {cls.family: sys.modules[TECHNIQUES[cls.family].__module__] for cls in TECHNIQUES.values()}


def patches_of(technique, model):
    """[(site, patch)] of one technique."""
    return [(site, site.layer.patches[technique]) for site in walk(model)
            if site.layer and technique in site.layer.patches]


def formats_of(technique, model):
    """[site] of the leaves that one Format stores."""
    return [site for site in walk(model)
            if isinstance(site.module, Format) and site.module.technique == technique]


def attached(model):
    """The names of all techniques in the model, to be named in an error."""
    names = {name for site in walk(model) if site.layer for name in site.layer.patches}
    names |= {site.module.technique for site in walk(model) if isinstance(site.module, Format)}
    return ", ".join(sorted(names)) or "nothing"
