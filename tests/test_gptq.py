"""GPTQ against the least squares that it solves, written out; and what it is for: a
smaller error of the output."""

import dataclasses

import pytest
import torch
from models import MODELS, build, logits, two
from torch import nn

import minillm
from minillm.quant import gptq
from minillm.quant.grid import Grid

ROWS = torch.randint(24, (16, 12), generator=torch.Generator().manual_seed(3))
GRIDS = [Grid(4), Grid(3, 4), Grid(4, None, True), Grid(2, 8, True), Grid(3, 12),
         Grid(3, "tensor", True)]


def inputs(seed=0, n=200, m=24):
    """X (n, m) whose columns are correlated and of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, m, generator=draw)
        @ torch.randn(m, m, generator=draw)
        * torch.rand(m, generator=draw)
    )


def matrix(seed=0, n=10, m=24):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed + 100))


def by_hand(W, X, grid, damp, order=False):
    """After each column is rounded, those that are left become the exact minimum, found
    anew from the first W."""
    W, H = W.double(), X.double().T @ X.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    whole = grid.group in (None, "tensor")
    column = grid if whole else dataclasses.replace(grid, group=None)
    size = W.shape[1] if whole else grid.group
    places = sorted(range(len(H)),
                    key=lambda j: -(X.double() ** 2).sum(0)[j]) if order else list(range(len(H)))
    scale, zero = grid.fit(W)
    Q, now = torch.zeros_like(W), W.clone()
    for i, j in enumerate(places):
        g = j // size
        if j % size == 0 and not order:
            fitted = column.fit(now[:, j : j + size])
            scale[:, g] = fitted[0][:, 0]
            if zero is not None:
                zero[:, g] = fitted[1][:, 0]
        numbers = scale[:, g, None], None if zero is None else zero[:, g, None]
        Q[:, j] = column.dense(column.round(now[:, j, None], *numbers), *numbers)[:, 0]
        done, left = places[: i + 1], places[i + 1 :]
        # minimum over V of |(W - [Q, V]) X|²: (W - Q)_done H_done,left + (W - V)_left
        # H_left,left = 0
        change = (W - Q)[:, done] @ H[done][:, left] @ torch.linalg.inv(H[left][:, left])
        now[:, left] = W[:, left] + change
    return Q


def solved(W, X, grid, damp=0.01, order=False, block=128):
    H = X.T @ X
    q, scale, zero = gptq.solve(W.clone(), *gptq.factor(H, damp, order, "x"), grid, order, block)
    return grid.dense(q, scale, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_it_is_the_exact_minimum_after_each_column(grid, order, block):
    for seed in range(3):
        W, X = matrix(seed), inputs(seed)
        torch.testing.assert_close(solved(W, X, grid, order=order, block=block).double(),
                                   by_hand(W, X, grid, 0.01, order),
                                   rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", [False, True])
def test_it_beats_rounding_to_the_nearest_on_every_seed(grid, order):
    for seed in range(10):
        W, X = matrix(seed, 32, 24), inputs(seed)
        nearest = grid.dense(grid.round(W, *grid.fit(W)), *grid.fit(W))
        ours, theirs = ((X @ (Q - W).T).norm() for Q in (solved(W, X, grid, order=order), nearest))
        assert ours < 0.9 * theirs, seed


def test_order_helps_where_inputs_differ_in_size():
    wins = 0
    for seed in range(10):
        W, X = matrix(seed, 32), inputs(seed) * torch.logspace(-2, 0, 24)
        wins += (X @ (solved(W, X, Grid(3), order=True) - W).T).norm() < (
            X @ (solved(W, X, Grid(3)) - W).T
        ).norm()
    assert wins >= 8


def test_columns_of_equal_inputs_keep_their_order():
    H = torch.eye(64)
    H[::3] *= 2
    twice, once = [j for j in range(64) if j % 3 == 0], [j for j in range(64) if j % 3]
    assert gptq.factor(H, 0.01, True, "x")[1].tolist() == twice + once


def test_inputs_that_are_always_0_are_rounded_to_the_nearest():
    W, X, grid = matrix(), inputs(), Grid(4)
    X[:, [3, 7]] = 0
    numbers = grid.fit(W)
    nearest = grid.dense(grid.round(W, *numbers), *numbers)
    assert solved(W, X, grid)[:, [3, 7]].equal(nearest[:, [3, 7]])
    assert solved(W, torch.zeros_like(X), grid).equal(nearest)
    assert (solved(W, X, grid) != nearest).any()


def test_what_is_not_positive_definite_is_damped_more_or_named():
    H = -torch.eye(4)
    H[0, 0] = 100
    # the mean of the diagonal is 24.25: 0.1 of it is enough
    U, _ = gptq.factor(H, 0.01, False, "x")
    torch.testing.assert_close(torch.linalg.inv(U.T @ U), H + 0.1 * 24.25 * torch.eye(4), rtol=1e-4,
                               atol=1e-4)
    with pytest.raises(ValueError, match="H of 'x' has no Cholesky factor, even with damp=100000"):
        gptq.factor(-torch.eye(4), 0.01, False, "x")
    with pytest.raises(ValueError, match="the inputs of 'x' hold nan or infinity"):
        gptq.factor(torch.full((2, 2), torch.inf), 0.01, False, "x")
    few = inputs(n=3)  # three tokens for 24 inputs: H has rank 3
    assert solved(matrix(), few, Grid(4)).isfinite().all()


@pytest.mark.parametrize("options",
                         [dict(), dict(bits=3, group=4, zero_point=True), dict(bits=8, group=8),
                          dict(order=False)], ids=str)
@pytest.mark.parametrize("name", [*MODELS, "half"])
def test_a_model_computes_nearer_to_itself_than_when_rounded(name, options):
    model = build("llama" if name == "half" else name)
    ids, targets = ROWS[:8], r"(?!.*head).*\d\..*"
    if name == "half":
        model = model.bfloat16()
    with torch.no_grad():
        right = logits(model, ids).float()
        off = []
        for wrap in (lambda m: gptq.wrap(m, ROWS, targets, batch_size=5, progress=False, **options),
                     lambda m: minillm.quant.wrap(m, targets,
                                                  **{"bits": 4,
                                                     **{k: v for k, v in options.items()
                                                        if k != "order"}})):
            other = build("llama" if name == "half" else name)
            other = wrap(other.bfloat16() if name == "half" else other)
            off.append((logits(other, ids).float() - right).norm())
    assert len(minillm.registry.formats_of("quant", other)) >= 6
    if options.get("bits") != 8:
        assert off[0] < off[1]


def test_its_file_is_a_file_of_quant(tmp_path):
    model = gptq.wrap(build("llama"), ROWS, bits=3, group=8, zero_point=True, progress=False)
    minillm.quant.save(model, tmp_path / "a")
    again = minillm.quant.load(build("llama"), tmp_path / "a")
    assert logits(again, ROWS).equal(logits(model, ROWS))
    for site in minillm.registry.formats_of("quant", model):
        assert site.module.config() == dict(bits=3, group=8, zero_point=True)
    weights = {site.name: site.module.dense()
               for site in minillm.registry.formats_of("quant", model)}
    plain = minillm.quant.unwrap(model)
    assert all(dict(plain.named_modules())[name].weight.equal(W) for name, W in weights.items())


@pytest.mark.parametrize("beneath", ["lora", "prune"])
def test_it_goes_under_what_is_attached(beneath):
    model = getattr(minillm, beneath).wrap(build("llama"))
    gptq.wrap(model, ROWS, progress=False)
    layer = minillm.layers(model)["layers.0.mlp.up_proj"]
    assert type(layer.base).__name__ == "Integer" and list(layer.patches) == [beneath]
    assert logits(getattr(minillm, beneath).unwrap(model)).isfinite().all()


def test_the_leaves_after_repair_those_before():
    """q, k and v are those of the dense model's input; o has the inputs that the rounded
    ones give it."""
    model = build("llama")
    seen = []

    def spied(H, *rest, factor=gptq.factor):
        seen.append(H)
        return factor(H, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "factor", spied)
        gptq.wrap(model, ROWS, bits=2, progress=False)
    assert len(seen) == 12, "four groups in each of three blocks"
    found = {}
    minillm.calibrate.stream(build("llama"), ROWS, lambda site, s: found.update({site.name: s.H}),
                             progress=False)
    assert (found["layers.0.self_attn.q_proj"].equal(seen[0])
            and not found["layers.0.self_attn.o_proj"].equal(seen[1]))


@pytest.mark.parametrize("options, message", [
    (dict(bits=9), "bits=9"),
    (dict(group=5), "group=5 at 'layers.0.self_attn.q_proj': a row has 16 weights"),
    (dict(damp=0), "damp=0"), (dict(order=1), "order=1"), (dict(block=0), "block=0"),
    (dict(targets=["embed_tokens"]), "no leaf"),
    (dict(batch_size=0), "batch_size=0"), (dict(examples=[]), "no examples"),
])
def test_what_is_wrong_is_named_before_any_leaf_is_changed(options, message):
    model = build("llama")
    options = {"examples": ROWS, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        gptq.wrap(model, **options)
    assert not minillm.registry.formats_of("quant", model)
    tied = build("hf_llama")
    with pytest.raises(ValueError, match="'lm_head' shares its matrix"):
        gptq.wrap(tied, ROWS, ["lm_head"], progress=False)
    with pytest.raises(ValueError, match="is already stored as quant"):
        gptq.wrap(minillm.quant.wrap(build("llama")), ROWS, progress=False)


def test_it_is_deterministic_and_trains_afterwards():
    first, second = (gptq.wrap(build("gpt2"), ROWS, progress=False) for _ in range(2))
    assert all(t.equal(dict(second.named_buffers())[name]) for name, t in first.named_buffers())
    minillm.lora.wrap(first, r=2)
    logits(first).sum().backward()
    assert all(p.grad is not None for layer in minillm.layers(first).values()
               for p in layer.patches.parameters())


def test_an_ordinary_model_needs_no_blocks():
    model = gptq.wrap(nn.Sequential(nn.Embedding(24, 6), *two()), ROWS, bits=8, progress=False)
    assert [type(model[i]).__name__ for i in (1, 3)] == ["Integer", "Integer"]
