"""The format of `nf4` and `fp4`: codes of 4 bits, and a table with the level of each code.

    buffer    shape                                             dtype
    q         (n, m / 2), two codes a byte                      uint8
    levels    (16,) or fewer: rising, 0 among them, largest 1   float32, also after a cast
    scale     (n, groups), see `coded`                          float32, also after a cast

With double=True the scales are quantized too:

    1. c = mean(s)                    one number for the matrix
    2. d = max |s - c| / 127          for each block of 256 scales, counted row after row
    3. k = the least integer for which c + d k is not below s
    4. s ~ c + d k

                                      Dettmers et al. 2023, arXiv 2305.14314, section 3

    scale     k      (n, groups)               int8
    step      d      (groups of all / 256,)    float32, also after a cast
    mean      c      (1,)                      float32, also after a cast

Scales are above 0. Without their mean both signs of k are used. The weights are rounded
with the scale that is stored, not with the exact one. The paper takes the nearest of
256 8-bit floats (bitsandbytes a table of its own, torchao integers). Rounded up, no
weight is beyond the last level, and no scale is 0.
"""

import zlib

import torch
import torch.nn.functional as F

from minillm import options
from minillm.quant.coded import Coded, check_rows
from minillm.quant.grid import Levels, by_group, check_group, check_levels
from minillm.registry import Format
from minillm.registry.table import register

BLOCK = 256  # scales that share a step


class Codebook(Coded, Format):
    not_neutral = "rounding to 16 levels"
    float32 = ("scale", "levels")
    variable = ("levels",)
    width = 4  # bits that a code takes

    def __init__(self, site, group=64, double=False):
        self.group, self.double = check_group(group), options.flag("double", double)
        check_rows(site, self.width, group)
        super().__init__(site)

    def allocate(self, device):
        super().allocate(device)
        self.register_buffer("levels", torch.zeros(16, device=device))
        if self.double:
            blocks = -(-self.scale.numel() // BLOCK)
            self.scale = torch.zeros_like(self.scale, dtype=torch.int8)
            self.register_buffer("step", torch.ones(blocks, device=device))
            self.register_buffer("mean", torch.ones(1, device=device))
            self.float32 = (*self.float32, "step", "mean")

    @property
    def grid(self):
        return Levels(self.levels, self.group)

    def fit(self, W):
        scale, zero = super().fit(W)
        some = by_group(torch.amax, W.abs(), self.group) > 0
        if self.double and some.any():  # a group of zeros has any scale: not to change c and d
            scale = scale.where(some, scale[some].mean())
        return scale, zero

    def keep_scales(self, scale):
        if not self.double:
            return super().keep_scales(scale)
        self.mean = scale.mean().view(1)
        off = F.pad((scale - self.mean).flatten(), (0, -scale.numel() % BLOCK)).view(-1, BLOCK)
        step = off.abs().amax(1) / 127
        self.step = step.where(step > 0, 1.0)
        k = (off / self.step[:, None]).ceil().clamp(-127, 127)
        self.scale = k.flatten()[: scale.numel()].view(scale.shape).to(torch.int8)
        # c + d k is rounded in float32, where a scale that is small beside c could become 0
        low = (self.scales() < scale * (1 - 1e-6)) & (self.scale < 127)
        self.scale = self.scale + low.to(torch.int8)

    def scales(self):
        if not self.double:
            return self.scale
        step = self.step.repeat_interleave(BLOCK)[: self.scale.numel()].view(self.scale.shape)
        return self.mean + step * self.scale

    def half_steps(self):
        """Half of the wider gap beside each code's level, (n, groups, group)."""
        gaps = self.levels.diff() / 2
        wider = torch.maximum(torch.cat([gaps, gaps[-1:]]), torch.cat([gaps[:1], gaps]))  # (16,)
        return self.grid.groups(wider[self.codes().long()]) * self.scales()[..., None]

    def rounding(self):
        if not self.double:
            return super().rounding()
        half = self.half_steps().flatten(1)  # small weights beside a large c round to zeros too
        return half.T if self.leaf.lookup else half

    def check(self, where):
        try:
            check_levels(self.levels.tolist())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        super().check(where)
        if (most := int(self.codes().max())) >= len(self.levels):
            raise ValueError(f"{where}: a code is {most}, and there are {len(self.levels)} levels")

    def called(self):
        levels = self.levels.float().cpu().numpy().tobytes()
        return f"{super().called()} {zlib.crc32(levels):08x}"


def fill(form, site, levels):
    """Give the Codebook its levels, and the codes of the site's weight."""
    form.levels = torch.tensor(levels, device=form.q.device)
    form.fill(site)


register("codebook", Codebook, family="quant")
