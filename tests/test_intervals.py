"""Intervals: what they cover, by simulation, and the paired change of two models."""

import json
import math
import pickle

import numpy as np
import pytest

from minillm import evaluate
from minillm.evaluate import Score, intervals


def test_the_interval_of_a_share_narrows():
    wide, narrow = (evaluate.accuracy([1] * n + [0] * n, [1] * 2 * n) for n in (10, 1000))
    assert (
        wide == narrow == 0.5
        and 0.25 < wide.low < narrow.low < 0.5 < narrow.high < wide.high < 0.75
    )
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.01)


def test_intervals_of_eight_examples_cover_what_they_say():
    draw, z = np.random.default_rng(1), 1000
    covered = []
    for _ in range(z):  # windows of 255 tokens, whose mean -log p varies as that of docstrings does
        losses = 4.5 + 0.5 * draw.standard_normal(8)
        score = intervals.score(
            "perplexity", [(255 * loss, 255) for loss in losses], evaluate.metric("perplexity")
        )
        covered.append(score.low <= math.exp(4.5) <= score.high)
    assert 0.93 <= np.mean(covered) <= 0.97, "a percentile bootstrap covers 0.85"
    covered = []
    for p in draw.random(z):
        score = evaluate.accuracy(draw.random(8) < p, [True] * 8)
        covered.append(score.low <= p <= score.high)
    assert np.mean(covered) >= 0.93


def test_the_interval_of_a_mean_is_student_s():
    rows = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.55]
    score = intervals.score("any", rows, evaluate.metric("any"))
    half = 2.44691 * np.std(rows, ddof=1) / 7**0.5  # t of 6 degrees of freedom, from a table
    assert (score.low, score.high) == (
        pytest.approx(np.mean(rows) - half, abs=1e-4),
        pytest.approx(np.mean(rows) + half, abs=1e-4),
    )
    for freedom, t in ((1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227), (1000, 1.96234)):
        assert intervals.t_quantile(freedom) == pytest.approx(t, rel=1e-4)
    assert (
        intervals.score("any", [0.3] * 9, evaluate.metric("any")).low is None
    ), "all alike: nothing says how they vary"


def losses(draw, windows, seed=0.0, noise=0.02):
    rows = [(100 * (loss + seed + noise * draw.standard_normal()), 100) for loss in windows]
    return intervals.score("perplexity", rows, evaluate.metric("perplexity"))


def test_a_paired_change_knows_more_than_two_intervals():
    draw = np.random.default_rng(0)
    windows = 4 + draw.standard_normal(12)
    before, after = losses(draw, windows), [losses(draw, windows - 0.1) for _ in range(3)]
    change = evaluate.change(before, after)
    assert before.low < after[0] < before.high, "apart, the two cannot be told from each other"
    assert (
        change == pytest.approx(math.exp(-0.1) - 1, abs=0.02)
        and change.low < change < change.high < 0
    )
    first = math.log(evaluate.change(before, after[:1]) + 1)
    assert first == pytest.approx(math.log(after[0] / before))
    assert "change of perplexity" in repr(change) and change.n == 12
    with pytest.raises(ValueError, match="scores pair where"):
        evaluate.change(before, losses(draw, windows[:5]))


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_interval_of_a_change_covers_windows_and_seeds(spread):
    draw, covered = np.random.default_rng(2), []
    for _ in range(200):
        windows = 4 + draw.standard_normal(8)
        gain = -0.1 + 0.05 * draw.standard_normal(
            8
        )  # what training gives differs from window to window
        before = losses(draw, windows, noise=0.0)
        change = evaluate.change(
            before,
            [losses(draw, windows + gain, spread * draw.standard_normal()) for _ in range(3)],
        )
        covered.append(change.low <= math.expm1(-0.1) <= change.high)
    assert np.mean(covered) >= 0.93


def test_models_that_agree_on_every_answer_may_still_differ():
    right, wrong = evaluate.accuracy([1] * 8, [1] * 8), evaluate.accuracy(
        [0] * 2 + [1] * 6, [1] * 8
    )
    same = evaluate.change(right, right)
    assert same == 0 and same.low < -0.1 and same.high > 0.1
    assert evaluate.change(right, wrong) == -0.25
    one = evaluate.f1([1] * 8, [1] * 8)
    assert evaluate.change(one, one).low is None


def test_a_score_is_a_float_that_knows_more():
    score = Score(2.5, "perplexity", 8, 2.0, 3.0)
    again = pickle.loads(pickle.dumps(score))
    assert (again, again.n, again.low, again.high) == (2.5, 8, 2.0, 3.0) and json.dumps(
        score
    ) == "2.5"
    assert repr(score) == "perplexity 2.5 [2, 3] (n=8)" and score.record()["value"] == 2.5
    assert repr(Score(123456.7, "perplexity", 3)) == "perplexity 123,457 (n=3, no interval)"
