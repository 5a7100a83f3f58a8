"""Token dropout and token masking: changes of the ids of Examples, each with its label.

    drop    leaves out each token that is read but not learnt, with probability p
    mask    puts `token` in the place of each token, with probability p; its label stays

The loss of a masked copy is that of the original text: the model predicts the same tokens from a
text with holes. That is the word dropout of Bowman et al. 2016, arXiv 1511.06349.
`drop` changes the length, so it never leaves out a token that is learnt. The first token of a
text always stays as it is.

>>> from minillm import augment, data
>>> example = data.Example([5, 6, 7, 8], [-100, -100, 7, 8])
>>> augment.drop([example], p=0.99)[1:]
[Example(ids=[5, 7, 8], labels=[-100, 7, 8], documents=None, cut=0)]
>>> augment.mask([example], 0, p=0.99)[1].labels == example.labels
True
"""

import dataclasses

from minillm import data, options
from minillm.augment.result import Augmented, generator, numbers


def drop(examples, p=0.1, *, copies=1, seed=0):
    """Examples -> Augmented; each copy lacks some of the tokens that are not learnt.

    p: the probability, from 0 up to (but not) 1. TypeError for what are no Examples.
    """
    def change(example, draw):
        may = [i > 0 and label == data.NOT_LEARNT and not opens(example, i)
               for i, label in enumerate(example.labels)]
        keep = [i for i, free in enumerate(may) if not (draw.random() < p and free)]
        rows = {name: row and [row[i] for i in keep] for name, row in
                (("ids", example.ids), ("labels", example.labels),
                 ("documents", example.documents))}
        return dataclasses.replace(example, **rows), len(may) - len(keep)

    return augmented("drop", examples, p, copies, seed, change)


def mask(examples, token, p=0.1, *, copies=1, seed=0):
    """Examples -> Augmented; each copy has `token` in the place of some ids. The labels stay.

    token: an id, such as the tokenizer's eos, or one for unknown words. p: as for `drop`.
    """
    options.whole("token", token, least=0)

    def change(example, draw):
        hit = [draw.random() < p and i > 0 and not opens(example, i)
               for i in range(len(example.ids))]
        ids = [token if one else i for one, i in zip(hit, example.ids)]
        count = sum(a != b for a, b in zip(ids, example.ids))
        return dataclasses.replace(example, ids=ids, labels=list(example.labels)), count

    return augmented("mask", examples, p, copies, seed, change)


def opens(example, i):
    """Whether token i is the first of its document in a packed Example."""
    return bool(example.documents) and example.documents[i] != example.documents[i - 1]


def augmented(name, examples, p, copies, seed, change):
    data.check_examples(examples)
    numbers(copies, seed)
    options.share("p", p)
    found = Augmented(examples)
    for example in examples:
        content = [name, example.ids, example.labels, example.documents]
        for k in range(copies):
            new, units = change(example, generator(seed, k, content))
            found.keep(name, example, new, units)
    return found
