"""What follows from the numbers of a sink profile: ranks of heads, bounds of the first key's mass,
means over the heads of a layer, and the importance of keys under uniform attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from goatviz.bins import mean_of_finite, ranks

#: What a layer has of its own in the signal: sums of counts, means weighted by them.
_MEANS = ("first", "largest", "recent")


def measures(data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fields of a profile that follow from others.

    Parameters
    ----------
    data : mapping of str to ndarray
        Fields of the schema "sink_profile": present, first_importance, sink_rate, any_sink_rate,
        prior_first_low and _high, range_stop, signal_count and the means of the signal.
    """
    present = data["present"]
    # No query of a bin has a wider range than its end.
    widest = data["range_stop"]
    low, high = data["prior_first_low"], data["prior_first_high"]
    lower, upper = first_mass_bounds(low, high, widest)
    least, most = (
        reduce.reduce(np.where(present, ends, np.nan), axis=1)
        for reduce, ends in ((np.fmin, low), (np.fmax, high))
    )
    layer_lower, layer_upper = first_mass_bounds(least, most, widest)
    rates = {
        name: np.where(present[..., None], data[name], np.nan)
        for name in ("sink_rate", "any_sink_rate")
    }
    later = data["importance"][..., 1:]
    known = np.isfinite(later).any(-1)
    second = np.where(np.isfinite(later), later, -1.0).argmax(-1) if later.shape[-1] else None
    none = np.full(present.shape, np.nan)
    return {
        "second_importance": none
        if second is None
        else np.where(known, np.take_along_axis(later, second[..., None], -1)[..., 0], np.nan),
        "second_key": none if second is None else np.where(known, second + 1.0, np.nan),
        "sink_rank": sink_rank(data["first_importance"], present),
        "signal_lower": lower,
        "signal_upper": upper,
        "layer_sink_rate": mean_of_finite(rates["sink_rate"], 1),
        "model_any_sink_rate": mean_of_finite(rates["any_sink_rate"], (0, 1)),
        "layer_signal_lower": layer_lower,
        "layer_signal_upper": layer_upper,
        **_over_heads(data),
    }


def sink_rank(first_importance: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Place of each head by the mean importance of its first key: 0 is the strongest sink.

    Parameters
    ----------
    first_importance : ndarray, shape (inputs, layers, heads)
        Heads without any importance come last.
    present : ndarray of bool, shape (layers, heads)
        A head that a layer does not have is -1.

    Examples
    --------
    >>> sink_rank(np.array([[[0.1, 0.9, np.nan]]]), np.array([[True, True, False]])).tolist()
    [[1, 0, -1]]
    """
    return ranks(mean_of_finite(first_importance), present)


def first_mass_bounds(
    low: np.ndarray, high: np.ndarray, content_range: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""The least and the largest mass of the first key that contents of a range w allow.

    .. math:: \sigma(\operatorname{logit} \pi_{low} - w) \le p_0
              \le \sigma(\operatorname{logit} \pi_{high} + w)

    Both are reached, so no bound that knows only w and the prior is tighter.

    Parameters
    ----------
    low, high : ndarray, shape (...)
        Least and largest prior mass of the first key over the queries; NaN where none is known.
    content_range : ndarray, shape (ranges,)
        w, largest less least score over temperature [nats].

    Returns
    -------
    tuple of ndarray, shape (..., ranges)

    Examples
    --------
    >>> lower, upper = first_mass_bounds(np.array(0.5), np.array(0.5), np.array([0.0, np.log(3)]))
    >>> lower.round(6).tolist(), upper.round(6).tolist()
    ([0.5, 0.25], [0.5, 0.75])
    """
    return _shifted(low, -content_range), _shifted(high, content_range)


def _shifted(mass: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The mass whose log-odds are those of `mass`, shifted."""
    mass = np.asarray(mass, dtype=np.float64)[..., None]
    with np.errstate(divide="ignore", over="ignore"):
        return 1.0 / (1.0 + np.exp(-shift - (np.log(mass) - np.log1p(-mass))))


def uniform_importance(visible: np.ndarray, observers: np.ndarray, *, causal: bool) -> np.ndarray:
    """Importance of every key if each query spread its mass evenly over the keys that it sees.

    Parameters
    ----------
    visible : ndarray of int, shape (queries,)
        Keys that each query sees: its own and those before it (causal), or all.
    observers : ndarray of int, shape (keys,)
        Queries that see each key; NaN is returned where the rule gives other numbers.
    causal : bool
        Whether keys after the query are forbidden.

    Examples
    --------
    >>> uniform_importance(np.array([1, 2]), np.array([2, 1]), causal=True).tolist()
    [0.75, 0.5]
    """
    stop = np.arange(1, len(visible) + 1) if causal else np.full(len(visible), len(observers))
    start = stop - visible
    if (start < 0).any():
        return np.full(len(observers), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(visible > 0, 1.0 / visible, 0.0)
        steps, seen = np.zeros((2, len(observers) + 1))
        for each, amount in ((steps, weight), (seen, np.ones(len(visible)))):
            np.add.at(each, start, amount)
            np.subtract.at(each, stop, amount)
        count = np.cumsum(seen)[:-1]
        mean = np.cumsum(steps)[:-1] / count
    return mean if np.array_equal(count, observers) else np.full(len(observers), np.nan)


def _over_heads(data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The signal of all heads of a layer: counts summed, means weighted by them."""
    queries = data["signal_count"].sum(-1, dtype=np.float64)
    pooled = {"layer_signal_count": data["signal_count"].sum(1)}
    for name in _MEANS:
        mean = data[f"signal_{name}_mass"]
        weights = np.where(np.isfinite(mean), queries, 0.0)
        with np.errstate(invalid="ignore"):
            pooled[f"layer_signal_{name}_mass"] = (weights * np.nan_to_num(mean)).sum(
                1
            ) / weights.sum(1)
    return pooled
