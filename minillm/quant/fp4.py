"""FP4: a float of 4 bits for each weight, one scale per 64 weights.

    1. s = max |w|               for each block of 64 neighbours in a row
    2. q = the code of the level that is nearest to w / s
    3. W ~ s l[q]                the levels are those of bitsandbytes' `quant_type="fp4"`
                                 Dettmers et al. 2023, "QLoRA", arXiv 2305.14314

    code      shape                               dtype
    q         (out, in), packed (out, in / 2)     uint8; 0 to 14
    scale     (out, in / group)                   float32, also after a cast
    levels    (15,)                               float32, also after a cast

A float of 1 sign, 2 exponent and 1 mantissa bit (E2M1) is 1 or 1.5 times a power of
two, and the lowest exponent has 0 and one more number. Divided by the largest:

    12 l = 0, 0.0625, 2, 3, 4, 6, 8, 12, and the same below 0

In the E2M1 of the Open Compute Project (MXFP4) the second number is 1 and not 0.0625.
Both zeros are one level here, so there are 15. bitsandbytes numbers the codes by sign,
exponent and mantissa. Here they rise with the level, as in `nf4`.

On normally distributed weights its error is larger than that of NF4 and of int4. It is
here for models that others stored so. Its kind is `codebook`, as NF4's. Cost, and
`double`, which quantizes the scales too: as for `nf4`.

>>> from torch import nn; import torch, minillm
>>> fp4 = minillm.quant.fp4.wrap(nn.Sequential(nn.Linear(64, 8, bias=False)))[0]
>>> [round(12 * level, 4) for level in fp4.levels.tolist()[7:]]
[0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
>>> w = fp4.dense()[0] / fp4.scale[0]                       # each is one of the levels
>>> bool(torch.isclose(w[:, None], fp4.levels).any(1).all())
True
"""

from minillm.quant.codebook import Codebook, fill
from minillm.registry.attach import attach
from minillm.registry.table import method

ABOVE = tuple(x / 12 for x in (0.0625, 2, 3, 4, 6, 8, 12))
LEVELS = (*(-x for x in reversed(ABOVE)), 0.0, *ABOVE)


def wrap(model, targets=None, *, group=64, double=False):
    """Store the leaves that `targets` names (see `registry.select`) as FP4; returns the model.

    By default every linear leaf but the output head and tied matrices. group: how many
    neighbours in a row share a scale (None: the whole row; "tensor": the matrix).
    double: whether the scales are quantized to 8 bits. ValueError where the weights of
    a row fill no whole number of groups and of bytes.
    """
    return attach(Codebook, model, targets, fill=lambda form, site: fill(form, site, LEVELS),
                  group=group, double=double)


method("fp4", wrap, kind="codebook", does="stores weights in 4 bits, as floats of 4 bits",
       paper="Dettmers et al. 2023, arXiv 2305.14314",
       small={"": dict(group=8), "double": dict(group=8, double=True)})
