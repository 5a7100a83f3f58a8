"""Bottleneck adapters: a small residual network after each sublayer of a frozen model.

    h  ->  h + W_up f(W_down h + b_down) + b_up            Houlsby et al. 2019, arXiv 1902.00751, section 2.1

    code     paper                     shape            at birth
    down     the projection to m       (m, d), (m,)     N(0, 1/d), 0
    up       the projection back       (d, m), (d,)     0, 0: the adapter is the identity ("near-identity" in the paper)
    f        the nonlinearity                           GELU (the paper leaves it open)

Cost: 2 m d + m + d parameters a sublayer; 2 m d multiplications a token more, also after
training: because of f it is no change of a weight, and cannot be merged. The sublayers are
the attention and the MLP of each block, as in the paper; `targets=["mlp"]` is the cheaper
half that Pfeiffer et al. 2020 (arXiv 2005.00247) found to be nearly as good.

A sublayer of a Hugging Face model may return a tuple, whose first item is the hidden state:
that item alone is adapted. The `adapters` library patches each architecture's source file;
here the patch rings the module, whatever it holds. Not included: training the layer norms
beside the adapters, as the paper does (2 d more parameters for each norm).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> torch.equal(minillm.adapters.wrap(model, ["0"], size=2)(x), before)   # nothing changes at birth
True
>>> minillm.adapters.merge(model)
Traceback (most recent call last):
minillm.registry.kinds.CannotMerge: adapters cannot be merged: what it computes is no change of a weight
"""

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.registry import Patch, roles
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class Bottleneck(Patch):
    touches = "output"
    reads = False

    def __init__(self, site, size=32, width=None):
        super().__init__()
        self.size = size = options.whole("size", size)
        self.width = site.width if width is None else options.whole("width", width)
        self.down, self.b_down = site.new(size, self.width), site.new(size)
        self.up, self.b_up = site.new(self.width, size), site.new(self.width)

    def fill(self, site):
        nn.init.normal_(self.down, std=self.width**-0.5)

    @classmethod
    def accepts(cls, site):
        if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in site.places):
            return False  # its out_proj is never called: its weight is read, and would pass an adapter by
        if getattr(site.module.forward, "__func__", None) is nn.Module.forward:
            return False  # a container, such as a ModuleList: it is never called
        return site.leaf is None or not site.leaf.lookup

    def forward(self, below, *args, **kwargs):
        output = below(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapt(output[0]), *output[1:])
        return self.adapt(output)

    def adapt(self, h):
        """(..., d) -> (..., d)"""
        if h.shape[-1] != self.width:
            raise ValueError(f"width={self.width}: the output that this adapter changes has the "
                             f"width {h.shape[-1]}")
        down, b_down, up, b_up = (p.to(h.dtype) for p in (self.down, self.b_down, self.up, self.b_up))
        return h + F.linear(F.gelu(F.linear(h, down, b_down)), up, b_up)

    def extra_repr(self):
        return f"{self.width} -> {self.size} -> {self.width}"


def wrap(model, targets=None, *, name=None, size=32, width=None):
    """Put a bottleneck of `size` units after each sublayer that `targets` names; in place, returns the model.

    By default the attention and the MLP of each block (see `registry.roles`); where a block has no MLP module (OPT,
    nn.TransformerEncoder), the last leaf that lies in the block itself. `width` is the size of their output, found by
    looking at the last leaf in each; give it where that is wrong. Only the adapters learn afterwards.
    """
    default = sublayers if targets is None else lambda model: None
    return attach(Bottleneck, model, targets, default=default, what="sublayer", name=name, size=size, width=width)


def sublayers(model):
    """Whether a site is the attention or the MLP of a block."""
    blocks = roles.parts(model).blocks if roles.lists(model) else [roles.alone(model)]
    found = [block.attention for block in blocks] + [block.mlp for block in blocks]
    found += [block.loose[-1] for block in blocks if not block.mlp and block.attention and block.loose]
    names = {site.name for site in found if site}
    return lambda site: site.name in names


unwrap, merge, unmerge, save, load = verbs("adapters", Bottleneck)
method("adapters", wrap, does="puts a small network after each sublayer",
       paper="Houlsby et al. 2019, arXiv 1902.00751", rates=dict(tiny=5e-3, smollm2=2e-3),
       small={"": dict(size=4), "mlp": dict(targets="mlp", size=2)})
