"""Float32 copies of the parameters that learn in half precision ("master weights").

    copy       <- AdamW(copy, gradient in float32)
    parameter  <- the copy, rounded

bfloat16 has 8 significant bits, so a step below 1/512 of a weight rounds to no step at all: at a
learning rate of 1e-5 almost no weight would ever change. In float16, AdamW's eps of 1e-8 is 0, and
its first step may divide 0 by 0. The copy adds up the small steps, and the gradients of all
micro-batches. The model computes in its own dtype.

Micikevicius et al. 2018, arXiv 1710.03740, section 3.1. Its scaling of the loss (3.2) is not
included: gradients below 6e-8 are 0 in float16, so prefer bfloat16.

Cost, for each parameter in half precision: 18 bytes (the parameter 2, the copy 4, its gradient 4,
AdamW's moments 8). Without the copy it would be 8, and float32 throughout needs 16. A parameter of
float32 or float64 has no copy.
"""

import contextlib

import torch


def copies(learning):
    """{parameter: its float32 copy} for parameters of less than float32; learning: [(name, p)]."""
    return {p: p.detach().float() for _, p in learning if p.dtype.itemsize < 4}


def collect(masters):
    """Add the gradients of the parameters to those of their copies, and free them."""
    for p, copy in masters.items():
        if p.grad is not None:
            copy.grad = p.grad.float() if copy.grad is None else copy.grad.add_(p.grad)
            p.grad = None


@contextlib.contextmanager
def shown(masters):
    """Give each parameter its gradient inside, for code that reads or changes gradients or weights.

    An element that the code changes replaces the element of the copy. All other elements keep
    their float32 value, of which the parameter holds only the rounding.
    """
    for p, copy in masters.items():
        p.grad = None if copy.grad is None else copy.grad.to(p.dtype)
    yield
    with torch.no_grad():
        for p, copy in masters.items():
            if p.grad is None or copy.grad is None:
                copy.grad = None if p.grad is None else p.grad.float()
            else:
                take(copy.grad, p.grad)
            take(copy, p)
            p.grad = None


def take(copy, rounded):
    """Take the elements of `rounded` that are no longer the rounded value of the copy."""
    copy.copy_(torch.where(rounded == copy.to(rounded.dtype), copy, rounded.float()))


@torch.no_grad()
def write_back(masters):
    """Round the copies to the parameters."""
    for p, copy in masters.items():
        p.copy_(copy)
