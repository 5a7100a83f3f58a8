"""The paths that a command reads and writes: no path may be two of them.

One output in the place of another is lost, and so is an input that an output replaces. So every
pair is compared before any work, with symbolic links followed.
"""

import itertools
import os
import pathlib
import re

from minillm.checkpoints import huggingface

NAMED = ("tiny", "smollm2")  # models that have a name and no path
OF_CHECKPOINTS = re.compile(r"\.?step-\d+\.safetensors.*|\.lock")  # names that train uses


def check_paths(args, written):
    """Exit with one line, which names both options, where two paths are in each other's way.

    written: {option: path or None}, what the command writes.
    """
    written = {option: path for option, path in written.items() if path}
    for (one, path), (other, inner) in itertools.permutations(written.items(), 2):
        if real(path) == real(inner):
            args.parser.error(f"{one} {path} and {other} {inner} are one path: each needs its own")
        if real(path) in real(inner).parents and not has_room(one, path, inner):
            args.parser.error(f"{other} {inner} lies inside of {one} {path}: choose a place "
                              "outside")
    for (option, path), (other, out) in itertools.product(inputs(args), written.items()):
        if real(path) == real(out):
            args.parser.error(f"{option} {path} would be replaced by {other} {out}: "
                              f"choose another path for {other}")


def real(path):
    return pathlib.Path(os.path.realpath(path))


def has_room(option, path, inner):
    """Whether an output may lie in the directory that another option names."""
    first = real(inner).relative_to(real(path)).parts[0]
    return option == "--checkpoints" and not OF_CHECKPOINTS.fullmatch(first)


def inputs(args):
    """[(option, path)] of all that the command reads; of a model's directory also its files."""
    found = [("--data", getattr(args, "data", None)),
             ("--eval-data", getattr(args, "eval_data", None))]
    found += [("--adapter", path) for path in getattr(args, "adapter", ())]
    if args.model not in NAMED:
        found.append(("--model", args.model))
        if os.path.isdir(args.model):
            found += [("--model", os.path.join(args.model, name)) for name in os.listdir(args.model)
                      if re.fullmatch(huggingface.NAMES, name)]
    return [(option, path) for option, path in found if path]
