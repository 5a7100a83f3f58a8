"""From a list of Examples to batches: their order, the held-out share, a fingerprint."""

import array
import hashlib

import torch

from minillm.data.example import NOT_LEARNT, at_least, check_examples


class Batches:
    """An endless iterator of (ids, labels, mask): each (b, t), padded on the right to the longest
    example; mask is None if nothing is padded.

    Every epoch has all examples once, so its last batch may be smaller. `len()` is the number of
    batches per epoch. The order in an epoch depends only on the seed and the epoch's number, so
    the state is two numbers: (epoch, position).
    """

    def __init__(self, examples, batch_size, seed=0, pad=0):
        check_examples(examples)
        if not examples:
            raise ValueError("there are no examples to train on")
        for i, example in enumerate(examples):
            if len(example.ids) != len(example.labels):
                raise ValueError(f"example {i} has {len(example.ids)} ids and "
                                 f"{len(example.labels)} labels")
            if all(label == NOT_LEARNT for label in example.labels[1:]):
                raise ValueError(f"example {i} has nothing to learn: all its labels are "
                                 f"{NOT_LEARNT}")
        at_least("batch_size", batch_size, 1, "a batch has at least one example")
        self.examples, self.batch_size, self.seed, self.pad = examples, batch_size, seed, pad
        self.epoch = self.position = 0
        self.shuffled = None, []  # (epoch, its order)

    def __len__(self):
        return -(-len(self.examples) // self.batch_size)

    def state_dict(self):
        return dict(epoch=self.epoch, position=self.position)

    def load_state_dict(self, state):
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < len(self.examples):
            raise ValueError(f"epoch {epoch}, position {position} is not a place in "
                             f"{len(self.examples)} examples")
        self.epoch, self.position = epoch, position

    def order(self):
        """The epoch's permutation of the examples."""
        if self.shuffled[0] != self.epoch:
            digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
            draw = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            order = torch.randperm(len(self.examples), generator=draw, device="cpu").tolist()
            self.shuffled = self.epoch, order
        return self.shuffled[1]

    def __iter__(self):
        return self

    def __next__(self):
        return collate(self.draw(), self.pad)

    def draw(self):
        """The examples of the next batch."""
        chosen = self.order()[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if self.position >= len(self.examples):
            self.epoch, self.position = self.epoch + 1, 0
        return [self.examples[i] for i in chosen]


batches = Batches


def collate(examples, pad=0):
    """Examples -> (ids, labels, mask), each (b, t).

    If an example is packed, the mask holds the numbers of the documents. Else it is True at
    tokens and False at padding, or None if every example has t tokens.
    """
    t = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [pad] * (t - len(e.ids)) for e in examples])
    labels = torch.tensor([e.labels + [NOT_LEARNT] * (t - len(e.ids)) for e in examples])
    if any(e.documents for e in examples):
        documents = [e.documents or [1] * len(e.ids) for e in examples]
        return ids, labels, torch.tensor([row + [0] * (t - len(row)) for row in documents])
    if all(len(e.ids) == t for e in examples):
        return ids, labels, None
    return ids, labels, torch.arange(t) < torch.tensor([[len(e.ids)] for e in examples])


def content(example):
    """The ids, labels and documents of an example, as bytes."""
    rows = [example.ids, example.labels, example.documents or []]
    return b"".join(array.array("q", row).tobytes() for row in (list(map(len, rows)), *rows))


def fingerprint(examples):
    """16 hexadecimal digits that depend on every id, label and document, and on their order.

    A checkpoint keeps them, so that a run does not resume with other data.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(content(example))
    return digest.hexdigest()[:16]


def held_out(examples, share, seed=0):
    """(examples to train on, held-out examples), two lists in the given order.

    Only a hash of the example's own content and the seed decides. So equal examples stay
    together, an example that is added or removed moves no other, and the share is exact only
    on average. Hold out before you pack. ValueError if one of the lists would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share!r}: a share to hold out lies between 0 and 1")
    check_examples(examples)
    kept, held = [], []
    for example in examples:
        digest = hashlib.sha256(f"{seed} ".encode() + content(example)).digest()
        (held if int.from_bytes(digest[:8], "big") < share * 2**64 else kept).append(example)
    if not kept or not held:
        raise ValueError(f"share={share!r} of {len(kept) + len(held)} examples holds out "
                         f"{len(held)} and leaves {len(kept)}: neither may be 0; more examples, "
                         "another share or another seed may help")
    return kept, held
