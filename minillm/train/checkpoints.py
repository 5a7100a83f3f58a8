"""Checkpoints: an interrupted training resumes and gives the same result, to the last bit.

One safetensors file holds

    model.*       what learns                    buffer.*   buffers (BatchNorm's running statistics)
    optimizer.*   AdamW's two moments and its step, of each parameter that has had a gradient; the
                  float32 copy of each parameter of less than float32 (see `masters`)
    patch.*       buffers of patches (masks), where `on_step` may change them
    best.*        model.* and buffer.* after the best step, where that is not this one
    random.*      the state of each process's random numbers
    metadata      the log, the place in the data, all settings, the options of patches where
                  `on_step` may change them, and a description of what else the training needs
                  (see `identity`): the frozen model, the techniques, the examples

It is written under a temporary name and then renamed, so a file of this name is always a whole
checkpoint. Frozen weights are not in it: load the same model and wrap it the same way first.
"""

import json
import logging
import pathlib
import re
import shutil

import safetensors.torch
import torch

from minillm import distributed, files
from minillm.registry.store import read
from minillm.train import identity
from minillm.train.history import measured
from minillm.train.state import changing, copies, put_back, same_patches, state

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, each of the parameter's shape
logger = logging.getLogger("minillm")


# --- the directory ----------------------------------------------------------------------------


