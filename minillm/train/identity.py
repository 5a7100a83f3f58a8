"""What a checkpoint needs but does not hold: the frozen model, the techniques, the data.

A resumed training is the same training only if all of these are the same. So a checkpoint
describes them, and `differs` names the first thing that has changed, with both values.
"""

import dataclasses
import hashlib
import json
import re

import torch

from minillm import data, distributed
from minillm.registry import fingerprint
from minillm.registry import Format, walk
from minillm.registry.learning import buffers


def of(model, on_step=None):
    """A dict for JSON: the parts of the model that neither learn nor are changed by `on_step`.

    The checkpoint itself holds all other parts.
    """
    config = getattr(model, "config", None)
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else None
    return dict(
        model=type(model).__name__,
        dtypes=sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        config=json.loads(json.dumps(config, default=str)),  # a torch.dtype becomes its name
        modules=dict(modules(model)),
        techniques=[list(entry) for entry in techniques(model, on_step)],
        base=fingerprint.of(model))


def digest_of(model):
    """Eight hex digits that depend on everything a model computes with, whether it learns or not.

    Of its own weights they depend on samples, of its buffers and techniques on every value.
    """
    base = fingerprint.of(model, without=())
    patches = [(site.name, name, patch.config(), patch.active, digest(patch.state_dict()))
               for site in walk(model) if site.layer for name, patch in site.layer.patches.items()]
    formats = [(site.name, site.module.config(), digest(dict(site.module.named_buffers())))
               for site in walk(model) if isinstance(site.module, Format)]
    whole = [base["config"], base["samples"], dict(modules(model)), patches, formats,
             digest(dict(buffers(model)))]
    return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()[:8]


def modules(model):
    """Yield (name, class with the settings that it shows) of each of the model's own modules.

    The text leaves out what differs between processes or devices: an address, a device, the
    class that FSDP makes.
    """
    for site in walk(model):
        cls = next(c for c in type(site.module).__mro__ if not c.__name__.startswith("FSDP"))
        shown = re.sub(r"( at 0x[0-9a-fA-F]+)|(,? ?device=[^,)]*)", "", site.module.extra_repr())
        yield site.name, f"{cls.__name__}({shown})"


def techniques(model, on_step=None):
    """Yield (site, technique, its options, a digest of its tensors that are not trained).

    An `on_step` may change the buffers of patches, and the options that it names in `changes`:
    these are left out.
    """
    changes, shared = getattr(on_step, "changes", ()), {}
    for site in walk(model):
        if isinstance(site.module, Format):
            held = dict(site.module.named_buffers())
            yield site.name, site.module.kind, site.module.config(), digest(held)
        for name, patch in site.layer.patches.items() if site.layer else ():
            held = {key: p for key, p in patch.named_parameters() if not p.requires_grad}
            held |= own_buffers(patch) if on_step is None else {}
            options = {key: value for key, value in patch.config().items() if key not in changes}
            options |= {"shares": shared_digest(patch, shared)} if patch.shares else {}
            options |= {} if patch.active else {"active": False}
            yield site.name, name, options, digest(held)


def own_buffers(patch):
    """{name: buffer} of a patch, without those that it shares with others."""
    return {key: b for key, b in patch.named_buffers() if not key.startswith("common.")}


def shared_digest(patch, known):
    """The digest of what the patch shares with others. known: {id: digest}, added to."""
    if id(patch.common) not in known:
        known[id(patch.common)] = digest(dict(patch.common.named_buffers()))
    return known[id(patch.common)]


def digest(tensors):
    """Eight hex digits that depend on the names, dtypes, shapes and values of tensors."""
    sha = hashlib.sha256()
    for key, t in sorted(tensors.items()):
        t = distributed.whole(t.detach()).cpu().contiguous()
        sha.update(f"{key} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:8]


def examples(rows):
    """A text for a list of `data.Example`: how many there are, and a digest of them all."""
    return f"{len(rows)} examples ({data.fingerprint(rows)[:8]})"


def differs(model, then, on_step=None):
    """The first difference between the model and its description `then`, with both values; or None.

    TypeError, KeyError or ValueError if `then` is not a description.
    """
    now = json.loads(json.dumps(of(model, on_step)))
    for key in ("model", "dtypes", "config"):
        if now[key] != then[key]:
            return "the model has " + pairs({key: then[key]}, {key: now[key]})
    ours, theirs = now["techniques"], then["techniques"]
    if [entry[:2] for entry in ours] != [entry[:2] for entry in theirs]:
        return f"the techniques were {listed(theirs)} then, they are {listed(ours)} now"
    parts = then.get("modules", now["modules"])  # a checkpoint of an earlier minillm lacks them
    for name in dict.fromkeys([*now["modules"], *parts]):
        old, new = parts.get(name, "missing"), now["modules"].get(name, "missing")
        if old != new:
            return f"the module {name!r} was {old} then, it is {new} now"
    odd = [(a, b) for a, b in zip(theirs, ours) if a != b]
    if odd:
        (site, name, old, _), (_, _, new, _) = odd[0]
        what = pairs(old, new) if old != new else f"tensors={odd[0][0][3]} then, {odd[0][1][3]} now"
        return f"{name} at {site!r} has {what} ({len(odd)} of {len(ours)} such differ)"
    return fingerprint.differs(model, then["base"])


def pairs(old, new):
    """The entries that differ, each with both values."""
    if any(isinstance(value, dict) for value in (*old.values(), *new.values())):
        (old,), (new,) = old.values(), new.values()  # a configuration: its own entries
        old, new = old or {}, new or {}
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return ", ".join(f"{key}={old.get(key)!r} then, {new.get(key)!r} now" for key in keys)


def listed(entries):
    """Each technique with its number of sites, as text."""
    names = [name for _, name, *_ in entries]
    counts = [f"{name} at {names.count(name)} sites" for name in dict.fromkeys(names)]
    return ", ".join(counts) or "none"
