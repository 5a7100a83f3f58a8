"""The parts of any model by their role: its blocks, and the parts of each block.

    embedding                       ids -> vectors
    blocks                          the layers that the vectors pass one after another
        attention, mlp, norms       the parts of each
    norms                           of the whole model; those of the blocks are among them
    head                            vectors -> logits

It knows minillm's Transformer, Hugging Face's GPT-2, Llama, Qwen2, Mistral, Mixtral, GPT-NeoX,
GPT-Neo and OPT, and most models that are built like them. It returns Sites, under their author's
names. Freezing, adapters and calibration all use it.

- The blocks are the members of a ModuleList. A list within a block (the experts of a mixture) does
  not count, nor does a list called `experts`. A list of bare leaves counts if there is no other.
- Two lists of blocks (the encoder and the decoder of T5) are an error that names both.
- The attention and the MLP are the modules with one of the usual names, nearest to the block:
  GPT-Neo's `attn.attention` is a part of its attention `attn`.
- OPT has no MLP module: its two matrices lie in the block itself. `loose` lists such leaves.
- The keys and values come from the leaves of the attention with one of the usual names. GPT-2's
  `c_attn` computes the queries too.
- The last leaf of the MLP takes the inner activations, which the leaves before it compute. A
  mixture of experts has several, or none.
- The queries and the output are the first and the last leaf of the attention, if it has four.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2))
>>> [block.site.name for block in parts(model).blocks]
['layers.0', 'layers.1']
>>> block = parts(model).blocks[1]
>>> block.attention.name, block.mlp.name, len(block.norms)
('layers.1.self_attn', 'layers.1.mlp', 2)
>>> [leaf.name for leaf in block.keys_values], block.last.name
(['layers.1.self_attn.k_proj', 'layers.1.self_attn.v_proj'], 'layers.1.mlp.down_proj')
>>> parts(model).embedding.name, parts(model).head.name
('embed_tokens', 'lm_head')
"""

import dataclasses
import re

from torch import nn

from minillm.registry.sites import Site, bare, walk

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v",
               "c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")  # with the queries
EXPERTS = re.compile(r"(^|[._])experts?$")
NORM = re.compile("Norm(1d|2d|3d)?$|Norm[A-Z]")  # the class names of norms: LlamaRMSNorm


@dataclasses.dataclass
class Block:
    site: Site | None  # None: the whole model
    attention: Site | None
    mlp: Site | None
    norms: list
    loose: list  # the linear leaves that lie in neither attention nor mlp
    keys_values: list  # the leaves of the attention that compute the keys and the values
    last: Site | None  # the last leaf of the MLP, also where its leaves lie in the block itself
    inner: list  # the leaves that compute the input of `last`
    queries: Site | None  # the leaf of the attention that computes the queries alone
    output: Site | None  # the leaf after the attention's heads


@dataclasses.dataclass
class Parts:
    embedding: Site | None
    blocks: list
    norms: list
    head: Site | None


def parts(model):
    """The Parts of a model. ValueError if it is not clear which modules are the blocks."""
    sites = walk(model)
    inside = block_sites(model, sites)
    return Parts(embedding=embedding(model),
                 blocks=[block_of(site, sites) for site in inside],
                 norms=[site for site in sites if is_norm(site)],
                 head=asked(model, "get_output_embeddings", sites) or last_leaf(sites, inside))


def embedding(model):
    """The Site of the token embedding, also of a model without blocks; or None."""
    sites = walk(model)
    return asked(model, "get_input_embeddings", sites) or first(
        site for site in sites if site.leaf and site.leaf.lookup)


def head(model):
    """The Site of the output head; of a model without blocks, its last linear leaf; or None."""
    sites = walk(model)
    inside = block_sites(model, sites) if block_lists(sites) else []
    leaves = [site for site in sites if site.leaf and not site.leaf.lookup]
    return (asked(model, "get_output_embeddings", sites) or last_leaf(sites, inside)
            or (None if inside else first(reversed(leaves))))


def blocks(model):
    """[Site] of the blocks, in order; ValueError if it is not clear which modules they are."""
    return block_sites(model, walk(model))


def alone(model):
    """A model without a list of blocks, as a single Block."""
    return block_of(None, walk(model))


def in_blocks(model):
    """[Block] of the model, or the whole model as one where it has no list of blocks."""
    return parts(model).blocks if lists(model) else [alone(model)]


def lists(model):
    """The Sites of the lists of blocks: one for most models, none for a plain stack of leaves."""
    return block_lists(walk(model))


