"""Magnitude pruning: the smallest weights become zero.

    W' = M * W,   M = 1 where |W| is among the largest (1 - sparsity) of its group

                                                    Han et al. 2015, arXiv 1506.02626

    code      paper                                 shape
    mask      the connections that are kept         (out, in), bool
    score     how much a weight matters             (out, in); here |W|
    pattern   which weights compete: `row`, `matrix`, `model`, `n_m(2, 4)`

A mask is a Patch. The weight beneath stays whole, and `unwrap` gives it back. The model
can train through the mask, and pruned weights stay pruned (the paper's retraining);
wrapping freezes nothing. `gradual` prunes step by step while the model trains. `merge`
writes the zeros into the weight. Zeros alone save no memory and no time: that takes a
sparse format (`minillm.sparse`) or the removal of whole rows.

Pruning methods differ only in which weights they zero. They use one mask with another
score (`scores`) and another pattern (`patterns`). `wanda` multiplies |W| by the norm of
the input. torch.nn.utils.prune recomputes weight_orig * weight_mask in a hook before
each forward; here the patch computes it.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> masked = minillm.prune.wrap(model, sparsity=0.25)(x)
>>> torch.allclose(minillm.prune.merge(model)(x), masked)               # merged equals unmerged
True
>>> (model[0].weight == 0).sum(1).tolist()                              # a quarter of each row
[2, 2, 2, 2, 2, 2, 2, 2]
"""

import torch

from minillm import ops, options
from minillm.prune import patterns
from minillm.prune.patterns import GROUPS, matrix, n_m, row  # noqa: F401
from minillm.prune.scores import Random, magnitude  # noqa: F401
from minillm.registry import Patch, hidden_linears, select
from minillm.registry.attach import attach
from minillm.registry.sites import check_whole
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class Mask(Patch):
    not_neutral = "pruned weights are gone"

    def __init__(self, site, sparsity=0.5, group="row"):
        super().__init__()
        self.sparsity = options.share("sparsity", sparsity)
        self.group = patterns.named(group).name
        mask = torch.ones(site.shape, dtype=torch.bool, device=site.new(0).device)
        self.register_buffer("mask", mask)

    def forward(self, below, x):
        dense = below.recipe()
        W, b = dense()
        if not torch.is_grad_enabled():
            return below.compute(x, *self.fold(W, b))
        x = ops.in_autocast(x)
        if W.requires_grad and below.depth > 0:  # made of W and of a patch's parameters
            y = ops.remade(lambda x: ops.linear(x, self.fold(*dense())[0].to(x.dtype)), x)
        elif W.requires_grad:
            y = ops.masked_linear(x, W, self.mask)
        else:  # a format may have made W for this call: keep neither it nor its masked product
            y = ops.remade_linear(x, lambda: self.fold(*dense())[0].to(x.dtype))
        return y if b is None else y + b.to(y.dtype)

    def fold(self, W, b):
        return W * self.mask, b

    def extra_repr(self):
        return f"sparsity={self.sparsity}, group={self.group!r}"


def wrap(model, targets=None, *, name=None, sparsity=0.5, score=magnitude, pattern=row, group=None):
    """Put a mask on the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default every linear leaf but the output head and
    tied matrices. name: what the masks are called, by default "prune". sparsity: the
    share of each group that becomes zero. score: a function of a Site that gives
    numbers (out, in); the smallest go. pattern: `prune.row`, `prune.matrix`,
    `prune.model` or `prune.n_m(2, 4)`, or its name: "row", "2:4". group: the name of
    the pattern, as in files; it replaces `pattern`. ValueError for a sparsity outside of
    0 <= s < 1, and for a pattern that is unknown or does not fit.
    """
    check_whole(model, "wrap")
    options.share("sparsity", sparsity)
    pattern = patterns.given(pattern) if group is None else patterns.named(group)
    if not callable(score):
        raise ValueError(f"score={score!r} is no function of a Site, such as prune.magnitude")
    sites = select(model, targets, Mask.accepts, hidden_linears(model))
    pattern.check(sparsity, sites)
    masks = pattern.masks(((site.name, score(site)) for site in sites), sparsity)

    def fill(patch, site):
        patch.mask.copy_(masks[site.name])

    return attach(Mask, model, targets, name=name, fill=fill, sparsity=sparsity, group=pattern.name)


unwrap, merge, unmerge, save, load = verbs("prune", Mask)
method("prune", wrap, does="zeroes the smallest weights", paper="Han et al. 2015, arXiv 1506.02626",
       small={"": {}, "matrix": dict(sparsity=0.25, group="matrix"),
              "model": dict(sparsity=0.4, group="model"), "2:4": dict(group="2:4")})

model = patterns.model
