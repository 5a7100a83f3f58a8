"""An Example: ids, and a label for each id, which is the id itself or NOT_LEARNT.

A label has the place of its id: the model's loss shifts by one, so the label at place i is
compared with the prediction after the ids before i. Nothing comes before the first id, so
its label is always NOT_LEARNT. (A soft prompt would predict it: then one technique would
learn, and be measured on, more tokens than the others.)

The structure of the record (its prompt, its messages) and the tokenizer's offsets decide
which part is learnt. Libraries that search the ids for a marker string miss it if the text
before it changes how it is tokenized.
"""

import collections.abc
import dataclasses
import re
import reprlib

NOT_LEARNT = -100


@dataclasses.dataclass
class Example:
    """ids and labels: lists of one length t, at most the `length` that the reader was given."""

    ids: list
    labels: list
    documents: list | None = None  # of a packed example: the number of each id's document, from 1
    cut: int = 0  # how many tokens to learn lay beyond the length


def learnt(example):
    """How many labels of the Example are learnt."""
    return len(example.labels[1:]) - example.labels[1:].count(NOT_LEARNT)


def check_examples(examples, what="examples"):
    """TypeError unless `examples` is a list of Examples; `what` begins the error's text.

    Any object with a length and indexing counts as a list.
    """
    make = "data.read(path, tokenizer) makes Examples of a file, data.pieces(ids, length) of a text"
    if isinstance(examples, (str, dict)) or not (hasattr(examples, "__len__")
                                                 and hasattr(examples, "__getitem__")):
        if hasattr(examples, "examples"):
            make = "give its .examples"
        elif isinstance(examples, collections.abc.Iterator):
            make = "give list(...) of it"
        raise TypeError(f"{what}: this is {named(examples)}, not a list of Examples; {make}")
    for i, example in enumerate(examples):
        if not (hasattr(example, "ids") and hasattr(example, "labels")):
            raise TypeError(f"{what}: number {i} is {named(example)}, not an Example; {make}")


def named(value):
    """A shortened text, or the type of any other value, for an error of one line."""
    return reprlib.repr(value) if isinstance(value, str) else type(value).__name__


def pieces(ids, length):
    """A long text's ids -> Examples of at most `length` ids that learn all of it.

    Each piece starts with the last id of the piece before it. So every id but the first of
    the text is learnt once, with something before it. Pieces that do not overlap would never
    learn the ids at their starts, and a last piece of one id would learn nothing. The cost is
    one more id per piece.

    >>> [e.ids for e in pieces([1, 2, 3, 4], 3)]
    [[1, 2, 3], [3, 4]]
    """
    starts = range(0, len(ids) - 1, length - 1)
    return [Example(ids[i : i + length], [NOT_LEARNT, *ids[i + 1 : i + length]]) for i in starts]


def whole(text):
    """The text; ValueError if it holds half a character, such as JSON's \\ud800."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ValueError(f"the text holds half a character, {half[0]!r}, which UTF-8 cannot write")
    return text


def spans(tokenizer, text):
    """(ids, offsets) of a text, without an eos at its end.

    Some tokenizers put eos after each text, and some files already have it in their texts. An
    example has it once, and learns it.
    """
    ids, offsets = tokenizer.spans(text)
    if ids and ids[-1] == tokenizer.eos:
        return ids[:-1], offsets[:-1]
    return ids, offsets


def completion(tokenizer, prompt, answer, length):
    """An Example that learns only the answer and the end of the text."""
    ids, offsets = spans(tokenizer, prompt + answer)
    labels = only(ids, offsets, [(len(prompt), len(prompt + answer))])
    return clip(ids + [tokenizer.eos], labels + [tokenizer.eos], length)


def only(ids, offsets, turns):
    """Labels: the id where it belongs to one of the (start, end) turns, else NOT_LEARNT."""

    def inside(start, end):  # the first byte of a character is an empty span at its start
        return any(start < last and (end > first or start >= first) for first, last in turns)

    return [i if inside(*span) else NOT_LEARNT for i, span in zip(ids, offsets)]


def clip(ids, labels, length):
    """The Example of the first `length` ids; its `cut` counts the lost tokens to learn."""
    labels = [NOT_LEARNT, *labels[1:]]
    lost = labels[length:]
    return Example(ids[:length], labels[:length], cut=len(lost) - lost.count(NOT_LEARNT))


def at_least(name, value, least, why):
    """ValueError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: {why}")


def check_length(length):
    at_least("length", length, 2,
             "an example has at least 2 tokens, one to learn and one before it")
