"""The product x Wᵀ with a CSR matrix W, as one operator with its gradient for x.

    forward:   y  = x Wᵀ    by torch's sparse product         x (n, in), W (out, in), y (n, out)
    backward:  dx = dy W    with a temporary dense W

Autograd keeps only the three buffers for the backward. torch.compile sees one operator.
"""

import warnings

import torch
from torch import Tensor

from minillm import ops

with warnings.catch_warnings(action="ignore"):  # torch warns once that the layout is in beta
    torch.zeros(1, 1).to_sparse_csr()


def view(crow, col, values, shape):
    """The torch sparse matrix (out, in); half precision becomes float32.

    The CPU has no sparse product in half precision.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_csr_tensor(crow, col, values, shape)


@torch.library.custom_op("minillm::csr_matmul", mutates_args=())
def csr_matmul(crow: Tensor, col: Tensor, values: Tensor, x: Tensor, out: int) -> Tensor:
    """x (n, in) times Wᵀ -> (n, out), in the dtype of x."""
    with ops.without_autocast(x):
        W = view(crow, col, values, (out, x.shape[1]))
        v = x.to(W.dtype)
        y = (W @ v[0])[None] if len(x) == 1 else (W @ v.T).T  # a vector is three times as fast
        return y.to(x.dtype, copy=True, memory_format=torch.contiguous_format)


@csr_matmul.register_fake
def _(crow, col, values, x, out):
    return x.new_empty(x.shape[0], out)


@torch.library.custom_op("minillm::csr_matmul_transposed", mutates_args=())
def csr_matmul_transposed(crow: Tensor, col: Tensor, values: Tensor, grad: Tensor, out: int,
                          into: int) -> Tensor:
    """grad (n, out) times W -> (n, in), in the dtype of grad."""
    with ops.without_autocast(grad):
        W = view(crow, col, values, (out, into)).to_dense()
        return grad.to(W.dtype).mm(W).to(grad.dtype)


@csr_matmul_transposed.register_fake
def _(crow, col, values, grad, out, into):
    return grad.new_empty(grad.shape[0], into)


def _setup(ctx, inputs, output):
    crow, col, values, x, out = inputs
    ctx.save_for_backward(crow, col, values)
    ctx.shape = (out, x.shape[1])


def _backward(ctx, grad):
    return None, None, None, csr_matmul_transposed(*ctx.saved_tensors, grad, *ctx.shape), None


csr_matmul.register_autograd(_backward, setup_context=_setup)
