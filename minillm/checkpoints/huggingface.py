"""A directory in the Hugging Face layout: config.json, safetensors files, a tokenizer.

A file is checked before memory is allocated for it, and nothing is unpickled: a `.bin` or `.pt` is
refused unopened, because a pickle may run any code.

A directory that `save` wrote has a record of itself, `minillm.json`, with the SHA-256 of each file.
So a later save knows which files it may replace: those that minillm wrote and nobody changed.
"""

import json
import pathlib
import re

import safetensors
import safetensors.torch
import torch

from minillm import distributed, files
from minillm.checkpoints import layouts
from minillm.model import tokenizer as tokenizers
from minillm.checkpoints.fill import check_tokenizer, fill

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
RECORD = "minillm.json"
NAMES = (r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
         r"tokenizer[^/]*\.(json|model)|minillm\.json")  # what a save may write

# --- reading ----------------------------------------------------------------------------------


def load(path, dtype, device):
    """(model, tokenizer) of a directory; see `zoo.load`."""
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: a checkpoint is config.json and "
                                "model.safetensors")
    told = files.read_json(path / "config.json")
    try:
        config, names = layouts.translate(told)
        dtype = dtype or written_dtype(told)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from error
    where = {}
    for shard in tensor_files(path):
        where.update(dict.fromkeys(names_in(shard), shard))

    def tensor(name):  # opens the file for each tensor, so that earlier ones leave the memory
        with safetensors.safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    parts = {ours: lambda theirs=theirs, part=part: part(tensor(theirs))
             for ours, (theirs, part) in names(where).items()}
    there = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = tokenizers.load(path, size=config.vocab_size) if there else None
    check_tokenizer(tokenizer, config.vocab_size, path)
    return fill(config, parts, dtype, device, path), tokenizer


def written_dtype(told):
    """The dtype that a config.json names, or None."""
    written = told.get("dtype") or told.get("torch_dtype")
    dtype = None if written is None else getattr(torch, str(written), None)
    if written is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {written!r}, which is not a floating-point type of torch")
    return dtype


def names_in(shard):
    """The names of the tensors in a safetensors file."""
    if pathlib.Path(shard).is_dir():
        raise ValueError(f"{shard} is a directory, but a safetensors file was expected there")
    try:
        with safetensors.safe_open(shard, "pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{shard} is not a whole safetensors file ({said})") from error


def tensor_files(path):
    """The checkpoint's safetensors files: one, or those that the index names."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not (path / "model.safetensors").exists():
            pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
            held = (f"; {pickles[0]} is a pickle, which may run any code when it is opened, so it "
                    "was not opened") if pickles else ""
            raise FileNotFoundError(f"{path} has no model.safetensors{held}")
        return [path / "model.safetensors"]
    listed = files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map")
    names = sorted(set(map(str, listed.values())))
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name} is missing; {index.name} names it")
    return [path / name for name in names]


# --- writing ----------------------------------------------------------------------------------


def written(directory, record=RECORD):
    """The names of the files in a directory that `save` wrote and nobody has changed since.

    record: the name of the JSON file that has their checksums.
    """
    directory = pathlib.Path(directory)
    try:
        sums = files.read_json(directory / record)["sha256"]
        own = {name for name, digest in sums.items() if unchanged(directory, name, digest)}
        return own | {record}
    except (OSError, ValueError, KeyError, AttributeError):
        return set()


def unchanged(directory, name, digest):
    path = directory / name
    plain = pathlib.PurePath(name).name == name and path.is_file() and not path.is_symlink()
    return plain and files.checksum(path) == digest


def widest(model):
    """The dtype that holds every parameter of the model without loss."""
    dtype = model.norm.weight.dtype
    for p in model.parameters():
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def save(model, config, path, tokenizer, shard_bytes, own):
    """Write the directory, whole or not at all; with several processes the first one writes.

    own: the names in an existing directory that may be replaced (see `files.atomic`).
    """
    told = layouts.describe(config, widest(model))
    if tokenizer is not None:
        for name in ("eos", "bos", "pad"):  # null if there is none: a default would be another id
            told[f"{name}_token_id"] = getattr(tokenizer, name)
        if len(tokenizer.stops) > 1:
            told["eos_token_id"] = list(tokenizer.stops)
    tensors = layouts.exported(model, told["model_type"])
    if distributed.place()[0]:
        for _ in tensors:  # sends this process's part of each to the first
            pass
        return
    with files.atomic(path, own) as new:
        new.mkdir()
        write_json(new / "config.json", dict(sorted(told.items())))
        write_tensors(new, tensors, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)
        write_json(new / RECORD, {"sha256": files.checksums(new)})


def write_json(path, told):
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def write_tensors(directory, tensors, shard_bytes):
    """Write (name, tensor) pairs in order, in files of at most `shard_bytes`, and an index."""
    shards, held, total = [], {}, 0  # names in each written file; waiting tensors; bytes in all

    def write():
        safetensors.torch.save_file(held, directory / str(len(shards)), {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, t in tensors:
        if held and sum(map(size, held.values())) + size(t) > shard_bytes:
            write()
        # two parameters that share memory are written twice: a file cannot hold shared tensors
        shared = any(t.data_ptr() == other.data_ptr() for other in held.values())
        held[name], total = t.clone() if shared else t, total + size(t)
    write()
    n = len(shards)
    called = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    called = ["model.safetensors"] if n == 1 else called
    for i, name in enumerate(called):
        (directory / str(i)).rename(directory / name)
    if n > 1:
        weight_map = {key: name for name, shard in zip(called, shards) for key in shard}
        write_json(directory / "model.safetensors.index.json",
                   dict(metadata=dict(total_size=total), weight_map=weight_map))


def size(t):
    return t.numel() * t.element_size()


def looks_like_a_file(path):
    """Whether the ending of a path suggests a file, not a directory."""
    return bool(re.fullmatch(FILE_ENDINGS, path.suffix.lower())) and not path.is_dir()


FILE_ENDINGS = r"\.(safetensors|bin|pth?|pkl|ckpt|jsonl?|ggml|onnx|npz|h5|zip|tar|gz|txt|csv|md)"
