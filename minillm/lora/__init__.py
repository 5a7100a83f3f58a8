"""LoRA: freeze each weight and learn a change of it that has a low rank.

    y = W x + b + s B A d(x)      Hu et al. 2021, "LoRA", arXiv 2106.09685, equation 3

In words, and in the code below: the output beneath, plus a branch.

    y = below(x) + branch(x)      branch(x) = s B (A d(x))

    code      paper      shape       at birth
    A         A          (r, in)     kaiming uniform: U(-1/sqrt(in), 1/sqrt(in))
    B         B          (out, r)    zero, so that nothing changes
    scale     alpha/r    ()          s; with rank_stabilized alpha/sqrt(r) (rsLoRA, Kalajdzievski
                                     2023, arXiv 2312.03732)
    dropout   d                      in training, each input of the branch is 0 with this probability
    below                            what lies beneath this patch: the leaf, in whatever format, and
                                     the patches that were wrapped before. below(x) is its output,
                                     below.compute(x, A) the same leaf with A for its matrix

Cost: r (in + out) parameters a leaf, and as many multiplications a token, beside in * out for the
leaf itself. The gradient and AdamW's two states exist for A and B alone. Merged, it costs nothing.

A is (r, in), as nn.Linear keeps a weight. The initialisation takes 1/sqrt(fan-in) from the last
dimension. A transposed A would give it r for `in`: at r = 8 and in = 768 the start would be 9.8
times too large.

An embedding is a leaf whose input is one-hot, W (width, vocabulary). There A x is a lookup of A's
columns, d(x) drops the branch of a whole token, and the row of `padding_idx` neither changes nor
learns.

Dropout is no change of the weight. Where something reads the folded weight while LoRA trains with
dropout (a mask around it, nn.MultiheadAttention), that is an error. Merging is not, since it folds
what was learnt.

Several LoRAs with names of their own add up on one leaf, and `minillm.use` switches them. peft has
a dictionary of them in each layer for that. It casts x to float32 where A is float32. Here A is
cast to x's type, so a bfloat16 model computes in bfloat16, and the optimizer still sees float32.

`dora` is a kind of its own, and `pissa` is this one with another start. Not included: a change of
the bias, a rank for each leaf (call `wrap` once for each rank, with its targets).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.wrap(model, r=2)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> for layer in minillm.layers(model).values():
...     _ = nn.init.normal_(layer.patches["lora"].B)                    # as if it had learnt
>>> learnt = model(x)
>>> torch.allclose(minillm.lora.merge(model)(x), learnt, atol=1e-4)     # merged equals unmerged
True
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class LoRA(Patch):
    additive = True
    reads = False

    def __init__(self, site, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0, start=False):
        super().__init__()
        out, into = site.shape
        r = options.whole("r", r)
        if r > max(out, into):
            raise ValueError(f"r={r} at {site.name!r}: the rank of a ({out}, {into}) matrix lies between 1 "
                             f"and {min(out, into)}")
        r = min(r, out, into)  # a head with two outputs
        self.r, self.alpha = r, options.positive("alpha", alpha)
        self.rank_stabilized = options.flag("rank_stabilized", rank_stabilized)
        self.dropout = options.share("dropout", dropout)
        self.scale = self.alpha / (math.sqrt(r) if rank_stabilized else r)
        self.lookup, self.padding = site.leaf.lookup, site.padding
        self.A = site.new(r, into)
        self.B = site.new(out, r)
        self.start = options.flag("start", start)
        if start:  # as A and B were at birth, when the base lost their product: see `pissa`
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())

    def fill(self, site):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    @property
    def random(self):
        return self.training and self.dropout > 0

    def forward(self, below, x):
        y = below(x)
        return y + self.branch(below, x, y.dtype)

    def branch(self, below, x, dtype):
        """s B (A d(x)): x (..., in), or ids (...) -> (..., out)"""
        if self.random and not self.lookup:
            x = F.dropout(x, self.dropout)
        Ax = below.compute(x, self.A.to(dtype))  # (..., r)
        if self.padding is not None:
            Ax = Ax.masked_fill((x == self.padding)[..., None], 0)
        if self.random and self.lookup:  # of a one-hot input only the 1 can be dropped
            Ax = Ax * F.dropout(Ax.new_ones(*x.shape, 1), self.dropout)
        return F.linear(self.scale * Ax, self.B.to(dtype))  # r products for the scale, not `out`

    def fold(self, W, b):
        A = self.A
        if self.padding is not None:
            A = A.index_fill(1, torch.tensor(self.padding, device=A.device), 0)
        return W + (self.scale * self.B @ A).to(W.dtype), b

    def residual(self, W):
        return W - (self.scale * self.B0 @ self.A0).to(W.dtype)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}"


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0):
    """Put LoRA around the leaves that `targets` names (see `registry.select`); in place, returns the model.

    By default every linear leaf but the output head and tied matrices. Only A and B learn
    afterwards. name: what it is called, by default "lora"; several of different names add up (see
    `minillm.use`). r: the rank, or the smaller side of a leaf where that is less. alpha: s = alpha / r;
    rank_stabilized: s = alpha / sqrt(r). The dropout (of the branch's input, while training) is off by
    default: it costs a copy of x for each leaf. ValueError for an r that is no rank of one of the leaves, an alpha that
    is not above 0, and a dropout outside of 0 <= d < 1.
    """
    return attach(LoRA, model, targets, name=name, r=r, alpha=alpha, rank_stabilized=rank_stabilized, dropout=dropout)


unwrap, merge, unmerge, save, load = verbs("lora", LoRA)
method("lora", wrap, does="learns a low-rank change of each weight",
       paper="Hu et al. 2021, arXiv 2106.09685", rates=dict(tiny=6e-3, smollm2=2e-3),
       small={"": dict(r=4), "stable": dict(r=2, alpha=3.0, rank_stabilized=True), "dropout": dict(r=3, dropout=0.5)})

from minillm.lora import dora, pissa  # noqa: E402, F401
