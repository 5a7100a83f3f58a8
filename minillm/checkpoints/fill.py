"""Build a Transformer from a configuration and named tensors, for every kind of checkpoint.

The model is built without memory (on the meta device) and filled one tensor at a time, so the peak
is about one copy of the weights. Every parameter needs a tensor of its shape, and every tensor must
be used: a tensor that is missing or left over is an error.
"""

import torch
from torch import nn

from minillm.model.transformer import Transformer


def fill(config, parts, dtype, device, source):
    """The Transformer of `config`, in eval mode.

    parts: {name of a parameter: function that returns its tensor}, called one after the other.
    dtype: None takes the type of the first tensor for all. ValueError, which names `source`, if
    names, shapes or types do not fit.
    """
    if config.layers > len(parts):
        raise ValueError(f"{source} says that it has {config.layers} layers, but it holds "
                         f"{len(parts)} tensors")
    model = empty(config, source)
    shapes = shapes_of(model, config.tied)
    held = set(parts) - ({"lm_head.weight"} if same_head(config, parts, source) else set())
    check_names(shapes, held, source)
    wrong = []
    for name, shape in shapes.items():
        t = parts[name]()
        if tuple(t.shape) != shape or not t.is_floating_point():
            wrong.append(f"{name} is {tuple(t.shape)} of {t.dtype}, should be {shape}")
            continue
        dtype = dtype or t.dtype
        owner, _, key = name.rpartition(".")
        t = cast(t, device, dtype, f"{source}: {name}")
        setattr(model.get_submodule(owner), key, nn.Parameter(t))
        del t
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors have another shape or are not floats: "
                         f"{'; '.join(wrong[:4])}")
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def cast(t, device, dtype, where):
    """A copy of the tensor; ValueError if a number becomes infinite in the dtype."""
    new = t.to(device=device, dtype=dtype, copy=True).contiguous()
    if new.isinf().any() and not t.isinf().any():
        names = [str(one).removeprefix("torch.") for one in (dtype, t.dtype)]
        raise ValueError(f"{where} holds {t.abs().max().item():.3g}, which is beyond {names[0]} "
                         f"(at most {torch.finfo(dtype).max:.3g}): load it as {names[1]}")
    return new


def empty(config, source="this configuration"):
    """The Transformer of `config` without memory for its weights."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except RuntimeError as error:
        raise ValueError(f"{source} describes a model beyond any memory: {config}") from error


def shapes_of(model, tied):
    """{name: shape} of the parameters; a tied model's head is left out."""
    every = model.named_parameters(remove_duplicate=False)
    return {name: tuple(p.shape) for name, p in every if not (tied and name == "lm_head.weight")}


def same_head(config, parts, source):
    """Whether a file of a tied model also holds the head; ValueError if it differs."""
    if not (config.tied and {"lm_head.weight", "embed_tokens.weight"} <= set(parts)):
        return False
    if not torch.equal(parts["lm_head.weight"](), parts["embed_tokens.weight"]()):
        raise ValueError(f"{source} says that head and embedding are one matrix, but holds two "
                         "that differ")
    return True


def check_names(wanted, held, source):
    """ValueError, which names some of the differences, if two sets of names differ."""
    missing, extra = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if missing or extra:
        raise ValueError(f"{source} does not fit its configuration: " + "; ".join(
            f"{what} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for what, names in (("it lacks", missing), ("it also holds", extra)) if names))


def check_tokenizer(tokenizer, rows, source):
    """ValueError if a tokenizer gives ids beyond the `rows` of the embedding."""
    if tokenizer is None:
        return
    tokenizer.check_size(rows, source)
    for name in ("eos", "bos", "pad"):
        i = getattr(tokenizer, name)
        if i is not None and not 0 <= i < rows:
            raise ValueError(f"{source}: the tokenizer's {name} is {i}, but the model's embedding "
                             f"has {rows} rows")
