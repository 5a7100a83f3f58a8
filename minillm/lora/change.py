"""What LoHa and LoKr share: a change of the weight that is a formula of small matrices.

    y = below(x) + change() x

A subclass gives `change`, the formula, a matrix (out, in). `fold` uses it. `forward`
need not make that matrix: the subclass also gives `branch`, the change times x, and
`column`, the change times a one-hot x, for an embedding.
"""

import torch
import torch.nn.functional as F

from minillm import options
from minillm.ops import remade


class Change:
    """For a Patch, to be named before it: class LoHa(Change, Patch)."""

    additive = True
    reads = False

    def __init__(self, site, r, alpha):
        super().__init__()
        self.r, self.alpha = r, options.positive("alpha", alpha)
        self.scale = self.alpha / r
        self.lookup, self.padding = site.leaf.lookup, site.padding

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    def change(self):
        """(out, in)"""
        raise NotImplementedError

    def branch(self, x, dtype):
        """The change times x, computed in dtype: (..., in) -> (..., out)"""
        raise NotImplementedError

    def column(self, below, ids):
        """The columns `ids` of the change: (...) -> (..., out)"""
        raise NotImplementedError

    def forward(self, below, x):
        y = below(x)
        if self.lookup:
            c = self.column(below, x).to(y.dtype)
            if self.padding is not None:
                c = c.masked_fill((x == self.padding)[..., None], 0)
            return y + c
        dtype = y.dtype  # `again` keeps what it names until the backward: not y

        def again(x):
            return self.branch(x, dtype)

        return y + (remade(again, x) if torch.is_grad_enabled() else again(x))

    def fold(self, W, b):
        change = self.change()
        if self.padding is not None:
            change = change.index_fill(1, torch.tensor(self.padding, device=change.device), 0)
        return W + change.to(W.dtype), b

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}"


def through(x, chain, dtype=None):
    """x (..., in) through the matrices of a chain in turn, each (out, in): the first meets x."""
    for M in chain:
        x = F.linear(x, M if dtype is None else M.to(dtype))
    return x
