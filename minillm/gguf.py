"""GGUF, llama.cpp's file: metadata and tensors in one, the tensors possibly in blocks of 4 to 8 bits.

The `gguf` package, llama.cpp's own, reads the format and dequantizes the blocks; here is what it means for a Transformer: names,
metadata, and one permutation. llama.cpp turns neighbours (x_2i, x_2i+1) in its rotary embedding where Llama's own code turns halves
(x_i, x_i+d/2), so its converter stores the rows of q and k in the order 0, d/2, 1, d/2 + 1, ... of each head:

    stored = W.view(heads, 2, d/2, in).swap(1, 2)        and back the same way
"""

import re
import struct

import torch

from minillm import files, hub
from minillm import tokenizer as tokenizers
from minillm.transformer import Config

NAMES = {
    r"^token_embd\.": "embed_tokens.", r"^output_norm\.": "norm.", r"^output\.": "lm_head.", r"^blk\.": "layers.",
    r"\.attn_norm\.": ".input_layernorm.", r"\.ffn_norm\.": ".post_attention_layernorm.", r"\.attn_output\.": ".self_attn.o_proj.",
    r"\.attn_([qkv])\.": r".self_attn.\1_proj.", r"\.ffn_(gate|up|down)\.": r".mlp.\1_proj.",
}


def load(path, dtype, device):
    """(model, tokenizer) of a GGUF file; ValueError where it is not whole or holds something else."""
    gguf = files.need("gguf", "hub")
    try:
        check(path)
        file = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
        end, size = max((t.data_offset + t.n_bytes for t in file.tensors), default=0), path.stat().st_size
    except Exception as error:  # the reader trusts the file's counts and offsets, and fails in as many ways as they can lie
        raise ValueError(f"{path} is not a whole GGUF file ({type(error).__name__}: {error})") from error
    if end > size:
        raise ValueError(f"{path} is not a whole GGUF file: its tensors end at byte {end:,}, the file at {size:,}")
    spans = sorted((t.data_offset, t.data_offset + t.n_bytes, t.name) for t in file.tensors)
    for (_, end, one), (start, _, other) in zip(spans, spans[1:]):
        if start < end:
            raise ValueError(f"{path} is not a whole GGUF file: the tensors {one!r} and {other!r} overlap")
    try:
        config = translate(fields, {t.name for t in file.tensors}, path)
        tokenizer = tokenizers.from_gguf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata is of another kind than it should be ({type(error).__name__}: {error})") from error
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
    return model, tokenizer


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the metadata's types, in bytes
TEXT, ARRAY = 8, 9


def check(path):
    """ValueError where a count of the header lies: the reader believes it, and would read nothing for ever."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        def take(form):
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

        def skip(n):
            if n > size - file.tell():
                raise ValueError(f"byte {file.tell():,} announces {n:,} more, the file has {size:,}")
            file.seek(n, 1)

        def value(kind):
            if kind == TEXT:
                skip(take("<Q"))
            elif kind == ARRAY:
                inner, count = take("<I"), take("<Q")
                if inner in SIZES:
                    skip(SIZES[inner] * count)
                for _ in range(0 if inner in SIZES else count):
                    value(TEXT if inner == TEXT else None)
            elif kind in SIZES:
                skip(SIZES[kind])
            else:
                raise ValueError(f"byte {file.tell():,} announces a value of unknown type")

        magic, version, tensors, fields = take("<4s"), take("<I"), take("<Q"), take("<Q")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        for _ in range(fields):
            skip(take("<Q"))
            value(take("<I"))
        for _ in range(tensors):
            skip(take("<Q"))
            skip(8 * take("<I") + 12)


def tensor(stored, heads, path):
    """A stored tensor, dequantized to float32 unless it is a float already, its rows in Llama's order."""
    import gguf

    try:
        t = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    except NotImplementedError as error:
        raise ValueError(f"{path}: {stored.name} is of type {stored.tensor_type.name}, which is not implemented") from error
    except ValueError as error:
        raise ValueError(f"{path}: {stored.name} is not whole ({error})") from error
    if heads and t.shape[0] % (2 * heads):
        raise ValueError(f"{path}: {stored.name} has {t.shape[0]} rows, which {heads} heads cannot share")
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


