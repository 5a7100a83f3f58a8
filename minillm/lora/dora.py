"""DoRA: LoRA for the direction of each row of a weight, and a number for its length.

Full fine-tuning changes the length and the direction of a row of W almost
independently. LoRA changes both together. DoRA learns them apart.

    1. V  = W + s B A                          the direction, as LoRA changes it
    2. W' = m * V / ||V||                      each row has the length m

                                Liu et al. 2024, "DoRA", arXiv 2402.09353, equation 5

    code       paper       shape        at birth
    A, B       A, B        (r, in), (out, r)    as in LoRA: B is zero
    m          m           (out,)       ||W||, the norm of each row, so that nothing changes
    norm       ||V||_c     (out,)       no gradient flows through it (section 4.3)

The paper writes W as (in, out), so its columns are our rows: one per output.

Every step needs ||V||. V is a full matrix, but its norm can be computed without it:

    ||V||^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B . (B A A^T)        row by row

where B, W A^T and B A A^T are (out, r). So the output is

    W' x + b = (m / ||V||) * (W x + s B A x) + b

Where V is zero in a whole row, ||V|| is 0 and the row has no direction. There m / ||V||
counts as 1, so the row of W' is that of V, zero. A row of zeros in W, or one that a mask
empties, begins so, with m = 0. Its B learns first and gives it a direction, and then m.

Cost: LoRA's, `out` more parameters a leaf, and one pass over W for the norm in each
step. Merged, it costs nothing. peft computes s B A, adds W, and takes the norm of the
sum. Its dropout also drops inputs of W, ours only inputs of the branch; without dropout
the two are equal.

Over a format, W is made dense for the norm. Not included: embeddings.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.dora.wrap(model, r=2)
>>> torch.allclose(model(x), before, atol=1e-6)                         # nothing changes at birth
True
>>> with torch.no_grad():
...     _ = model[0].patches["dora"].B.normal_()
>>> W, _ = model[0].dense()
>>> torch.allclose(W.norm(dim=1), model[0].patches["dora"].m)           # the length is m for any B
True
"""

import torch

from minillm.lora import LoRA
from minillm.registry.attach import attach
from minillm.registry.kinds import Patch
from minillm.registry.table import method, register


class DoRA(LoRA):
    additive = False
    reads = True
    accepts = Patch.accepts

    def __init__(self, site, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0):
        super().__init__(site, r, alpha, rank_stabilized, dropout)
        self.m = site.new(site.shape[0])

    @torch.no_grad()
    def fill(self, site):
        super().fill(site)
        self.m.copy_(self.norm(site.dense()[0]))

    @torch.no_grad()
    def norm(self, W):
        """||W + s B A|| of each row, (out,), in float32 or float64, without a gradient.

        The square of a row's norm may be beyond float16.
        """
        dtype, s = torch.promote_types(self.A.dtype, torch.float32), self.scale
        W, A, B = W.to(dtype), self.A.to(dtype), self.B.to(dtype)
        squares = torch.linalg.vector_norm(W, dim=1) ** 2  # (out,)
        squares += 2 * s * (B * (W @ A.T)).sum(1)
        squares += s**2 * (B @ (A @ A.T) * B).sum(1)
        return squares.clamp(min=0).sqrt()

    def lengths(self, W):
        """m / ||W + s B A|| of each row, (out,); 1 where the row is zero."""
        norm = self.norm(W)
        zero = norm == 0
        return torch.where(zero, 1, self.m / norm.masked_fill(zero, 1))  # no gradient is nan

    def forward(self, below, x):
        W, b = below.dense()
        scale = self.lengths(W)
        y = below(x)
        y = y if b is None else y - b.to(y.dtype)  # W x
        y = scale.to(y.dtype) * (y + self.branch(below, x, y.dtype))
        return y if b is None else y + b.to(y.dtype)

    def fold(self, W, b):
        V = W + self.scale * self.B @ self.A
        return (self.lengths(W)[:, None] * V).to(W.dtype), b


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0):
    """Put DoRA around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only A, B and m learn afterwards. name: by default "dora". r: the
    rank; where a leaf's smaller side is less, that side. alpha: s = alpha / r;
    rank_stabilized: s = alpha / sqrt(r). dropout: of the branch's input, in training.
    ValueError for an r above both sides of a leaf, an alpha that is not above 0, and a
    dropout outside of 0 <= d < 1.
    """
    return attach(DoRA, model, targets, name=name, r=r, alpha=alpha,
                  rank_stabilized=rank_stabilized, dropout=dropout)


register("dora", DoRA, family="lora")
method("dora", wrap, does="LoRA for each weight's direction, and its length apart",
       paper="Liu et al. 2024, arXiv 2402.09353", rates=dict(tiny=6e-3, smollm2=2e-3),
       small={"": dict(r=4), "stable": dict(r=2, alpha=3.0, rank_stabilized=True)})
