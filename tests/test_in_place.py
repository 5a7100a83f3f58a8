"""Calibration of models that write into their tensors, and of leaves that only seem to share one.

A tensor's memory does not say what it holds: an addition in place leaves it where it was.
"""

import pytest
import torch
from test_calibrate import ROWS, by_hand
from torch import nn

from minillm import calibrate


class Stack(nn.Module):
    """Blocks of one class between an embedding and a head."""

    def __init__(self, block, between=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.between = nn.Embedding(24, 16), nn.Linear(16, 24), between
        self.layers = nn.ModuleList(block() for _ in "12")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = self.between(layer(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)


class Adds(Block):
    def forward(self, x):
        x += self.b(torch.tanh(self.a(x)))
        return x


def grams(model, size=2):
    """{name: Gram} of all leaves but the head."""
    seen = {}
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), batch_size=size,
                     progress=False)
    return seen


@pytest.mark.parametrize("size", [1, 4])
def test_a_block_may_add_in_place(size):
    model = Stack(Adds)
    for where, s in grams(model, size).items():
        X = by_hand(model, where)
        assert s.count == len(X) == 22
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_a_change_in_place_between_the_blocks_is_refused():
    with pytest.raises(ValueError, match="the input of 'layers.1' is not the output of the block"):
        grams(Stack(Adds, between=lambda x: x.mul_(2)))
