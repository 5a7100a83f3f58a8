"""The table of techniques, and what of them is attached to a model."""

import sys

from minillm.registry.layer import Format
from minillm.registry.sites import walk

TECHNIQUES = {}


def register(name, cls):
    """Enter a technique's class in the table; its module holds the verbs."""
    cls.technique = name
    TECHNIQUES[name] = cls


def techniques():
    """{name: the module that holds its verbs}, in the order of `import minillm`."""
    return {name: sys.modules[cls.__module__] for name, cls in TECHNIQUES.items()}


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
