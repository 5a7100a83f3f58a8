"""The names and the settings in peft's adapter_config.json; `peft` has the files."""

import collections
import logging
import pathlib
import re

import torch

from minillm import files
from minillm.checkpoints import layouts, peft_adalora, peft_norms
from minillm.model.transformer import Transformer
from minillm.registry import walk
from minillm.registry.sites import bare

CONFIG = "adapter_config.json"
log = logging.getLogger("minillm")

# the settings that do not change what a loaded adapter computes, and those that `peft` reads
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "init_weights", "runtime_config", "qalora_group_size",
    "vera_dropout", "projection_prng_key", "save_projection", "d_initial", "num_virtual_tokens",
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "ensure_weight_tying", "bias", "init_lora_weights", "alpha", "decompose_both",
    "decompose_factor", "feedforward_modules", "init_ia3_weights", "rank_dropout",
    "module_dropout", "rank_dropout_scale", "prefix_projection", "encoder_hidden_size",
    "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout", "init_r",
    "target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
}
TYPES = ("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "IA3", "PROMPT_TUNING", "P_TUNING",
         "PREFIX_TUNING", "LN_TUNING")
TRAINING = ("rank_dropout", "module_dropout")  # what only training does
STARTS = re.compile("pissa.*|olora|corda|eva|loftq|lora_ga", re.IGNORECASE)  # these change the base


# --- the names of modules ---------------------------------------------------------------------


def module_names(model):
    """{site's name: the module's name in the Hugging Face model}."""
    model = bare(model)
    names = [site.name for site in walk(model)]
    if not isinstance(model, Transformer):
        return {name: name for name in names}
    found = {}
    for name in names:
        if not gpt2(model):
            found[name] = name if name == "lm_head" else f"model.{name}"
        elif not re.search(r"\.[qkv]_proj$", name):
            theirs = layouts.gpt2_name(f"{name}.").removesuffix(".")
            found[name] = theirs if name == "lm_head" else f"transformer.{theirs}"
    return found


def gpt2(model):
    """Whether it is minillm's Transformer of the GPT-2 family."""
    config = getattr(bare(model), "config", None)
    return (isinstance(bare(model), Transformer)
            and layouts.describe(config, torch.float32)["model_type"] == "gpt2")


def turned(model, site):
    """Whether the leaf is an nn.Linear of minillm where Hugging Face's GPT-2 has a Conv1D."""
    return bool(gpt2(model) and site.leaf and not site.leaf.lookup and site.name != "lm_head")


def placed(site, places):
    if site.name not in places:
        raise ValueError(f"{site.name!r} is a part of c_attn in the Hugging Face model, where q, k "
                         "and v are one leaf, so peft has no place for its adapter")
    return places[site.name]


# --- writing ----------------------------------------------------------------------------------


def settings(model, found, places):
    """The adapter_config.json of patches around leaves."""
    kind, first = found[0][1].kind, found[0][1]
    if kind == "norms":
        peft_norms.check(found)
        return dict(common_settings(model), peft_type="LN_TUNING",
                    target_modules=targets(model, found, places))
    conv = {site.leaf.transposed or turned(model, site) for site, _ in found
            if not site.leaf.lookup}
    config = dict(common_settings(model), peft_type="LORA" if kind == "dora" else kind.upper(),
                  target_modules=targets(model, found, places), fan_in_fan_out=conv == {True})
    if kind == "ia3":
        inner = [(site, patch) for site, patch in found if patch.inner]
        return dict(config, feedforward_modules=targets(model, inner, places))
    if kind == "adalora":
        return peft_adalora.settings(config, found, places)
    if kind == "vera":
        return dict(config, vera_dropout=first.dropout, save_projection=True, d_initial=0.1,
                    projection_prng_key=0, r=first.r, bias="none")
    # with a start the rank in the file is 2r, and peft divides by that
    ranks = {places[site.name]: patch.r * (1 + patch.start) for site, patch in found}
    alphas = {places[site.name]: patch.scale * factor(ranks[places[site.name]], patch)
              for site, patch in found}
    r, alpha = (collections.Counter(known.values()).most_common(1)[0][0]
                for known in (ranks, alphas))
    config |= dict(r=r, rank_pattern={re.escape(k): v for k, v in ranks.items() if v != r},
                   alpha_pattern={re.escape(k): v for k, v in alphas.items() if v != alpha})
    if kind in ("loha", "lokr"):
        del config["fan_in_fan_out"]  # peft has these for nn.Linear alone
        if kind == "lokr":
            config |= dict(decompose_both=first.decompose_both,
                           decompose_factor=first.factor or -1)
        return dict(config, alpha=alpha)
    return dict(config, lora_alpha=alpha, lora_dropout=first.dropout, bias="none",
                use_rslora=first.rank_stabilized, use_dora=kind == "dora")


