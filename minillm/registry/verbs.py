"""The verbs that all techniques share: wrap, unwrap, merge, unmerge, save, load.

A technique's file chooses its default sites and builds its Patch or Format. `verbs(family, cls)`
enters the class in the table of kinds and returns the other five verbs, which the family's
module publishes. They act on every kind of the family, or on the one with a given `name`.

`merge` subtracts nothing: it makes a new base, and keeps the old base and the patch on it.
`unmerge` puts them back. The price is a second copy of each merged leaf, which
`merge(model, keep=False)` saves. peft subtracts the delta instead. That costs no memory, but
the weights differ in their last bits afterwards, or wholly where the base is quantized.
"""

import functools
import inspect
import logging

from minillm import options
from minillm.registry import store
from minillm.registry.attach import put
from minillm.registry.bases import fold_in, refill, restored
from minillm.registry.learning import gone, settle
from minillm.registry.kinds import CannotMerge, Format, Patch
from minillm.registry.layer import Layer
from minillm.registry.names import follow
from minillm.registry.past import past
from minillm.registry.sites import check_whole, shared_biases, ties, walk
from minillm.registry.table import KINDS, attached, formats_of, patches_of, register

log = logging.getLogger("minillm")


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


def called(family, name):
    return family if name is None else f"{family} called {name!r}"


def check_last(site, ours):
    """ValueError if another patch was merged into the site after one of ours."""
    record = past(site.module)
    while record and not ours(record.patch):
        over, record = record.patch.name, past(record.base)
        if record and ours(record.patch):
            raise ValueError(f"{over} was merged into {site.name!r} after {record.patch.name}: "
                             f"unmerge {over} first")


def merge(family, model, name=None, *, keep=True, tolerance=0.5):
    """Fold the technique into the base, which keeps its format; in place, returns the model.

    name: fold only the patches of this name. By default all of the technique that take part
    (see `minillm.use`), innermost first.
    keep: keep the old base and the patch for `unmerge`. keep=False frees their memory, and
    that of earlier merges.
    tolerance: the largest rounding error of the base's format, as a share of the change (both
    as norms). A larger error would make another model: then nothing is merged.

    CannotMerge if the technique does not change a weight. ValueError if another patch lies
    beneath it, unless both add to the weight.
    """
    check_whole(model, "merge")
    options.flag("keep", keep)
    why = "it has nothing to fold, and unwrap gives the dense weight back"
    check_patches(family, model, name, why)
    found, bases, plan, worst = patches_of(family, model, name), {}, [], 0.0
    idle = sorted({patch.name for _, patch in found if not patch.active})
    if idle and (name or all(not patch.active for _, patch in found)):
        raise ValueError(f"{idle[0]} takes no part in the model now: "
                         f"minillm.use(model, {idle[0]!r}) first")
    if rows := [patch.name for _, patch in found if patch.rows is not None]:
        raise ValueError(f"{rows[0]} has its own rows of the batch here (minillm.rows): merge it "
                         "outside of that context")
    follow(model)
    tied, biases = ties(model), shared_biases(model)
    merged = {(site.name, patch.name) for site, patch in found if patch.active}
    for site, patch in found:
        if patch.active:
            if type(patch).fold is Patch.fold:
                patch.fold(None, None)  # CannotMerge
            check_order(site, patch, merged)
            if not keep:
                check_kept(site, patch, merged)
            check_shared(site, patch, tied, biases)
            base = bases.get(site.name, site.module)
            base, rounding = fold_in(site, patch, base, keep, tolerance)
            bases[site.name], worst = base, max(worst, rounding)
            plan.append((site, patch, base))
    if not plan:
        raise ValueError(f"there is no {called(family, name)} in this model to merge; "
                         f"attached: {attached(model)}")
    for site, patch, base in plan:
        del site.layer.patches[patch.name]
        if base is bases[site.name]:
            put(site, base)
    for one in {patch.name for _, patch, _ in plan}:
        gone(model, one)
    log.info("merged %s into %d leaves; the largest rounding is %.2g of the change",
             called(family, name), len(plan), worst)
    return model


def check_patches(family, model, name, why):
    """CannotMerge if the family has only formats, in this model or at all."""
    kinds = [cls for cls in KINDS.values() if cls.family == family and name in (None, cls.kind)]
    patches = (patches_of(family, model, name)
               or any(is_of(past(site.module), family) for site in walk(model)))
    formats = [site.module.name for site in formats_of(family, model, name)]
    if not patches and (formats or kinds and all(issubclass(cls, Format) for cls in kinds)):
        raise CannotMerge(f"{(formats or [name or family])[0]} is a format: {why}")


def is_of(record, family):
    return record is not None and record.patch.family == family


def check_order(site, patch, merged):
    """ValueError if a patch beneath this one is not merged too, unless both add to the weight."""
    for other in site.layer.patches.values():
        if other is patch:
            return
        unmerged = (site.name, other.name) not in merged  # one that is idle counts too
        if unmerged and not (other.additive and patch.additive):
            raise ValueError(f"{patch.name} cannot be merged into {site.name!r} while {other.name} "
                             f"lies beneath it: merge or unwrap {other.name} first")


def check_shared(site, patch, tied, biases):
    """ValueError if another module shares the weight or the bias of the leaf."""
    apart = "minillm.untie(model) first gives each its own"
    if site.name in tied:
        raise ValueError(f"{site.name!r} shares its matrix with {', '.join(tied[site.name])}: "
                         f"merging {patch.name} into it would change them too. {apart}")
    if site.name in biases:
        raise ValueError(f"the bias of {site.name!r} is also {', '.join(biases[site.name])}: a "
                         f"merge of {patch.name} would make two of it. {apart}")


def check_kept(site, patch, merged):
    """ValueError if a merge with keep=False would lose what a patch with a start gives back."""
    for other in site.layer.patches.values():
        if other.start and (site.name, other.name) not in merged:
            raise ValueError(f"{other.name} took a part out of {site.name!r}, and keep=False would "
                             f"lose the weight of before: merge or unwrap {other.name} first, or "
                             f"merge {patch.name} with keep=True")


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
