"""Patch and Format, from which every kind of technique is made; `layer` says how they combine."""

import inspect

import torch
from torch import nn

TOUCHES = ("weight", "input", "output", "ids")  # what a patch may change, innermost first


class CannotMerge(TypeError):
    """This patch does not change the weight, so it cannot be merged."""


def positional(args, kwargs):
    """(args, kwargs) of a leaf's call, with its input among the args.

    nn.Linear's forward calls its input `input` and Conv1D's calls it `x`. So a caller may name it.
    """
    if args or len(kwargs) != 1 or not kwargs.keys() & {"input", "x"}:
        return args, kwargs
    return tuple(kwargs.values()), {}


def version(p):
    """The tensor and the number of its changes in place; a new tensor may have any values.

    A tensor made under torch.inference_mode has no such number, and cannot be trained.
    """
    return id(p), 0 if p.is_inference() else p._version


class Kind(nn.Module):
    """What Patch and Format share: each is built for a Site, and then filled.

    The constructor takes the Site and keyword arguments, the options. It allocates, but computes
    nothing. `wrap` then calls `fill`; `load` sets the tensors from a file instead. Each option is
    kept as an attribute of the same name.
    """

    kind = ""  # its class's name in the table of kinds
    family = ""  # the module that has its verbs
    name = ""  # the name of this one; by default its kind
    not_neutral = ""  # why wrapping changes the output at once; "" if it does not

    def __init__(self, site=None):
        super().__init__()

    def fill(self, site):
        """Compute the values that it begins with."""

    def config(self):
        """{option: value}; `load` builds it again from these."""
        names = list(inspect.signature(type(self)).parameters)[1:]  # the first is the site
        return {name: getattr(self, name) for name in names}


