"""Where the techniques meet: formats swap the leaf, patches ring the leaf.

A *leaf* is a module with one weight matrix W (out, in). A technique that touches a leaf is one of two things:

    Format    how W is stored          pack(W) to buffers, dense() back     int8, CSR, ...
    Patch     what is computed around  forward(below, x), fold(W, b)        LoRA, a pruning mask, ...

    Layer(base, patches)               base: the leaf, in whatever format; patches: innermost first

The two commute, for a patch sees only `below`: `below(x)` is the output beneath it, `below.dense()` the weight beneath it.
A patch may also ring a sublayer (an attention, an MLP), which has an output but no matrix.

The module tree is the only state. A technique that is wrapped is a module in the tree; what it froze is noted on the
module that owns the parameter. A *site* is a place in the tree under the name that the model's author gave it: `walk` skips
the `Layer`s and never enters a `Patch`, so an adapter's own matrices are never wrapped, and files written with one set of
techniques attached are read with another.

peft keeps a tuner class over the model, a config object and dictionaries of active adapters for each layer; that buys
several adapters on one layer, switched by name, and costs the reader a dispatch through five files.
"""

import inspect

import torch
from torch import nn
from torch.nn import UninitializedParameter

from minillm.registry.leaf import kept


class Layer(nn.Module):
    """`base` (a leaf or a sublayer) and the patches around it, innermost first."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.patches = nn.ModuleDict()
        # In eval nn.TransformerEncoderLayer reads its modules' weights and calls none of them, unless one has a hook.
        self.register_forward_pre_hook(no_shortcut)

    def forward(self, *args, **kwargs):
        return Below(self, len(self.patches))(*args, **kwargs)

    def add(self, patch):
        """Put the patch around what is there, but inside of those that stay outermost."""
        self.patches[patch.technique] = patch.train(self.base.training)
        for name in [name for name, other in self.patches.items() if other.outermost]:
            self.patches[name] = self.patches.pop(name)

    def dense(self):
        """The folded (W, b): what a plain leaf would hold to compute the same."""
        return Below(self, len(self.patches)).dense()

    @property
    def weight(self):
        """The folded weight as the base would keep it, for code that reads `.weight` (nn.MultiheadAttention does)."""
        kind = leaf(self.base)
        if kind is None:
            return self.base.weight
        try:
            W, _ = self.dense()
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


def no_shortcut(layer, inputs):
    """Changes nothing: that the Layer has a hook is what counts."""


class Below:
    """The base and the `depth` innermost patches of a Layer, as the next patch sees them."""

    def __init__(self, layer, depth):
        self.layer, self.depth = layer, depth

    def __call__(self, *args, **kwargs):
        if self.depth == 0:
            return self.layer.base(*args, **kwargs)
        patch = list(self.layer.patches.values())[self.depth - 1]
        return patch(Below(self.layer, self.depth - 1), *args, **kwargs)

    def dense(self):
        """(W, b), W (out, in), with what lies beneath folded in."""
        W, b = dense(self.layer.base)
        for patch in list(self.layer.patches.values())[: self.depth]:
            if patch.random:
                raise ValueError(f"{patch.technique} has a dropout that no folded weight has, and what is around it (a mask, "
                                 f"nn.MultiheadAttention) computes with the folded weight: wrap {patch.technique} with dropout=0")
            W, b = patch.fold(W, b)
        return W, b

    def compute(self, x, W, b=None):
        """What the leaf would compute with another matrix W (out', in) and bias b."""
        return leaf(self.layer.base).compute(x, W, b)


class CannotMerge(TypeError):
    """A patch that is not a change of the weight."""


class Kind(nn.Module):
    """What Patch and Format share: one is built for a Site, and then filled.

    The constructor takes the Site and keyword arguments, the options. It allocates, and computes
    nothing: `wrap` calls `fill` after it, a file brings the tensors itself. Each option is kept as
    an attribute of its name.
    """

    technique = ""  # its name in the table of techniques
    not_neutral = ""  # why wrapping changes the output at once, if it does

    def fill(self, site):
        """Compute what it begins with."""

    def config(self):
        """{option: value}, from which a file builds it again."""
        names = list(inspect.signature(type(self)).parameters)[1:]  # without the site
        return {name: getattr(self, name) for name in names}


class Patch(Kind):
    """What is computed around a leaf or a sublayer. A subclass gives `fold`, or `forward`, or both."""

    outermost = False  # stays around the patches that are wrapped later
    over = frozenset()  # the techniques that the model had when this one came
    random = False  # whether `forward` draws at random now, as `fold` cannot

    @classmethod
    def accepts(cls, site):
        """Whether this site can be wrapped: by default a leaf that is not a lookup."""
        return site.leaf is not None and not site.leaf.lookup

    def forward(self, below, x):
        return below.compute(x, *self.fold(*below.dense()))

    def fold(self, W, b):
        """(W, b) -> (W', b') such that the leaf with W', b' computes what `forward` does. W is (out, in)."""
        raise CannotMerge(f"{self.technique} cannot be merged: what it computes is no change of a weight")

    def prepare(self, ids, labels, mask):
        """What the technique adds to a batch before the model sees it: ids, labels, mask, each (b, t) or None."""
        return ids, labels, mask


class Format(Kind):
    """A leaf whose matrix is stored in another way.

    A subclass gives `allocate`, `pack` and `dense`; its `forward` may be faster than `dense`.
    """

    variable = ()  # buffers whose size depends on the values of W
    float32 = ()  # buffers that stay float32, whatever the model computes in

    def __init__(self, site):
        super().__init__()
        W, self.bias = dense(site.module)
        self.leaf, self.shape, self.format_name = site.leaf, tuple(W.shape), self.technique
        self.dtype = W.dtype  # what the model computes in
        self.allocate(W.device)

    def fill(self, site):
        self.pack(dense(site.module)[0].detach())

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and the like: a cast changes `dtype`, and leaves the buffers in `float32` exact."""
        exact = {key: self._buffers[key] for key in self.float32}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for key, t in exact.items():
            if self._buffers[key].dtype != t.dtype:
                self._buffers[key] = t.to(self._buffers[key].device)
        return self

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None and not site.leaf.lookup

    def allocate(self, device):
        """Register the buffers, of any values."""
        raise NotImplementedError

    def pack(self, W):
        """Set the buffers from W (out, in), which may be more exact than `dtype`."""
        raise NotImplementedError

    def dense(self):
        """W (out, in), in `dtype`."""
        raise NotImplementedError

    def called(self):
        """What a fingerprint calls it: formats that may round differently have different names."""
        return self.technique

    def rounding(self):
        """How far each weight of `dense()` may be from what was packed; it expands to (out, in).

        Infinity where nothing is known.
        """
        return torch.full((1, 1), torch.inf)

    @property
    def weight(self):
        """The dense weight as the leaf would keep it, for code that reads `.weight` (nn.MultiheadAttention does)."""
        W = self.dense()
        return W.T if self.leaf.transposed else W

    def forward(self, x):
        return self.leaf.compute(x, self.dense(), self.bias)

    def take(self, tensors, where):
        """Take the buffers that a file holds; ValueError, which says `where`, if they are not this leaf's."""
        ours = dict(self.named_buffers())
        if set(ours) != set(tensors):
            raise ValueError(f"{where}: {self.technique} keeps {sorted(ours)}, the file has {sorted(tensors)}")
        for key, old in ours.items():
            new = tensors[key]
            cast = (
                new.dtype.is_floating_point and old.dtype.is_floating_point
            )  # another integer type may not hold the values
            if (
                not cast
                and new.dtype != old.dtype
                or (new.shape != old.shape and key not in self.variable)
            ):
                raise ValueError(f"{where}: {key} should be {old.dtype} {tuple(old.shape)}, the file has {new.dtype} {tuple(new.shape)}")
            if new.dtype.is_floating_point and not torch.isfinite(new).all():
                raise ValueError(f"{where}: {key} holds nan or infinity")
            self._buffers[key] = new.to(old.device, old.dtype)
        self.check(where)

    def check(self, where):
        """ValueError if the buffers contradict each other."""

    def pays(self, where):
        """ValueError if what a merge put into it would need fewer bytes dense."""

    def extra_repr(self):
        return f"{self.shape[1]} -> {self.shape[0]}, bias={self.bias is not None}"


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
