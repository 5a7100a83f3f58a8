"""How a token is chosen: each filter against its definition, and the draws against it."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from minillm.model.generate import check_options, choices, sample


def slow(logits, temperature, top_k=None, top_p=None, min_p=None):
    """{token: probability} by the definitions, one row, token by token.

    None where the rounding of a probability could decide.
    """
    weight = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    kept = sorted(weight, key=lambda i: -weight[i])[:top_k]
    if top_p is not None:
        share, held, nucleus = sum(weight[i] for i in kept), 0.0, []
        for i in kept:
            if abs(held / share - top_p) < 1e-9:
                return None
            if held / share < top_p:
                nucleus.append(i)
            held += weight[i]
        kept = nucleus
    if min_p is not None:
        likeliest = max(weight[i] for i in kept)
        if any(abs(weight[i] / likeliest - min_p) < 1e-9 for i in kept):
            return None
        kept = [i for i in kept if weight[i] / likeliest >= min_p]
    share = sum(weight[i] for i in kept)
    return {i: weight[i] / share for i in kept}


@given(
    some.lists(some.floats(-8, 8), min_size=1, max_size=12, unique_by=lambda x: round(x, 3)),
    some.floats(0.05, 20),
    some.none() | some.integers(1, 15),
    some.none() | some.floats(0.01, 1),
    some.none() | some.floats(0, 1),
)
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_the_filters_keep_what_their_definitions_say(logits, temperature, top_k, top_p, min_p):
    expected = slow(logits, temperature, top_k, top_p, min_p)
    assume(expected is not None)
    row = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
    p, ids = choices(row, temperature, top_k, top_p, min_p)
    ids = torch.arange(len(logits)).expand_as(p) if ids is None else ids
    p = p / p.sum(-1, keepdim=True)
    for line, place in ((0, lambda i: i), (1, lambda i: len(logits) - 1 - i)):
        ours = {place(int(i)): float(x) for i, x in zip(ids[line], p[line]) if x > 0}
        assert ours == pytest.approx(
            {i: x for i, x in expected.items() if x > 0}, rel=1e-6, abs=1e-300
        )


def kept(p, **options):
    """The tokens of probabilities p that can be drawn."""
    p, ids = choices(torch.tensor([p], dtype=torch.float64).log(), 1.0, **options)
    ids = torch.arange(p.shape[1])[None] if ids is None else ids
    return sorted(ids[p > 0].tolist())


def test_at_the_boundaries_of_the_filters():
    four = [
        0.25
    ] * 4  # exact in binary: what lies on the boundary is decided by the rule and not by rounding
    assert (
        len(kept(four, top_p=0.5)) == 2
        and len(kept(four, top_p=0.51)) == 3
        and len(kept(four, top_p=0.25)) == 1
    )
    assert len(kept(four, top_p=1.0)) == 4 and len(kept(four, top_p=1e-9)) == 1
    assert kept(four, min_p=1.0) == [0, 1, 2, 3] and kept([0.5, 0.3, 0.2], min_p=1.0) == [0]
    assert kept([0.5, 0.3, 0.2], min_p=0.0) == [0, 1, 2]
    assert [len(kept(four, top_k=k)) for k in (1, 2, 3, 4, 5)] == [
        1,
        2,
        3,
        4,
        4,
    ]  # of equal tokens too, exactly k
    assert kept([0.1, 0.5, 0.4], top_k=2) == [1, 2] and kept([0.1, 0.5, 0.4], top_k=1) == [1]
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55) == [
        0
    ]  # 0.4 of the 0.7 that top_k left: more than 0.55
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.55) == [0, 1]
    p, _ = choices(torch.tensor([[0.0, 30.0, -1e9]]).double(), 20.0, top_p=1.0)
    assert p[0].tolist() == pytest.approx(
        [1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(1.5)), 0]
    )  # the likeliest first


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().expand(4000, -1)

    def share(**options):
        return (
            torch.bincount(
                sample(logits, generator=torch.Generator().manual_seed(0), **options), minlength=5
            )
            / 4000
        )

    assert (share(temperature=2.0) - (logits[0] / 2).softmax(0)).abs().max() < 0.03
    assert (
        share(temperature=1.0, top_k=2) - torch.tensor([5 / 7, 2 / 7, 0, 0, 0])
    ).abs().max() < 0.03
    assert (
        share(temperature=1.0, top_p=0.75) - torch.tensor([0.5, 0.2, 0.15, 0, 0]) / 0.85
    ).abs().max() < 0.03
    assert (
        share(temperature=1.0, min_p=0.35) - torch.tensor([5 / 7, 2 / 7, 0, 0, 0])
    ).abs().max() < 0.03
    assert share(temperature=0.0)[0] == 1
    for tiny in (1e-3, 1e-30, 1e-300):  # towards greedy, and never nan
        assert share(temperature=tiny)[0] == 1


@pytest.mark.parametrize("option", [dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)])
def test_a_filter_without_a_temperature_is_an_error(option):
    with pytest.raises(ValueError, match="temperature"):
        check_options(**option)
    check_options(temperature=0.5, **option)