def saved(directory):
    """The checkpoints in a directory, oldest first."""
    found = pathlib.Path(directory).glob("step-*.safetensors")
    pattern = re.compile(r"step-(\d{8,})\.safetensors")
    steps = {int(match[1]): path for path in found if (match := pattern.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def newest(directory):
    """The last checkpoint in a directory, or None."""
    return next(reversed(saved(directory)), None)


def clear(directory):
    """Remove the checkpoints in a directory, and the directory if nothing else is in it."""
    directory = pathlib.Path(directory)
    for path in saved(directory):
        path.unlink()
    files.unlock(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def ready(directory, resume):
    """The checkpoint to resume from, or None for a training from the start.

    FileExistsError if one directory would hold two trainings.
    """
    path = newest(directory)
    if path is not None and not resume:
        raise FileExistsError(f"checkpoints={str(directory)!r} holds those of an earlier "
                              f"training ({len(saved(directory))}, the newest {path.name}): "
                              "resume=True continues it; for a new training choose another "
                              "directory")
    if distributed.place()[0] == 0:
        for half in files.leftovers(directory, r"step-\d{8,}\.safetensors"):
            shutil.rmtree(half)  # a killed run was writing it
    return path


# --- writing ---------------------------------------------------------------------------------


def path_of(run, directory=None):
    """The path of the checkpoint after the newest step; directory: in place of the run's own."""
    directory = pathlib.Path(directory or run.options.checkpoints)
    return directory / f"step-{len(run.history):08d}.safetensors"


def save(run, directory=None):
    """Write `step-N.safetensors`, then remove all but the last `keep`; returns its path.

    With several processes the first one writes.
    """
    each = distributed.gathered(torch.get_rng_state())
    tensors = {f"random.{rank}": t for rank, t in enumerate(each)}
    if torch.cuda.is_available():
        each = distributed.gathered(torch.cuda.get_rng_state())
        tensors |= {f"random.cuda.{rank}": t for rank, t in enumerate(each)}
    tensors |= state(run) | dict(copies(run))
    for name, p in run.stepped.items():
        for key, t in run.optimizer.state.get(p, {}).items():  # none without a gradient
            tensors[f"optimizer.{key}.{name}"] = t
    facts = dict(settings=run.compared, identity=run.identity, history=run.history,
                 batches=run.batches.state_dict(), options=changing(run))
    if keeps_best(run):
        best, facts["best_options"] = run.best_state
        tensors |= {f"best.{name}": t for name, t in best.items()}
    tensors = distributed.apart(tensors)
    path = path_of(run, directory)
    if distributed.place()[0] == 0:
        with files.atomic(path) as new:
            metadata = {"format": "pt", "training": json.dumps(facts)}
            safetensors.torch.save_file(tensors, new, metadata)
        for old in saved(path.parent)[: -run.options.keep]:
            old.unlink()
    distributed.wait()
    logger.info("saved %s", path)
    return path


def keeps_best(run):
    """Whether the best parameters so far are not those of the last step."""
    return run.options.restore_best and run.best and run.best["step"] != len(run.history) - 1


# --- going on ---------------------------------------------------------------------------------


@torch.no_grad()
def restore(run, path):
    """Check the whole checkpoint, then put everything back as it was when it was written."""
    tensors, metadata = opened(path)
    facts = facts_of(run, path, metadata)
    run.history = facts["history"]
    for record in run.history:
        run.count(record)
    check(run, path, tensors)
    rank = distributed.place()[0]
    try:
        torch.set_rng_state(tensors[f"random.{rank}"])
        if f"random.cuda.{rank}" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its random state is not valid ({error})") from error
    ours = state(run)
    now = {name: distributed.like(tensors[name], t) for name, t in ours.items()}
    put_back(run, (now, facts["options"]))
    for name, copy in copies(run):
        copy.copy_(distributed.like(tensors[name], copy))
    for name, p in run.stepped.items():
        if f"optimizer.step.{name}" in tensors:  # else the parameter has never had a gradient
            run.optimizer.state[p] = {
                "step": tensors[f"optimizer.step.{name}"],
                **{key: distributed.like(tensors[f"optimizer.{key}.{name}"], p) for key in MOMENTS}}
    if run.best and run.options.restore_best:
        where = "best." if keeps_best(run) else ""
        best = {name: distributed.like(tensors[where + name], t).clone()
                for name, t in ours.items()}
        run.best_state = best, facts["best_options" if keeps_best(run) else "options"]
    run.batches.load_state_dict(facts["batches"])


def opened(path):
    """(tensors, metadata) of the newest checkpoint; an error says what to do if it is broken."""
    try:
        return read(path)
    except ValueError as error:
        advice = "to go on from the checkpoint before it, move it away"
        raise ValueError(f"{error}; {advice}") from error


def facts_of(run, path, metadata):
    """The facts in a checkpoint's metadata; ValueError if they are of another training."""
    try:
        facts = json.loads(metadata["training"])
        then, history = facts["settings"], facts["history"]
        place = {key: int(facts["batches"][key]) for key in ("epoch", "position")}
        facts["batches"] = place
        odd = {key: (then.get(key), now) for key, now in run.compared.items()
               if json.dumps(then.get(key)) != json.dumps(now)}  # so the order of `rates` counts
        other = identity.differs(run.model, facts["identity"], run.options.on_step)
        whole = all(record["step"] == i and isinstance(record["loss"], float)
                    and isinstance(measured(record), float | None)
                    for i, record in enumerate(history))
        whole = whole and path.name == f"step-{len(history):08d}.safetensors"
        whole = whole and 0 <= place["position"] < len(run.batches.examples)
        fits = same_patches(run, facts)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, IndexError) as error:
        raise ValueError(f"{path} is not a checkpoint of minillm.train "
                         f"({type(error).__name__}: {error})") from error
    if other and "on_step" not in odd:  # first, as another technique often has another rate
        raise ValueError(f"{path} belongs to another training: {other}")
    if odd:
        listed = ", ".join(f"{key}={old!r} then, {new!r} now" for key, (old, new) in odd.items())
        longer = (". The learning rate follows a schedule for its steps: to train longer or "
                  "shorter, begin a new training from the model that this one has made"
                  if "steps" in odd else "")
        raise ValueError(f"{path} was written with other settings: {listed}{longer}")
    if not fits:
        raise ValueError(f"{path} has the options of other patches")
    if not whole:
        raise ValueError(f"{path}: its log is not complete, or not of this step")
    return facts


def check(run, path, tensors):
    """ValueError if the tensors of the file differ in name, shape or dtype from the training's."""
    kind = {name: (t.shape, t.dtype) for name, t in state(run).items()}
    needed = dict(kind)
    needed[f"random.{distributed.place()[0]}"] = torch.get_rng_state().shape, torch.uint8
    if keeps_best(run):
        needed |= {f"best.{name}": value for name, value in kind.items()}
    needed |= {name: (copy.shape, copy.dtype) for name, copy in copies(run)}
    for name, p in run.stepped.items():
        moments = {f"optimizer.{key}.{name}": (p.shape, p.dtype) for key in MOMENTS}
        moments[f"optimizer.step.{name}"] = ((), torch.float32)
        if any(key in tensors for key in moments):
            needed |= moments
    odd = [key for key, (shape, dtype) in needed.items() if key not in tensors
           or (tuple(tensors[key].shape), tensors[key].dtype) != (tuple(shape), dtype)]
    odd += [key for key in tensors if key not in needed and not key.startswith("random.")]
    if odd:
        raise ValueError(f"{path} does not fit what learns in this model; {len(odd)} tensors "
                         f"differ, first {odd[0]!r}. Wrap the model as it was wrapped for it")
