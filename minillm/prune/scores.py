"""Scores: how much each weight matters. The weights with the smallest scores go.

A score is called with a Site and gives numbers (out, in). Wanda's needs inputs: see
`wanda`.

    magnitude    |W|                                        Han et al. 2015, arXiv 1506.02626
    Random       random numbers: the baseline for every other score

>>> from torch import nn; import minillm
>>> site = minillm.registry.walk(nn.Sequential(nn.Linear(4, 3)))[0]
>>> magnitude(site).equal(site.module.weight.abs()), Random(1)(site).equal(Random(1)(site))
(True, True)
"""

import dataclasses
import zlib

import torch


class Magnitude:
    def __call__(self, site, below=None):
        """|W| (out, in) with the changes of all patches, or those beneath `below`."""
        scores = site.dense(below)[0].detach().abs().contiguous()
        if scores.numel() and scores.amax().isnan():
            raise ValueError(f"the weight of {site.name!r} holds nan, which has no magnitude: "
                             "prune cannot rank it")
        return scores

    def __repr__(self):
        return "magnitude"


magnitude = Magnitude()


@dataclasses.dataclass(frozen=True)
class Random:
    """Random numbers from 0 to 1 that depend only on the seed and the site's name."""

    seed: int = 0

    def __call__(self, site):
        draw = torch.Generator("cpu")  # the same numbers whatever the device is
        draw.manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))
        return torch.rand(site.shape, generator=draw, device="cpu").to(site.new(0).device)
