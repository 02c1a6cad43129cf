"""A learned prior taken apart: sink, kernel, spectrum, the induced plan and its margin.

Every number is exact at any length: curves and rows that are too long to list are pooled in bins
(mean, least, largest, or mass). The numbers come from `prior_curves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from goatviz import checks
from goatviz.adapters.capture import find_attention
from goatviz.adapters.goat_attention import is_goat_attention, read_goat_attention
from goatviz.analysis.prior_curves import (
    PriorCurves,
    PriorSource,
    binned_log_prior,
    direct_rows,
    even_rows,
    induced_rows,
    key_bins,
    lag_edges,
    pooled_curves,
    prior_spectrum,
)
from goatviz.attention.layer import Attention
from goatviz.bins import bin_mean, curve_edges, ranks
from goatviz.models import CausalLM
from goatviz.priors.base import Prior
from goatviz.priors.sink import SinkPrior
from goatviz.results import PRIOR_PROFILE, check_result, make_result

if TYPE_CHECKING:
    import xarray as xr

#: Positions of the widest window.
_WINDOW = 1024


def prior_sources(
    source: Prior | nn.Module | Sequence[PriorSource],
    *,
    causal: bool | None = None,
    length: int | None = None,
) -> list[PriorSource]:
    """The explicit priors of a model or prior, in the order of the module tree.

    Parameters
    ----------
    source : Prior, nn.Module or sequence of PriorSource
        A prior; a goatviz model or layer; any module that contains goatviz `Attention` layers or
        goat-attention's GoatAttention; or a list of sources.
    causal : bool, optional
        Overrides the layers' own setting; needed for a module that has none (default: causal).
    length : int, optional
        Number of tokens, for goat-attention modules that normalise by the current length.

    Raises
    ------
    TypeError
        If `source` has no explicit prior (the message says what to do), or `causal` is not a bool.
    """
    if causal is not None:
        checks.flag("causal", causal)
    if isinstance(source, list) and source and all(isinstance(s, PriorSource) for s in source):
        return source if causal is None else [replace(s, causal=causal) for s in source]
    if isinstance(source, Prior):
        causal = True if causal is None else causal
        return [PriorSource(type(source).__name__, source, causal, _training_length(source))]
    checks.instance("source", source, nn.Module, "a goatviz Prior, a model or a prior profile")
    of_model = source.config.training_length if isinstance(source, CausalLM) else None
    sources = []
    for path, module in source.named_modules():
        name = path or type(module).__name__
        if isinstance(module, Attention):
            known = _training_length(module.prior) or of_model
            both = module.causal if causal is None else causal
            sources.append(PriorSource(name, module.prior, both, known))
        elif is_goat_attention(module):
            sources.append(_read_goat_source(name, module, causal, length))
    if not sources:
        raise TypeError(_no_prior(source))
    return sources


def _read_goat_source(
    name: str, module: nn.Module, causal: bool | None, length: int | None
) -> PriorSource:
    """The prior of one of goat-attention's modules."""
    known = module.training_seq_len
    unsettled = module.pos_encoding == "auto"
    record = read_goat_attention(
        module, causal=causal, length=length or known or 128, axes=0 if unsettled else None
    )
    notes = record.notes
    if unsettled:
        notes = [*notes, "pos_encoding='auto': read as a sequence, not as a grid"]
    return PriorSource(name, record.prior, record.causal, known, notes)


def _no_prior(model: nn.Module) -> str:
    """The error for a model without an explicit prior, which says what to do instead."""
    name = type(model).__name__
    if find_attention(model):
        return (
            f"{name} has no explicit prior; plot_prior(model, inputs) draws the one its logits "
            "imply (goatviz.implied_prior), explore_prior(model, inputs) explores it"
        )
    return (
        f"{name} has no explicit prior and no attention that goatviz can watch: pass a Prior, or "
        "draw plans of your own scores with goatviz.plot_plan(goatviz.solve_rows(scores))"
    )


