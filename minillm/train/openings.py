"""The two functions that a user can give to the training loop, `loss=` and `on_step=`.

    loss(model, ids, labels, mask)     the loss of a batch, summed over the tokens that it learns
    on_step(model, step, steps)        called for each step, counted from 0, between the backward
                                       pass and the optimizer's step

What `on_step` may do:

    read gradients       p.grad; in half precision they are rounded to the parameter's dtype
    leave a parameter    p.grad = None: the optimizer neither moves nor decays it in this step
    change gradients     p.grad.mul_(0.1), or p.grad = ...
    change weights       p.mul_(0.9), under torch.no_grad()
    change buffers       for example a patch's mask, and the options of a patch that `on_step`
                         names in its attribute `changes`

An `on_step` may have a method `settled(steps)`, which gives the step after which the model is the
one that the user wants. The evaluations before it count neither as the best nor for `patience`.
Otherwise the best model of a gradual pruning would be the one that is not pruned yet.

It may have a method `around(model, step, steps)`, a context in which the forward and the backward
pass of the step run: gradual unfreezing lets the parameters that wait have no gradient there. It
is not used in several processes, because DDP waits for the gradient of every parameter.

It may have a method `after(model, step, steps)`, called after the optimizer's step: AdaLoRA takes
ranks away there, because the optimizer would move at once what was set to 0 before its step.

It may have a method `check(model)` too, and a `loss` a method `check(examples)`. `train` calls them
before the first step; a ValueError says what they cannot take.

An interrupted training resumes bit for bit if the actions of `on_step` follow from `step`, `steps`,
the weights and the buffers alone. So it must keep no count of its own. Checkpoints hold the
patches' buffers and options, and a resumed training needs the same functions: a dataclass is
compared by its fields, a `functools.partial` by its arguments, a function by its name.
"""

import contextlib
import dataclasses
import functools

import torch
from torch import nn

from minillm import distributed
from minillm.registry import fingerprint, instead
from minillm.train import identity, masters


def check(options, model, examples):
    """Call `loss.check(examples)` and `on_step.check(model)`, where they have it.

    ValueError if the loss cannot take the examples, or `on_step` the model; and if the loss of the
    next tokens is asked of a model that predicts none.
    """
    loss, on_step = options.loss, options.on_step
    if loss is None or options.held_out is not None:
        what = "the held-out loss (see evaluate=)" if loss else "training without loss="
        instead.check_tokens(instead.replacing(model), what)
    if hasattr(loss, "check"):
        loss.check(examples)
    if hasattr(on_step, "check"):
        on_step.check(model)


def checked(part):
    """The loss of a batch. ValueError unless it is one number that has a gradient."""
    if not isinstance(part, torch.Tensor) or part.numel() != 1:
        what = f"of the shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else ""
        raise ValueError(f"loss= gives a {type(part).__name__} {what}".rstrip() + ": it has to be "
                         "one number, the sum over the tokens that the batch learns")
    if not part.requires_grad:
        raise ValueError("loss= gives a number without a gradient: it depends on no parameter that "
                         "learns")
    return part


def around(on_step, model, step, steps):
    """The context of the forward and the backward pass of a step."""
    if hasattr(on_step, "around") and distributed.place()[1] == 1:
        return on_step.around(model, step, steps)
    return contextlib.nullcontext()


def after(run, step):
    """Call `on_step.after`, where it has it. The gradients are gone by then."""
    if hasattr(run.options.on_step, "after"):
        with masters.shown(run.masters):
            run.options.on_step.after(run.model, step, run.options.steps)


def settled(on_step, steps):
    """The first step, counted from 0, whose evaluation counts; the last one always does."""
    return min(on_step.settled(steps), steps - 1) if hasattr(on_step, "settled") else 0


def named(function):
    """The text by which a checkpoint recognizes a function; None for None, a text for itself."""
    if function is None or isinstance(function, str):
        return function
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
    """The value as text; a model as its name and a digest, a function as its name."""
    if isinstance(value, nn.Module):
        return f"{fingerprint.name_of(value)} ({identity.digest_of(value)})"
    if isinstance(value, torch.Tensor):
        return f"a tensor ({identity.digest({'': value})})"
    return named(value) if callable(value) and not isinstance(value, type) else repr(value)
