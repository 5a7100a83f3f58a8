"""The two openings of the training loop, `loss=` and `on_step=`.

    loss(model, ids, labels, mask)     the loss of a batch, summed over the tokens that it learns
    on_step(model, step, steps)        called for each step, counted from 0, between the backward
                                       pass and the optimizer's step

What `on_step` may do:

    read gradients       p.grad; in half precision they are rounded to the parameter's dtype
    leave a parameter    p.grad = None: the optimizer neither moves nor decays it in this step
    change gradients     p.grad.mul_(0.1), or p.grad = ...
    change weights       p.mul_(0.9), under torch.no_grad()
    change buffers       a patch's mask, for example, and those of the patch's options that it
                         names in `changes`

An `on_step` may have `settled(steps)`: the step after which the model is the one that was asked
for. The evaluations before it count neither as the best nor for `patience`. Otherwise the best
model of a gradual pruning would be the one that is not pruned yet.

A training that was interrupted goes on bit for bit if what it does follows from `step`, `steps`,
the weights and the buffers alone. So it keeps no count of its own. Checkpoints hold the patches'
buffers and options, and a resumed training has to be given the same functions: a dataclass is
compared with its fields, a `functools.partial` with its arguments, a function by its name.
"""

import dataclasses
import functools

import torch
from torch import nn

from minillm.registry import fingerprint
from minillm.train import identity


def check(loss, examples):
    """ValueError where a loss cannot take the examples: it may have `check(examples)`."""
    if hasattr(loss, "check"):
        loss.check(examples)


def checked(part):
    """The loss of a batch. ValueError where it is no single number that has a gradient."""
    if not isinstance(part, torch.Tensor) or part.numel() != 1:
        what = f"of the shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else ""
        raise ValueError(f"loss= gives a {type(part).__name__} {what}".rstrip() + ": it has to be "
                         "one number, the sum over the tokens that the batch learns")
    if not part.requires_grad:
        raise ValueError("loss= gives a number without a gradient: nothing that learns has made it")
    return part


def settled(on_step, steps):
    """The first step, counted from 0, whose evaluation counts; the last one always does."""
    return min(on_step.settled(steps), steps - 1) if hasattr(on_step, "settled") else 0


def named(function):
    """What a checkpoint writes down of a function, to know it again; None for None."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        given = [text_of(value) for value in function.args]
        given += [f"{name}={text_of(value)}" for name, value in function.keywords.items()]
        return f"partial({', '.join([named(function.func), *given])})"
    if not dataclasses.is_dataclass(function):
        module = getattr(function, "__module__", type(function).__module__)
        return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    fields = {f.name: getattr(function, f.name) for f in dataclasses.fields(function)}
    shown = ", ".join(f"{name}={text_of(value)}" for name, value in fields.items())
    return f"{type(function).__name__}({shown})"


def text_of(value):
    """The value; of a model, its name and a digest; of a function, its name and not its address."""
    if isinstance(value, nn.Module):
        return f"{fingerprint.name_of(value)} ({identity.digest_of(value)})"
    if isinstance(value, torch.Tensor):
        return f"a tensor ({identity.digest({'': value})})"
    return named(value) if callable(value) and not isinstance(value, type) else repr(value)
