"""A sink profile out of the sequences of its forward passes: means, rates, intervals, densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz.analysis.inputs import text_array
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.analysis.sink_measures import measures
from goatviz.analysis.sink_passes import PRIORS, Gathered, SinkSequence
from goatviz.analysis.sink_text import at_threshold, margin_texts
from goatviz.bins import mean_of_finite
from goatviz.results import SINK_PROFILE, make_result
from goatviz.transport.bounds import protected_length

if TYPE_CHECKING:
    import xarray as xr

_THRESHOLDS = np.round(np.linspace(0.0, 1.0, 101), 2)
_RANGE_BINS = 240
_MASS_BINS = 40


def profile_of(
    gathered: Gathered,
    names: tuple[str, ...],
    *,
    name: str,
    threshold: float,
    min_observers: int,
    tokens: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> xr.Dataset:
    layers = sorted(gathered.sequences)
    inputs = {len(sequences) for sequences in gathered.sequences.values()}
    if len(inputs) > 1:
        raise ValueError(f"every layer must be called equally often, got {sorted(inputs)} inputs")
    count = inputs.pop()
    length = max(
        s.importance.shape[1] for sequences in gathered.sequences.values() for s in sequences
    )
    heads = max(sequences[0].importance.shape[0] for sequences in gathered.sequences.values())
    shape = (len(layers), heads)
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens must hold {length} texts, one for each key, got {len(tokens)}")
    weights = bootstrap_weights(count, resamples, seed)
    out = _empty_fields(shape, length)
    first = np.full((count, *shape), np.nan, np.float32)
    anywhere = np.full((count, *shape), np.nan, np.float32)
    edges = _range_edges(gathered)
    signal = _empty_signal(shape)
    for at, layer in enumerate(layers):
        sequences = gathered.sequences[layer]
        count_heads = sequences[0].importance.shape[0]
        place = (at, slice(0, count_heads))
        out["present"][place] = True
        stacked = _importances(sequences, length, min_observers)
        for one in sequences:
            out["observers"][at, : len(one.observers)] += one.observers
        out["importance"][place] = _nanmean(stacked)
        low, high = bootstrap_interval(stacked, weights)
        out["importance_low"][place], out["importance_high"][place] = low, high
        first[:, at, :count_heads] = stacked[..., 0]
        anywhere[:, at, :count_heads] = np.fmax.reduce(stacked, axis=-1)
        _add_heads(out, place, sequences, gathered.margins[layer])
        uniform = gathered.uniform[layer]
        out["uniform_importance"][at, : len(uniform)] = uniform
        _add_signal(signal, place, sequences, edges)
    out.update(_finish_signal(signal))
    out.update(rates(first, anywhere, weights))
    mass_edges = np.linspace(0, 1, _MASS_BINS + 1)
    out["range_stop"], out["mass_stop"] = edges[1:], mass_edges[1:]
    out["first_importance"] = first
    out.update(measures(out))
    out["margin_text"] = margin_texts(out["margin"], out["protected_length"])
    out["layer_name"] = np.array([names[layer] for layer in layers])
    coords: dict[str, Any] = {
        "layer": np.array(layers),
        **{"head": np.arange(heads), "key": np.arange(length), "input": np.arange(count)},
        **{"threshold": _THRESHOLDS, "range_bin": edges[:-1], "mass_bin": mass_edges[:-1]},
    }
    if tokens is not None:
        out["token"] = text_array(tokens)
    if gathered.maps:
        out.update(_mean_maps(gathered, layers, heads, coords))
    out.update(_mean_norms(gathered, layers, length, coords))
    residuals = gathered.residuals
    if residuals:
        out["residual"] = np.array([residuals.get(layer, np.nan) for layer in layers])
    attrs = _attributes(gathered) | {
        **({"residual": max(residuals.values())} if residuals else {}),
        "source": name,
        "n_inputs": count,
        "length": length,
        "threshold": threshold,
        "min_observers": min_observers,
        "n_heads": int(out["present"].sum()),
    }
    return at_threshold(make_result(SINK_PROFILE, out, coords=coords, attrs=attrs), threshold)


def _attributes(gathered: Gathered) -> dict[str, Any]:
    """What is known of the inputs and of the calls as a whole."""
    first = gathered.sequences[min(gathered.sequences)]
    return {
        "length_min": gathered.shortest,
        "recent": gathered.recent,
        "first_key": 0,
        "causal": int(all(gathered.causal.values())),
        "confidence": 0.95,
        "n_queries": sum(one.first.shape[1] for one in first),
        "prior": max(gathered.priors, key=PRIORS.index),
        "notes": " | ".join(gathered.notes),
    }


def _importances(sequences: list[SinkSequence], length: int, min_observers: int) -> np.ndarray:
    """Importances of the keys that enough queries see, shape (inputs, heads, length)."""
    heads = len(sequences[0].importance)
    stacked = np.full((len(sequences), heads, length), np.nan, np.float32)
    for kept, one in zip(stacked, sequences, strict=True):
        seen = one.observers >= min_observers
        kept[:, : len(seen)] = np.where(seen, one.importance, np.nan)
    return stacked


def _empty_fields(shape: tuple[int, int], length: int) -> dict[str, np.ndarray]:
    """Fields over layers and heads, and over keys, without a value yet."""
    out = {
        key: np.full((*shape, length), np.nan, np.float32)
        for key in ("importance", "importance_low", "importance_high")
    }
    out["present"] = np.zeros(shape, dtype=bool)
    out["observers"] = np.zeros((shape[0], length), np.int64)
    out["uniform_importance"] = np.full((shape[0], length), np.nan)
    for key in (
        *_MEANS,
        "effective_rank",
        "margin",
        "protected_length",
        "prior_first_low",
        "prior_first_high",
    ):
        out[key] = np.full(shape, np.nan)
    return out


def _effective_rank(one: SinkSequence) -> np.ndarray:
    r"""exp of the information that a query gives about its key, H(mean of p_i) - mean of H(p_i).

    1 for a plan whose rows are all equal, which has rank one, and at most the number of queries.
    The extra column of a sink counts as one more key.
    """
    queries = np.isfinite(one.entropy).sum(-1, keepdims=True)
    mean = np.where(one.observers > 0, one.importance, 0.0).astype(np.float64)
    column = mean_of_finite(one.column, axis=-1)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.concatenate([mean * one.observers / queries, column], -1)
        entropy = -np.where(mean > 0, mean * np.log(mean), 0.0).sum(-1)
    return np.exp(entropy - mean_of_finite(one.entropy, axis=-1))


def _add_heads(
    out: dict[str, np.ndarray],
    place: tuple[int, slice],
    sequences: list[SinkSequence],
    margins: np.ndarray,
) -> None:
    """Means over the queries of a layer's heads, their margins, and the range of their prior."""
    for key, attribute in _MEANS.items():
        each = [mean_of_finite(getattr(one, attribute), axis=-1) for one in sequences]
        out[key][place] = mean_of_finite(np.stack(each))
    ranks = [_effective_rank(one) for one in sequences]
    out["effective_rank"][place] = mean_of_finite(np.stack(ranks))
    out["margin"][place] = margins
    known = ~np.isnan(margins)
    lengths = np.full(len(margins), np.nan)
    lengths[known] = protected_length(margins[known])
    out["protected_length"][place] = lengths
    mass = np.concatenate([one.prior_first[:, one.counted] for one in sequences], axis=1)
    if mass.shape[1] and np.isfinite(mass).any():
        out["prior_first_low"][place] = np.nanmin(mass, axis=1)
        out["prior_first_high"][place] = np.nanmax(mass, axis=1)


