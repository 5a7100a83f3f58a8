"""A leaf is a module with one weight matrix W (out, in). This file says how each class keeps it."""

import dataclasses

import torch.nn.functional as F

from minillm.ops import linear


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How a leaf keeps its matrix.

    An embedding is a leaf too: it multiplies one-hot vectors by W (width, vocabulary).
    """

    transposed: bool  # whether `.weight` is Wᵀ (in, out)
    lookup: bool  # whether the input is ids

    def compute(self, x, W, b=None):
        """The output of the leaf with the matrix W (out, in) and the bias b (out,) or None."""
        if not self.lookup:
            return linear(x, W, b)
        return F.embedding(x, W.T) if b is None else F.embedding(x, W.T) + b


LEAVES = {  # a subclass is a leaf too, if it keeps the forward of the class named here
    "torch.nn.modules.linear.Linear": Leaf(transposed=False, lookup=False),
    "minillm.model.transformer.Linear": Leaf(transposed=False, lookup=False),
    "transformers.pytorch_utils.Conv1D": Leaf(transposed=True, lookup=False),
    "torch.nn.modules.sparse.Embedding": Leaf(transposed=True, lookup=True),
}


def kept(module):
    """The Leaf of a module whose class is in LEAVES; else None.

    It does not ask where the weight comes from: see `layer.leaf`. An embedding with `max_norm`
    is no leaf.
    """
    for cls in type(module).__mro__:
        kind = LEAVES.get(f"{cls.__module__}.{cls.__qualname__}")
        same = kind and type(module).forward is cls.forward
        if same and getattr(module, "max_norm", None) is None:
            return kind
    return None
