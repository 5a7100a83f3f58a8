"""--model with every --adapter: files that techniques saved, and directories of peft's."""

import pathlib

import torch

from minillm import checkpoints, registry, zoo
from minillm.checkpoints import peft
from minillm.registry import store


def load(args):
    """(model, tokenizer) of --model with every --adapter, on --device."""
    names = {}
    if args.any_base and not args.adapter:
        args.parser.error("--any-base is for --adapter FILE, and there is none")
    for path in args.adapter:
        _, name = held(path)
        if name in names:
            raise ValueError(f"{names[name]} and {path} both hold {name!r}, and a model can have "
                             "each name once. minillm train --option name=NAME gives an adapter "
                             "another name")
        names[name] = path
    model, tokenizer = zoo.load(args.model, dtype=args.dtype, device=place(args.device))
    for path in names.values():
        if pathlib.Path(path).is_dir():
            peft.load(model, path)
        else:
            family = store.holds(path)[0]
            registry.techniques()[family].load(model, path, any_base=args.any_base)
    return model, tokenizer


def held(path):
    """(kind, name) of what a file, or a directory of peft's, holds; ValueError for others."""
    if pathlib.Path(path).is_dir():
        kind = peft.holds(path)
        return kind, kind
    metadata = store.read(path)[1]
    family = metadata.get("technique")
    if family not in registry.techniques():
        raise ValueError(f"{path} is not a file that a technique of minillm saved")
    return metadata.get("kind", family), metadata.get("name", family)


def place(written):
    """The torch.device of --device; by default a GPU where there is one."""
    if written is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return checkpoints.placed(written)
    except ValueError as error:
        text = str(error).replace(f"device={written!r}", f"--device {written}")
        raise ValueError(text) from error
