"""The grid: the real number of each code of a few bits.

    symmetric      w ~ s q              q from -2^(b-1) to 2^(b-1) - 1; with 8 bits from -127
    zero point     w ~ s (q - z)        q and z from 0 to 2^b - 1

    code       meaning                                  shape
    bits       b
    group      number of neighbours that share s        (None: the whole row)
    scale      s, the distance of two levels            (n, groups)
    zero       z, the code of the number 0              (n, groups); None where symmetric

With group="tensor" the whole matrix shares s and z, whose shape is then (1, 1).

`fit` chooses scale and zero for a matrix, `round` gives the codes, and `dense` the
matrix of the codes. A Format stores the codes. Quantization-aware training rounds with
the same three functions. A solver such as GPTQ changes only the order of rounding.

`Levels` has the same three functions for levels at any distance, such as those of NF4:

    levels         w ~ s l[q]           q from 0 to the number of levels - 1

and so has `Floats`, whose levels are the floats of 8 bits:

    floats         w ~ s float8(q)      q from 0 to 255

- 0 is always on the grid, because a pruned weight has to stay 0.
- s is the least scale for which no weight is beyond the ends: max |w| / 127 with 8
  bits. The code -128 would gain 0.4% of range on one side, and then -q would not be a
  code for every q. With 4 bits the sixteenth code is 6% of all, so there -8 is used.
- The zero point is an integer. A real z fits a little better, but then no code means 0.

torchao calls these grids SYMMETRIC_NO_CLIPPING_ERR and ASYMMETRIC. The zero point is
from Jacob et al. 2018, arXiv 1712.05877, section 2.1.
"""

import dataclasses

import torch

from minillm import options


def check_group(group):
    """`group`: a whole number of at least 2, None (a row) or "tensor"; ValueError for others."""
    return group if group in (None, "tensor") else options.whole("group", group, 2)


def size_of(group, m):
    """How many neighbours in a row of m weights share a scale."""
    return m if group in (None, "tensor") else group


def in_groups(W, group):
    """(n, m) -> (n, groups, m / groups)"""
    return W.unflatten(1, (-1, size_of(group, W.shape[1])))


