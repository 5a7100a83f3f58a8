"""(IA)3: learn one factor for each output of a weight.

    y = l * (W x + b)             Liu et al. 2022, "(IA)3", arXiv 2205.05638, equation 2

    code      paper             shape     at birth
    factor    l_k, l_v, l_ff    (out,)    1, so that nothing changes

Cost: `out` parameters a leaf. Merged, it costs nothing: the factors go into W and b.

This file is the whole technique. `import ia3` adds it to minillm: to the table of methods, to
`minillm.show`, to the files of adapters and to the laws. peft scales the *input* of the
feed-forward layers instead. For a matrix that is not merged the two are equally cheap. Not
included: that, and the paper's losses.
"""

from torch import nn

from minillm.registry import Patch, method
from minillm.registry.attach import attach
from minillm.registry.verbs import verbs


class IA3(Patch):
    reads = False  # it begins with ones, whatever the model is

    def __init__(self, site):
        super().__init__()
        self.factor = site.new(site.shape[0])

    def fill(self, site):
        nn.init.ones_(self.factor)

    def forward(self, below, x):
        y = below(x)  # (..., out)
        return y * self.factor.to(y.dtype)

    def fold(self, W, b):
        factor = self.factor.to(W.dtype)
        return W * factor[:, None], None if b is None else b * factor


def wrap(model, targets=None, *, name=None):
    """Put a factor on each output of the leaves that `targets` names; returns the model."""
    return attach(IA3, model, targets, name=name)


unwrap, merge, unmerge, save, load = verbs("ia3", IA3)
method("ia3", wrap, does="learns a factor for each output",
       paper="Liu et al. 2022, arXiv 2205.05638", rates=dict(tiny=1e-1))
