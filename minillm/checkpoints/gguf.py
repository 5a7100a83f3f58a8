"""GGUF, llama.cpp's file: metadata and tensors, which may be stored in blocks of 4 to 8 bits.

The `gguf` package, llama.cpp's own, reads the format and dequantizes the blocks. This page
translates the names and the metadata, and undoes one permutation. llama.cpp's rotary embedding
rotates neighbours (x_2i, x_2i+1), but Llama's own code rotates halves (x_i, x_i+d/2). So
llama.cpp's converter stores the rows of q and k in the order 0, d/2, 1, d/2 + 1, ... of each head:

    stored = W.view(heads, 2, d/2, in).swap(1, 2)        and back the same way

For Llama 3's scaled positions (see `rope.py`) the file keeps one number for each pair, in the
tensor `rope_freqs.weight`: it divides the frequency of the pair. `gguf_write.py` writes such files.
"""

import dataclasses
import re
import struct

import torch

from minillm import files
from minillm.model import tokenizer as tokenizers
from minillm.checkpoints.fill import check_tokenizer, fill
from minillm.model.rope import divisors, frequencies
from minillm.model.transformer import Config

NAMES = {
    r"^token_embd\.": "embed_tokens.", r"^output_norm\.": "norm.", r"^output\.": "lm_head.",
    r"^blk\.": "layers.", r"\.attn_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.", r"\.attn_output\.": ".self_attn.o_proj.",
    r"\.attn_([qkv])\.": r".self_attn.\1_proj.", r"\.attn_([qk])_norm\.": r".self_attn.\1_norm.",
    r"\.ffn_(gate|up|down)\.": r".mlp.\1_proj.",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FACTORS = "rope_freqs.weight"


def load(path, dtype, device):
    """(model, tokenizer) of a GGUF file; ValueError if it is not whole or not supported."""
    gguf = files.need("gguf", "hub")
    try:
        check(path)
        file = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
        check_spans(file.tensors, path.stat().st_size)
    except OSError:
        raise
    except Exception as error:  # the reader trusts the file's numbers, and fails in many ways
        raise ValueError(f"{path} is not a whole GGUF file "
                         f"({type(error).__name__}: {error})") from error
    by_name = {t.name: t for t in file.tensors}
    try:
        config = translate(fields, set(by_name))
        if FACTORS in by_name:
            factors = tensor(by_name.pop(FACTORS), None)
            config = dataclasses.replace(config, rope_scaling=scaling_of(factors, config, fields))
        tokenizer = tokenizers.from_gguf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata is not of the expected kind "
                         f"({type(error).__name__}: {error})") from error
    check_tokenizer(tokenizer, config.vocab_size, path)
    parts = {}
    for name in by_name:
        ours = name
        for theirs, replacement in NAMES.items():
            ours = re.sub(theirs, replacement, ours)
        heads = heads_of(name, fields["general.architecture"], config)
        parts[ours] = lambda name=name, heads=heads: read(by_name[name], heads, path)
    return fill(config, parts, dtype, device, path), tokenizer


def heads_of(name, arch, config):
    """How many heads share the rows of a tensor that is stored for neighbours, else None."""
    if arch != "llama":  # of the three architectures only Llama is stored so
        return None
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    return heads.get(name.split(".")[-2]) if "." in name else None


def check_spans(tensors, size):
    """ValueError if tensors end beyond the file, or overlap."""
    spans = sorted((t.data_offset, t.data_offset + t.n_bytes, t.name) for t in tensors)
    end = max((end for _, end, _ in spans), default=0)
    if end > size:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
    for (_, end, one), (start, _, other) in zip(spans, spans[1:]):
        if start < end:
            raise ValueError(f"the tensors {one!r} and {other!r} overlap")


# of the metadata's types, in bytes
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9


