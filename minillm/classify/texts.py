"""Texts and their classes: the logits of a text, the loss, the examples, the predictions.

See the page of the package for the idea.
"""

import torch
import torch.nn.functional as F

from minillm import calling, data
from minillm.data.example import check_length, spans
from minillm.model.generate import evaluating
from minillm.registry import prepare
from minillm.registry.instead import replacing


def head_of(model):
    """The Classifier that takes part; ValueError if none does."""
    if patch := replacing(model):
        return patch
    raise ValueError("the model has no head of classes that takes part: "
                     "minillm.classify.wrap(model, classes=...), or minillm.use with its name")


def logits(model, ids, mask=None):
    """The logits (b, c) of the classes for texts ids (b, t).

    mask (b, t) is True, or 1, at real tokens. ValueError for rows that hold several texts.
    """
    patch = head_of(model)
    if mask is not None and mask.dtype != torch.bool:
        if bool((mask > 1).any()):
            raise ValueError("a class belongs to one text, and these rows hold several: give the "
                             "examples unpacked")
        mask = mask.bool()
    ids, _, mask = prepare(model, ids, None, mask)
    every = (model(ids, mask) if calling.native(model)
             else calling.logits(model, ids, mask, alone=False))
    return pooled(every.float(), mask, patch.pool)


def pooled(every, mask, pool):
    """(b, t, c) -> (b, c), over the columns where mask (b, t) is True; None: over all."""
    b, t, _ = every.shape
    mask = torch.ones(b, t, dtype=torch.bool, device=every.device) if mask is None else mask
    if pool == "mean":
        return (every * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    last = (mask * torch.arange(t, device=mask.device)).amax(1)
    return every[torch.arange(b, device=mask.device), last]


def loss(model, ids, labels, mask=None):
    """The summed cross-entropy, in nats, of the class of each row: `train`'s loss=."""
    y, x = labels[labels != data.NOT_LEARNT], logits(model, ids, mask)
    if int(y.max()) >= x.shape[1]:
        raise ValueError(f"an example has the class {int(y.max())}, and the head {x.shape[1]}")
    return F.cross_entropy(x, y, reduction="sum")


def check(examples):
    """ValueError unless each example has one label, a number from 0, at its last id."""
    for i, one in enumerate(examples):
        learnt = [k for k, label in enumerate(one.labels) if label != data.NOT_LEARNT]
        if learnt != [len(one.labels) - 1] or one.labels[-1] < 0:
            raise ValueError(f"example {i} has to have one label, its class, at its last id: "
                             "minillm.classify.examples makes such examples")


loss.check = check


def examples(model, tokenizer, texts, labels, length=256):
    """[Example] of texts and the classes that the model's head gives them, of at most `length` ids.

    A text that is too long loses its end. ValueError for an empty text and an unknown class.
    """
    names, rows = head_of(model).names, []
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts, but {len(labels)} labels")
    for i, (text, label) in enumerate(zip(texts, labels)):
        if label not in names:
            raise ValueError(f"text {i} has the class {label!r}; the head has {names}")
        ids = ended(tokenizer, text, length)
        rows.append(data.Example(ids, [data.NOT_LEARNT] * (len(ids) - 1) + [names.index(label)]))
    return rows


def ended(tokenizer, text, length):
    """The first ids of a text, and the end-of-text id: at most `length` ids.

    ValueError for an empty text, a length below 2, and a tokenizer without an end-of-text id.
    """
    check_length(length)
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no end-of-text id (eos), where a text has its class")
    ids = spans(tokenizer, text)[0][: length - 1]
    if not ids:
        raise ValueError(f"the text {text!r} has no token, so it has no class")
    return [*ids, tokenizer.eos]


@torch.no_grad()
def mean_loss(model, examples, batch_size=8, pad=0):
    """The mean loss, in nats, of Examples; for `train`: evaluate=functools.partial(mean_loss,
    examples=held_out)."""
    check(examples)
    device, total = next(model.parameters()).device, 0.0
    with evaluating(model):
        for i in range(0, len(examples), batch_size):
            batch = data.collate(examples[i : i + batch_size], pad)
            total += loss(model, *(None if t is None else t.to(device) for t in batch)).item()
    return total / len(examples)


@torch.no_grad()
def predict(model, tokenizer, texts, length=256, batch_size=8):
    """The likeliest class of each text: a list of names, or of numbers from 0."""
    names, device, found = head_of(model).names, next(model.parameters()).device, []
    rows = [ended(tokenizer, text, length) for text in texts]
    with evaluating(model):
        for i in range(0, len(rows), batch_size):
            batch = [data.Example(ids, ids) for ids in rows[i : i + batch_size]]
            ids, _, mask = data.collate(batch, tokenizer.pad or 0)
            x = logits(model, ids.to(device), None if mask is None else mask.to(device))
            found += [names[k] for k in x.argmax(1).tolist()]
    return found
