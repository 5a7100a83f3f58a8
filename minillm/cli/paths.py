"""The paths that a command reads and writes: no two of them may be the same.

If two outputs had one path, the first would be lost; an output at the path of an input would
replace it. So every pair is compared before any work, with symbolic links followed.
"""

import itertools
import os
import pathlib
import re

from minillm.checkpoints import huggingface, together

NAMED = ("tiny", "smollm2")  # values of --model that are not paths
OF_CHECKPOINTS = re.compile(r"\.?step-\d+\.safetensors.*|\.lock")  # names that train uses


def check_paths(args, written):
    """Exit with one line, which names both options, if two paths are in conflict.

    written: {option: path or None}, what the command writes.
    """
    written = {option: path for option, path in written.items() if path}
    for (one, path), (other, inner) in itertools.permutations(written.items(), 2):
        if real(path) == real(inner):
            args.parser.error(f"{one} {path} and {other} {inner} are one path: each needs its own")
        if real(path) in real(inner).parents and not has_room(one, path, inner):
            args.parser.error(f"{other} {inner} lies inside {one} {path}: choose a path outside")
    for (option, path), (other, out) in itertools.product(inputs(args), written.items()):
        if real(path) == real(out):
            args.parser.error(f"{option} {path} would be replaced by {other} {out}: "
                              f"choose another path for {other}")


def real(path):
    return pathlib.Path(os.path.realpath(path))


def has_room(option, path, inner):
    """Whether the output `inner` may lie in the directory `path` of `option`."""
    first = real(inner).relative_to(real(path)).parts[0]
    return option == "--checkpoints" and not OF_CHECKPOINTS.fullmatch(first)


def inputs(args):
    """[(option, path)] of all that the command reads, with the files in a model's directory."""
    found = [("--data", getattr(args, "data", None)),
             ("--eval-data", getattr(args, "eval_data", None))]
    found += [("--adapter", path) for path in getattr(args, "adapter", ())]
    if args.model not in NAMED:
        found.append(("--model", args.model))
        if os.path.isdir(args.model):
            found += [("--model", os.path.join(args.model, name)) for name in os.listdir(args.model)
                      if re.fullmatch(f"{huggingface.NAMES}|{together.NAMES}", name)]
    return [(option, path) for option, path in found if path]
