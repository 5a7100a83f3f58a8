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

import dataclasses
import difflib
import re
import sys

import torch
import torch.nn.functional as F
from torch import nn

from minillm.ops import linear


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How a leaf keeps its matrix. A lookup multiplies by one-hot vectors: its W is (width, vocabulary)."""

    transposed: bool  # `.weight` is Wᵀ
    lookup: bool  # the input is ids

    def compute(self, x, W, b=None):
        """The leaf's own computation with the matrix W (out, in) and the bias b (out,)."""
        if not self.lookup:
            return linear(x, W, b)
        return F.embedding(x, W.T) if b is None else F.embedding(x, W.T) + b


LEAVES = {  # a subclass is a leaf as long as it keeps the forward of the class that is named here
    "torch.nn.modules.linear.Linear": Leaf(transposed=False, lookup=False),
    "minillm.transformer.Linear": Leaf(transposed=False, lookup=False),
    "transformers.pytorch_utils.Conv1D": Leaf(transposed=True, lookup=False),
    "torch.nn.modules.sparse.Embedding": Leaf(transposed=True, lookup=True),
}


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
    return kind if kind and "weight" in module._parameters else None


def kept(module):
    """The Leaf of a module whose class is in LEAVES, wherever its weight comes from; or None."""
    for cls in type(module).__mro__:
        kind = LEAVES.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind and type(module).forward is cls.forward and getattr(module, "max_norm", None) is None:
            return kind
    return None


def dense(module):
    """(W, b) of a leaf in any format: W (out, in), b (out,) or None."""
    if isinstance(module, Format):
        return module.dense(), module.bias
    W = module.weight
    return (W.T if leaf(module).transposed else W), getattr(module, "bias", None)


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


class Patch(nn.Module):
    """What is computed around a leaf or a sublayer. A subclass gives `fold`, or `forward`, or both.

    Its constructor takes the Site and keyword arguments; `config()` returns the latter, so that a file can rebuild it.
    """

    technique = ""  # its name in the table of techniques
    not_neutral = ""  # why wrapping changes the output at once, if it does
    outermost = False  # stays around the patches that are wrapped later
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

    def config(self):
        return {}


class Format(nn.Module):
    """A leaf whose matrix is stored in another way. A subclass gives `pack` and `dense`; `forward` may be faster than dense."""

    technique = ""
    not_neutral = ""
    variable = ()  # buffers whose size depends on the values of W
    float32 = ()  # buffers that stay float32, whatever the model computes in

    def __init__(self, site):
        super().__init__()
        W, self.bias = dense(site.module)
        self.leaf, self.shape, self.format_name = site.leaf, tuple(W.shape), self.technique
        self.dtype = W.dtype  # what the model computes in
        self.pack(W.detach())

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

    def pack(self, W):
        """Set the buffers from W (out, in), which may be more exact than `dtype`."""
        raise NotImplementedError

    def dense(self):
        """W (out, in), in `dtype`."""
        raise NotImplementedError

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

    def fill(self, tensors, where):
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
            self._buffers[key] = new.to(old.device, old.dtype)
        self.check(where)

    def check(self, where):
        """ValueError if the buffers contradict each other."""

    def pays(self, where):
        """ValueError if what a merge put into it would need fewer bytes dense."""

    def config(self):
        return {}

    def extra_repr(self):
        return f"{self.shape[1]} -> {self.shape[0]}, bias={self.bias is not None}"


