"""The learning rate of each group of parameters, as factors of the training's rate.

    rate of parameter p at step s  =  lr * factor(p) * share(s)         share: see `schedules`

`train(..., rates={regular expression: factor})` gives the factors by the parameters' names. The
functions here make such dictionaries for three known recipes:

1. `layerwise`: a factor for each depth. Low blocks hold general knowledge and need to change
   little, high blocks hold what the task needs.

       factor(block l) = decay^(L - l)      l = 0, ..., L - 1; L: the number of blocks

   What comes before the blocks (the embedding) has decay^(L + 1), what comes after them 1.
   Howard & Ruder 2018, "ULMFiT", arXiv 1801.06146, section 3.3, "discriminative fine-tuning":
   eta^(l - 1) = eta^l / 2.6, which is decay=0.385, for a model of 3 layers. Deep transformers
   take 0.65 to 0.95 (Clark et al. 2020, "ELECTRA", arXiv 2003.10555: 0.8 and 0.9).

2. `by_role`: a factor for the head, the embedding, the norms, the attention or the MLPs. A new
   head starts at random and can learn at ten times the rate of what was pretrained.

3. LoRA+, Hayou et al. 2024, arXiv 2402.12354, needs no function: rates={r"B$": 16}. lr is then the
   rate of A. The change of a weight is s B A, and B starts at zero. In a wide model A adds up
   over `in` = n inputs, and B only over the rank r. A step of AdamW moves each number by about
   its rate. So for a change of the output that neither vanishes nor explodes as n grows, the
   paper finds that A needs a rate of the order of 1 / n, and B one that does not
   depend on n. One rate for both is too small for B, or too large for A. Any factor far above 1
   follows from this; the paper recommends about 2^4. Where B learns faster, lr itself is often
   lower than LoRA's. peft has `create_loraplus_optimizer` for it.

Of several expressions that match a parameter, the last counts. So

    layerwise(model, 0.9) | by_role(model, head=5)         the head has 5, all else its depth's
    times(model, layerwise(model, 0.9), {r"B$": 16})       B has 16 times its depth's

Each takes the model with its techniques attached: the parameters of a LoRA in a block have the
block's factor. The names are in the checkpoint's settings, so a resumed training has the same.

Cost: one group of AdamW for each factor, and no memory. transformers' Trainer has none of them;
timm and BEiT have `layerwise`, with a table of families. Not included: factors that change over the
steps.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(50, width=8, layers=2, heads=2, tied=False))
>>> layerwise(model, 0.5)
{'^embed_tokens\\\\.weight$': 0.125, '^layers\\\\.0\\\\.': 0.25, '^layers\\\\.1\\\\.': 0.5}
>>> by_role(model, head=10)
{'^lm_head\\\\.': 10.0}
>>> model = minillm.lora.wrap(model, r=2)
>>> sorted({group["peak"] for group in groups(model, lr=0.01, rates={r"B$": 16})})     # LoRA+
[0.01, 0.16]
"""

import math
import re

from minillm import options
from minillm.registry import roles


def layerwise(model, decay=0.9):
    """Factors that shrink with the depth, for `rates=`: decay^(L - l) for block l of L.

    Blocks in which nothing learns have no entry. What is before the blocks is so by the order of
    `named_parameters()`, as in `freeze`, so OPT's final norm counts as before them. A head that
    shares its matrix with the embedding learns as the embedding.
    ValueError for a decay outside of 0 < decay <= 1, and if it is not clear which modules are the
    blocks (see `roles`).
    """
    decay = options.real("decay", decay, lambda x: 0 < x <= 1, "a number above 0, and at most 1")
    model = getattr(model, "_orig_mod", model)  # torch.compile would change the names
    prefixes = [prefix(model, site) for site in roles.blocks(model)]
    L, every = len(prefixes), [name for name, _ in model.named_parameters()]
    inside = [i for i, name in enumerate(every) if name.startswith(tuple(prefixes))]
    learning = names(model)
    found = {f"^{re.escape(name)}$": decay ** (L + 1)
             for name in every[: min(inside, default=0)] if name in learning}
    found |= {f"^{re.escape(block)}": decay ** (L - depth) for depth, block in enumerate(prefixes)
              if any(name.startswith(block) for name in learning)}
    return found


