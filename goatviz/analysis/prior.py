"""A learned prior taken apart: sink, kernel, spectrum, the induced plan and its margin.

Every number is exact at any length: what is too long to list is pooled in bins (mean, least,
largest, or mass), streamed in blocks and never held as a length x length array.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.goat_attention import find_goat_attention, read_goat_attention
from goatviz.attention.layer import Attention
from goatviz.models import CausalLM
from goatviz.priors.base import Prior, ScaledPrior
from goatviz.priors.sink import SinkPrior
from goatviz.priors.spectral import SpectralPrior
from goatviz.results import PRIOR_PROFILE, check_result, make_result

#: Elements of the largest temporary block, float64: 32 MB.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class PriorSource:
    """A prior found somewhere, and what is known about its use.

    Attributes
    ----------
    name : str
        Path of the module, or the prior's class.
    prior : Prior
        As found; parameters are shared, not copied.
    causal : bool
        Whether later keys are forbidden.
    training_length : int or None
        T in tokens, where the prior or the model has one.
    notes : list of str
        What a figure has to say beside it.
    layer : int or None
        Number of the layer in its model, where it is not the place among the sources.
    """

    name: str
    prior: Prior
    causal: bool
    training_length: int | None = None
    notes: list[str] = field(default_factory=list)
    layer: int | None = None


def prior_sources(
    source: Prior | nn.Module | Sequence[PriorSource],
    *,
    causal: bool | None = None,
    length: int | None = None,
) -> list[PriorSource]:
    """The explicit priors of anything that has some, in the module tree's order.

    Parameters
    ----------
    source : Prior, nn.Module or sequence of PriorSource
        A prior; a goatviz model or layer; any module tree with goatviz `Attention` layers or
        goat-attention's GoatAttention inside; or sources, returned as they are.
    causal : bool, optional
        Overrides what the layers say; needed where the module does not know (default: causal).
    length : int, optional
        For goat-attention modules that normalise by the current length.

    Raises
    ------
    TypeError
        If `source` has no explicit prior; the message says what to do.
    """
    if isinstance(source, list) and source and all(isinstance(s, PriorSource) for s in source):
        return source
    if isinstance(source, Prior):
        return [
            PriorSource(
                type(source).__name__,
                source,
                True if causal is None else causal,
                _training_length(source),
            )
        ]
    if not isinstance(source, nn.Module):
        raise TypeError(
            "expected a goatviz Prior, a model with goatviz Attention or goat-attention's "
            f"GoatAttention inside, or a prior_profile; got {type(source).__name__}"
        )
    own_length = source.config.training_length if isinstance(source, CausalLM) else None
    found = []
    goats = find_goat_attention(source)
    for path, module in source.named_modules():
        if isinstance(module, Attention):
            found.append(
                PriorSource(
                    path or type(module).__name__,
                    module.prior,
                    module.causal if causal is None else causal,
                    _training_length(module.prior) or own_length,
                )
            )
        elif path in goats:
            either = module.pos_encoding == "auto"
            record = read_goat_attention(
                module,
                causal=causal,
                length=length or _fallback_length(module),
                axes=0 if either else None,
                path=path,
            )
            notes = record.notes
            if either:
                notes = [*notes, "pos_encoding='auto': read as a sequence, not as a grid"]
            found.append(
                PriorSource(
                    path or type(module).__name__,
                    record.prior,
                    record.causal,
                    module.training_seq_len,
                    notes,
                )
            )
    if not found:
        raise TypeError(
            f"{type(source).__name__} has no explicit prior: no goatviz Attention and no "
            "goat-attention GoatAttention inside. Standard attention has a uniform prior; "
            "look at its plan with goatviz.solve_rows(scores) and goatviz.plot_plan(plan), or "
            "pass a Prior"
        )
    return found


def prior_profile(
    source: Prior | nn.Module,
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
    source : Prior or nn.Module
        See `prior_sources`.
    length : int, optional
        Tokens; default the training length, or 128 where there is none. Any length is possible.
    layers, heads : int or sequence of int, optional
        Which, by their numbers; default all. Heads are parameter sets: key-value heads under
        grouped queries.
    resolution : int
        Rows and key bins of the matrices when the length exceeds it.
    points : int
        Points of the curves over key and lag when the length exceeds it: the first quarter is
        exact, the rest are bins of equal width.
    queries, keys : slice, optional
        An exact window (steps of 1) instead of the pooled matrix, at most 1,024 wide.
    causal : bool, optional
        Overrides what the layers say.

    Returns
    -------
    xarray.Dataset
        Schema "prior_profile" (`goatviz.results.PRIOR_PROFILE`). Log-priors are in nats; the
        recency is in the gauge that is 0 on the diagonal; probabilities are exact masses, of the
        normaliser over the whole row. Row centring subtracts the mean over the keys that the
        query may see. Heads a layer does not have are NaN and `present` is False.

    Raises
    ------
    TypeError
        If `source` has no explicit prior.
    ValueError
        For a length below 1, a window outside the length, a prior on a grid, or a layer or head
        that is not there (the message says which are).

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
    if length is not None:
        length = _check_length(length)
    if length is None:
        known = prior_sources(source, causal=causal)
        length = next((s.training_length for s in known if s.training_length), 128)
    sources = prior_sources(source, causal=causal, length=length)
    numbers = [at if s.layer is None else s.layer for at, s in enumerate(sources)]
    chosen = [numbers.index(n) for n in _choose_layers(layers, numbers)]
    most = max(sources[index].prior.num_heads for index in chosen)
    head_ids = _choose(heads, most, "head")
    if resolution < 2 or points < 8:
        raise ValueError(
            f"resolution must be at least 2 and points at least 8, got {resolution}, {points}"
        )
    rows, row_note = _rows(queries, length, resolution)
    edges, inner = _matrix_edges(keys, length, resolution)
    key_edges = curve_edges(0, length, points)
    any_two_sided = any(not sources[index].causal for index in chosen)
    lag_edges = curve_edges(0, length, points)
    if any_two_sided:
        lag_edges = np.unique(np.concatenate([1 - lag_edges, lag_edges]))
    ranks = max((prior_spectrum(sources[i].prior)[0].shape[0] for i in chosen), default=0)

    shape = (len(chosen), len(head_ids))
    data: dict[str, Any] = {
        "layer_name": np.array([sources[i].name for i in chosen], dtype=object).astype(str),
        "causal": np.array([sources[i].causal for i in chosen]),
        "present": np.zeros(shape, dtype=bool),
        "frequency": np.full((len(chosen), ranks), np.nan),
    }
    for name, tail in (
        ("sink", len(key_edges) - 1),
        ("sink_low", len(key_edges) - 1),
        ("sink_high", len(key_edges) - 1),
        ("kernel", len(lag_edges) - 1),
        ("kernel_low", len(lag_edges) - 1),
        ("kernel_high", len(lag_edges) - 1),
        ("relative", len(lag_edges) - 1),
        ("recency", len(lag_edges) - 1),
        ("amplitude", ranks),
        ("phase", ranks),
        ("margin", len(rows)),
        ("margin_key", len(rows)),
        ("top_mass", len(rows)),
        ("prior_entropy", len(rows)),
    ):
        data[name] = np.full((*shape, tail), np.nan)
    data["recency_slope"] = np.full(shape, np.nan)
    cells = inner.stop - inner.start
    for name in ("log_prior", "row_centred", "probability"):
        data[name] = np.full((*shape, len(rows), cells), np.nan, dtype=np.float32)
    data["allowed"] = np.zeros((*shape, len(rows), cells), dtype=bool)

    for at, index in enumerate(chosen):
        found = sources[index]
        if found.prior.axes:
            raise ValueError(
                f"{found.name} has a prior on a grid of {found.prior.axes} axes: its kernel is a "
                "function of a vector lag, and profiles are of sequences. Ask the prior itself: "
                "prior.log_prior(grid_positions(h, w), grid_positions(h, w))"
            )
        prior = copy.deepcopy(found.prior).to(device="cpu", dtype=torch.float64)
        own_heads = prior.num_heads
        take = [h for h in head_ids if h < own_heads]
        put = [head_ids.index(h) for h in take]
        data["present"][at, put] = True
        with torch.no_grad():
            layer = _curves(prior, found.causal, length, key_edges, lag_edges)
            layer |= _matrices(prior, found.causal, length, rows, edges, inner, take)
            frequency, amplitude, phase = prior_spectrum(prior)
        for name, values in layer.items():
            picked = values if name in _MATRIX_FIELDS else values[take]
            data[name][at, put] = picked
        data["frequency"][at, : len(frequency)] = frequency
        data["amplitude"][at][put, : len(frequency)] = amplitude[take]
        data["phase"][at][put, : len(frequency)] = phase[take]

    data["key_stop"] = key_edges[1:]
    data["lag_stop"] = lag_edges[1:]
    data["bin_stop"] = edges[inner.start + 1 : inner.stop + 1]
    notes = list(dict.fromkeys(note for i in chosen for note in sources[i].notes))
    pooled = length > points or (keys is None and length > resolution)
    return make_result(
        PRIOR_PROFILE,
        data,
        coords={
            "layer": [numbers[i] for i in chosen],
            "head": head_ids,
            "key": key_edges[:-1],
            "lag": lag_edges[:-1],
            "rank": np.arange(ranks),
            "query": rows,
            "key_bin": edges[inner.start : inner.stop],
        },
        attrs={
            "length": length,
            "training_length": next((s.training_length for s in sources if s.training_length), 0),
            "source": type(source).__name__,
            "num_layers": len(sources),
            "pooled": int(pooled),
            "rows": row_note,
            "notes": "; ".join(notes),
        },
    )


_MATRIX_FIELDS = frozenset(
    {
        "log_prior",
        "row_centred",
        "probability",
        "allowed",
        "margin",
        "margin_key",
        "top_mass",
        "prior_entropy",
    }
)


def _curves(
    prior: Prior, causal: bool, length: int, key_edges: np.ndarray, lag_edges: np.ndarray
) -> dict[str, np.ndarray]:
    heads = prior.num_heads
    sink = np.zeros((heads, length))
    first_lag = 0 if causal else -(length - 1)
    lags = length - first_lag
    relative, recency = np.zeros((heads, lags)), np.zeros((heads, lags))
    for part in prior.components().values():
        if part.kind == "key":
            sink += _over_keys(part, length)
        elif part.kind == "recency":
            recency += _over_lags(part, first_lag, length)
        elif part.kind == "relative":
            relative += _over_lags(part, first_lag, length)
    kernel = relative + recency
    own = lag_edges[lag_edges >= first_lag]
    missing = len(lag_edges) - len(own)
    out: dict[str, np.ndarray] = {
        "recency_slope": recency[:, -first_lag]
        - (recency[:, -first_lag + 1] if lags > -first_lag + 1 else recency[:, -first_lag])
    }
    out["sink"], out["sink_low"], out["sink_high"] = pool_curve(sink, key_edges)
    pads = ((0, 0), (missing, 0))
    for name, values in (
        *zip(
            ("kernel", "kernel_low", "kernel_high"),
            pool_curve(kernel, own - first_lag),
            strict=True,
        ),
        ("relative", pool_curve(relative, own - first_lag)[0]),
        ("recency", pool_curve(recency, own - first_lag)[0]),
    ):
        out[name] = np.pad(values, pads, constant_values=np.nan)
    return out


def _over_keys(part: Prior, length: int) -> np.ndarray:
    blocks = [
        part.log_prior([0], torch.arange(start, min(start + _BLOCK // 16, length)))[:, 0]
        for start in range(0, length, _BLOCK // 16)
    ]
    return torch.cat(blocks, dim=-1).expand(part.num_heads, -1).numpy()


def _over_lags(part: Prior, first: int, length: int) -> np.ndarray:
    """A function of the lag alone, at lags first .. length - 1."""
    blocks = []
    for start in range(first, length, _BLOCK // 16):
        stop = min(start + _BLOCK // 16, length)
        query = max(stop - 1, 0)
        lags = torch.arange(start, stop)
        blocks.append(part.log_prior([query], query - lags)[:, 0])
    return torch.cat(blocks, dim=-1).numpy()


def pool_curve(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, least and largest in the bins between `edges`, along the last axis."""
    starts = edges[:-1].astype(np.intp)
    width = np.diff(edges)
    mean = np.add.reduceat(values, starts, axis=-1) / width
    return (
        mean,
        np.minimum.reduceat(values, starts, axis=-1),
        np.maximum.reduceat(values, starts, axis=-1),
    )


