"""Perplexity by position: does a model use, and survive, a long context?

    PPL of a part = exp(-1/n sum log p(x_i | x_<i))        over the tokens i of that part

A model that uses its context predicts late tokens better than early ones. Beyond the positions
of its training the curve of plain RoPE rises steeply; a scaling that works keeps it flat. This
picture is the one of Press et al. 2022 (ALiBi, arXiv 2108.12409) and of the papers in
`minillm.model.rope`. The positions that a configuration allows may be more than those of the
training.

All parts are measured on the same windows.
"""

import torch

from minillm import options
from minillm.measure.intervals import score
from minillm.measure.likelihood import token_nll, windows_of
from minillm.measure.scores import metric


def by_position(model, tokenizer, text, length, parts=8, windows=None):
    """[(first, end, Score)]: the perplexity of the tokens at positions first to end - 1.

    The text is cut into windows of `length` tokens that do not overlap, at most `windows` of
    them, each a row of its own (so memory is that of one). Each window is cut into `parts`
    equal parts; the first token of a window is not predicted. The interval is over windows.
    ValueError for a text shorter than one window, and for more parts than predicted tokens.
    """
    rows = torch.tensor(windows_of(tokenizer, text, length, windows))  # (n, length)
    if rows.shape[1] < length:
        raise ValueError(f"a text of {rows.shape[1]} tokens is shorter than a window of {length}")
    parts = options.whole("parts", parts, 1, length - 1)
    ends = [round(i * length / parts) for i in range(parts + 1)]
    found = [[] for _ in range(parts)]
    for row in rows:
        labels = row[None].clone()
        labels[:, 0] = -100
        losses = token_nll(model, row[None], labels)[0][0, 1 - length:]  # of tokens 1 .. length - 1
        for part, (first, end) in zip(found, zip(ends, ends[1:])):
            piece = losses[max(first - 1, 0) : end - 1]
            part.append((piece.sum().item(), len(piece)))
    return [(first, end, score("perplexity", part, metric("perplexity")))
            for first, end, part in zip(ends, ends[1:], found)]
