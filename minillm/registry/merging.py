"""The verb merge: fold a technique into the base, which keeps its format.

It subtracts nothing: it makes a new base, and keeps the old base and the patch on it, for
`unmerge`. The price is a second copy of each merged leaf, which keep=False saves. peft subtracts
the delta instead. That costs no memory, but the weights differ in their last bits afterwards, or
wholly where the base is quantized.

Each new base is computed and checked before any is put into the model.
"""

import logging

from minillm import options
from minillm.registry.attach import put
from minillm.registry.bases import fold_in
from minillm.registry.hooks import take_hooks
from minillm.registry.kinds import CannotMerge, Format, Patch
from minillm.registry.learning import gone
from minillm.registry.names import follow
from minillm.registry.past import past
from minillm.registry.probe import allowed_of, check, outputs
from minillm.registry.sites import check_whole, shared_biases, ties, walk
from minillm.registry.table import KINDS, attached, formats_of, patches_of

log = logging.getLogger("minillm")


def merge(family, model, name=None, *, keep=True, tolerance=0.5, probe=None, allowed=None):
    """Fold the technique into the base, which keeps its format; in place, returns the model.

    name: fold only the patches of this name. By default all of the technique that take part
    (see `minillm.use`), innermost first.
    keep: keep the old base and the patch for `unmerge`. keep=False frees their memory, and
    that of earlier merges.
    tolerance: the largest rounding error of the base's format, as a share of the change (both
    as norms). A larger error would make another model: then nothing is merged.
    probe: an input of the model, such as ids (b, t). The model computes it before and after the
    merge, which is undone if the outputs differ by more than `allowed`, as a share of their
    size. By default that depends on dtype and format: see `registry.probe`.

    CannotMerge if the technique does not change a weight. ValueError if another patch lies
    beneath it, unless both add to the weight.
    """
    check_whole(model, "merge")
    options.flag("keep", keep)
    why = "it has nothing to fold, and unwrap gives the dense weight back"
    check_patches(family, model, name, why)
    if allowed is not None and (probe is None or not options.positive("allowed", allowed)):
        raise ValueError(f"allowed={allowed!r} has no effect without probe=")
    before = None if probe is None else outputs(model, probe)
    allowed = allowed_of(model) if allowed is None else allowed
    plan = plan_of(family, model, name, keep, tolerance)
    undo = put_all(plan)
    if probe is not None:
        try:
            check(before, outputs(model, probe), allowed, called(family, name), plan)
        except Exception:
            undo()
            raise
    for one in {patch.name for _, patch, *_ in plan}:
        gone(model, one)
    log.info("merged %s into %d leaves; the largest rounding is %.2g of the change",
             called(family, name), len(plan), max(rounding for *_, rounding in plan))
    return model


def plan_of(family, model, name, keep, tolerance):
    """[(site, patch, new base, rounding error)] of a merge; all checks, and no change."""
    found, bases, plan = patches_of(family, model, name), {}, []
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
            bases[site.name], rounding = fold_in(site, patch, base, keep, tolerance)
            plan.append((site, patch, bases[site.name], rounding))
    if not plan:
        raise ValueError(f"there is no {called(family, name)} in this model to merge; "
                         f"attached: {attached(model)}")
    return plan


def put_all(plan):
    """Carry out the plan of a merge; returns a function that undoes it."""
    last = {site.name: base for site, _, base, _ in plan}  # a leaf may have several patches
    sites = list({site.name: site for site, *_ in plan}.values())
    old = [(site, site.layer, site.module, dict(site.layer.patches)) for site in sites]
    for site, patch, base, _ in plan:
        del site.layer.patches[patch.name]
        if base is last[site.name]:
            put(site, base)

    def undo():
        for site, layer, base, patches in old:
            if site.layer is None:
                take_hooks(layer, site.module)
            site.replace(layer)
            layer.base = site.module = base
            layer.patches.clear()
            layer.patches.update(patches)

    return undo


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


def called(family, name):
    return family if name is None else f"{family} called {name!r}"
