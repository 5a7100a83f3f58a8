"""Write GGUF, llama.cpp's file, from a Transformer; `gguf.py` reads and describes the format."""

import contextlib
import re

import torch

from minillm import distributed, files
from minillm.checkpoints.gguf import FACTORS, factors_of
from minillm.model.tokenizer import Tokenizer

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's numbers for the whole file


def check_save(config, tokenizer, type="f32"):
    """ValueError if llama.cpp has no place for the model, the tokenizer or the type.

    The model must be of the Llama family with silu, the tokenizer byte-level BPE.
    """
    c = config
    files.need("gguf", "hub")
    if type not in TYPES:
        raise ValueError(f"type={type!r} is unknown; known: {', '.join(TYPES)}")
    if c.norm != "rms" or not c.gated or not c.rope_base or c.activation != "silu" or c.mlp_bias:
        raise ValueError("only the Llama family is written as GGUF (RMSNorm, SwiGLU with silu, "
                         "rotary positions, no biases in the MLP)")
    if c.window:
        raise ValueError("llama.cpp's Llama has no sliding window, and this model has "
                         f"window={c.window}")
    arch = architecture(c)
    if arch == "qwen3" and (c.qkv_bias or c.out_bias):
        raise ValueError("llama.cpp's Qwen3 has norms of q and k, but no biases beside them")
    if arch == "qwen3" and by_pair(c):
        raise ValueError("llama.cpp's Qwen3 has no place for the rope_scaling "
                         f"{c.rope_scaling['rope_type']!r}")
    scaling = c.rope_scaling or {}
    if scaling.get("attention_factor") is not None or not scaling.get("truncate", True):
        raise ValueError("llama.cpp computes yarn's attention_factor and rounds its bounds, and "
                         f"this model has rope_scaling={scaling!r}")
    if not isinstance(tokenizer, Tokenizer):
        kind = "none" if tokenizer is None else tokenizer.__class__.__name__
        raise ValueError(f"a GGUF carries its tokenizer, and this is {kind}: give tokenizer=")
    tokenizer.to_gguf(c.vocab_size)


def architecture(config):
    """llama.cpp's name. Its Llama may have biases; its Qwen2 needs head_size * heads = width."""
    c = config
    if c.qk_norm:
        return "qwen3"
    whole_heads = c.head_size * c.heads == c.width
    return "qwen2" if c.qkv_bias and not c.out_bias and whole_heads and not by_pair(c) else "llama"


def by_pair(config):
    """Whether each rotary pair has its own factor, which only llama.cpp's Llama reads."""
    scaling = config.rope_scaling or {}
    return scaling.get("rope_type", "linear") not in ("linear", "yarn")


def write(model, config, path, tokenizer, type):
    """Write a GGUF file that llama.cpp runs, with the tokenizer and its chat template.

    `checkpoints.save` calls it, after `check_save`. type: "f32", "f16", "bf16", or "q8_0" (8 bits
    in blocks of 32 with a 16-bit scale). Vectors, and matrices whose rows do not divide by 32, stay
    in higher precision. With several processes the first one writes. ValueError for a number that a
    16-bit float cannot hold.
    """
    import gguf

    arch = architecture(config)
    tensors = exported(model, config, arch)
    if distributed.place()[0]:
        for _ in tensors:  # sends this process's part of each to the first
            pass
        return
    with files.atomic(path) as new, contextlib.closing(gguf.GGUFWriter(new, arch)) as writer:
        add_shape(writer, config)
        writer.add_file_type(FILE_TYPES[type])
        for name, value in tokenizer.to_gguf(config.vocab_size).items():
            add_field(writer, name, value)
        for name, t in tensors:
            wanted = gguf.GGMLQuantizationType[TYPES[type] if t.dim() == 2 else "F32"]
            if wanted is gguf.GGMLQuantizationType.Q8_0 and t.shape[1] % 32:
                wanted = gguf.GGMLQuantizationType.F16
            writer.add_tensor(name, stored(name, t, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_shape(writer, config):
    """Write the fields of the model's shape."""
    c, scaling = config, config.rope_scaling or {}
    writer.add_context_length(c.positions)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_vocab_size(c.vocab_size)
    if c.head_size * c.heads != c.width or c.qk_norm:
        writer.add_key_length(c.head_size)
        writer.add_value_length(c.head_size)
    if scaling.get("rope_type") in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") in ("llama3", "yarn"):
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    for name, add in (("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                      ("beta_slow", writer.add_rope_scaling_yarn_beta_slow)):
        if name in scaling:
            add(scaling[name])


def stored(name, t, wanted):
    """A tensor's bytes in the type `wanted`; ValueError if its numbers do not fit into it."""
    import gguf

    if wanted.name in ("F16", "Q8_0"):  # a block of Q8_0 has one 16-bit scale, the largest / 127
        largest = t.abs().max().item() / (127 if wanted.name == "Q8_0" else 1)
        if not largest <= torch.finfo(torch.float16).max:
            raise ValueError(f"{name} holds {largest:.3g}, which a 16-bit float cannot: write the "
                             "GGUF as 'bf16' or 'f32'")
    return gguf.quants.quantize(t.float().contiguous().cpu().numpy(), wanted)


def add_field(writer, name, value):
    """Write one metadata field, by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def exported(model, config, arch):
    """Yield (name, tensor) with llama.cpp's names and layout."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    if by_pair(config):
        yield FACTORS, factors_of(config)
    for name, p in model.named_parameters(remove_duplicate=False):
        if config.tied and name == "lm_head.weight":
            continue
        t, leaf = distributed.whole(p.detach()).cpu(), name.split(".")[-2]
        if arch == "llama" and leaf in heads:
            # (h, 2, d/2, ...) -> (h, d/2, 2, ...)
            t = t.unflatten(0, (heads[leaf], 2, -1)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in EXPORTED.items():
            name = re.sub(ours, theirs, name)
        yield name, t


EXPORTED = {
    r"^embed_tokens\.": "token_embd.", r"^norm\.": "output_norm.", r"^lm_head\.": "output.",
    r"^layers\.": "blk.", r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.", r"\.self_attn\.o_proj\.": ".attn_output.",
    r"\.self_attn\.([qkv])_proj\.": r".attn_\1.", r"\.self_attn\.([qk])_norm\.": r".attn_\1_norm.",
    r"\.mlp\.(gate|up|down)_proj\.": r".ffn_\1.",
}
