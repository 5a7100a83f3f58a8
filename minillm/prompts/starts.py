"""How the vectors of a prompt start.

    random        each number from U(-0.5, 0.5)         Lester et al. 2021, arXiv 2104.08691
    vocabulary    rows of the embedding, drawn at random
    a text        the rows of its ids, from the first on: a shorter text is repeated, a longer one
                  is cut
    labels        for each class its label's mean row; the rest from the vocabulary

The paper draws from the 5,000 most frequent tokens; here from all, because a model does not say
which are frequent. peft has the first three. A prefix starts from what the model computes of a
text.

>>> import torch
>>> table = torch.eye(6)                                        # the embedding of 6 tokens
>>> vectors([4, 2], 3, lambda ids: table[ids], 6).argmax(1).tolist()
[4, 2, 4]
>>> vectors([[0, 1], [5]], 2, lambda ids: table[ids], 6).tolist()
[[0.5, 0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
"""

import torch

from minillm.calling import logits
from minillm.model.generate import evaluating, whole_number


def vectors(start, length, embed, vocabulary):
    """The vectors (length, e) at birth.

    start: "random", "vocabulary", a list of ids (a text), or a list of lists of ids (labels).
    embed: a function of ids (n,) that gives their rows (n, e). ValueError for a start that is none
    of these, is empty, has ids outside of the vocabulary, or more labels than `length`.
    """
    if start == "random":
        return torch.empty_like(embed(torch.zeros(length, dtype=torch.long))).uniform_(-0.5, 0.5)
    if not labels(start):
        return embed(ids_of(start, length, vocabulary, "'vocabulary', 'random', a list of ids (a "
                            "text) or a list of lists of ids (labels)"))
    if len(start) > length:
        raise ValueError(f"start has {len(start)} labels, and length={length}: give each label a "
                         "vector of its own")
    every = [ids_of(label, None, vocabulary, "a list of ids (a label)") for label in start]
    means = [embed(label).mean(0) for label in every]
    rest = embed(torch.randint(vocabulary, (length - len(start),)))
    return torch.cat([torch.stack(means), rest])


def labels(start):
    return isinstance(start, (list, tuple)) and any(isinstance(x, (list, tuple)) for x in start)


def ids_of(start, length, vocabulary, known="'vocabulary' or a list of ids"):
    """The ids (length,) of a text, repeated or cut, or of random tokens; length=None: all."""
    if isinstance(start, str) and start == "vocabulary":
        return torch.randint(vocabulary, (length,))
    ids = start.tolist() if isinstance(start, torch.Tensor) else start
    if not isinstance(ids, (list, tuple)) or not all(map(whole_number, ids)):
        raise ValueError(f"start={start!r} is none of {known}")
    if not ids:
        raise ValueError(f"start={start!r} is empty: give at least one id")
    if odd := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(f"start has the id {odd[0]}, and the vocabulary has 0 to {vocabulary - 1}")
    return torch.tensor(ids)[torch.arange(length or len(ids)) % len(ids)]


def outputs(model, sites, ids):
    """{name: output (t, out)} of leaves where the model reads the text ids (t,)."""
    found, handles = {}, []
    device = next(model.parameters()).device
    try:
        for site in sites:
            def hook(module, args, output, name=site.name):
                found[name] = output[0]

            handles.append((site.layer or site.module).register_forward_hook(hook))
        with torch.no_grad(), evaluating(model):
            logits(model, ids[None].to(device))
    finally:
        for handle in handles:
            handle.remove()
    if missed := [site.name for site in sites if site.name not in found]:
        raise ValueError(f"the model does not call {missed[0]!r}, so a prefix has no place there")
    return found
