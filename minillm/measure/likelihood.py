"""The likelihood that a model gives to text: of tokens, as perplexity, and of choices."""

import numpy as np
import torch
import torch.nn.functional as F

from minillm.calling import logits, native
from minillm.data import check_examples, collate
from minillm.measure.intervals import score
from minillm.measure.scores import listed, metric
from minillm.registry import instead, prepare
from minillm.registry.names import by_rows
from minillm.model.generate import evaluating, left_pad


def nll(model, ids, labels, mask=None):
    """(-log p of the labels, summed for each row (b,); the number of labels (b,)). Labels
    of -100 do not count.

    ids, labels, mask (b, t) may be on any device; the model may be minillm's, Hugging
    Face's, or any that maps ids to logits.
    """
    losses, keep = token_nll(model, ids, labels, mask)
    return losses.sum(1).cpu(), keep.sum(1).cpu()


@torch.inference_mode()
def token_nll(model, ids, labels, mask=None):
    """(-log p of each label, 0 where it is -100; whether it counts), each (b, p + t - 1).

    Label i + 1 is predicted at position i. p: the placeholders that soft prompts put before.
    """
    instead.check_tokens(instead.replacing(model), "the likelihood of a text")
    with evaluating(model):
        device = next(model.parameters()).device
        ids, labels, mask = (
            None if t is None else t.to(device) for t in prepare(model, ids, labels, mask)
        )
        target, keep = labels[:, 1:], labels[:, 1:] != -100
        if native(model):
            h = model.hidden(ids, mask)[:, :-1]  # (b, t - 1, width)
            if by_rows(model.lm_head):  # its adapters need the rows of the batch
                pieces = [F.cross_entropy(model.lm_head(h)[keep].float(), target[keep],
                                          reduction="none")]
            else:  # 512 tokens at a time, which bounds the memory of the logits
                pieces = [F.cross_entropy(model.lm_head(x).float(), y, reduction="none")
                          for x, y in zip(h[keep].split(512), target[keep].split(512))]
            kept = torch.cat(pieces) if pieces else h.new_zeros(0)
        else:
            kept = F.cross_entropy(
                logits(model, ids, mask)[:, :-1][keep].float(), target[keep], reduction="none"
            )
    if not kept.isfinite().all():
        raise ValueError(
            "the model's log-likelihood is nan or inf: its weights or activations are out of range"
        )
    return torch.zeros(keep.shape, device=device).masked_scatter(keep, kept), keep


def at_least(least, **arguments):
    """ValueError for an argument (None is allowed) below the least that makes sense."""
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value!r}: the least is {least}")


def windows_of(tokenizer, text, length, windows=None):
    """At most `windows` pieces of `length` ids each, which do not overlap: lists of ids.

    A text that is shorter than `length` is one piece. ValueError for a length below 2, for
    windows below 1, and for a text of fewer than 2 tokens.
    """
    at_least(2, length=length)
    at_least(1, windows=windows)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has nothing to predict")
    rows = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [row for row in rows if len(row) == length][:windows] or [ids]


def perplexity(model, tokenizer, text, length=512, windows=None, batch=4):
    """The perplexity of text, a Score, over at most `windows` windows of `length` tokens,
    which do not overlap.

    The first token of a window is not predicted, and no token is put before it. A last
    window that is not full is left out unless it is the only one. The interval is over
    windows. ValueError for a length below 2, and for windows or batch below 1.
    """
    at_least(1, batch=batch)
    rows, parts = windows_of(tokenizer, text, length, windows), []
    for i in range(0, len(rows), batch):
        x = torch.tensor(rows[i : i + batch])
        labels = x.clone()
        # A soft prompt would predict the first token, and so be measured on more tokens.
        labels[:, 0] = -100
        parts += zip(*(t.tolist() for t in nll(model, x, labels)))
    return score("perplexity", parts, metric("perplexity"))


def completions(model, examples, pad=0, batch=8):
    """The perplexity of the learnt tokens of Examples (the completions of the user's
    records), a Score over examples.

    Its logarithm is the loss that training reports: the mean over all learnt tokens. The
    first token of an example is not predicted. ValueError if no example has a token to
    predict.
    """
    at_least(1, batch=batch)
    check_examples(examples)
    parts = []
    for i in range(0, len(examples), batch):
        ids, labels, mask = collate(examples[i : i + batch], pad)
        labels[:, 0] = -100
        parts += zip(*(t.tolist() for t in nll(model, ids, labels, mask)))
    parts = [part for part in parts if part[1]]
    if not parts:
        raise ValueError(f"{len(examples)} examples have no token to predict")
    return score("perplexity", parts, metric("perplexity"))


def choose(model, tokenizer, prompts, choices, batch=8):
    """For each prompt, the choice with the largest mean log-likelihood of its tokens.

    The mean and not the sum: choices have different numbers of tokens, and the sum
    would prefer short ones. ValueError if there are no prompts or no choices, or if one
    of them is an empty text.
    """
    at_least(1, batch=batch)
    prompts, choices = listed(prompts), listed(choices)
    for name, texts in (("prompts", prompts), ("choices", choices)):
        if not texts or not all(texts):
            raise ValueError(
                f"{name}: "
                + (
                    f"number {texts.index('') + 1} of {len(texts)} is empty"
                    if texts
                    else "there are none"
                )
            )
    rows = []
    for prompt in prompts:
        for choice in choices:
            ids, offsets = tokenizer.spans(f"{prompt} {choice}")
            rows.append(
                (ids, [i if end > len(prompt) else -100 for i, (_, end) in zip(ids, offsets)])
            )
    means = []
    for i in range(0, len(rows), batch):
        ids, mask = left_pad([ids for ids, _ in rows[i : i + batch]])
        labels, _ = left_pad([labels for _, labels in rows[i : i + batch]], -100)
        total, count = nll(model, ids, labels, mask)
        means += (total / count).tolist()
    scores = np.array(means).reshape(len(prompts), len(choices))  # (n * c,) -> (n, c)
    return [choices[i] for i in scores.argmin(1)]
