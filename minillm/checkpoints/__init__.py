"""Load and save checkpoints: Hugging Face directories (safetensors) and GGUF files.

    load(directory | file.gguf)  ->  (model, tokenizer)
    save(model, directory | file.gguf, tokenizer=)

`zoo.load` also takes the names of the models that minillm fetches or trains.

A checkpoint is a configuration and named tensors. The configuration is translated field by field
into a `Config`; the tensors are renamed, and every tensor must match a parameter (`fill.py`).
`layouts.py` has the fields and names of transformers, `huggingface.py` its directory, `gguf.py` and
`gguf_write.py` the file of llama.cpp. A save first checks everything that could be in its way.
"""

import dataclasses
import pathlib

import torch

from minillm import distributed, files
from minillm.checkpoints import gguf, gguf_write, huggingface, layouts
from minillm.checkpoints.fill import check_names, check_tokenizer, empty, shapes_of
from minillm.registry import Format, Patch, walk
from minillm.model.transformer import Config, Transformer

NAMED = "'smollm2', 'tiny', "  # what `zoo.load` takes as well
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# --- reading ----------------------------------------------------------------------------------


def load(path, dtype=None, device=None):
    """(model, tokenizer) of a checkpoint; the model is in eval mode and has `path` as `.source`.

    path: a directory in the Hugging Face layout, or a .gguf file. dtype: a dtype of torch or its
    name: float32, float64, bfloat16 or float16; by default the checkpoint's own, and float32 for
    GGUF. The tokenizer is None if the checkpoint has none. FileNotFoundError if there is no
    checkpoint, ValueError if it is not whole, or needs something that minillm does not implement.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; a model computes in one of: "
                         + ", ".join(str(one).removeprefix("torch.") for one in DTYPES))
    model, tokenizer = open_checkpoint(pathlib.Path(path), found, placed(device))
    model.source = str(path)
    return model, tokenizer


def placed(device):
    """The torch.device that `device` names; ValueError if nothing can be computed on it here."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError):
        found = None
    if found is None or found.type == "meta":  # meta holds no values
        count = torch.cuda.device_count()
        here = ["cpu"] + ["cuda"] * (count > 0) + [f"cuda:{i}" for i in range(count)]
        here += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"device={device!r} is not possible here; possible: {', '.join(here)}")
    return found


def open_checkpoint(path, dtype, device):
    if path.suffix in huggingface.PICKLES and not path.is_dir():
        raise ValueError(f"{path} is a pickle, which may run any code when it is opened, so it was "
                         "not opened. Ask for the model as safetensors")
    if path.is_dir():
        return huggingface.load(path, dtype, device)
    if is_gguf(path) and path.exists():
        return gguf.load(path, dtype or torch.float32, device)
    kind = "neither a directory nor a .gguf file" if path.exists() else "no such file or directory"
    raise FileNotFoundError(f"{path}: {kind}. load takes {NAMED}a directory with config.json and "
                            "model.safetensors, or a .gguf file")


def is_gguf(path):
    return pathlib.Path(path).suffix.lower() == ".gguf"


# --- writing ----------------------------------------------------------------------------------


def save(model, path, tokenizer=None, shard_bytes=5_000_000_000, type=None, force=False):
    """Write a checkpoint for transformers or, to a .gguf path, for llama.cpp; whole or not at all.

    A directory gets the Hugging Face layout, in the model's own dtype and in files of at most
    `shard_bytes`. A GGUF is written in `type`: "f32" (the default), "f16", "bf16" or "q8_0".
    If the model is sharded over processes, each process must call this, and the first one writes.

    An earlier checkpoint of minillm is replaced. force=True also replaces any existing .gguf file,
    and writes into a directory that holds other files, which stay there. The errors of `check_save`
    come before anything is written; OSError if the disk is full.
    """
    sharded = distributed.sharded(model)
    if distributed.place()[0] and not sharded:
        return  # every process has the whole model, and the first one writes it
    own = check_save(model, path, tokenizer, type, force)
    if sharded:
        distributed.wait()  # no process looks at the path after the first one has written it
    config = config_of(model)
    if is_gguf(path):
        gguf_write.write(model, config, path, tokenizer, type or "f32")
    else:
        huggingface.save(model, config, path, tokenizer, shard_bytes, own)
    if sharded:
        distributed.wait()


