"""Layer freezing: train the top of the model, keep the rest as it was.

    theta_i learns where i is not frozen
                                Howard & Ruder 2018, "ULMFiT", arXiv 1801.06146, section 3.3

The low layers of a language model hold general knowledge, the high layers what a task
needs, so training the top layers alone gives most of the gain. Of all methods it costs
the least compute: the backward pass stops at the lowest layer that learns. With the
last 2 of SmolLM2's 30 blocks, the matrix products of a token take 2.6 N operations and
not 6 N (N: the model's parameters), and only the activations of two blocks are kept.
Its files are the largest: all weights of the layers that learnt.

Freezing adds no module. It sets which of the model's own parameters learn (their
`requires_grad`), and never freezes the parameters of another technique. transformers
and peft leave this to the user's loop over `named_parameters`. A tied embedding is
frozen if either of its names is. `gradual` unfreezes block by block while the model
trains. The usual patterns:

    wrap(model, last=2)                         only the last two blocks and the final norm learn
    wrap(model, first=4)                        all learn but what lies below the fifth block
    wrap(model, ["embed_tokens"])               all learn but the embedding
    wrap(model, ".*mlp")                        all learn but the MLPs
    wrap(model, lambda name, module: not list(module.children()) and "norm" not in name)
                                                only the norms learn

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=4, heads=2))
>>> names = [n for n, p in minillm.freeze.wrap(model, last=1).named_parameters() if p.requires_grad]
>>> sorted({".".join(n.split(".")[:2]) for n in names})           # the last block, the final norm
['layers.3', 'norm.weight']
"""

from minillm.registry import method, parameters, roles, select, walk
from minillm.registry.claiming import VERBS, Claim, say_of
from minillm.registry.learning import slots, stopped_by
from minillm.registry.verbs import verbs


class Freeze(Claim):
    """Forbids parameters to learn."""


def wrap(model, targets=None, *, last=None, first=None):
    """Freeze the modules that `targets` names; in place, returns the model.

    targets: any modules, with the modules inside them; see `registry.select`. last: the
    last so many blocks learn, with the modules after the blocks (the final norm, an
    untied head), and all else is frozen. first: the first so many blocks are frozen,
    with all that lies below them. Give one of the three; by default last=2. ValueError
    where nothing would be left to learn, where a parameter is frozen already, and
    without targets where a block occurs twice.
    """
    if targets is None and last is None and first is None:
        last = 2
    given = [f"{name}={value!r}" for name, value in
             (("targets", targets), ("last", last), ("first", first)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: each says what is frozen, so give one of them")
    if targets is None:
        names = within(model, lowest(model, last, first)) | own(model)
    else:
        names = within(model, select(model, targets, lambda site: True, None, "module"))
    already = sorted(stopped_by(model, "freeze") & names)
    if already:
        raise ValueError(f"{already[0]!r} is frozen already: minillm.freeze.unwrap(model) lets all "
                         "parameters learn again")
    shared = {id(p) for name, *_, p in parameters(model) if name in names}
    if all(id(p) in shared for *_, p in parameters(model)):
        raise ValueError(f"{given[0]} freezes every parameter: nothing would be left to "
                         "learn")
    return say_of(model, Freeze, lambda name: name in names)


def lowest(model, last, first=None):
    """The Sites below the lowest block that learns, without the modules that hold blocks."""
    option, number = ("last", last) if first is None else ("first", first)
    sites, blocks = walk(model), roles.blocks(model)
    n, name = len(blocks), blocks[0].name.rpartition(".")[0]
    if len({id(block.module) for block in blocks}) < n:
        raise ValueError(f"a block of {name!r} occurs twice, so it is not clear which blocks are "
                         "the last: name the modules in targets=")
    if n == 1:
        raise ValueError(f"{option}={number!r}: {name!r} has one block, and none below it to "
                         "freeze")
    if not isinstance(number, int) or not 0 < number < n:
        raise ValueError(f"{option}={number!r}: {name!r} has {n} blocks, so {option} is from 1 to "
                         f"{n - 1}")
    learns = blocks[n - number if option == "last" else number].name  # the lowest one
    below = sites[: [site.name for site in sites].index(learns)]
    return [site for site in below if not learns.startswith(f"{site.name}.")]


def own(model):
    """The names of the parameters that a module with the blocks in it owns directly.

    A learned position or a class token of an ordinary model is one: it is below the
    blocks.
    """
    first = roles.blocks(model)[0].name
    holders = [site.module for site in walk(model) if first.startswith(f"{site.name}.")]
    inside = within(model, walk(model))
    return {name for name, owner, *_ in slots(model)
            if name not in inside or any(owner is holder for holder in holders)}


def within(model, sites):
    """The names of all parameters in these sites, also those that others share."""
    owners = {id(module) for site in sites for module in site.module.modules()}
    return {name for name, owner, *_ in slots(model) if id(owner) in owners}


unwrap, merge, unmerge, save, load = verbs("freeze", Freeze, VERBS)
method("freeze", wrap, does="trains the last blocks only",
       paper="Howard & Ruder 2018, arXiv 1801.06146",
       rates=dict(tiny=1.5e-3, smollm2=3e-4), small={"": dict(last=1), "two": dict(last=2)})
