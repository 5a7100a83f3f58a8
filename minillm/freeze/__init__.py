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
    wrap(model, embedding=True)                 all learn but the embedding (and a head tied to it)
    wrap(model, last=2, head=False)             the head learns too, also a tied one
    wrap(model, ".*mlp")                        all learn but the MLPs
    norms.wrap(model)                           only the norms learn: see `norms`

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=4, heads=2))
>>> names = [n for n, p in minillm.freeze.wrap(model, last=1).named_parameters() if p.requires_grad]
>>> sorted({".".join(n.split(".")[:2]) for n in names})           # the last block, the final norm
['layers.3', 'norm.weight']
"""

from minillm import options
from minillm.registry import method, parameters, roles, select, walk
from minillm.registry.claiming import VERBS, Claim, say_of
from minillm.registry.learning import slots, stopped_by
from minillm.registry.verbs import verbs


class Freeze(Claim):
    """Forbids parameters to learn."""


def wrap(model, targets=None, *, last=None, first=None, embedding=None, head=None):
    """Freeze the modules that `targets` names; in place, returns the model.

    targets: any modules, with the modules inside them; see `registry.select`. last: the
    last so many blocks learn, with the modules after the blocks (the final norm, an
    untied head), and all else is frozen. first: the first so many blocks are frozen,
    with all that lies below them. Give one of the three at most. embedding, head: True
    freezes this one too, False lets it learn all the same (see `registry.roles`; learned
    positions are not in the embedding). By default last=2. ValueError where nothing would
    be frozen or nothing left to learn, where a parameter is frozen already, and without
    targets where a block occurs twice.
    """
    most = dict(targets=targets, last=last, first=first)
    given = {key: value for key, value in most.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{said}: each says what is frozen, so give one of them")
    by_role = dict(embedding=embedding, head=head)
    by_role = {key: options.flag(key, value) for key, value in by_role.items() if value is not None}
    if not given and not by_role:
        given = dict(last=2)
    if targets is not None:
        names = within(model, select(model, targets, lambda site: True, None, "module"))
    else:
        names = within(model, lowest(model, **given)) | own(model) if given else set()
    said = ", ".join(f"{key}={value!r}" for key, value in (given | by_role).items())
    for role, frozen in by_role.items():
        part = of_role(model, role)
        if frozen != by_role.get("embedding", frozen) and part & of_role(model, "embedding"):
            raise ValueError(f"{said}: the two share a matrix, so both learn or neither does")
        names = names | part if frozen else names - part
    already = sorted(stopped_by(model, "freeze") & names)
    if already:
        raise ValueError(f"{already[0]!r} is frozen already: minillm.freeze.unwrap(model) lets all "
                         "parameters learn again")
    shared = {id(p) for name, *_, p in parameters(model) if name in names}
    if not names or all(id(p) in shared for *_, p in parameters(model)):
        which, left = ("every", "learn") if names else ("no", "freeze")
        raise ValueError(f"{said} freezes {which} parameter: nothing would be left to {left}")
    return say_of(model, Freeze, lambda name: name in names)


def of_role(model, role):
    """The names of the parameters of the embedding or the head, all names of a tied one."""
    site = getattr(roles.parts(model), role)
    if site is None:
        raise ValueError(f"this {type(model).__name__} has no part that is known as its {role}: "
                         "name it in targets=")
    inside = within(model, [site])
    tied = {id(p) for name, *_, p in parameters(model) if name in inside}
    return inside | {name for name, *_, p in parameters(model) if id(p) in tied}


def lowest(model, last=None, first=None):
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
