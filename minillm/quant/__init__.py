"""Integers for weights: each weight is a code of a few bits, and a row or a group shares a scale.

    1. s = max |w| / 127        by row: the row's largest weight gets the largest code
    2. q = round(w / s)         from -127 to 127, one byte each
    3. W ~ s q                  so that W x ~ s (q x)

                                Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 2:
                                symmetric absmax quantization, here of the weight alone
    code     paper              shape                        dtype
    q        X_i8               (out, in), packed (out, k)   int8, packed uint8
    scale    s; theirs is 1/s   (out, groups)                float32, also after a cast of the model
    zero                        (out, groups)                uint8, with zero_point=True
    group    the neighbours in a row that share a scale: a number, None (the row), or "tensor"

`grid` has these steps for any number of bits, for groups and for zero points, and says
why the largest code is 127 and not 128. It also packs the codes, without waste: 8 codes
of 3 bits take 3 bytes.

Since s belongs to a row, it moves out of the sum: W x ~ s * (q x). The dense W is not
made. Training keeps q as integers, and the backward pass turns q into floats again (see
`ops`). Rounding moves a weight by at most s / 2, which is 1/254 of the largest weight
of its row. So the largest weight sets the error of all others, and each row has a scale
of its own. With 4 bits the codes go from -8 to 7, the share is from 1/16 to 1/14, and
most rows have a weight that is far larger than the others. So with few bits 32 or 64
neighbours share a scale, W x is a sum over groups, and s stays inside the sum.

q x is up to 127 times larger than W x, and the largest float16 is 65,504, so where x is
float16 the sum is taken in float32. bfloat16 has the range of float32, and q fits its 8
bits exactly. So with bfloat16 the sum stays in bfloat16, and its error is no larger
than with a dense bfloat16 matrix.

Cost: 1 byte a weight and one scale a row: a quarter of float32. b bits in groups of g
take b + 32 / g bits a weight, and 8 / g more with a zero point. The model computes in
its own float type. On a CPU a token is faster where reading the weights takes most of
the time, once the conversion is fused (see `benchmarks/`, and `ops.row_of_codes` for 8,
4 and 2 bits with scales by row). LLM.int8() also quantizes x, row by row, and keeps the
columns of x with outliers in 16 bits; bitsandbytes does this on CUDA. Not included:
that, and calibration.

>>> from torch import nn; import torch, minillm
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
>>> W = model[0].weight.clone()
>>> q = minillm.quant.wrap(model)[0]
>>> q.q.dtype, bool((abs(q.dense() - W) <= q.scale / 2 * 1.0001).all())
(torch.int8, True)
>>> q4 = minillm.quant.wrap(nn.Sequential(nn.Linear(64, 64)), bits=4, group=32)[0]
>>> q4.q.shape, q4.scale.shape                                          # two codes share a byte
(torch.Size([64, 32]), torch.Size([64, 2]))
>>> minillm.quant.wrap(nn.Sequential(nn.Linear(64, 64)), bits=3)[0].q.shape     # 8 share 3 bytes
torch.Size([64, 24])
"""

import torch

from minillm import ops
from minillm.quant.coded import Coded, check_rows
from minillm.quant.grid import Grid, check_group
from minillm.registry import Format
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class Integer(Coded, Format):
    not_neutral = "rounding to a few bits"

    def __init__(self, site, bits=8, group=None, zero_point=False):
        self.grid = Grid(bits, group, zero_point)
        self.bits = self.width = int(bits)
        self.group, self.zero_point = check_group(group), zero_point
        check_rows(site, bits, group)
        super().__init__(site)

    def allocate(self, device):
        plain = self.width == 8 and not self.zero_point
        super().allocate(device, torch.int8 if plain else torch.uint8)
        if self.zero_point:
            self.register_buffer("zero", torch.zeros_like(self.scale, dtype=torch.uint8))

    def product(self, x):
        if self.group not in (None, "tensor"):
            return super().product(x)
        if 8 % self.width == 0 and ops.words_fit(x, self.q):
            packed = self.q.dtype == torch.uint8
            zero = self.zero.int() if self.zero_point else -self.grid.ends[0] if packed else 0
            y = ops.row_of_codes(x, self.q, self.width, zero) * self.scale[:, 0]
            return y.view(*x.shape[:-1], -1)
        sums = torch.float32 if x.dtype == torch.float16 else x.dtype

        def make():
            return self.codes(dtype=sums) - (self.zero.to(sums) if self.zero_point else 0)

        return ops.remade_linear(x.to(sums), make) * self.scale[:, 0]  # s has moved out of the sum

    def check(self, where):
        super().check(where)
        low, high = self.grid.ends
        wrong = (self.codes() < low) | (self.codes() > high)
        if wrong.any() or self.zero_point and (self.zero > high).any():
            raise ValueError(f"{where}: a code is not from {low} to {high}")

    def called(self):
        plain = self.config() == dict(bits=8, group=None, zero_point=False)
        return self.kind if plain else super().called()


def wrap(model, targets=None, *, bits=8, group=None, zero_point=False):
    """Store the leaves that `targets` names (see `registry.select`) as integers; returns the model.

    By default every linear leaf but the output head and tied matrices. bits: of a code,
    2 to 8. group: how many neighbours in a row share a scale (None: the whole row;
    "tensor": the whole matrix). zero_point: the codes run from the least weight (or 0)
    to the largest, and not as far below 0 as above it. ValueError where the weights of
    a row fill no whole number of groups and of bytes.
    """
    return attach(Integer, model, targets, bits=bits, group=group, zero_point=zero_point)


unwrap, merge, unmerge, save, load = verbs("quant", Integer)
method("quant", wrap,
       does="stores weights as integers of 2 to 8 bits; a row or group shares a scale",
       paper="Dettmers et al. 2022, arXiv 2208.07339",
       small={"": {}, "int4": dict(bits=4, group=4), "zero": dict(bits=4, zero_point=True),
              "two": dict(bits=2, group=8), "int8 zero": dict(group=8, zero_point=True),
              "three": dict(bits=3, group=8, zero_point=True), "tensor": dict(group="tensor")})
