"""The places of a model's tree, under the names that its author gave them."""

import dataclasses

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from minillm.registry.kinds import Format, Patch
from minillm.registry.layer import Below, Layer, dense, leaf
from minillm.registry.past import Aside


@dataclasses.dataclass
class Site:
    """A place in the model under its author's name: the module there and the Layer around it."""

    name: str
    module: nn.Module  # the leaf (in any format) or the sublayer itself, never a Layer
    layer: Layer | None  # None: nothing is wrapped around it
    places: list  # [(parent, key)]; more than one if the model uses the module twice

    @property
    def leaf(self):
        return leaf(self.module)

    def dense(self, below=None):
        """(W, b) of a leaf with its patches of the weight folded in.

        below: the name of a patch; then only the patches beneath it.
        """
        if self.layer is None:
            return dense(self.module)
        names = list(self.layer.patches)
        depth = names.index(below) if below in names else len(names)
        return Below(self.layer, depth).dense()

    def stored(self):
        """(W, b) that a leaf itself stores, without its patches."""
        return dense(self.module)

    @property
    def shape(self):
        """(out, in) of a leaf."""
        if isinstance(self.module, Format):
            return self.module.shape
        return tuple(dense(self.module)[0].shape)

    @property
    def padding(self):
        """The id of an embedding whose row is fixed and not trained, or None."""
        stored = isinstance(self.module, Format)
        return getattr(self.module.shell.kept[0] if stored else self.module, "padding_idx", None)

    @property
    def width(self):
        """The size of the output's last dimension: a leaf's `out`, or a sublayer's last leaf's."""
        if self.leaf:
            return self.shape[0]
        inner = [s for s in walk(self.module) if s.leaf and not s.leaf.lookup]
        if not inner:
            raise ValueError(f"{self.name!r} contains no linear leaf, so the width of its output "
                             "is unknown: give width=")
        return inner[-1].shape[0]

    def new(self, *shape):
        """A parameter of zeros on the site's device.

        It is float32, also where the base is half precision, and float64 over a float64 base.
        """
        tensors = (*self.module.parameters(), *self.module.buffers())
        like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=like.device))

    def replace(self, module):
        for parent, key in self.places:
            setattr(parent, key, module)
        self.layer = module if isinstance(module, Layer) else None


def bare(model):
    """The model inside torch.compile, DataParallel or DistributedDataParallel wrappers.

    TypeError if it is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        pair = ": minillm.load returns two things, model, tokenizer = minillm.load(...)"
        raise TypeError(f"the model is a {type(model).__name__}, no nn.Module"
                        + (pair if isinstance(model, tuple) else ""))
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def walk(model):
    """Every Site below `model`, in order and each once; `walk` does not enter patches."""
    sites = {}
    visit(bare(model), "", sites)
    return list(sites.values())


def visit(parent, prefix, sites):
    """Enter the Sites below `parent` in sites, {id of a module: Site}.

    It is no function inside of `walk`: that would refer to itself, and Python would keep the
    modules that a verb replaces until its garbage collector runs.
    """
    base = parent.base if isinstance(parent, Layer) else parent
    # named_children would show a module with two places only once
    for key, child in base._modules.items():
        if child is None or isinstance(child, (Patch, Aside)):
            continue
        if id(child) in sites:
            sites[id(child)].places.append((base, key))
            continue
        layer = child if isinstance(child, Layer) else None
        name = f"{prefix}.{key}" if prefix else key
        sites[id(child)] = Site(name, layer.base if layer else child, layer, [(base, key)])
        visit(child, name, sites)


def check_whole(model, what):
    """ValueError if the weights are spread over processes: FSDP does not see new parameters."""
    if any(isinstance(module, FSDPModule) for module in bare(model).modules()):
        raise ValueError("the weights of this model are spread over the processes (train.shard): "
                         f"{what} before that, or save the model and load it in one process")


def layers(model):
    """{name: Layer} of all sites that are wrapped."""
    return {site.name: site.layer for site in walk(model) if site.layer is not None}


def parameters(model, sites=None):
    """[(name, owner, key, parameter)] of the model's own parameters, and of no patch's.

    Names are the author's. sites: the result of `walk(model)`, if the caller has it.
    """
    model = bare(model)
    root = [("", model.base if isinstance(model, Layer) else model)]
    sites = walk(model) if sites is None else sites
    owners = root + [(site.name + ".", site.module) for site in sites]
    return [(name + key, owner, key, p)
            for name, owner in owners for key, p in owner._parameters.items() if p is not None]


def ties(model):
    """{name of a leaf: names of the other leaves that share its matrix}."""
    owners, sites = {}, walk(model)
    for name, _, key, p in parameters(model, sites):
        if key == "weight":
            owners.setdefault(id(p), []).append(name.removesuffix(".weight"))
    for site in sites:
        if isinstance(site.module, Format):
            owners.setdefault(id(site.module._buffers), []).append(site.name)
    tied = [names for names in owners.values() if len(names) > 1]
    return {name: [n for n in names if n != name] for names in tied for name in names}


def other_keys(model):
    """{name of a leaf: names of parameters under another key that are its weight too}."""
    names = {}
    for name, _, key, p in parameters(model):
        names.setdefault(id(p), []).append((name, key))
    return {name.removesuffix(".weight"): [one for one, other in every if other != "weight"]
            for every in names.values() for name, key in every
            if key == "weight" and any(other != "weight" for _, other in every)}


def shared_biases(model):
    """{name of a leaf: names of the other parameters that are its bias too}."""
    names = {}
    for name, _, key, p in parameters(model):
        names.setdefault(id(p), []).append(name)
    return {name.removesuffix(".bias"): [one for one in names[id(p)] if one != name]
            for name, _, key, p in parameters(model) if key == "bias" and len(names[id(p)]) > 1}


def untie(model):
    """Give every leaf its own copy of a shared matrix; in place, returns the model."""
    check_whole(model, "untie")
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
    config = getattr(bare(model), "config", None)
    for field in ("tied", "tie_word_embeddings"):
        if hasattr(config, field):
            setattr(config, field, False)
    return model