def width_of_experts(model):
    """The width of the vectors between the blocks of a mixture of experts; None if it is none.

    It is that of the norms directly in the blocks. The last leaf of a mixture may be a gate.
    """
    every = parts(model).blocks if lists(model) else []
    mixed = [block for block in every
             if any(EXPERTS.search(one.name) for one in walk(block.site.module))]
    found = {norm.module.weight.shape[-1] for block in mixed for norm in block.norms
             if norm.name.count(".") == block.site.name.count(".") + 1}
    return found.pop() if len(found) == 1 else None


def block_sites(model, sites):
    found = block_lists(sites)
    kind = type(model).__name__
    if not found:
        raise ValueError(f"this {kind} has no list of blocks (an nn.ModuleList): name the modules "
                         "in targets=")
    if len(found) > 1:
        names = " and ".join(f"{site.name!r} ({len(site.module)})" for site in found)
        raise ValueError(f"this {kind} has several lists of blocks, {names}: name the modules in "
                         "targets=, or give the part of the model that has one list")
    here = {id(site.layer or site.module): site for site in sites}
    return [here[id(member)] for member in found[0].module]


def block_lists(sites):
    """The outermost ModuleLists that may hold blocks; lists of bare leaves only if all are."""
    every = [site for site in sites if isinstance(site.module, nn.ModuleList) and len(site.module)]
    every = [site for site in every if not EXPERTS.search(site.name)]
    outer = [site for site in every
             if not any(under(site, other) for other in every if other is not site)]
    holds = [site for site in outer if holds_leaves(site, sites)]
    return holds or outer


def under(site, other):
    """Whether a site lies within another, by its name."""
    return site.name.startswith(f"{other.name}.")


def holds_leaves(site, sites):
    """Whether the members of a list contain linear leaves, and are none themselves."""
    depth = site.name.count(".") + 2
    return any(one.leaf and not one.leaf.lookup and under(one, site)
               and one.name.count(".") >= depth for one in sites)


def block_of(site, sites):
    inner = [one for one in sites if site is None or under(one, site)]
    attention, mlp = outermost(inner, ATTENTION), outermost(inner, MLP)
    held = [part for part in (attention, mlp) if part]
    leaves = [one for one in inner if one.leaf and not one.leaf.lookup]
    loose = [one for one in leaves if not any(one is part or under(one, part) for part in held)]
    keys_values = [one for one in leaves if attention and under(one, attention)
                   and one.name.rsplit(".", 1)[-1] in KEYS_VALUES]
    last = last_of_mlp(inner, leaves, attention, mlp, loose)
    of_mlp = [one for one in leaves if one is mlp or mlp and under(one, mlp)] if mlp else loose
    before = [one for one in of_mlp if last and one is not last and one.shape[0] == last.shape[1]]
    heads = [one for one in leaves if attention and under(one, attention)]
    whole = len(heads) == 4 and len(keys_values) == 2
    queries = first(one for one in heads if one not in keys_values) if whole else None
    return Block(site, attention, mlp, [one for one in inner if is_norm(one)], loose, keys_values,
                 last, before, queries, heads[-1] if whole else None)


def last_of_mlp(inner, leaves, attention, mlp, loose):
    """The leaf whose input is the MLP's inner activations; None if there is none, or several."""
    if any(EXPERTS.search(one.name) for one in inner):
        return None
    if mlp:
        loose = [one for one in leaves if one is mlp or under(one, mlp)]
    return loose[-1] if loose and (mlp or attention) else None


def outermost(inner, names):
    """The site within a block whose key is one of `names`, nearest to the block; or None."""
    found = [site for site in inner if site.name.rsplit(".", 1)[-1] in names]
    return min(found, key=lambda site: site.name.count("."), default=None)


def is_norm(site):
    return bool(NORM.search(type(site.module).__name__)) and not site.leaf


def asked(model, method, sites):
    """The site of the module that the model's method returns (Hugging Face's have it); or None."""
    try:
        module = getattr(bare(model), method, lambda: None)()
    except NotImplementedError:
        return None
    return first(site for site in sites
                 if module is not None and module in (site.module, site.layer))


def last_leaf(sites, inside):
    """The last linear leaf after the blocks, or None."""
    if not inside:
        return None
    after = sites[sites.index(inside[-1]):]
    behind = [site for site in after if site.leaf and not site.leaf.lookup and site not in inside
              and not any(under(site, block) for block in inside)]
    return behind[-1] if behind else None


def first(found):
    return next(iter(found), None)
