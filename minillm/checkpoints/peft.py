"""peft's adapter files, both ways: a directory with the settings and the tensors of one adapter.

    minillm.checkpoints.peft.save(model, "sql")    peft.PeftModel.from_pretrained(base, "sql")
    minillm.checkpoints.peft.load(model, "sql")    peft.PeftModel.save_pretrained wrote it

    kind           peft's type      the tensors of a module, after its name
    lora           LORA             lora_A.weight (r, in), lora_B.weight (out, r); of an embedding
                                    lora_embedding_A, lora_embedding_B
      with a start (PiSSA)          its change since birth: A' = [A; A0], B' = [B, -B0], rank 2r
    dora           LORA, use_dora   also lora_magnitude_vector (out,)
    adalora        ADALORA          lora_A (r, in), lora_B (out, r), lora_E (r, 1): Q, P, Λ; of the
                                    ranks that were kept alone
    vera           VERA             vera_lambda_d (r,), vera_lambda_b (out,); and once
                                    base_model.vera_A, base_model.vera_B
    loha           LOHA             hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b: B1, A1, B2, A2
    lokr           LOKR             lokr_w1 or lokr_w1_a, lokr_w1_b; the same with w2
    ia3            IA3              ia3_l (out, 1), at the input (1, in)
    prompts, ptuning, prefix        prompt_embeddings, without a module: see `peft_prompts`
    norms          LN_TUNING        ln_tuning_layers.weight, ln_tuning_layers.bias (d,)

The name of a tensor is base_model.model. + its module + the above. Modules have the names of the
Hugging Face model, also where the model is minillm's Transformer. (GPT-2 has one leaf for q, k and
v there and three here, so an adapter of these has no place in the other.)

Loading is strict. Each tensor has to find its place, each target of the settings has to be in the
file, and a setting that changes what is computed and that minillm lacks is an error. peft warns of
some of these and ignores others. Saving refuses what peft's files cannot say: that an adapter was
trained over another one. What the model's own parameters learned goes as `modules_to_save`, by
whole modules.
"""

import collections
import json
import pathlib
import re

import torch
from safetensors.torch import save_file

