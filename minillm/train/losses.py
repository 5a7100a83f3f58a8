"""The loss of a batch and of held-out examples, the same for all techniques.

    loss = - 1/n  sum over the n learnt tokens of  log p(token | the tokens before it)

The first token of a text has nothing before it. A soft prompt would make it predictable, and
the training with a prompt would then learn, and report, other tokens than the training
without. So no method learns it, here as in `measure.perplexity`: the losses of all methods
are means over the same tokens.
"""

import torch
import torch.nn.functional as F

from minillm import data
from minillm.calling import logits, native
from minillm.model.generate import evaluating
from minillm.registry import prepare


class NotFinite(ValueError):
    """The loss of a step, or its gradient, is infinite or no number."""


def learnt(labels):
    """How many tokens a batch with these labels (b, t) learns."""
    return int((labels[:, 1:] != data.NOT_LEARNT).sum())


def loss_sum(model, ids, labels, mask=None):
    """The summed cross-entropy, in nats, over the learnt labels of a batch: ids, labels (b, t).

    The model is minillm's, or any other that computes logits (b, t, vocab) from ids.
    """
    labels = labels.clone()
    labels[:, 0] = data.NOT_LEARNT  # before `prepare`, which may put a prompt in front
    ids, labels, mask = prepare(model, ids, labels, mask)
    if native(model):
        return model.loss(ids, labels, mask, reduction="sum")
    every = logits(model, ids, mask, alone=False)  # (b, t, vocab)
    return F.cross_entropy(every[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                           ignore_index=data.NOT_LEARNT, reduction="sum")


@torch.no_grad()
def held_out_loss(model, examples, batch_size=8, pad=0):
    """The mean loss per learnt token, in nats, of a list of `data.Example`; changes nothing.

    The model computes in eval mode, without dropout.
    """
    data.check_examples(examples)
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for i in range(0, len(examples), batch_size):
            batch = data.collate(examples[i : i + batch_size], pad)
            if n := learnt(batch[1]):
                batch = (None if t is None else t.to(device) for t in batch)
                total, count = total + loss_sum(model, *batch).item(), count + n
    if not count:
        raise ValueError(f"none of the {len(examples)} held-out examples has anything to learn")
    return total / count
