"""Bins: they cover every place once, and pool as their names say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goatviz import bins


@given(st.integers(1, 500), st.integers(1, 64))
def test_even_edges_cover_every_place_once(count, most):
    edges = bins.even_edges(count, most)
    assert (edges[0], edges[-1]) == (0, count)
    assert (np.diff(edges) > 0).all() and len(edges) - 1 <= most


@given(st.integers(1, 500), st.integers(1, 64))
def test_step_edges_are_of_one_width_but_for_the_last(count, most):
    edges = bins.step_edges(count, most)
    widths = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, count) and len(widths) <= most
    assert (widths[:-1] == widths[0]).all() and 0 < widths[-1] <= widths[0]


@given(st.integers(0, 50), st.integers(1, 2000), st.integers(8, 64))
def test_curve_edges_are_exact_first_and_cover_the_rest(start, length, points):
    edges = bins.curve_edges(start, length, points)
    assert (edges[0], edges[-1]) == (start, start + length)
    assert (np.diff(edges) > 0).all()
    assert (np.diff(edges)[: min(points // 4, length)] == 1).all()


@given(st.integers(1, 3000), st.integers(2, 64))
def test_log_edges_cover_every_place_once(count, most):
    edges = bins.log_edges(np.arange(count), most)
    assert (edges[0], edges[-1]) == (0, count)
    assert (np.diff(edges) > 0).all() and len(edges) - 1 <= most


def test_pooling_agrees_with_loops():
    rng = np.random.default_rng(0)
    values, edges = rng.normal(size=(3, 20)), np.array([0, 1, 5, 20])
    parts = [values[:, a:b] for a, b in zip(edges, edges[1:], strict=False)]
    low, high = bins.bin_range(values, edges)
    np.testing.assert_allclose(bins.bin_sum(values, edges), np.stack([p.sum(1) for p in parts], 1))
    np.testing.assert_allclose(
        bins.bin_mean(values.T, edges, axis=0), np.stack([p.mean(1) for p in parts])
    )
    np.testing.assert_array_equal(low, np.stack([p.min(1) for p in parts], 1))
    np.testing.assert_array_equal(high, np.stack([p.max(1) for p in parts], 1))


def test_the_largest_number_of_a_bin_is_not_nan():
    values = np.array([np.nan, 2.0, 1.0, np.nan, np.nan])
    assert bins.bin_argmax(values, np.array([0, 3, 5])).tolist() == [1, 3]


def test_cells_average_what_is_allowed():
    values = np.arange(16.0).reshape(4, 4)
    allowed = np.tril(np.ones((4, 4), dtype=bool))
    edges = np.array([0, 2, 4])
    mean, seen = bins.cell_mean(values, allowed, edges, edges)
    assert seen.tolist() == [[True, False], [True, True]]
    assert mean[0, 0] == pytest.approx((0 + 4 + 5) / 3)
    assert mean[1, 0] == pytest.approx((8 + 9 + 12 + 13) / 4)


def test_weighted_means_leave_out_what_is_not_a_number():
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, 9.0])
    weights = np.array([1, 4, 3, 0, 2, 7])
    mean = bins.weighted_mean(values, weights, np.array([0, 3, 5]))
    assert mean[0] == pytest.approx((1 * 1 + 3 * 3) / 4) and np.isnan(mean[1])
