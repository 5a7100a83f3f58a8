"""The verbs save and load that all techniques share: safetensors files. Nothing is unpickled.

A file of a technique holds

    what it added          the tensors of each Patch or Format, as SITE.NAME; those that the
                           patches share once, as common:NAME
    what learned with it   the model's own parameters that learn, as learned:NAME (none beneath
                           LoRA, all dense ones beneath a pruning mask); and its buffers, as
                           buffer:NAME, which change without a gradient (BatchNorm's running mean)
    kind, name, sites      the class, the name, the settings of each Patch or Format
    base                   a fingerprint of the other parameters: the model that it belongs to
    over                   the techniques over which it was trained, with a fingerprint of each
    beside                 the names of all techniques that were attached to the model
    beneath                the names of the patches beneath it, also of those that took no part

So the file holds what training changed, and `load` compares the rest with the fingerprint. It
checks every name, shape and setting (see `opening`) before it changes the model.
"""

import json
import pathlib

import safetensors.torch

from minillm import distributed, files
from minillm.registry import fingerprint
from minillm.registry.attach import check_formats, store, surround
from minillm.registry.kinds import Format, Patch
from minillm.registry.learned import check_learned, let_learn, put_back, tied_names
from minillm.registry.learning import (
    buffers, changed_beside, claims, held_by, left_to_learn, noted, patches, whole_again,
)
from minillm.registry.names import check_name, follow, names_of
from minillm.registry.opening import (
    BUFFER, COMMON, LEARNED, check_above, check_base, check_beside, check_complete, check_free,
    field, here_names,
    holds, kind_of, lies_over, listed, needs, opened, read, remake, share, sorted_out,
)
from minillm.registry.past import before_birth
from minillm.registry.sites import check_whole, walk
from minillm.registry.table import attached, formats_of, patches_of
from minillm.registry.targets import computed, hint

__all__ = ["check_writable", "holds", "learned_of", "load", "read", "save", "write"]


# --- saving -------------------------------------------------------------------------------------


def save(family, model, path, name=None, *, learned=True, force=False):
    """Write the technique to a safetensors file, with the model's own parameters that learn.

    name: which one to write, if the model has several of the technique.
    learned=False leaves out the model's own parameters and buffers. Those that `freeze` left
    to learn, or that a technique claims, are in that technique's file.
    FileExistsError if `path` is a file that no technique of minillm wrote, unless `force`. The
    old file stays until the new one is complete.
    """
    found = [(site, patch) for site, patch in patches_of(family, model, name)]
    found += [(site, site.module) for site in formats_of(family, model, name)]
    if not found:
        called = family if name is None else f"{family} called {name!r}"
        raise ValueError(f"there is no {called} in this model to save; attached: {attached(model)}")
    names = sorted({module.name for _, module in found})
    if len(names) > 1:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"the model has {family} under {len(names)} names, {listed}, and a file "
                         f"holds one: save(model, path, name={names[0]!r})")
    (name,), kind = names, found[0][1].kind
    modules = {site.name: module for site, module in found}
    own = learned_of(name, model) if learned else {}
    tensors = {f"{where}.{key}": t
               for where, module in modules.items() for key, t in added(module).items()}
    for key in found[0][1].shares if isinstance(found[0][1], Patch) else ():
        tensors[COMMON + key] = getattr(found[0][1].common, key)
    kept = dict(buffers(model)) if learned else {}
    write(path, family, kind, name, model, tensors, own, kept, force,
          sites={where: module.config() for where, module in modules.items()})


def learned_of(name, model):
    """{name: parameter} of the model's own parameters in the file of a technique.

    These are the ones that learn, and those that learned beside it until another technique
    stopped them. Those that `freeze` left to learn, or that a technique claims, are in that
    technique's file, whatever else is attached.
    """
    if name in noted(model):
        return held_by(model, name)
    others = {slot for other in noted(model) for slot in held_by(model, other)}
    before, left = changed_beside(model, name), left_to_learn(model)
    found = {slot: p for slot, p in fingerprint.own(model).items()
             if slot not in others and (slot in before or p.requires_grad and not left)}
    return found | whole_again(model, name, found.keys() | before - others)


def added(module):
    """{name: tensor} of a Patch, or of a Format (its buffers alone: the bias is the model's).

    What patches share is not among them.
    """
    if not isinstance(module, Patch):
        return dict(module.named_buffers())
    return {k: t for k, t in module.state_dict().items() if not k.startswith("common.")}


def write(path, family, kind, name, model, tensors, own, kept, force=False, **metadata):
    """Write `tensors`, the learned parameters `own`, the buffers `kept`, and the metadata as JSON.

    In a distributed run, the first process writes.
    """
    check_writable(path, force)
    check_uncovered(model)
    beneath = over(name, model, own)
    held = {f"{site.name}.weight" for site in formats_of(family, model, name)} | own.keys()
    for other in noted(model) - beneath:  # it came later: its own file holds what it lets learn
        held |= held_by(model, other).keys()
    base = fingerprint.of(model, held)
    needs = {one: {} for one in sorted(beneath)} | fingerprint.patches(model, beneath)
    shared = {slot: others for slot, others in tied_names(model).items() if slot in own}
    fields = dict(metadata, base=base, over=needs, shared=shared, learned=sorted(own),
                  beside=sorted(here_names(model)),
                  beneath=sorted(lies_over(model, name)))
    fields = {key: json.dumps(value) for key, value in fields.items()}
    every = tensors | {LEARNED + slot: p.detach() for slot, p in own.items()}
    every |= {BUFFER + slot: b for slot, b in kept.items()}
    every = distributed.apart(every)
    if distributed.place()[0] == 0:
        with files.atomic(path) as new:
            fields = dict(fields, format="pt", technique=family, kind=kind, name=name)
            safetensors.torch.save_file(every, new, fields)
            files.sort_metadata(new)
    distributed.wait()


