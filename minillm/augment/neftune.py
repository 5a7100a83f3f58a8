"""NEFTune: uniform noise on the embedding's output, in training only.

    x = embed(ids) + alpha / sqrt(L d) * eps        eps ~ U(-1, 1), (b, t, d)

                        Jain et al. 2023, "NEFTune", arXiv 2310.05914, algorithm 1

    code      paper     meaning
    alpha     alpha     the paper takes 5, 10 and 15
    L         L         the tokens of the text, without padding; of a packed row, of each document
    d         d         the width of the embedding

A number of the noise has the mean square alpha^2 / (3 L d). So the noise of a whole text has the
length alpha / sqrt(3), on average of the squares, whatever L and d are.

It is a loss around another loss, because only a loss sees the batch's mask:

    train(model, examples, ..., loss=NEFTune(train.loss_sum, alpha=5))
    train(model, examples, ..., loss=NEFTune(distill.Distillation(teacher), alpha=5))

While the loss is computed, a hook on the token embedding adds the noise. Nothing is attached to
the model before or after, so no file knows of it. In eval mode there is no noise. Padding and the
placeholders of a soft prompt get none. A checkpoint notes alpha and the inner loss, so a training
that is resumed without NEFTune is an error. The noise comes from torch's generator, which `train`
seeds and a checkpoint holds, so a resumed training is bit for bit the same.

transformers (`neftune_noise_alpha`) sets a hook for a whole training, which has no mask: its L is
the padded length, and padding gets noise too. So there the noise of a text depends on the other
texts of its batch. Cost: one random number for each number of the embedding's output. Not
included: a model wrapped by torch.compile, whose code would not see the hook.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> ids, loss = torch.tensor([[3, 1, 4, 1, 5]]), minillm.train.loss_sum
>>> noisy = NEFTune(loss, alpha=5)
>>> noisy(model.eval(), ids, ids) == loss(model, ids, ids), noisy(model.train(), ids, ids) == loss(
...     model, ids, ids)
(tensor(True), tensor(False))
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minillm import options
from minillm.registry import roles


@dataclasses.dataclass(frozen=True)
class NEFTune:
    """A `loss=` for `train`. loss: the loss inside, such as `train.loss_sum`; alpha: above 0."""

    loss: Callable
    alpha: float = 5.0

    def __post_init__(self):
        if not callable(self.loss) or isinstance(self.loss, type):
            raise ValueError(f"loss={self.loss!r} is not a loss, such as minillm.train.loss_sum")
        object.__setattr__(self, "alpha", options.positive("alpha", self.alpha))

    def check(self, examples):
        """The check of the loss inside; `train` calls it."""
        if hasattr(self.loss, "check"):
            self.loss.check(examples)

    def __call__(self, model, ids, labels, mask=None):
        """The summed loss of a batch: ids, labels, mask (b, t). In eval mode without noise.

        ValueError if the model does not call its token embedding with these ids; TypeError for a
        model wrapped by torch.compile.
        """
        if not model.training:
            return self.loss(model, ids, labels, mask)
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
            raise TypeError("NEFTune sets a hook that torch.compile(model) would not see: give "
                            "the model uncompiled, or compiled by minillm.compile")
        site, seen = roles.embedding(model), []
        lengths = tokens(ids, mask)  # (b, t)

        def noisy(module, inputs, x):
            seen.append(x)
            return x + self.noise(x, lengths)

        if site is not None:
            handle = (site.layer or site.module).register_forward_hook(noisy)
            try:
                total = self.loss(model, ids, labels, mask)
            finally:
                handle.remove()
        if not seen:
            raise ValueError(f"NEFTune: this {type(model).__name__} does not call a token "
                             "embedding, so there is nothing to add noise to")
        return total

    def noise(self, x, lengths):
        """The noise for x (b, p + t, d); lengths (b, t): L of each token, 0 at padding.

        The p placeholders in front of the text have no noise.
        """
        p, d = x.shape[1] - lengths.shape[1], x.shape[2]
        L = F.pad(lengths, (p, 0))[..., None]  # (b, p + t, 1)
        eps = torch.rand(x.shape, device=x.device) * 2 - 1
        return (torch.where(L > 0, self.alpha / (L * d).sqrt(), 0) * eps).to(x.dtype)


def tokens(ids, mask):
    """L of each token (b, t): how many tokens its text has; 0 at padding.

    mask (b, t): the number of each token's document, 0 at padding; or bool; or None.
    """
    if mask is None:
        return torch.full(ids.shape, ids.shape[1], device=ids.device)
    same = mask[:, :, None] == mask[:, None, :]  # (b, t, t)
    return same.sum(-1) * (mask != 0)
