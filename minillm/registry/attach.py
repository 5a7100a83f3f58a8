"""How a Patch or a Format takes its place in the model: every check first, then the change."""

import torch

from minillm.registry.learning import came, notes, refreeze, stopped_by
from minillm.registry.layer import Format, Layer
from minillm.registry.sites import layers, ties
from minillm.registry.targets import hidden_linears, select


def attach(cls, model, targets=None, default=hidden_linears, what="leaf", fill=None, **options):
    """Wrap what `targets` names (see `registry.select`) with cls(site, **options).

    In place; returns the model. fill: what fills the new Patch or Format, called with it and its
    site; by default its own `fill`.
    """
    def make(site):
        new = cls(site, **options)
        (fill or cls.fill)(new, site)
        return new

    sites = select(model, targets, cls.accepts, default(model), what)
    if issubclass(cls, Format):
        check_formats(cls, model, sites)
        return store(model, sites, make)
    for site in sites:
        if site.layer and cls.technique in site.layer.patches:
            raise ValueError(f"{site.name!r} is already wrapped with {cls.technique}: unwrap or merge it first")
    return ring(model, [(site, make(site)) for site in sites])


def ring(model, pairs):
    """Put each patch around its site, in place of one of its own technique if that stands there; returns the model."""
    names = {name for layer in layers(model).values() for name in layer.patches}
    names |= {"freeze"} if stopped_by(model, "freeze") else set()
    for site, patch in pairs:
        patch.over = frozenset(names - {patch.technique}) | patch.over
        if site.layer is None:
            site.replace(Layer(site.module).train(site.module.training))
        site.layer.add(patch)
    for technique in {patch.technique for _, patch in pairs}:
        came(model, technique)
    refreeze(model)
    return model


def check_formats(cls, model, sites):
    """ValueError for the first leaf that the format cannot store."""
    tied = ties(model)
    for site in sites:
        if isinstance(site.module, Format):
            raise ValueError(f"{site.name!r} is already stored as {site.module.technique}: minillm."
                             f"{site.module.technique}.unwrap(model) first gives its dense weight back")
        if site.name in tied:
            raise ValueError(f"{site.name!r} shares its matrix with {', '.join(tied[site.name])}: stored as "
                             f"{cls.technique} it would be a second matrix. minillm.untie(model) first gives each its own")
        if not torch.isfinite(site.module.weight).all():
            raise ValueError(f"the weight of {site.name!r} holds nan or infinity, which {cls.technique} cannot store")


def store(model, sites, make):
    """Replace leaves by the Format that `make` gives for each site; in place, returns the model.

    The emptied leaf waits in it as `shell`, outside the module tree, for unwrap.
    """
    for site, new in [(site, make(site)) for site in sites]:  # none is replaced before all are made
        shell = site.module
        stopped = notes(shell)
        new.__dict__.update(shell=shell, _frozen_by=stopped,
                            learns=shell.weight.requires_grad or bool(stopped.get("weight")))
        shell.weight = None
        put(site, new.train(shell.training))
    if sites:
        came(model, new.technique)
    return model


def put(site, base):
    """Make `base` the site's module: in its Layer, or in the model where there is none left to hold a patch."""
    if site.layer is not None and len(site.layer.patches):
        site.layer.base = base
    else:
        site.replace(base)
    site.module = base
