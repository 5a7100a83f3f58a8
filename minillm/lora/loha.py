"""LoHa: learn a change of each weight that is the entrywise product of two LoRAs.

LoRA's change has the rank r. The entrywise (Hadamard) product of two such changes has a
rank of up to r^2, with only twice as many parameters.

    y = W x + b + s ((B1 A1) * (B2 A2)) x
                      Hyeon-Woo et al. 2022, "FedPara", arXiv 2108.06098, proposition 1;
                      Yeh et al. 2024, "LyCORIS", arXiv 2309.14859, as a change of W

    code      FedPara    shape       at birth, as in peft
    B1, B2    X1, X2     (out, r)    kaiming uniform: U(-1/sqrt(r), 1/sqrt(r))
    A1        Y1^T       (r, in)     kaiming uniform: U(-1/sqrt(in), 1/sqrt(in))
    A2        Y2^T       (r, in)     zero, so that nothing changes
    scale                ()          s = alpha / r

Why the rank is up to r^2: the entry (i, j) of the product is a sum over pairs (k, l),

    (sum_k B1[i,k] A1[k,j]) (sum_l B2[i,l] A2[l,j])
                               = sum_kl (B1[i,k] B2[i,l]) (A1[k,j] A2[l,j])
                               = sum_kl       P[i,kl]           Q[kl,j]

so the change is s P Q, a LoRA of the rank r^2 whose P and Q are made of four matrices.

`forward` computes s P (Q x) where that needs fewer multiplications than the whole
change times x. For the backward it keeps only x, and makes the rest anew: see `change`.
`fold` is the formula above.

Cost: 2 r (in + out) parameters a leaf. A token costs r^2 (in + out) multiplications, or
in * out where that is less, and up to r^2 in more in the backward. Merged: nothing.
peft always makes the whole change: in * out multiplications a token, as many as the
leaf has, and autograd keeps the change.

An embedding is a leaf whose input is one-hot. There a token's change is one column of
the formula, s (B1 a1) * (B2 a2), where a1 and a2 are columns of A1 and A2. The row of
`padding_idx` neither changes nor learns.

Not included: peft's dropout of rows and of whole leaves, convolutions, the normal
distributions with which LyCORIS begins, and FedPara's training from scratch.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.lora.loha.wrap(model, r=2)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> _ = nn.init.normal_(model[0].patches["loha"].A2)                    # as if after training
>>> torch.linalg.matrix_rank(model[0].patches["loha"].change()).item()  # r is 2
4
"""

import math

from torch import nn

from minillm.lora import rank
from minillm.lora.change import Change, through
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method, register


class LoHa(Change, Patch):
    def __init__(self, site, r=8, alpha=16.0):
        super().__init__(site, rank(r, site), alpha)
        out, into = site.shape
        self.B1, self.A1 = site.new(out, self.r), site.new(self.r, into)
        self.B2, self.A2 = site.new(out, self.r), site.new(self.r, into)

    def fill(self, site):
        for M in (self.B1, self.A1, self.B2):
            nn.init.kaiming_uniform_(M, a=math.sqrt(5))

    def change(self):
        """s (B1 A1) * (B2 A2): (out, in)"""
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

    def branch(self, x, dtype):
        """s P Q x, or the whole change times x: (..., in) -> (..., out)"""
        return through(x, self.chain(), dtype)

    def chain(self):
        """The matrices whose product is the change, in the order in which they meet x."""
        out, into = len(self.B1), self.A1.shape[1]
        if self.r**2 * (out + into) >= out * into:
            return [self.change()]
        P = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)  # (out, r, r) -> (out, r^2)
        Q = (self.A1[:, None, :] * self.A2[None, :, :]).flatten(0, 1)  # (r, r, in) -> (r^2, in)
        return [Q, self.scale * P]

    def column(self, below, ids):
        """s (B1 a1) * (B2 a2) for a1, a2 the columns `ids` of A1, A2: (...) -> (..., out)"""
        a1, a2 = below.compute(ids, self.A1), below.compute(ids, self.A2)  # (..., r)
        return self.scale * through(a1, [self.B1]) * through(a2, [self.B2])


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0):
    """Put LoHa around the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. Only B1, A1, B2 and A2 learn afterwards. name: by default "loha".
    r: the rank of each factor; where a leaf's smaller side is less, that side.
    alpha: s = alpha / r. ValueError for an r above both sides of a leaf, and an alpha
    that is not above 0.
    """
    return attach(LoHa, model, targets, name=name, r=r, alpha=alpha)


register("loha", LoHa, family="lora")
method("loha", wrap, does="multiplies two low-rank changes of each weight, entry by entry",
       paper="Hyeon-Woo et al. 2022, arXiv 2108.06098", rates=dict(tiny=1e-2, smollm2=2e-2),
       small={"": dict(r=2), "dense": dict(r=4, alpha=3.0)})
