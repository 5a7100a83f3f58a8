"""VeRA: one pair of random matrices for all leaves, and two small vectors that learn for each.

LoRA learns A and B for each leaf. VeRA draws them once, at random, freezes them, and uses
the same pair at every leaf. Each leaf learns only how much of each row counts.

    y = W x + b + Λ_b B Λ_d A x      Kopiczko et al. 2024, arXiv 2310.11454, equation 2

    code    paper   shape             at birth
    A       A       (r, widest in)    kaiming uniform: U(-sqrt(6/in), sqrt(6/in)); frozen
    B       B       (widest out, r)   kaiming uniform, likewise; frozen
    d       d       (r,)              `d_initial`; the diagonal of Λ_d
    b       b       (out,)            zero, so that nothing changes; the diagonal of Λ_b

A leaf with a smaller input or output uses the first columns of A, and the first rows of
B, as in peft. The patches of one `wrap` share A and B: they are one module, `common`,
which goes with the model to another device, and once into a copy and into a file.

Cost: r + out parameters a leaf, and r (widest in + widest out) numbers once that do not
learn. On SmolLM2 at r = 256 all linear leaves have 0.21 million parameters that learn;
LoRA at r = 8 has 2.44 million. Operations: those of LoRA at the same r, which is large
here. Merged: nothing. peft's file may leave A and B out and draw them again from a seed.
That saves 3 MB there, but another version of torch may draw other numbers. Not included:
embeddings.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.vera.wrap(model, r=5)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> first, second = (layer.patches["vera"] for layer in minillm.layers(model).values())
>>> first.common is second.common, first.common.A.shape, first.common.B.shape
(True, torch.Size([5, 8]), torch.Size([6, 5]))
>>> sorted(name for name, p in model.named_parameters() if p.requires_grad and name[0] == "0")
['0.patches.vera.b', '0.patches.vera.d']
"""

import math

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.registry import Patch, hidden_linears, select
from minillm.registry.attach import attach
from minillm.registry.shared import Common
from minillm.registry.sites import check_whole
from minillm.registry.table import method, register


class VeRA(Patch):
    additive = True
    reads = False
    shares = ("A", "B")

    def __init__(self, site, r=256, dropout=0.0):
        super().__init__()
        self.out, self.into = site.shape
        self.r, self.dropout = options.whole("r", r), options.share("dropout", dropout)
        self.d, self.b = site.new(r), site.new(self.out)

    def share(self, common):
        A, B = common.A.shape, common.B.shape
        if (A[0], B[1]) != (self.r, self.r) or A[1] < self.into or B[0] < self.out:
            raise ValueError(f"A {tuple(A)} and B {tuple(B)} are no pair of the rank {self.r} "
                             f"for a matrix ({self.out}, {self.into})")
        super().share(common)

    @property
    def random(self):
        return self.training and self.dropout > 0

    def pair(self, dtype):
        """A (r, in) and B (out, r) of this leaf."""
        A, B = self.common.A[:, : self.into], self.common.B[: self.out]
        return A.to(self.b.device, dtype), B.to(self.b.device, dtype)

    def forward(self, below, x):
        y = below(x)
        A, B = self.pair(y.dtype)
        d, b = self.d.to(y.dtype), self.b.to(y.dtype)
        if self.random:
            x = F.dropout(x, self.dropout)
        return y + b * F.linear(d * below.compute(x, A), B)  # (..., in) -> (..., r) -> (..., out)

    def fold(self, W, b):
        A, B = self.pair(self.b.dtype)
        return W + (self.b[:, None] * B @ (self.d[:, None] * A)).to(W.dtype), b

    def extra_repr(self):
        return f"r={self.r}"


def wrap(model, targets=None, *, name=None, r=256, d_initial=0.1, dropout=0.0):
    """Put VeRA around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only d and b learn afterwards. name: by default "vera"; each name has
    its own A and B. r: the rank, which may be larger than a leaf's sides. d_initial: the
    value of d at birth, not 0. dropout: of the branch's input, in training. ValueError
    for an r that is no whole number above 0, a d_initial of 0, and a dropout outside of
    0 <= p < 1.
    """
    check_whole(model, "wrap")
    r = options.whole("r", r)
    d_initial = options.real("d_initial", d_initial, lambda d: d != 0 and math.isfinite(d),
                             "a number other than 0: with d = b = 0 neither would learn")
    sites = select(model, targets, VeRA.accepts, hidden_linears(model))
    out, into = (max(sizes) for sizes in zip(*[site.shape for site in sites]))
    A, B = sites[0].new(r, into), sites[0].new(out, r)
    for matrix in (A, B):
        nn.init.kaiming_uniform_(matrix)
    common = Common(A=A.detach(), B=B.detach())

    def fill(patch, site):
        nn.init.constant_(patch.d, d_initial)
        patch.share(common)

    return attach(VeRA, model, targets, name=name, fill=fill, r=r, dropout=dropout)


register("vera", VeRA, family="lora")
method("vera", wrap, does="one random low-rank pair for all weights; scales of it learn",
       paper="Kopiczko et al. 2024, arXiv 2310.11454", rates=dict(tiny=3e-2, smollm2=2e-2),
       small={"": dict(r=12), "dropout": dict(r=5, d_initial=0.5, dropout=0.5)})
