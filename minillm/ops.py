"""The product x Wᵀ where W is not kept: W is made from what is stored, in the forward and again in the backward.

    y = x Wᵀ        dx = dy W        dW = dyᵀ x          x (..., in), W (out, in), y (..., out)

For dx autograd keeps the W that the forward used. Where W is a parameter that costs
nothing. Where W was made for this one product (int8 turned to floats, a weight times its
mask) it is a whole dense matrix for each leaf, kept from the forward to the backward: more
than all that LoRA keeps. The functions below keep what W is made from, and make it
again. The price is that small computation a second time.

`remade` does so for any W, by checkpointing, which has some overhead. The other three are its
quick forms: for a W that does not learn, for the product of a parameter and a mask, and for a
parameter that is rounded. Each is differentiable twice, since its backward is made of ordinary operations. In code that
torch.compile makes they checkpoint too: left alone, the compiler keeps a W that goes into a
matrix product."""

import contextlib

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def linear(x, W, b=None):
    """x Wᵀ + b: x (..., in), W (out, in) -> (..., out).

    A single row, in code that torch.compile makes for a CPU, is written as multiply and sum: that is fused with what makes W (a
    conversion from int8) and reads it at the speed of memory, where the library's matrix product reaches a third of it.
    """
    if single(x):
        y = (W * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
        return y if b is None else y + b
    return F.linear(x, W, b)


def single(x):
    """Whether x (..., in) is one row, in code that torch.compile makes for a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]


def words_fit(x, q):
    """Whether `row_of_codes` is the way: one row x without a gradient, whole words in a row of q."""
    learns = torch.is_grad_enabled() and x.requires_grad
    whole = q.shape[1] % 4 == 0 and q.is_contiguous()
    return single(x) and not learns and whole and x.dtype != torch.float64


def row_of_codes(x, q, width, zero=0):
    """x (C - zero)ᵀ for one row x (..., in) and the codes C (out, in) in q: (out,), in float32.

    q (out, in * width / 8): int8, or uint8 packed as `quant.grid.pack` does. zero: a number, or
    (out, 1) of int32. For code that torch.compile makes for a CPU; elsewhere it is right, and slow.

    Four bytes are read as one word, and shifts take the codes out of it. Written as q * x, each
    step of the sum reads only as many bytes as fit a vector once they are floats, and waits for
    the step before it. The words are loaded as floats and then taken for integers, because torch's
    AVX2 vectors load integers by way of the stack.
    """
    parts, k = 8 // width, q.shape[1]
    words = q.view(torch.float32).view(torch.int32)  # (out, k / 4)
    x = x.float().reshape(parts, k // 4, 4).permute(2, 0, 1)  # -> (4, parts, k / 4): by byte, part
    x = x.clone(memory_format=torch.contiguous_format)
    x = x.as_strided(x.shape, x.stride())  # makes the compiler store x: each row of q reads it
    total = 0.0
    for byte in range(4):
        for part in range(parts):
            low = 8 * byte + width * part  # the code's lowest bit
            if q.dtype == torch.int8:
                codes = words << 24 - low >> 24  # keeps the sign
            else:
                codes = words >> low & 2**width - 1
            codes = codes if type(zero) is int and zero == 0 else codes - zero
            total = total + codes.float() * x[byte, part]
    return total.sum(-1)


def remade(function, x):
    """function(x), of which only x is kept: the backward computes it again, the same each time."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def remade_linear(x, make):
    """x Wᵀ, where W = make() does not learn: the backward calls `make` again. x (..., in) -> (..., out).

    `make` returns W (out, in) in the dtype of x, and the same W at every call.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return linear(x, make())
    if torch.compiler.is_compiling():
        return remade(lambda x: linear(x, make()), x)
    return _Remade.apply(x, make)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, make):
        ctx.make = make
        return linear(x, make())

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.make(), None


def masked_linear(x, W, mask):
    """x (mask * W)ᵀ, where W may learn: W and mask are kept, and not their product. x (..., in) -> (..., out)."""
    def product(x):
        return linear(x, (W * mask).to(x.dtype))

    if not torch.is_grad_enabled():
        return product(x)
    if torch.compiler.is_compiling():
        return remade(product, x)
    return _Masked.apply(x, W, mask)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, mask):
        ctx.save_for_backward(x, W, mask)
        return linear(x, (W * mask).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, W, mask = ctx.saved_tensors
        dx = dy @ (W * mask).to(dy.dtype) if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (n, out)ᵀ (n, in) -> (out, in)
            dW = dW.to(W.dtype) * mask
        return dx, dW, None


def straight(W, new):
    """`new`, bit for bit, with the gradient of W (Bengio et al. 2013, arXiv 1308.3432)."""
    return new.detach() + (W - W.detach())


def straight_linear(x, W, change):
    """x change(W)ᵀ, with W's gradient of x Wᵀ: the backward calls `change` again.

    x (..., in) -> (..., out). `change` returns another matrix (out, in), the same at every call. W may learn.
    """
    def product(x):
        return linear(x, straight(W, change(W)).to(x.dtype))

    if not torch.is_grad_enabled():
        return product(x)
    if torch.compiler.is_compiling():
        return remade(product, x)
    return _Straight.apply(x, W, change)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, change):
        ctx.save_for_backward(x, W)
        ctx.change = change
        return linear(x, change(W).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        dx = dy @ straight(W, ctx.change(W)).to(dy.dtype) if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (n, out)ᵀ (n, in) -> (out, in)
            dW = dW.to(W.dtype)
        return dx, dW, None


def in_autocast(x):
    """x in the dtype that autocast chooses for a matrix product, where autocast is on; else x itself."""
    if autocasts(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def without_autocast(x):
    """A context in which autocast leaves the dtypes of the device of x alone."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def autocasts(x):
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
