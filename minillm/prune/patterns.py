"""Patterns: which weights compete with which, and how many of them go.

    row          the weights of one output channel
    matrix       those of one matrix
    model        those of all chosen leaves, so that less important matrices lose more
    n_m(2, 4)    four neighbours in a row, of which two stay: what sparse tensor cores compute with

In each group exactly round(sparsity * size) weights go, those with the smallest scores. Of equal
scores the first go, so the same scores make the same mask.

Nothing is sorted. The k-th smallest score of a group is a threshold: what is above it stays, and of
what equals it the last ones, as many as are missing.

- Rows: the threshold comes from a quickselect, a few rows at a time, on all threads.
- A matrix, a model: a sample gives two numbers with the threshold between them. Only the few scores
  between these are looked at. Counting shows whether the sample was wrong; then all are.

A billion float32 weights take 6 to 8 s of CPU time, which all cores share. To partition whole rows
took 43 s on one core of the same machine.

>>> scores = torch.tensor([[0.1, 0.5, 0.3, 0.2], [4.0, 3.0, 2.0, 1.0]])
>>> for pattern in (row, matrix, n_m(1, 2)):
...     print(pattern.name, pattern.masks({"leaf": scores}.items(), 0.5)["leaf"].int().tolist())
row [[0, 1, 1, 0], [1, 1, 0, 0]]
matrix [[0, 0, 0, 0], [1, 1, 1, 1]]
1:2 [[0, 1, 1, 0], [1, 0, 1, 0]]
"""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from minillm import options

PIECE = 1 << 18  # scores that a thread looks at in one go: they fit its cache
SAMPLE = 1 << 16


@dataclasses.dataclass(frozen=True, repr=False)
class Pattern:
    """`masks(pairs, sparsity)`: {site: mask (out, in)} from pairs (site, scores (out, in))."""

    name: str  # as a file has it
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
        if round(sparsity * self.m) != self.m - self.n:
            raise ValueError(f"sparsity={sparsity} is not that of {self.name}, which is "
                             f"{1 - self.n / self.m:g}")
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
    """The pattern of which n of m neighbours stay."""
    return Neighbours(f"{n}:{m}", options.whole("n", n, 1, options.whole("m", m, 2) - 1), m)


def given(pattern):
    """The pattern, if it is one; else a ValueError."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern={pattern!r} is none of prune.row, prune.matrix, prune.model and "
                         "prune.n_m(2, 4)")
    return pattern


def named(name):
    """The pattern that a file calls so."""
    if isinstance(name, str) and (found := re.fullmatch(r"(\d+):(\d+)", name)):
        return n_m(*map(int, found.groups()))
    try:
        options.one_of("group", name, GROUPS)
    except ValueError as error:
        raise ValueError(f"{error}, or N:M such as '2:4'") from None
    return {"row": row, "matrix": matrix, "model": model}[name]


# --- finding the smallest -----------------------------------------------------------------------


def floats(scores):
    """(n, m) as numpy has it: no half precision."""
    return scores.to("cpu", torch.promote_types(scores.dtype, torch.float32)).contiguous().numpy()


def threads(work, pieces):
    """[work(*piece)] on all threads; numpy lets them run at once."""
    if len(pieces) == 1 or torch.get_num_threads() == 1:
        return [work(*piece) for piece in pieces]  # a pool costs more than a small matrix
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, *zip(*pieces)))


def by_rows(scores, sparsity):
    """The mask (n, m): in each row exactly round(sparsity * m) are False."""
    n, m = scores.shape
    k, keep = round(sparsity * m), torch.ones(n, m, dtype=torch.bool)
    if k and n:
        s, few = floats(scores), max(PIECE // m, 1)
        threads(lambda s, keep: some_rows(s, k, keep),
                [(s[i : i + few], keep.numpy()[i : i + few]) for i in range(0, n, few)])
    return keep.to(scores.device)


def some_rows(s, k, keep):
    """Write the mask of a few rows s (n, m) into `keep`."""
    ranked = np.partition(s, k - 1, axis=1)
    kth = ranked[:, k - 1 : k]  # (n, 1)
    np.greater(s, kth, out=keep)
    if k == s.shape[1]:
        return
    tied = np.flatnonzero(ranked[:, k:].min(1) == kth[:, 0])
    if len(tied):  # some that equal the threshold stay: the last of each row
        rows, columns = np.nonzero(s[tied] == kth[tied])
        equal = np.bincount(rows, minlength=len(tied))
        less = s.shape[1] - np.count_nonzero(keep[tied], axis=1) - equal
        place = np.arange(len(rows)) - (np.cumsum(equal) - equal)[rows]  # 0, 1, ... in each row
        stay = place >= (k - less)[rows]
        keep[tied[rows[stay]], columns[stay]] = True


def together(every, sparsity):
    """The masks of several score matrices: exactly the share of all their scores is False."""
    keep = [torch.ones(scores.shape, dtype=torch.bool) for scores in every]
    size = sum(scores.numel() for scores in every)
    if k := round(sparsity * size):
        flat = [(floats(s).ravel(), mask.numpy().ravel()) for s, mask in zip(every, keep)]
        pieces = [(s[i : i + PIECE], mask[i : i + PIECE])
                  for s, mask in flat for i in range(0, len(s), PIECE)]
        kth = threshold([s for s, _ in pieces], k)
        threads(lambda s, mask: np.greater(s, kth, out=mask), pieces)
        left = size - k - sum(np.count_nonzero(mask) for _, mask in pieces)  # equal ones that stay
        for s, mask in reversed(pieces):
            if not left:
                break
            equal = np.flatnonzero(s == kth)[-left:]
            mask[equal], left = True, left - len(equal)
    return [mask.to(scores.device) for mask, scores in zip(keep, every)]


def threshold(parts, k):
    """The k-th smallest number of several arrays."""
    size = sum(map(len, parts))
    sample = np.sort(np.concatenate([part[:: max(size // SAMPLE, 1)] for part in parts]))
    place, slack = k / size * len(sample), 4 * len(sample) ** 0.5  # 8 standard deviations
    low = sample[int(place - slack)] if place > slack else -np.inf
    high = sample[int(place + slack)] if place + slack < len(sample) else np.inf
    pieces = [(part,) for part in parts]
    below = sum(threads(lambda s: np.count_nonzero(s < low), pieces))
    inside = np.concatenate(threads(lambda s: s[(s >= low) & (s <= high)], pieces))
    if not below < k <= below + len(inside):
        below, inside = 0, np.concatenate(parts)
    return np.partition(inside, k - below - 1)[k - below - 1]


def by_neighbours(scores, k, m):
    """The mask (n, i): of each m neighbours the k with the smallest scores are False."""
    keep, some = torch.ones(scores.shape, dtype=torch.bool), PIECE // m
    s, mask = floats(scores).reshape(-1, m), keep.numpy().reshape(-1, m)  # (n, i) -> (n * i / m, m)
    threads(lambda s, mask: some_neighbours(s, k, mask),
            [(s[i : i + some], mask[i : i + some]) for i in range(0, len(s), some)])
    return keep.to(scores.device)


def some_neighbours(s, k, keep):
    """Write the mask of a few groups s (n, m) into `keep`."""
    s = np.ascontiguousarray(s.T)  # (m, n)
    rank = np.zeros(s.shape, dtype=np.uint8)  # how many of its group go before it
    for j in range(len(s)):
        for i in range(j):
            first = s[i] <= s[j]
            rank[j] += first
            rank[i] += ~first
    keep[:] = (rank >= k).T
