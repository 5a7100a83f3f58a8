"""LoRA's step with its products fused: the sums of the plain step happen inside the products.

    plain    y = W x + b;  z = s B A x;  y + z              `LoRA.forward`, by autograd
    fused    y = W x + b;  y += s (A x) Bᵀ                  one product adds into y

The plain step writes z and then a sum, each as large as the output. In the backward pass
it writes two gradients of x, W's and A's, and their sum. Here a product adds to what is
there (`addmm` of BLAS), so a leaf makes one pass over its output and one over the
gradient of its input:

    u  = A x                              the forward pass keeps x and u
    g  = s Bᵀ dy                          (n, r)
    dx = Wᵀ dy + Aᵀ g                     the second product adds into the first
    dA = gᵀ x            dB = s dyᵀ u

    code     formula    shape, for n tokens
    x, u     x, A x     (n, in), (n, r)
    dy, g               (n, out), (n, r)

Values and gradients equal the plain step's, up to rounding: tests/test_fused.py.

`suits` says where it applies: in training, at a dense nn.Linear or Conv1D that does not
learn and that nothing else is wrapped around beneath LoRA, without dropout. Elsewhere
the plain step runs: in compiled code, under autocast, and where each row has its own
adapters.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules import module

from minillm.ops import autocasts
from minillm.registry.hooks import TABLES

EVERYWHERE = [module._global_forward_hooks, module._global_forward_pre_hooks,
              module._global_backward_hooks, module._global_backward_pre_hooks]


def suits(lora, below, x):
    """Whether `step` computes what the plain step of this LoRA over `below` does."""
    if lora.lookup or lora.random or lora.rows is not None or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or autocasts(x):
        return False
    leaf = below.alone()
    if leaf is None or leaf.weight.dtype != x.dtype:
        return False
    plain = {type(x), type(leaf.weight)} <= {torch.Tensor, torch.nn.Parameter}  # no DTensor
    learns = any(p.requires_grad for p in leaf.parameters())
    watched = any(leaf.__dict__[table] for table in TABLES) or any(map(len, EVERYWHERE))
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return plain and not (learns or watched or transformed)


def step(x, W, b, A, B, scale):
    """W x + b + scale B A x: x (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r)."""
    return Fused.apply(x, W, b, A.to(x.dtype), B.to(x.dtype), scale)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, A, B, scale):
        u = rows(x) @ A.T  # (n, r)
        y = F.linear(rows(x), W, b)  # (n, out)
        y.addmm_(u, B.T, alpha=scale)
        ctx.save_for_backward(x, W, A, B, u)
        ctx.scale = scale
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, u = ctx.saved_tensors
        dx = dA = dB = None
        if torch.is_grad_enabled():  # create_graph=True: u depends on x and A
            u = rows(x) @ A.T
        dy = rows(dy)  # (n, out)
        g = ctx.scale * (dy @ B)  # (n, r)
        if ctx.needs_input_grad[0]:
            dx = (dy @ W).addmm_(g, A).view(x.shape)  # (n, out) (out, in) + (n, r) (r, in)
        if ctx.needs_input_grad[3]:
            dA = g.T @ rows(x)  # (r, n) (n, in)
        if ctx.needs_input_grad[4]:
            dB = ctx.scale * (dy.T @ u)  # (out, n) (n, r)
        return dx, None, None, dA, dB, None


def rows(t):
    """(..., width) -> (n, width)"""
    return t.reshape(-1, t.shape[-1])
