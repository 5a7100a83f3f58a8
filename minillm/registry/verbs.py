"""The verbs that all techniques share: wrap, unwrap, merge, unmerge, save, load.

A technique's file chooses its default sites and builds its Patch or Format. `verbs(family, cls)`
enters the class in the table of kinds and returns the other five verbs, which the family's
module publishes. They act on every kind of the family, or on the one with a given `name`.

`merge` is in `merging`, save and load are in `store`.
"""

import functools
import inspect

from minillm.registry import store
from minillm.registry.attach import put
from minillm.registry.bases import refill, restored
from minillm.registry.kinds import Format
from minillm.registry.layer import Layer
from minillm.registry.learning import gone, settle
from minillm.registry.merging import called, check_patches, merge
from minillm.registry.names import follow
from minillm.registry.past import past
from minillm.registry.sites import check_whole, walk
from minillm.registry.table import attached, register


def unwrap(family, model, name=None):
    """Remove the technique, or only the one called `name`; in place, returns the model.

    The original modules come back bit for bit, also after a merge that was kept. A Format
    returns the dense weight that it stores: what its rounding lost stays lost.
    """
    def ours(one):
        return one.family == family and name in (None, one.name)

    check_whole(model, "unwrap")
    follow(model)
    plan, names = [], set()
    for site in walk(model):
        base, merged = site.module, []
        check_stored(site, ours, born=True)
        if isinstance(base, Format) and ours(base):
            merged, base = [base.name], None
        while base is not None and past(base) and ours(past(base).patch):
            merged.append(past(base).patch.name)
            base = past(base).base
        here = ([key for key, patch in site.layer.patches.items() if ours(patch)]
                if site.layer else [])
        if here or merged:
            plan.append((site, here, base))
            names |= {*here, *merged}
        starts = any(site.layer.patches[key].start for key in here)
        if not merged and (starts or name is not None and not here):
            check_last(site, ours)
    if not plan:
        raise ValueError(f"there is no {called(family, name)} in this model to unwrap; "
                         f"attached: {attached(model)}")
    weights = {}  # {id of the buffers: dense weight}; tied Formats share their buffers
    for site, here, base in plan:
        for key in here:
            del site.layer.patches[key]
        if base is None:
            shared = site.module._buffers
            base = refill(site.module)
            base.weight = weights.setdefault(id(shared), base.weight)
            # `settle` would take a difference for the user's choice
            base.says["weight"].last = base.weight.requires_grad
            put(site, base)
        else:
            put(site, restored(site.module, base))
    for one in names:
        gone(model, one)
    return model


def check_last(site, ours):
    """ValueError if another patch was merged into the site after one of ours."""
    record = past(site.module)
    while record and not ours(record.patch):
        over, record = record.patch.name, past(record.base)
        if record and ours(record.patch):
            raise ValueError(f"{over} was merged into {site.name!r} after {record.patch.name}: "
                             f"unmerge {over} first")


def unmerge(family, model, name=None):
    """Put back the base that `merge` kept, and the patch around it; in place, returns the model.

    name: unmerge only this one. By default all of the technique that were merged last. What
    the merged base has learned since is lost: save the model first to keep it.
    """
    check_whole(model, "unmerge")
    check_patches(family, model, name, "it has nothing to fold, so nothing to put back")

    def ours(one):
        return one.family == family and name in (None, one.name)

    plan = []
    for site in walk(model):
        base, records = site.module, []
        while past(base) and ours(past(base).patch) and not past(base).born:
            records.append(past(base))
            base = records[-1].base
        for one in [record.patch.name for record in records]:
            if site.layer and one in site.layer.patches:
                raise ValueError(f"{site.name!r} has another {one} around the merged one: "
                                 "unwrap or merge that first")
        if records:
            plan.append((site, records))
        else:
            check_last(site, ours)
            check_stored(site, ours)
    if not plan:
        raise ValueError(f"no {called(family, name)} is merged in this model, or it was merged "
                         f"with keep=False; attached: {attached(model)}")
    follow(model)
    for site, records in plan:
        old = restored(site.module, records[-1].base)
        if site.layer is None:
            put(site, old)
            site.replace(Layer(old))
        else:
            site.layer.base = site.module = old
        for record in records:  # the last merge first
            beneath = [key in record.beneath for key in site.layer.patches]
            place = len(beneath) - beneath[::-1].index(True) if any(beneath) else 0
            site.layer.add(record.patch, place)
    return settle(model)


def check_stored(site, ours, born=False):
    """ValueError if a format stored the leaf after one of ours was merged (born: attached)."""
    if isinstance(site.module, Format):
        record = past(site.module.shell.kept[0])
        if record and ours(record.patch) and record.born == born:
            did = "took a part out of" if born else "was merged into"
            raise ValueError(f"{record.patch.name} {did} {site.name!r} before {site.module.kind} "
                             f"stored it: minillm.{site.module.family}.unwrap(model) first")


def verbs(family, cls, functions=None):
    """Enter `cls` in the table of kinds; returns the family's unwrap, merge, unmerge, save, load.

    functions: five other functions (family, model, ...) to use instead.
    """
    register(family, cls)

    def bound(verb):
        def call(model, *args, **kwargs):
            return verb(family, model, *args, **kwargs)

        functools.update_wrapper(call, verb).__module__ = cls.__module__
        signature = inspect.signature(verb)
        call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        return call

    functions = functions or (unwrap, merge, unmerge, store.save, store.load)
    return tuple(bound(verb) for verb in functions)
