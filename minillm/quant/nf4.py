"""NF4: sixteen levels at quantiles of a normal distribution, one scale per 64 weights.

    1. s = max |w|               for each block of 64 neighbours in a row
    2. q = the code of the level that is nearest to w / s         0 to 15, two a byte
    3. W ~ s l[q]
                                 Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3

    code      paper              shape                               dtype
    q         X^NF4              (out, in), packed (out, in / 2)     uint8
    scale     c_2                (out, in / group)                   float32, also after a cast
    levels    q_j                (16,)                               float32, also after a cast
    group     blocksize
    double    `bnb_4bit_use_double_quant`: the scales are quantized too, see `codebook`

The weights of a trained matrix are nearly normal, so most are near 0, and equal steps
waste codes on the few large ones. NF4 gives each sixteenth of a normal distribution a
level of its own:

    l = Q(p) / Q(0.9677)    Q: the quantiles of N(0, 1)
    8 levels above 0:       p from 0.9677 to 0.5 in 9 even steps, without the last
    7 levels below 0:       -Q(p), p from 0.9677 to 0.5 in 8 even steps, without the last
    and 0 itself, so that a zero stays one

0.9677 = 1 - (1/30 + 1/32) / 2. Beyond the last level lies half of an equal part: 1/30
where there are 15 parts, 1/32 where there are 16, and the mean of both here. LEVELS has
the sixteen numbers as bitsandbytes publishes them.

Cost: 4 bits a weight and 32 / 64 for the scale, 4.5 in all. With double=True a scale
takes 8 bits and a share of its block's step: 4 + 8 / 64 + 32 / (64 * 256) = 4.127. A
product makes the matrix in the model's float type, and the backward pass makes it
again. LoRA over NF4 is QLoRA:

    minillm.lora.wrap(minillm.quant.nf4.wrap(model))

bitsandbytes counts its blocks through the whole matrix and puts two neighbours in a
byte, the first in the high bits. Here a block ends with its row, and a byte holds the
codes i and i + in / 2. The codes are the same. Not included: QLoRA's paged optimizer.

>>> from torch import nn; import torch, minillm
>>> model = nn.Sequential(nn.Linear(128, 8, bias=False))
>>> W = model[0].weight.clone()
>>> nf4 = minillm.quant.nf4.wrap(model)[0]
>>> nf4.q.shape, nf4.scale.shape                            # 2 codes a byte, 2 blocks a row
(torch.Size([8, 64]), torch.Size([8, 2]))
>>> w = nf4.dense()[0, :64] / nf4.scale[0, 0]               # each is one of the levels
>>> bool(torch.isclose(w[:, None], nf4.levels).any(1).all())
True
>>> for double in (False, True):                            # bits a weight
...     model = nn.Sequential(nn.Linear(4096, 256, bias=False))
...     nf4 = minillm.quant.nf4.wrap(model, double=double)[0]
...     print(round(8 * sum(t.nbytes for t in nf4.buffers()) / (4096 * 256), 3))
4.5
4.127
"""

from minillm.quant.codebook import Codebook, fill
from minillm.registry.attach import attach
from minillm.registry.table import method

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


def wrap(model, targets=None, *, group=64, double=False):
    """Store the leaves that `targets` names (see `registry.select`) as NF4; returns the model.

    By default every linear leaf but the output head and tied matrices. group: how many
    neighbours in a row share a scale (None: the whole row; "tensor": the matrix).
    double: whether the scales are quantized to 8 bits. ValueError where the weights of
    a row fill no whole number of groups and of bytes.
    """
    return attach(Codebook, model, targets, fill=lambda form, site: fill(form, site, LEVELS),
                  group=group, double=double)


method("nf4", wrap, kind="codebook",
       does="stores weights in 4 bits, as codes of 16 quantiles of a normal distribution",
       paper="Dettmers et al. 2023, arXiv 2305.14314",
       small={"": dict(group=8), "row": dict(group=None), "double": dict(group=8, double=True)})
