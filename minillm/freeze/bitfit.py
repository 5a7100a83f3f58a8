"""BitFit: train the biases alone. A transformer of a bias in each layer learns a task with a thousandth of its weights.

    y = W x + b        b learns, W does not        Ben Zaken et al. 2022, "BitFit", arXiv 2106.10199, section 3

    code       paper      meaning
    biases     b^(.)      every parameter that is called `bias`: of the leaves and of the layer norms

BitFit adds no module: it *claims* the biases, and nothing learns that is not claimed. Under LoRA or
over it both learn, A and B and the biases. `freeze` below it keeps the biases of the frozen blocks as
they were.

Cost: GPT-2's biases are 0.08% of its parameters. The gradient still runs through the whole model,
because the lowest bias learns too, but no gradient of a weight is computed. After training there is
no cost at all.

Llama and its like have no bias, so there is nothing that BitFit could train in them, and it says so:
give `targets` (such as their norms) for the nearest thing. The paper also trains the classifier on
top; a head of its own is the caller's to unfreeze. Not included: the paper's smaller sets, the biases
of the queries and of the MLP's second layer alone: say them as `targets`.

>>> import minillm
>>> model = minillm.freeze.bitfit.wrap(minillm.Transformer(minillm.Config.gpt2(50, 8, 2, 2, positions=16)))
>>> {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
{'bias'}
"""

from minillm.registry import method, select
from minillm.registry.claiming import Claim, say_of
from minillm.registry.learning import slots
from minillm.registry.table import register


class BitFit(Claim):
    """Claims parameters: they learn, and what nothing claims does not."""

    claim = True


def wrap(model, targets=None):
    """Train the biases of the modules that `targets` names, and nothing else; in place, returns the model.

    targets: any modules (see `registry.select`), with all in them, by default the whole model. Of a
    module without any bias all parameters learn, if it is named: the norms of a Llama, for example.
    ValueError where the model has no bias, and where BitFit has its say already.
    """
    if already := sorted(BitFit.named(model)):
        raise ValueError(f"{already[0]!r} and {len(already) - 1} more are claimed by bitfit already: minillm.freeze.unwrap(model, "
                         "name='bitfit') first")
    names = [name for name, *_ in slots(model)]
    biases = {name for name in names if name.rsplit(".", 1)[-1] == "bias"}
    if targets is None:
        chosen = biases
    else:
        chosen = set()
        for site in select(model, targets, lambda site: True, None, "module"):
            inside = {name for name in names if name.startswith(f"{site.name}.")}
            chosen |= inside & biases or inside
    if not chosen:
        raise ValueError(f"this {type(model).__name__} has no bias that bitfit could train: name what is to learn in targets=, "
                         "such as its norms")
    return say_of(model, BitFit, lambda name: name in chosen)


register("bitfit", BitFit, family="freeze")
method("bitfit", wrap, does="trains the biases alone", paper="Ben Zaken et al. 2022, arXiv 2106.10199",
       rates=dict(tiny=3e-3, smollm2=3e-3),
       small={"": dict(targets=lambda name, module: "norm" in name
                       or getattr(module, "bias", None) is not None)})
