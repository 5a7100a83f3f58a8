"""The common part of the formats over a grid: codes in bytes, scales, and three reads.

    dense()      the whole matrix, for merges and for code that reads `.weight`
    lookup       only the rows that an embedding reads
    product      x Wᵀ; W is made for it, and again for its backward (see `ops`)

A subclass has a `grid` and a `group` (see `grid`), and `width`, the bits of a code.

    buffer       shape                                                dtype
    q            codes (n, m), packed to (n, m * width / 8)           uint8, or int8
    scale        (n, groups), or (1, 1) for the whole tensor          float32, also after a cast
    zero         as scale, where the grid has a zero point            uint8

n counts the rows of the matrix: the output channels, or the tokens of an embedding. A
group lies in one row.
"""

import torch
import torch.nn.functional as F

from minillm import ops
from minillm.quant.grid import codes_a_byte, pack, size_of, unpack


def check_rows(site, bits, group):
    """ValueError where the weights of a row fill no whole number of groups and of bytes."""
    m = site.shape[0 if site.leaf.lookup else 1]
    size, whole = size_of(group, m), codes_a_byte(bits)
    if m % whole or m % size:
        fits = [d for d in range(2, m + 1) if m % d == 0]
        near = [d for d in fits if d < size][-1:] + [d for d in fits if d > size][:1]
        hint = f": group={' or '.join(map(str, near))} would fit" if near else ""
        if m % whole:
            hint = f": no fewer than {whole} codes of {bits} bits fill whole bytes"
        raise ValueError(f"bits={bits}, group={group} at {site.name!r}: a row has {m} weights, "
                         f"which fill no whole number of groups and of bytes{hint}")


class Coded:
    """The part of a Format that follows from its grid; `registry.Format` is the rest."""

    float32 = ("scale",)

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    def allocate(self, device, dtype=torch.uint8):
        n, m = self.shape[::-1] if self.leaf.lookup else self.shape
        k, groups = m * self.width // 8, m // size_of(self.group, m)
        self.register_buffer("q", torch.zeros(n, k, dtype=dtype, device=device))
        shape = (1, 1) if self.group == "tensor" else (n, groups)
        self.register_buffer("scale", torch.ones(shape, device=device))

    def pack(self, W):
        W = (W.T if self.leaf.lookup else W).float()
        scale, zero = self.fit(W)
        if not torch.isfinite(scale).all():
            shape = ", ".join(map(str, W.shape))
            raise ValueError(f"a weight of a ({shape}) matrix is beyond float32, in which "
                             f"{self.kind} keeps its scales")
        self.keep_scales(scale)
        self.keep_codes(self.grid.round(W, self.scales(), zero), zero)

    def fit(self, W):
        """(scale, zero) of W (n, m), as the grid has them."""
        return self.grid.fit(W)

    def keep(self, q, scale, zero=None):
        """Store codes (n, m) and their scales and zeros (n, groups)."""
        self.keep_scales(scale)
        self.keep_codes(q, zero)

    def keep_scales(self, scale):
        """Store the scales (n, groups)."""
        self.scale = scale

    def scales(self):
        """The scales that are stored, in float32."""
        return self.scale

    def keep_codes(self, q, zero=None):
        """Store codes (n, m) and their zeros (n, groups)."""
        plain = self.q.dtype == torch.int8
        self.q = q.to(torch.int8) if plain else pack(q - self.grid.ends[0], self.width)
        if zero is not None:
            self.zero = zero.to(torch.uint8)

    def codes(self, pick=lambda t: t, dtype=torch.float32):
        """The codes (n, m) of the rows that `pick` takes; floats hold them exactly."""
        q = pick(self.q)
        if q.dtype == torch.int8:
            return q.to(dtype)
        return unpack(q, self.width).to(dtype) + self.grid.ends[0]

    def rows(self, pick=lambda t: t):
        """The weights (n, m) of the codes, in the rows that `pick` takes."""
        every = (lambda t: t) if self.group == "tensor" else pick  # all rows have the same
        zero = every(self.zero).float() if "zero" in self._buffers else None
        return self.grid.dense(self.codes(pick), every(self.scales()), zero)

    def dense(self):
        W = self.rows().to(self.dtype)
        return W.T if self.leaf.lookup else W

    def rounding(self):
        """How far each weight may be from its code, (out, in); 0 in a group of zeros."""
        W = self.grid.groups(self.rows())  # (n, groups, group)
        half = torch.where(W.any(-1, keepdim=True), self.half_steps(), 0.0).expand_as(W).flatten(1)
        return half.T if self.leaf.lookup else half  # (out, in)

    def half_steps(self):
        """How far a weight may be from its code, (n, groups, 1) or (n, groups, group)."""
        return self.scales()[..., None] / 2

    def check(self, where):
        if not (self.scales() > 0).all():
            raise ValueError(f"{where}: a scale is not a number above 0")

    def forward(self, x):
        if self.leaf.lookup:
            rows = self.rows(lambda t: F.embedding(x.flatten(), t))  # (b * t, width)
            return rows.to(self.dtype).unflatten(0, x.shape)
        x = ops.in_autocast(x)
        with ops.without_autocast(x):
            y = self.product(x)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def product(self, x):
        """x Wᵀ, without the bias: x (..., in) -> (..., out)."""
        return ops.remade_linear(x, lambda: self.rows().to(x.dtype))

    def called(self):
        return f"{self.kind} {self.config()}"