def by_group(reduce, W, group):
    """torch.amin or torch.amax of each group of W (n, m): (n, groups), of a tensor (1, 1)."""
    found = reduce(in_groups(W, group), -1)
    return reduce(found, 0, keepdim=True) if group == "tensor" else found


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of equal steps. ValueError for bits outside 2 to 8 and a group below 2."""

    bits: int = 8
    group: int | str | None = None
    zero_point: bool = False

    def __post_init__(self):
        options.whole("bits", self.bits, 2, 8)
        options.flag("zero_point", self.zero_point)
        check_group(self.group)

    @property
    def ends(self):
        """The least and the largest code."""
        if self.zero_point:
            return 0, 2**self.bits - 1
        most = 2 ** (self.bits - 1) - 1
        return (-most if self.bits == 8 else -most - 1), most

    def groups(self, W):
        """(n, m) -> (n, groups, m / groups)"""
        return in_groups(W, self.group)

    def fit(self, W):
        """(scale, zero) for W (n, m): the finest grid that reaches every weight."""
        low, high = self.ends
        least = by_group(torch.amin, W, self.group).clamp(max=0)  # (n, groups)
        most = by_group(torch.amax, W, self.group).clamp(min=0)
        if self.zero_point:
            scale = (most - least) / high
        else:
            scale = torch.maximum(most / high, least / low)
        scale = scale.where(scale > 0, 1.0)  # a group of zeros stays one
        return scale, (-least / scale).round() if self.zero_point else None

    def round(self, W, scale, zero=None):
        """The codes (n, m) of W (n, m): whole numbers, in the dtype of W."""
        q = (self.groups(W) / scale[..., None]).round()
        return (q if zero is None else q + zero[..., None]).clamp(*self.ends).flatten(1)

    def dense(self, q, scale, zero=None):
        """The matrix (n, m) of the codes q (n, m), in the dtype of q and scale."""
        q = self.groups(q)
        return ((q if zero is None else q - zero[..., None]) * scale[..., None]).flatten(1)


@dataclasses.dataclass(frozen=True)
class Levels:
    """A grid of given levels: rising numbers with 0 among them and largest magnitude 1.

    levels: numbers, or a tensor (k,), which is not checked. ValueError for other levels.
    """

    levels: tuple | torch.Tensor
    group: int | str | None = None

    def __post_init__(self):
        check_group(self.group)
        if not isinstance(self.levels, torch.Tensor):
            check_levels(self.levels)

    @property
    def ends(self):
        """The least and the largest code."""
        return 0, len(self.levels) - 1

    def groups(self, W):
        """(n, m) -> (n, groups, m / groups)"""
        return in_groups(W, self.group)

    def on(self, W):
        """The levels as a tensor (k,), in the dtype and on the device of W."""
        return torch.as_tensor(self.levels, dtype=W.dtype, device=W.device)

    def fit(self, W):
        """(scale, None) for a matrix W (n, m): the largest magnitude of each group, (n, groups)."""
        scale = by_group(torch.amax, W.abs(), self.group)
        return scale.where(scale > 0, 1.0), None  # a group of zeros stays one

    def round(self, W, scale, zero=None):
        """The codes (n, m) of the levels nearest to W (n, m), in its dtype; lower in a tie."""
        levels = self.on(W)
        between = (levels[1:] + levels[:-1]) / 2  # the code is the number of these below w / s
        w = (self.groups(W) / scale[..., None]).contiguous()
        return torch.bucketize(w, between).flatten(1).to(W.dtype)

    def dense(self, q, scale, zero=None):
        """The matrix (n, m) of the codes q (n, m), in the dtype of scale."""
        return (self.groups(self.on(scale)[q.long()]) * scale[..., None]).flatten(1)


@dataclasses.dataclass(frozen=True)
class Floats:
    """A grid of 8-bit floats, whose bytes are the codes. exponent: 4 (E4M3) or 5 (E5M2) bits."""

    exponent: int = 4
    group: int | str | None = None

    ends = (0, 255)

    def __post_init__(self):
        options.whole("exponent", self.exponent, 4, 5)
        check_group(self.group)

    @property
    def dtype(self):
        return torch.float8_e4m3fn if self.exponent == 4 else torch.float8_e5m2

    def fit(self, W):
        """(scale, None): the largest magnitude of each group, (n, groups), is the largest float."""
        scale = by_group(torch.amax, W.abs(), self.group) / torch.finfo(self.dtype).max
        return scale.where(scale > 0, 1.0), None  # a group of zeros stays one

    def groups(self, W):
        """(n, m) -> (n, groups, m / groups)"""
        return in_groups(W, self.group)

    def round(self, W, scale, zero=None):
        """The codes (n, m) of W (n, m), in its dtype."""
        most = torch.finfo(self.dtype).max  # beyond it a cast gives nan or infinity
        q = (self.groups(W) / scale[..., None]).flatten(1).clamp(-most, most)
        return q.to(self.dtype).view(torch.uint8).to(W.dtype)

    def dense(self, q, scale, zero=None):
        """The matrix (n, m) of the codes q (n, m), in the dtype of scale."""
        return self.scaled(q.to(torch.uint8).view(self.dtype).to(scale.dtype), scale)

    def scaled(self, numbers, scale):
        """The matrix (n, m) of the floats (n, m)."""
        return (self.groups(numbers) * scale[..., None]).flatten(1)

    def half_steps(self, numbers, scale):
        """Half of the wider gap beside each float (n, m), times its scale: (n, groups, group)."""
        info, power = torch.finfo(self.dtype), torch.frexp(numbers).exponent - 1.0  # 1.5: 0; 4: 2
        least = torch.where(numbers == 0, 0.0, torch.exp2(power))  # the least float with this power
        gap = least.clamp(min=info.smallest_normal) * info.eps
        return self.groups(gap) * scale[..., None] / 2


def check_levels(levels):
    """ValueError unless the levels rise, contain 0, and have largest magnitude 1."""
    levels = list(levels)
    rise = all(a < b for a, b in zip(levels, levels[1:]))
    if not rise or 0 not in levels or max(map(abs, levels)) != 1 or len(levels) > 256:
        raise ValueError(f"levels={levels} are not at most 256 rising numbers, with 0 among them, "
                         "of which the largest magnitude is 1")


def planes(bits):
    """The widths 8, 4, 2 and 1 that add up to `bits`, the widest first: 3 is 2 and 1."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def codes_a_byte(bits):
    """The least number of codes that fill whole bytes: 2 of 4 bits, 8 of 3 bits (3 bytes)."""
    return 8 // planes(bits)[-1]


def pack(codes, bits):
    """Codes from 0 to 2^bits - 1, (n, m), in bytes: (n, m * bits / 8) of uint8; bits: 1 to 8.

    With 1, 2, 4 or 8 bits, byte i holds the codes i, i + k, i + 2 k, ... (k bytes a
    row), the first in its lowest bits. So one shift of all bytes gives a contiguous part
    of the row. Other widths are such planes one after the other. With 3 bits the first
    m / 4 bytes of a row are the low 2 bits of its codes, and m / 8 are the high bits.
    """
    codes, low, found = codes.to(torch.uint8), 0, []
    for width in planes(bits):
        parts = (codes >> low & 2**width - 1).chunk(8 // width, 1)  # each (n, k)
        plane = torch.zeros_like(parts[0])
        for i, part in enumerate(parts):
            plane |= part << (width * i)
        found.append(plane)
        low += width
    return torch.cat(found, 1)


def unpack(packed, bits):
    """The inverse of `pack`: (n, k) of uint8 -> (n, k * 8 / bits)."""
    if bits == 8:
        return packed
    codes, low = None, 0
    sizes = [packed.shape[1] * width // bits for width in planes(bits)]
    for width, plane in zip(planes(bits), packed.split(sizes, 1)):
        parts = torch.cat([plane >> i & 2**width - 1 for i in range(0, 8, width)], 1)
        codes = parts if codes is None else codes | parts << low
        low += width
    return codes
