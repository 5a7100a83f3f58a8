"""Magnitude pruning: the smallest weights become zero.

    W' = M * W,   M = 1 where |W| is among the largest (1 - sparsity) of its group       Han et al. 2015, arXiv 1506.02626

    code      paper                                 shape
    mask      the connections that are kept         (out, in), bool
    group     what is compared with what: "row" (each output channel loses the same share), "matrix", or "model" (all chosen leaves
              together, so that less important matrices lose more)

A mask is a Patch: the weight beneath stays whole, `unwrap` gives it back, and training goes on through the mask, so that what
is pruned stays pruned (the paper's retraining; wrapping freezes nothing). `merge` writes the zeros into the weight. Zeros alone save no
memory and no time: that takes a sparse format (`minillm.sparse`) or the removal of whole rows.

Which weights to zero is the whole difference between pruning methods: one mask with another score. The score here is |W|;
Sun et al. 2023 ("Wanda", arXiv 2306.11695) multiply it by the norm of the input, and compare by row.
torch.nn.utils.prune recomputes weight_orig * weight_mask before each forward in a hook; here it is the patch's own formula.
Not included: schedules that prune step by step, and patterns such as 2:4.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> masked = minillm.prune.wrap(model, sparsity=0.25)(x)
>>> torch.allclose(minillm.prune.merge(model)(x), masked)               # merged equals unmerged
True
>>> (model[0].weight == 0).sum(1).tolist()                              # a quarter of each row
[2, 2, 2, 2, 2, 2, 2, 2]
"""

import torch

from minillm.registry import Patch, hidden_linears, select
from minillm.verbs import attach, verbs


class Mask(Patch):
    not_neutral = "pruned weights are gone"

    def __init__(self, site, sparsity=0.5, group="row", threshold=None):
        super().__init__()
        self.sparsity, self.group = sparsity, group
        self.register_buffer("mask", self.largest(magnitude(site), threshold))

    def largest(self, score, threshold):
        """True where the score (out, in) is kept."""
        if threshold is not None:
            return score > threshold
        rows = score if self.group == "row" else score.flatten()[None]
        k = round(self.sparsity * rows.shape[1])
        order = rows.argsort(dim=1, stable=True)  # equal scores: the first is pruned first, so exactly k are
        mask = torch.ones_like(rows, dtype=torch.bool).scatter(1, order[:, :k], False)
        return mask.view(score.shape)

    def fold(self, W, b):
        return W * self.mask, b

    def config(self):
        return dict(sparsity=self.sparsity, group=self.group)

    def extra_repr(self):
        return f"sparsity={self.sparsity}, group={self.group!r}"


def magnitude(site):
    """|W| (out, in), as the patches beneath leave it."""
    W, _ = site.dense()
    return W.detach().abs()


def wrap(model, targets=None, *, sparsity=0.5, group="row"):
    """Put a mask on the leaves that `targets` names (see `registry.select`): `sparsity` of the weights in each group become zero.

    By default every linear leaf but the output head and tied matrices. In place, returns the model.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not a share from 0 up to (but not) 1")
    if group not in ("row", "matrix", "model"):
        raise ValueError(f"group={group!r} is unknown; known: 'row', 'matrix', 'model'")
    threshold = None
    if group == "model":
        sites = select(model, targets, Mask.accepts, hidden_linears(model))
        scores = torch.cat([magnitude(site).flatten() for site in sites])
        k = round(sparsity * scores.numel())
        threshold = scores.kthvalue(k)[0] if k else -1.0
    return attach(Mask, model, targets, sparsity=sparsity, group=group, threshold=threshold)


unwrap, merge, unmerge, save, load = verbs("prune", Mask)
