"""FP8: each weight is a float of 8 bits, and a row shares a scale.

    1. s = max |w| / F           by row; F: the largest number of the format
    2. q = float8(w / s)         rounded to the nearest, to an even mantissa in a tie
    3. W ~ s q                   so that W x ~ s (q x)

                                 Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
                                 arXiv 2209.05433
    exponent    format    bits: sign, exponent, mantissa    F         least above 0
    4           E4M3      1, 4, 3                           448       2^-9
    5           E5M2      1, 5, 2                           57344     2^-16

    code        shape                                       dtype
    q           (out, in), the bytes of the floats          uint8
    scale       (out, 1), of a tensor (1, 1)                float32, also after a cast

Int8 has equal steps, so the largest weight of a row sets the error of all. In FP8 an
error is a share of its own weight, at most 1/16 with 3 bits of mantissa. So FP8 is
better where few weights of a row are far larger than the others, and int8 where they
are alike, such as normally distributed ones. E5M2 has a wider range and twice that
error; the paper has it for gradients.

q is kept as bytes, because a float8 buffer would follow `.to(bfloat16)`. A view of the
bytes as float8 costs nothing. Since s belongs to a row, it moves out of the sum.

Cost: 8 bits a weight and a scale a row. The floats are turned into those of x for each
product, forward and backward. GPUs from Hopper on multiply FP8 itself, which needs x in
FP8 too; vLLM and torchao do that there. On a CPU torch's `_scaled_mm` was slower than
float32. Not included: that, activations in FP8, and other scales than max |w|.

>>> from torch import nn; import torch, minillm
>>> model = nn.Sequential(nn.Linear(64, 8, bias=False))
>>> W = model[0].weight.detach().clone()
>>> fp8 = minillm.quant.fp8.wrap(model)[0]
>>> same = (W / fp8.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
>>> fp8.q.dtype, fp8.q.view(torch.float8_e4m3fn).float().equal(same.float())
(torch.uint8, True)
>>> bool((abs(fp8.dense() - W) <= W.abs() / 16 + fp8.scale * 2**-10).all())
True
"""

import torch

from minillm import ops
from minillm.quant.coded import Coded, check_rows
from minillm.quant.grid import Floats, check_group
from minillm.registry import Format
from minillm.registry.attach import attach
from minillm.registry.table import method, register


class FP8(Coded, Format):
    not_neutral = "rounding to floats of 8 bits"
    width = 8  # bits that a code takes

    def __init__(self, site, exponent=4, group=None):
        self.grid, self.group = Floats(exponent, group), check_group(group)
        self.exponent = int(exponent)
        check_rows(site, self.width, group)
        super().__init__(site)

    def numbers(self, pick=lambda t: t):
        """The floats q (n, m) of the rows that `pick` takes, in float8."""
        return pick(self.q).view(self.grid.dtype)

    def rows(self, pick=lambda t: t):
        scale = self.scale if self.group == "tensor" else pick(self.scale)
        return self.grid.scaled(self.numbers(pick).float(), scale)

    def product(self, x):
        if self.group not in (None, "tensor"):
            return super().product(x)
        sums = torch.float32 if x.dtype == torch.float16 else x.dtype  # q x is up to F times larger
        return ops.remade_linear(x.to(sums), lambda: self.numbers().to(sums)) * self.scale[:, 0]

    def half_steps(self):
        return self.grid.half_steps(self.numbers().float(), self.scale)

    def check(self, where):
        super().check(where)
        if not self.numbers().float().isfinite().all():
            raise ValueError(f"{where}: a code is nan or infinity")


def wrap(model, targets=None, *, exponent=4, group=None):
    """Store the leaves that `targets` names (see `registry.select`) as FP8; returns the model.

    By default every linear leaf but the output head and tied matrices. exponent: its
    bits, 4 (E4M3) or 5 (E5M2). group: how many neighbours in a row share a scale (None:
    the whole row; "tensor": the whole matrix). ValueError for another exponent, and
    where the weights of a row fill no whole number of groups.
    """
    return attach(FP8, model, targets, exponent=exponent, group=group)


register("fp8", FP8, family="quant")
method("fp8", wrap, does="stores weights as floats of 8 bits, with a scale for each row",
       paper="Micikevicius et al. 2022, arXiv 2209.05433",
       small={"": {}, "e5m2": dict(exponent=5, group=8), "tensor": dict(group="tensor")})
