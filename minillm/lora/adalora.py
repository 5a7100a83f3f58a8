"""AdaLoRA: LoRA as a singular value decomposition, whose ranks are allotted in training.

LoRA gives each weight the same rank. But some weights need a larger change than others.
AdaLoRA gives each weight a change of the form P Λ Q, in which each rank has a number of
its own, and takes the rank away where it matters least.

    1. y = W x + b + s P Λ Q x                            Λ: a diagonal
    2. R = || P^T P - I || and || Q Q^T - I ||            a penalty: `orthogonal`
    3. every few steps, the least important λ_i become 0  `budget.Budget`

                                Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512

    code     paper   shape      at birth
    P        P       (out, r)   N(0, 0.02)
    E        Λ       (r,)       zero, so that nothing changes; the diagonal of Λ
    Q        Q       (r, in)    N(0, 0.02)
    kept             (r,)       which λ_i may be other than 0; after the last cut fixed
    scale            ()         s = alpha / r, with the r of birth, also after cuts

Where columns of P and rows of Q are orthonormal, λ_i is the size of a direction, and one
can be cut without a change of the others. The penalty keeps them near that.

    train(adalora.wrap(model, r=12), examples, ..., on_step=budget.Budget(target=8),
          loss=orthogonal.Orthogonal(train.loss_sum))

Without the two it trains with the rank r everywhere. A triplet (column, λ_i, row) that
is cut stays in memory, and comes back if a later cut finds it important.

Cost: r (in + out + 1) parameters a leaf, at the larger r of birth; the penalty takes
r^2 (in + out) multiplications a leaf and step; `Budget` keeps two numbers for each
parameter. Merged: nothing. Not included: embeddings.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.adalora.wrap(model, r=3)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> patch = model[0].patches["adalora"]
>>> patch.P.shape, patch.E.shape, patch.Q.shape
(torch.Size([8, 3]), torch.Size([3]), torch.Size([3, 8]))
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.lora import rank
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method, register


class AdaLoRA(Patch):
    additive = True
    reads = False

    def __init__(self, site, r=12, alpha=16.0, dropout=0.0):
        super().__init__()
        out, into = site.shape
        self.r, self.alpha = rank(r, site), options.positive("alpha", alpha)
        self.dropout = options.share("dropout", dropout)
        self.scale = self.alpha / self.r
        self.P, self.E, self.Q = site.new(out, self.r), site.new(self.r), site.new(self.r, into)
        self.register_buffer("kept", torch.ones_like(self.E, dtype=torch.bool))

    def fill(self, site):
        nn.init.normal_(self.P, std=0.02)
        nn.init.zeros_(self.E)
        nn.init.normal_(self.Q, std=0.02)

    @property
    def random(self):
        return self.training and self.dropout > 0

    def forward(self, below, x):
        y = below(x)
        if self.random:
            x = F.dropout(x, self.dropout)
        P, E, Q = (p.to(y.dtype) for p in (self.P, self.E, self.Q))
        return y + F.linear(self.scale * E * below.compute(x, Q), P)  # (..., r) -> (..., out)

    def fold(self, W, b):
        return W + (self.scale * self.P * self.E @ self.Q).to(W.dtype), b

    def apart(self):
        """[|| P^T P - I ||, || Q Q^T - I ||]: how far P and Q are from orthonormal."""
        one = torch.eye(self.r, device=self.P.device)
        P, Q = self.P.float(), self.Q.float()
        return [(P.T @ P - one).norm(), (Q @ Q.T - one).norm()]

    def extra_repr(self):
        return f"r={self.r}, kept={int(self.kept.sum())}, alpha={self.alpha}"


def wrap(model, targets=None, *, name=None, r=12, alpha=16.0, dropout=0.0):
    """Put AdaLoRA around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only P, E and Q learn afterwards. name: by default "adalora". r: the rank
    at birth, about 1.5 times the wanted average; where a leaf's smaller side is less, that
    side. alpha: s = alpha / r. dropout: of the branch's input, in training. ValueError for
    an r above both sides of a leaf, an alpha that is not above 0, and a dropout outside of
    0 <= d < 1.
    """
    return attach(AdaLoRA, model, targets, name=name, r=r, alpha=alpha, dropout=dropout)


register("adalora", AdaLoRA, family="lora")
method("adalora", wrap, does="LoRA whose ranks are allotted to the weights in training",
       paper="Zhang et al. 2023, arXiv 2303.10512", rates=dict(tiny=2e-2, smollm2=5e-3),
       small={"": dict(r=4), "dropout": dict(r=2, alpha=3.0, dropout=0.5)})
