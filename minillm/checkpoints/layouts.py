"""How transformers describes a model and names its tensors, in both directions.

    config.json  ->  Config, and the names      translate
    Config       ->  config.json                describe
    Transformer  ->  named tensors              exported

A field that would change the computation and is not implemented is an error, never ignored. GPT-2's
checkpoints keep q, k and v in one matrix and all matrices transposed (`Conv1D`); here they are
three ordinary leaves. transformers needs a class and a converter for each architecture; the five
here (GPT-2, Llama, Mistral, Qwen2, Qwen3) are one Transformer.
"""

import functools
import re

import torch

from minillm import distributed
from minillm.model.transformer import Config

# --- config.json -> Config --------------------------------------------------------------------

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
NEUTRAL = {  # fields that may change the computation, and their values that do not
    "partial_rotary_factor": (None, 1.0, 1), "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (None, True), "add_cross_attention": (None, False),
    "logit_scale": (None,), "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,),
    "num_experts": (None,), "num_local_experts": (None,), "quantization_config": (None,),
    "pretraining_tp": (None, 1), "layer_norm_elementwise_affine": (None, True),
    "no_rope_layers": (None,), "use_sliding_window": (None, False),
}
KINDS = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "qwen2": "Qwen2ForCausalLM",
         "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}


def translate(told):
    """config.json, a dict -> (Config, names).

    names: a function from the file's names to {our name: (their name, function of the tensor)}.
    ValueError for a field that is missing, contradicts another or is not implemented.
    """
    kind = told.get("model_type")
    name = told["architectures"] if told.get("architectures") else KINDS.get(str(kind), kind)
    name = name[0] if isinstance(name, list) else name
    if str(name) not in ARCHITECTURES:
        raise ValueError(f"the architecture {name!r} is unknown; known: {', '.join(ARCHITECTURES)}")
    for field, values in NEUTRAL.items():
        if told.get(field) not in values:
            raise ValueError(f"{field} is {told[field]!r}, which is not implemented "
                             f"(only {values[0]!r})")
    if set(map(str, told.get("layer_types") or [])) - {"full_attention"}:
        raise ValueError(f"layer_types is {told['layer_types']!r}, which is not implemented "
                         "(only 'full_attention')")
    usual = "gelu_new" if name == "GPT2LMHeadModel" else "silu"
    activation = told.get("hidden_act", told.get("activation_function", usual))
    if str(activation) not in ACTIVATIONS:
        raise ValueError(f"the activation {activation!r} is unknown; "
                         f"known: {', '.join(ACTIVATIONS)}")
    try:
        return ARCHITECTURES[name](told, ACTIVATIONS[activation])
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def llama(told, activation, qkv_bias=None, sliding=False, qk_norm=False):
    """Llama; with biases of q, k, v Qwen2; with norms of q and k Qwen3; with a window Mistral."""
    positions = told["max_position_embeddings"]
    base, scaling = rope(told, positions)
    window = told.get("sliding_window", 4096) if sliding else None  # Mistral's own default
    if window is not None and window >= positions:
        window = None  # a window as long as the positions hides nothing
    bias = told.get("attention_bias", False)
    config = Config(
        told["vocab_size"], told["hidden_size"], told["num_hidden_layers"],
        told["num_attention_heads"], kv_heads=told.get("num_key_value_heads"),
        head_size=told.get("head_dim") or (128 if qk_norm else None),  # 128: Qwen3's own default
        ffn=told["intermediate_size"], positions=positions, eps=told.get("rms_norm_eps", 1e-6),
        activation=activation, rope_base=base, rope_scaling=scaling, window=window,
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias if qkv_bias is None else False,
        mlp_bias=told.get("mlp_bias", False), qk_norm=qk_norm,
        tied=told.get("tie_word_embeddings", False))

    def names(where):
        # rotary_emb.inv_freq: a constant that old files hold
        kept = [name for name in where if not name.endswith("rotary_emb.inv_freq")]
        return {name.removeprefix("model."): (name, lambda t: t) for name in kept}

    return config, names


