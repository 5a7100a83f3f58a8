"""BitFit: train only the biases, about a thousandth of a transformer's parameters.

    y = W x + b        b learns, W does not
                                Ben Zaken et al. 2022, "BitFit", arXiv 2106.10199, section 3

    code       paper      meaning
    biases     b^(.)      every parameter called `bias`, of the leaves and the layer norms

BitFit adds no module: it *claims* the biases, and only claimed parameters learn. With
LoRA, in either order, A, B and the biases learn. With `freeze`, the biases of the
frozen blocks do not learn.

Cost: GPT-2's biases are 0.08% of its parameters. The gradient still runs through the
whole model, because the lowest bias learns too, but no gradient of a weight is
computed. After training there is no cost.

Llama has no biases, so there BitFit is an error. The nearest method is to
name the norms in `targets`. The paper also trains the classifier on top; here the
caller unfreezes a separate head. Not included: the paper's smaller sets, which are the
biases of the queries and of the MLP's second layer: name them in `targets`.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config.gpt2(50, 8, 2, 2, positions=16))
>>> model = minillm.freeze.bitfit.wrap(model)
>>> {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
{'bias'}
"""

from minillm.registry import method, select
from minillm.registry.claiming import Claim, say_of
from minillm.registry.learning import slots
from minillm.registry.table import register


class BitFit(Claim):
    """Claims parameters: they learn, and parameters that nothing claims do not."""

    claim = True


def wrap(model, targets=None):
    """Train only the biases in the modules of `targets`; in place, returns the model.

    targets: any modules, with the modules inside them (see `registry.select`); by
    default the whole model. Of a named module without any bias, all parameters learn:
    for example the norms of a Llama. ValueError where the model has no bias, and where
    BitFit is attached already.
    """
    if already := sorted(BitFit.named(model)):
        raise ValueError(f"{already[0]!r} and {len(already) - 1} more are claimed by bitfit "
                         "already: minillm.freeze.unwrap(model, name='bitfit') first")
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
        raise ValueError(f"this {type(model).__name__} has no bias that bitfit could train: name "
                         "other modules in targets=, such as its norms: targets='.*norm'")
    return say_of(model, BitFit, lambda name: name in chosen)


register("bitfit", BitFit, family="freeze")
method("bitfit", wrap, does="trains the biases only",
       paper="Ben Zaken et al. 2022, arXiv 2106.10199", rates=dict(tiny=3e-3, smollm2=3e-3),
       small={"": dict(targets=lambda name, module: "norm" in name
                       or getattr(module, "bias", None) is not None)})
