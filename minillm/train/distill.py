"""Distillation: a student learns the probabilities of a teacher, not the text alone.

    loss = (1 - share) H(text, student) + share T^2 KL(teacher_T || student_T)

                                    Hinton et al. 2015, arXiv 1503.02531, section 2
    code           paper   meaning
    temperature    T       both logits are divided by it: small probabilities count more
    share                  the weight of the teacher's part; in the paper the text's is small

A text gives one token at each place. The teacher gives the probability of every token, which is
more information for the student. T^2 keeps the gradient's size about the same for every T. The
teacher reads the same batch, in eval mode and without gradients.

Cost: a forward pass of the teacher for each batch, and the logits of the learnt tokens of both
models, (n, vocabulary) each. Student and teacher need the same tokenizer. Not included: hidden
states and attention maps as targets (TinyBERT), and texts that the teacher writes (Kim & Rush
2016).

>>> import torch, minillm
>>> from minillm.train.distill import Distillation
>>> big, small = (minillm.Transformer(minillm.Config(50, w, 1, 2)) for w in (16, 8))
>>> ids = torch.tensor([[3, 1, 4, 1, 5]])
>>> text = minillm.train.loss_sum(small, ids, ids)
>>> torch.allclose(Distillation(big, share=0.0)(small, ids, ids), text)        # the text alone
True
>>> Distillation(small, share=1.0)(small, ids, ids).item() < 1e-4         # nothing to learn
True
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from minillm import data, options
from minillm.calling import logits_at
from minillm.model.generate import evaluating
from minillm.registry import prepare
from minillm.train.room import check_room


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A loss for `train(..., loss=Distillation(teacher))`. ValueError for numbers out of range."""

    teacher: nn.Module
    temperature: float = 2.0
    share: float = 0.9

    def __post_init__(self):
        if not isinstance(self.teacher, nn.Module):
            raise ValueError(f"teacher={self.teacher!r} is not a model")
        options.positive("temperature", self.temperature)
        options.real("share", self.share, lambda x: 0 <= x <= 1, "a number from 0 to 1")

    def check(self, examples):
        """ValueError if the teacher cannot read an example; `train` calls this before its work."""
        try:
            check_room(self.teacher, examples)
        except ValueError as error:
            raise ValueError(f"the teacher cannot read this: {error}") from error

    def __call__(self, model, ids, labels, mask=None):
        """The summed loss, in nats, over the learnt labels of a batch: ids, labels, mask (b, t)."""
        labels = labels.clone()
        labels[:, 0] = data.NOT_LEARNT
        student, target = aligned(model, ids, labels, mask)  # (n, vocabulary), (n,)
        with torch.no_grad(), evaluating(self.teacher):
            teacher, _ = aligned(self.teacher, ids, labels, mask)
        if student.shape != teacher.shape:
            raise ValueError(f"the teacher has {teacher.shape[1]:,} tokens, the student "
                             f"{student.shape[1]:,}: distillation needs one tokenizer")
        T = self.temperature
        soft = F.kl_div(F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1),
                        reduction="sum", log_target=True)
        hard = F.cross_entropy(student, target, reduction="sum")
        return (1 - self.share) * hard + self.share * T**2 * soft


def aligned(model, ids, labels, mask):
    """The logits (n, vocabulary) of the n learnt tokens, as float32, and their labels (n,)."""
    ids, labels, mask = prepare(model, ids, labels, mask)
    target = labels[:, 1:]  # (b, t - 1)
    keep = target != data.NOT_LEARNT
    return logits_at(model, ids, mask, keep).float(), target[keep]