def rope(told, positions):
    """(base, scaling) of a config.json.

    transformers 5 writes `rope_parameters`; earlier versions write `rope_theta` and
    `rope_scaling`.
    """
    given = {name: told[name] for name in ("rope_scaling", "rope_parameters") if told.get(name)}
    said = [rope_field(field, value, told.get("rope_theta", 10000.0), positions)
            for field, value in (given or {"rope_parameters": {}}).items()]
    if said[0] != said[-1]:
        raise ValueError(f"rope_scaling and rope_parameters contradict each other: {given}")
    return said[0]


def rope_field(field, value, base, positions):
    """(base, scaling) of one of the two fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{field} is {value!r}, not an object of fields")
    kind = value.get("rope_type", value.get("type", "default"))
    rest = {key: v for key, v in value.items() if key not in ("rope_type", "type", "rope_theta")
            and (key, v) not in (("partial_rotary_factor", 1), ("partial_rotary_factor", None))}
    known = ("default", "linear", "llama3", "yarn")
    if kind not in known or kind == "default" and rest:
        raise ValueError(f"{field} is {value!r}, which is not implemented "
                         f"(only the types {', '.join(map(repr, known))})")
    if kind == "yarn":  # transformers takes a field of None as not given
        rest = {key: v for key, v in rest.items() if v is not None}
    if kind in ("llama3", "yarn"):
        rest.setdefault("original_max_position_embeddings", positions)
    base = float(value.get("rope_theta", base))
    return base, None if kind == "default" else {"rope_type": kind, **rest}


def gpt2(told, activation):
    width = told["n_embd"]
    config = Config.gpt2(
        told["vocab_size"], width, told["n_layer"], told["n_head"], ffn=told.get("n_inner"),
        positions=told["n_positions"], eps=told.get("layer_norm_epsilon", 1e-5),
        activation=activation, tied=told.get("tie_word_embeddings", True))

    def names(where):
        found = {}
        for name in where:
            short = name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", short):
                continue  # the causal mask, which old files hold
            for theirs, ours in GPT2_NAMES.items():
                short = re.sub(theirs, ours, short)
            turned = name.endswith("weight") and re.search(r"\.(c_attn|c_proj|c_fc)\.", name)
            if ".c_attn." in name:
                for i, letter in enumerate("qkv"):
                    part = functools.partial(third, i)
                    found[short.replace("c_attn", f"{letter}_proj")] = (name, part)
            else:
                found[short] = (name, (lambda t: t.T) if turned else (lambda t: t))
        return found

    def third(i, t):
        """q, k or v of c_attn: its weight is (in, 3 out), its bias (3 out,)."""
        return (t.T if t.dim() == 2 else t).split(width)[i]

    return config, names


GPT2_NAMES = {
    r"^wte\.": "embed_tokens.", r"^wpe\.": "embed_positions.", r"^ln_f\.": "norm.",
    r"^h\.": "layers.", r"\.ln_1\.": ".input_layernorm.", r"\.ln_2\.": ".post_attention_layernorm.",
    r"\.attn\.c_proj\.": ".self_attn.o_proj.", r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".up_proj.", r"\.c_proj\.": ".down_proj.",
}
ARCHITECTURES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": functools.partial(llama, sliding=True),
    "Qwen2ForCausalLM": functools.partial(llama, qkv_bias=True),
    "Qwen3ForCausalLM": functools.partial(llama, qk_norm=True),
    "GPT2LMHeadModel": gpt2,
}

# --- Config -> config.json --------------------------------------------------------------------


def describe(config, dtype):
    """The config.json of a Transformer's Config; ValueError if no architecture describes it."""
    c = config
    back = {"gelu_tanh": "gelu_pytorch_tanh" if c.rope_base else "gelu_new"}
    activation = back.get(c.activation, c.activation)
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied,
                  dtype=str(dtype).removeprefix("torch."))
    biases = (c.qkv_bias, c.out_bias, c.mlp_bias)
    whole_heads = c.head_size * c.heads == c.width
    learned = c.norm == "layer" and not c.gated and c.rope_base is None and not c.qk_norm
    if learned and all(biases) and c.kv_heads == c.heads and whole_heads and not c.window:
        return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=c.width,
                    n_layer=c.layers, n_head=c.heads, n_inner=c.ffn, n_positions=c.positions,
                    layer_norm_epsilon=c.eps, activation_function=activation, attn_pdrop=0.0,
                    embd_pdrop=0.0, resid_pdrop=0.0, **common)
    if c.norm != "rms" or not c.gated or not c.rope_base:
        raise ValueError(f"no architecture of transformers is {config}")
    told = dict(hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads, head_dim=c.head_size, intermediate_size=c.ffn,
                max_position_embeddings=c.positions, rms_norm_eps=c.eps, hidden_act=activation,
                **describe_rope(c), **common)
    if c.window and (any(biases) or c.qk_norm):
        raise ValueError("no architecture of transformers has biases or norms of q and k with "
                         f"window={c.window} for every layer")
    if c.window:
        return dict(architectures=["MistralForCausalLM"], model_type="mistral",
                    sliding_window=c.window, **told)
    if biases == (True, False, False) and whole_heads and not c.qk_norm:
        return dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2",
                    use_sliding_window=False, **told)
    if c.qkv_bias != c.out_bias or c.qk_norm and c.mlp_bias:
        raise ValueError(f"no architecture of transformers has qkv_bias={c.qkv_bias} with "
                         f"out_bias={c.out_bias}, mlp_bias={c.mlp_bias} and qk_norm={c.qk_norm}")
    if c.qk_norm:
        return dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3",
                    use_sliding_window=False, attention_bias=c.qkv_bias, **told)
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=c.qkv_bias,
                mlp_bias=c.mlp_bias, **told)


