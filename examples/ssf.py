"""SSF: learn a factor and a shift for each output of a weight.

    y = gamma * (W x + b) + beta     Lian et al. 2022, "Scaling & Shifting Your Features",
                                     arXiv 2210.08823, section 3.2

    code      paper     shape     at birth
    gamma     gamma     (out,)    1, so that nothing changes
    beta      beta      (out,)    0

Cost: 2 `out` parameters a leaf. Merged, it costs nothing: they go into W and b.

This file is the whole technique. `import ssf` adds it to minillm: to the table of methods, to
`minillm.show`, to the files of adapters and to the laws. The paper also puts such a pair after
each norm. Not included: that.
"""

from torch import nn

from minillm.registry import Patch, method
from minillm.registry.attach import attach
from minillm.registry.verbs import verbs


class SSF(Patch):
    reads = False  # it begins with ones and zeros, whatever the model is

    def __init__(self, site):
        super().__init__()
        self.gamma, self.beta = site.new(site.shape[0]), site.new(site.shape[0])

    def fill(self, site):
        nn.init.ones_(self.gamma)

    def forward(self, below, x):
        y = below(x)  # (..., out)
        return y * self.gamma.to(y.dtype) + self.beta.to(y.dtype)

    def fold(self, W, b):
        gamma, beta = self.gamma.to(W.dtype), self.beta.to(W.dtype)
        return W * gamma[:, None], beta if b is None else b * gamma + beta


def wrap(model, targets=None, *, name=None):
    """Put a factor and a shift on each output of the leaves of `targets`; returns the model."""
    return attach(SSF, model, targets, name=name)


unwrap, merge, unmerge, save, load = verbs("ssf", SSF)
method("ssf", wrap, does="learns a factor and a shift for each output",
       paper="Lian et al. 2022, arXiv 2210.08823", rates=dict(tiny=3e-2))
