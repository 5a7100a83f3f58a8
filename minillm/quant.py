"""int8 weights: each output channel is stored as integers from -127 to 127 and one scale.

    q = round(W / s),   s = max |W| / 127  by row,   W ~ s q       Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339,
                                                                   section 2: symmetric absmax quantization, here of
                                                                   the weight alone
    code     paper                      shape       dtype
    q        X_i8                       (out, in)   int8
    scale    s; theirs is 1 / s         (out, 1)    float32, also where the model is cast to another dtype

Since s belongs to a row, it moves out of the sum: W x ~ s * (q x). The dense W is not made,
and training keeps neither it nor q in floats for the backward pass, which turns q into
floats again (see `ops`). Rounding moves a weight by at most s / 2, which is 1/254 of the
largest weight of its row: the row's largest weight sets the error of all others, and that
is why one scale a row is used and not one a matrix.

q x is up to 127 times larger than W x, and the largest float16 is 65,504: so where x is
float16 the sum is taken in float32. bfloat16 has the range of float32, and q fits its 8
bits exactly: its sums stay in bfloat16, which costs no more error than a dense bfloat16
matrix has.

Cost: 1 byte a weight and one scale a row: a quarter of float32. The model computes in its
own float type; on a CPU a token is faster where reading the weights is what takes the time,
once the conversion is fused (see `benchmarks/`). LLM.int8() also quantizes x, row by row,
and leaves the columns of x with outliers in 16 bits; bitsandbytes does this on CUDA. Not
included: that, zero points, 4 bits and calibration.

>>> from torch import nn; import torch, minillm
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
>>> W = model[0].weight.clone()
>>> q = minillm.quant.wrap(model)[0]
>>> q.q.dtype, bool((abs(q.dense() - W) <= q.scale / 2 * 1.0001).all())
(torch.int8, True)
"""

import torch
import torch.nn.functional as F

from minillm import ops
from minillm.registry import Format
from minillm.registry.attach import attach
from minillm.registry.verbs import verbs


class Int8(Format):
    not_neutral = "rounding to 8 bits"
    float32 = ("scale",)

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    def allocate(self, device):
        rows = self.shape[::-1] if self.leaf.lookup else self.shape
        self.register_buffer("q", torch.zeros(rows, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(rows[0], 1, device=device))

    def pack(self, W):
        W = (W.T if self.leaf.lookup else W).float()  # a row is an output channel; of an embedding, a token
        scale = W.abs().amax(1, keepdim=True) / 127  # (out, 1)
        scale = scale.where(scale > 0, 1.0)  # a row of zeros stays one
        self.q, self.scale = (W / scale).round().clamp(-127, 127).to(torch.int8), scale

    def dense(self):
        W = (self.q * self.scale).to(self.dtype)
        return W.T if self.leaf.lookup else W

    def rounding(self):
        """Half a step, and nothing in a row of zeros."""
        half = (self.scale / 2).where(self.q.any(1, keepdim=True), 0.0)  # (out, 1)
        return half.T if self.leaf.lookup else half

    def check(self, where):
        if not (self.scale > 0).all():
            raise ValueError(f"{where}: a scale is not a number above 0")

    def forward(self, x):
        if self.leaf.lookup:  # (b, t, width) * (b, t, 1)
            return (F.embedding(x, self.q) * F.embedding(x, self.scale)).to(self.dtype)
        x = ops.in_autocast(x)
        sums = torch.float32 if x.dtype == torch.float16 else x.dtype
        with ops.without_autocast(x):
            qx = ops.remade_linear(x.to(sums), lambda: self.q.to(sums))
        y = qx * self.scale[:, 0]
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def wrap(model, targets=None):
    """Store the leaves that `targets` names (see `registry.select`) in int8; in place, returns the model.

    By default every linear leaf but the output head and tied matrices.
    """
    return attach(Int8, model, targets)


unwrap, merge, unmerge, save, load = verbs("quant", Int8)
