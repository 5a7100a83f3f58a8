"""What a training changes in the model: tensors, and the options of patches.

    model.*     what learns
    buffer.*    the model's own buffers (BatchNorm's running statistics)
    patch.*     buffers of patches (masks), where `on_step` may change them
    options     {place of a patch: its options}, where `on_step` may change them: a mask's sparsity

A checkpoint holds all of it, and a copy of it is kept for the best step so far.
"""

import json

import torch

from minillm.registry import layers
from minillm.registry.learning import buffers
from minillm.train.identity import own_buffers


def state(run):
    """{name: tensor} of all that the training changes in the model."""
    found = {f"model.{name}": p.detach() for name, p in run.learning}
    found |= {f"buffer.{name}": b for name, b in buffers(run.model)}
    for place, patch in changeable(run).items():
        found |= {f"patch.{place}.{key}": b for key, b in own_buffers(patch).items()}
    return found


def changeable(run):
    """{place: patch} of the patches that `on_step` may change."""
    if run.options.on_step is None:
        return {}
    return {f"{where}.{name}": patch for where, layer in layers(run.model).items()
            for name, patch in layer.patches.items()}


def changing(run):
    """{place: {option: value}} of the `changeable` patches, as JSON gives it back."""
    found = {place: patch.config() for place, patch in changeable(run).items()}
    return json.loads(json.dumps(found))


def same_patches(run, facts):
    """Whether a file's facts have the same options for the same patches as this model."""
    ours = changing(run)
    # A checkpoint of an earlier minillm lacks them.
    return all(names(facts.setdefault(key, ours)) == names(ours)
               for key in ("options", "best_options"))


def names(options):
    return {place: set(each) for place, each in options.items()}


def copies(run):
    """[(name in the file, float32 copy)] of the parameters that learn in half precision."""
    return [(f"optimizer.master.{name}", run.masters[p]) for name, p in run.learning
            if p in run.masters]


def snapshot(run):
    """A copy of all that the training changes, for `put_back`: (tensors, options)."""
    return {name: t.clone() for name, t in state(run).items()}, changing(run)


@torch.no_grad()
def put_back(run, kept):
    """Put (tensors, options) back into the model.

    Tensors are whole, or spread over the processes as the model is.
    """
    tensors, options = kept
    for name, t in state(run).items():
        if any(step == 0 and n > 1 for step, n in zip(t.stride(), t.shape)):
            t.data = tensors[name].clone()  # made by `expand`: its elements share memory
        else:
            t.copy_(tensors[name])
    now = changing(run)
    for place, patch in changeable(run).items():
        for key, value in options[place].items():
            if value != now[place][key]:
                setattr(patch, key, value)
