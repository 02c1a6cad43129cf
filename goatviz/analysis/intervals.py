"""Intervals of 95 %: Wilson's for shares, a percentile bootstrap for means, Student's for seeds."""

from __future__ import annotations

import numpy as np

#: 97.5 % quantile of the standard normal.
_Z = 1.959963984540054
#: Number of columns whose resampled means are held at a time.
_COLUMNS = 4096


def wilson_interval(right: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % score interval of a share (Wilson 1927); NaN where nothing was counted.

    Parameters
    ----------
    right, count : array
        Successes and trials, same shape.

    Returns
    -------
    low, high : array
        Ends of the interval, within [0, 1].

    Raises
    ------
    ValueError
        If successes are negative, or more than trials.

    Examples
    --------
    >>> low, high = wilson_interval(10, 10)
    >>> round(float(low), 3), float(high)
    (0.722, 1.0)
    """
    right, count = np.asarray(right, dtype=float), np.asarray(count, dtype=float)
    if bool(((right < 0) | (right > count)).any()):
        raise ValueError(f"right must lie between 0 and count, got {right} of {count}")
    with np.errstate(invalid="ignore", divide="ignore"):
        share, square = right / count, _Z**2 / count
        middle = (share + square / 2) / (1 + square)
        half = _Z * np.sqrt(share * (1 - share) / count + square / count / 4) / (1 + square)
    low, high = middle - half, middle + half
    # Rounding leaves 1e-17 where the ends are exactly 0 and 1.
    return np.where(share == 0, 0.0, low), np.where(share == 1, 1.0, high)


def share_fields(name: str, right: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    """A share and its Wilson interval, as fields `name`, `name`_low and `name`_high."""
    with np.errstate(invalid="ignore"):
        share = right / count
    low, high = wilson_interval(right, count)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def difference_interval(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float]:
    r"""95 % interval of a difference of two shares from their own intervals (Newcombe 1998).

    .. math::
        d - \sqrt{(p_1 - l_1)^2 + (u_2 - p_2)^2} \;\ldots\; d + \sqrt{(u_1 - p_1)^2 + (p_2 - l_2)^2}

    Parameters
    ----------
    first, second : tuple of float
        Each share with the ends of its Wilson interval: (p, low, high).

    Returns
    -------
    low, high : float
        Ends for the first share less the second. Shares of the same questions go together, which
        makes this interval too wide rather than too narrow.

    Examples
    --------
    >>> low, high = difference_interval((1.0, 0.9, 1.0), (0.5, 0.4, 0.6))
    >>> round(low, 3), round(high, 3)
    (0.359, 0.6)
    """
    (p, low, high), (q, q_low, q_high) = first, second
    difference = p - q
    return (
        float(difference - np.hypot(p - low, q_high - q)),
        float(difference + np.hypot(high - p, q - q_low)),
    )


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over a few independent values, such as training seeds (Student's t).

    Parameters
    ----------
    values : array
        Values of shape (n,), for example one for each seed.

    Returns
    -------
    low, high : float
        Ends of the interval; NaN for fewer than two values.

    Examples
    --------
    >>> low, high = student_interval(np.array([0.9, 1.0, 1.1]))
    >>> round(low, 3), round(high, 3)
    (0.752, 1.248)
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    half = student_quantile(len(values)) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def student_quantile(count: int) -> float:
    """97.5 % quantile of Student's t for the mean of `count` independent values.

    Examples
    --------
    >>> round(student_quantile(3), 3)
    4.303
    """
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


def bootstrap_weights(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each of `count` units: shape (resamples, count)."""
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    return np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(float)


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray, sizes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    r"""95 % percentile bootstrap of means :math:`\sum_u n_u v_u / \sum_u n_u` over units u.

    Parameters
    ----------
    values : array
        Values of shape (units, ...); NaN where a unit has none, which leaves it out of the mean.
    weights : array
        From `bootstrap_weights`, shape (resamples, units).
    sizes : array, optional
        Sizes n_u >= 0, in the shape of `values`; default 1.

    Returns
    -------
    low, high : array
        Ends of the intervals, in the shape of one unit; NaN where fewer than two have a value.

    Examples
    --------
    >>> low, high = bootstrap_interval(np.array([1.0, 2.0, 3.0]), bootstrap_weights(3, 400, 0))
    >>> float(low), float(high)
    (1.0, 3.0)
    """
    flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    known = ~np.isnan(flat)
    if sizes is not None:
        known = known * np.broadcast_to(sizes, values.shape).reshape(flat.shape)
    low, high = np.full((2, flat.shape[1]), np.nan)
    columns = np.flatnonzero((known > 0).sum(0) >= 2)
    for start in range(0, len(columns), _COLUMNS):
        at = columns[start : start + _COLUMNS]
        mass = known[:, at].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (weights @ (mass * np.nan_to_num(flat[:, at]))) / (weights @ mass)
        # A resample without any unit that has a value has no mean; few columns have such resamples.
        whole = ~np.isnan(means).any(0)
        low[at[whole]], high[at[whole]] = np.quantile(means[:, whole], [0.025, 0.975], axis=0)
        for column in np.flatnonzero(~whole):
            some = means[~np.isnan(means[:, column]), column]
            low[at[column]], high[at[column]] = np.quantile(some, [0.025, 0.975])
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])
