"""LoKr: learn a change of each weight that repeats a small matrix, each copy scaled.

The change is a Kronecker product: a grid of copies of D, and C[i,j] is the factor of
the copy at (i, j). Its rank is the product of the ranks of C and D.

    y = W x + b + s (C (x) D) x,      D = B2 A2 or whole,      C whole or B1 A1

                       Yeh et al. 2024, "LyCORIS", arXiv 2309.14859, section 3

    code      shape              at birth, as in peft
    C         (p, m)             zero, so that nothing changes
    D         (q, n)             kaiming uniform: U(-1/sqrt(n), 1/sqrt(n))
    B2, A2    (q, r), (r, n)     the same: U(-1/sqrt(r), 1/sqrt(r)), U(-1/sqrt(n), 1/sqrt(n))
    B1, A1    (p, r), (r, m)     zero, and U(-1/sqrt(m), 1/sqrt(m))
    scale     ()                 s = alpha / r

    out = p q,   in = m n        the rule of `pair`, by default as near the root as possible
    D = B2 A2                    where r is below half of the larger side of D
    C = B1 A1                    only with decompose_both, by the same rule

`forward` makes no (out, in) matrix. It views x (m n) as a matrix X (m, n):

    (C (x) D) x = C X D^T        (p, m) (m, n) (n, q) -> (p, q), which is y as a matrix

For the backward it keeps only x, and makes the products anew (see `change`).

Cost: p m + r (q + n) parameters a leaf. With sizes near the root that is far less than
LoRA's r (in + out): for 576 x 576 and r = 8 it is 960 and not 9,216. A token costs
m r (n + q) + p m q multiplications, and most of them again in the backward. Merged:
nothing. peft makes the whole change, and autograd keeps it: in * out multiplications a
token, as many as the leaf has, and as many numbers.

An embedding is a leaf whose input is one-hot. There the change of the id j is the
column C[:,k] (x) D[:,l] with j = k n + l. The row of `padding_idx` neither changes nor
learns.

As in peft, s is alpha / r also where C and D are whole. In LyCORIS s is 1 there. Not
included: peft's dropout of rows and of whole leaves, and convolutions.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.lokr.wrap(model, r=1)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> patch = model[0].patches["lokr"]
>>> C, D = nn.init.normal_(patch.C), patch.B2 @ patch.A2                # as if after training
>>> C.shape, D.shape
(torch.Size([2, 2]), torch.Size([4, 4]))
>>> torch.allclose(patch.change(), 16 * torch.kron(C, D))               # s = 16 / 1
True
"""

import math

import torch
from torch import nn

from minillm import options
from minillm.lora.change import Change, through
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method, register


def pair(size, factor=None):
    """(a, b) with a b = size: peft's rule, for C's side and D's side.

    a is `factor` if that divides size. Otherwise a is the largest divisor of size that
    is not above the root of size, nor above `factor`.
    """
    if factor and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    a = max(a for a in range(1, most + 1) if size % a == 0)
    return a, size // a


class LoKr(Change, Patch):
    def __init__(self, site, r=8, alpha=16.0, factor=None, decompose_both=False):
        super().__init__(site, options.whole("r", r), alpha)
        self.factor = None if factor is None else options.whole("factor", factor)
        self.decompose_both = options.flag("decompose_both", decompose_both)
        (p, q), (self.m, self.n) = (pair(size, self.factor) for size in site.shape)
        m, n = self.m, self.n
        if decompose_both and 2 * self.r < max(p, m):
            self.B1, self.A1 = site.new(p, self.r), site.new(self.r, m)
        else:
            self.C = site.new(p, m)
        if 2 * self.r < max(q, n):
            self.B2, self.A2 = site.new(q, self.r), site.new(self.r, n)
        else:
            self.D = site.new(q, n)

    def fill(self, site):
        for key, M in self.named_parameters():
            if key not in ("C", "B1"):
                nn.init.kaiming_uniform_(M, a=math.sqrt(5))

    def chains(self):
        """The matrices whose product is s C, and those of D, in the order in which they meet x."""
        C = [self.scale * self.A1, self.B1] if hasattr(self, "B1") else [self.scale * self.C]
        return C, [self.A2, self.B2] if hasattr(self, "B2") else [self.D]

    def change(self):
        """s C (x) D: (out, in)"""
        C, D = (chain[0] if len(chain) == 1 else chain[1] @ chain[0] for chain in self.chains())
        return torch.kron(C, D)

    def branch(self, x, dtype):
        """s C X D^T: (..., in) -> (..., out)"""
        C, D = self.chains()
        X = x.unflatten(-1, (self.m, self.n))  # (..., m n) -> (..., m, n)
        XD = through(X, D, dtype)  # X D^T: (..., m, q)
        Y = through(XD.mT, C, dtype).mT  # (..., q, m) -> (..., q, p) -> (..., p, q)
        return Y.flatten(-2)  # (..., p q)

    def column(self, below, ids):
        """s C[:,k] (x) D[:,l] for each id k n + l: (...) -> (..., out)"""
        C, D = self.chains()
        c = through(below.compute(ids // self.n, C[0]), C[1:])  # (..., p)
        d = through(below.compute(ids % self.n, D[0]), D[1:])  # (..., q)
        return (c[..., :, None] * d[..., None, :]).flatten(-2)  # (..., p, q) -> (..., p q)

    def extra_repr(self):
        return f"{super().extra_repr()}, factor={self.factor}"


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, factor=None, decompose_both=False):
    """Put LoKr around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only C and D learn, or their factors. name: by default "lokr". r: the
    rank of D; where that is half of D's larger side or more, D is whole.
    alpha: s = alpha / r. factor: the sides of C, where it divides those of the leaf (see
    `pair`); by default near their root. decompose_both: C = B1 A1 of rank r too.
    ValueError for an r or a factor that is no whole number above 0, and an alpha that is
    not above 0.
    """
    return attach(LoKr, model, targets, name=name, r=r, alpha=alpha, factor=factor,
                  decompose_both=decompose_both)


register("lokr", LoKr, family="lora")
method("lokr", wrap, does="repeats a small matrix over each weight, with a learnt factor per copy",
       paper="Yeh et al. 2024, arXiv 2309.14859", rates=dict(tiny=2e-2, smollm2=2e-2),
       small={"": dict(r=1, alpha=3.0), "factor": dict(r=3, factor=2), "whole": dict(r=4),
              "both": dict(r=1, alpha=2.0, decompose_both=True)})
