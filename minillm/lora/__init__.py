"""LoRA: freeze each weight and learn a low-rank change of it.

    y = W x + b + s B A d(x)      Hu et al. 2021, "LoRA", arXiv 2106.09685, equation 3
    y = below(x) + branch(x)      in the code, with branch(x) = s B (A d(x))

`below` is the leaf, in any format, with the patches wrapped before this one: below(x)
is its output, below.compute(x, A) its output with A as the matrix.

    code      paper      shape       at birth
    A         A          (r, in)     kaiming uniform: U(-1/sqrt(in), 1/sqrt(in))
    B         B          (out, r)    zero, so that nothing changes
    scale     alpha/r    ()          s; with rank_stabilized alpha/sqrt(r) (rsLoRA,
                                     Kalajdzievski 2023, arXiv 2312.03732)
    dropout   d                      in training, the share of inputs that are 0

Cost: r (in + out) parameters a leaf, and as many multiplications a token besides the
leaf's in * out. Only A and B have a gradient and AdamW's two states. Merged: nothing.

A is (r, in), like a weight of nn.Linear: the initialisation takes 1/sqrt(fan-in) from
the last dimension. A transposed A would give it r for `in`: at r = 8 and in = 768 the
start would be 9.8 times too large.
An embedding is a leaf whose input is one-hot, W (width, vocabulary): A x is a lookup of
A's columns, d(x) drops a whole token's branch, and the row of `padding_idx` stays.

Dropout is no change of the weight: to read the folded weight in a training with dropout
is an error (a mask around it, nn.MultiheadAttention). Merging is allowed.

Several LoRAs with different names add up on one leaf, and `minillm.use` switches them.
peft casts x to float32 where A is float32. Here A is cast to x's type: a bfloat16 model
computes in bfloat16, A stays float32. `fused` computes the same in fewer passes.

Not included: a change of the bias, a rank for each leaf (`wrap` once a rank, with targets).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.wrap(model, r=2)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> for layer in minillm.layers(model).values():
...     _ = nn.init.normal_(layer.patches["lora"].B)                    # as if after training
>>> learnt = model(x)
>>> torch.allclose(minillm.lora.merge(model)(x), learnt, atol=1e-4)     # merged equals unmerged
True
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.lora import fused
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


def rank(r, site):
    """r, or the leaf's smaller side where that is less; ValueError for an r above both sides."""
    if options.whole("r", r) > max(site.shape):
        raise ValueError(f"r={r} at {site.name!r}: the rank of a {site.shape} matrix is "
                         f"from 1 to {min(site.shape)}")
    return min(int(r), *site.shape)  # such as a head with two outputs


class LoRA(Patch):
    additive = True
    reads = False

    def __init__(self, site, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0, start=False):
        super().__init__()
        out, into = site.shape
        r = rank(r, site)
        self.r, self.alpha = r, options.positive("alpha", alpha)
        self.rank_stabilized = options.flag("rank_stabilized", rank_stabilized)
        self.dropout = options.share("dropout", dropout)
        self.scale = self.alpha / (math.sqrt(r) if rank_stabilized else r)
        self.lookup, self.padding = site.leaf.lookup, site.padding
        self.A, self.B = site.new(r, into), site.new(out, r)
        self.start = options.flag("start", start)
        if start:  # A and B at birth; the base lost their product: see `pissa`
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
        if fused.suits(self, below, x):
            return fused.step(x, *below.dense(), self.A, self.B, self.scale)
        y = below(x)
        return y + self.branch(below, x, y.dtype)

    def branch(self, below, x, dtype):
        """s B (A d(x)): x (..., in), or ids (...) -> (..., out)"""
        if self.random and not self.lookup:
            x = F.dropout(x, self.dropout)
        Ax = below.compute(x, self.A.to(dtype))  # (..., r)
        if self.padding is not None:
            Ax = Ax.masked_fill((x == self.padding)[..., None], 0)
        if self.random and self.lookup:  # a one-hot input has one entry to drop
            Ax = Ax * F.dropout(Ax.new_ones(*x.shape, 1), self.dropout)
        return F.linear(self.scale * Ax, self.B.to(dtype))  # r products for the scale, not `out`

    def product(self, A, B):
        if self.padding is not None:
            A = A.index_fill(1, torch.tensor(self.padding, device=A.device), 0)
        return self.scale * B @ A  # (out, in)

    def fold(self, W, b):
        return W + self.product(self.A, self.B).to(W.dtype), b

    def part(self):
        return self.product(self.A0, self.B0)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}"


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0):
    """Put LoRA around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only A and B learn afterwards. name: by default "lora"; several with
    different names add up (see `minillm.use`). r: the rank; where a leaf's smaller side
    is less, that side. alpha: s = alpha / r; rank_stabilized: s = alpha / sqrt(r).
    dropout: of the branch's input, in training; it costs a copy of x for each leaf.
    ValueError for an r above both sides of a leaf, an alpha that is not above 0, and a
    dropout outside of 0 <= d < 1.
    """
    return attach(LoRA, model, targets, name=name, r=r, alpha=alpha, dropout=dropout,
                  rank_stabilized=rank_stabilized)


unwrap, merge, unmerge, save, load = verbs("lora", LoRA)
method("lora", wrap, does="learns a low-rank change of each weight",
       paper="Hu et al. 2021, arXiv 2106.09685", rates=dict(tiny=6e-3, smollm2=2e-3),
       small={"": dict(r=4), "stable": dict(r=2, alpha=3.0, rank_stabilized=True),
              "dropout": dict(r=3, dropout=0.5)})