@dataclasses.dataclass
class Site:
    """A place in the model under its author's name: the module there, and the Layer around it, if there is one."""

    name: str
    module: nn.Module  # never a Layer: the leaf (in whatever format) or the sublayer itself
    layer: Layer | None
    places: list  # (parent, key): more than one if the model uses the module twice

    @property
    def leaf(self):
        return leaf(self.module)

    def dense(self):
        """(W, b) of a leaf as the model uses it, with all patches folded in."""
        return self.layer.dense() if self.layer else dense(self.module)

    @property
    def shape(self):
        """(out, in) of a leaf."""
        return self.module.shape if isinstance(self.module, Format) else tuple(dense(self.module)[0].shape)

    @property
    def padding(self):
        """The id whose row an embedding neither changes nor learns, or None."""
        return getattr(self.module.__dict__.get("shell", self.module), "padding_idx", None)

    @property
    def width(self):
        """The size of the output's last dimension: of a leaf its `out`, of a sublayer that of the last leaf in it."""
        if self.leaf:
            return self.shape[0]
        inner = [s for s in walk(self.module) if s.leaf and not s.leaf.lookup]
        if not inner:
            raise ValueError(f"{self.name!r} holds no linear leaf to tell the width of its output: give width=")
        return inner[-1].shape[0]

    def new(self, *shape):
        """An empty parameter on the site's device. What is trained is float32 even where the base is half precision."""
        like = next((t for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()), torch.empty(0))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=like.device))

    def replace(self, module):
        for parent, key in self.places:
            setattr(parent, key, module)
        self.layer = module if isinstance(module, Layer) else None


def walk(model):
    """Every Site below `model`, in order, each once; patches are not entered."""
    sites = {}

    def visit(parent, prefix):
        base = parent.base if isinstance(parent, Layer) else parent
        for key, child in base._modules.items():  # named_children would show a module that stands in two places only once
            if child is None or isinstance(child, Patch):
                continue
            if id(child) in sites:
                sites[id(child)].places.append((base, key))
                continue
            layer = child if isinstance(child, Layer) else None
            name = f"{prefix}.{key}" if prefix else key
            sites[id(child)] = Site(name, layer.base if layer else child, layer, [(base, key)])
            visit(child, name)

    visit(model, "")
    return list(sites.values())


def layers(model):
    """{name: Layer} of everything that is wrapped."""
    return {site.name: site.layer for site in walk(model) if site.layer is not None}


def parameters(model):
    """[(name, owner, key, parameter)] of the model's own parameters, under their author's names: no patch's are among them."""
    root = [("", model.base if isinstance(model, Layer) else model)]
    owners = root + [(site.name + ".", site.module) for site in walk(model)]
    return [(name + key, owner, key, p) for name, owner in owners for key, p in owner._parameters.items() if p is not None]


def ties(model):
    """{name of a leaf: names of the other leaves that share its matrix}."""
    owners = {}
    for name, _, key, p in parameters(model):
        if key == "weight":
            owners.setdefault(id(p), []).append(name.removesuffix(".weight"))
    return {name: [n for n in names if n != name] for names in owners.values() if len(names) > 1 for name in names}


