"""The smallest scores of each group, found without sorting.

The k-th smallest score of a group is a threshold. What is above it stays. Of the scores
that equal it, the last ones stay, as many as are missing.

- Rows: a quickselect gives the threshold, a few rows at a time, on all threads.
- A matrix or a model: a sample gives two numbers with the threshold between them, and
  only the few scores between them are searched. A count shows whether the sample was
  wrong; then all scores are searched.
- A few neighbours: each score is compared with each other one.

A billion float32 weights take 6 to 8 s of CPU time, spread over all cores. To partition
whole rows took 43 s on one core of the same machine.

>>> by_rows(torch.tensor([[0.1, 0.5, 0.3, 0.2]]), 0.5).int().tolist()
[[0, 1, 1, 0]]
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

PIECE = 1 << 18  # scores that a thread handles at once: they fit its cache
SAMPLE = 1 << 16


def floats(scores):
    """Scores (n, m) as a numpy array: half precision becomes float32."""
    return scores.to("cpu", torch.promote_types(scores.dtype, torch.float32)).contiguous().numpy()


def threads(work, pieces):
    """[work(*piece), ...] on all threads; numpy lets them run in parallel."""
    if len(pieces) == 1 or torch.get_num_threads() == 1:
        return [work(*piece) for piece in pieces]  # a pool costs more than a small matrix
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, *zip(*pieces)))


def by_rows(scores, sparsity):
    """Scores (n, m) -> mask (n, m): round(sparsity * m) of each row are False."""
    n, m = scores.shape
    k, keep = round(sparsity * m), torch.ones(n, m, dtype=torch.bool, device="cpu")
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
    if len(tied):  # of those that equal the threshold, the last of a row stay
        rows, columns = np.nonzero(s[tied] == kth[tied])
        equal = np.bincount(rows, minlength=len(tied))
        less = s.shape[1] - np.count_nonzero(keep[tied], axis=1) - equal
        place = np.arange(len(rows)) - (np.cumsum(equal) - equal)[rows]  # 0, 1, ... in each row
        stay = place >= (k - less)[rows]
        keep[tied[rows[stay]], columns[stay]] = True


def together(every, sparsity):
    """The masks of several score matrices: exactly this share of all is False."""
    keep = [torch.ones(scores.shape, dtype=torch.bool, device="cpu") for scores in every]
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
    """Scores (n, i) -> mask (n, i), False at the k smallest of each m neighbours."""
    keep, some = torch.ones(scores.shape, dtype=torch.bool, device="cpu"), PIECE // m
    s, mask = floats(scores).reshape(-1, m), keep.numpy().reshape(-1, m)  # (n, i) -> (n * i / m, m)
    threads(lambda s, mask: some_neighbours(s, k, mask),
            [(s[i : i + some], mask[i : i + some]) for i in range(0, len(s), some)])
    return keep.to(scores.device)


def some_neighbours(s, k, keep):
    """Write the mask of a few groups s (n, m) into `keep`."""
    s = np.ascontiguousarray(s.T)  # (m, n)
    holds = np.min_scalar_type(len(s))  # the least type that counts up to m
    rank = np.zeros(s.shape, dtype=holds)  # how many of its group go before it
    for j in range(len(s)):
        for i in range(j):
            first = s[i] <= s[j]
            rank[j] += first
            rank[i] += ~first
    keep[:] = (rank >= k).T