def factor(r, patch):
    """What alpha is divided by."""
    return r**0.5 if getattr(patch, "rank_stabilized", False) else r


def common_settings(model):
    config = getattr(bare(model), "config", None)
    base = getattr(bare(model), "source", "") or getattr(config, "_name_or_path", "") or None
    return dict(base_model_name_or_path=base, inference_mode=True, task_type="CAUSAL_LM")


def targets(model, found, places):
    """The endings of the modules' names where they name no other one; else the whole names."""
    here = {places[site.name] for site, _ in found}
    endings = {name.rpartition(".")[2] for name in here}
    leaves = {places[site.name] for site in walk(model)
              if site.name in places and (site.leaf or found and found[0][1].kind == "norms")}
    also = {name for name in leaves if name.rpartition(".")[2] in endings}
    return sorted(endings if also == here and not any(e.isdigit() for e in endings) else here)


# --- reading ----------------------------------------------------------------------------------


def holds(directory):
    """The kind of the adapter in a directory of peft's; ValueError for one that minillm lacks."""
    directory = pathlib.Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is no adapter of peft's")
    config = files.read_json(directory / CONFIG)
    check(config, directory / CONFIG)
    theirs = config["peft_type"]
    kinds = dict(LORA="dora" if config.get("use_dora") else "lora", LN_TUNING="norms",
                 PROMPT_TUNING="prompts", P_TUNING="prompts", PREFIX_TUNING="prefix")
    return kinds.get(theirs, theirs.lower())


def check(config, path):
    """ValueError for a setting that changes what is computed and that minillm lacks."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind not in TYPES:
        raise ValueError(f"{path}: peft_type is {kind!r}; minillm reads {', '.join(TYPES)}")
    if isinstance(start, str) and STARTS.fullmatch(start):
        raise ValueError(f"{path}: init_lora_weights is {start!r}, so it belongs to a base from "
                         "which that start took a part: save it with peft's "
                         "path_initial_model_for_weight_conversion first")
    if dropped := [key for key in TRAINING if config.get(key)]:
        log.warning("%s: %s is %r, which training here does not do", path, dropped[0],
                    config[dropped[0]])
    odd = {key: value for key, value in config.items() if value and key not in KNOWN}
    odd |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    if odd:
        key = min(odd)
        raise ValueError(f"{path}: {key} is {odd[key]!r}, which minillm does not implement")


def named(config, names, path):
    """The names, of those of a model's leaves, that `target_modules` asks for."""
    asked, left_out = config.get("target_modules"), config.get("exclude_modules")
    found = {name for name in names if matches(name, asked)}
    if not isinstance(asked, str):
        for one in asked or ():
            if not any(matches(name, [one]) for name in names):
                raise ValueError(f"{path}: target_modules names {one!r}, which no leaf of this "
                                 "model is called")
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        found = {name for name in found if set(map(int, re.findall(r"\d+", name))) & set(layers)}
    return {name for name in found if not matches(name, left_out)}


def matches(name, asked):
    """peft's rule: a text is a regular expression for the whole name, a list has endings."""
    if isinstance(asked, str):
        return re.fullmatch(asked, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in asked or ())


def of_pattern(patterns, name, default):
    """The value of the first pattern that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
