"""Bins along an axis: their edges as indices, and ways to pool the values in a bin; ranks.

All binning of the package is done here, in numpy, so that results and drawings pool alike.
"""

from __future__ import annotations

import numpy as np


def even_edges(count: int, most: int) -> np.ndarray:
    """Edges of at most `most` bins of about equal width over `count` places, as indices.

    Examples
    --------
    >>> even_edges(10, 4).tolist()
    [0, 2, 5, 8, 10]
    """
    return np.unique(np.linspace(0, count, min(count, most) + 1).round().astype(int))


def step_edges(count: int, most: int) -> np.ndarray:
    """Edges of at most `most` bins of equal width over `count` places; the last may be narrower.

    Examples
    --------
    >>> step_edges(10, 4).tolist()
    [0, 3, 6, 9, 10]
    """
    return np.append(np.arange(0, count, -(-count // most)), count)


def curve_edges(start: int, length: int, points: int) -> np.ndarray:
    """Edges of a curve's bins: the first quarter of `points` exact, then bins of equal width.

    Examples
    --------
    >>> curve_edges(0, 4, 8).tolist()
    [0, 1, 2, 3, 4]
    """
    if length <= points:
        return np.arange(start, start + length + 1)
    exact = points // 4
    rest = np.linspace(exact, length, points - exact + 1).round().astype(np.int64)
    return start + np.unique(np.concatenate([np.arange(exact), rest]))


def log_edges(places: np.ndarray, most: int) -> np.ndarray:
    """Edges, as indices, of at most `most` bins of equal width on an axis of log(place + 1)."""
    if len(places) <= most:
        return np.arange(len(places) + 1)
    cuts = np.geomspace(places[0] + 1, places[-1] + 2, most + 1)[1:-1]
    inner = np.searchsorted(places + 1, cuts)
    return np.unique(np.concatenate([[0], inner, [len(places)]]))


def bin_sum(values: np.ndarray, edges: np.ndarray, axis: int = -1) -> np.ndarray:
    """The sum in each bin along an axis."""
    return np.add.reduceat(values, edges[:-1].astype(np.intp), axis=axis)


def bin_mean(values: np.ndarray, edges: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean in each bin along an axis."""
    width = np.diff(edges)
    shape = [1] * values.ndim
    shape[axis] = len(width)
    return bin_sum(values, edges, axis) / width.reshape(shape)


def weighted_mean(values: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The weighted mean of the finite values in each bin; NaN where their weights are all 0.

    Examples
    --------
    >>> weighted_mean(np.array([1.0, 4.0, np.nan]), np.array([2, 1, 5]), np.array([0, 3])).tolist()
    [2.0]
    """
    used = slice(edges[0], edges[-1])
    finite = np.isfinite(values)
    weights = np.where(finite, weights, 0.0)[used]
    total = bin_sum(weights * np.where(finite, values, 0.0)[used], edges - edges[0])
    with np.errstate(invalid="ignore"):
        return total / bin_sum(weights, edges - edges[0])


def bin_range(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value in each bin along the last axis."""
    starts = edges[:-1].astype(np.intp)
    return np.minimum.reduceat(values, starts, axis=-1), np.maximum.reduceat(
        values, starts, axis=-1
    )


def bin_argmax(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The index of the largest value in each bin, ignoring NaN; its first if all are NaN."""
    ranked = np.where(np.isnan(values), -np.inf, values)
    return np.array([a + np.argmax(ranked[a:b]) for a, b in zip(edges, edges[1:], strict=False)])


def mean_of_finite(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """The mean of the finite values; NaN where there are none."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(finite, values, 0.0).sum(axis) / finite.sum(axis)


def cell_mean(
    values: np.ndarray, allowed: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the allowed entries in each cell of a matrix, and which cells have any."""
    count = bin_sum(bin_sum(allowed.astype(np.float64), rows, 0), columns, 1)
    total = bin_sum(bin_sum(np.where(allowed, values, 0.0), rows, 0), columns, 1)
    with np.errstate(invalid="ignore"):
        return total / count, count > 0


def ranks(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Rank of each value: 0 for the largest, ties in order, NaN last; -1 where not `present`.

    Examples
    --------
    >>> ranks(np.array([0.1, 0.9, np.nan]), np.array([True, True, False])).tolist()
    [1, 0, -1]
    """
    # NaN is sorted last.
    order = np.argsort(-np.where(present, values, np.nan), axis=None, kind="stable")
    places = np.full(values.size, -1, dtype=np.int32)
    places[order[present.ravel()[order]]] = np.arange(present.sum())
    return places.reshape(values.shape)
