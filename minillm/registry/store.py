"""The file half of every technique's verbs: save and load, as safetensors. Nothing is unpickled.

A file of a technique holds

    what it added          the tensors of each Patch or Format, as SITE.NAME
    what learned with it   the model's own parameters that learn, as learned:NAME (none beneath
                           LoRA, all dense ones beneath a pruning mask); and its buffers, as
                           buffer:NAME, which change without a gradient (BatchNorm's running mean)
    sites                  the settings of each Patch or Format
    base                   a fingerprint of the other parameters: the model that it belongs to
    over                   which techniques the model had before, with a fingerprint of each

So what training changed is in the file, and what the file leaves out is checked. `load` checks every
name, shape and setting first, and touches the model when all of them fit.
"""

import copy
import json
import pathlib

import safetensors
import safetensors.torch
import torch

from minillm import distributed, files
from minillm.registry import fingerprint
from minillm.registry.attach import check_formats, store, surround
from minillm.registry.learned import check_learned, let_learn, put_back, shapes, tied_names
from minillm.registry.learning import (
    buffers, changed_beside, claims, held_by, left_to_learn, noted, patches,
)
from minillm.registry.layer import Format, Patch
from minillm.registry.names import check_name, follow, names_of
from minillm.registry.sites import walk
from minillm.registry.table import KINDS, attached, formats_of, patches_of
from minillm.registry.targets import computed, hint

LEARNED, BUFFER = "learned:", "buffer:"


# --- saving -----------------------------------------------------------------------------------------


def save(family, model, path, name=None, *, learned=True, force=False):
    """Write the technique to a safetensors file: what it added, and what of the model's own learns.

    name: of the one to be written, where the model has several of the technique. learned=False leaves
    the model's own parameters and buffers out. What `freeze` left to learn, or claimed, is in its own
    file. FileExistsError where `path` is a file that no technique of minillm wrote, unless `force`. The
    old file stays until the new one is whole.
    """
    found = [(site, patch) for site, patch in patches_of(family, model, name)]
    found += [(site, site.module) for site in formats_of(family, model, name)]
    if not found:
        called = family if name is None else f"{family} called {name!r}"
        raise ValueError(f"there is no {called} in this model to save; attached: {attached(model)}")
    names = sorted({module.name for _, module in found})
    if len(names) > 1:
        raise ValueError(f"the model has {family} under {len(names)} names, {', '.join(map(repr, names))}, and a file holds one: "
                         f"save(model, path, name={names[0]!r})")
    (name,), kind = names, found[0][1].kind
    modules = {site.name: module for site, module in found}
    own = learned_of(name, model) if learned else {}
    tensors = {f"{where}.{key}": t for where, module in modules.items() for key, t in added(module).items()}
    kept = dict(buffers(model)) if learned else {}
    write(path, family, kind, name, model, tensors, own, kept, force,
          sites={where: module.config() for where, module in modules.items()})


def learned_of(name, model):
    """{parameter's name: parameter} of the model's own that the file of a technique holds.

    These are the ones that learn, and those that learned beside it before another technique stopped
    them. What a technique claims, or `freeze` left to learn, is in its own file, whatever else is attached.
    """
    if name in noted(model):
        return held_by(model, name)
    others = {slot for other in noted(model) for slot in held_by(model, other)}
    before, left = changed_beside(model, name), left_to_learn(model)
    return {slot: p for slot, p in fingerprint.own(model).items()
            if slot not in others and (slot in before or p.requires_grad and not left)}


def added(module):
    """The tensors of a Patch (parameters and buffers) or of a Format (buffers: the bias is the model's)."""
    return dict(module.state_dict()) if isinstance(module, Patch) else dict(module.named_buffers())