class Patch(Kind):
    """A computation around a leaf or a sublayer. A subclass gives `fold`, or `forward`, or both."""

    touches = "weight"  # what it changes: one of TOUCHES
    additive = False  # whether `fold` adds something that does not depend on W and b
    reads = True  # whether `fill` reads the model; False: it only draws random numbers
    active = True  # whether it takes part: `minillm.use` switches it
    rows = None  # the rows of a batch in which it takes part, (b,) of bool; None: all
    outside = True  # `active` outside of the context `minillm.rows`
    fixed = False  # whether its training is over; then it claims no parameters
    start = False  # whether it takes a part out of the base when it comes: see `part`
    shares = ()  # the names of the tensors that all patches of one `wrap` share: see Common
    facts = None  # what its patches read of the present call, if they read anything: see Facts
    instead = False  # whether it computes something else than the leaf, which it never calls
    random = False  # whether `forward` draws at random now, which `fold` cannot do

    before = frozenset()  # the names that the model had before it
    over = frozenset()  # of `before`, the names over which it was filled or trained (see `names`)
    beneath = frozenset()  # the names that its file says were beneath it
    version = ()  # the version of its parameters when `over` was last updated

    @classmethod
    def accepts(cls, site):
        """Whether it can wrap this site: by default a leaf that is not a lookup."""
        return site.leaf is not None and not site.leaf.lookup

    def forward(self, below, x):
        return below.compute(x, *self.fold(*below.dense()))

    def fold(self, W, b):
        """(W, b) -> (W', b'): a leaf with W' (out, in) and b' computes what `forward` does."""
        raise CannotMerge(f"{self.name} cannot be merged: what it computes is no "
                          "change of a weight")

    @classmethod
    def join(cls, patches):
        """Called with all patches of one `wrap` or one file, before they take their places."""

    def share(self, common):
        """Use this Common; ValueError if it does not fit. A kind with `shares` has one."""
        self.common = common

    def part(self):
        """The part (out, in) that a patch with a `start` took out of the base when it came."""
        raise NotImplementedError

    def idle(self, below, *args, **kwargs):
        """The output where the patch takes no part: that of `below`, and of `part`."""
        y = below(*args, **kwargs)
        return y + below.compute(*args, self.part().to(y.dtype)) if self.start else y

    def idle_fold(self, W, b):
        """(W, b) where the patch takes no part."""
        return (W + self.part().to(W.dtype) if self.start else W), b

    def select(self, below, *args, **kwargs):
        """The output of the patch in its rows of the batch, and of `idle` in the other rows."""
        if self.rows is None or self.touches == "ids":  # rows without placeholders have no prompt
            return self(below, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != len(self.rows):
            raise ValueError(f"minillm.rows names an adapter for each of {len(self.rows)} rows, "
                             f"and this batch has {len(x)}")
        beneath = Once(below)
        y, z = self(beneath, *args, **kwargs), self.idle(beneath, *args, **kwargs)
        if isinstance(y, tuple):
            return (self.mixed(y[0], z[0]), *y[1:])
        return self.mixed(y, z)

    def mixed(self, y, z):
        """y in the rows of this patch, z in the others; each (b, ...)."""
        return torch.where(self.rows.view(-1, *[1] * (y.dim() - 1)), y, z)

    def prepare(self, ids, labels, mask):
        """(ids, labels, mask), each (b, t) or None, with what the technique adds to a batch."""
        return ids, labels, mask

    def versions(self):
        """A value that changes when the parameters do."""
        return tuple(version(p) for p in self.parameters())

    def __getstate__(self):
        """A copy or a pickle lies outside of the context `minillm.rows`, and is no training."""
        state = dict(super().__getstate__(), settled=self.version == self.versions())
        if self.rows is not None:
            state.update(rows=None, active=self.outside)
        return state

    def __setstate__(self, state):
        settled = state.pop("settled", False)
        super().__setstate__(state)
        if settled:
            self.version = self.versions()


class Once:
    """`below`, computed once, however often it is called with the same input."""

    def __init__(self, below):
        self.below, self.args, self.output = below, None, None

    def __call__(self, *args, **kwargs):
        asked = self.args
        if asked is None or len(args) != len(asked) or any(a is not b for a, b in zip(args, asked)):
            self.args, self.output = args, self.below(*args, **kwargs)
        return self.output

    def __getattr__(self, name):
        return getattr(self.below, name)


class Format(Kind):
    """A leaf whose matrix is stored in another way.

    A subclass gives `allocate`, `pack` and `dense`. Its `forward` may be faster than `dense`.
    """

    variable = ()  # buffers whose size depends on the values of W
    float32 = ()  # buffers that stay float32, whatever dtype the model computes in

    def __init__(self, site):
        super().__init__()
        W, self.bias = site.stored()
        self.leaf, self.shape, self.name = site.leaf, tuple(W.shape), self.kind
        self.dtype = W.dtype  # the dtype that the model computes in
        self.allocate(W.device)

    def __call__(self, *args, **kwargs):
        args, kwargs = positional(args, kwargs)
        return super().__call__(*args, **kwargs)

    def fill(self, site):
        self.pack(site.stored()[0].detach())

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and the like.

        A cast changes `dtype`, but not the buffers in `float32`.
        """
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
        """Register the buffers, with any values."""
        raise NotImplementedError

    def pack(self, W):
        """Set the buffers from W (out, in), which may be more exact than `dtype`."""
        raise NotImplementedError

    def dense(self):
        """W (out, in), in `dtype`."""
        raise NotImplementedError

    def called(self):
        """Its name in a fingerprint. Formats that may round differently have different names."""
        return self.kind

    def rounding(self):
        """A bound for each weight's distance from the packed value; it expands to (out, in).

        Infinity where no bound is known.
        """
        return torch.full((1, 1), torch.inf)

    @property
    def weight(self):
        """The dense weight in the leaf's layout, for code that reads `.weight`.

        nn.MultiheadAttention does.
        """
        W = self.dense()
        return W.T if self.leaf.transposed else W

    def __setattr__(self, name, value):
        if name == "weight":
            raise AttributeError(f"the weight is stored as {self.kind} and cannot be set: "
                                 f"minillm.{self.family}.unwrap(model) gives a dense one "
                                 "back first")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.leaf.compute(x, self.dense(), self.bias)

    def take(self, tensors, where):
        """Set the buffers from a file's tensors; ValueError, with `where`, if they do not fit."""
        ours = dict(self.named_buffers())
        if set(ours) != set(tensors):
            raise ValueError(f"{where}: {self.kind} keeps {sorted(ours)}, "
                             f"the file has {sorted(tensors)}")
        for key, old in ours.items():
            new = tensors[key]
            # a float may be cast; another integer type may not hold the values
            cast = new.dtype.is_floating_point and old.dtype.is_floating_point
            if (not cast and new.dtype != old.dtype
                    or new.shape != old.shape and key not in self.variable):
                raise ValueError(f"{where}: {key} should be {old.dtype} {tuple(old.shape)}, "
                                 f"the file has {new.dtype} {tuple(new.shape)}")
            if new.dtype.is_floating_point and not torch.isfinite(new).all():
                raise ValueError(f"{where}: {key} holds nan or infinity")
            self._buffers[key] = new.to(old.device, old.dtype)
        self.check(where)

    def check(self, where):
        """ValueError if the buffers contradict each other."""

    def pays(self, where):
        """ValueError if it needs more bytes than a dense weight after a merge into it."""

    def extra_repr(self):
        return f"{self.shape[1]} -> {self.shape[0]}, bias={self.bias is not None}"

    def __repr__(self):  # without the emptied leaf, `shell`
        short = f"{type(self).__name__}({self.extra_repr()})"
        return super().__repr__() if "past" in self._modules else short