from minillm import files
from minillm.checkpoints import peft_adalora, peft_norms, peft_prompts, peft_settings
from minillm.checkpoints.peft_settings import (
    CONFIG, holds, module_names, placed, settings, turned,
)
from minillm.registry import KINDS, attached, hint, walk
from minillm.registry.attach import check_free, surround
from minillm.registry.learned import check_learned, let_learn, put_back
from minillm.registry.names import check_name
from minillm.registry.opening import read, remake, share
from minillm.registry.sites import check_whole, parameters
from minillm.registry.store import learned_of, over

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}
EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
SUFFIXES = {"lora": LORA, "dora": LORA | {"m": "lora_magnitude_vector"},
            "adalora": {"Q": "lora_A", "P": "lora_B", "E": "lora_E"},
            "vera": {"d": "vera_lambda_d", "b": "vera_lambda_b"},
            "loha": {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
            "lokr": {"C": "lokr_w1", "B1": "lokr_w1_a", "A1": "lokr_w1_b",
                     "D": "lokr_w2", "B2": "lokr_w2_a", "A2": "lokr_w2_b"},
            "ia3": {"factor": "ia3_l"}, "norms": peft_norms.SUFFIXES}
HELD = (*SUFFIXES, *peft_prompts.TYPES)  # the kinds that peft has a file for

# --- saving -----------------------------------------------------------------------------------


def save(model, directory, name=None, *, force=False):
    """Write one adapter to a directory that peft loads; creates the directory.

    name: which adapter, if the model has several. An adapter of this directory that minillm wrote
    is replaced. FileExistsError for other files there, unless `force`, and always for an adapter
    that minillm did not write. ValueError for a kind that peft lacks, for an adapter that was
    trained over another one, and for leaves without a place in the Hugging Face model.
    """
    check_whole(model, "save")
    found = chosen(model, name)
    (name, kind), = {(patch.name, patch.kind) for _, patch in found}
    if beneath := sorted(over(name, model)):
        raise ValueError(f"{name} was trained over {beneath[0]}, which no file of peft says: merge "
                         f"{beneath[0]} into the model and save that, or train {name} without it")
    places = module_names(model)
    tensors = {}
    if kind in peft_prompts.TYPES:
        tensors["prompt_embeddings"], config = peft_prompts.written(model, found)
    else:
        for site, patch in found:
            for key, t in tensors_of(site, patch).items():
                tensors[f"{PREFIX}{placed(site, places)}.{key}"] = t
        for key in found[0][1].shares:
            tensors[f"base_model.vera_{key}"] = getattr(found[0][1].common, key)
        config = settings(model, found, places)
    learned = {} if kind == "norms" else learned_of(name, model)
    saved, config["modules_to_save"] = whole_modules(model, learned, places)
    tensors |= saved
    directory = pathlib.Path(directory)
    own = ours(directory)
    files.check_writable(directory, directory=True, force=force, own=own,
                         needs=re.escape(CONFIG) + "|" + re.escape(TENSORS))
    with files.atomic(directory, own) as new:
        new.mkdir()
        every = {key: t.detach().contiguous().clone() for key, t in tensors.items()}
        save_file(every, new / TENSORS, {"format": "pt", "written_by": "minillm"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def chosen(model, name):
    """[(site, patch)] of one adapter."""
    every = [(site, patch) for site in walk(model) if site.layer
             for patch in site.layer.patches.values() if name in (None, patch.name)]
    every += peft_norms.norms(model) if name in (None, "norms") else []
    fits = [(site, patch) for site, patch in every if patch.kind in HELD]
    names = sorted({patch.name for _, patch in fits})
    if len(names) > 1:
        raise ValueError(f"the model has the adapters {', '.join(names)}, and a directory holds "
                         f"one: save(model, directory, name={names[0]!r})")
    if not fits:
        known = ", ".join(HELD)
        raise ValueError(f"there is no adapter{f' called {name!r}' * (name is not None)} here that "
                         f"peft has a file for ({known}); attached: {attached(model)}")
    return fits


def tensors_of(site, patch):
    """{peft's key: tensor} of a patch."""
    if patch.kind in ("loha", "lokr") and (site.leaf.lookup or site.leaf.transposed):
        raise ValueError(f"{site.name!r} is no nn.Linear, and peft has {patch.kind} for that alone")
    if patch.kind == "adalora":
        return peft_adalora.tensors(patch)
    if patch.kind == "ia3":
        return {"ia3_l": patch.factor[None, :] if patch.inner else patch.factor[:, None]}
    if patch.start:  # s (B A - B0 A0)
        pair = {"A": torch.cat([patch.A, patch.A0]), "B": torch.cat([patch.B, -patch.B0], 1)}
    else:
        pair = {key: getattr(patch, key) for key in SUFFIXES[patch.kind] if hasattr(patch, key)}
    suffixes = EMBEDDING if site.leaf and site.leaf.lookup else SUFFIXES[patch.kind]
    return {suffixes[key]: t for key, t in pair.items()}


def whole_modules(model, learned, places):
    """({peft's key: tensor}, names) of the modules of which a parameter learned."""
    owners = {name.rpartition(".")[0] for name in learned}
    sites = {site.name: site for site in walk(model)}
    for owner in owners:
        if owner not in places or turned(model, sites[owner]):
            raise ValueError(f"{owner or 'a parameter of the model itself'!r} has learned, and is "
                             "no module of its own, or of another shape, in the Hugging Face model")
    tensors = {f"{PREFIX}{places[owner]}.{key}": p for name, _, key, p in parameters(model)
               if (owner := name.rpartition(".")[0]) in owners}
    return tensors, sorted(places[owner] for owner in owners) or None


def ours(directory):
    """The names in the directory that minillm wrote and may replace."""
    try:
        return [CONFIG, TENSORS] if read(directory / TENSORS)[1].get("written_by") else []
    except (OSError, ValueError):
        return []


# --- loading ----------------------------------------------------------------------------------


def load(model, directory, name=None):
    """Attach the adapter of a directory that peft or `save` wrote; in place, returns the model.

    name: its name in this model, by default its kind. ValueError, before the model changes, for a
    file that does not fit it as a whole (see the top of this page). Nothing is unpickled.
    """
    check_whole(model, "load")
    directory = pathlib.Path(directory)
    config, tensors = opened(directory)
    kind, known, common, own = holds(directory), {}, {}, {}
    if kind in peft_prompts.TYPES:
        parts, known = peft_prompts.opened(model, config, tensors, directory / TENSORS)
    else:
        parts, common, own = sorted_out(model, kind, config, tensors, directory)
    if kind == "norms":
        own |= {f"{where}.{key}": t for where, part in parts.items() for key, t in part.items()}
        return peft_norms.put_in(model, name, own, directory)
    cls, sites = KINDS[kind], {site.name: site for site in walk(model)}
    name = check_name(name, kind, model)
    places, made = module_names(model), {}
    for where, part in parts.items():
        check_free(sites[where], name, kind)
        if kind == "adalora":
            part = peft_adalora.whole(part, config, places[where], directory)
        chosen = known.get(where) or options(kind, config, places.get(where))
        made[where] = remake(cls, sites[where], chosen, part, f"{directory}, {where!r}")
    share(cls, made, sites, common, directory)
    check_learned(model, own, {}, {}, directory)
    put_back(model, own, {}, {}, name)
    surround(model, name, [(sites[where], patch) for where, patch in made.items()], ())
    let_learn(model, own)
    return model


def opened(directory):
    """(settings, tensors) of a directory."""
    if (directory / "adapter_model.bin").exists() and not (directory / TENSORS).exists():
        raise ValueError(f"{directory} has its tensors in adapter_model.bin, a pickle, which can "
                         "run any code and is not opened: save it as safetensors with peft")
    config = files.read_json(directory / CONFIG)
    return config, read(directory / TENSORS)[0]


def sorted_out(model, kind, config, tensors, directory):
    """({site: {our key: tensor}}, what is shared, {parameter: tensor}); each tensor has a place."""
    path, cls = directory / TENSORS, KINDS[kind]
    sites = {theirs: site for site in walk(model)
             if (theirs := module_names(model).get(site.name)) is not None}
    leaves = {theirs: site for theirs, site in sites.items() if cls.accepts(site)}
    parts, common, own = collections.defaultdict(dict), {}, {}
    for key, t in tensors.items():
        if kind == "vera" and key.startswith("base_model.vera_"):
            common[key.removeprefix("base_model.vera_")] = t
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: {key!r} does not begin with {PREFIX!r}, so peft would not "
                             "find it either")
        key = key.removeprefix(PREFIX)
        module, ours = split(key, kind)
        if ours is None:
            own_or_base(model, key, t, sites, own, config, path)
        elif module not in leaves:
            lookup = EMBEDDING["A"] in key or EMBEDDING["B"] in key
            possible = [site for site in leaves.values()
                        if lookup == bool(site.leaf and site.leaf.lookup)]
            raise ValueError(f"{path} has {kind} for {module!r}, which this model lacks; "
                             f"{hint(module, possible)}")
        else:
            parts[leaves[module].name][ours] = t.flatten() if kind == "ia3" else t
    if not parts:
        raise ValueError(f"{path} holds no tensor of {kind}")
    names = peft_settings.named(config, leaves, directory / CONFIG)
    missing = sorted(names - {module_names(model)[where] for where in parts})
    if missing:
        raise ValueError(f"{path} has no tensors for {missing[0]!r} ({len(missing)} such), which "
                         "target_modules names: it was made for another model")
    return dict(parts), common, own


def split(key, kind):
    """(module, our key) of a name in the file; (None, None) if it is none of the kind's."""
    for suffixes in (SUFFIXES[kind], EMBEDDING if kind == "lora" else {}):
        for ours, suffix in suffixes.items():
            if key.endswith(f".{suffix}"):
                return key.removesuffix(f".{suffix}"), ours
    return None, None


def own_or_base(model, key, t, sites, own, config, path):
    """Enter a tensor of `modules_to_save` in `own`, or check that it is this model's embedding."""
    module, _, last = key.rpartition(".")
    base = module.removesuffix(".base_layer")
    if module != base and base in sites:
        stored = sites[base].module.weight
        if stored.shape == t.shape and torch.equal(stored, t.to(stored)):
            return
        raise ValueError(f"{path} holds another embedding than this model, {key!r}: it was made "
                         "for another model")
    if module not in sites or not peft_settings.matches(module, config.get("modules_to_save")):
        raise ValueError(f"{path} holds {key!r}, which is no part of the adapter and of no module "
                         "in modules_to_save that this model has")
    if turned(model, sites[module]):
        raise ValueError(f"{path} holds {key!r}, a matrix that is transposed in this model: load "
                         "it into the Hugging Face model")
    own[f"{sites[module].name}.{last}"] = t


def options(kind, config, module):
    """Our options of one patch."""
    if kind == "adalora":
        return peft_adalora.options(config)
    if kind == "vera":
        return dict(r=config.get("r", 256), dropout=config.get("vera_dropout", 0.0))
    if kind == "ia3":
        return dict(inner=peft_settings.matches(module, config.get("feedforward_modules")))
    called = "alpha" if kind in ("loha", "lokr") else "lora_alpha"
    r, alpha = (peft_settings.of_pattern(config.get(f"{one}_pattern"), module, config.get(key, 8))
                for one, key in (("rank", "r"), ("alpha", called)))
    if kind == "loha":
        return dict(r=r, alpha=alpha)
    if kind == "lokr":
        factor = config.get("decompose_factor", -1)
        return dict(r=r, alpha=alpha, factor=None if factor == -1 else factor,
                    decompose_both=config.get("decompose_both", False))
    return dict(r=r, alpha=alpha, rank_stabilized=bool(config.get("use_rslora")),
                dropout=config.get("lora_dropout", 0.0))
