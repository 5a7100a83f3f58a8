"""The places of a model's tree, under the names that its author gave them."""

import dataclasses

import torch
from torch import nn

from minillm.registry.kinds import Format, Patch
from minillm.registry.layer import Below, Layer, dense, leaf
from minillm.registry.past import Aside


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

    def dense(self, below=None):
        """(W, b) of a leaf as the model uses it, with all patches folded in, or those below one."""
        if self.layer is None:
            return dense(self.module)
        names = list(self.layer.patches)
        depth = names.index(below) if below in names else len(names)
        return Below(self.layer, depth).dense()

    def stored(self):
        """(W, b) of a leaf as it holds them, without its patches."""
        return dense(self.module)

    @property
    def shape(self):
        """(out, in) of a leaf."""
        return self.module.shape if isinstance(self.module, Format) else tuple(dense(self.module)[0].shape)

    @property
    def padding(self):
        """The id whose row an embedding neither changes nor learns, or None."""
        return getattr(self.module.shell.kept[0] if isinstance(self.module, Format) else self.module, "padding_idx", None)

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


def bare(model):
    """The model in what torch.compile, DataParallel or DistributedDataParallel has wrapped around it."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def walk(model):
    """Every Site below `model`, in order, each once; patches are not entered."""
    model = bare(model)
    if not isinstance(model, nn.Module):
        pair = ": minillm.load returns two things, model, tokenizer = minillm.load(...)"
        raise TypeError(f"the model is a {type(model).__name__}, no nn.Module"
                        + (pair if isinstance(model, tuple) else ""))
    sites = {}

    def visit(parent, prefix):
        base = parent.base if isinstance(parent, Layer) else parent
        for key, child in base._modules.items():  # named_children would show a module that stands in two places only once
            if child is None or isinstance(child, (Patch, Aside)):
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


def parameters(model, sites=None):
    """[(name, owner, key, parameter)] of the model's own parameters, under their author's names: no patch's are among them.

    sites: what `walk` returns for the model, where the caller has it.
    """
    model = bare(model)
    root = [("", model.base if isinstance(model, Layer) else model)]
    owners = root + [(site.name + ".", site.module) for site in (walk(model) if sites is None else sites)]
    return [(name + key, owner, key, p) for name, owner in owners for key, p in owner._parameters.items() if p is not None]


def ties(model):
    """{name of a leaf: names of the other leaves that share its matrix}."""
    owners, sites = {}, walk(model)
    for name, _, key, p in parameters(model, sites):
        if key == "weight":
            owners.setdefault(id(p), []).append(name.removesuffix(".weight"))
    for site in sites:
        if isinstance(site.module, Format):
            owners.setdefault(id(site.module._buffers), []).append(site.name)
    return {name: [n for n in names if n != name] for names in owners.values() if len(names) > 1 for name in names}


def untie(model):
    """Give every leaf a matrix of its own; in place, returns the model."""
    seen = set()
    for _, owner, key, p in parameters(model):
        if id(p) in seen:
            setattr(owner, key, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        seen.add(id(p))
    for site in walk(model):
        if isinstance(site.module, Format) and id(site.module._buffers) in seen:
            site.module._buffers = {key: b.clone() for key, b in site.module._buffers.items()}
        elif isinstance(site.module, Format):
            seen.add(id(site.module._buffers))
    for field in ("tied", "tie_word_embeddings"):
        if hasattr(getattr(model, "config", None), field):
            setattr(model.config, field, False)
    return model
