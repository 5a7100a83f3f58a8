"""What a leaf is: a module with one weight matrix W (out, in), and how each class keeps it."""

import dataclasses

import torch.nn.functional as F

from minillm.ops import linear


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How a leaf keeps its matrix. A lookup multiplies by one-hot vectors: its W is (width, vocabulary)."""

    transposed: bool  # `.weight` is Wᵀ
    lookup: bool  # the input is ids

    def compute(self, x, W, b=None):
        """The leaf's own computation with the matrix W (out, in) and the bias b (out,)."""
        if not self.lookup:
            return linear(x, W, b)
        return F.embedding(x, W.T) if b is None else F.embedding(x, W.T) + b


LEAVES = {  # a subclass is a leaf as long as it keeps the forward of the class that is named here
    "torch.nn.modules.linear.Linear": Leaf(transposed=False, lookup=False),
    "minillm.model.transformer.Linear": Leaf(transposed=False, lookup=False),
    "transformers.pytorch_utils.Conv1D": Leaf(transposed=True, lookup=False),
    "torch.nn.modules.sparse.Embedding": Leaf(transposed=True, lookup=True),
}


def kept(module):
    """The Leaf of a module whose class is in LEAVES, wherever its weight comes from; or None."""
    for cls in type(module).__mro__:
        kind = LEAVES.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind and type(module).forward is cls.forward and getattr(module, "max_norm", None) is None:
            return kind
    return None
