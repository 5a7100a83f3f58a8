"""The common half of every technique's verbs: wrap, unwrap, merge, unmerge, save, load.

A technique's file says which sites it wraps by default and builds its Patch or Format. The rest is the
same for all. `verbs(family, cls)` enters the class in the table and returns the five functions that the
family's module publishes. They act on every kind of the family, or on what has one `name`.

Nothing is ever subtracted: `merge` makes a new base and keeps the old one (and the patch) on it, `unmerge` puts them back.
The price is a second copy of what was merged, which `merge(model, keep=False)` saves. peft subtracts the delta instead,
which costs no memory and returns weights that differ in their last bits, or wholly where the base is quantized.
"""

import functools
import inspect
import logging

from minillm.registry import store
from minillm.registry.attach import put
from minillm.registry.bases import fold_in, refill, restored
from minillm.registry.learning import gone, settle
from minillm.registry.kinds import CannotMerge, Format, Patch
from minillm.registry.layer import Layer
from minillm.registry.names import follow
from minillm.registry.past import past
from minillm.registry.sites import ties, walk
from minillm.registry.table import KINDS, attached, formats_of, patches_of, register

log = logging.getLogger("minillm")


def unwrap(family, model, name=None):
    """Take the technique away, or what of it has one name; in place, returns the model.

    The original modules come back bit for bit, also from a merge that was kept. A Format gives its dense weight back, which is
    what it stores: what rounding lost stays lost.
    """
    def ours(one):
        return one.family == family and name in (None, one.name)

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
        here = [key for key, patch in site.layer.patches.items() if ours(patch)] if site.layer else []
        if here or merged:
            plan.append((site, here, base))
            names |= {*here, *merged}
        elif name is not None:
            check_last(site, ours)
    if not plan:
        raise ValueError(f"there is no {called(family, name)} in this model to unwrap; attached: {attached(model)}")
    weights = {}  # of the formats that share their buffers
    for site, here, base in plan:
        for key in here:
            del site.layer.patches[key]
        if base is None:
            shared = site.module._buffers
            base = refill(site.module)
            base.weight = weights.setdefault(id(shared), base.weight)
            base.says["weight"].last = base.weight.requires_grad  # what each said of it counts anew
            put(site, base)
        else:
            put(site, restored(site.module, base))
    for one in names:
        gone(model, one)
    return model


def called(family, name):
    return family if name is None else f"{family} called {name!r}"


def check_last(site, ours):
    """ValueError where one of ours was merged into a site before another patch was."""
    record = past(site.module)
    while record and not ours(record.patch):
        over, record = record.patch.name, past(record.base)
        if record and ours(record.patch):
            raise ValueError(f"{over} was merged into {site.name!r} after {record.patch.name}: unmerge {over} first")


def merge(family, model, name=None, *, keep=True, tolerance=0.5):
    """Fold the technique into the base, stored back in the base's own format; in place, returns the model.

    name: what has this name alone. By default all of the technique that takes part (see `minillm.use`), innermost first.
    keep: the old base and the patch are kept for `unmerge`. keep=False lets them go, to save their memory, and those of
    earlier merges. tolerance: what the base then stores is compared with what was to be stored; where the rounding of the
    base's format is more than this share of the change (as norms), the merged model would be another one, and nothing is
    merged. CannotMerge where the technique is no change of a weight; ValueError where another patch lies beneath it, unless
    both add to the weight.
    """
    check_patches(family, model, name, "it has nothing to fold, and unwrap gives the dense weight back")
    found, bases, plan, worst = patches_of(family, model, name), {}, [], 0.0
    idle = sorted({patch.name for _, patch in found if not patch.active})
    if idle and (name or all(not patch.active for _, patch in found)):
        raise ValueError(f"{idle[0]} takes no part in the model now: minillm.use(model, {idle[0]!r}) first")
    follow(model)
    tied, merged = ties(model), {(site.name, patch.name) for site, patch in found if patch.active}
    for site, patch in found:
        if patch.active:
            if type(patch).fold is Patch.fold:
                patch.fold(None, None)  # CannotMerge
            check_order(site, patch, merged)
            if site.name in tied:
                raise ValueError(f"{site.name!r} shares its matrix with {', '.join(tied[site.name])}: merging {patch.name} into "
                                 "it would change them too. minillm.untie(model) first gives each its own")
            base, rounding = fold_in(site, patch, bases.get(site.name, site.module), keep, tolerance)
            bases[site.name], worst = base, max(worst, rounding)
            plan.append((site, patch, base))
    if not plan:
        raise ValueError(f"there is no {called(family, name)} in this model to merge; attached: {attached(model)}")
    for site, patch, base in plan:
        del site.layer.patches[patch.name]
        if base is bases[site.name]:
            put(site, base)
    for one in {patch.name for _, patch, _ in plan}:
        gone(model, one)
    log.info("merged %s into %d leaves; the largest rounding is %.2g of the change", called(family, name), len(plan), worst)
    return model