def has_explicit_prior(source: object) -> bool:
    """Whether the source is a prior, or a module with attention whose prior is not uniform."""
    if isinstance(source, Prior):
        return True
    if not isinstance(source, nn.Module):
        return False
    layers = [module for module in source.modules() if isinstance(module, Attention)]
    learned = any(layer.prior.kind != "uniform" for layer in layers)
    return learned or any(is_goat_attention(module) for module in source.modules())


def _training_length(prior: Prior) -> int | None:
    lengths = (p.training_length for p in prior.modules() if isinstance(p, SinkPrior))
    return next(lengths, None)


def prior_profile(
    source: Prior | nn.Module | Sequence[PriorSource],
    *,
    length: int | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | int | None = None,
    resolution: int = 128,
    points: int = 1024,
    queries: slice | None = None,
    keys: slice | None = None,
    causal: bool | None = None,
) -> xr.Dataset:
    r"""Take a prior apart: K = kappa(i - j) + u(j), pi(j | i) = exp(K_ij) / sum_j' exp(K_ij').

    Parameters
    ----------
    source : Prior, nn.Module or list of PriorSource
        See `prior_sources`.
    length : int, optional
        Number of tokens; default the training length, or 128 where there is none.
    layers, heads : int or sequence of int, optional
        Numbers of the layers and heads; default all. Heads are parameter sets: key-value heads
        under grouped queries.
    resolution : int
        Number of rows and of key bins of the matrices if the length exceeds it; at least 2.
    points : int
        Number of points of the curves over key and lag if the length exceeds it: the first quarter
        is exact, the rest are bins of equal width; at least 8.
    queries, keys : slice, optional
        An exact window (steps of 1) instead of the pooled matrix, at most 1,024 wide.
    causal : bool, optional
        Overrides the layers' own setting.

    Returns
    -------
    xarray.Dataset
        Schema "prior_profile" (`goatviz.results.PRIOR_PROFILE`), log-priors in nats. The recency
        is 0 on the diagonal; probabilities are exact masses, normalised over the whole row; row
        centring subtracts the mean over the keys that the query may see. Heads that a layer does
        not have are NaN and not `present`; a prior that is not a sum of a function of the lag and
        one of the key has curves of NaN, and `notes` says so.

    Raises
    ------
    TypeError
        If `source` has no explicit prior.
    ValueError
        If a number is out of range, a window lies outside the length, or the prior is on a grid.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380), Figure 1.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> profile = prior_profile(ALiBiPrior(2), length=16)
    >>> profile["margin"].sel(layer=0, head=0, query=15).item()
    0.0625
    """
    if length is None:
        known = (s.training_length for s in prior_sources(source, causal=causal))
        length = next(filter(None, known), 128)
    length = checks.positive_int("length", length)
    sources = prior_sources(source, causal=causal, length=length)
    numbers = [at if s.layer is None else s.layer for at, s in enumerate(sources)]
    layers = _chosen_layers(layers, numbers)
    chosen = [sources[numbers.index(number)] for number in layers]
    heads = checks.indices("heads", heads, max(s.prior.num_heads for s in chosen))
    checks.integer("resolution", resolution, low=2)
    checks.integer("points", points, low=8)
    view = _View(
        *_rows(queries, length, resolution),
        *_bins(keys, length, resolution),
        keys=curve_edges(0, length, points),
        lags=lag_edges(length, points, causal=all(s.causal for s in chosen)),
    )
    profiles = [_profile_layer(s, heads, length, view) for s in chosen]
    notes = dict.fromkeys(note for layer in profiles for note in layer.pop("notes"))
    data = _stacked(profiles)
    data["margin_rank"] = ranks(data["margin"][..., -1], data["present"])
    data["kernel_rank"] = ranks(data["kernel_range"], data["present"])
    data |= view.stops
    attrs = {
        "length": length,
        "training_length": next((s.training_length for s in sources if s.training_length), 0),
        "source": type(source).__name__,
        "num_layers": len(sources),
        "pooled": int(length > points or (keys is None and length > resolution)),
        "rows": view.row_note,
        "notes": "; ".join(notes),
    }
    coords = {"layer": layers, "head": heads, "rank": np.arange(data["frequency"].shape[-1])}
    return make_result(PRIOR_PROFILE, data, coords=coords | view.starts, attrs=attrs)


