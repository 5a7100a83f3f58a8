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
from minillm.registry.attach import check_formats, ring, store
from minillm.registry.learned import check_learned, let_learn, put_back, shapes, tied_names
from minillm.registry.learning import buffers, changed_beside, learns, left_to_learn
from minillm.registry.layer import Format, Patch
from minillm.registry.sites import layers, walk
from minillm.registry.table import attached, formats_of, patches_of
from minillm.registry.targets import computed, hint

LEARNED, BUFFER = "learned:", "buffer:"


# --- saving -----------------------------------------------------------------------------------------


def save(cls, model, path, learned=True, force=False):
    """Write the technique to a safetensors file: what it added, and what of the model's own learns.

    learned=False leaves the model's own parameters and buffers out. What `freeze` left to learn is
    in freeze's own file. FileExistsError where `path` is a file that no technique of minillm wrote,
    unless `force`. The old file stays until the new one is whole.
    """
    name = cls.technique
    modules = {site.name: patch for site, patch in patches_of(name, model)}
    modules |= {site.name: site.module for site in formats_of(name, model)}
    if not modules:
        raise ValueError(f"there is no {name} in this model to save; attached: {attached(model)}")
    own = learned_of(name, model) if learned else {}
    tensors = {f"{where}.{key}": t for where, module in modules.items() for key, t in added(module).items()}
    kept = dict(buffers(model)) if learned else {}
    write(path, name, model, tensors, own, kept, force,
          sites={where: module.config() for where, module in modules.items()})


def learned_of(technique, model):
    """{name: parameter} of the model's own that the technique's file holds.

    These are the ones that learn, and those that learned beside it before another technique stopped
    them. What `freeze` left to learn is in freeze's own file, whatever else is attached.
    """
    left = left_to_learn(model)
    if technique == "freeze":
        return left
    before = changed_beside(model, technique)
    return {name: p for name, p in fingerprint.own(model).items()
            if name in before and name not in left or p.requires_grad and not left}


def added(module):
    """The tensors of a Patch (parameters and buffers) or of a Format (buffers: the bias is the model's)."""
    return dict(module.state_dict()) if isinstance(module, Patch) else dict(module.named_buffers())


def write(path, technique, model, tensors, own, kept, force=False, **metadata):
    """Write `tensors`, the learned parameters `own`, the buffers `kept`, and the metadata as JSON.

    Of several processes the first writes.
    """
    check_writable(path, force)
    beneath = over(technique, model)
    held = {f"{site.name}.weight" for site in formats_of(technique, model)} | own.keys()
    if "freeze" not in beneath:  # frozen later: what it left to learn is in its own file
        held |= left_to_learn(model).keys()
    base = fingerprint.of(model, held)
    needs = {name: {} for name in sorted(beneath)} | fingerprint.patches(model, beneath)
    shared = {name: others for name, others in tied_names(model).items() if name in own}
    told = {key: json.dumps(value) for key, value in dict(metadata, base=base, over=needs, shared=shared).items()}
    every = tensors | {LEARNED + name: p.detach() for name, p in own.items()}
    every |= {BUFFER + name: b for name, b in kept.items()}
    every = distributed.apart(every)
    if distributed.place()[0] == 0:
        with files.atomic(path) as new:
            safetensors.torch.save_file(every, new, dict(told, format="pt", technique=technique))
            files.sort_metadata(new)
    distributed.wait()


def over(technique, model):
    """The names of the techniques that the model had before this one, and still has.

    Formats are not among them: the fingerprint of the base allows for their rounding.
    """
    every = [(name, patch) for layer in layers(model).values() for name, patch in layer.patches.items()]
    if technique == "freeze":
        return {name for name, patch in every if "freeze" not in patch.over}
    here = {name for name, _ in every} | ({"freeze"} if left_to_learn(model) else set())
    return here & {one for name, patch in every if name == technique for one in patch.over}


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


