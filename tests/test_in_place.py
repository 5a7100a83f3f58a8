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
    """{name: Gram} of all leaves, with the head."""
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


class Twice(Block):
    """The second leaf reads the memory of the first, which holds other values by then."""

    def forward(self, x):
        x = x.clone()
        x += torch.tanh(self.a(x))
        x += self.b(x)
        return x


class Again(Block):
    """Both leaves read x, and one of them is called once more."""

    def forward(self, x):
        return x + self.a(torch.tanh(self.a(x) + self.b(x)))


class First(Block):
    """The leaf that is called once more is the second one."""

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x) + self.b(x)))


class Experts(nn.Module):
    """Each token goes to one of three experts, by its own position in the vocabulary."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in "123")

    def forward(self, x):
        which, y = x[..., 0].round().long(), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[which == i] = expert(x[which == i])
        return x + torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:]], -1)


@pytest.mark.parametrize("block", [Twice, Again, First])
def test_leaves_with_other_inputs_share_no_statistic(block):
    model = Stack(block)
    seen = grams(model)
    assert len({id(s) for s in seen.values()}) == len(seen) == 5
    for where, s in seen.items():
        X = by_hand(model, where)
        assert s.count == len(X)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_experts_without_tokens_in_the_first_batch_share_no_statistic():
    model, rows, seen = Stack(Experts), [[0, 3], [1, 4], [2, 5], [2, 2]], {}
    with torch.no_grad():
        model.embed.weight[:, 0] = torch.arange(24) % 3
    calibrate.stream(model, rows, lambda site, s: seen.update({site.name: s}), r"layers.*",
                     batch_size=1, progress=False)
    for where, s in seen.items():
        X = by_hand(model, where, rows)
        assert s.count == len(X) == [2, 2, 4][int(where[-1])]
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_leaves_that_read_one_tensor_share_a_statistic():
    class Both(Block):
        def forward(self, x):
            return x + self.a(x) * self.b(x)

    seen = grams(Stack(Both))
    assert seen["layers.0.a"] is seen["layers.0.b"] is not seen["layers.1.a"]


def test_a_leaf_may_be_called_more_often_in_a_later_batch():
    """The number of calls depends on the tokens: the first batch does not reach `b`."""
    class Loops(Block):
        def forward(self, x):
            for _ in range(int(x[0, 0, 0])):
                x = torch.cat([x[..., :1], self.b(x)[..., 1:]], -1)
            return x

    model, rows, seen = Stack(Loops), [[0, 3], [2, 4]], {}
    with torch.no_grad():
        model.embed.weight[:, 0] = torch.arange(24)
    calibrate.stream(model, rows, lambda site, s: seen.update({site.name: s}), r"layers.*.b",
                     batch_size=1, progress=False)
    for where, s in seen.items():
        X = by_hand(model, where, rows)
        assert s.count == len(X) == 4
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_calibration_in_inference_mode():
    model = Stack(Twice)
    with torch.inference_mode():
        seen = grams(model)
    for where, s in seen.items():
        X = by_hand(model, where)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)
