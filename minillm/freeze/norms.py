"""Norm tuning: train only the scales and biases of the norms, 0.03% of SmolLM2.

    y = gamma * (x - mean(x)) / sqrt(var(x) + eps) + beta        gamma and beta learn
                                Zhao et al. 2023, "Tuning LayerNorm in Attention",
                                arXiv 2312.11420

    code      paper    shape     at birth
    weight    gamma    (d,)      the model's own
    bias      beta     (d,)      the model's own; an RMSNorm has none, and no mean(x)

Norm tuning adds no module: it *claims* the norms, and only claimed parameters learn. With
LoRA, in either order, A, B and the norms learn. With `freeze`, the norms of the frozen
blocks do not learn.

Every norm of the model learns, the last one after the blocks too: peft's LN_TUNING takes
the same ones by default for Llama (`input_layernorm`, `post_attention_layernorm`, `norm`)
and GPT-2 (`ln_1`, `ln_2`, `ln_f`). For Qwen2 and Qwen3 it takes only the second norm of each
block; here that is targets=["post_attention_layernorm"].

Cost: SmolLM2's 61 norms hold 35,136 of 134,515,008 parameters. The gradient still runs
through the whole model, because the lowest norm learns too, but no gradient of a matrix is
computed. After training there is no cost.

peft copies each norm and trains the copy. So it can switch between several, and its unload
gives the old norms back. Here the model's own norms learn, as the biases of BitFit do, and
`unwrap` leaves them trained; `checkpoints.peft` reads and writes peft's file. The paper
trains the embedding and the head beside the norms: name them in `targets`. Not included: a
choice of norms by their gradient.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> [n for n, p in minillm.freeze.norms.wrap(model).named_parameters() if p.requires_grad]
['layers.0.input_layernorm.weight', 'layers.0.post_attention_layernorm.weight', 'norm.weight']
"""

from minillm.freeze import within
from minillm.registry import method, roles, select, walk
from minillm.registry.claiming import Claim, say_of
from minillm.registry.table import register


class Norms(Claim):
    """Claims the norms: they learn, and parameters that nothing claims do not."""

    claim = True

    @classmethod
    def accepts(cls, site):
        """Whether peft's file may hold it."""
        return roles.is_norm(site)


def wrap(model, targets=None):
    """Train only the norms in the modules of `targets`; in place, returns the model.

    targets: any modules, with the modules inside them (see `registry.select`); by default
    the whole model. Of a named module without any norm, all parameters learn: for example a
    head. ValueError where the model has no norm that has parameters, and where norm tuning
    is attached already.
    """
    if already := sorted(Norms.named(model)):
        raise ValueError(f"{already[0]!r} and {len(already) - 1} more are claimed by norms "
                         "already: minillm.freeze.unwrap(model, name='norms') first")
    every = [site for site in walk(model) if roles.is_norm(site)]
    if targets is None:
        chosen = within(model, every)
    else:
        chosen = set()
        for site in select(model, targets, lambda site: True, None, "module"):
            inside = {id(module) for module in site.module.modules()}
            norms = within(model, [norm for norm in every if id(norm.module) in inside])
            chosen |= norms or within(model, [site])
    if not chosen:
        raise ValueError(f"this {type(model).__name__} has no norm that could be trained: name "
                         "other modules in targets=")
    return say_of(model, Norms, lambda name: name in chosen)


register("norms", Norms, family="freeze")
method("norms", wrap, does="trains the norms only",
       paper="Zhao et al. 2023, arXiv 2312.11420", rates=dict(tiny=1e-3, smollm2=1e-3),
       small={"": dict(targets=lambda name, module: roles.NORM.search(type(module).__name__)
                       or name == "head")})
