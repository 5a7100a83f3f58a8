"""Compressed sparse rows (CSR): store only the nonzero weights, and their columns.

    row i of W:  values[crow[i] : crow[i+1]]  in the columns  col[crow[i] : crow[i+1]]
    Saad 2003, "Iterative Methods for Sparse Linear Systems", 2nd ed., section 3.4

    code      Saad's name    shape        dtype
    values    AA             (nnz,)       the model's
    col       JA             (nnz,)       int32, rising within a row
    crow      IA             (out + 1,)   int32

Cost: 4 bytes for the column of each value, and 4 for each row. In float32 CSR saves
memory above 50% zeros, in bfloat16 above 67%. On a CPU it is faster than a dense
float32 product from about 75% zeros on. No accuracy is lost, because W itself is
stored: prune and merge first. LoRA fills the zeros, so it cannot be merged into such a
leaf, unless `anyway`.

torch has `torch.sparse_csr_tensor`, but a Parameter of that kind breaks `.to`, deepcopy
and safetensors. So this format keeps three ordinary buffers and makes the sparse view
at each call (some microseconds). The product (`csr.py`) is one operator of our own. So
torch.compile sees no sparse internals, and a model in half precision (or under
autocast) computes in float32, as the CPU has only that. Not included: a gradient for
the values, blocks, and CUDA's 2:4 pattern.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> pruned = minillm.prune.merge(minillm.prune.wrap(model, sparsity=0.75))(x)
>>> torch.allclose(minillm.sparse.wrap(model)(x), pruned, atol=1e-6), model[0].values.numel()
(True, 16)
"""

import torch

from minillm import ops, options
from minillm.sparse.csr import csr_matmul
from minillm.registry import Format, dense, hidden_linears, select
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class CSR(Format):
    variable = ("col", "values")

    def __init__(self, site, anyway=False):
        self.anyway = options.flag("anyway", anyway)
        super().__init__(site)

    def allocate(self, device):
        for key, n, dtype in (("crow", self.shape[0] + 1, torch.int32), ("col", 0, torch.int32),
                              ("values", 0, self.dtype)):
            self.register_buffer(key, torch.zeros(n, dtype=dtype, device=device))

    def pack(self, W):
        W = W.to(self.dtype)
        crow = torch.cat([W.new_zeros(1, dtype=torch.long), (W != 0).sum(1).cumsum(0)])
        rows, columns = W.nonzero(as_tuple=True)  # sorted by row
        self.crow, self.col = crow.to(torch.int32), columns.to(torch.int32)
        self.values = W[rows, columns]

    def rows(self):
        """The row of each value, (nnz,)."""
        every = torch.arange(self.shape[0], device=self.col.device)
        return every.repeat_interleave(self.crow.diff().long(), output_size=self.col.numel())

    def dense(self):
        W = self.values.new_zeros(self.shape)
        W[self.rows(), self.col.long()] = self.values
        return W

    def rounding(self):
        """0 for a kept value; infinity for a zero, which may be a pruned weight."""
        return torch.where(self.dense() == 0, torch.inf, 0.0)

    def forward(self, x):
        x = ops.in_autocast(x)
        rows = x.reshape(-1, self.shape[1])  # (..., in) -> (n, in)
        y = csr_matmul(self.crow, self.col, self.values, rows, self.shape[0])
        y = y.view(*x.shape[:-1], self.shape[0])  # works for 0 rows too
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def check(self, where):
        n, counts, col = self.values.numel(), self.crow.diff(), self.col
        whole = self.crow[0] == 0 and self.crow[-1] == n == col.numel()
        if not whole or (counts < 0).any() or (col < 0).any() or (col >= self.shape[1]).any():
            raise ValueError(f"{where}: crow, col and values contradict each other for a "
                             f"{self.shape} matrix")
        same_row = self.rows().diff() == 0
        if (same_row & (col.diff() <= 0)).any():
            raise ValueError(f"{where}: the columns of a row do not rise: one is out of order or "
                             "repeated")

    def pays(self, where):
        if not self.anyway:
            smaller(where, self.shape, self.values.numel(), self.dtype,
                    "Unwrap sparse first, or wrap it with anyway=True")


def smaller(where, shape, kept, dtype, remedy):
    """ValueError if CSR needs more bytes than dense, with so many values kept."""
    n, size = shape[0] * shape[1], dtype.itemsize
    csr, dense = kept * (size + 4) + 4 * (shape[0] + 1), n * size
    if csr > dense:
        raise ValueError(f"{where!r} has {1 - kept / n:.0%} zeros: CSR would take {csr:,} bytes, "
                         f"and {dtype} takes {dense:,}. CSR is smaller only above "
                         f"{4 / (size + 4):.0%} zeros. {remedy}")


def wrap(model, targets=None, *, anyway=False):
    """Store the leaves that `targets` names (see `registry.select`) in CSR; returns the model.

    By default every linear leaf but the output head and tied matrices. ValueError,
    unless `anyway`, where CSR would take more bytes than the dense matrix: prune and
    merge first. The same check applies to later merges into CSR.
    """
    options.flag("anyway", anyway)
    for site in () if anyway else select(model, targets, CSR.accepts, hidden_linears(model)):
        W, _ = dense(site.module)
        smaller(site.name, W.shape, int((W != 0).sum()), W.dtype,
                "Prune and merge first, or give anyway=True")
    return attach(CSR, model, targets, anyway=anyway)


unwrap, merge, unmerge, save, load = verbs("sparse", CSR)
method("sparse", wrap, does="stores only the nonzero weights (CSR)", paper="Saad 2003",
       small={"": dict(anyway=True)})
