"""Bottleneck adapters: a small residual network after each sublayer of a frozen model.

    h  ->  h + W_up f(W_down h + b_down) + b_up
                                            Houlsby et al. 2019, arXiv 1902.00751, section 2.1

    code            paper                  shape            at birth
    down, b_down    the projection to m    (m, d), (m,)     N(0, 1/d), 0
    up, b_up        the projection back    (d, m), (d,)     0, 0: the adapter is the identity
                                                            ("near-identity" in the paper)
    size            m
    f               the nonlinearity                        GELU (the paper leaves it open)
    norms           the norms trained beside                 see `adapters.norms`

Cost: 2 m d + m + d parameters a sublayer, and 2 m d multiplications a token, also after
training: because of f the adapter is no change of a weight, and cannot be merged. The
sublayers are the attention and the MLP of each block, as in the paper.
`wrap(model, ["mlp"])` is the cheaper half that Pfeiffer et al. 2020 (arXiv 2005.00247)
found to be nearly as good.

A sublayer of a Hugging Face model may return a tuple. Its first item is the hidden
state, and only that item is adapted. The `adapters` library patches the source file of
each architecture; here the patch wraps any module.

The paper also trains the layer norms, at most 2 d more parameters for each: `norms=True`.
Then each norm has its own change of the scale and bias, as a part of the same adapter (see
`adapters.norms`). The file holds it, `minillm.use` switches it, `unwrap` takes it away.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> torch.equal(minillm.adapters.wrap(model, ["0"], size=2)(x), before)   # unchanged at birth
True
>>> minillm.adapters.merge(model)                                        # doctest: +ELLIPSIS
Traceback (most recent call last):
minillm.registry.kinds.CannotMerge: adapters cannot be merged: ...
"""

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.adapters.norms import Delta, scaled
from minillm.registry import Patch, roles, select
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class Bottleneck(Patch):
    touches = "output"
    reads = False
    norm = False  # whether it is around a norm: then it has `delta` and no matrices

    def __init__(self, site, size=32, width=None, norm=False):
        super().__init__()
        self.size = size = options.whole("size", size)
        self.norm, self.width = options.flag("norm", norm), width
        if norm:
            self.delta = Delta(site)
            return
        self.width = site.width if width is None else options.whole("width", width)
        self.down, self.b_down = site.new(size, self.width), site.new(size)
        self.up, self.b_up = site.new(self.width, size), site.new(self.width)

    def fill(self, site):
        if not self.norm:
            nn.init.normal_(self.down, std=self.width**-0.5)

    @classmethod
    def accepts(cls, site):
        if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in site.places):
            return False  # it reads out_proj.weight and never calls out_proj, nor its adapter
        if getattr(site.module.forward, "__func__", None) is nn.Module.forward:
            return False  # a container, such as a ModuleList: it is never called
        return site.leaf is None or not site.leaf.lookup

    def forward(self, below, *args, **kwargs):
        if self.norm:
            return self.delta(below, *args, **kwargs)
        output = below(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapt(output[0]), *output[1:])
        return self.adapt(output)

    def adapt(self, h):
        """(..., d) -> (..., d)"""
        self.check(h)
        return h + self.change(h)

    def check(self, h):
        """ValueError for an output that the adapter cannot change."""
        if h.is_nested:
            raise ValueError("nn.TransformerEncoder gives padded rows as a nested tensor here, "
                             "which an adapter does not take: set its use_nested_tensor = False")
        if h.shape[-1] != self.width:
            raise ValueError(f"width={self.width}: the output that this adapter changes has the "
                             f"width {h.shape[-1]}; wrap(model, width={h.shape[-1]})")

    def change(self, h):
        """W_up f(W_down h + b_down) + b_up: (..., d) -> (..., d)"""
        parameters = self.down, self.b_down, self.up, self.b_up
        down, b_down, up, b_up = (p.to(h.dtype) for p in parameters)
        return F.linear(F.gelu(F.linear(h, down, b_down)), up, b_up)

    def extra_repr(self):
        bottleneck = f"{self.width} -> {self.size} -> {self.width}"
        return f"delta of {', '.join(self.delta._parameters)}" if self.norm else bottleneck


def wrap(model, targets=None, *, name=None, size=32, width=None, norms=False):
    """Put an adapter after each sublayer of `targets`; in place, returns the model.

    targets: by default the attention and the MLP of each block (see `registry.roles`);
    where a block has no MLP module (OPT, nn.TransformerEncoder), the last leaf directly
    in the block. name: by default "adapters". size: the units of the bottleneck, m.
    width: the width of the sublayer's output, d. By default it is that of its last leaf;
    of a mixture of experts without `targets`, that of the block's norms. Give it where
    that is wrong. norms: whether the norms of the model are trained too, as in the paper.
    Only what it adds learns afterwards. ValueError for norms=True in a model whose norms
    have no parameters, and where a target is a norm.
    """
    default = sublayers if targets is None else lambda model: None
    if targets is None and width is None:
        width = roles.width_of_experts(model)
    sites = select(model, targets, Bottleneck.accepts, default(model), "sublayer")
    names, own = {site.name for site in sites}, set()
    if options.flag("norms", norms):
        own = scaled(model, names)
    return attach(Bottleneck, model, lambda name, module: name in names | own, what="sublayer",
                  name=name, size=size, width=width, each=lambda site: dict(norm=site.name in own))


def sublayers(model):
    """A function of a site: whether it is the attention or the MLP of a block."""
    blocks = roles.in_blocks(model)
    found = [block.attention for block in blocks] + [block.mlp or block.last for block in blocks]
    names = {site.name for site in found if site}
    return lambda site: site.name in names


unwrap, merge, unmerge, save, load = verbs("adapters", Bottleneck)
method("adapters", wrap, does="puts a small network after each sublayer",
       paper="Houlsby et al. 2019, arXiv 1902.00751", rates=dict(tiny=5e-3, smollm2=2e-3),
       small={"": dict(size=4), "mlp": dict(targets="mlp", size=2),
              "norms": dict(size=4, norms=True)})