@dataclass(frozen=True)
class _View:
    """The part that a profile shows: rows and key bins of its matrices, and bins of its curves."""

    rows: np.ndarray
    row_note: str
    bins: np.ndarray
    shown: slice
    keys: np.ndarray
    lags: np.ndarray

    @property
    def starts(self) -> dict[str, np.ndarray]:
        """Coordinates, where bins begin."""
        of_bins = self.bins[:-1][self.shown]
        return {
            "query": self.rows,
            "key_bin": of_bins,
            "key": self.keys[:-1],
            "lag": self.lags[:-1],
        }

    @property
    def stops(self) -> dict[str, np.ndarray]:
        """Ends of these bins."""
        of_bins = self.bins[1:][self.shown]
        return {"bin_stop": of_bins, "key_stop": self.keys[1:], "lag_stop": self.lags[1:]}


def _rows(queries: slice | None, length: int, resolution: int) -> tuple[np.ndarray, str]:
    """The queries of the matrices, and a caption for them."""
    if queries is not None:
        start, stop = _window(queries, length, "queries")
        return np.arange(start, stop), f"queries {start} to {stop - 1}"
    rows = even_rows(length, resolution)
    return rows, "every query" if len(rows) == length else f"{len(rows)} queries, evenly spaced"


def _bins(keys: slice | None, length: int, resolution: int) -> tuple[np.ndarray, slice]:
    """Edges of bins over all keys, and which of the bins are shown."""
    if keys is None:
        return key_bins(length, resolution), slice(None)
    start, stop = _window(keys, length, "keys")
    edges = np.unique(np.concatenate([[0], np.arange(start, stop + 1), [length]]))
    before = int(start > 0)
    return edges, slice(before, before + stop - start)


def _profile_layer(
    source: PriorSource, heads: list[int], length: int, view: _View
) -> dict[str, Any]:
    """One layer's fields: arrays over all of `heads`, empty for those that the layer lacks."""
    present = np.array([head < source.prior.num_heads for head in heads])
    curves = PriorCurves(source, [h for h in heads if h < source.prior.num_heads], length)
    sink, relative, recency = curves.sink(), curves.relative(), curves.recency()
    kernel = relative + recency
    misfit = curves.misfit()
    if misfit or not curves.finite:
        fields = direct_rows(curves, view.rows, view.bins)
    else:
        fields = induced_rows(sink, kernel, view.rows, view.bins)
        fields |= binned_log_prior(sink, kernel, view.rows, view.bins)
    seen = view.bins[:-1] <= view.rows[:, None] if source.causal else True
    fields["allowed"] = np.broadcast_to(seen, fields["probability"].shape)
    for name in ("log_prior", "row_centred", "probability"):
        fields[name] = fields[name].astype(np.float32)
    for name in ("log_prior", "row_centred", "probability", "allowed"):
        fields[name] = fields[name][..., view.shown]
    first = curves.first_lag
    lags = view.lags[view.lags >= first] - first
    lines = pooled_curves(sink, kernel, view.keys, lags) | {
        "relative": bin_mean(relative, lags),
        "recency": bin_mean(recency, lags),
    }
    ahead = ((0, 0), (len(view.lags) - len(lags), 0))
    for name in ("kernel", "kernel_low", "kernel_high", "relative", "recency"):
        lines[name] = np.pad(lines[name], ahead, constant_values=np.nan)
    lines |= {
        "recency_slope": recency[:, -first] - recency[:, min(1 - first, recency.shape[-1] - 1)],
        "kernel_range": np.ptp(kernel, axis=-1),
        "relative_range": np.ptp(relative, axis=-1),
    }
    if misfit:
        lines = {name: np.full_like(values, np.nan) for name, values in lines.items()}
    frequency, amplitude, phase = prior_spectrum(curves.prior)
    fields |= lines | {"amplitude": amplitude[curves.heads], "phase": phase[curves.heads]}
    unfit = f"{source.name} is not a function of the lag plus one of the key: it has no curves"
    return {name: _spread(values, present) for name, values in fields.items()} | {
        "layer_name": source.name,
        "causal": source.causal,
        "present": present,
        "frequency": frequency,
        "notes": [*source.notes, *([unfit] if misfit else [])],
    }


