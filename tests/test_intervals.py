"""Intervals: what they cover, by simulation, and the paired change of two models."""

import json
import math
import pickle

import numpy as np
import pytest

from minillm import measure
from minillm.measure import Score, intervals


def test_the_interval_of_a_share_narrows():
    wide, narrow = (measure.accuracy([1] * n + [0] * n, [1] * 2 * n) for n in (10, 1000))
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
            "perplexity", [(255 * loss, 255) for loss in losses], measure.metric("perplexity")
        )
        covered.append(score.low <= math.exp(4.5) <= score.high)
    assert 0.93 <= np.mean(covered) <= 0.97, "a percentile bootstrap covers 0.85"
    covered = []
    for p in draw.random(z):
        score = measure.accuracy(draw.random(8) < p, [True] * 8)
        covered.append(score.low <= p <= score.high)
    assert np.mean(covered) >= 0.93


def test_the_interval_of_a_mean_is_student_s():
    rows = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.55]
    score = intervals.score("any", rows, measure.metric("any"))
    half = 2.44691 * np.std(rows, ddof=1) / 7**0.5  # t of 6 degrees of freedom, from a table
    assert (score.low, score.high) == (
        pytest.approx(np.mean(rows) - half, abs=1e-4),
        pytest.approx(np.mean(rows) + half, abs=1e-4),
    )
    for freedom, t in ((1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227), (1000, 1.96234)):
        assert intervals.t_quantile(freedom) == pytest.approx(t, rel=1e-4)
    assert (
        intervals.score("any", [0.3] * 9, measure.metric("any")).low is None
    ), "all alike: nothing says how they vary"


def losses(draw, windows, seed=0.0, noise=0.02):
    rows = [(100 * (loss + seed + noise * draw.standard_normal()), 100) for loss in windows]
    return intervals.score("perplexity", rows, measure.metric("perplexity"))


def test_a_paired_change_knows_more_than_two_intervals():
    draw = np.random.default_rng(0)
    windows = 4 + draw.standard_normal(12)
    before, after = losses(draw, windows), [losses(draw, windows - 0.1) for _ in range(3)]
    change = measure.change(before, after)
    assert before.low < after[0] < before.high, "apart, the two cannot be told from each other"
    assert (
        change == pytest.approx(math.exp(-0.1) - 1, abs=0.02)
        and change.low < change < change.high < 0
    )
    first = math.log(measure.change(before, after[:1]) + 1)
    assert first == pytest.approx(math.log(after[0] / before))
    assert "change of perplexity" in repr(change) and change.n == 12
    with pytest.raises(ValueError, match="cannot be paired"):
        measure.change(before, losses(draw, windows[:5]))


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_interval_of_a_change_covers_windows_and_seeds(spread):
    draw, covered = np.random.default_rng(2), []
    for _ in range(200):
        windows = 4 + draw.standard_normal(8)
        gain = -0.1 + 0.05 * draw.standard_normal(
            8
        )  # what training gives differs from window to window
        before = losses(draw, windows, noise=0.0)
        change = measure.change(
            before,
            [losses(draw, windows + gain, spread * draw.standard_normal()) for _ in range(3)],
        )
        covered.append(change.low <= math.expm1(-0.1) <= change.high)
    assert np.mean(covered) >= 0.93


def test_models_that_agree_on_every_answer_may_still_differ():
    right, wrong = measure.accuracy([1] * 8, [1] * 8), measure.accuracy(
        [0] * 2 + [1] * 6, [1] * 8
    )
    same = measure.change(right, right)
    assert same == 0 and same.low < -0.1 and same.high > 0.1
    assert measure.change(right, wrong) == -0.25
    one = measure.f1([1] * 8, [1] * 8)
    assert measure.change(one, one).low is None


def test_a_score_is_a_float_that_knows_more():
    score = Score(2.5, "perplexity", 8, 2.0, 3.0)
    again = pickle.loads(pickle.dumps(score))
    assert (again, again.n, again.low, again.high) == (2.5, 8, 2.0, 3.0) and json.dumps(
        score
    ) == "2.5"
    assert repr(score) == "perplexity 2.5 [2, 3] (n=8)" and score.record()["value"] == 2.5
    assert repr(Score(123456.7, "perplexity", 3)) == "perplexity 123,457 (n=3, no interval)"


def test_the_degrees_of_freedom_of_a_change_are_welch_s():
    """Three seeds and six examples: V_examples + V_seeds and Satterthwaite's formula
    written out."""
    draw = np.random.default_rng(4)
    rows = [draw.standard_normal(6) for _ in range(4)]
    before, *after = (intervals.score("any", row, intervals.Metric()) for row in rows)
    change = intervals.difference([before] * 3, after, intervals.Metric())
    gains = np.stack(rows[1:]) - rows[0]  # (seeds, examples)
    by_example = gains.mean(0).var(ddof=1) / 6
    by_seed = gains.mean(1).var(ddof=1) / 3
    freedom = (by_example + by_seed) ** 2 / (by_example**2 / 5 + by_seed**2 / 2)
    half = intervals.t_quantile(freedom) * math.sqrt(by_example + by_seed)
    assert (change.low, change.high) == (
        pytest.approx(gains.mean() - half, rel=1e-9),
        pytest.approx(gains.mean() + half, rel=1e-9),
    )


def test_a_diverged_model_has_a_perplexity_of_infinity():
    perplexity = measure.metric("perplexity")
    bad = intervals.score("perplexity", [(90_000.0 + i * i, 100) for i in range(8)], perplexity)
    assert bad == bad.high == bad.low == math.inf and repr(bad) == "perplexity inf [inf, inf] (n=8)"
    wide = intervals.score("perplexity", [(100 * 300.0 * i, 100) for i in range(5)], perplexity)
    assert wide.low < wide < wide.high == math.inf, "the end of the interval alone"
    good = intervals.score("perplexity", [(300.0 + i, 100) for i in range(8)], perplexity)
    change = measure.change(good, bad)
    assert change == change.high == math.inf and measure.change(bad, good) == -1
    assert measure.metric("perplexity").moved(8.0, -0.25) == 6.0


def test_the_ends_of_a_share_are_exact():
    none, every = measure.accuracy([0] * 20, [1] * 20), measure.accuracy([1] * 20, [1] * 20)
    assert repr(none) == "accuracy 0 [0, 0.1611] (n=20)" and every.high == 1 and none.low == 0
    for n in range(5, 60):
        for right in range(n + 1):
            low, high = intervals.wilson(right / n, n)
            assert 0 <= low <= right / n <= high <= 1 and (low == 0) == (right == 0), (right, n)
            assert (high == 1) == (right == n), (right, n)