def check(path):
    """ValueError if a count in the header is wrong.

    The reader of the `gguf` package trusts the counts, and could loop without end.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        def take(form):
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

        def skip(n):
            if n > size - file.tell():
                raise ValueError(f"byte {file.tell():,} announces {n:,} more bytes, but "
                                 f"the file has {size:,}")
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


def read(stored, heads, path):
    """A stored tensor; ValueError, which names the file, if it cannot be one of the model's."""
    try:
        return tensor(stored, heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tensor(stored, heads):
    """A stored tensor, dequantized to float32 unless it is a float already, in Llama's order."""
    import gguf

    try:
        t = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    except NotImplementedError as error:
        raise ValueError(f"{stored.name} is of type {stored.tensor_type.name}, which is not "
                         "implemented") from error
    except ValueError as error:
        raise ValueError(f"{stored.name} is not whole ({error})") from error
    if heads and t.shape[0] % (2 * heads):
        raise ValueError(f"{stored.name} has {t.shape[0]} rows, which {heads} heads cannot share")
    return half_split(t, heads) if heads else t


def half_split(t, heads):
    """Rows (heads * d, ...), reordered from neighbours to halves."""
    # (h, d/2, 2, ...) -> (h, 2, d/2, ...)
    return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def translate(fields, names):
    """The metadata and the names of the tensors -> Config."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"the architecture {kind!r} is unknown; known: {', '.join(ARCHITECTURES)}")

    def field(name, *default):
        if f"{kind}.{name}" not in fields and not default:
            raise ValueError(f"it lacks the field {kind}.{name}")
        return fields.get(f"{kind}.{name}", *default)

    windowed = 0 < field("attention.sliding_window", 0) < field("context_length")
    if windowed or field("expert_count", 0):
        raise ValueError("it has a sliding window or experts, which are not implemented")
    heads = field("attention.head_count")
    head_size = field("attention.key_length", field("embedding_length") // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, head_size) != head_size:
            raise ValueError(f"heads of {head_size} have {kind}.{name} {field(name)}, which is not "
                             "implemented")
    return Config(
        vocab_size=len(fields["tokenizer.ggml.tokens"]), width=field("embedding_length"),
        layers=field("block_count"), heads=heads, kv_heads=field("attention.head_count_kv", heads),
        head_size=head_size, ffn=field("feed_forward_length"), positions=field("context_length"),
        eps=field("attention.layer_norm_rms_epsilon"),
        rope_base=float(field("rope.freq_base", 10000.0)), rope_scaling=scaling(field),
        qkv_bias="blk.0.attn_q.bias" in names,
        out_bias="blk.0.attn_output.bias" in names, qk_norm="blk.0.attn_q_norm.weight" in names,
        tied="output.weight" not in names)


def scaling(field):
    """The rope_scaling of the metadata. As in llama.cpp, it is linear if there is no type."""
    kind = field("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r}, which is not implemented "
                         "(only 'none', 'linear', 'yarn' and the tensor rope_freqs.weight)")
    for name, usual in (("attn_factor", 1), ("yarn_attn_factor", 1), ("yarn_ext_factor", 1),
                        ("yarn_log_multiplier", 0)):
        if field(f"rope.scaling.{name}", usual) != usual:
            raise ValueError(f"rope.scaling.{name} is not {usual}, which is not implemented")
    if kind == "yarn":
        turns = {name: field(f"rope.scaling.yarn_{name}", None)
                 for name in ("beta_fast", "beta_slow")}
        length = field("rope.scaling.original_context_length", field("context_length"))
        return dict(rope_type="yarn", factor=field("rope.scaling.factor"),
                    original_max_position_embeddings=length,
                    **{name: turn for name, turn in turns.items() if turn is not None})
    factor = field("rope.scaling.factor", field("rope.scale_linear", 0))
    plain = kind == "none" or factor in (0, 1)
    return None if plain else {"rope_type": "linear", "factor": factor}


def scaling_of(factors, config, fields):
    """The rope_scaling that has these factors (d/2,): Llama 3's own, if it fits, else a list.

    Every Llama 3 has a band of 1 to 4 turns in 8192 tokens, and a factor of its own, which is the
    largest of the factors. A file that minillm wrote has the number of tokens.
    """
    if config.rope_scaling:
        raise ValueError(f"it scales its positions twice: {config.rope_scaling} and {FACTORS}")
    if factors.eq(1).all():
        return None
    length = fields.get(f"{fields['general.architecture']}.rope.scaling.original_context_length")
    llama3 = dict(rope_type="llama3", factor=factors.max().item(), low_freq_factor=1.0,
                  high_freq_factor=4.0, original_max_position_embeddings=length or 8192)
    known = dataclasses.replace(config, rope_scaling=llama3)
    if factors.shape == (config.head_size // 2,) and torch.allclose(factors_of(known), factors):
        return llama3
    return dict(rope_type="factors", factors=factors.tolist())


def factors_of(config):
    """The divisors (d/2,) of the rotary frequencies of a Config."""
    base = config.rope_base
    return divisors(frequencies(config.head_size, base), base, config.rope_scaling)
