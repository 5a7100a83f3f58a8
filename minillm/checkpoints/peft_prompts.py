"""The prompts in peft's files: soft prompts, P-tuning and prefixes; `peft` has the other adapters.

    kind       peft's type      prompt_embeddings
    prompts    PROMPT_TUNING    P (length, width)
    ptuning    P_TUNING         P, computed; it is read as a soft prompt, because the file has no
                                network
    prefix     PREFIX_TUNING    (length, layers * 2 * g * d), for g key/value heads of d: for each
                                layer its keys and its values

peft stores keys as the cache has them, after the rotation of their positions 0 .. length - 1. A
prefix here is before it. So keys are rotated on the way out, and turned back on the way in:

    turn(x) = m R x        R the rotation of RoPE, m the attention factor of yarn, else 1
    back(x) = R^T x / m

This is known for the models in ROTATED. A model that normalises its keys (Qwen3) has no place for
the keys of such a file, because the norm comes after them here.
"""

import torch

from minillm.checkpoints.peft_settings import common_settings
from minillm.model.rope import rope_table, rotate
from minillm.model.transformer import Transformer
from minillm.prompts import attended, placeholders
from minillm.registry import roles, walk
from minillm.registry.sites import bare

TYPES = {"prompts": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
ROTATED = ("llama", "mistral", "qwen2")  # transformers' models whose heads are rotated by halves


def written(model, found):
    """(prompt_embeddings, settings) of the [(site, patch)] of one adapter."""
    patch = found[0][1]
    config = getattr(bare(model), "config", None)
    heads = getattr(config, "heads", None) or config.num_attention_heads
    blocks = getattr(config, "layers", None) or config.num_hidden_layers
    settings = dict(common_settings(model), peft_type=TYPES[patch.kind],
                    num_virtual_tokens=patch.length, num_transformer_submodules=1,
                    num_layers=blocks, num_attention_heads=heads)
    if patch.kind == "prefix":
        P, g, d = prefixes(model, found)
        return P, dict(settings, token_dim=g * d, num_attention_heads=g, prefix_projection=False,
                       encoder_hidden_size=patch.hidden)
    P = patch.vectors()
    settings["token_dim"] = P.shape[1]
    if patch.kind == "prompts":
        return P, dict(settings, prompt_tuning_init="RANDOM")
    return P, dict(settings, encoder_reparameterization_type="MLP",
                   encoder_hidden_size=patch.hidden)


@torch.no_grad()
def prefixes(model, found):
    """(peft's prompt_embeddings, g, d) of a prefix."""
    patches = {site.name: patch for site, patch in found}
    network = next(patch for patch in patches.values() if patch.lookup)
    d, pieces = head_size(model), []
    inner = network.inner()
    for block in places(model):
        if stray := [site.name for site in block if site.name not in patches]:
            raise ValueError(f"peft has a prefix for all layers, and {stray[0]!r} has none here")
        vectors = [patches.pop(site.name).vectors(inner) for site in block]
        K, V = vectors if len(vectors) == 2 else vectors[0].chunk(2, -1)  # (p, g*d) each
        pieces += [rotated(model, K, d), V]
    if stray := [name for name, patch in patches.items() if not patch.lookup]:
        raise ValueError(f"{stray[0]!r} computes no keys or values, and peft has no prefix there")
    return torch.cat(pieces, 1), pieces[0].shape[1] // d, d


@torch.no_grad()
def opened(model, config, tensors, directory):
    """({site: {our key: tensor}}, {site: options}) of a file of one of TYPES."""
    P = tensors.pop("prompt_embeddings", None)
    if P is None or P.dim() != 2 or tensors:
        raise ValueError(f"{directory} should hold prompt_embeddings (length, width) "
                         f"and nothing else; it holds {sorted(tensors)[:1] or 'another shape'}")
    if config.get("num_transformer_submodules", 1) not in (1, None):
        raise ValueError(f"{directory}: a prompt for an encoder and a decoder has no "
                         "place in this model")
    placeholders.check_room(model, len(P))
    default = placeholders.first_embedding(model)
    (embedding,) = [site for site in walk(model) if default(site)]
    if config["peft_type"] != "PREFIX_TUNING":
        return {embedding.name: {"P": P}}, {embedding.name: dict(length=len(P))}
    d, blocks = head_size(model), places(model)
    widths = [sum(site.shape[0] - attended.queries(site) for site in block) for block in blocks]
    if P.shape[1] != sum(widths):
        raise ValueError(f"{directory} has {P.shape[1]} numbers for each token of a prefix, and "
                         f"the keys and values of this model are {sum(widths)} in "
                         f"{len(blocks)} layers: it was made for another model")
    parts, chosen = {embedding.name: {}}, {embedding.name: dict(length=len(P))}
    for block, KV in zip(blocks, P.split(widths, 1)):
        K, V = KV.chunk(2, 1)  # (p, g*d) each
        K = rotated(model, K, d, back=True)
        for site, part in zip(block, (K, V) if len(block) == 2 else (torch.cat([K, V], 1),)):
            parts[site.name] = {"P": part.contiguous()}
            chosen[site.name] = dict(length=len(P), queries=attended.queries(site))
    return parts, chosen


def places(model):
    """For each layer the Sites [keys, values], or the one that computes both."""
    names = {site.name for site in attended.keys_values(model)}
    found = []
    for block in roles.parts(model).blocks:
        sites = {site.name.rpartition(".")[2]: site for site in block.keys_values
                 if site.name in names}
        both = [sites[key] for key in ("k_proj", "v_proj", "c_attn") if key in sites]
        if len(both) != len(sites) or len(both) > 2:
            raise ValueError(f"{block.site.name!r} has keys and values in {', '.join(sites)}, and "
                             "which is which is not known here")
        found.append(both)
    return found


def head_size(model):
    config = bare(model).config
    size = getattr(config, "head_size", None) or getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def rotated(model, K, d, back=False):
    """The keys K (p, g*d) after the rotation of positions 0 .. p - 1, or turned back from it."""
    table = angles(model, len(K), d)
    if table is None:
        return K
    cos, sin = (t.to(K.device, torch.float64).view(len(K), d) for t in table)
    x = K.double().unflatten(1, (-1, d)).transpose(0, 1)  # (p, g*d) -> (g, p, d)
    if back:
        size = cos.square() + sin.square()  # m squared
        x = rotate(x, cos / size, -sin / size)
    else:
        x = rotate(x, cos, sin)
    return x.transpose(0, 1).flatten(1).to(K.dtype)  # (g, p, d) -> (p, g*d)


def angles(model, p, d):
    """(cos, sin), each (1, 1, p, d) or (1, p, d); None for a model without RoPE."""
    model = bare(model)
    config, sites = model.config, {site.name.rpartition(".")[2]: site for site in walk(model)}
    if "k_norm" in sites:
        raise ValueError("this model normalises its keys, and peft's files have the keys of a "
                         "prefix after that: they have no place here")
    positions = torch.arange(p)[None]
    if isinstance(model, Transformer):
        if not config.rope_base:
            return None
        return rope_table(positions, d, config.rope_base, config.rope_scaling)
    kind = getattr(config, "model_type", None)
    if kind == "gpt2":
        return None
    if kind not in ROTATED or "rotary_emb" not in sites:
        raise ValueError("peft's files have the keys of a prefix after the rotation of their "
                         f"positions, and how {type(model).__name__} rotates is not known here "
                         f"(known: gpt2, {', '.join(ROTATED)})")
    rotary = sites["rotary_emb"].module
    device = rotary.inv_freq.device
    return rotary(torch.zeros(1, device=device), positions.to(device))
