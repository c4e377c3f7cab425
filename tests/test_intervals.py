"""How sure a mean of a few values is: pytest tests/test_intervals.py"""

from __future__ import annotations

import math

import numpy as np
import pytest

from siftloader.intervals import interval, t_quantile, within


@pytest.mark.parametrize(
    ("df", "confidence", "expected"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (5, 0.95, 2.571),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (8, 0.99, 3.355),
        (7, 0.5, 0.711),
    ],
)
def test_quantiles_are_those_of_the_tables(df, confidence, expected):
    assert round(t_quantile(df, confidence), 3) == expected
    assert within(t_quantile(df, confidence), df) == pytest.approx(confidence, abs=1e-12)


@pytest.mark.parametrize("df", range(1, 9))
def test_the_sums_are_the_integral_of_the_density(df):
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    edges = np.linspace(-1.7, 1.7, 20_001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = scale * (1 + middles**2 / df) ** (-(df + 1) / 2)
    assert within(1.7, df) == pytest.approx(float(density.sum() * (edges[1] - edges[0])), abs=1e-8)


def test_quantiles_of_nonsense_are_refused():
    for df, confidence in ((0, 0.95), (3, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="needed are df >= 1"):
            t_quantile(df, confidence)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_covers_the_truth_95_times_in_100(seeds):
    draws = np.random.default_rng(seeds).normal(-0.02, 0.05, (4000, seeds))
    covered = 0
    for values in draws:
        mean, half = interval(values)
        covered += abs(mean + 0.02) <= half
    assert 0.94 < covered / len(draws) < 0.96, covered


def test_of_one_value_or_of_one_that_is_not_finite_there_is_no_interval():
    assert interval([3.0]) == (3.0, None)
    for values in ([], [1.0, math.nan], [math.inf, 1.0]):
        mean, half_width = interval(values)
        assert math.isnan(mean) and half_width is None