def check_patches(family, model, name, why):
    """CannotMerge where there are formats of the family and no patches, or could be nothing else."""
    kinds = [cls for cls in KINDS.values() if cls.family == family and name in (None, cls.kind)]
    patches = patches_of(family, model, name) or any(is_of(past(site.module), family) for site in walk(model))
    formats = [site.module.name for site in formats_of(family, model, name)]
    if not patches and (formats or kinds and all(issubclass(cls, Format) for cls in kinds)):
        raise CannotMerge(f"{(formats or [name or family])[0]} is a format: {why}")


def is_of(record, family):
    return record is not None and record.patch.family == family


def check_order(site, patch, merged):
    """ValueError where a patch lies beneath that is not merged too, and does not commute with this one."""
    for other in site.layer.patches.values():
        if other is patch:
            return
        if other.active and (site.name, other.name) not in merged and not (other.additive and patch.additive):
            raise ValueError(f"{patch.name} cannot be merged into {site.name!r} while {other.name} lies beneath it: "
                             f"merge or unwrap {other.name} first")


def unmerge(family, model, name=None):
    """Put back the base that `merge` kept, and the patch around it; in place, returns the model.

    name: what has this name alone. By default all of the technique that was merged last. What the
    merged base has learned since goes with it: save the model first, where that is worth keeping.
    """
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
                raise ValueError(f"{site.name!r} has another {one} around the merged one: unwrap or merge that first")
        if records:
            plan.append((site, records))
        else:
            check_last(site, ours)
            check_stored(site, ours)
    if not plan:
        raise ValueError(f"no {called(family, name)} is merged in this model, or it was merged with keep=False; "
                         f"attached: {attached(model)}")
    follow(model)
    for site, records in plan:
        old = restored(site.module, records[-1].base)
        if site.layer is None:
            put(site, old)
            site.replace(Layer(old))
        else:
            site.layer.base = site.module = old
        for record in records:  # the last one that was merged first
            beneath = [key in record.beneath for key in site.layer.patches]
            site.layer.add(record.patch, len(beneath) - beneath[::-1].index(True) if any(beneath) else 0)
    return settle(model)


def check_stored(site, ours, born=False):
    """ValueError where one of ours was merged (or, of the born ones, came) before a format did."""
    if isinstance(site.module, Format):
        record = past(site.module.shell.kept[0])
        if record and ours(record.patch) and record.born == born:
            raise ValueError(f"{record.patch.name} {'took a part out of' if born else 'was merged into'} {site.name!r} before "
                             f"{site.module.kind} stored it: minillm.{site.module.family}.unwrap(model) first")


def verbs(family, cls, functions=None):
    """Enter `cls` in the table of kinds; the family's unwrap, merge, unmerge, save and load.

    functions: other five that take (family, model, ...).
    """
    register(family, cls)

    def bound(verb):
        def call(model, *args, **kwargs):
            return verb(family, model, *args, **kwargs)

        functools.update_wrapper(call, verb).__module__ = cls.__module__
        signature = inspect.signature(verb)
        call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        return call

    return tuple(bound(verb) for verb in functions or (unwrap, merge, unmerge, store.save, store.load))