def check_save(model, path, tokenizer=None, type=None, force=False):
    """Raise, before any work, the errors of `save`; the arguments are those of `save`.

    model: a Transformer, or the Config of one that will be made. Returns the names of the files in
    an existing directory that the save may replace: those that minillm wrote.

    ValueError for a model that has techniques attached (see `attached`) or no longer fits its
    configuration, for a tokenizer that does not fit, and for a model that the target cannot hold;
    TypeError for a model that is not minillm's; FileExistsError for a file in the way.
    """
    if not isinstance(model, Config):
        check_model(model)
    config, path = config_of(model), pathlib.Path(path)
    check_tokenizer(tokenizer, config.vocab_size, path)
    if is_gguf(path):
        gguf_write.check_save(config, tokenizer, type or "f32")
        files.check_writable(path, force=force)
        return set()
    dtype = None if isinstance(model, Config) else huggingface.widest(model)
    check_directory(path, type, dtype)
    layouts.describe(config, dtype)
    own = huggingface.written(path)
    files.check_writable(path, directory=True, force=force, own=own, needs=huggingface.NAMES)
    return own


def check_model(model):
    """TypeError or ValueError for a model that is not, or no longer, a plain Transformer."""
    found = attached(model)
    if found:
        raise ValueError("a checkpoint holds a plain model, and this one has techniques attached: "
                         + "; ".join(f"{name} ({remedy})" for name, remedy in found.items())
                         + ". minillm.save_all(model, directory) writes all of them")
    if not isinstance(model, Transformer):
        raise TypeError(f"save writes minillm's Transformer, not {model.__class__.__name__}; a "
                        "Hugging Face model has save_pretrained")
    config = config_of(model)
    wanted, held = (shapes_of(m, config.tied) for m in (empty(config), model))
    check_names(wanted, held, "this model")
    wrong = [name for name in wanted if wanted[name] != held[name]]
    if wrong:
        raise ValueError(f"this model does not fit its configuration: {wrong[0]} is "
                         f"{held[wrong[0]]}, should be {wanted[wrong[0]]} ({len(wrong)} such)")


def attached(model):
    """{technique: what the user can do about it} for all techniques that no checkpoint can hold.

    A model that is only frozen (`minillm.freeze`) is an ordinary model: freeze is not listed.
    """
    found = {}
    for site in walk(model):
        if isinstance(site.module, Format):
            name = site.module.kind
            found[name] = f"minillm.{site.module.family}.unwrap(model) gives the dense weights back"
        for patch in site.layer.patches.values() if site.layer else ():
            name, verbs = patch.name, f"minillm.{patch.family}"
            alone = f"{verbs}.save(model, path) writes it alone, to a file of its own"
            if patch.__class__.fold is Patch.fold:
                found[name] = f"cannot be merged; {alone}, and .unwrap(model) removes it"
            else:
                found[name] = f"{verbs}.merge(model) or .unwrap(model) first; {alone}"
    return found


def config_of(model):
    """The Config to write: that of the model, with `tied` as the model is now."""
    if isinstance(model, Config):
        return model
    config = getattr(model, "config", None)
    if not isinstance(config, Config):
        return config
    return dataclasses.replace(config, tied=layouts.is_tied(model))


def check_directory(path, type, dtype):
    """ValueError if the caller seems to want a file, or a dtype that is not the model's."""
    if huggingface.looks_like_a_file(path):
        raise ValueError(f"{path} looks like a file, and a checkpoint is a directory or a .gguf "
                         f"file: write to {path.with_suffix('')} or {path.with_suffix('.gguf')}")
    named = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if type is not None and (type not in named or dtype not in (None, named[type])):
        raise ValueError(f"type={type!r} is for a .gguf file; the directory {path} gets the "
                         f"model's own dtype{'' if dtype is None else f', {dtype}'}")