def load(cls, model, path, replace=False, any_base=False):
    """Attach what `save` wrote; in place, returns the model. Everything is checked before the model is touched.

    ValueError where the technique is already attached, unless `replace`: then the file's takes its place.
    ValueError where the file was made for another model, unless `any_base`.
    """
    name = cls.technique
    tensors, metadata = opened(path, name)
    configs, sites = field(metadata, "sites", path), {site.name: site for site in walk(model)}
    if not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError(f"{path} does not say where its tensors belong: settings are objects")
    for where in configs:
        if where not in sites or not cls.accepts(sites[where]):
            possible = [site for site in sites.values() if cls.accepts(site)]
            why = computed(sites[where]) if where in sites else ""
            raise ValueError(
                f"{path} has {name} for {where!r}, which this model lacks{why}; "
                f"{hint(where, possible)}"
            )
    check_free(cls, model, configs, path, replace)
    parts, own, kept = sorted_out(tensors, configs, path)
    made = {where: remake(cls, sites[where], config, parts[where], f"{path}, {where!r}")
            for where, config in configs.items()}
    check_base(model, metadata, path, any_base)
    shared = field(metadata, "shared", path)
    check_learned(model, own, kept, shared, path)
    new = [site for where, site in sites.items() if where in made and not isinstance(site.module, cls)]
    if issubclass(cls, Format):
        check_formats(cls, model, new)
    put_back(model, own, kept, shared)
    if not issubclass(cls, Format):
        beneath = frozenset(field(metadata, "over", path)) if "over" in metadata else frozenset()
        for patch in made.values():
            patch.over = beneath
        ring(model, [(sites[where], patch) for where, patch in made.items()])
        if any(learns(patch) for patch in made.values()):
            let_learn(model, own, name)
        return model
    for where, form in made.items():
        if isinstance(sites[where].module, cls):
            sites[where].module._buffers.update(form._buffers)
    return store(model, new, lambda site: made[site.name])


def opened(path, technique):
    """(tensors, metadata) of a file of this technique."""
    tensors, metadata = read(path)
    holds = metadata.get("technique")
    if holds != technique:
        remedy = f"it holds {holds}: use minillm.{holds}.load" if holds else "it names no technique: did minillm write it?"
        raise ValueError(f"{path} is not a file of {technique}; {remedy}")
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
    """The name of the technique that wrote a file; None where none did."""
    return read(path)[1].get("technique")


def field(metadata, key, path, kind=dict):
    """A JSON field of the metadata."""
    try:
        value = json.loads(metadata[key])
        if not isinstance(value, kind):
            raise ValueError(f"{key} is {type(value).__name__}")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say where its tensors belong ({type(error).__name__}: {error})") from error
    return value


def check_free(cls, model, configs, path, replace):
    """ValueError where the technique is attached already, and is not to be replaced as a whole."""
    here = [site.name for site, _ in patches_of(cls.technique, model)]
    here += [site.name for site in formats_of(cls.technique, model)]
    if here and not replace:
        raise ValueError(f"the model has {cls.technique} already, at {here[0]!r} ({len(here)} such), and {path} would take "
                         f"its place: unwrap or merge it first, or say replace=True")
    extra = [where for where in here if where not in configs]
    if extra:
        raise ValueError(f"the model has {cls.technique} at {extra[0]!r} ({len(extra)} such), which {path} lacks: unwrap it first")


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


def remake(cls, site, config, tensors, where):
    """The Patch or Format that a file holds for a site, which is not touched."""
    most = max([1 << 16, *(t.numel() for t in tensors.values())])
    if any(type(value) is int and value > most for value in config.values()):  # ask for memory only where the file has as much
        raise ValueError(f"{where}: the settings do not fit the tensors: {config}")
    try:
        new = copy.deepcopy(site.module) if isinstance(site.module, cls) else cls(site, **config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {cls.technique} does not take the settings {config} ({error})") from error
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
    """ValueError where the file was made for another model, unless any model will do.

    Another model is also one that lacks an adapter over which this one was trained.
    """
    if any_base:
        return
    try:
        then = field(metadata, "base", path)
        needs = field(metadata, "over", path) if "over" in metadata else {}
    except ValueError as error:
        raise ValueError(f"{error}; any_base=True loads it all the same") from error
    try:
        freeze = {name: needs.pop(name) for name in ("freeze",) if name in needs}
        difference = fingerprint.differs(model, then)
        lack = fingerprint.lacks(model, needs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; any_base=True loads it all the same") from error
    if difference and freeze and not left_to_learn(model):
        difference += ". It was made over freeze: load the file of freeze first"
    if lack:
        difference = f"{lack}. Load the file of each technique in the order in which they were wrapped"
    if difference:
        raise ValueError(f"{path} belongs to another model: {difference}; any_base=True loads it all the same")
