"""Intervals: Wilson's against its defining equation, the bootstrap against loops."""

import numpy as np
import pytest

from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights, wilson_interval


def test_wilson_ends_solve_the_score_equation():
    z = 1.959963984540054
    for right, count in ((1, 7), (3, 10), (50, 64)):
        for end in wilson_interval(right, count):
            gap = abs(right / count - end) - z * np.sqrt(end * (1 - end) / count)
            assert gap == pytest.approx(0.0, abs=1e-12)


def test_wilson_at_the_ends_and_without_trials():
    low, high = wilson_interval(np.array([0, 5, 0]), np.array([5, 5, 0]))
    assert (low[0], high[1]) == (0.0, 1.0)
    assert np.isnan([low[2], high[2]]).all()
    with pytest.raises(ValueError, match="between 0 and count"):
        wilson_interval(3, 2)


def test_the_bootstrap_agrees_with_loops_over_draws():
    rng = np.random.default_rng(1)
    values, sizes = rng.normal(size=(9, 4, 3)), rng.integers(1, 50, size=(9, 4, 3))
    values[rng.random(values.shape) < 0.1] = np.nan
    low, high = bootstrap_interval(values, bootstrap_weights(9, 200, 5), sizes)
    draws = np.random.default_rng(5).integers(9, size=(200, 9))
    for place in np.ndindex(4, 3):
        means = []
        for draw in draws:
            v, n = values[(draw, *place)], sizes[(draw, *place)]
            kept = ~np.isnan(v)
            if kept.any():
                means.append(np.average(v[kept], weights=n[kept]))
        expected = np.quantile(means, [0.025, 0.975])
        np.testing.assert_allclose([low[place], high[place]], expected)


def test_one_unit_has_no_interval():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [2.0, 3.0]])
    low, high = bootstrap_interval(values, bootstrap_weights(3, 50, 0))
    assert np.isfinite([low[0], high[0]]).all() and np.isnan([low[1], high[1]]).all()
