"""Reads a technique's file and checks whether it fits the model, which stays untouched.

Nothing is unpickled.
"""

import json
import pathlib

import safetensors
import torch

from minillm.registry import fingerprint
from minillm.registry.kinds import Format, Patch
from minillm.registry.learned import shapes
from minillm.registry.learning import noted, said
from minillm.registry.names import names_of
from minillm.registry.shared import Common
from minillm.registry.sites import walk
from minillm.registry.table import KINDS, formats_of, patches_of

LEARNED, BUFFER, COMMON = "learned:", "buffer:", "common:"
RENAMED = {"nf4": "codebook"}  # the kinds of an earlier minillm


def kind_of(metadata, path):
    """The class of the kind that a file holds."""
    # a file of an earlier minillm has no "kind": it holds the kind named like the family
    kind = metadata.get("kind", metadata["technique"])
    if kind not in KINDS or KINDS[kind].family != metadata["technique"]:
        known = [name for name, cls in KINDS.items() if cls.family == metadata["technique"]]
        raise ValueError(f"{path} holds the kind {kind!r}, which this minillm lacks; "
                         f"known: {', '.join(known)}")
    return KINDS[kind]


def opened(path, family):
    """(tensors, metadata) of a file of this technique."""
    tensors, metadata = read(path)
    holds = metadata.get("technique")
    if holds != family:
        remedy = (f"it holds {holds}: use minillm.{holds}.load" if holds
                  else "it names no technique: did minillm write it?")
        raise ValueError(f"{path} is not a file of {family}; {remedy}")
    return tensors, metadata


def read(path):
    """(tensors, metadata) of a safetensors file. Nothing is unpickled.

    ValueError for any other file. OSError, with the path, for a directory or a missing file.
    """
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory; what a technique saved is a file, such as "
                                f"{pathlib.Path(path) / 'adapter.safetensors'}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if kind := RENAMED.get(metadata.get("kind")):
                metadata |= dict(kind=kind, name=kind)  # a format has the name of its kind
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); "
                         "other formats are not opened") from error
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path} cannot be read: {error}") from error


def holds(path):
    """(technique, name) of a file; (None, None) if no technique of minillm wrote it."""
    metadata = read(path)[1]
    family = metadata.get("technique")
    return family, metadata.get("name", family)


def field(metadata, key, path, kind=dict):
    """A JSON field of the metadata; ValueError if it is missing, or of another type than `kind`."""
    try:
        value = json.loads(metadata[key])
        if not isinstance(value, kind):
            raise ValueError(f"{key} is {type(value).__name__}")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say where its tensors belong "
                         f"({type(error).__name__}: {error})") from error
    return value


def check_free(family, name, model, configs, path, replace):
    """ValueError if `name` is attached already, unless the file replaces all of it."""
    found = patches_of(family, model, name)
    if found and replace and found[0][1].start:
        raise ValueError(f"{name} took a part out of {found[0][0].name!r}: "
                         f"minillm.{family}.unwrap(model) gives it back, then load {path}")
    here = [site.name for site, _ in found]
    here += [site.name for site in formats_of(family, model, name)]
    if here and not replace:
        raise ValueError(f"the model has {name} already, at {here[0]!r} ({len(here)} such), and "
                         f"{path} would take its place: unwrap or merge it first, load it under "
                         f"another name=, or say replace=True")
    extra = [where for where in here if where not in configs]
    if extra:
        raise ValueError(f"the model has {name} at {extra[0]!r} ({len(extra)} such), which "
                         f"{path} lacks: unwrap it first")


def sorted_out(tensors, configs, path):
    """A file's tensors: {site: {name: tensor}}, {learned parameter: tensor}, {buffer: tensor},
    and what the patches share, {name: tensor}.
    """
    parts, rest = {where: {} for where in configs}, {LEARNED: {}, BUFFER: {}, COMMON: {}}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition(":")
        if prefix + ":" in rest:
            rest[prefix + ":"][name] = tensor
            continue
        where = max((w for w in configs if key.startswith(w + ".")), key=len, default=None)
        if where is None:
            raise ValueError(f"{path} has the tensor {key!r}, which belongs to none of its sites")
        parts[where][key.removeprefix(where + ".")] = tensor
    return parts, *rest.values()


def remake(cls, site, config, tensors, where):
    """A new Patch or Format for a site, from a file's settings and tensors.

    The site stays untouched. ValueError, which begins with `where`, if they do not fit it.
    """
    most = max([1 << 16, *(t.numel() for t in tensors.values())])
    # a size in the settings may ask only for as much memory as the file holds
    if any(type(value) is int and value > most for value in config.values()):
        raise ValueError(f"{where}: the settings do not fit the tensors: {config}")
    try:
        new = cls(site, **config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {cls.kind} does not take the settings {config} "
                         f"({error})") from error
    if isinstance(new, Format):
        new.take(tensors, where)
        return new
    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{where}: {key} holds nan or infinity")
    ours, theirs = (shapes(d) for d in (new.state_dict(), tensors))
    if ours != theirs:
        raise ValueError(f"{where} does not fit this model, which needs {ours}; "
                         f"the file has {theirs}")
    new.load_state_dict(tensors)
    return new


def share(cls, made, sites, tensors, path):
    """Give the new patches {site: patch} what they share; ValueError if it does not fit."""
    names = set(cls.shares) if issubclass(cls, Patch) else set()
    if names != tensors.keys() or not all(t.is_floating_point() for t in tensors.values()):
        raise ValueError(f"{path}: the patches of {cls.kind} share {sorted(names)}, the file has "
                         f"{sorted(tensors)}")
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{path}: what its patches share holds nan or infinity")
    if names and made:
        like = sites[next(iter(made))].new(0)
        common = Common(**{key: t.to(like.device, like.dtype) for key, t in tensors.items()})
        for where, patch in made.items():
            try:
                patch.share(common)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, {where!r}: {error}") from error