def _matrices(
    prior: Prior,
    causal: bool,
    length: int,
    rows: np.ndarray,
    edges: np.ndarray,
    inner: slice,
    heads: list[int],
) -> dict[str, np.ndarray]:
    """Row statistics and binned matrices of the induced prior, streamed over blocks of keys."""
    row_index = torch.as_tensor(rows)
    n_rows, n_bins, n_heads = len(rows), len(edges) - 1, len(heads)
    bin_log = torch.full((n_heads, n_rows, n_bins), -torch.inf, dtype=torch.float64)
    bin_sum = torch.zeros(n_heads, n_rows, n_bins, dtype=torch.float64)
    bin_count = torch.zeros(n_rows, n_bins, dtype=torch.float64)
    top = torch.full((n_heads, n_rows, 2), -torch.inf, dtype=torch.float64)
    top_key = torch.zeros(n_heads, n_rows, dtype=torch.long)
    peak = torch.full((n_heads, n_rows), -torch.inf, dtype=torch.float64)
    mass = torch.zeros(n_heads, n_rows, dtype=torch.float64)
    weighted = torch.zeros(n_heads, n_rows, dtype=torch.float64)
    gauge = prior.log_prior(row_index, [0])[heads]
    gauge = gauge - _window(prior, row_index, torch.zeros(1, dtype=torch.long))[heads]
    width = max(1, _BLOCK // max(1, n_rows * n_heads))
    last = int(rows.max()) + 1 if causal else length
    for start in range(0, last, width):
        stop = min(start + width, last)
        keys = torch.arange(start, stop)
        # Rows are sorted: those before the block see none of it, those after it see all of it.
        first = int(np.searchsorted(rows, start)) if causal else 0
        partly = int(np.searchsorted(rows, stop - 1)) if causal else 0
        block = _window(prior, row_index[first:], keys)[heads] + gauge[:, first:]
        allowed = torch.ones(n_rows - first, len(keys), dtype=torch.bool)
        if partly > first:
            allowed[: partly - first] = keys <= row_index[first:partly, None]
            block[:, : partly - first].masked_fill_(~allowed[: partly - first], -torch.inf)
        best, best_at = block.max(dim=-1)
        second = block.scatter(-1, best_at.unsqueeze(-1), -torch.inf).amax(dim=-1)
        here = (slice(None), slice(first, None))
        top_key[here] = torch.where(best > top[*here, 0], keys[best_at], top_key[here])
        candidates = torch.cat([top[here], torch.stack([best, second], dim=-1)], dim=-1)
        top[here] = candidates.topk(2, dim=-1).values
        new_peak = torch.maximum(peak[here], best)
        shrink = torch.where(peak[here] == new_peak, 1.0, (peak[here] - new_peak).exp())
        weights = (block - new_peak.unsqueeze(-1)).exp()
        if partly > first:
            block[:, : partly - first].masked_fill_(~allowed[: partly - first], 0.0)
        mass[here] = mass[here] * shrink + weights.sum(-1)
        weighted[here] = weighted[here] * shrink + torch.linalg.vecdot(weights, block)
        peak[here] = new_peak
        bins = slice(
            int(np.searchsorted(edges, start, side="right")) - 1,
            int(np.searchsorted(edges, stop - 1, side="right")),
        )
        offsets = np.maximum(edges[bins] - start, 0)
        in_bins = _sum_bins(weights, offsets).log() + new_peak.unsqueeze(-1)
        bin_log[*here, bins] = torch.logaddexp(bin_log[*here, bins], in_bins)
        bin_sum[*here, bins] += _sum_bins(block, offsets)
        bin_count[first:, bins] += _sum_bins(allowed.double(), offsets)
    log_mass = peak + mass.log()
    probability = (bin_log - log_mass.unsqueeze(-1)).exp()
    seen = bin_count > 0
    mean = torch.where(seen, bin_sum / bin_count.clamp(min=1), torch.nan)
    row_mean = bin_sum.sum(-1) / bin_count.sum(-1)
    return {
        "log_prior": mean[..., inner].float().numpy(),
        "row_centred": (mean - row_mean.unsqueeze(-1))[..., inner].float().numpy(),
        "probability": torch.where(seen, probability, torch.nan)[..., inner].float().numpy(),
        "allowed": seen.expand(n_heads, -1, -1)[..., inner].numpy(),
        "margin": (top[..., 0] - top[..., 1]).numpy(),
        "margin_key": top_key.double().numpy(),
        "top_mass": (top[..., 0] - log_mass).exp().numpy(),
        "prior_entropy": (log_mass - weighted / mass).clamp(min=0).numpy(),
    }


def _sum_bins(values: Tensor, offsets: np.ndarray) -> Tensor:
    return torch.as_tensor(np.add.reduceat(values.numpy(), offsets, axis=-1))


def _window(prior: Prior, rows: Tensor, keys: Tensor) -> Tensor:
    """K on a window, up to a constant per row, by the cheapest exact way."""
    if not prior.has_lanes:
        return prior.log_prior(rows, keys)
    factors = prior.factors(rows, keys)
    return factors.query @ factors.key.mT + factors.key_bias.unsqueeze(1)


def prior_spectrum(prior: Prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies (R,), amplitudes and phases (heads, R) of all spectral parts."""
    frequencies, cosines, sines = [], [], []
    for part in prior.components().values():
        factor = 1.0
        while isinstance(part, ScaledPrior):
            factor, part = factor * part.factor, part.prior
        if isinstance(part, SpectralPrior):
            frequencies.append(part.frequencies.double())
            cosines.append(factor * part.alpha.detach().double().expand(prior.num_heads, -1))
            sines.append(factor * part.beta.detach().double().expand(prior.num_heads, -1))
    if not frequencies:
        empty = np.zeros((prior.num_heads, 0))
        return np.zeros(0), empty, empty
    cosine, sine = torch.cat(cosines, -1), torch.cat(sines, -1)
    return (
        torch.cat(frequencies).cpu().numpy(),
        torch.hypot(cosine, sine).cpu().numpy(),
        torch.atan2(sine, cosine).cpu().numpy(),
    )


def _rows(queries: slice | None, length: int, resolution: int) -> tuple[np.ndarray, str]:
    if queries is not None:
        start, stop = _check_window(queries, length, "queries")
        return np.arange(start, stop), f"queries {start} to {stop - 1}"
    if length <= resolution:
        return np.arange(length), "every query"
    # Evenly spaced to the token, and the last one among them: a page draws such maps faster.
    step = math.ceil(length / resolution)
    rows = np.arange((length - 1) % step, length, step)
    return rows, f"{len(rows)} queries, evenly spaced"


def _matrix_edges(keys: slice | None, length: int, resolution: int) -> tuple[np.ndarray, slice]:
    """Bin edges over all keys, and which of the bins are shown."""
    if keys is None:
        width = math.ceil(length / resolution)
        edges = np.append(np.arange(0, length, width), length)
        return edges, slice(0, len(edges) - 1)
    start, stop = _check_window(keys, length, "keys")
    edges = np.unique(np.concatenate([[0], np.arange(start, stop + 1), [length]]))
    before = int(start > 0)
    return edges, slice(before, before + stop - start)


def curve_edges(start: int, length: int, points: int) -> np.ndarray:
    """Edges of a curve's bins: the first quarter of `points` exact, then bins of equal width."""
    if length <= points:
        return np.arange(start, start + length + 1)
    exact = points // 4
    rest = np.linspace(exact, length, points - exact + 1).round().astype(np.int64)
    return start + np.unique(np.concatenate([np.arange(exact), rest]))


def _check_window(window: slice, length: int, name: str) -> tuple[int, int]:
    if not isinstance(window, slice):
        raise TypeError(f"{name} must be a slice, got {type(window).__name__}")
    if window.step not in (None, 1):
        raise ValueError(f"{name} must have a step of 1, got {window.step}")
    start, stop, _ = window.indices(length)
    for bound in (window.start, window.stop):
        if bound is not None and not -length <= bound <= length:
            raise ValueError(f"{name} must lie within {length} tokens, got {window}")
    if not 0 < stop - start <= 1024:
        raise ValueError(f"{name} must hold 1 to 1,024 positions, got {stop - start}")
    return start, stop


def _check_length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int | np.integer):
        raise TypeError(f"length must be an integer, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    return int(length)


def _choose(wanted: Sequence[int] | int | None, count: int, what: str) -> list[int]:
    if wanted is None:
        return list(range(count))
    chosen = [wanted] if isinstance(wanted, int | np.integer) else list(wanted)
    if not chosen:
        raise ValueError(f"{what}s must name at least one {what}, got none")
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise TypeError(f"{what}s must be integers, got {index!r}")
        if not 0 <= index < count:
            raise ValueError(f"there is no {what} {index}: {what}s are 0 to {count - 1}")
    return [int(index) for index in chosen]


def _choose_layers(wanted: Sequence[int] | int | None, numbers: list[int]) -> list[int]:
    if numbers == list(range(len(numbers))):
        return _choose(wanted, len(numbers), "layer")
    if wanted is None:
        return numbers
    wanted = [wanted] if isinstance(wanted, int | np.integer) else wanted
    return [checks.one_of("layers", checks.integer("layers", n), numbers) for n in wanted]


def _training_length(prior: Prior) -> int | None:
    for part in prior.modules():
        if isinstance(part, SinkPrior):
            return part.training_length
    return None


def _fallback_length(module: nn.Module) -> int:
    """A length for modules that normalise by the current one, when the caller names none."""
    return module.training_seq_len or 128


def prior_summary(profile: xr.Dataset) -> list[str]:
    """One sentence for each head: where its sink and its kernel point, read at the last query.

    Parameters
    ----------
    profile : xarray.Dataset
        From `prior_profile`.

    Returns
    -------
    list of str
        For captions and screen readers.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> prior_summary(prior_profile(ALiBiPrior(1, slopes=[1.0]), length=8))
    ['layer 0, head 0: top key 7 by 1.00 nats (63% of the prior), kernel highest at lag 0']
    """
    check_result(profile, PRIOR_PROFILE)
    last = profile.isel(query=-1)
    sentences = []
    for layer in profile["layer"].values:
        for head in profile["head"].values:
            at = {"layer": layer, "head": head}
            if not bool(profile["present"].sel(at)):
                continue
            row = last.sel(at)
            kernel = profile["kernel"].sel(at).values
            flat = not np.any(np.nan_to_num(kernel))
            peak = int(profile["lag"].values[int(np.nanargmax(kernel))])
            key, margin = int(row["margin_key"]), float(row["margin"])
            tied = f"{float(row['top_mass']):.0%} of the prior"
            lead = f"top key {key} by {margin:.2f} nats ({tied})" if margin > 0 else "no top key"
            tail = "kernel flat" if flat else f"kernel highest at lag {peak}"
            sentences.append(f"layer {int(layer)}, head {int(head)}: {lead}, {tail}")
    return sentences
