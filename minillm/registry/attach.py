"""How a Patch or a Format is put into the model: all checks come before the first change."""

import torch

from minillm.registry.bases import remainder
from minillm.registry.hooks import take_hooks
from minillm.registry.kinds import Format
from minillm.registry.layer import Layer
from minillm.registry.learning import came, say
from minillm.registry.names import check_name, follow, names_of, taking_part
from minillm.registry.past import Aside, past
from minillm.registry.sites import check_whole, other_keys, shared_biases, ties, walk
from minillm.registry.targets import hidden_linears, select


def attach(
    cls, model, targets=None, default=hidden_linears, what="leaf", name=None, fill=None, each=None,
    **options,
):
    """Wrap the sites that `targets` names (see `registry.select`) with cls(site, **options).

    In place; returns the model. name: the name of the new patch, by default its kind.
    fill: a function (new, site) that fills the new Patch or Format instead of its own `fill`.
    each: a function of a site that returns the options, {name: value}, of that site alone.
    """
    def make(site):
        new = cls(site, **options, **(each(site) if each else {}))
        (fill or cls.fill)(new, site)
        return new

    check_whole(model, "wrap")
    sites = select(model, targets, cls.accepts, default(model), what)
    if issubclass(cls, Format):
        check_formats(cls, model, sites)
        return store(model, sites, make)
    name = check_name(name, cls.kind, model)
    for site in sites:
        check_free(site, name, cls.kind)
    pairs = [(site, make(site)) for site in sites]
    over = taking_part(model) - {name} if fill or cls.reads else ()
    return surround(model, name, pairs, over)


def check_free(site, name, kind):
    """ValueError if a patch of this name is around the site already."""
    if site.layer and name in site.layer.patches:
        again = ("" if name != kind
                 else f", or give the new one a name: wrap(model, name={kind + '-2'!r})")
        raise ValueError(f"{site.name!r} is already wrapped with {name}: "
                         f"unwrap or merge it first{again}")


def surround(model, name, pairs, over):
    """Put each patch around its site, or in place of one of the same name; returns the model.

    pairs: [(site, patch)]; over: the names over which the patches were filled or trained.
    """
    check_shared(model, name, pairs)
    follow(model)
    before = frozenset(names_of(model))
    for _, patch in pairs:
        patch.name = name
    for cls in {type(patch) for _, patch in pairs}:
        cls.join([patch for _, patch in pairs])
    tied, biases = ties(model), shared_biases(model)
    bases = [(site, remainder(site, patch, tied, biases)) for site, patch in pairs if patch.start]
    for site, base in bases:
        put(site, base)
    for site, patch in pairs:
        patch.before, patch.over = before - {name}, frozenset(over)
        patch.version = patch.versions()
        if site.layer is None:
            site.replace(Layer(site.module))
        site.layer.add(patch)
    return came(model, name)


def check_shared(model, name, pairs):
    """ValueError if patches of this name elsewhere share other tensors than the new ones do."""
    new = {site.name for site, _ in pairs}
    for site in walk(model) if any(patch.shares for _, patch in pairs) else ():
        if site.layer and name in site.layer.patches and site.name not in new:
            raise ValueError(f"the patches called {name!r} share {', '.join(pairs[0][1].shares)}, "
                             f"and there is one at {site.name!r} with its own: name all leaves in "
                             f"one wrap, or give the new ones a name: name={name + '-2'!r}")


def check_formats(cls, model, sites):
    """ValueError for the first leaf that cannot be stored in the format."""
    tied, others = ties(model), other_keys(model)
    for site in sites:
        if other := others.get(site.name):
            raise ValueError(f"{other[0]!r} is the weight of {site.name!r} too, under a name that "
                             f"no leaf has, so a {cls.kind} of the leaf would leave it apart: give "
                             "each its own with minillm.untie(model)")
        if isinstance(site.module, Format):
            raise ValueError(f"{site.name!r} is already stored as {site.module.kind}: "
                             f"minillm.{site.module.family}.unwrap(model) first gives its dense "
                             "weight back")
        if left := sorted({*tied.get(site.name, ())} - {one.name for one in sites}):
            raise ValueError(f"{site.name!r} shares its matrix with {', '.join(left)}: stored as "
                             f"{cls.kind} it would be a second matrix. Name all of them as targets "
                             "to have it stored once, or give each its own with "
                             "minillm.untie(model)")
        if not torch.isfinite(site.module.weight).all():
            raise ValueError(f"the weight of {site.name!r} holds nan or infinity, which {cls.kind} "
                             "cannot store")


def store(model, sites, make):
    """Replace each site's leaf by the Format make(site); in place, returns the model.

    The Format keeps the emptied leaf as `shell`, for unwrap. Leaves that share their matrix
    share the buffers.
    """
    tied, first = ties(model), {}
    for site, new in [(site, make(site)) for site in sites]:  # make all before replacing any
        old = site.module
        group = frozenset({site.name, *tied.get(site.name, ())})
        share(first.setdefault(group, new), new)
        if isinstance(old, Format):
            new.shell = old.shell
            if record := past(old):
                new.past = record
        else:
            for key, p in old.named_parameters(recurse=False):
                say(old, key, p)
            old.weight = None
            new.shell = Aside(old)
        new.says = old.says  # with the Say of the weight, which is no parameter now
        put(site, new.train(old.training))
        name = new.name
    return came(model, name) if sites else model


def share(first, other):
    """Let `other` use the dict of buffers of `first` itself: a cast or a copy keeps them shared."""
    shapes = [{key: (b.shape, b.dtype) for key, b in form._buffers.items()}
              for form in (first, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"leaves that share a matrix have different shapes as {first.kind}: "
                         "minillm.untie(model) first")
    other._buffers = first._buffers


def put(site, base):
    """Make `base` the site's module, in its Layer; without patches, in the Layer's place."""
    if site.layer is not None and len(site.layer.patches):
        site.layer.base = base
    else:
        if (old := site.layer or site.module) is not base:
            take_hooks(base, old)
        site.replace(base)
    site.module = base
