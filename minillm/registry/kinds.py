"""Patch and Format, from which every kind of technique is made. `layer` says what they are and how they meet."""

import inspect

import torch
from torch import nn

TOUCHES = ("weight", "input", "output", "ids")  # what a patch may change, innermost first


class CannotMerge(TypeError):
    """A patch that is not a change of the weight."""


class Kind(nn.Module):
    """What Patch and Format share: one is built for a Site, and then filled.

    The constructor takes the Site and keyword arguments, the options. It allocates, and computes
    nothing: `wrap` calls `fill` after it, a file brings the tensors itself. Each option is kept as
    an attribute of its name.
    """

    kind = ""  # its name in the table of kinds
    family = ""  # the module that has its verbs
    name = ""  # of this one; by default its kind
    not_neutral = ""  # why wrapping changes the output at once, if it does

    def __init__(self, site=None):
        super().__init__()

    def fill(self, site):
        """Compute what it begins with."""

    def config(self):
        """{option: value}, from which a file builds it again."""
        names = list(inspect.signature(type(self)).parameters)[1:]  # without the site
        return {name: getattr(self, name) for name in names}


class Patch(Kind):
    """What is computed around a leaf or a sublayer. A subclass gives `fold`, or `forward`, or both."""

    touches = "weight"  # what it changes: one of TOUCHES
    additive = False  # whether `fold` adds something that does not depend on W and b
    reads = True  # whether `fill` looks at the model, and not at random numbers alone
    active = True  # whether it takes part: `minillm.use` switches it
    rows = None  # of a batch, those for which it takes part, (b,) of bool; None: all (see `minillm.rows`)
    fixed = False  # whether it is not to be trained any more; then it claims nothing
    start = False  # whether it takes a part out of the base when it comes: see `residual`
    random = False  # whether `forward` draws at random now, as `fold` cannot

    before = frozenset()  # the names that the model had before it
    over = frozenset()  # of those, the ones over which it was filled or trained (see `names`)
    version = ()  # of its parameters, when `over` was brought up to date

    @classmethod
    def accepts(cls, site):
        """Whether this site can be wrapped: by default a leaf that is not a lookup."""
        return site.leaf is not None and not site.leaf.lookup

    def forward(self, below, x):
        return below.compute(x, *self.fold(*below.dense()))

    def fold(self, W, b):
        """(W, b) -> (W', b') such that the leaf with W', b' computes what `forward` does. W is (out, in)."""
        raise CannotMerge(f"{self.name} cannot be merged: what it computes is no change of a weight")

    def residual(self, W):
        """What is left of W (out, in) when a patch comes that starts with a part of it."""
        raise NotImplementedError

    def select(self, below, *args, **kwargs):
        """The output of the patch in its rows of the batch, of what lies beneath it in the others."""
        if self.rows is None or self.touches == "ids":  # ids without placeholders have no prompt
            return self(below, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != len(self.rows):
            raise ValueError(f"minillm.rows names an adapter for each of {len(self.rows)} rows, and this batch has {len(x)}")
        beneath = Once(below)
        y, z = self(beneath, *args, **kwargs), beneath(*args, **kwargs)
        if isinstance(y, tuple):
            return (self.mixed(y[0], z[0]), *y[1:])
        return self.mixed(y, z)

    def mixed(self, y, z):
        """y in the rows of this patch, z in the others; each (b, ...)."""
        return torch.where(self.rows.view(-1, *[1] * (y.dim() - 1)), y, z)

    def prepare(self, ids, labels, mask):
        """What the technique adds to a batch before the model sees it: ids, labels, mask, each (b, t) or None."""
        return ids, labels, mask


class Once:
    """What lies beneath a patch, computed once, however often it is called with the same input."""

    def __init__(self, below):
        self.below, self.args, self.output = below, None, None

    def __call__(self, *args, **kwargs):
        if self.args is None or len(args) != len(self.args) or any(a is not b for a, b in zip(args, self.args)):
            self.args, self.output = args, self.below(*args, **kwargs)
        return self.output

    def __getattr__(self, name):
        return getattr(self.below, name)


class Format(Kind):
    """A leaf whose matrix is stored in another way.

    A subclass gives `allocate`, `pack` and `dense`; its `forward` may be faster than `dense`.
    """

    variable = ()  # buffers whose size depends on the values of W
    float32 = ()  # buffers that stay float32, whatever the model computes in

    def __init__(self, site):
        super().__init__()
        W, self.bias = site.stored()
        self.leaf, self.shape, self.name = site.leaf, tuple(W.shape), self.kind
        self.dtype = W.dtype  # what the model computes in
        self.allocate(W.device)

    def fill(self, site):
        self.pack(site.stored()[0].detach())

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
        return self.kind

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

    def __setattr__(self, name, value):
        if name == "weight":
            raise AttributeError(f"the weight is stored as {self.kind} and cannot be set: minillm.{self.family}.unwrap(model) "
                                 "gives a dense one back first")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.leaf.compute(x, self.dense(), self.bias)

    def take(self, tensors, where):
        """Take the buffers that a file holds; ValueError, which says `where`, if they are not this leaf's."""
        ours = dict(self.named_buffers())
        if set(ours) != set(tensors):
            raise ValueError(f"{where}: {self.kind} keeps {sorted(ours)}, the file has {sorted(tensors)}")
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

    def __repr__(self):  # without the emptied leaf that waits in it
        return super().__repr__() if "past" in self._modules else f"{type(self).__name__}({self.extra_repr()})"
