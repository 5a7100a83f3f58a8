"""How techniques combine: a format stores a leaf's weight, a patch wraps what the leaf computes.

A *leaf* is a module with one weight matrix W (out, in). A technique touches it in one of two ways:

    Format    how W is stored             pack(W) to buffers, dense() back    int8, CSR, ...
    Patch     what is computed around it  forward(below, x), fold(W, b)       LoRA, a mask, ...

    Layer(base, patches)                  base: the leaf, in any format; patches: innermost first

The two commute, because a patch sees only `below`: `below(x)` is the output beneath it, and
`below.dense()` the weight beneath it. A patch may also wrap a sublayer (an attention, an MLP),
which has an output but no matrix.

Each patch has a name and declares what it changes: the weight, the input, the output or the token
ids. From the inside to the outside, patches lie in this order; those that change the same thing
lie in the order of the `wrap` calls.

The module tree is the only state: a technique that is attached is a module in the tree. A *site*
is a place in the tree under the name that the model's author gave it. `walk` skips the `Layer`s
and never enters a `Patch`. So an adapter's own matrices are never wrapped, and a file written
with one set of techniques attached can be read with another.

peft keeps a tuner class over the model, a config object and dictionaries of active adapters for
each layer, and dispatches through five files. Here the named patches of a leaf are one ModuleDict.
"""

from torch import nn
from torch.nn import UninitializedParameter

from minillm.registry.hooks import no_shortcut, take_hooks
from minillm.registry.kinds import TOUCHES, CannotMerge, Format, positional
from minillm.registry.leaf import kept
from minillm.registry.unread import unread


class Layer(nn.Module):
    """`base` (a leaf or a sublayer) and the named patches around it, innermost first."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.patches = nn.ModuleDict()
        take_hooks(self, base)  # a hook on the leaf sees what the site computes
        # nn.TransformerEncoderLayer in eval reads its modules' weights and calls none of them,
        # unless one has a hook.
        self.register_forward_pre_hook(no_shortcut)
        self.training = base.training

    def forward(self, *args, **kwargs):
        if kwargs and leaf(self.base):  # a patch has its own name for the input
            args, kwargs = positional(args, kwargs)
        return Below(self, len(self.patches))(*args, **kwargs)

    def add(self, patch, place=None):
        """Put the patch outside the others, or at `place` among them, counted from the inside.

        The order of TOUCHES comes first. A patch of the same name is replaced.
        """
        names = [name for name in self.patches if name != patch.name]
        names.insert(len(names) if place is None else place, patch.name)
        every = dict(self.patches) | {patch.name: patch.train(self.base.training)}
        self.patches.clear()
        # a stable sort: patches that touch the same thing keep their order
        for name in sorted(names, key=lambda name: TOUCHES.index(every[name].touches)):
            self.patches[name] = every[name]

    def place(self, names):
        """The place of the innermost of these patches, for one that computes what they do together.

        ValueError where a patch lies between them that does more than add to the weight.
        """
        here = list(self.patches.values())
        places = [i for i, patch in enumerate(here) if patch.name in names]
        for patch in here[places[0] : places[-1]]:
            if patch.active and not patch.additive:
                raise ValueError(f"{patch.name} lies between {here[places[0]].name} and "
                                 f"{here[places[-1]].name}, so one patch cannot replace both: "
                                 f"choose those on one side of {patch.name}")
        return places[0]

    def stack(self):
        """The patches that change what the site computes, innermost first."""
        return [patch for patch in self.patches.values() if patch.active or patch.start]

    def dense(self):
        """The folded (W, b): what a plain leaf would hold to compute the same output."""
        return folded(self.base, active(self.stack()))

    @property
    def weight(self):
        """The folded weight, in the base's layout, for code that reads `.weight`.

        nn.MultiheadAttention reads it. A patch of the ids (a soft prompt) is not folded in. Where
        another patch cannot be folded in, the weight has no values: see `unread`.
        """
        kind = leaf(self.base)
        if kind is None:
            return self.base.weight
        changes = [patch for patch in self.stack() if patch.touches != "ids"]
        if not changes:
            return self.base.weight
        try:
            W, _ = folded(self.base, active(changes))
        except (CannotMerge, ValueError) as error:
            W, _ = dense(self.base)
            why = f"the model computes with the weight of a leaf and does not call it, and {error}"
            return unread((W.T if kind.transposed else W).shape, W.dtype, W.device, why)
        return W.T if kind.transposed else W

    @property
    def bias(self):
        try:
            return self.base.bias if leaf(self.base) is None else self.dense()[1]
        except (CannotMerge, ValueError):  # using `weight` raises it
            return self.base.bias

    def __getattr__(self, name):  # the Layer has what the base has: `in_features`, `layer_idx`, ...
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __setattr__(self, name, value):  # and what is set on the Layer is set on the base
        base = self.__dict__.get("_modules", {}).get("base")
        own = (base is None or name in self.__dict__ or name in self._modules
               or hasattr(type(self), name))
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
        return (patch.select if patch.active else patch.idle)(below, *args, **kwargs)

    def patches(self):
        return list(self.layer.patches.values())[: self.depth]

    def dense(self):
        """(W, b), W (out, in): the base's, with the patches of the weight beneath folded in."""
        return self.recipe()()

    def recipe(self):
        """A function that computes `dense()`, then or later, with the patches active now.

        A backward pass needs it: `minillm.use` may have come after the forward pass.
        """
        base = self.layer.base
        changes = active(patch for patch in self.patches() if patch.touches == "weight")
        return lambda: folded(base, changes)

    def alone(self):
        """The leaf, if its weight is dense and no patch beneath changes its output; else None."""
        base, changed = self.layer.base, any(one.active or one.start for one in self.patches())
        return None if changed or isinstance(base, Format) or leaf(base) is None else base

    def compute(self, x, W, b=None):
        """The output of the leaf with another matrix W (out', in) and bias b (out',)."""
        return leaf(self.layer.base).compute(x, W, b)


def active(patches):
    """[(patch, whether it takes part now)]"""
    return [(patch, patch.active) for patch in patches]


def folded(base, patches):
    """(W, b) of the base with the patches [(patch, takes part)] folded in, innermost first."""
    W, b = dense(base)
    for patch, takes_part in patches:
        if not takes_part:
            W, b = patch.idle_fold(W, b)
            continue
        if patch.random:
            raise ValueError(f"{patch.name} has a dropout that no folded weight has, and what is "
                             "around it (a mask, nn.MultiheadAttention) computes with the folded "
                             f"weight: wrap {patch.name} with dropout=0")
        if patch.rows is not None:
            raise ValueError(f"{patch.name} is not in all rows of this batch (see minillm.rows), "
                             "and what is around it computes with one folded weight")
        W, b = patch.fold(W, b)
    return W, b


def leaf(module):
    """How the leaf `module` keeps its matrix, as a Leaf; None if `module` is no leaf.

    A Format, and a Layer over a leaf, count as leaves. A module whose weight is computed from
    other parameters (weight_norm, torch.nn.utils.prune) is none: what is written to its weight
    is lost. Nor is a lazy module that has no weight yet.
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
