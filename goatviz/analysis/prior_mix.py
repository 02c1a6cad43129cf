"""A learned prior with its components scaled: curves, the plan they induce, its margin and reach.

The curves of one head are evaluated once; a change of scale only recombines them, in float64, one
query's row at a time, so that any length is exact and nothing is length x length. Priors are found
and taken apart in `prior`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from goatviz.analysis.prior import PriorSource, curve_edges, pool_curve, prior_spectrum
from goatviz.priors.base import Prior, ScaledPrior
from goatviz.priors.spectral import SpectralPrior
from goatviz.results import PRIOR_MIX, check_result, make_result
from goatviz.transport.bounds import protected_length

#: What can be scaled, by the kind of component.
COMPONENTS = {"key": "sink", "relative": "relative", "recency": "recency"}
#: Positions evaluated at once.
_BLOCK = 1 << 16
#: Cells of the plan that are visited, as long as that leaves `_LEAST_ROWS` queries.
_CELLS = 1 << 22
_LEAST_ROWS = 32

Progress = Callable[[float], None]


def component_names(prior: Prior) -> tuple[str, ...]:
    """Which of "sink", "relative" and "recency" a prior has.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior, UniformPrior
    >>> component_names(ALiBiPrior(2)), component_names(UniformPrior())
    (('recency',), ())
    """
    found = {part.kind for part in prior.components().values() if not _is_empty(part)}
    return tuple(name for kind, name in COMPONENTS.items() if kind in found)


class PriorMixer:
    r"""One head's prior, and what becomes of it when its components are scaled.

    .. math:: K_{ij} = a\,u(j) + b\,\kappa(i - j) - c\,m\,(i - j), \qquad
              \pi_{ij} = e^{K_{ij}} / \sum_{j'} e^{K_{ij'}}

    Parameters
    ----------
    source : PriorSource
        From `goatviz.analysis.prior_sources`. Parameters are read now, in float64.
    head : int
        A parameter set: a key-value head under grouped queries.
    length : int
        Tokens.
    layer : int
        Kept in the results.
    resolution : int
        Key bins of the plan, and its queries as long as these cost little; at least 32.
    points : int
        Points of the curves when the length exceeds it: over key and lag the first quarter is
        exact, over the last query's keys the first and the last; the rest are equal bins.
    task : callable, optional
        Called with the share that is done; may raise to stop.

    Attributes
    ----------
    components : tuple of str
        Which of "sink", "relative" and "recency" there are.

    Raises
    ------
    ValueError
        For a prior on a grid, one that is not finite, or one that is no sum of functions of the
        lag and of the key.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380): the log-prior, the margin law, and the collapse
    of low-signal queries to the prior.

    Examples
    --------
    >>> from goatviz.analysis import prior_sources
    >>> from goatviz.priors import ALiBiPrior
    >>> mixer = PriorMixer(prior_sources(ALiBiPrior(1, slopes=[0.5]))[0], length=16)
    >>> mixer.mix(recency=2.0)["margin"].values[-1]
    np.float64(1.0)
    >>> off = mixer.mix(recency=0.0)
    >>> bool((off["top_mass"] == 1 / off["seen"]).all())
    True
    """

    def __init__(
        self,
        source: PriorSource,
        *,
        head: int = 0,
        length: int,
        layer: int = 0,
        resolution: int = 128,
        points: int = 512,
        task: Progress | None = None,
    ) -> None:
        if source.prior.axes:
            raise ValueError(grid_message(source))
        if not 0 <= head < source.prior.num_heads:
            raise ValueError(f"head must be in 0 .. {source.prior.num_heads - 1}, got {head!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length!r}")
        self._source, self._layer, self._head, self._length = source, layer, head, int(length)
        self._first_lag = 0 if source.causal else 1 - length
        prior = copy.deepcopy(source.prior).to(device="cpu", dtype=torch.float64)
        self.components = component_names(prior)
        self._curves = self._evaluate(prior, task or _nothing)
        self._check(prior)
        frequency, amplitude, _ = prior_spectrum(prior)
        # A frequency of 0 is a constant, which changes no weight.
        self._frequency = frequency[frequency > 0]
        self._amplitude = amplitude[head, frequency > 0]
        most = max(_LEAST_ROWS, min(resolution, _CELLS // length))
        # Evenly spaced to the token: a page draws such maps several times as fast.
        step = math.ceil(length / most)
        self._rows = np.arange((length - 1) % step, length, step)
        bins = min(length, resolution)
        self._bins = np.append(np.arange(0, length, math.ceil(length / bins)), length)
        self._keys = curve_edges(0, length, points)
        lags = curve_edges(0, length, points)
        self._lags = lags if source.causal else np.unique(np.concatenate([1 - lags, lags]))
        self._last = _end_edges(length, points)
        self._learned: _Mixed | None = None
        self._newest: tuple[dict[str, float], _Mixed] | None = None

    @property
    def size(self) -> int:
        """Numbers that are held."""
        return sum(curve.size for curve in self._curves.values())

    def mix(
        self,
        *,
        sink: float = 1.0,
        relative: float = 1.0,
        recency: float = 1.0,
        content_range: float = 0.0,
        temperature: float = 1.0,
        task: Progress | None = None,
    ) -> xr.Dataset:
        r"""The prior with its components scaled, and how far content can move its plan.

        In softmax(s / tau + K) the temperature divides the content scores alone. Whatever scores
        of range w a query sees, the odds of any set of keys move by a factor between
        :math:`e^{-w/\tau}` and :math:`e^{w/\tau}`, and both ends are reached:

        .. math:: \operatorname{logit} p = \operatorname{logit} \pi \pm w / \tau,

        which lies inside the collapse bound :math:`\pi e^{\pm w/\tau}`. A margin above
        :math:`w/\tau` keeps the top key on top.

        Parameters
        ----------
        sink, relative, recency : float
            Factors of the components; 1 as learned, 0 without. One that is not there is ignored.
        content_range : float
            w, the largest less the smallest content score of a query, at least 0.
        temperature : float
            tau of the content, positive. To temper the prior itself, scale all its components.
        task : callable, optional
            Called with the share that is done; may raise to stop.

        Returns
        -------
        xarray.Dataset
            Schema "prior_mix" (`goatviz.results.PRIOR_MIX`), all numbers float64.

        Raises
        ------
        ValueError
            For factors that are not finite, or a content range or temperature out of range.
        """
        scales = {"sink": sink, "relative": relative, "recency": recency}
        for name, value in scales.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        if not (math.isfinite(content_range) and content_range >= 0):
            raise ValueError(f"content_range must be finite and at least 0, got {content_range!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be finite and positive, got {temperature!r}")
        task = task or _nothing
        own = {name: float(scales[name]) for name in self.components}
        as_learned = all(value == 1.0 for value in own.values())
        if self._learned is None:
            end = 1.0 if as_learned else 0.5
            self._learned = self._mixed(dict.fromkeys(own, 1.0), part_of(task, 0.0, end))
            task = part_of(task, end, 1.0)
        # What content can do is told from the same rows.
        newest = self._newest
        if as_learned:
            mixed = self._learned
        elif newest is not None and newest[0] == own:
            mixed = newest[1]
        else:
            mixed = self._mixed(own, task)
            self._newest = own, mixed
        return self._result(mixed, own, float(content_range), float(temperature))

    # --- curves ---

    def _evaluate(self, prior: Prior, task: Progress) -> dict[str, np.ndarray]:
        """Every component along key or lag, this head's alone."""
        parts = [p for p in prior.components().values() if p.kind in COMPONENTS]
        curves: dict[str, np.ndarray] = {}
        for at, part in enumerate(parts):
            if _is_empty(part):
                continue
            name = COMPONENTS[part.kind]
            first = 0 if part.kind == "key" else self._first_lag
            values = np.empty(self._length - first)
            for start in range(first, self._length, _BLOCK):
                stop = min(start + _BLOCK, self._length)
                query, keys = 0, torch.arange(start, stop)
                if part.kind != "key":
                    query = max(stop - 1, 0)
                    keys = query - keys
                with torch.no_grad():
                    block = part.log_prior([query], keys)
                own = block[self._head if part.num_heads > 1 else 0, 0]
                values[start - first : stop - first] = own.numpy()
                task((at + (stop - first) / len(values)) / len(parts))
            curves[name] = values if name not in curves else curves[name] + values
        for name, values in curves.items():
            bad = int((~np.isfinite(values)).sum())
            if bad:
                raise ValueError(
                    f"{self._source.name}, head {self._head}: its {name} is not finite at {bad:,} "
                    f"of {len(values):,} positions"
                )
        return curves

    def _check(self, prior: Prior) -> None:
        """Raise unless the curves add up to the prior, at some queries and keys."""
        last = self._length - 1
        queries = np.unique([0, last // 3, last])
        keys = np.unique(np.linspace(0, last, min(self._length, 24)).round()).astype(int)
        with torch.no_grad():
            wanted = prior.log_prior(queries.tolist(), keys.tolist())[
                self._head if prior.num_heads > 1 else 0
            ].numpy()
        found = np.zeros_like(wanted)
        lags = queries[:, None] - keys
        seen = lags >= self._first_lag
        for name, curve in self._curves.items():
            place = keys[None] if name == "sink" else np.maximum(lags - self._first_lag, 0)
            found += np.broadcast_to(curve[place], found.shape)
        error = np.where(seen, wanted - found, 0.0)
        error -= error.sum(-1, keepdims=True) / seen.sum(-1, keepdims=True)
        worst = np.abs(np.where(seen, error, 0.0)).max()
        if not worst <= 1e-6 * (1.0 + np.abs(wanted).max()):
            raise ValueError(
                f"{self._source.name} is no sum of functions of the lag and of the key (off by "
                f"{worst:.3g} nats): its components cannot be scaled one by one"
            )

    # --- rows ---

    def _mixed(self, scales: dict[str, float], task: Progress) -> _Mixed:
        """Scaled curves, and the statistics of every row, one at a time."""
        length, rows, bins = self._length, self._rows, self._bins[:-1]
        sink = np.zeros(length)
        kernel = np.zeros(length - self._first_lag)
        for name, scale in scales.items():
            if scale:
                curve = sink if name == "sink" else kernel
                curve += scale * self._curves[name]
        # Reversed, so that the kernel runs along the keys of a row; keys ahead have no mass.
        along = kernel[::-1]
        if self._source.causal:
            along = np.concatenate([along, np.full(length - 1, -np.inf)])
        statistics = np.empty((5, len(rows)))
        probability = np.full((len(rows), len(bins)), np.nan)
        height = max(1, _CELLS // 16 // length)
        memory = np.empty((2, min(height, len(rows)) * length))
        for first in range(0, len(rows), height):
            queries = rows[first : first + height]
            here = slice(first, first + len(queries))
            columns = int(queries[-1]) + 1 if self._source.causal else length
            windows = np.lib.stride_tricks.sliding_window_view(along, columns)
            x, w = (part[: len(queries) * columns].reshape(-1, columns) for part in memory)
            for row, query in zip(x, queries, strict=True):
                np.add(windows[length - 1 - query], sink[:columns], out=row)
            each, top = np.arange(len(queries)), x.argmax(-1)
            x -= x[each, top][:, None]
            np.exp(x, out=w)
            # Summed without the largest: what is left beside it may be tiny.
            w[each, top], x[each, top] = 0.0, -np.inf
            margin = 0.0 - x.max(-1)
            x[each, top] = 0.0
            hidden = np.arange(columns) > queries[:, None] if self._source.causal else None
            if hidden is not None:
                np.copyto(x, 0.0, where=hidden)
            rest, moment = w.sum(-1), np.einsum("ij,ij->i", w, x)
            mass = 1.0 + rest
            seen = queries + 1 if self._source.causal else np.full(len(queries), length)
            statistics[:, here] = margin, top, 1.0 / mass, np.log1p(rest) - moment / mass, seen
            w[each, top] = 1.0
            shown = int(np.searchsorted(bins, columns))
            pooled = np.add.reduceat(w, bins[:shown], axis=-1) / mass[:, None]
            if hidden is not None:
                pooled[bins[:shown] > queries[:, None]] = np.nan
            probability[here, :shown] = pooled
            task((first + len(queries)) / len(rows))
        # The last row is still there.
        last, at = x[-1], top[-1]
        log_mass = _log_sums(last, self._last[:-1]) - np.log(mass[-1])
        last[at] = -np.inf
        others = -np.inf if length == 1 else float(_log_sums(last, np.zeros(1, dtype=int))[0])
        return _Mixed(
            np.stack(pool_curve(sink, self._keys)),
            np.stack(pool_curve(kernel, self._lags - self._first_lag)),
            statistics,
            probability,
            log_mass,
            -others,
        )

    def _result(
        self, mixed: _Mixed, scales: dict[str, float], content_range: float, temperature: float
    ) -> xr.Dataset:
        source, learned = self._source, self._learned
        reach = content_range / temperature
        width = np.diff(self._last)
        odds = mixed.log_mass - _of_the_others(mixed.log_mass)
        margin, top_key, top_mass, entropy, seen = mixed.statistics
        sink, sink_low, sink_high = mixed.sink
        kernel, kernel_low, kernel_high = mixed.kernel
        scale = scales.get("relative", 1.0)
        return make_result(
            PRIOR_MIX,
            {
                "key_stop": self._keys[1:],
                "sink": sink,
                "sink_low": sink_low,
                "sink_high": sink_high,
                "learned_sink": learned.sink[0],
                "lag_stop": self._lags[1:],
                "kernel": kernel,
                "kernel_low": kernel_low,
                "kernel_high": kernel_high,
                "learned_kernel": learned.kernel[0],
                "frequency": self._frequency,
                "amplitude": abs(scale) * self._amplitude,
                "learned_amplitude": self._amplitude,
                "bin_stop": self._bins[1:],
                "probability": mixed.probability,
                "allowed": ~np.isnan(mixed.probability),
                "margin": margin,
                "learned_margin": learned.statistics[0],
                "margin_key": top_key,
                "top_mass": top_mass,
                "prior_entropy": entropy,
                "seen": seen,
                "last_stop": self._last[1:],
                "last": np.exp(mixed.log_mass) / width,
                "last_low": _share(odds - reach) / width,
                "last_high": _share(odds + reach) / width,
                "learned_last": np.exp(learned.log_mass) / width,
            },
            coords={
                "key": self._keys[:-1],
                "lag": self._lags[:-1],
                "rank": np.arange(len(self._frequency)),
                "query": self._rows,
                "key_bin": self._bins[:-1],
                "last_key": self._last[:-1],
            },
            attrs={
                "layer": self._layer,
                "head": self._head,
                "layer_name": source.name,
                "length": self._length,
                "causal": int(source.causal),
                "training_length": source.training_length or 0,
                "notes": "; ".join(source.notes),
                "components": " ".join(self.components),
                **{f"{name}_scale": value for name, value in scales.items()},
                "as_learned": int(mixed is learned),
                "content_range": content_range,
                "temperature": temperature,
                "reach": reach,
                "protected_length": protected_length(float(margin[-1])),
                "top_low": float(_share(np.float64(mixed.top_odds - reach))),
                "top_high": float(_share(np.float64(mixed.top_odds + reach))),
            },
        )


def mix_summary(mix: xr.Dataset) -> str:
    """What is switched, what the last query sees, and what content can do, in words.

    Parameters
    ----------
    mix : xarray.Dataset
        From `PriorMixer.mix`.

    Returns
    -------
    str
        For captions and screen readers.
    """
    check_result(mix, PRIOR_MIX)
    attrs = mix.attrs
    scales = {name: attrs[f"{name}_scale"] for name in attrs["components"].split()}
    changed = [
        f"{name} off" if scale == 0 else f"{name} × {scale:.3g}"
        for name, scale in scales.items()
        if scale != 1
    ]
    last = mix.isel(query=-1)
    count, margin = int(last["seen"]), float(last["margin"])
    key, mass, entropy = (float(last[n]) for n in ("margin_key", "top_mass", "prior_entropy"))
    sentences = [
        f"Layer {attrs['layer']}, head {attrs['head']}, {attrs['length']:,} tokens: "
        + (", ".join(changed) or "as learned")
        + "."
    ]
    if count == 1:
        sentences.append("The last query sees one key.")
    else:
        if margin > 0:
            protected = attrs["protected_length"]
            sentences.append(
                f"At the last query key {int(key):,} leads by a margin of {margin:.3g} nats with "
                f"{_percent(mass)} of the prior; the margin keeps half the mass on it up to "
                f"{_count(protected)} tokens (1 + e^margin)."
            )
        else:
            sentences.append("At the last query no key leads: its margin is 0 nats.")
        sentences.append(
            f"Entropy {entropy:.3g} of at most {np.log(count):.3g} nats ({count:,} keys)."
        )
        if attrs["content_range"] > 0:
            held = f"leaves it {_percent(attrs['top_low'])} to {_percent(attrs['top_high'])}"
            sentences.append(
                f"Content of range {attrs['content_range']:.3g} at temperature "
                f"{attrs['temperature']:.3g} moves log-odds by at most {attrs['reach']:.3g} nats"
                + (
                    f": it {held} and can{'not' if margin > attrs['reach'] else ''} unseat it."
                    if margin > 0
                    else "."
                )
            )
    if len(mix["query"]) < attrs["length"] or (mix["bin_stop"] - mix["key_bin"]).max() > 1:
        sentences.append(
            f"Plan: {len(mix['query'])} queries, evenly spaced; mass summed in "
            f"{len(mix['key_bin'])} equal bins of keys."
        )
    if attrs["training_length"]:
        sentences.append(f"Trained at {attrs['training_length']:,} tokens.")
    if attrs["notes"]:
        sentences.append(f"⚠ {attrs['notes']}.")
    return " ".join(sentences)


def _count(number: float) -> str:
    if number < 1e9:
        return f"{int(number):,}"
    return f"{number:.2g}" if np.isfinite(number) else "any number of"


def _percent(share: float) -> str:
    """A share whose distance to 0 or 1 is not rounded away."""
    if share > 0.5 and 1 - share < 5e-4:
        return "all but " + _percent(1 - share) if share < 1 else "100%"
    return f"{share:.3%}" if share < 1e-3 and share >= 1e-5 else f"{share:.1%}" if share else "0%"


@dataclass(frozen=True)
class _Mixed:
    """Scaled curves (mean, least, largest by bin) and what they induce.

    Row statistics are margin, top key, its mass, entropy, and keys seen; `log_mass` is the last
    query's by bin, `top_odds` its top key's.
    """

    sink: np.ndarray
    kernel: np.ndarray
    statistics: np.ndarray
    probability: np.ndarray
    log_mass: np.ndarray
    top_odds: float


def grid_message(source: PriorSource) -> str:
    """What there is to say of a prior on a grid."""
    return (
        f"{source.name} has a prior on a grid of {source.prior.axes} axes: its kernel is a "
        "function of a vector lag, and only priors of sequences can be explored. Ask the prior "
        "itself: "
        "prior.log_prior(grid_positions(h, w), grid_positions(h, w))"
    )


def part_of(task: Progress, start: float, stop: float) -> Progress:
    """Progress of a part that lies between two shares of the whole."""
    return lambda share: task(start + (stop - start) * share)


def _nothing(share: float) -> None:
    pass


def _is_empty(part: Prior) -> bool:
    """Whether it is a Fourier term without frequencies."""
    while isinstance(part, ScaledPrior):
        part = part.prior
    return isinstance(part, SpectralPrior) and part.rank == 0


def _end_edges(length: int, points: int) -> np.ndarray:
    """Bin edges that are exact at both ends, with equal bins between."""
    if length <= points:
        return np.arange(length + 1)
    exact = points // 4
    inner = np.linspace(exact, length - exact, points - 2 * exact + 1).round().astype(int)
    return np.unique(
        np.concatenate([np.arange(exact), inner, np.arange(length - exact, length + 1)])
    )


def _log_sums(x: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Log of the sum of exp, by bin; an element of -inf counts nothing."""
    most = np.maximum.reduceat(x, starts)
    widths = np.diff(starts, append=len(x))
    return most + np.log(np.add.reduceat(np.exp(x - np.repeat(most, widths)), starts))


def _of_the_others(log_mass: np.ndarray) -> np.ndarray:
    """Log of the mass outside of each bin, without a difference of near-equal numbers."""
    none = np.array([-np.inf])
    before = np.concatenate([none, np.logaddexp.accumulate(log_mass)[:-1]])
    after = np.concatenate([np.logaddexp.accumulate(log_mass[::-1])[::-1][1:], none])
    return np.logaddexp(before, after)


def _share(odds: np.ndarray) -> np.ndarray:
    """The probability of these log-odds."""
    return np.exp(-np.logaddexp(0.0, -odds))
