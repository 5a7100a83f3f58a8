"""Patterns: which weights compete with each other, and how many of them go.

    row          the weights of one output channel
    matrix       those of one matrix
    model        those of all chosen leaves, so that less important matrices lose more
    n_m(2, 4)    four neighbours in a row, of which two stay, as in sparse tensor cores

In each group exactly round(sparsity * size) weights go: those with the smallest scores.
Of equal scores the first go, so the same scores always make the same mask. `smallest`
finds them.

>>> import torch
>>> scores = torch.tensor([[0.1, 0.5, 0.3, 0.2], [4.0, 3.0, 2.0, 1.0]])
>>> for pattern in (row, matrix, n_m(1, 2)):
...     print(pattern.name, pattern.masks({"leaf": scores}.items(), 0.5)["leaf"].int().tolist())
row [[0, 1, 1, 0], [1, 1, 0, 0]]
matrix [[0, 0, 0, 0], [1, 1, 1, 1]]
1:2 [[0, 1, 1, 0], [1, 0, 1, 0]]
"""

import dataclasses
import re

from minillm import options
from minillm.prune.smallest import by_neighbours, by_rows, together


@dataclasses.dataclass(frozen=True, repr=False)
class Pattern:
    """`masks(pairs, sparsity)`: {site: mask (out, in)} from pairs (site, scores (out, in))."""

    name: str  # also in files
    joint = False  # whether a mask depends on the scores of other leaves

    def check(self, sparsity, sites):
        """ValueError where the pattern cannot have this share, or does not fit a leaf."""

    def __repr__(self):
        return self.name


class Row(Pattern):
    def masks(self, pairs, sparsity):
        return {name: by_rows(scores, sparsity) for name, scores in pairs}


class Matrix(Pattern):
    def masks(self, pairs, sparsity):
        return {name: together([scores], sparsity)[0] for name, scores in pairs}


class Model(Pattern):
    joint = True

    def masks(self, pairs, sparsity):
        pairs = dict(pairs)
        return dict(zip(pairs, together(list(pairs.values()), sparsity)))


@dataclasses.dataclass(frozen=True, repr=False)
class Neighbours(Pattern):
    n: int
    m: int

    def check(self, sparsity, sites):
        share = (self.m - self.n) / self.m
        if abs(sparsity - share) > 1e-9:
            raise ValueError(f"sparsity={sparsity} is not that of {self.name}, which is {share}")
        for site in sites:
            if site.shape[1] % self.m:
                raise ValueError(f"{self.name} at {site.name!r}: a row has {site.shape[1]} "
                                 f"weights, which make no whole number of groups of {self.m}")

    def masks(self, pairs, sparsity):
        k = round(sparsity * self.m)
        return {name: by_neighbours(scores, k, self.m) for name, scores in pairs}


row, matrix, model = Row("row"), Matrix("matrix"), Model("model")
GROUPS = ("row", "matrix", "model")


def n_m(n, m):
    """The pattern that keeps n of each m neighbours."""
    return Neighbours(f"{n}:{m}", options.whole("n", n, 1, options.whole("m", m, 2) - 1), m)


def given(pattern):
    """The pattern itself, or the one with this name; ValueError for anything else."""
    if isinstance(pattern, str):
        return named(pattern, "pattern")
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern={pattern!r} is none of prune.row, prune.matrix, prune.model and "
                         "prune.n_m(2, 4)")
    return pattern


def named(name, argument="group"):
    """The pattern with a name such as "row" or "2:4"; ValueError, with `argument`, for others."""
    if isinstance(name, str) and (found := re.fullmatch(r"(\d+):(\d+)", name)):
        return n_m(*map(int, found.groups()))
    try:
        options.one_of(argument, name, GROUPS)
    except ValueError as error:
        raise ValueError(f"{error}, or N:M such as '2:4'") from None
    return {"row": row, "matrix": matrix, "model": model}[name]
