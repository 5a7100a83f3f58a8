"""Layer freezing: train the top of the model, keep the rest as it was.

    theta_i  learns  where i is not frozen            Howard & Ruder 2018, "ULMFiT", arXiv 1801.06146, section 3.3

What a language model knows generally lies low, what a task needs lies high; the top layers alone get most of the way. It is
the cheapest training of all in compute: the backward pass stops at the lowest layer that learns, so with the last 2 of 30
blocks 2.8 N operations a token are left of 6.5 N (N: the model's parameters), and the activations of two blocks are all that
is kept. In file size it is the dearest: all the weights of the layers that learnt.

Freezing adds no module: it says which of the model's own parameters learn (their `requires_grad`). What another technique added
is never frozen by it. transformers and peft leave this to the user's loop over `named_parameters`. A tied embedding
counts as frozen if either of its names is.
`gradual` unfreezes block by block while the model trains.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=4, heads=2))
>>> names = [n for n, p in minillm.freeze.wrap(model, last=1).named_parameters() if p.requires_grad]
>>> sorted({".".join(n.split(".")[:2]) for n in names})                  # the last block and the final norm
['layers.3', 'norm.weight']
"""

from minillm.registry import roles
from minillm.registry.learned import check_learned, put_back
from minillm.registry.learning import buffers, freeze, frozen, slots, stopped_by, thaw
from minillm.registry import CannotMerge, method, parameters, register, select, walk
from minillm.registry.store import check_base, field, learned_of, opened, sorted_out, write


class Freeze:
    """The entry in the table of techniques; there is no module to add."""

    not_neutral = ""


def wrap(model, targets=None, *, last=2):
    """Freeze the modules that `targets` names (any modules; see `registry.select`), with all in them; returns the model.

    By default all but the last `last` blocks, and what comes after the blocks (the final norm, an untied head).
    ValueError where nothing would be left to learn, and where a part of it is frozen already.
    """
    if targets is None:
        names = within(model, lowest(model, last)) | own(model)
    else:
        names = within(model, select(model, targets, lambda site: True, None, "module"))
    already = sorted(stopped_by(model, "freeze") & names)
    if already:
        raise ValueError(f"{already[0]!r} is frozen already: minillm.freeze.unwrap(model) first lets all of it learn again")
    shared = {id(p) for name, *_, p in parameters(model) if name in names}
    if all(id(p) in shared for *_, p in parameters(model)):
        raise ValueError(f"targets={targets!r} with last={last} freezes every parameter: nothing would be left to learn")
    freeze(model, "freeze", lambda name: name in names)
    return model


def lowest(model, last):
    """The Sites of all modules up to the last `last` blocks, but for what holds the blocks."""
    sites, blocks = walk(model), roles.blocks(model)
    n = len(blocks)
    if not 0 < last < n:
        name = blocks[0].name.rpartition(".")[0]
        raise ValueError(f"last={last}: {name!r} has {n} blocks, so last lies between 1 and {n - 1}")
    first = blocks[n - last].name
    below = sites[: [site.name for site in sites].index(first)]
    return [site for site in below if not first.startswith(f"{site.name}.")]


def own(model):
    """The names of the parameters that belong to what holds the blocks, and to no module in it.

    A learned position or a class token of an ordinary model is one: it lies below the blocks.
    """
    first = roles.blocks(model)[0].name
    holders = [site.module for site in walk(model) if first.startswith(f"{site.name}.")]
    inside = within(model, walk(model))
    return {name for name, owner, *_ in slots(model)
            if name not in inside or any(owner is holder for holder in holders)}


def within(model, sites):
    """The names of all parameters in these sites, also where another module shares them."""
    owners = {id(module) for site in sites for module in site.module.modules()}
    return {name for name, owner, *_ in slots(model) if id(owner) in owners}


def unwrap(model):
    """Let everything learn again that `wrap` froze; returns the model."""
    check_frozen(model)
    thaw(model, "freeze")
    return model


def check_frozen(model):
    """The names of what is frozen; ValueError where nothing is."""
    names = stopped_by(model, "freeze")
    if not names:
        raise ValueError("nothing is frozen in this model: minillm.freeze.wrap(model) first")
    return names


def merge(model, **_):
    """CannotMerge: there is nothing beside the model's own parameters."""
    raise CannotMerge("freeze cannot be merged: what it trained is the model itself")


unmerge = merge


def save(model, path, force=False):
    """Write the parameters that were left to learn, and the names of the frozen ones, to a safetensors file.

    A weight that a format stores by now is written dense. FileExistsError as for every technique's `save`.
    """
    check_frozen(model)
    write(path, "freeze", model, {}, learned_of("freeze", model), dict(buffers(model)), force,
          frozen=sorted(frozen(model)))


def load(model, path, replace=False, any_base=False):
    """Copy the parameters of the file into the model and freeze the others; returns the model.

    ValueError where something is frozen already, unless `replace`; where the file was made for another
    model, unless `any_base`.
    """
    tensors, metadata = opened(path, "freeze")
    if stopped_by(model, "freeze") and not replace:
        raise ValueError(f"the model has freeze already, and {path} would take its place: unwrap it first, or say replace=True")
    _, own, kept = sorted_out(tensors, {}, path)
    stopped, shared = set(field(metadata, "frozen", path, list)), field(metadata, "shared", path)
    missing = stopped - {name for name, *_ in slots(model)}
    if missing:
        raise ValueError(f"{path} freezes {sorted(missing)[0]!r}, which this model lacks ({len(missing)} such)")
    check_learned(model, own, kept, shared, path)
    check_base(model, metadata, path, any_base)
    put_back(model, own, kept, shared)
    thaw(model, "freeze")
    freeze(model, "freeze", lambda name: name in stopped)
    return model


register("freeze", Freeze)
Freeze.__module__ = __name__
method("freeze", wrap, does="trains the last blocks only", paper="Howard & Ruder 2018, arXiv 1801.06146",
       rates=dict(tiny=1.5e-3, smollm2=3e-4), small={"": dict(last=1), "two": dict(last=2)})