def over(name, model, own=()):
    """The names of the techniques over which the one called `name` was filled or trained.

    own: its learned parameters, {name: parameter}. Only techniques that the model still has.
    Formats are not among them: the fingerprint of the base allows for their rounding. A Format
    itself is over a patch that took a part out of its weight, and over the active adapters while
    parameters of the model train beside it.
    """
    follow(model)
    if name in noted(model):
        return {patch.name for patch in patches(model) if name not in patch.before}
    here = names_of(model)
    stored = [site for site in walk(model)
              if isinstance(site.module, Format) and site.module.name == name]
    if stored:
        learns = any(p.requires_grad for p in dict(own).values())
        adapters = [patch for patch in patches(model) if any(True for _ in patch.parameters())]
        return ({patch.name for site in stored if site.layer
                 for patch in site.layer.patches.values() if patch.start}
                | {patch.name for patch in adapters if learns and patch.active})
    return here & {one for patch in patches(model) if patch.name == name for one in patch.over}


def check_uncovered(model):
    """ValueError if a merge hides the weight from which an attached patch took its part."""
    for site in walk(model):
        starts = [patch.name for patch in (site.layer.patches.values() if site.layer else ())
                  if patch.start]
        if starts and before_birth(site.module) is None:
            raise ValueError(f"another adapter was merged into {site.name!r} after {starts[0]} "
                             "took its part out of the weight: unmerge it first, or merge "
                             f"{starts[0]}")


def check_writable(path, force=False):
    """FileExistsError for a directory; unless `force`, also for a file that no technique wrote.

    OSError if nothing can be written there.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; a technique is saved to a file, such as "
                              f"{path / 'adapter.safetensors'}")
    files.check_writable(path, force=True)
    if path.exists() and not force:
        try:
            ours = "technique" in read(path)[1]
        except ValueError:
            ours = False
        if not ours:
            raise FileExistsError(f"{path} exists, and no technique of minillm wrote it; "
                                  "force=True replaces it")


# --- loading ------------------------------------------------------------------------------------


def load(family, model, path, name=None, *, replace=False, any_base=False):
    """Attach what `save` wrote; in place, returns the model. All checks come before any change.

    name: its name in this model, by default the one it was saved under. ValueError if the
    model has one of this name, unless `replace`: then the file's takes its place. ValueError
    if the file was made for another model, unless `any_base`.
    """
    return planned(family, model, path, name, replace=replace, any_base=any_base)(model)


def planned(family, model, path, name=None, *, replace=False, any_base=False, alone=True):
    """Check a file, and return the function that attaches what it holds to the model.

    The arguments are those of `load`. alone: False if all techniques that were beside it come
    too: then the caller checks the base, and the order.
    """
    tensors, metadata = opened(path, family)
    cls = kind_of(metadata, path)
    configs = field(metadata, "sites", path)
    if configs:
        check_whole(model, "load")
    sites = {site.name: site for site in walk(model)}
    check_sites(family, cls, configs, sites, path)
    a_format = issubclass(cls, Format)
    if a_format and name not in (None, cls.kind):
        raise ValueError(f"name={name!r}: {path} holds the format {cls.kind}, and a format has "
                         "no other name")
    name = cls.kind if a_format else check_name(name or metadata.get("name"), cls.kind, model)
    check_free(family, name, model, configs, path, replace)
    parts, own, kept, common = sorted_out(tensors, configs, path)
    made = {where: remake(cls, sites[where], config, parts[where], f"{path}, {where!r}")
            for where, config in configs.items()}
    share(cls, made, sites, common, path)
    over = check_base(model, metadata, path, any_base) if alone else needs(metadata, path)
    shared = field(metadata, "shared", path)
    check_complete(own, metadata, path)
    check_learned(model, own, kept, shared, path)
    if a_format:
        check_formats(cls, model, [site for where, site in sites.items()
                                   if where in made and not isinstance(site.module, cls)])
    if alone:
        check_beside(model, name, metadata, path, own, made, any_base)
        check_above(model, name, made, path, any_base)
    for patch in made.values() if not a_format else ():
        patch.beneath = frozenset(listed(metadata, "beneath", path) or ())

    def attach(model):
        put_back(model, own, kept, shared, name)
        sites = {site.name: site for site in walk(model)}
        if a_format:
            return store(model, [sites[where] for where in made], lambda site: made[site.name])
        surround(model, name, [(sites[where], patch) for where, patch in made.items()], over)
        if any(claims(patch) for patch in made.values()):
            let_learn(model, own)
        return model

    return attach


def check_sites(family, cls, configs, sites, path):
    """ValueError if the file has settings for a site {name: Site} where the kind cannot be."""
    if not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError(f"{path} does not say where its tensors belong: "
                         "the settings of a site are no object")
    for where in configs:
        if where not in sites or not cls.accepts(sites[where]):
            possible = [site for site in sites.values() if cls.accepts(site)]
            why = computed(sites[where]) if where in sites else ""
            raise ValueError(
                f"{path} has {family} for {where!r}, which this model lacks{why}; "
                f"{hint(where, possible)}"
            )
