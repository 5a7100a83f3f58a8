"""Quantization-aware training (QAT): the model trains with its weights rounded.

    forward     y = x Qᵀ,  Q = dense(round(W))    Jacob et al. 2018, arXiv 1712.05877, section 3
    backward    dW = dyᵀ x,  dx = dy Q            as if round changed nothing ("straight-through",
    convert     stores Q as integers              Bengio et al. 2013, arXiv 1308.3432)

    code     meaning                                   shape
    W        the weight, which stays float and learns  (out, in)
    Q        the matrix on the grid nearest to W       (out, in)
    grid     codes, scales, zero points: see `grid`

Rounding has the gradient 0 almost everywhere, so W gets that of Q. Small steps of W add
up until a code changes. At 8 bits rounding loses little; from 4 bits down QAT pays.

`convert` rounds with the same grid, so it stores bit for bit what training computed
with. A FakeQuant has no parameters and freezes nothing, like a mask. With LoRA beneath
it, W + s B A is rounded as a whole: merge LoRA, then convert.

Cost: the backward pass rounds W again. In compiled code rounding is one pass over W.
The scales are fitted to W at each step, without a gradient (LSQ, arXiv 1902.08153,
learns them). torchao's `QATConfig` swaps the linear layer's class twice. Not included:
rounded activations (Jacob et al. average their ranges), a delayed start (wrap later).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 16)
>>> model = minillm.quant.qat.wrap(model, bits=3)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> model(x).square().sum().backward(); optimizer.step()
>>> seen, y = model[0].dense()[0], model(x)
>>> model = minillm.quant.qat.convert(model)
>>> torch.equal(model[0].dense(), seen), torch.allclose(model(x), y, atol=1e-5), model[0].q.dtype
(True, True, torch.uint8)
"""

import torch

from minillm import ops
from minillm.quant import Integer
from minillm.quant.codebook import Codebook, fill
from minillm.quant.coded import check_rows
from minillm.quant.grid import Grid, Levels
from minillm.registry import Patch, walk
from minillm.registry.attach import attach, check_formats
from minillm.registry.table import method, register
from minillm.registry.verbs import unwrap


class FakeQuant(Patch):
    not_neutral = "rounding to a few bits"
    touches = "weight"

    def __init__(self, site, bits=4, group=None, zero_point=False, levels=None):
        super().__init__()
        levels = None if levels is None else tuple(levels)
        if levels is not None and ((bits, zero_point) != (4, False) or len(levels) > 16):
            raise ValueError(f"bits={bits}, zero_point={zero_point} and {len(levels)} levels: "
                             "give at most 16 levels, with bits=4 and without a zero point")
        self.grid = Grid(bits, group, zero_point) if levels is None else Levels(levels, group)
        check_rows(site, bits, group)
        self.bits, self.group, self.zero_point, self.levels = bits, group, zero_point, levels
        self.lookup, self.padding = site.leaf.lookup, site.padding

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    def forward(self, below, x):
        dense = below.recipe()
        W, b = dense()
        if self.lookup or not torch.is_grad_enabled():
            return below.compute(x, *self.fold(W, b))
        x = ops.in_autocast(x)
        if W.requires_grad and below.depth == 0:
            y = ops.straight_linear(x, W, self.rounded)
        elif W.requires_grad:  # made of W and of a patch's parameters
            y = ops.remade(lambda x: ops.linear(x, self.fold(*dense())[0].to(x.dtype)), x)
        else:
            y = ops.remade_linear(x, lambda: self.fold(*dense())[0].to(x.dtype))
        return y if b is None else y + b.to(y.dtype)

    def fold(self, W, b):
        Q = self.rounded(W)
        if self.padding is not None:  # this token's row does not learn
            W = W.index_fill(1, torch.tensor(self.padding, device=W.device), 0)
        return ops.straight(W, Q), b

    def rounded(self, W):
        """Q (out, in), no gradient: rounded in float32 like the Format, then cast."""
        rows = (W.T if self.lookup else W).detach().float()
        numbers = self.grid.fit(rows)
        Q = self.grid.dense(self.grid.round(rows, *numbers), *numbers).to(W.dtype)
        return Q.T if self.lookup else Q

    def store(self, model, names):
        """Store the leaves with these names on this grid."""
        def chosen(name, module):
            return name in names

        if self.levels is None:
            return attach(Integer, model, chosen, bits=self.bits, group=self.group,
                          zero_point=self.zero_point)
        return attach(Codebook, model, chosen, group=self.group,
                      fill=lambda form, site: fill(form, site, self.levels))

    def extra_repr(self):
        return f"bits={self.bits}, group={self.group}, zero_point={self.zero_point}"


def wrap(model, targets=None, *, name=None, bits=4, group=None, zero_point=False, levels=None):
    """Round the leaves that `targets` names in training; in place, returns the model.

    targets, bits, group, zero_point: as in `quant.wrap`. levels: at most 16 numbers, such
    as `quant.nf4.LEVELS` with group=64. ValueError for what the format cannot store.
    """
    return attach(FakeQuant, model, targets, name=name, bits=bits, group=group,
                  zero_point=zero_point, levels=levels)


def convert(model):
    """Store each leaf with the codes that training used; in place, returns the model.

    The format is Integer, or Codebook with `levels`. ValueError, before any change:
    no FakeQuant, a patch beneath it, or a leaf that is tied or in a format.
    """
    plan = {}
    for site in walk(model):
        patches = list(site.layer.patches.values()) if site.layer else []
        for i, patch in enumerate(patches):
            if not isinstance(patch, FakeQuant):
                continue
            if i:
                beneath = patches[i - 1].name
                raise ValueError(f"{site.name!r} has {beneath} beneath the fake-quantization, "
                                 f"which rounds its result: merge or unwrap {beneath} first")
            check_formats(Integer if patch.levels is None else Codebook, model, [site])
            plan.setdefault(str(patch.config()), (patch, set()))[1].add(site.name)
    if not plan:
        raise ValueError("there is no fake-quantization in this model to convert: "
                         "minillm.quant.qat.wrap(model) puts it there, before training")
    for patch, names in plan.values():
        patch.store(model, names)
    for name in {patch.name for patch, _ in plan.values()}:
        unwrap("quant", model, name)
    return model


register("qat", FakeQuant, family="quant")
method("qat", wrap, does="trains with rounded weights, to store them rounded",
       paper="Jacob et al. 2018, arXiv 1712.05877",
       small={"": dict(group=8), "three": dict(bits=3, zero_point=True)})