def write(path, family, kind, name, model, tensors, own, kept, force=False, **metadata):
    """Write `tensors`, the learned parameters `own`, the buffers `kept`, and the metadata as JSON.

    Of several processes the first writes.
    """
    check_writable(path, force)
    beneath = over(name, model)
    held = {f"{site.name}.weight" for site in formats_of(family, model, name)} | own.keys()
    for other in noted(model) - beneath:  # it came later: what it lets learn is in its own file
        held |= held_by(model, other).keys()
    base = fingerprint.of(model, held)
    needs = {one: {} for one in sorted(beneath)} | fingerprint.patches(model, beneath)
    shared = {slot: others for slot, others in tied_names(model).items() if slot in own}
    fields = dict(metadata, base=base, over=needs, shared=shared)
    fields = {key: json.dumps(value) for key, value in fields.items()}
    every = tensors | {LEARNED + slot: p.detach() for slot, p in own.items()}
    every |= {BUFFER + slot: b for slot, b in kept.items()}
    every = distributed.apart(every)
    if distributed.place()[0] == 0:
        with files.atomic(path) as new:
            safetensors.torch.save_file(every, new, dict(fields, format="pt", technique=family, kind=kind, name=name))
            files.sort_metadata(new)
    distributed.wait()


def over(name, model):
    """The names over which a technique was filled or trained, and which the model still has.

    Formats are not among them: the fingerprint of the base allows for their rounding.
    """
    follow(model)
    if name in noted(model):
        return {patch.name for patch in patches(model) if name not in patch.before}
    here = names_of(model)
    return here & {one for patch in patches(model) if patch.name == name for one in patch.over}


def check_writable(path, force=False):
    """FileExistsError if `path` is a directory, or a file that no technique of minillm wrote, unless `force`.

    OSError where nothing can be written there.
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
            raise FileExistsError(f"{path} exists, and no technique of minillm wrote it; force=True replaces it")


# --- loading ----------------------------------------------------------------------------------------


def load(family, model, path, name=None, *, replace=False, any_base=False):
    """Attach what `save` wrote; in place, returns the model. Everything is checked before the model is touched.

    name: what it is to be called here, by default as it was when it was saved. ValueError where the
    model has one of this name already, unless `replace`: then the file's takes its place. ValueError
    where the file was made for another model, unless `any_base`.
    """
    tensors, metadata = opened(path, family)
    cls = kind_of(metadata, path)
    configs, sites = field(metadata, "sites", path), {site.name: site for site in walk(model)}
    if not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError(f"{path} does not say where its tensors belong: settings are objects")
    for where in configs:
        if where not in sites or not cls.accepts(sites[where]):
            possible = [site for site in sites.values() if cls.accepts(site)]
            why = computed(sites[where]) if where in sites else ""
            raise ValueError(
                f"{path} has {family} for {where!r}, which this model lacks{why}; "
                f"{hint(where, possible)}"
            )
    a_format = issubclass(cls, Format)
    if a_format and name not in (None, cls.kind):
        raise ValueError(f"name={name!r}: {path} holds the format {cls.kind}, and a format has no other name")
    name = cls.kind if a_format else check_name(name or metadata.get("name"), cls.kind, model)
    check_free(family, name, model, configs, path, replace)
    parts, own, kept = sorted_out(tensors, configs, path)
    made = {where: remake(cls, name, sites[where], config, parts[where], f"{path}, {where!r}")
            for where, config in configs.items()}
    over = check_base(model, metadata, path, any_base)
    shared = field(metadata, "shared", path)
    check_learned(model, own, kept, shared, path)
    new = [site for where, site in sites.items() if where in made and not isinstance(site.module, cls)]
    if a_format:
        check_formats(cls, model, new)
    put_back(model, own, kept, shared)
    if not a_format:
        surround(model, name, [(sites[where], patch) for where, patch in made.items()], over)
        if any(claims(patch) for patch in made.values()):
            let_learn(model, own)
        return model
    for where, form in made.items():
        if isinstance(sites[where].module, cls):
            sites[where].module._buffers.update(form._buffers)
    return store(model, new, lambda site: made[site.name])


def kind_of(metadata, path):
    """The class of the kind that a file holds."""
    kind = metadata.get("kind", metadata["technique"])  # a file of an earlier minillm has the base kind
    if kind not in KINDS or KINDS[kind].family != metadata["technique"]:
        known = [name for name, cls in KINDS.items() if cls.family == metadata["technique"]]
        raise ValueError(f"{path} holds the kind {kind!r}, which this minillm lacks; known: {', '.join(known)}")
    return KINDS[kind]


def opened(path, family):
    """(tensors, metadata) of a file of this technique."""
    tensors, metadata = read(path)
    holds = metadata.get("technique")
    if holds != family:
        remedy = f"it holds {holds}: use minillm.{holds}.load" if holds else "it names no technique: did minillm write it?"
        raise ValueError(f"{path} is not a file of {family}; {remedy}")
    return tensors, metadata


def read(path):
    """(tensors, metadata) of a safetensors file. Nothing is unpickled.

    ValueError for any other file. OSError, which names the path, for a directory or no file.
    """
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(
            f"{path} is a directory; what a technique saved is a file, such as "
            f"{pathlib.Path(path) / 'adapter.safetensors'}"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); other formats are not opened") from error
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path} cannot be read: {error}") from error


def holds(path):
    """(technique, name) of what a file holds; (None, None) where no technique of minillm wrote it."""
    metadata = read(path)[1]
    family = metadata.get("technique")
    return family, metadata.get("name", family)


def field(metadata, key, path, kind=dict):
    """A JSON field of the metadata."""
    try:
        value = json.loads(metadata[key])
        if not isinstance(value, kind):
            raise ValueError(f"{key} is {type(value).__name__}")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say where its tensors belong ({type(error).__name__}: {error})") from error
    return value


def check_free(family, name, model, configs, path, replace):
    """ValueError where one of this name is attached already, and is not to be replaced as a whole."""
    here = [site.name for site, _ in patches_of(family, model, name)]
    here += [site.name for site in formats_of(family, model, name)]
    if here and not replace:
        raise ValueError(f"the model has {name} already, at {here[0]!r} ({len(here)} such), and {path} would take "
                         f"its place: unwrap or merge it first, load it under another name=, or say replace=True")
    extra = [where for where in here if where not in configs]
    if extra:
        raise ValueError(f"the model has {name} at {extra[0]!r} ({len(extra)} such), which {path} lacks: unwrap it first")


def sorted_out(tensors, configs, path):
    """A file's tensors: {site: {name: tensor}}, {learned parameter: tensor}, {buffer: tensor}."""
    parts, own, kept = {where: {} for where in configs}, {}, {}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition(":")
        if prefix + ":" in (LEARNED, BUFFER):
            (own if prefix + ":" == LEARNED else kept)[name] = tensor
            continue
        where = max((w for w in configs if key.startswith(w + ".")), key=len, default=None)
        if where is None:
            raise ValueError(f"{path} has the tensor {key!r}, which belongs to none of its sites")
        parts[where][key.removeprefix(where + ".")] = tensor
    return parts, own, kept


