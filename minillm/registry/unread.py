"""The weight of a Layer whose patches fold into no matrix now: code may ask what kind it is.

T5 asks `wo.weight.dtype` at each call, and then calls `wo`. nn.MultiheadAttention computes with
`out_proj.weight`. Where a patch folds into a weight, both get the folded one. Where it does not (an
adapter with a nonlinearity, LoRA with dropout, an adapter of some rows), both get an `Unread`: the
question is answered, and the computation is an error.
"""

import torch

ASKED = {getattr(torch.Tensor, name).__get__
         for name in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")}
ASKED |= {torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.size, torch.Tensor.is_floating_point}


class Unread(torch.Tensor):
    """A tensor without values, of the shape, dtype and device of a weight."""

    why = ""  # there are no values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs or {})
        raise ValueError(next(one.why for one in found(args, kwargs) if isinstance(one, cls)))


def found(args, kwargs):
    """The arguments of a call, and the members of its lists and tuples."""
    for one in (*args, *(kwargs or {}).values()):
        yield from found(one, None) if isinstance(one, (list, tuple)) else (one,)


def unread(shape, dtype, device, why):
    """An Unread of this shape, dtype and device; a computation with it is a ValueError: why."""
    like = torch.empty(1, dtype=dtype, device=device).expand(shape)  # one number in memory
    new = torch.Tensor._make_subclass(Unread, like)
    new.why = why
    return new
