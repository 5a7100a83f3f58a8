"""Where the techniques meet: a format replaces how a leaf stores its weight, a patch wraps what the leaf computes.

A *leaf* is a module with one weight matrix W (out, in). A technique that touches a leaf is one of two things:

    Format    how W is stored          pack(W) to buffers, dense() back     int8, CSR, ...
    Patch     what is computed around  forward(below, x), fold(W, b)        LoRA, a pruning mask, ...

    Layer(base, patches)               base: the leaf, in whatever format; patches: innermost first

The two commute, because a patch sees only `below`: `below(x)` is the output beneath it, `below.dense()`
the weight beneath it. A patch may also wrap a sublayer (an attention, an MLP), which has an output but
no matrix.

Each patch has a name, and says what it changes: the weight, the input, the output. A change of the
weight lies inside a change of the input, and that inside a change of the output. Among equals the
order is that of the `wrap` calls.

The module tree is the only state. A technique that is wrapped is a module in the tree. A *site* is a
place in the tree under the name that the model's author gave it: `walk` skips the `Layer`s and never
enters a `Patch`, so an adapter's own matrices are never wrapped, and files written with one set of
techniques attached are read with another.

peft keeps a tuner class over the model, a config object and dictionaries of active adapters for each
layer, and dispatches through five files. Here the named patches of a leaf are one ModuleDict.
"""

from torch import nn
from torch.nn import UninitializedParameter

from minillm.registry.hooks import no_shortcut, take_hooks
from minillm.registry.kinds import TOUCHES, CannotMerge, Format
from minillm.registry.leaf import kept


class Layer(nn.Module):
    """`base` (a leaf or a sublayer) and the patches around it, innermost first, by name."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.patches = nn.ModuleDict()
        take_hooks(self, base)  # a hook on the leaf sees what the site computes
        # In eval nn.TransformerEncoderLayer reads its modules' weights and calls none of them, unless one has a hook.
        self.register_forward_pre_hook(no_shortcut)
        self.training = base.training

    def forward(self, *args, **kwargs):
        return Below(self, len(self.patches))(*args, **kwargs)

    def add(self, patch, place=None):
        """Put the patch around what is there, or at a place among the patches, counted from the inside."""
        names = [name for name in self.patches if name != patch.name]
        names.insert(len(names) if place is None else place, patch.name)
        every = dict(self.patches) | {patch.name: patch.train(self.base.training)}
        self.patches.clear()
        for name in sorted(names, key=lambda name: TOUCHES.index(every[name].touches)):  # a stable sort
            self.patches[name] = every[name]

    def stack(self):
        """The active patches, innermost first."""
        return [patch for patch in self.patches.values() if patch.active]

    def dense(self):
        """The folded (W, b): what a plain leaf would hold to compute the same."""
        return folded(self.base, self.stack())

    @property
    def weight(self):
        """The folded weight as the base would keep it, for code that reads `.weight` (nn.MultiheadAttention does).

        What is done to ids, as by a soft prompt, is no part of it.
        """
        kind = leaf(self.base)
        if kind is None:
            return self.base.weight
        changes = [patch for patch in self.stack() if patch.touches != "ids"]
        if not changes:
            return self.base.weight
        try:
            W, _ = folded(self.base, changes)
        except CannotMerge as error:
            raise CannotMerge(f"the model reads the weight of a leaf instead of calling it, and {error}. nn.TransformerEncoder "
                              "reads it for padded rows in eval: set its use_nested_tensor = False") from error
        return W.T if kind.transposed else W

    @property
    def bias(self):
        return self.base.bias if leaf(self.base) is None else self.dense()[1]

    def __getattr__(self, name):  # `in_features`, `layer_idx`, ...: what the base has, the Layer has
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __setattr__(self, name, value):  # and what is set on the Layer, the base gets
        base = self.__dict__.get("_modules", {}).get("base")
        own = base is None or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if name in ("weight", "bias") or not own and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


class Below:
    """The base and the `depth` innermost patches of a Layer, as the next patch sees them."""

    def __init__(self, layer, depth):
        self.layer, self.depth = layer, depth

    def __call__(self, *args, **kwargs):
        if self.depth == 0:
            return self.layer.base(*args, **kwargs)
        patch, below = self.patches()[-1], Below(self.layer, self.depth - 1)
        return patch.select(below, *args, **kwargs) if patch.active else below(*args, **kwargs)

    def patches(self):
        return list(self.layer.patches.values())[: self.depth]

    def dense(self):
        """(W, b), W (out, in), with the changes of the weight that lie beneath."""
        return folded(self.layer.base, [patch for patch in self.patches() if patch.active and patch.touches == "weight"])

    def compute(self, x, W, b=None):
        """What the leaf would compute with another matrix W (out', in) and bias b."""
        return leaf(self.layer.base).compute(x, W, b)


def folded(base, patches):
    """(W, b) of the base with these patches folded in, innermost first."""
    W, b = dense(base)
    for patch in patches:
        if patch.random:
            raise ValueError(f"{patch.name} has a dropout that no folded weight has, and what is around it (a mask, "
                             f"nn.MultiheadAttention) computes with the folded weight: wrap {patch.name} with dropout=0")
        if patch.rows is not None:
            raise ValueError(f"{patch.name} is not in all rows of this batch (see minillm.rows), and what is around it computes with "
                             "one folded weight")
        W, b = patch.fold(W, b)
    return W, b


def leaf(module):
    """The Leaf that says how `module` keeps its matrix; None for other modules.

    `module` is a leaf, a Format or a Layer over one. A module whose weight is computed from other
    parameters (weight_norm, torch.nn.utils.prune) is no leaf: what is written to it is lost.
    """
    if isinstance(module, Layer):
        return leaf(module.base)
    if isinstance(module, Format):
        return module.leaf
    kind = kept(module)
    lazy = isinstance(module._parameters.get("weight"), UninitializedParameter)
    return kind if kind and "weight" in module._parameters and not lazy else None


def dense(module):
    """(W, b) of a leaf in any format: W (out, in), b (out,) or None."""
    if isinstance(module, Format):
        return module.dense(), module.bias
    W = module.weight
    return (W.T if leaf(module).transposed else W), getattr(module, "bias", None)
