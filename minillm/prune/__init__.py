"""Magnitude pruning: the smallest weights become zero.

    W' = M * W,   M = 1 where |W| is among the largest (1 - sparsity) of its group       Han et al. 2015, arXiv 1506.02626

    code      paper                                 shape
    mask      the connections that are kept         (out, in), bool
    group     what is compared with what: "row" (each output channel loses the same share), "matrix", or "model" (all chosen leaves
              together, so that less important matrices lose more)

A mask is a Patch: the weight beneath stays whole, `unwrap` gives it back, and training goes
on through the mask, so that what is pruned stays pruned (the paper's retraining; wrapping
freezes nothing). `gradual` prunes step by step while the model trains. `merge` writes the
zeros into the weight. Zeros alone save no memory and no time: that takes a sparse format
(`minillm.sparse`) or the removal of whole rows.

Which weights to zero is the whole difference between pruning methods: one mask with another
score. The score here is |W|; Sun et al. 2023 ("Wanda", arXiv 2306.11695) multiply it by the
norm of the input, and compare by row. torch.nn.utils.prune recomputes weight_orig *
weight_mask before each forward in a hook; here it is the patch's own formula. Not included:
patterns such as 2:4.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> masked = minillm.prune.wrap(model, sparsity=0.25)(x)
>>> torch.allclose(minillm.prune.merge(model)(x), masked)               # merged equals unmerged
True
>>> (model[0].weight == 0).sum(1).tolist()                              # a quarter of each row
[2, 2, 2, 2, 2, 2, 2, 2]
"""

import numpy as np
import torch

from minillm import ops, options
from minillm.registry import Patch, hidden_linears, select
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs

GROUPS = ("row", "matrix", "model")


class Mask(Patch):
    not_neutral = "pruned weights are gone"

    def __init__(self, site, sparsity=0.5, group="row"):
        super().__init__()
        self.sparsity = options.share("sparsity", sparsity)
        self.group = options.one_of("group", group, GROUPS)
        mask = torch.ones(site.shape, dtype=torch.bool, device=site.new(0).device)
        self.register_buffer("mask", mask)

    def forward(self, below, x):
        W, b = below.dense()
        if not torch.is_grad_enabled():
            return below.compute(x, *self.fold(W, b))
        x = ops.in_autocast(x)
        if W.requires_grad and below.depth > 0:  # made of W and what a patch beneath learns
            y = ops.remade(lambda x: ops.linear(x, self.fold(*below.dense())[0].to(x.dtype)), x)
        elif W.requires_grad:
            y = ops.masked_linear(x, W, self.mask)
        else:  # W may be made from a format just now: keep neither it nor its product with the mask
            y = ops.remade_linear(x, lambda: self.fold(*below.dense())[0].to(x.dtype))
        return y if b is None else y + b.to(y.dtype)

    def fold(self, W, b):
        return W * self.mask, b

    def extra_repr(self):
        return f"sparsity={self.sparsity}, group={self.group!r}"


def magnitude(site, below=None):
    """|W| (out, in), as all patches leave it, or those beneath the technique `below`."""
    W = site.dense(below)[0].detach()
    if W.isnan().any():
        raise ValueError(f"the weight of {site.name!r} holds nan: prune cannot say how large it is")
    return W.abs().contiguous()


def largest(scores, sparsity):
    """True where a score is kept: in each row of scores (n, m) exactly round(sparsity * m) are not.

    Of equal scores the first is pruned first, so the same scores give the same mask.
    """
    k = round(sparsity * scores.shape[1])
    if k == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    exact = torch.promote_types(scores.dtype, torch.float32)  # numpy has no bfloat16
    ranked = np.partition(scores.to("cpu", exact).numpy(), k - 1, axis=1)  # quicker than to sort all
    kth = torch.from_numpy(ranked[:, k - 1 : k]).to(scores)  # (n, 1)
    less, equal = scores < kth, scores == kth
    left = k - less.sum(1, keepdim=True)  # how many of the equal ones have to go
    count = equal.cumsum(1, dtype=torch.int32 if scores.shape[1] < 2**31 else torch.int64)
    return ~(less | equal & (count <= left))


def masks_of(scores, sparsity, group):
    """{site: mask (out, in)} from {site: scores (out, in)}."""
    if group == "row":
        return {name: largest(score, sparsity) for name, score in scores.items()}
    if group == "matrix":
        return {name: largest(score.view(1, -1), sparsity).view(score.shape)
                for name, score in scores.items()}
    whole = largest(torch.cat([score.flatten() for score in scores.values()])[None], sparsity)[0]
    parts = whole.split([score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts)}


def wrap(model, targets=None, *, name=None, sparsity=0.5, group="row"):
    """Put a mask on the leaves that `targets` names (see `registry.select`); in place, returns the model.

    `sparsity` of the weights in each group become zero. By default every linear leaf but the output head and tied
    matrices. ValueError for a sparsity outside of 0 <= s < 1 and an unknown group.
    """
    options.share("sparsity", sparsity)
    options.one_of("group", group, GROUPS)
    sites = select(model, targets, Mask.accepts, hidden_linears(model))
    masks = masks_of({site.name: magnitude(site) for site in sites}, sparsity, group)

    def fill(patch, site):
        patch.mask.copy_(masks[site.name])

    return attach(Mask, model, targets, name=name, fill=fill, sparsity=sparsity, group=group)


unwrap, merge, unmerge, save, load = verbs("prune", Mask)
method("prune", wrap, does="zeroes the smallest weights", paper="Han et al. 2015, arXiv 1506.02626",
       small={"": {}, "matrix": dict(sparsity=0.25, group="matrix"), "model": dict(sparsity=0.4, group="model")})
