"""A figure with its interval, and the paired difference of two models on the same examples.

Every metric here is a function `measure(parts)` of an array `parts` (n, ...): each row
holds what one example contributes. So one method, the jackknife (Quenouille 1956, Tukey
1958), gives the variance of all of them:

    theta_i   the metric without example i
    V       = (n - 1)/n  sum_i (theta_i - mean of theta)^2
    interval  theta -+ t(n - 1) sqrt(V)        t: Student's quantile, so that few examples widen it

For a mean this is the usual t interval. The interval of perplexity is that of its
logarithm, which is a mean. A percentile bootstrap, the usual choice, covers the true
value in 85% of cases at n = 8, where 95% is the claim. A share (accuracy) has Wilson's
interval (1927): it stays within 0 and 1, and does not shrink to width 0 at either end.

With fewer than FEWEST examples, or if all contribute the same, there is no interval,
and `low` and `high` are None.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable

import numpy as np

FEWEST = 5  # with fewer examples, an interval says more about its assumptions than the model
LARGEST = math.log(sys.float_info.max)  # 709.8: beyond it, e^x is no float


def exp(x):
    """e^x; infinity if a float cannot hold it, as for the perplexity of a diverged model."""
    return math.exp(x) if x < LARGEST else math.inf


def expm1(x):
    """e^x - 1; infinity if a float cannot hold it."""
    return math.expm1(x) if x < LARGEST else math.inf


@dataclasses.dataclass(frozen=True)
class Metric:
    """How the rows of examples become a figure.

    measure: parts (n, ...) -> float, on the scale of the interval. `shown` maps that
    scale to the figure, and `changed` maps a difference on that scale to the change that
    a table shows. share: whether the metric is a mean of zeros and ones. summed: whether it
    depends on parts.sum(0) alone, which makes the jackknife quick. least and most bound the
    figure. better: 1 if a larger figure is better, -1 if a smaller one is.
    """

    measure: Callable = lambda parts: parts.mean()
    shown: Callable = float
    changed: Callable = float
    share: bool = False
    summed: bool = False
    least: float = -math.inf
    most: float = math.inf
    better: int = 1

    def moved(self, figure, change):
        """The figure after a change as `difference` gives it."""
        return figure * (1 + change) if self.changed is expm1 else figure + change


class Score(float):
    """A float with a name, the number of examples n, and the ends low and high of its 95%
    interval (None: there is none).

    `parts` (n, ...) is what each example contributes; `difference` uses it to pair two
    models. A pickle keeps `parts`, `record()` does not.
    """

    def __new__(cls, value, name="", n=0, low=None, high=None, parts=None):
        self = super().__new__(cls, value)
        self.name, self.n, self.low, self.high, self.parts = name, n, low, high, parts
        return self

    def __getnewargs__(self):
        return float(self), self.name, self.n, self.low, self.high, self.parts

    def __repr__(self):
        interval = (
            "no interval" if self.low is None else f"[{digits(self.low)}, {digits(self.high)}]"
        )
        return f"{self.name} {digits(self)} " + (
            f"{interval} (n={self.n})" if self.low is not None else f"(n={self.n}, {interval})"
        )

    def record(self):
        """A dict for JSON."""
        return dict(name=self.name, value=float(self), n=self.n, low=self.low, high=self.high)


def digits(x):
    """Four significant digits, and never an exponent for a large number."""
    return f"{float(x):,.0f}" if abs(x) >= 10_000 else f"{float(x):.4g}"


def t_quantile(freedom):
    """The t with 95% of Student's distribution between -t and t.

    With x = sqrt(freedom) tan(angle) the density of the angle is proportional to
    cos(angle) ** (freedom - 1). Its sums over a grid give the distribution.
    """
    angle = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate(
        [[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]
    )  # by the trapezoid rule
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, angle))


def jackknife(parts, measure, summed=False):
    """The jackknife variance of measure(parts), for parts (n, ...) with n of at least 2.

    summed: measure(parts) is measure(parts.sum(0)[None]). The sum without part i is then the sum
    of all less that part: n steps and not n^2.
    """
    n, total = len(parts), parts.sum(0, keepdims=True)  # (1, ...)
    without = np.array([measure(total - part if summed else np.delete(parts, i, axis=0))
                        for i, part in enumerate(parts)])
    return (n - 1) / n * float(((without - without.mean()) ** 2).sum())


def wilson(share, n):
    """Wilson's interval of a share of n examples. It begins at 0 if the share is 0, and
    ends at 1 if the share is 1.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    middle, half = share + z * z / (2 * n), z * math.sqrt(
        share * (1 - share) / n + z * z / (4 * n * n)
    )
    scale = 1 + z * z / n
    low, high = (middle - half) / scale, (middle + half) / scale
    return 0.0 if share == 0 else max(0.0, low), 1.0 if share == 1 else min(1.0, high)


def score(name, parts, metric):
    """The Score of `metric` over parts (n, ...)."""
    parts = np.asarray(parts, dtype=float)
    n, value, low, high = len(parts), metric.measure(parts), None, None
    if n >= FEWEST and metric.share:
        low, high = wilson(value, n)
    elif n >= FEWEST and (variance := jackknife(parts, metric.measure, metric.summed)) > 0:
        half = t_quantile(n - 1) * math.sqrt(variance)
        low, high = (
            min(max(metric.shown(end), metric.least), metric.most)
            for end in (value - half, value + half)
        )
    return Score(metric.shown(value), name, n, low, high, parts)


def difference(before, after, metric):
    """The change from `before` to `after`, a Score. Both are lists of one Score for each
    seed, all on the same n examples.

    The figure is the mean over the seeds of (after - before): for perplexity the
    relative change (-0.2 is a fifth less), for other metrics the plain difference. Its
    interval covers two causes of chance, whose variances add:

        V_examples  jackknife over the n examples, of the mean over seeds:
                    another text of the same kind
        V_seeds     variance between the S seeds / S:
                    another order of training, other initial values

    with Student's t at the degrees of freedom of Welch and Satterthwaite. Pairing removes
    what makes an example hard for every model. The chance of one example under one
    seed is in both terms, so the interval is a little too wide. With one seed V_seeds is
    unknown, and the interval is that of this one training. For a share two rows are added,
    one in favour of each side (Bonett & Price 2012): without them, models that agree
    everywhere would have an interval of width 0.
    """
    seeds = len(after)
    rows = np.stack([one.parts for one in (*before, *after)], axis=1)  # (n, 2 S, ...)

    def each(rows):
        return [
            metric.measure(rows[:, seeds + s]) - metric.measure(rows[:, s]) for s in range(seeds)
        ]

    def mean(rows):
        return statistics.fmean(each(rows))

    changes, n, low, high = each(rows), len(rows), None, None
    if n >= FEWEST:
        if metric.share:
            won = np.repeat([[0.0, 1.0]], seeds, axis=1)  # (1, 2 S)
            rows = np.concatenate([rows, won, 1 - won])
        by_example = jackknife(rows, mean, metric.summed)
        by_seed = statistics.variance(changes) / seeds if seeds > 1 else 0.0
        if variance := by_example + by_seed:
            squares = by_example**2 / (len(rows) - 1) + (
                by_seed**2 / (seeds - 1) if by_seed else 0.0
            )
            half, middle = t_quantile(variance**2 / squares) * math.sqrt(variance), mean(rows)
            low, high = metric.changed(middle - half), metric.changed(middle + half)
    return Score(
        metric.changed(statistics.fmean(changes)), f"change of {before[0].name}", n, low, high
    )