def _spread(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """An array over the present heads as one over all heads, with NaN or False for the others."""
    empty = False if values.dtype == bool else np.nan
    out = np.full((len(present), *values.shape[1:]), empty, dtype=values.dtype)
    out[present] = values
    return out


def _stacked(layers: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The fields of all layers, with spectra padded by NaN to the same rank."""
    most = max(len(layer["frequency"]) for layer in layers)
    data = {}
    for name in layers[0]:
        values = [layer[name] for layer in layers]
        if name in ("frequency", "amplitude", "phase"):
            filled = [np.full((*v.shape[:-1], most), np.nan) for v in values]
            for whole, known in zip(filled, values, strict=True):
                whole[..., : known.shape[-1]] = known
            values = filled
        data[name] = np.stack(values)
    return data


def _window(window: slice, length: int, name: str) -> tuple[int, int]:
    start, stop = checks.window(name, window, length)
    bounds = (window.start, window.stop)
    if any(bound is not None and not -length <= bound <= length for bound in bounds):
        raise ValueError(f"{name} must lie within {length} tokens, got {window}")
    if stop - start > _WINDOW:
        raise ValueError(f"{name} must hold at most {_WINDOW:,} positions, got {stop - start}")
    return start, stop


def _chosen_layers(layers: Sequence[int] | int | None, numbers: list[int]) -> list[int]:
    if layers is None:
        return numbers
    layers = [layers] if isinstance(layers, int | np.integer) else layers
    if numbers == list(range(len(numbers))):
        return checks.indices("layers", layers, len(numbers))
    return [checks.one_of("layers", checks.integer("layers", n), numbers) for n in layers]


def prior_summary(profile: xr.Dataset) -> list[str]:
    """One sentence for each head on its sink and its kernel, for captions and screen readers.

    Parameters
    ----------
    profile : xarray.Dataset
        From `prior_profile`; its last query is read.

    Returns
    -------
    list of str
        The sentences of all heads that are present.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> prior_summary(prior_profile(ALiBiPrior(1, slopes=[1.0]), length=8))
    ['layer 0, head 0: top key 7 by 1.00 nats (63% of the prior), kernel highest at lag 0']
    """
    check_result(profile, PRIOR_PROFILE)
    last = profile.isel(query=-1)
    sentences = []
    for layer in np.atleast_1d(profile["layer"].values):
        for head in np.atleast_1d(profile["head"].values):
            row = last
            for name, number in (("layer", layer), ("head", head)):
                row = row.sel({name: number}) if name in row.dims else row
            if bool(row["present"]):
                sentences.append(f"layer {layer}, head {head}: {_sentence(row)}")
    return sentences


def _sentence(row: xr.Dataset) -> str:
    """The top key of one head's row, and the lag at which its kernel is highest."""
    margin, kernel = float(row["margin"]), row["kernel"].values
    lead = "no top key"
    if margin > 0:
        share = f"{float(row['top_mass']):.0%} of the prior"
        lead = f"top key {int(row['margin_key'])} by {margin:.2f} nats ({share})"
    if np.isnan(kernel).all():
        return f"{lead}, no kernel"
    if not np.any(np.nan_to_num(kernel)):
        return f"{lead}, kernel flat"
    return f"{lead}, kernel highest at lag {int(row['lag'].values[np.nanargmax(kernel)])}"