def needs(metadata, path):
    """The names of the techniques over which the file's technique was filled or trained."""
    return frozenset(field(metadata, "over", path) if "over" in metadata else {})


def check_complete(own, metadata, path):
    """ValueError if the file lacks a learned parameter that it was written with."""
    lost = sorted((listed(metadata, "learned", path) or set()) - own.keys())
    if lost:
        raise ValueError(f"{path} lacks the learned parameter {lost[0]!r} ({len(lost)} such) that "
                         "it was written with")


def check_base(model, metadata, path, any_base=False):
    """The names in this model of the techniques over which the file's technique was trained.

    ValueError if the file was made for another model, unless `any_base`. A model that lacks an
    adapter over which the file's was trained is also another model.
    """
    try:
        then = field(metadata, "base", path)
        needs = field(metadata, "over", path) if "over" in metadata else {}
        # freeze and BitFit add no tensors, so nothing but the name can match
        claiming = {name for name, sites in needs.items() if not sites}
        difference = fingerprint.differs(model, then)
        adding = {name: needs[name] for name in needs.keys() - claiming}
        found, lack = fingerprint.match(model, adding)
    except ValueError as error:
        if any_base:
            return frozenset()
        message = f"{path}: {error}; any_base=True loads it all the same"
        raise ValueError(message.replace(f"{path}: {path}", f"{path}")) from error
    over = frozenset(found.values()) | claiming
    missing = sorted(claiming - noted(model))
    if difference and missing:
        first = missing[0]
        difference += f". It was made over {first}: load the file of {first} first"
    own = {metadata.get("name"), metadata.get("kind", metadata["technique"])}
    gone = sorted((listed(metadata, "beside", path) or set()) - here_names(model) - own, key=moves)
    if difference and not missing and gone:
        difference += f". It was made beside {gone[0]}: load the file of {gone[0]} first"
    if lack:
        difference = (f"{lack}. Load the file of each technique in the order in which they were "
                      "wrapped")
    if difference and not any_base:
        raise ValueError(f"{path} belongs to another model: {difference}; "
                         "any_base=True loads it all the same")
    return over


def moves(name):
    """A key that sorts formats first, which may have changed every number of the base."""
    return not issubclass(KINDS.get(name, Patch), Format), name


def listed(metadata, key, path):
    """The names in a field of a file, such as `beside`; None for the file of an earlier minillm."""
    return set(map(str, field(metadata, key, path, list))) if key in metadata else None


def here_names(model):
    """The names of all techniques that are attached to the model, formats among them."""
    return names_of(model) | {site.module.name for site in walk(model)
                              if isinstance(site.module, Format)}


def lies_over(model, name):
    """The names of the patches that lie beneath one called `name` and change the same thing.

    Two patches that only add to a weight may lie in either order. Those of which the file of
    `name` said so count too.
    """
    found = set()
    for site in walk(model):
        patches = list(site.layer.patches.values()) if site.layer else []
        for i, patch in enumerate(patches):
            if patch.name == name:
                found |= patch.beneath
                found |= {other.name for other in patches[:i] if other.touches == patch.touches
                          and not (other.additive and patch.additive)}
    return found


def check_above(model, name, made, path, any_base=False):
    """ValueError if the file of another patch here says that `name` lay beneath it.

    The other patch does not need it: `name` took no part then (see `minillm.use`). But where both
    are, their order counts. made: {site: new patch}.
    """
    for site in walk(model):
        for other in site.layer.patches.values() if site.layer else ():
            if not any_base and site.name in made and name in other.beneath and name != other.name:
                raise ValueError(f"{path}: {name} lay beneath {other.name} when {other.name} was "
                                 f"saved, and would now lie around it: load the file of {name} "
                                 "first, or under another name=; any_base=True loads it all the "
                                 "same")


def check_beside(model, name, metadata, path, own, made, any_base=False):
    """ValueError if the file would change what other techniques rely on or have trained.

    The others are those attached to the model now that were not when the file was written.
    own: learned parameters of the file; made: {site: new Patch or Format}.
    """
    others = (names_of(model) | {one.brought for *_, one in said(model) if one.brought}) - {name}
    before = listed(metadata, "beside", path)
    if any_base or before is None or not others - before:
        return
    others -= before
    here = {slot: p for slot, p, _ in said(model) if p is not None}
    here |= {f"{site.name}.weight": site.module.weight
             for site in walk(model) if isinstance(site.module, Format)}
    changed = [slot for slot, t in own.items()
               if not torch.equal(t.to(here[slot]), here[slot])]
    for site in walk(model):
        new = made.get(site.name)
        if isinstance(new, Format) and not within_rounding(new, site):
            changed.append(f"{site.name}.weight")
    if changed:
        raise ValueError(f"{path} was made without {', '.join(sorted(others))}, which this model "
                         f"has, and would change {changed[0]!r} beneath ({len(changed)} such): "
                         "load the file first, or alone; any_base=True loads it all the same")


@torch.no_grad()
def within_rounding(form, site):
    """Whether the Format's rounding explains its distance from what the site holds now."""
    W, now = form.dense().float(), site.stored()[0].float()
    eps = torch.finfo(form.dtype).eps
    return bool(((W - now).abs() <= form.rounding() * 1.001 + 4 * eps * now.abs()).all())
