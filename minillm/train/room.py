"""Check, before the training, that the model can read every example.

An example is too long if it has more tokens than the model has positions; a soft prompt takes
positions too. An id is unknown if the embedding has no row for it.
"""

import torch

from minillm.calling import limit
from minillm.data import NOT_LEARNT
from minillm.registry import prepare


def check_room(model, examples, what="example"):
    """ValueError for the first example that is too long or has an unknown id.

    Also for packed examples, if a technique (a soft prompt) cannot take them.

    what: the name of an example in an error. If the model does not state its positions or its
    vocabulary, every example passes.
    """
    config = getattr(model, "config", None)
    most, vocabulary = limit(model), getattr(config, "vocab_size", None)
    before = prepare(model, torch.zeros(1, 1, dtype=torch.long))[0].shape[1] - 1  # soft prompts
    packed = next((e.documents for e in examples if e.documents and max(e.documents) > 1), None)
    if packed:  # an error if a technique takes no packed rows
        prepare(model, torch.zeros(1, len(packed), dtype=torch.long), None, torch.tensor([packed]))
    for i, example in enumerate(examples):
        size = longest(example) + before
        if most is not None and size > most:
            prompt = f" and a prompt of {before}" if before else ""
            possible = (f"at most {most - before} tokens of an example fit" if before < most else
                        "not one token of an example fits")
            raise ValueError(f"{what} {i} has {size - before} tokens{prompt}, and the model has "
                             f"{most} positions: {possible}")
        odd = vocabulary and unknown(example, vocabulary)
        if odd:
            raise ValueError(f"{what} {i} has the id {odd[0]}, and the model's vocabulary has the "
                             f"ids 0 to {vocabulary - 1}: was another tokenizer used?")


def longest(example):
    """The tokens of an example, or of the longest document of a packed one."""
    marks = example.documents
    return max(map(marks.count, set(marks))) if marks else len(example.ids)


def unknown(example, vocabulary):
    """The ids and learnt labels that are outside the vocabulary."""
    every = set(example.ids) | set(example.labels) - {NOT_LEARNT}
    return [i for i in every if not 0 <= i < vocabulary]
