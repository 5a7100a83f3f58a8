"""The product x Wᵀ without keeping W: forward and backward each make W anew.

    y = x Wᵀ        dx = dy W        dW = dyᵀ x          x (..., in), W (out, in), y (..., out)

For dx autograd keeps the W that the forward used. Where W is a parameter, that costs
nothing. Where W was made for this one product (int8 turned to floats, a weight times
its mask), autograd keeps a whole dense matrix for each leaf from the forward to the
backward, which is more than all that LoRA keeps. The functions below keep what W is
made from, and make W a second time. The price is that small computation.

`remade` does so for any W, by checkpointing, which has some overhead. `remade_linear`,
`masked_linear` and `straight_linear` have less: they are for a W that does not learn,
for a parameter times a mask, and for a parameter that is rounded. Each is
differentiable twice, because its backward consists of ordinary operations. In compiled
code they checkpoint too, because the compiler would otherwise keep a W that goes into a
matrix product.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# The devices that have an autocast; asked once, because the question breaks a graph before
# torch 2.12.
AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia")
            if torch.amp.is_autocast_available(device)}
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x, W, b=None):
    """x Wᵀ + b: x (..., in), W (out, in) -> (..., out).

    In code that torch.compile makes for a CPU, the product of a single row is a
    multiplication and a sum. The compiler fuses them with the operation that makes W (a
    conversion from int8), and the loop reads W at the speed of memory. The library's
    matrix product reaches a third of that speed.
    """
    if single(x):
        y = (W * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
        return y if b is None else y + b
    return F.linear(x, W, b)


def single(x):
    """Whether x (..., in) is one row, in code that torch.compile makes for a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]


def words_fit(x, q):
    """Whether `row_of_codes` applies: one row x without a gradient, rows of whole words.

    With AVX-512, `linear` is as fast for int8: one instruction loads 16 codes as integers.
    """
    learns = torch.is_grad_enabled() and x.requires_grad
    whole = q.shape[1] % 4 == 0 and q.is_contiguous()
    fast = AVX512 and q.dtype == torch.int8 and x.dtype == torch.float32
    return single(x) and not learns and whole and not fast and x.dtype != torch.float64


def row_of_codes(x, q, width, zero=0):
    """x (C - zero)ᵀ for one row x (..., in) and the codes C (out, in) in q: (out,), in float32.

    q (out, in * width / 8): int8, or uint8 packed as `quant.grid.pack` does. width: 8,
    4 or 2. zero: a number, or (out, 1) of int32. For code that torch.compile makes for a CPU;
    elsewhere it is correct but slow.

    Four bytes are read as one word, and shifts take the codes out of it. Written as q *
    x, each step of the sum would read only as many bytes as fit a vector once they are
    floats, and wait for the step before it. The words are loaded as floats and then
    viewed as integers, because torch's AVX2 vectors load integers by way of the stack.
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
    """function(x), keeping only x: the backward calls `function` again.

    Both calls must give the same result; the random state is not restored.
    """
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def remade_linear(x, make):
    """x Wᵀ, where W = make() does not learn: the backward calls `make` again.

    x (..., in) -> (..., out). `make` returns W (out, in) in the dtype of x, and the
    same W at every call.
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
    """x (mask * W)ᵀ, where W may learn: x (..., in), W, mask (out, in) -> (..., out).

    Autograd keeps W and the mask, and not their product.
    """
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
            dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, n) (n, in)
            dW = dW.to(W.dtype) * mask
        return dx, dW, None


def straight(W, new):
    """`new` as it is, whose gradient goes to W (Bengio et al. 2013, arXiv 1308.3432)."""
    return new.detach() + (W - W.detach())


def straight_linear(x, W, change):
    """x change(W)ᵀ, with the gradient of x Wᵀ for W: x (..., in) -> (..., out).

    `change` returns a matrix (out, in), the same at every call; the backward calls it
    again. W may learn.
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
            dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, n) (n, in)
            dW = dW.to(W.dtype)
        return dx, dW, None


def in_autocast(x):
    """x in autocast's dtype for matrix products; x itself where autocast is off."""
    if autocasts(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def without_autocast(x):
    """A context without autocast on the device of x."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def autocasts(x):
    """Whether autocast is on for the device of x."""
    return x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)
