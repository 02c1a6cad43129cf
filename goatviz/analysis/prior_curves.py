"""The engine that takes a prior apart: its curves over key and lag, and the plan they induce.

Each component is evaluated once, in float64. The rows of the plan are streamed in tiles that fit a
core's cache, so any length is exact and nothing is length x length. `prior` and `prior_mix` make
results of these numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from goatviz.bins import bin_mean, bin_range, bin_sum, curve_edges
from goatviz.priors.base import Prior, ScaledPrior
from goatviz.priors.separable import key_table, lag_table
from goatviz.priors.spectral import SpectralPrior

#: Names of the components that can be scaled, by kind.
COMPONENTS = {"key": "sink", "relative": "relative", "recency": "recency"}
#: Number of positions evaluated at once.
_BLOCK = 1 << 15
#: Cells of a tile, and its most keys: with its exponentials it stays in a core's cache.
_TILE, _WIDTH = 1 << 16, 1 << 14
#: Log-prior of a key that a query may not see; not -inf, since -inf less -inf is NaN.
_HIDDEN = -1e300
#: Lower log-weights than this count as 0: numpy's exp takes 10 to 100 times as long for them.
_NOTHING = -700.0

Progress = Callable[[float], None]


@dataclass(frozen=True)
class PriorSource:
    """A prior of some model, and how it is used there.

    Attributes
    ----------
    name : str
        Path of the module, or the prior's class.
    prior : Prior
        The prior itself; parameters are shared, not copied.
    causal : bool
        Whether later keys are forbidden.
    training_length : int or None
        T in tokens, where the prior or the model has one.
    notes : list of str
        Remarks that belong in a figure of it.
    layer : int or None
        Number of the layer in its model; None if it is the number among the sources.
    heads : tuple of int
        Numbers of the heads that are known; all of the prior's if none is named.
    fitted_length : int or None
        Tokens of which every key and lag was seen, for a prior fitted to logits; else None.
    rotary : tuple of float
        Frequencies of the layer's rotary pairs, radian/token, for a fitted prior.
    """

    name: str
    prior: Prior
    causal: bool
    training_length: int | None = None
    notes: list[str] = field(default_factory=list)
    layer: int | None = None
    heads: tuple[int, ...] = ()
    fitted_length: int | None = None
    rotary: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", tuple(range(self.prior.num_heads)))


class PriorCurves:
    """Some heads of a prior as K_ij = u(j) + kappa(i - j), evaluated in float64.

    Parameters
    ----------
    source : PriorSource
        Source of the prior, whose parameters are read now.
    heads : sequence of int
        Numbers of parameter sets: key-value heads under grouped queries.
    length : int
        Number of tokens.
    progress : callable, optional
        Function called with the share that is done; may raise to stop.

    Attributes
    ----------
    prior : Prior
        A copy in float64.
    parts : dict of str to ndarray
        Those components that the prior has: "sink" over keys 0 .. length - 1, "relative" and
        "recency" over lags `first_lag` .. length - 1; shape (heads, places), or (1, places) where
        all heads share a component.

    Raises
    ------
    ValueError
        If the prior is on a grid.
    """

    def __init__(
        self,
        source: PriorSource,
        heads: Sequence[int],
        length: int,
        progress: Progress | None = None,
    ) -> None:
        require_sequence(source)
        self.heads, self.length = list(heads), length
        self.first_lag = 0 if source.causal else 1 - length
        self.prior = copy.deepcopy(source.prior).to(device="cpu", dtype=torch.float64)
        self.parts: dict[str, np.ndarray] = {}
        present = [
            part
            for part in self.prior.components().values()
            if part.kind in COMPONENTS and not _is_empty(part)
        ]
        for at, part in enumerate(present):
            name = COMPONENTS[part.kind]
            share = part_of(progress, at / len(present), (at + 1) / len(present))
            values = self._evaluate(part, share)
            self.parts[name] = values + self.parts[name] if name in self.parts else values

    def _evaluate(self, part: Prior, progress: Progress) -> np.ndarray:
        rows = self.heads if part.num_heads > 1 else [0]
        first = 0 if part.kind == "key" else self.first_lag
        values = np.empty((len(rows), self.length - first))
        table = key_table if part.kind == "key" else lag_table
        for start in range(first, self.length, _BLOCK):
            stop = min(start + _BLOCK, self.length)
            with torch.no_grad():
                block = table(part, torch.arange(start, stop, dtype=torch.float64))
            values[:, start - first : stop - first] = block[rows].numpy()
            progress((stop - first) / values.shape[-1])
        return values

    def sink(self, scale: float = 1.0) -> np.ndarray:
        """u(j), scaled: shape (heads, keys), nats."""
        return self._scaled("sink", scale, self.length)

    def relative(self, scale: float = 1.0) -> np.ndarray:
        """The relative term, scaled: shape (heads, lags), nats."""
        return self._scaled("relative", scale, self.length - self.first_lag)

    def recency(self, scale: float = 1.0) -> np.ndarray:
        """The recency, scaled: shape (heads, lags), nats, 0 at lag 0."""
        return self._scaled("recency", scale, self.length - self.first_lag)

    def _scaled(self, name: str, scale: float, places: int) -> np.ndarray:
        shape = (len(self.heads), places)
        if not scale or name not in self.parts:
            return np.zeros(shape)
        values = self.parts[name]
        return np.broadcast_to(values if scale == 1 else scale * values, shape)

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(np.isfinite(values).all()) for values in self.parts.values())

    def misfit(self) -> float:
        """Largest difference between the curves' sum and the prior at some queries and keys, nats.

        Rounding and a constant of each row count as 0; infinite where only one of them is finite.
        """
        last = self.length - 1
        queries = np.unique([0, last // 3, last])
        keys = np.unique(np.linspace(0, last, min(self.length, 24)).round()).astype(int)
        rows = self.heads if self.prior.num_heads > 1 else [0] * len(self.heads)
        with torch.no_grad():
            wanted = self.prior.log_prior(queries.tolist(), keys.tolist()).numpy()[rows]
        lags = queries[:, None] - keys
        summed = np.zeros_like(wanted)
        for name, values in self.parts.items():
            at = np.broadcast_to(keys, lags.shape) if name == "sink" else lags - self.first_lag
            summed += values[:, at]
        seen = lags >= self.first_lag
        if np.any(seen & (np.isfinite(wanted) != np.isfinite(summed))):
            return math.inf
        known = seen & np.isfinite(wanted)
        error = np.where(known, wanted, 0.0) - np.where(known, summed, 0.0)
        error -= error.sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
        worst = float(np.abs(np.where(known, error, 0.0)).max())
        largest = float(np.abs(np.where(known, wanted, 0.0)).max())
        return worst if worst > 1e-6 * (1.0 + largest) else 0.0


# --- rows of the induced plan ---


def induced_rows(
    sink: np.ndarray,
    kernel: np.ndarray,
    queries: np.ndarray,
    edges: np.ndarray,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    r"""Rows of pi_ij = exp(K_ij) / sum_j' exp(K_ij') with K_ij = u(j) + kappa(i - j), exactly.

    Parameters
    ----------
    sink : ndarray
        u, shape (heads, keys), finite.
    kernel : ndarray
        kappa over the lags 0 .. keys - 1 of causal attention, or 1 - keys .. keys - 1; finite.
    queries : ndarray
        Evenly spaced and rising.
    edges : ndarray
        Edges of the key bins, from 0 to the number of keys.
    progress : callable, optional
        Function called with the share that is done; may raise to stop.

    Returns
    -------
    dict of str to ndarray
        "margin", "margin_key", "top_mass", "prior_entropy" of shape (heads, queries), and
        "probability" of shape (heads, queries, bins), NaN where a bin holds no key that is seen.
    """
    heads, length = sink.shape
    group = max(1, _TILE // (min(length, _WIDTH) * len(queries)))
    plans = []
    for first in range(0, heads, group):
        some = slice(first, first + group)
        share = part_of(progress, first / heads, min(first + group, heads) / heads)
        plans.append(_stream(sink[some], kernel[some], queries, edges, share))
    plan = {name: np.concatenate([part[name] for part in plans]) for name in plans[0]}
    if kernel.shape[-1] == length:
        plan["probability"][:, edges[:-1] > queries[:, None]] = np.nan
    return plan


def _stream(
    sink: np.ndarray, kernel: np.ndarray, queries: np.ndarray, edges: np.ndarray, progress: Progress
) -> dict[str, np.ndarray]:
    """`induced_rows` of a few heads, one tile after another, from the last keys to the first."""
    heads, length = sink.shape
    causal = kernel.shape[-1] == length
    # Reversed, so that the kernel runs along the keys of a row.
    along = kernel[:, ::-1]
    if causal:
        along = np.concatenate([along, np.full((heads, length - 1), _HIDDEN)], axis=-1)
    along = np.ascontiguousarray(along)
    width = min(length, _WIDTH)
    height = max(1, _TILE // (heads * width))
    step = int(queries[1] - queries[0]) if len(queries) > 1 else 1
    memory = np.empty((2, heads * min(height, len(queries)) * width))
    parts = []
    for first in range(0, len(queries), height):
        chunk = queries[first : first + height]
        rows = _Rows(heads, len(chunk), edges)
        seen = int(chunk[-1]) + 1 if causal else length
        for start in reversed(range(0, seen, width)):
            keys = sink[:, start : min(start + width, seen)]
            low = length - 1 - int(chunk[-1]) + start
            lags = along[:, low : low + step * (len(chunk) - 1) + keys.shape[-1]]
            if rows.beyond_reach(lags.max(-1) + keys.max(-1)):
                continue
            shape = (heads, len(chunk), keys.shape[-1])
            x, weight = (half[: math.prod(shape)].reshape(shape) for half in memory)
            windows = np.lib.stride_tricks.sliding_window_view(lags, shape[-1], axis=-1)
            np.add(windows[:, ::step][:, ::-1], keys[:, None], out=x)
            rows.add(x.reshape(-1, shape[-1]), weight.reshape(-1, shape[-1]), start)
        parts.append({n: v.reshape(*shape[:2], *v.shape[1:]) for n, v in rows.finish().items()})
        progress((first + len(chunk)) / len(queries))
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


class _Rows:
    """Running statistics of rows, from their last keys to the first; the top key's weight is 1.

    Before its first key a row holds nonsense, which that key scales by e^-700.
    """

    def __init__(self, heads: int, queries: int, edges: np.ndarray) -> None:
        count = heads * queries
        self.heads, self.edges, self.each = heads, edges, np.arange(count)
        self.top, self.second = np.full((2, count), _HIDDEN)
        self.key = np.zeros(count, dtype=np.intp)
        # The weight of all keys but the top, which may be tiny; the sum of weight x log-weight.
        self.rest, self.moment = np.zeros((2, count))
        self.mass = np.zeros((count, len(edges) - 1))

    def beyond_reach(self, bounds: np.ndarray) -> bool:
        """Whether keys whose log-prior is at most this, by head, change nothing in any row."""
        least = np.minimum(self.second, self.top + _NOTHING).reshape(self.heads, -1).min(-1)
        return bool((bounds < least).all())

    def add(self, x: np.ndarray, weight: np.ndarray, start: int) -> None:
        """Add log-priors of the preceding keys, (rows, keys); `x` and `weight` are overwritten."""
        each, at = self.each, x.argmax(-1)
        best = x[each, at]
        x[each, at] = _HIDDEN
        self.second = np.maximum(self.second, np.maximum(x.max(-1), np.minimum(self.top, best)))
        x[each, at] = best
        top, risen = np.maximum(self.top, best), best >= self.top  # the first of equal keys wins
        np.subtract(x, top[:, None], out=x)
        np.maximum(x, _NOTHING, out=x)
        np.exp(x, out=weight)
        weight[each, at] *= ~risen
        stop = start + x.shape[-1]
        first = int(np.searchsorted(self.edges, start, side="right")) - 1
        last = int(np.searchsorted(self.edges, stop, side="left"))
        local = np.clip(self.edges[first : last + 1] - start, 0, stop - start)
        pooled_weight = bin_sum(weight, local)
        drop = np.maximum(self.top - top, _NOTHING)
        shrink = np.exp(drop)
        self.moment = shrink * (self.moment + drop * (1.0 + self.rest))
        self.moment += np.vecdot(weight, x)
        self.rest = shrink * (self.rest + risen) + pooled_weight.sum(-1)
        self.mass *= shrink[:, None]
        self.mass[:, first:last] += pooled_weight
        self.mass[each, np.searchsorted(self.edges, at + start, side="right") - 1] += risen
        self.key = np.where(risen, at + start, self.key)
        self.top = top

    def finish(self) -> dict[str, np.ndarray]:
        """The results, rows first."""
        total = 1.0 + self.rest
        probability = self.mass / total[:, None]
        probability[probability < 1e-290] = 0.0
        return {
            "margin": np.where(self.second > _HIDDEN / 2, self.top - self.second, np.inf),
            "margin_key": self.key.astype(np.float64),
            "top_mass": 1.0 / total,
            "prior_entropy": np.maximum(np.log1p(self.rest) - self.moment / total, 0.0),
            "probability": probability,
        }


def binned_log_prior(
    sink: np.ndarray, kernel: np.ndarray, queries: np.ndarray, edges: np.ndarray
) -> dict[str, np.ndarray]:
    """Means of u(j) + kappa(i - j) over the keys of each bin that a query sees; see `induced_rows`.

    Returns
    -------
    dict of str to ndarray
        "log_prior" and, less each row's mean, "row_centred", of shape (heads, queries, bins),
        float32; NaN where a bin holds no key that is seen.
    """
    heads, length = sink.shape
    first_lag = length - kernel.shape[-1]
    upto = np.minimum(edges, queries[:, None] + 1) if first_lag == 0 else edges[None]
    lags = queries[:, None] + 1 - upto - first_lag
    count = np.diff(upto, axis=-1)
    mean = np.empty((heads, len(queries), len(edges) - 1), dtype=np.float32)
    centred = np.empty_like(mean)
    for head in range(heads):
        # Differences of prefix sums over a million places keep their digits in extended precision.
        of_keys, of_lags = (
            np.concatenate([[0.0], np.cumsum(curve[head], dtype=np.longdouble)])
            for curve in (sink, kernel)
        )
        prefix = of_keys[upto] - of_lags[lags]
        with np.errstate(invalid="ignore"):
            exact = np.diff(prefix, axis=-1).astype(np.float64) / count
        row = (prefix[:, -1:] - prefix[:, :1]).astype(np.float64) / (upto[:, -1:] - upto[:, :1])
        mean[head], centred[head] = exact, exact - row
    return {"log_prior": mean, "row_centred": centred}


@torch.no_grad()
@np.errstate(invalid="ignore")
def direct_rows(
    curves: PriorCurves, queries: np.ndarray, edges: np.ndarray
) -> dict[str, np.ndarray]:
    """The numbers of `induced_rows` and `binned_log_prior` for any prior, one row after another.

    Much slower; for priors that are not a sum of curves, or not finite.
    """
    rows = []
    take = curves.heads if curves.prior.num_heads > 1 else [0]
    for query in queries.tolist():
        keys = torch.arange(query + 1 if curves.first_lag == 0 else curves.length)
        x = curves.prior.log_prior([query], keys)[take, 0]
        weight = x.softmax(-1)
        best = torch.nn.functional.pad(x, (0, 1), value=-math.inf).topk(2, dim=-1)
        seen = np.unique(np.minimum(edges, len(keys)))
        unseen = ((0, 0), (0, len(edges) - len(seen)))
        mean = bin_mean(x.numpy(), seen)
        binned = {
            "probability": bin_sum(weight.numpy(), seen),
            "log_prior": mean,
            "row_centred": mean - x.mean(-1, keepdim=True).numpy(),
        }
        rows.append(
            {
                "margin": (best.values[:, 0] - best.values[:, 1]).numpy(),
                "margin_key": best.indices[:, 0].double().numpy(),
                "top_mass": weight.amax(-1).numpy(),
                "prior_entropy": torch.special.entr(weight).sum(-1).numpy(),
                **{n: np.pad(v, unseen, constant_values=np.nan) for n, v in binned.items()},
            }
        )
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}


# --- bins and components ---


def even_rows(length: int, most: int) -> np.ndarray:
    """At most `most` queries, evenly spaced to the token and ending with the last."""
    # A page draws a map of evenly spaced rows much faster.
    step = math.ceil(length / most)
    return np.arange((length - 1) % step, length, step)


def key_bins(length: int, most: int) -> np.ndarray:
    """Edges of at most `most` bins over the keys, of equal width except the last."""
    return np.append(np.arange(0, length, math.ceil(length / most)), length)


def lag_edges(length: int, points: int, *, causal: bool) -> np.ndarray:
    """Edges of the bins of a curve over the lag, fine around lag 0; see `bins.curve_edges`."""
    ahead = curve_edges(0, length, points)
    return ahead if causal else np.unique(np.concatenate([1 - ahead, ahead]))


def pooled_curves(
    sink: np.ndarray, kernel: np.ndarray, keys: np.ndarray, lags: np.ndarray
) -> dict[str, np.ndarray]:
    """Means of u and kappa in bins, and their range as "..._low" and "..._high"."""
    fields = {}
    for name, curve, edges in (("sink", sink, keys), ("kernel", kernel, lags)):
        fields[name] = bin_mean(curve, edges)
        fields[f"{name}_low"], fields[f"{name}_high"] = bin_range(curve, edges)
    return fields


def component_names(prior: Prior) -> tuple[str, ...]:
    """Which of "sink", "relative" and "recency" a prior has.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior, UniformPrior
    >>> component_names(ALiBiPrior(2)), component_names(UniformPrior())
    (('recency',), ())
    """
    kinds = {part.kind for part in prior.components().values() if not _is_empty(part)}
    return tuple(name for kind, name in COMPONENTS.items() if kind in kinds)


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


def kernel_spectrum(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Frequencies and amplitudes of the waves that a kernel less its line is made of.

    .. math:: A_k = c_k |\sum_l (\kappa(l) - a - b l) e^{-i \omega_k l}|, \qquad
              \omega_k = 2 \pi k / n

    A kernel beside a sink is known up to a line only, so its least-squares line is left out.

    Parameters
    ----------
    kernel : ndarray
        kappa at the lags 0 .. n - 1, nats.

    Returns
    -------
    frequency, amplitude : ndarray
        Radian/token and nats, for k = 1 .. n // 2; none below 4 lags.

    Examples
    --------
    >>> wave = 3 * np.cos(2 * np.pi * np.arange(100) / 20)
    >>> frequency, amplitude = kernel_spectrum(wave + 0.1 * np.arange(100))
    >>> float(2 * np.pi / frequency[amplitude.argmax()]), round(float(amplitude.max()), 1)
    (20.0, 3.0)
    """
    count = len(kernel)
    if count < 4:
        return np.zeros(0), np.zeros(0)
    terms = np.column_stack([np.ones(count), np.arange(count)])
    rest = kernel - terms @ np.linalg.lstsq(terms, kernel, rcond=None)[0]
    waves = np.abs(np.fft.rfft(rest))[1:] * 2 / count
    if count % 2 == 0:
        waves[-1] /= 2
    return 2 * np.pi * np.arange(1, len(waves) + 1) / count, waves


def require_sequence(source: PriorSource) -> None:
    """Raise ValueError for a prior on a grid, whose lag is a vector."""
    if source.prior.axes:
        raise ValueError(
            f"{source.name} must have a prior on a sequence, got one on a grid of "
            f"{source.prior.axes} axes, whose lag is a vector. Call the prior itself: "
            "prior.log_prior(grid_positions(h, w), grid_positions(h, w))"
        )


def part_of(progress: Progress | None, start: float, stop: float) -> Progress:
    """Progress of a part of the work, between two shares of the whole; None reports nothing."""
    if progress is None:
        return lambda share: None
    return lambda share: progress(start + (stop - start) * share)


def _is_empty(part: Prior) -> bool:
    """Whether a component is a spectral one without frequencies."""
    while isinstance(part, ScaledPrior):
        part = part.prior
    return isinstance(part, SpectralPrior) and part.rank == 0
