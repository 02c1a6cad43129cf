"""A prior with its components scaled: curves, the plan they induce, its margin and reach.

The curves of one head are evaluated once, by `prior_curves`; a change of scale only recombines
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from goatviz import checks
from goatviz.analysis.prior_curves import (
    PriorCurves,
    PriorSource,
    Progress,
    component_names,
    even_rows,
    induced_rows,
    kernel_spectrum,
    key_bins,
    lag_edges,
    part_of,
    pooled_curves,
    prior_spectrum,
)
from goatviz.bins import bin_sum, curve_edges
from goatviz.results import PRIOR_MIX, check_result, make_result
from goatviz.transport.bounds import protected_length

if TYPE_CHECKING:
    import xarray as xr

#: Cells of the plan that are visited, as long as that leaves `_LEAST_ROWS` queries.
_CELLS = 1 << 22
_LEAST_ROWS = 32


class PriorMixer:
    r"""One head's prior, with its components scaled.

    .. math:: K_{ij} = a\,u(j) + b\,\kappa(i - j) - c\,m\,(i - j), \qquad
              \pi_{ij} = e^{K_{ij}} / \sum_{j'} e^{K_{ij'}}

    Parameters
    ----------
    source : PriorSource
        A source from `goatviz.analysis.prior_sources`. Parameters are read now, in float64.
    head : int
        Number of a parameter set: a key-value head under grouped queries.
    length : int
        Number of tokens.
    layer : int
        Number of the layer, which results keep.
    resolution : int
        Number of key bins of the plan, and of its queries where the length allows; at least 32.
    points : int
        Number of points of the curves if the length exceeds it. Over key and lag the first quarter
        is exact, over the last query's keys the first and the last quarter; the rest are equal
        bins.
    progress : callable, optional
        Function called with the share that is done; may raise to stop.

    Attributes
    ----------
    components : tuple of str
        Those of "sink", "relative" and "recency" that the prior has.

    Raises
    ------
    ValueError
        If the prior is on a grid, is not finite, or is not a function of the lag plus one of the
        key; or if it was fitted to logits, and no input has shown keys and lags of this length.

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
        progress: Progress | None = None,
    ) -> None:
        self._source, self._layer = source, layer
        self._head = checks.index("head", head, source.prior.num_heads)
        self._length = length = checks.positive_int("length", length)
        known = source.fitted_length
        if known is not None and length > known:
            raise ValueError(
                f"length must be at most {known:,}, got {length:,}: the inputs that {source.name} "
                "was fitted to show no key or lag beyond"
            )
        self._curves = PriorCurves(source, [self._head], length, progress)
        self._check()
        self.components = component_names(source.prior)
        if source.rotary:
            ahead = self._curves.relative()[0, -self._curves.first_lag :]
            self._frequency, self._amplitude = kernel_spectrum(ahead)
        else:
            frequency, amplitude, _ = prior_spectrum(self._curves.prior)
            # A frequency of 0 is a constant, which changes no weight.
            self._frequency = frequency[frequency > 0]
            self._amplitude = amplitude[self._head, frequency > 0]
        self._rows = even_rows(length, max(_LEAST_ROWS, min(resolution, _CELLS // length)))
        self._bins = key_bins(length, resolution)
        self._keys = curve_edges(0, length, points)
        self._lags = lag_edges(length, points, causal=source.causal)
        self._last = _end_edges(length, points)
        self._learned: _Mixed | None = None
        self._newest: tuple[dict[str, float], _Mixed] | None = None

    @property
    def size(self) -> int:
        """Number of values that are held."""
        return sum(values.size for values in self._curves.parts.values())

    def mix(
        self,
        *,
        sink: float = 1.0,
        relative: float = 1.0,
        recency: float = 1.0,
        content_range: float = 0.0,
        temperature: float = 1.0,
        progress: Progress | None = None,
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
            Factors of the components: 1 as learned, 0 without. Those of missing components are
            ignored.
        content_range : float
            w, the largest less the smallest content score of a query, at least 0.
        temperature : float
            tau of the content, positive. To temper the prior itself, scale all its components.
        progress : callable, optional
            Function called with the share that is done; may raise to stop.

        Returns
        -------
        xarray.Dataset
            Schema "prior_mix" (`goatviz.results.PRIOR_MIX`), all numbers float64.

        Raises
        ------
        ValueError
            If a factor is not finite, or the content range or temperature is out of range.
        """
        content_range = checks.number("content_range", content_range, low=0)
        temperature = checks.number("temperature", temperature, above=0)
        given = {"sink": sink, "relative": relative, "recency": recency}
        scales = {name: checks.number(name, value) for name, value in given.items()}
        scales = {name: scales[name] for name in self.components}
        as_learned = all(value == 1.0 for value in scales.values())
        if self._learned is None:
            end = 1.0 if as_learned else 0.5
            self._learned = self._mixed(dict.fromkeys(scales, 1.0), part_of(progress, 0.0, end))
            progress = part_of(progress, end, 1.0)
        # A new content range or temperature needs the same rows.
        if as_learned:
            mixed = self._learned
        elif self._newest is not None and self._newest[0] == scales:
            mixed = self._newest[1]
        else:
            mixed = self._mixed(scales, progress)
            self._newest = scales, mixed
        return self._result(mixed, scales, content_range, temperature)

    def _check(self) -> None:
        """Raise ValueError for a prior that is not finite, or not a sum of curves."""
        for name, values in self._curves.parts.items():
            bad = int((~np.isfinite(values)).sum())
            if bad:
                raise ValueError(
                    f"{self._source.name}, head {self._head}: its {name} is not finite at {bad:,} "
                    f"of {values.size:,} positions"
                )
        misfit = self._curves.misfit()
        if misfit:
            raise ValueError(
                f"{self._source.name} is not a function of the lag plus one of the key (off by "
                f"{misfit:.3g} nats): its components cannot be scaled one by one"
            )

    def _mixed(self, scales: dict[str, float], progress: Progress | None) -> _Mixed:
        """The scaled curves and the rows they induce."""
        curves = self._curves
        sink = curves.sink(scales.get("sink", 1.0))
        kernel = curves.relative(scales.get("relative", 1.0))
        kernel = kernel + curves.recency(scales.get("recency", 1.0))
        fields = induced_rows(sink, kernel, self._rows, self._bins, progress)
        fields |= pooled_curves(sink, kernel, self._keys, self._lags - curves.first_lag)
        # The last query sees every key; its lags fall as the keys rise.
        last = sink[0] + kernel[0, ::-1][: self._length]
        fields = {name: values[0] for name, values in fields.items()}
        return _Mixed(fields, *_last_row(last, self._last))

    def _result(
        self, mixed: _Mixed, scales: dict[str, float], content_range: float, temperature: float
    ) -> xr.Dataset:
        source, learned, length = self._source, self._learned, self._length
        reach = content_range / temperature
        width = np.diff(self._last)
        odds = mixed.log_mass - _log_rest(mixed.log_mass)
        fields, pairs = mixed.fields, {}
        if source.rotary:
            fields = fields | {"rotary_frequency": np.array(source.rotary)}
            pairs = {"pair": np.arange(len(source.rotary))}
        return make_result(
            PRIOR_MIX,
            {
                **fields,
                **{f"learned_{n}": learned.fields[n] for n in ("sink", "kernel", "margin")},
                "key_stop": self._keys[1:],
                "lag_stop": self._lags[1:],
                "bin_stop": self._bins[1:],
                "frequency": self._frequency,
                "amplitude": abs(scales.get("relative", 1.0)) * self._amplitude,
                "learned_amplitude": self._amplitude,
                "allowed": ~np.isnan(fields["probability"]),
                "seen": np.where(source.causal, self._rows + 1.0, length),
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
                **pairs,
                "query": self._rows,
                "key_bin": self._bins[:-1],
                "last_key": self._last[:-1],
            },
            attrs={
                "layer": self._layer,
                "head": self._head,
                "layer_name": source.name,
                "length": length,
                "causal": int(source.causal),
                "training_length": source.training_length or 0,
                "origin": "learned" if source.fitted_length is None else "fitted",
                "notes": "; ".join(source.notes),
                "components": " ".join(self.components),
                **{f"{name}_scale": value for name, value in scales.items()},
                "as_learned": int(mixed is learned),
                "content_range": content_range,
                "temperature": temperature,
                "reach": reach,
                "protected_length": protected_length(float(fields["margin"][-1])),
                "top_low": float(_share(np.float64(mixed.top_odds - reach))),
                "top_high": float(_share(np.float64(mixed.top_odds + reach))),
            },
        )


@dataclass(frozen=True)
class _Mixed:
    """Scaled curves and the rows they induce, as fields of a result, and the last row.

    `log_mass` is that of the last query by bin, `top_odds` the log-odds of its top key.
    """

    fields: dict[str, np.ndarray]
    log_mass: np.ndarray
    top_odds: float


def _end_edges(length: int, points: int) -> np.ndarray:
    """Bin edges that are exact at both ends, with equal bins between."""
    if length <= points:
        return np.arange(length + 1)
    exact = points // 4
    inner = np.linspace(exact, length - exact, points - 2 * exact + 1).round().astype(int)
    return np.unique(
        np.concatenate([np.arange(exact), inner, np.arange(length - exact, length + 1)])
    )


def _last_row(x: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, float]:
    """Log of the mass in each bin, and the log-odds of the top key, of one row of log-priors."""
    at = int(x.argmax())
    x = x - x[at]
    # The top key is added at the end: the mass of the others may be tiny.
    x[at] = -np.inf
    most = np.maximum.reduceat(x, edges[:-1])
    most[np.isneginf(most)] = 0.0
    with np.errstate(divide="ignore"):
        masses = most + np.log(bin_sum(np.exp(x - np.repeat(most, np.diff(edges))), edges))
    others = float(np.logaddexp.reduce(masses))
    place = np.searchsorted(edges, at, side="right") - 1
    masses[place] = np.logaddexp(masses[place], 0.0)
    return masses - np.logaddexp(0.0, others), -others


def _log_rest(log_mass: np.ndarray) -> np.ndarray:
    """Log of the mass outside each bin, without a difference of nearly equal numbers."""
    none = np.array([-np.inf])
    before = np.concatenate([none, np.logaddexp.accumulate(log_mass)[:-1]])
    after = np.concatenate([np.logaddexp.accumulate(log_mass[::-1])[::-1][1:], none])
    return np.logaddexp(before, after)


def _share(odds: np.ndarray) -> np.ndarray:
    """The probability of these log-odds."""
    return np.exp(-np.logaddexp(0.0, -odds))


def mix_summary(mix: xr.Dataset) -> str:
    """A result of `PriorMixer.mix` in words, for captions and screen readers.

    Raises
    ------
    TypeError
        If `mix` is not such a result.
    """
    attrs = check_result(mix, PRIOR_MIX).attrs
    scales = {name: attrs[f"{name}_scale"] for name in attrs["components"].split()}
    changed = [
        f"{name} off" if scale == 0 else f"{name} × {scale:.3g}"
        for name, scale in scales.items()
        if scale != 1
    ]
    head = f"Layer {attrs['layer']}, head {attrs['head']}, {attrs['length']:,} tokens"
    as_it_is = f"as {attrs['origin']}"
    sentences = [f"{head}: {', '.join(changed) or as_it_is}.", *_last_query(mix)]
    if len(mix["query"]) < attrs["length"] or (mix["bin_stop"] - mix["key_bin"]).max() > 1:
        sentences.append(
            f"The plan shows {len(mix['query'])} evenly spaced queries; mass is summed in "
            f"{len(mix['key_bin'])} bins of keys."
        )
    if attrs["training_length"]:
        sentences.append(f"Trained at {attrs['training_length']:,} tokens.")
    if attrs["notes"]:
        sentences.append(f"⚠ {attrs['notes']}.")
    return " ".join(sentences)


def _last_query(mix: xr.Dataset) -> list[str]:
    """Sentences on the last query's row, and on how far content can move it."""
    attrs, last = mix.attrs, mix.isel(query=-1)
    count, margin, mass = int(last["seen"]), float(last["margin"]), float(last["top_mass"])
    if count == 1:
        return ["The last query sees a single key."]
    sentences = ["At the last query no key leads: the margin is 0 nats."]
    if margin > 0:
        sentences = [
            f"At the last query key {int(last['margin_key']):,} leads by {margin:.3g} nats and "
            f"holds {_percent(mass)} of the prior; it keeps at least half of the mass up to "
            f"{_tokens(attrs['protected_length'])} tokens (1 + e^margin)."
        ]
    sentences.append(
        f"Entropy {float(last['prior_entropy']):.3g} of at most {np.log(count):.3g} nats "
        f"({count:,} keys)."
    )
    if attrs["content_range"] > 0:
        reach = (
            f"Content of range {attrs['content_range']:.3g} at temperature "
            f"{attrs['temperature']:.3g} shifts log-odds by at most {attrs['reach']:.3g} nats"
        )
        if margin > 0:
            unseat = "cannot" if margin > attrs["reach"] else "can"
            reach += (
                f": the top key keeps {_percent(attrs['top_low'])} to "
                f"{_percent(attrs['top_high'])}, and content {unseat} unseat it"
            )
        sentences.append(f"{reach}.")
    return sentences


def _tokens(number: float) -> str:
    if number < 1e9:
        return f"{int(number):,}"
    return f"{number:.2g}" if np.isfinite(number) else "any number of"


def _percent(share: float) -> str:
    """A share whose distance to 0 or 1 is not rounded away."""
    if share > 0.5 and 1 - share < 5e-4:
        return "all but " + _percent(1 - share) if share < 1 else "100%"
    if share == 0:
        return "0%"
    if share < 1e-5:
        return f"{100 * share:.1e}%"
    return f"{share:.3%}" if share < 1e-3 else f"{share:.1%}"
