"""(IA)3: learn one factor for each key, each value, and each inner activation of the MLP.

    k = l_k * (W_k x)    v = l_v * (W_v x)    y = W_2 (l_ff * f(W_1 x))
                                Liu et al. 2022, "(IA)3", arXiv 2205.05638, section 3.3

A vector is multiplied elementwise with an activation, so it is a factor for each row of
the weight before it, or for each column of the weight after it:

    1. l * (W x + b) = (l[:, None] * W) x + l * b         at the output: keys and values
    2. W (l * x) + b = (W * l[None, :]) x + b             at the input: the MLP's last leaf

    code      paper         shape              at birth
    factor    l_k, l_v      (out,)             1, so that nothing changes
    factor    l_ff          (in,)              1
    inner                   True: the factors are at the input (peft: feedforward_modules)

Cost: `out` or `in` parameters a leaf, and as many multiplications a token. SmolLM2 gets
57,600; LoRA at r = 8 has 42 times as many. Merged: nothing, the factors are in W and b.

Where one leaf computes queries, keys and values (GPT-2's c_attn), the queries get
factors too, as in peft. They are a third of the leaf's factors and give nothing new:
(l_q * q) . (l_k * k) = q . (l_q * l_k * k). In some families peft scales other leaves
by default: for Qwen2 and Gemma the queries and not the keys, for OPT the queries and
not the values. To unmerge, peft divides W by l. That changes its last bits, and loses the
rows where l is 0; here the old W is kept and comes back. Not included: embeddings, and
the two losses of the paper's recipe (T-Few).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.adapters.ia3.wrap(model, ["0", "2"], feedforward=["2"])
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> [tuple(layer.patches["ia3"].factor.shape) for layer in minillm.layers(model).values()]
[(8,), (8,)]
>>> with torch.no_grad():
...     _ = model[2].patches["ia3"].factor[0].zero_()
>>> W, _ = model[2].dense()
>>> torch.equal(W[:, 0], torch.zeros(4))                                # one input is inhibited
True
"""

from torch import nn

from minillm import options
from minillm.registry import Patch, roles, select
from minillm.registry.attach import attach
from minillm.registry.table import method, register


class IA3(Patch):
    reads = False

    def __init__(self, site, inner=False):
        super().__init__()
        out, into = site.shape
        self.inner = options.flag("inner", inner)
        self.factor = site.new(into if inner else out)

    def fill(self, site):
        nn.init.ones_(self.factor)

    def forward(self, below, x):
        if self.inner:
            return below(x * self.factor.to(x.dtype))
        y = below(x)  # (..., out)
        return y * self.factor.to(y.dtype)

    def fold(self, W, b):
        factor = self.factor.to(W.dtype)
        if self.inner:
            return W * factor[None, :], b
        return W * factor[:, None], None if b is None else b * factor

    def extra_repr(self):
        return f"{len(self.factor)} factors at the {'input' if self.inner else 'output'}"


def wrap(model, targets=None, *, name=None, feedforward=None):
    """Put factors at the leaves that `targets` names; in place, returns the model.

    targets: see `registry.select`; by default the leaves of the keys and the values and
    the last leaf of the MLP of each block (see `registry.roles`). feedforward: those of
    the targets whose input is scaled and not their output, in the same forms, or [] for
    none; by default those that are the last leaf of an MLP. Only the factors learn
    afterwards. name: by default "ia3". ValueError for a name in `feedforward` that is no
    target. Without `targets`, ValueError where the keys and values of an attention are
    not found, or the last leaf of an MLP is not (a mixture of experts has several).
    """
    last = set()
    if targets is None or feedforward is None:
        keys, last = parts(model, targets is None)
    if targets is None:
        chosen = select(model, None, IA3.accepts, lambda site: site.name in keys | last)
    else:
        chosen = select(model, targets, IA3.accepts, None)
    names = {site.name for site in chosen}
    if feedforward is not None:
        found = select(model, feedforward, IA3.accepts, None) if feedforward != [] else []
        last = {site.name for site in found}
        if strays := sorted(last - names):
            raise ValueError(f"feedforward={feedforward!r} names {strays[0]!r}, which is none of "
                             "the targets")
    return attach(IA3, model, lambda name, module: name in names, name=name,
                  each=lambda site: dict(inner=site.name in last))


def parts(model, whole):
    """The names of the leaves of keys and values, and of the last leaves of the MLPs.

    whole: whether each block must have both.
    """
    try:
        blocks = roles.in_blocks(model)
    except ValueError as error:
        raise ValueError(f"{error}; with targets=, give feedforward= too") from error
    for block in blocks if whole else ():
        for part, found in ((block.attention, block.keys_values), (block.mlp, block.last)):
            if part and not found:
                kind = type(part.module).__name__
                raise ValueError(f"{part.name!r} is a {kind}, in which (IA)3 does not find its "
                                 "leaf: name the leaves in targets= and feedforward=")
    keys = {site.name for block in blocks for site in block.keys_values}
    return keys, {block.last.name for block in blocks if block.last}


register("ia3", IA3, family="adapters")
method("ia3", wrap, does="learns a factor for each key, value and inner activation",
       paper="Liu et al. 2022, arXiv 2205.05638", rates=dict(tiny=1e-1, smollm2=3e-2),
       small={"": {}, "all": dict(targets=r".*(proj|c_attn|c_fc|mlp\.\d)", feedforward=[])})
