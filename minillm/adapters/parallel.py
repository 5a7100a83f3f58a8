"""Parallel adapters: a small network beside a sublayer, which gets the sublayer's input.

    h  ->  h + s W_up f(W_down x)       x: the sublayer's input, h: its output
                                He et al. 2022, "Towards a Unified View", arXiv 2110.04366,
                                Table 1, "Scaled PA"

An adapter of Houlsby's comes after the sublayer: W_down sees h. Here it sees x, as the
sublayer's own weights do, so the two can be computed at the same time. LoRA has the same
form for one weight, without f. The paper finds the parallel form better at the same
size, and best beside the MLP.

    code      paper            shape      at birth
    down      W_down^T         (m, d)     kaiming uniform: U(-1/sqrt(d), 1/sqrt(d)), as LoRA's A
    up        W_up^T           (d, m)     zero, so that nothing changes
    size      r, bottleneck    m
    scale     s                ()         4; the paper tries 1, 2 and 4
    f                                     ReLU

In a block that normalizes first (Llama, GPT-2), x is the normalized state, because the
adapter wraps the MLP module. `targets=["self_attn"]` puts it beside the attention.

Cost: 2 m d parameters a sublayer, and 2 m d multiplications a token, also after
training: because of f it cannot be merged. The paper's code adds a bias to each matrix,
m + d parameters more, which its equation does not have. peft has no parallel adapter;
the `adapters` library calls it ParallelConfig and patches the source of each
architecture. Not included: a learned s, the adapter for each head, and the paper's sum
with prefix tuning (MAM).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.adapters.parallel.wrap(model, ["2"], size=2)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> patch = model[2].patches["parallel"]                                # beside a leaf: 8 -> 2 -> 4
>>> tuple(patch.down.shape), tuple(patch.up.shape)
((2, 8), (4, 2))
>>> minillm.adapters.merge(model)                                       # doctest: +ELLIPSIS
Traceback (most recent call last):
minillm.registry.kinds.CannotMerge: parallel cannot be merged: ...
"""

import math

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.adapters import Bottleneck
from minillm.registry import roles
from minillm.registry.attach import attach
from minillm.registry.kinds import Patch
from minillm.registry.table import method, register


class Parallel(Bottleneck):
    def __init__(self, site, size=32, scale=4.0, width=None):
        Patch.__init__(self)  # the matrices are others than Bottleneck's
        self.size, self.scale = options.whole("size", size), options.positive("scale", scale)
        self.width = site.width if width is None else options.whole("width", width)
        self.into = site.shape[1] if site.leaf else self.width
        self.down, self.up = site.new(self.size, self.into), site.new(self.width, self.size)

    def fill(self, site):
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, below, *args, **kwargs):
        x = args[0] if args else next(iter(kwargs.values()))  # the state, (..., d)
        output = below(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.beside(x, output[0]), *output[1:])
        return self.beside(x, output)

    def beside(self, x, h):
        """h + s W_up f(W_down x): (..., d) -> (..., d)"""
        self.check(h)
        if x.shape[-1] != self.into:
            raise ValueError(f"the input of this sublayer has the width {x.shape[-1]}, and its "
                             f"output {self.into}: a parallel adapter can be put beside that only "
                             "if it is a leaf; name others in targets=")
        down, up = self.down.to(h.dtype), self.up.to(h.dtype)
        return h + self.scale * F.linear(F.relu(F.linear(x, down)), up)

    def extra_repr(self):
        return f"{self.into} -> {self.size} -> {self.width}, scale={self.scale}"


def wrap(model, targets=None, *, name=None, size=32, scale=4.0, width=None):
    """Put an adapter beside each sublayer of `targets`; in place, returns the model.

    targets: see `registry.select`; by default the MLP of each block (see
    `registry.roles`). name: by default "parallel". size: the units of the bottleneck, m.
    scale: s. width: the width of the sublayer's input and output, d; by default that of
    its last leaf's output, as for `minillm.adapters.wrap`. A leaf may have inputs of
    another width than its outputs. Only the adapters learn afterwards. ValueError where
    no block has an MLP module (OPT: its two matrices lie in the block itself).
    """
    if targets is None and width is None:
        width = roles.width_of_experts(model)
    return attach(Parallel, model, targets, default=mlps, what="sublayer", name=name, size=size,
                  scale=scale, width=width)


def mlps(model):
    """A function of a site: whether it is the MLP of a block."""
    names = {block.mlp.name for block in roles.in_blocks(model) if block.mlp}
    return lambda site: site.name in names


register("parallel", Parallel, family="adapters")
method("parallel", wrap, does="puts a small network beside each MLP, with the MLP's input",
       paper="He et al. 2022, arXiv 2110.04366", rates=dict(tiny=6e-3, smollm2=2e-3),
       small={"": dict(size=4), "every": dict(targets=r"(mlp|attn|self_attn)", size=3, scale=0.5)})