def by_role(model, *, attention=None, mlp=None, norms=None, embedding=None, head=None):
    """Factors by the role of a module, for `rates=`; None: no entry for this role.

    The roles are those of `registry.roles`. Where two overlap, the later argument counts.
    ValueError for a factor below 0, a role that the model does not have, one in which nothing
    learns, and a head that shares its matrix with the embedding.
    """
    model = getattr(model, "_orig_mod", model)
    parts, learning, found = roles.parts(model), names(model), {}
    sites = dict(attention=[block.attention for block in parts.blocks],
                 mlp=[block.mlp for block in parts.blocks], norms=parts.norms,
                 embedding=[parts.embedding], head=[parts.head])
    given = dict(attention=attention, mlp=mlp, norms=norms, embedding=embedding, head=head)
    for role, factor in given.items():
        if factor is None:
            continue
        factor = options.real(role, factor, lambda x: 0 <= x < math.inf, "a factor from 0")
        here = [prefix(model, site) for site in sites[role] if site is not None]
        if not here:
            raise ValueError(f"{role}={factor:g}: this {type(model).__name__} has no part that is "
                             f"known as its {role}: name its parameters in rates=")
        here = [start for start in here if any(name.startswith(start) for name in learning)]
        if not here:
            raise ValueError(f"{role}={factor:g}: {why_not(role, sites[role])}")
        found |= {f"^{re.escape(start)}": factor for start in here}
    return found


def why_not(role, sites):
    """Why no name of a parameter that learns lies within the sites of a role."""
    modules = [site.layer or site.module for site in sites if site is not None]
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return (f"the {role} shares its matrix with the embedding, and one matrix has one rate: "
                "give embedding= instead")
    return f"nothing in the {role} learns"


def times(model, *several):
    """The product of several `rates=`, as one, with an entry for each parameter.

    ValueError for an expression that matches no parameter that learns.
    """
    each = [factors(model, rates) for rates in several]
    product = {name: math.prod(one[name] for one in each) for name in names(model)}
    return {f"^{re.escape(name)}$": factor for name, factor in product.items() if factor != 1}


def prefix(model, site):
    """The start of the names of a site's parameters, such as "layers.0."."""
    module = site.layer or site.module
    return next(f"{name}." for name, one in model.named_modules() if one is module)


# --- what `train` asks --------------------------------------------------------------------------


def groups(model, lr, weight_decay=0.0, rates=None):
    """AdamW's parameter groups: what learns, by its learning rate and its weight decay.

    Matrices decay. Vectors, which are biases and norms, do not.
    rates: {regular expression: factor}. A parameter learns at factor * lr if the expression
    matches its name from the start or after a dot; of several that match, the last counts.
    ValueError for an expression that matches no learning parameter, and if nothing learns.
    """
    every, sets = factors(model, rates), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = every[name] * lr, weight_decay if p.dim() > 1 else 0.0
            sets.setdefault(key, []).append(p)
    return [dict(params=params, lr=peak, peak=peak, weight_decay=decay)
            for (peak, decay), params in sets.items()]


def factors(model, rates=None):
    """{name: factor} of the parameters that learn."""
    found = dict.fromkeys(names(model), 1.0)
    if not found:
        raise ValueError("nothing in this model learns: every parameter is frozen "
                         "(requires_grad is False)")
    for pattern, factor in (rates or {}).items():
        matching = [name for name in found if matches(pattern, name)]
        if not matching:
            raise ValueError(f"rates: {pattern!r} matches no parameter that learns; "
                             f"the first are: {', '.join(list(found)[:8])}")
        found.update(dict.fromkeys(matching, factor))
    return found


def names(model):
    """The names of the parameters that learn."""
    model = getattr(model, "_orig_mod", model)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def matches(pattern, name):
    try:
        return re.search(rf"(?:^|\.)(?:{pattern})", name)
    except re.error as error:
        raise ValueError(f"rates: {pattern!r} is not a regular expression: {error}") from error
