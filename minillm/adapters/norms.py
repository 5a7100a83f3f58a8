"""The norms that Houlsby's adapters train: each gets its own change of the scale and bias.

    y = (gamma + delta_gamma) n(x) + beta + delta_beta           n(x): x, normalized
                                            Houlsby et al. 2019, arXiv 1902.00751

    code            paper                              shape    at birth
    delta.weight    new gamma - the model's gamma      (d,)     0
    delta.bias      new beta - the model's beta        (d,)     0; an RMSNorm has none

`minillm.adapters.wrap(model, norms=True)` puts one around each norm that has parameters, as
a part of the same adapter. The norm computes with the sums. So delta_gamma has the gradient
that gamma would have, and AdamW takes the same steps with it. Only weight decay would
differ: it pulls towards the model's own gamma. (`train` decays matrices alone.)

The model's norm does not change. So nothing has to be put back, several adapters add up on
one norm, and each row of a batch may have its own. The authors' code trains the norms
themselves. That saves 2 d additions a norm, but changes the model beneath the adapters. Here
`minillm.freeze.norms` does so, beside adapters or alone.

>>> import torch, minillm
>>> from torch import nn
>>> model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(2, 4)
>>> model = minillm.adapters.wrap(model, ["0"], size=2, norms=True)
>>> delta = model[1].patches["adapters"].delta
>>> with torch.no_grad():
...     _, _ = delta.weight.fill_(1.0), delta.bias.fill_(5.0)
>>> h = model[1].base(model[0](x))                                      # gamma is 1, beta 0
>>> torch.allclose(model(x), 2 * h + 5, atol=1e-5)
True
"""

from torch import nn
from torch.func import functional_call

from minillm.registry import roles, walk


class Delta(nn.Module):
    """The change of a norm's parameters: (below, x) -> the norm of x with the sums, (..., d)."""

    def __init__(self, site):
        super().__init__()
        for key, p in site.module.named_parameters(recurse=False):
            self.register_parameter(key, site.new(*p.shape))

    def forward(self, below, x):
        norm, own = below.layer.base, dict(self.named_parameters())
        sums = {key: p + own[key].to(p.dtype) for key, p in norm.named_parameters(recurse=False)}
        y = functional_call(norm, sums, (x,))
        return y + (below(x) - norm(x)) if below.depth else y  # and what lies beneath adds


def scaled(model, targets):
    """The names of the norms to train; ValueError if none has parameters, or one is a target.

    targets: the names of the sites that get a bottleneck.
    """
    found = {site.name for site in walk(model)
             if roles.is_norm(site) and any(True for _ in site.module.parameters(recurse=False))}
    if not found:
        raise ValueError(f"norms=True: this {type(model).__name__} has no norm with parameters")
    if both := sorted(found & targets):
        raise ValueError(f"norms=True trains {both[0]!r}, which targets= names too: put the "
                         "adapter after it with a wrap of its own, under another name")
    return found