def describe_rope(config):
    """The fields of the rotary positions, for transformers 5 and for earlier versions."""
    base, scaling = config.rope_base, config.rope_scaling
    if scaling is None:
        return dict(rope_theta=base, rope_parameters=dict(rope_type="default", rope_theta=base))
    if scaling["rope_type"] == "factors":
        raise ValueError("transformers has no name for the rope_scaling of this model, one factor "
                         "for each pair from a GGUF file; a .gguf file can hold it")
    return dict(rope_theta=base, rope_scaling=scaling,
                rope_parameters=dict(scaling, rope_theta=base))


# --- the tensors ------------------------------------------------------------------------------


def exported(model, kind):
    """Yield (name, tensor) with the names and the layout of transformers.

    kind: "gpt2", or any other model_type. A tensor that is spread over processes is gathered when
    its turn comes, so every process must go through them all.
    """
    own, tied = dict(model.named_parameters(remove_duplicate=False)), is_tied(model)
    for name, p in own.items():
        if tied and name == "lm_head.weight":
            continue
        prefix = "transformer." if kind == "gpt2" else "model."
        prefix = "" if name.startswith("lm_head") else prefix
        if kind != "gpt2":
            yield prefix + name, distributed.whole(p.detach()).contiguous()
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield prefix + gpt2_name(name), gpt2_tensor(name, own)


def is_tied(model):
    """Whether the head is the embedding in the model itself; its configuration may differ."""
    return model.lm_head.weight is model.embed_tokens.weight


def gpt2_tensor(name, own):
    """One tensor of GPT-2: q, k and v together, matrices transposed."""
    names = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
    parts = names if ".q_proj." in name else [name]
    t = torch.cat([distributed.whole(own[part].detach()) for part in parts])
    return (t.T if name.endswith("_proj.weight") else t).contiguous()


def gpt2_name(name):
    back = {"embed_tokens.": "wte.", "embed_positions.": "wpe.", "layers.": "h.",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "up_proj": "c_fc", "down_proj": "c_proj"}
    for ours, theirs in back.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^norm\.", "ln_f.", name)