def untie(model):
    """Give every leaf a matrix of its own; in place, returns the model."""
    seen = set()
    for _, owner, key, p in parameters(model):
        if id(p) in seen:
            setattr(owner, key, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        seen.add(id(p))
    for field in ("tied", "tie_word_embeddings"):
        if hasattr(getattr(model, "config", None), field):
            setattr(model.config, field, False)
    return model


def same_shape(ids, **others):
    """ValueError for what is there and has another shape than ids (b, t)."""
    for name, rows in others.items():
        if rows is not None and rows.shape != ids.shape:
            raise ValueError(f"{name} {tuple(rows.shape)} and ids {tuple(ids.shape)} differ in shape")


def prepare(model, ids, labels=None, mask=None):
    """The batch with what the attached techniques add to it (soft prompts put their placeholders in front).

    ids, labels, mask: each (b, t); ValueError where they differ in shape.
    """
    same_shape(ids, labels=labels, mask=mask)
    for layer in layers(model).values():
        for patch in layer.patches.values():
            ids, labels, mask = patch.prepare(ids, labels, mask)
    return ids, labels, mask


# --- targets -----------------------------------------------------------------------------------------------------------


def hidden_linears(model):
    """The default targets: every linear leaf but the output head and leaves that share their matrix with another."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = ties(model)
    return lambda site: not site.leaf.lookup and site.name not in tied and head not in (site.module, site.layer or site.module)


def select(model, targets, accepts, default, what="leaf"):
    """The sites that `targets` names, of those that `accepts` takes.

    targets: None (those that `default` says yes to); a list of name endings, each of which must match; a regular expression for a
    whole name or its end after a dot; or a function (name, module) -> bool. What matches nothing is an error.
    """
    if leaf(model) is not None:
        raise ValueError(f"the model is itself a leaf ({type(model).__name__}), which cannot be replaced in place: "
                         "put it into an nn.Sequential")
    every = walk(model)
    sites = [site for site in every if accepts(site)]
    if targets is None:
        chosen = [site for site in sites if default(site)]
        if not chosen:
            raise ValueError(f"no {what} to wrap by default in this {type(model).__name__}; {hint('', sites)}")
        return chosen
    if callable(targets):
        chosen = [site for site in sites if targets(site.name, site.module)]
        if not chosen:
            raise ValueError(f"the function {getattr(targets, '__name__', targets)!r} picked no {what}; {hint('', sites)}")
        return chosen

    if not isinstance(targets, str | list | tuple | set | frozenset) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"targets={targets!r} is neither a regular expression, nor a list of name endings, nor a function; "
                         f"{hint('', sites)}")
    patterns = {}
    if isinstance(targets, str):  # alternatives outside brackets are checked one by one: one misspelt name is found
        plain = not re.search(r"[()\[\]\\]", targets)
        patterns = {part: part for part in (targets.split("|") if plain else [targets])}
    else:
        patterns = {ending: re.escape(ending) for ending in targets}
    if not patterns:
        raise ValueError(f"targets={targets!r} is empty; {hint('', sites)}")
    chosen = set()
    for written, pattern in patterns.items():
        try:
            found = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except re.error as error:
            raise ValueError(f"targets={written!r} is not a regular expression: {error}") from error
        matching = [site.name for site in sites if found.fullmatch(site.name)]
        if not matching:
            others = [site for site in every if found.fullmatch(site.name)]
            why = (
                f"{others[0].name!r} is a {type(others[0].module).__name__}, no {what} that can "
                f"be wrapped{computed(others[0])}"
                if others
                else f"no module's name ends so ({len(every)} were looked at)"
            )
            raise ValueError(f"target {written!r} matches no {what}: {why}; {hint(written, sites)}")
        chosen.update(matching)
    return [site for site in sites if site.name in chosen]


def computed(site):
    """What to say of a site whose weight is no parameter of its own; else nothing."""
    if kept(site.module) and not leaf(site.module):
        return (
            ": its weight is computed from other parameters (by weight_norm or nn.utils.prune, "
            "for example); make it a parameter again first, with torch's remove_parametrizations, "
            "remove_weight_norm or prune.remove"
        )
    return ""


def hint(written, sites):
    """What would have matched: the endings closest to what was written, or some that there are."""
    endings = list(dict.fromkeys(re.sub(r"^.*\.(?=[^.]*[^.\d][^.]*$)", "", site.name) for site in sites))
    names = difflib.get_close_matches(written.rsplit(".", 1)[-1], endings, n=4, cutoff=0.5) or endings[:8]
    if not names:
        return "this model has nothing that could be wrapped"
    return "what would have matched: " + ", ".join(repr(name) for name in names)


# --- the table of techniques ------------------------------------------------------------------------------------------------

TECHNIQUES = {}


def register(name, cls):
    """Enter a technique's class in the table; its module holds the verbs."""
    cls.technique = name
    TECHNIQUES[name] = cls


def techniques():
    """{name: the module that holds its verbs}, in the order of `import minillm`."""
    return {name: sys.modules[cls.__module__] for name, cls in TECHNIQUES.items()}


def patches_of(technique, model):
    """[(site, patch)] of one technique."""
    return [(site, site.layer.patches[technique]) for site in walk(model)
            if site.layer and technique in site.layer.patches]


def formats_of(technique, model):
    """[site] of the leaves that one Format stores."""
    return [site for site in walk(model)
            if isinstance(site.module, Format) and site.module.technique == technique]


def attached(model):
    """The names of all techniques in the model, to be named in an error."""
    names = {name for site in walk(model) if site.layer for name in site.layer.patches}
    names |= {site.module.technique for site in walk(model) if isinstance(site.module, Format)}
    return ", ".join(sorted(names)) or "nothing"