def remake(cls, name, site, config, tensors, where):
    """The Patch or Format that a file holds for a site, which is not touched."""
    most = max([1 << 16, *(t.numel() for t in tensors.values())])
    if any(type(value) is int and value > most for value in config.values()):  # ask for memory only where the file has as much
        raise ValueError(f"{where}: the settings do not fit the tensors: {config}")
    try:
        new = copy.deepcopy(site.module) if isinstance(site.module, cls) else cls(site, **config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} does not take the settings {config} ({error})") from error
    if isinstance(new, Format):
        new.take(tensors, where)
        return new
    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{where}: {key} holds nan or infinity")
    ours, theirs = (shapes(d) for d in (new.state_dict(), tensors))
    if ours != theirs:
        raise ValueError(f"{where} does not fit this model, which needs {ours}; the file has {theirs}")
    new.load_state_dict(tensors)
    return new


def check_base(model, metadata, path, any_base=False):
    """The names, as they are here, over which the file's technique was trained.

    ValueError where the file was made for another model, unless any model will do. Another model is also
    one that lacks an adapter over which this one was trained.
    """
    try:
        then = field(metadata, "base", path)
        needs = field(metadata, "over", path) if "over" in metadata else {}
        claiming = {name for name, sites in needs.items() if not sites}  # freeze and its like add nothing
        difference = fingerprint.differs(model, then)
        found, lack = fingerprint.match(model, {name: needs[name] for name in needs.keys() - claiming})
    except ValueError as error:
        if any_base:
            return frozenset()
        raise ValueError(f"{path}: {error}; any_base=True loads it all the same".replace(f"{path}: {path}", f"{path}")) from error
    over = frozenset(found.values()) | claiming
    missing = sorted(claiming - noted(model))
    if difference and missing:
        difference += f". It was made over {missing[0]}: load the file of {missing[0]} first"
    if lack:
        difference = f"{lack}. Load the file of each technique in the order in which they were wrapped"
    if difference and not any_base:
        raise ValueError(f"{path} belongs to another model: {difference}; any_base=True loads it all the same")
    return over
