"""GGUF, llama.cpp's file: metadata and tensors in one, the tensors possibly in blocks of 4 to 8 bits.

The `gguf` package, llama.cpp's own, reads the format and dequantizes the blocks; here is what it means for a Transformer: names,
metadata, and one permutation. llama.cpp turns neighbours (x_2i, x_2i+1) in its rotary embedding where Llama's own code turns halves
(x_i, x_i+d/2), so its converter stores the rows of q and k in the order 0, d/2, 1, d/2 + 1, ... of each head:

    stored = W.view(heads, 2, d/2, in).swap(1, 2)        and back the same way
"""

import re

import torch

from minillm import files, hub
from minillm.tokenizer import BytePair
from minillm.transformer import Config

NAMES = {
    r"^token_embd\.": "embed_tokens.", r"^position_embd\.": "embed_positions.", r"^output_norm\.": "norm.", r"^output\.": "lm_head.", r"^blk\.": "layers.",
    r"\.attn_norm\.": ".input_layernorm.", r"\.ffn_norm\.": ".post_attention_layernorm.", r"\.attn_output\.": ".self_attn.o_proj.",
    r"\.attn_([qkv])\.": r".self_attn.\1_proj.", r"\.ffn_(gate|up|down)\.": r".mlp.\1_proj.",
}


def load(path, dtype, device):
    """(model, tokenizer) of a GGUF file; ValueError where it is not whole or holds something else."""
    gguf = files.need("gguf", "hub")
    try:
        file = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
        end, size = max((t.data_offset + t.n_bytes for t in file.tensors), default=0), path.stat().st_size
    except Exception as error:  # the reader trusts the file's counts and offsets, and fails in as many ways as they can lie
        raise ValueError(f"{path} is not a whole GGUF file ({type(error).__name__}: {error})") from error
    if end > size:
        raise ValueError(f"{path} is not a whole GGUF file: its tensors end at byte {end:,}, the file at {size:,}")
    config = translate(fields, {t.name for t in file.tensors}, path)
    by_name = {t.name: t for t in file.tensors}
    parts = {}
    for name in by_name:
        if name == "rope_freqs.weight":
            raise ValueError(f"{path} scales its rotary frequencies (rope_freqs.weight), which is not implemented")
        ours = name
        for theirs, replacement in NAMES.items():
            ours = re.sub(theirs, replacement, ours)
        turned = fields["general.architecture"] == "llama"  # of the two, Llama alone is stored for neighbours
        heads = turned and (config.heads if ".attn_q." in name else config.kv_heads if ".attn_k." in name else None)
        parts[ours] = lambda name=name, heads=heads: tensor(by_name[name], heads, path)
    model = hub.fill(config, parts, dtype, device, path)
    return model, BytePair.from_gguf(fields)


def tensor(stored, heads, path):
    """A stored tensor, dequantized to float32 unless it is a float already, its rows in Llama's order."""
    import gguf

    try:
        t = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    except NotImplementedError as error:
        raise ValueError(f"{path}: {stored.name} is of type {stored.tensor_type.name}, which is not implemented") from error
    return half_split(t, heads) if heads else t


def half_split(t, heads):
    """Rows (heads * d, ...) from neighbours to halves."""
    return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (h, d/2, 2, ...) -> (h, 2, d/2, ...)


def translate(fields, names, path):
    """The metadata -> Config."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"{path}: the architecture {kind!r} is unknown; known: 'llama', 'qwen2'")

    def field(name, *default):
        if f"{kind}.{name}" not in fields and not default:
            raise ValueError(f"{path} lacks the field {kind}.{name}")
        return fields.get(f"{kind}.{name}", *default)

    if field("rope.scaling.type", "none") != "none" or field("expert_count", 0):
        raise ValueError(f"{path}: rope scaling or experts, which are not implemented")
    heads = field("attention.head_count")
    head_size = field("attention.key_length", field("embedding_length") // heads)
    if field("rope.dimension_count", head_size) != head_size or field("attention.value_length", head_size) != head_size:
        raise ValueError(f"{path}: heads of {head_size} with another size for rotation or values, which is not implemented")
    return Config(
        vocab_size=len(fields["tokenizer.ggml.tokens"]), width=field("embedding_length"), layers=field("block_count"), heads=heads,
        kv_heads=field("attention.head_count_kv", heads), head_size=head_size, ffn=field("feed_forward_length"),
        positions=field("context_length"), eps=field("attention.layer_norm_rms_epsilon"), rope_base=float(field("rope.freq_base", 10000.0)),
        qkv_bias="blk.0.attn_q.bias" in names, out_bias="blk.0.attn_output.bias" in names, tied="output.weight" not in names)