# --- writing ----------------------------------------------------------------------------------------------------------------

TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}


def save(model, path, tokenizer, type="f32"):
    """Write a GGUF file that llama.cpp runs, with the tokenizer and its chat template; whole, or not at all.

    type: "f32", "f16", or "q8_0" (8 bits in blocks of 32 with a 16-bit scale). Vectors, and matrices whose rows do not divide by 32,
    stay in higher precision. ValueError for a model of the GPT-2 family, and for a tokenizer that llama.cpp does not run (see `to_gguf`).
    """
    gguf, c = files.need("gguf", "hub"), model.config
    if type not in TYPES:
        raise ValueError(f"type={type!r} is unknown; known: {', '.join(TYPES)}")
    if c.norm != "rms" or not c.gated or not c.rope_base or c.activation != "silu" or c.mlp_bias:
        raise ValueError("only the Llama family is written as GGUF (RMSNorm, SwiGLU with silu, rotary positions, no biases in the MLP)")
    if c.window:
        raise ValueError(f"llama.cpp's Llama has no sliding window, and this model has window={c.window}")
    if not isinstance(tokenizer, tokenizers.Tokenizer):
        kind = "none" if tokenizer is None else tokenizer.__class__.__name__
        raise ValueError(f"a GGUF carries its tokenizer: pass a minillm tokenizer; this is {kind}")
    # llama.cpp's Llama has room for biases too; its Qwen2 has none for another size of the heads.
    arch = "qwen2" if c.qkv_bias and not c.out_bias and c.head_size * c.heads == c.width else "llama"
    fields = tokenizer.to_gguf(c.vocab_size)
    with files.atomic(path) as new:
        writer = gguf.GGUFWriter(new, arch)
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
        if c.head_size * c.heads != c.width:
            writer.add_key_length(c.head_size)
            writer.add_value_length(c.head_size)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[type])
        for name, value in fields.items():
            add_field(writer, name, value)
        for name, t in exported(model, arch):
            wanted = gguf.GGMLQuantizationType[TYPES[type]] if t.dim() == 2 else gguf.GGMLQuantizationType.F32
            if wanted is gguf.GGMLQuantizationType.Q8_0 and t.shape[1] % 32:
                wanted = gguf.GGMLQuantizationType.F16
            writer.add_tensor(name, gguf.quants.quantize(t.float().contiguous().numpy(), wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_field(writer, name, value):
    """One metadata field, by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def exported(model, arch):
    """(name, tensor) as llama.cpp names them and lays them out."""
    heads = {"q_proj": model.config.heads, "k_proj": model.config.kv_heads}
    for name, p in model.named_parameters():
        t, leaf = p.detach().cpu(), name.split(".")[-2]
        if arch == "llama" and leaf in heads:
            t = t.unflatten(0, (heads[leaf], 2, -1)).transpose(1, 2).flatten(0, 2)  # (h, 2, d/2, ...) -> (h, d/2, 2, ...)
        for ours, theirs in EXPORTED.items():
            name = re.sub(ours, theirs, name)
        yield name, t


EXPORTED = {
    r"^embed_tokens\.": "token_embd.", r"^norm\.": "output_norm.", r"^lm_head\.": "output.", r"^layers\.": "blk.",
    r"\.input_layernorm\.": ".attn_norm.", r"\.post_attention_layernorm\.": ".ffn_norm.", r"\.self_attn\.o_proj\.": ".attn_output.",
    r"\.self_attn\.([qkv])_proj\.": r".attn_\1.", r"\.mlp\.(gate|up|down)_proj\.": r".ffn_\1.",
}
