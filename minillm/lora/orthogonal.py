"""AdaLoRA's penalty: a loss that keeps P and Q near orthonormal.

    L + weight * mean over all leaves of || P^T P - I ||_F and || Q Q^T - I ||_F

                                Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512

It is a loss around another loss, because `train` has one loss:

    train(model, examples, ..., loss=Orthogonal(train.loss_sum, weight=0.5))

The paper adds the squares of all norms. Here it is the mean of the norms, as in peft, so `weight`
means the same. peft adds its penalty only where the configuration has a task_type.
"""

import dataclasses
from collections.abc import Callable

import torch

from minillm import options
from minillm.data import NOT_LEARNT
from minillm.registry import walk


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A `loss=` for `train`: a loss, and `weight` times the mean of `apart` over all of AdaLoRA.

    loss: the loss inside, such as `train.loss_sum`. weight: from 0 on. The loss is a sum over
    tokens, and `train` divides it by their number; so the penalty is counted once a token.
    """

    loss: Callable
    weight: float = 0.5

    def __post_init__(self):
        if not callable(self.loss) or isinstance(self.loss, type):
            raise ValueError(f"loss={self.loss!r} is not a loss, such as minillm.train.loss_sum")
        object.__setattr__(self, "weight", options.real(
            "weight", self.weight, lambda w: 0 <= w < float("inf"), "a number from 0 on"))

    def check(self, examples):
        """The check of the loss inside; `train` calls it."""
        if hasattr(self.loss, "check"):
            self.loss.check(examples)

    def __call__(self, model, ids, labels, mask=None):
        """The summed loss of a batch: ids, labels, mask (b, t). In eval mode without the penalty.

        ValueError for a model without an AdaLoRA that takes part.
        """
        total = self.loss(model, ids, labels, mask)
        if not model.training:
            return total
        each = [norm for site in walk(getattr(model, "module", model)) if site.layer
                for patch in site.layer.patches.values()
                if patch.kind == "adalora" and patch.active for norm in patch.apart()]
        if not each:
            raise ValueError("Orthogonal penalizes AdaLoRA, and none takes part in this model: "
                             "minillm.lora.adalora.wrap(model) first")
        tokens = (labels[:, 1:] != NOT_LEARNT).sum()
        return total + self.weight * tokens * torch.stack(each).mean()