_MEANS = {
    "first_mass": "first",
    "largest_mass": "largest",
    "recent_mass": "recent",
    "sink_column_mass": "column",
    "entropy": "entropy",
    "content_range": "content_range",
    "uniform_entropy": "uniform_entropy",
    "previous_mass": "previous",
    "induction_mass": "induction",
}


def rates(first: np.ndarray, anywhere: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Shares above each threshold; where no importance is known, nothing is counted."""
    shares = {}
    # Compared in float32, as importances are: 0.1 is not above 0.1.
    limits = _THRESHOLDS.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, values in (("sink_rate", first), ("any_sink_rate", anywhere)):
            known = (~np.isnan(values)).sum(0)
            shares[name] = np.stack([(values > at).sum(0) / known for at in limits], axis=-1)
        known = (~np.isnan(first)).sum((1, 2))
        by_input = np.stack([(first > at).sum((1, 2)) / known for at in limits], axis=-1)
    low, high = bootstrap_interval(by_input, weights)
    return {
        **shares,
        "model_sink_rate": _nanmean(by_input),
        "model_sink_rate_low": low,
        "model_sink_rate_high": high,
    }


def _nanmean(values: np.ndarray) -> np.ndarray:
    valid = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(valid, values, 0.0).sum(0) / valid.sum(0)


def _range_edges(gathered: Gathered) -> np.ndarray:
    largest = max(
        (
            float(np.nanmax(one.content_range[:, one.counted]))
            for sequences in gathered.sequences.values()
            for one in sequences
            if one.counted.any()
        ),
        default=1.0,
    )
    largest = largest if largest > 0 else 1.0
    return np.linspace(0.0, largest * (1 + 1e-9), _RANGE_BINS + 1)


def _empty_signal(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {
        "count": np.zeros((*shape, _RANGE_BINS, _MASS_BINS), np.int32),
        **{key: np.zeros((*shape, _RANGE_BINS)) for key in ("first", "largest", "recent")},
    }


def _add_signal(
    signal: dict[str, np.ndarray],
    place: tuple[int, slice],
    sequences: list[SinkSequence],
    edges: np.ndarray,
) -> None:
    layer = place[0]
    for one in sequences:
        counted = one.counted
        for head in range(one.first.shape[0]):
            x, y = one.content_range[head, counted], one.first[head, counted]
            column = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, _RANGE_BINS - 1)
            row = np.clip((y * _MASS_BINS).astype(int), 0, _MASS_BINS - 1)
            np.add.at(signal["count"][layer, head], (column, row), 1)
            for key in ("first", "largest", "recent"):
                np.add.at(signal[key][layer, head], column, getattr(one, key)[head, counted])


def _finish_signal(signal: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = signal["count"].sum(-1)
    out = {"signal_count": signal["count"]}
    with np.errstate(invalid="ignore", divide="ignore"):
        for key in ("first", "largest", "recent"):
            out[f"signal_{key}_mass"] = signal[key] / total
    return out


def _mean_maps(
    gathered: Gathered, layers: list[int], heads: int, coords: dict[str, Any]
) -> dict[str, np.ndarray]:
    size = min(
        weights.shape[-1] for sequences in gathered.maps.values() for _, weights, _ in sequences
    )
    shape = (len(layers), heads, size, size)
    out = {
        "map_logits": np.full(shape, np.nan),
        "map_probability": np.full(shape, np.nan),
        "map_allowed": np.zeros((len(layers), size, size), dtype=bool),
    }
    for at, layer in enumerate(layers):
        for place, key in enumerate(("map_logits", "map_probability")):
            cut = [entry[place][:, :size, :size] for entry in gathered.maps[layer]]
            out[key][at, : len(cut[0])] = _nanmean(np.stack(cut))
        out["map_allowed"][at] = np.any(
            [entry[2][:size, :size] for entry in gathered.maps[layer]], axis=0
        )
    coords["map_query"] = coords["map_key"] = np.arange(size)
    return out


def _mean_norms(
    gathered: Gathered, layers: list[int], length: int, coords: dict[str, Any]
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    if all(
        one.value_norm is not None for sequences in gathered.sequences.values() for one in sequences
    ):
        norm = np.full((len(layers), length), np.nan)
        for at, layer in enumerate(layers):
            norm[at] = _over_keys([one.value_norm for one in gathered.sequences[layer]], length)
        out["value_norm"] = norm
    if not gathered.hidden:
        return out
    states = len(gathered.hidden[0])
    for key, name in (
        ("norm", "hidden_norm"),
        ("largest", "hidden_largest"),
        ("massive", "massive"),
    ):
        out[name] = np.stack(
            [
                _over_keys([row for one in gathered.hidden for row in one[s][key]], length)
                for s in range(states)
            ]
        )
    # An input of one token has no others.
    ratios = [
        [row[0] / mean_of_finite(row[1:]) for one in gathered.hidden for row in one[s]["norm"]]
        for s in range(states)
    ]
    out["norm_ratio"] = mean_of_finite(np.array(ratios), axis=1)
    for key, name in (("entropy", "hidden_entropy"), ("anisotropy", "hidden_anisotropy")):
        if key in gathered.hidden[0][0]:
            each = [[one[s][key] for one in gathered.hidden] for s in range(states)]
            out[name] = np.array([np.concatenate(chunks).mean() for chunks in each])
    medians = [[one[s]["median"] for one in gathered.hidden] for s in range(states)]
    out["hidden_median"] = np.array([np.concatenate(chunks).mean() for chunks in medians])
    coords["state"] = np.arange(states)
    return out


def _over_keys(rows: list[np.ndarray], length: int) -> np.ndarray:
    padded = np.full((len(rows), length), np.nan)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return _nanmean(padded)
