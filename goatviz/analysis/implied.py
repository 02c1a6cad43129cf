"""The prior that a model carries inside its logits, explicit or not.

Least squares of logits on a function of the lag and a function of the key, with a constant for
every row; streamed, and solved in O(length) memory. The result draws with `goatviz.plot_prior`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import bins, checks
from goatviz.adapters.capture import Record, capture, find_attention
from goatviz.analysis.inputs import check_fits, forward_calls, named_model, run_model
from goatviz.analysis.intervals import student_quantile
from goatviz.analysis.prior import PriorSource, prior_profile
from goatviz.priors.base import Prior
from goatviz.priors.table import KeyTablePrior, LagTablePrior
from goatviz.results import PRIOR_PROFILE, check_result
from goatviz.training.checkpoint import Checkpoint
from goatviz.transport.call import AttentionCall

if TYPE_CHECKING:
    import xarray as xr

#: Logits of all heads that are held together, and the most rows among them: a cache holds a few.
_PAIRS, _ROWS = 2**19, 64
#: Numbers that are held to solve for several sets of inputs together.
_NUMBERS = 2**22
_TOLERANCE = 1e-11
#: Most groups that inputs are dealt to, each of which is held out once.
_GROUPS = 8
#: Share of the logits' variance above which a head is like a prior.
PRIOR_LIKE = 0.5
VERDICTS = ("prior-like", "content-like", "not known")
_MOST_STEPS = 4000


def implied_prior(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    max_lag: int | None = None,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
    **profile: Any,
) -> xr.Dataset:
    r"""Fit logit_ij ~ c_i + kappa(i - j) + u(j) over all allowed pairs of all inputs.

    Parameters
    ----------
    source : nn.Module, Checkpoint or Record
        A model that `goatviz.capture` can watch; or a record with projections.
    inputs : Tensor, mapping, str, or sequence of them
        As in `goatviz.sink_profile`.
    max_lag : int, optional
        kappa is one number beyond this distance, tokens; default the longest input's.
    layers : int, str or sequence of them, optional
        As in `goatviz.capture`; not with a record.
    tokenizer : callable, optional
        As in `goatviz.sink_profile`.
    **profile
        Passed to `goatviz.prior_profile`: length, heads, resolution, points, queries, keys.

    Returns
    -------
    xarray.Dataset
        Schema "prior_profile" with heads that are query heads, and what speaks for the fit:

        - `explained_variance` (layer, head): the share of the logits' variance within rows that
          kappa and u explain, 1 for a head that is all prior, NaN if its logits do not vary;
        - `held_out`: the same share of inputs that the fit has not seen, with its 95 % interval
          over groups of inputs; `verdict`: "prior-like" where that interval lies above 0.5,
          "content-like" where it lies below, else "not known";
        - `kernel_error`, `sink_error`: half the width of 95 % intervals (jackknife over up to 8
          groups of inputs, Student's t); `lag_inputs`, `key_inputs`: how many inputs saw each;
        - `rotary_frequency` (layer, pair), where it is known, and `rotary_share` (layer, head): the
          share of kappa's variance that a line and waves of these frequencies explain (adjusted
          R^2), for kernels at least twice as long as there are terms.

        With one input there is no interval. kappa and u are known up to a line (kappa(l) = b l is
        u(j) = -b j plus a row constant): here half of u's steps over half the length rise.

    Raises
    ------
    TypeError
        If the model cannot be captured or inputs are missing.
    ValueError
        If a record has no projections, attention is not causal, bidirectional or windowed over
        one sequence, or an argument is out of range.

    Notes
    -----
    The normal equations are never formed: every (row, lag) and (lag, key) meets at most once, so
    that the operator is a handful of cumulative sums, and conjugate gradients need O(length)
    memory; the right-hand side is streamed over blocks of rows. Logits include the explicit
    prior of a GOAT model, which the fit recovers.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> implied = implied_prior(load_pretrained("copy-mixture-1-goat"), ids)
    >>> bool(implied["explained_variance"].min() > 0.5)
    True
    """
    _check_lag(max_lag)
    fits, names, name = _fitted(source, inputs, layers, tokenizer)
    sources, solutions = [], []
    longest = max(fit.longest for fit in fits.values())
    causal = all(fit.causal for fit in fits.values())
    for layer, fit in sorted(fits.items()):
        solution = fit.solve(max_lag)
        solutions.append(solution)
        sources.append(PriorSource(names[layer], solution.prior, fit.causal, layer=layer))
    profile.setdefault("length", longest)
    result = prior_profile(sources, **profile)
    evidence = {}
    for field_name, values in _evidence(result, [fits[layer] for layer in sorted(fits)], solutions):
        field_ = PRIOR_PROFILE.fields[field_name]
        attrs = {"units": field_.units, "long_name": field_.long_name}
        evidence[field_name] = (field_.dims, values, attrs)
    result = result.assign(evidence)
    count = max(fit.count for fit in fits.values())
    result.attrs.update(
        source=name,
        title="Implied prior",
        num_layers=len(names),
        notes=f"least squares of the logits of {count} inputs, longest {longest:,} tokens",
    )
    result.attrs["two_sided"] = int(not causal)
    return check_result(result, PRIOR_PROFILE)


def fit_priors(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    max_lag: int | None = None,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
) -> dict[int, Prior]:
    """The priors that a model's logits imply, by layer, one head for each query head.

    Parameters
    ----------
    source, inputs, max_lag, layers, tokenizer
        As in `implied_prior`.

    Returns
    -------
    dict of int to Prior
        Sums of a `LagTablePrior` ("relative") and a `KeyTablePrior` ("sink"), in float64: what
        `Ablate` subtracts, and what `goatviz.explain` takes out of the scores.

    Raises
    ------
    TypeError, ValueError
        As in `implied_prior`.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> list(fit_priors(load_pretrained("copy-mixture-1-goat"), ids)[0].components())
    ['relative', 'sink']
    """
    _check_lag(max_lag)
    fits, _, _ = _fitted(source, inputs, layers, tokenizer)
    return {layer: fit.solve(max_lag, held_out=False).prior for layer, fit in sorted(fits.items())}


def _check_lag(max_lag: int | None) -> None:
    if max_lag is not None:
        checks.positive_int("max_lag", max_lag)


def _fitted(
    source: nn.Module | Checkpoint | Record,
    inputs: Any,
    layers: Sequence[int | str] | int | None,
    tokenizer: Any,
) -> tuple[dict[int, _Fit], tuple[str, ...], str]:
    """Sums of every layer's logits, the names of all layers, and what the source is called."""
    fits: dict[int, _Fit] = {}
    if isinstance(source, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        if layers is not None:
            raise TypeError("layers must not be given with a Record: capture them alone")
        _gather(fits, source)
        return fits, source.layers, "record"
    name, model = named_model(source)
    calls = list(forward_calls(inputs, tokenizer))
    for arguments in calls:
        check_fits(model, arguments)
    for arguments in calls:
        with capture(model, layers=layers, statistics=(), keep="projections") as record:
            run_model(model, arguments)
        _gather(fits, record)
    return fits, tuple(find_attention(model)), name


def _evidence(
    profile: xr.Dataset, fits: list[_Fit], solutions: list[_Solution]
) -> Iterator[tuple[str, np.ndarray]]:
    """What speaks for the fits: variances explained, intervals of the curves, how many saw them."""
    heads = profile["head"].values
    for name in ("explained_variance", "held_out", "held_out_low", "held_out_high"):
        yield name, np.stack([_by_head(getattr(one, name), heads) for one in solutions])
    held_out = zip(solutions, strict=True)
    yield "verdict", np.array([[_verdict(one, head) for head in heads] for (one,) in held_out])
    for dim, curve in (("lag", "kernel"), ("key", "sink")):
        start, stop = profile[dim].values, profile[f"{dim}_stop"].values
        edges = np.append(start, stop[-1])
        errors, counts = [], []
        for fit, one in zip(fits, solutions, strict=True):
            first = one.first_lag if dim == "lag" else 0
            replicates = _table(getattr(one, f"{curve}s"), first, edges)
            errors.append(_by_head(_half_width(replicates), heads))
            counts.append(
                _table(fit.inputs(dim)[None], 1 - fit.longest if dim == "lag" else 0, edges)
            )
        yield f"{curve}_error", np.stack(errors)
        yield f"{dim}_inputs", np.nan_to_num(np.concatenate(counts))
    speeds = [[] if fit.rotary is None else fit.rotary.unique().numpy() for fit in fits]
    speeds = [np.array([speed for speed in each if speed > 0]) for each in speeds]
    if most := max(len(each) for each in speeds):
        fill = [np.pad(each, (0, most - len(each)), constant_values=np.nan) for each in speeds]
        yield "rotary_frequency", np.stack(fill)
        pairs = zip(solutions, speeds, strict=True)
        shares = [_rotary_share(one.prior.parts[0].kernel, each) for one, each in pairs]
        yield "rotary_share", np.stack([_by_head(share, heads) for share in shares])


def _rotary_share(kernel: Tensor, frequencies: np.ndarray) -> np.ndarray:
    """Adjusted R^2 of a line and waves of these frequencies on kappa over the lags, by head."""
    lags = np.arange(kernel.shape[1], dtype=np.float64)
    waves = np.outer(lags, frequencies)
    terms = np.column_stack([np.ones_like(lags), lags, np.cos(waves), np.sin(waves)])
    if not len(frequencies) or len(lags) < 2 * terms.shape[1]:
        return np.full(len(kernel), np.nan)
    curves = kernel.numpy().T
    # Slow waves are nearly a line: a projection is exact where coefficients are not.
    basis, size, _ = np.linalg.svd(terms, full_matrices=False)
    basis = basis[:, size > size[0] * len(lags) * np.finfo(np.float64).eps]
    rest = ((curves - basis @ (basis.T @ curves)) ** 2).sum(0) / (len(lags) - basis.shape[1])
    total = ((curves - curves.mean(0)) ** 2).sum(0) / (len(lags) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, 1.0 - rest / total, np.nan)


def _table(values: Tensor, first: int, edges: np.ndarray) -> np.ndarray:
    """Means in bins of tables whose first column is the place `first`, (..., bins); else NaN."""
    table = np.full((*values.shape[:-1], edges[-1] - edges[0]), np.nan)
    low, high = max(first, edges[0]), min(first + values.shape[-1], edges[-1])
    if high > low:
        table[..., low - edges[0] : high - edges[0]] = values[..., low - first : high - first]
    return bins.bin_mean(table, edges - edges[0])


def _half_width(replicates: np.ndarray) -> np.ndarray:
    """Half a 95 % interval by the jackknife over groups of inputs; NaN without two of them."""
    count = len(replicates)
    if count < 2:
        return np.full(replicates.shape[1:], np.nan)
    spread = ((replicates - replicates.mean(0)) ** 2).sum(0) * (count - 1) / count
    return student_quantile(count) * np.sqrt(spread)


def _by_head(values: Tensor | np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Values by head, float64, for these heads; NaN for a head that the layer does not have."""
    values = np.asarray(values, dtype=np.float64)
    out = np.full((len(heads), *values.shape[1:]), np.nan)
    if len(values) == 1 and len(heads) > 1:
        values = np.broadcast_to(values, (int(heads.max()) + 1, *values.shape[1:]))
    known = heads < len(values)
    out[known] = values[heads[known]]
    return out


def _verdict(solution: _Solution, head: int) -> str:
    """One of `VERDICTS` for a head: the side of `PRIOR_LIKE` on which its whole interval lies."""
    if head >= len(solution.held_out_low):
        return VERDICTS[-1]
    if solution.held_out_low[head] > PRIOR_LIKE:
        return VERDICTS[0]
    return VERDICTS[1] if solution.held_out_high[head] < PRIOR_LIKE else VERDICTS[2]


def _gather(fits: dict[int, _Fit], record: Record) -> None:
    for captured in record.check_calls():
        call = captured.projections
        fit = fits.setdefault(captured.layer, _Fit(heads=call.shape[1], name=captured.name))
        for batch in range(call.shape[0]):
            fit.add(call, batch)


class _Geometry:
    """Allowed pairs of one sequence: for row i the keys [start_i, stop_i), both non-decreasing."""

    def __init__(self, start: Tensor, stop: Tensor, length: int) -> None:
        index = torch.arange(length)
        self.length = length
        self.start, self.stop = start, stop
        self.rows = (stop - start).double()
        # Rows that may use key j: stop_i > j and start_i <= j.
        self.first = torch.searchsorted(stop, index, right=True)
        self.last = torch.searchsorted(start, index, right=True)
        self.keys = (self.last - self.first).clamp(min=0).double()
        ones = torch.ones(length, dtype=torch.float64)
        self.lags = self.lags_from_rows(ones)

    # kappa is held over lags 1 - length .. length - 1, at place lag + length - 1.

    def rows_from_lags(self, kernel: Tensor) -> Tensor:
        """sum over j in [start_i, stop_i) of kappa(i - j)."""
        total = _cumulative(kernel)
        index = torch.arange(self.length) + self.length - 1
        return total[..., index - self.start + 1] - total[..., index - self.stop + 1]

    def rows_from_keys(self, sink: Tensor) -> Tensor:
        total = _cumulative(sink)
        return total[..., self.stop] - total[..., self.start]

    def keys_from_rows(self, rows: Tensor) -> Tensor:
        total = _cumulative(rows)
        return total[..., self.last.clamp(min=self.first)] - total[..., self.first]

    def lags_from_rows(self, rows: Tensor) -> Tensor:
        """sum over rows that have a pair at each lag: row i has lags (i - stop_i, i - start_i]."""
        steps = rows.new_zeros(*rows.shape[:-1], 2 * self.length)
        index = torch.arange(self.length) + self.length - 1
        steps.index_add_(-1, index - self.stop + 1, rows)
        steps.index_add_(-1, index - self.start + 1, -rows)
        return steps.cumsum(-1)[..., :-1]

    def keys_from_lags(self, kernel: Tensor) -> Tensor:
        """sum over rows i of [first_j, last_j) of kappa(i - j)."""
        total = _cumulative(kernel)
        index = torch.arange(self.length)
        high = self.last.clamp(min=self.first) - index + self.length - 1
        return total[..., high] - total[..., self.first - index + self.length - 1]

    def lags_from_keys(self, sink: Tensor) -> Tensor:
        steps = sink.new_zeros(*sink.shape[:-1], 2 * self.length)
        index = torch.arange(self.length)
        high = self.last.clamp(min=self.first) - index + self.length - 1
        steps.index_add_(-1, self.first - index + self.length - 1, sink)
        steps.index_add_(-1, high, -sink)
        return steps.cumsum(-1)[..., :-1]


def _cumulative(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


@dataclass
class _Sums:
    """Row-centred logits of inputs of one length, summed by lag and by key; and how many."""

    by_lag: Tensor
    by_key: Tensor
    count: int = 0


class _Solution(NamedTuple):
    """The least squares of one layer.

    Attributes
    ----------
    prior : Prior
        kappa + u.
    first_lag : int
        Lag of the first column of kappa.
    explained_variance, held_out, held_out_low, held_out_high : ndarray
        Shape (heads,); see `implied_prior`.
    kernels, sinks : Tensor
        kappa and u without one group of inputs each, shape (groups, heads, lags or keys), NaN
        where the others have no pair; of no groups if they were not fitted.
    """

    prior: Prior
    first_lag: int
    explained_variance: np.ndarray
    held_out: np.ndarray
    held_out_low: np.ndarray
    held_out_high: np.ndarray
    kernels: Tensor
    sinks: Tensor


@dataclass
class _Fit:
    """Sums of one layer's logits over rows, lags and keys, by group of inputs and length."""

    heads: int
    name: str
    geometries: dict[int, _Geometry] = field(default_factory=dict)
    groups: list[dict[int, _Sums]] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    count: int = 0
    causal: bool = True
    rotary: Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max(self.geometries)

    def inputs(self, dim: str) -> Tensor:
        """How many inputs have a pair at each lag (from 1 - longest), or at each key."""
        total = torch.zeros(self.longest if dim == "key" else 2 * self.longest - 1)
        for group in self.groups:
            for length, sums in group.items():
                geometry = self.geometries[length]
                seen = geometry.keys if dim == "key" else geometry.lags
                start = 0 if dim == "key" else self.longest - length
                total[start : start + len(seen)] += sums.count * (seen > 0)
        return total

    def add(self, call: AttentionCall, batch: int) -> None:
        """Stream one sequence's logits: row-centred sums by lag and by key, and their squares."""
        start, stop = self._intervals(call, batch)
        length = len(start)
        geometry = self.geometries.setdefault(length, _Geometry(start, stop, length))
        if not (torch.equal(geometry.start, start) and torch.equal(geometry.stop, stop)):
            raise ValueError(f"layer {self.name}: inputs of one length have different masks")
        at = self.count % _GROUPS
        if at == len(self.groups):
            self.groups.append({})
            self.variances.append(torch.zeros(self.heads, dtype=torch.float64))
        if length not in self.groups[at]:
            zeros = geometry.start.new_zeros((), dtype=torch.float64)
            self.groups[at][length] = _Sums(
                zeros.new_zeros(self.heads, 2 * length - 1), zeros.new_zeros(self.heads, length)
            )
        sums = self.groups[at][length]
        sums.count += 1
        self.count += 1
        self.rotary = call.rotary
        self.causal = self.causal and bool((stop <= torch.arange(length) + 1).all())
        step = max(1, min(_ROWS, _PAIRS // (self.heads * length)))
        for a in range(0, length, step):
            rows = slice(a, min(a + step, length))
            low, high = int(start[rows].min()), int(stop[rows].max())
            window = call.logits(batch, slice(None), rows, slice(low, high), lanes=True)
            hidden = ~window.allowed.cpu()
            logits = window.logits.cpu().masked_fill_(hidden, 0.0)
            count = hidden.shape[-1] - hidden.sum(-1, keepdim=True)
            logits.sub_(logits.sum(-1, keepdim=True) / count).masked_fill_(hidden, 0.0)
            self.variances[at] += logits.square().sum((-2, -1))
            sums.by_key[:, low:high] += logits.sum(-2)
            place = slice(a - high + length, rows.stop - low + length - 1)
            sums.by_lag[:, place] += _diagonals(logits)

    def _intervals(self, call: AttentionCall, batch: int) -> tuple[Tensor, Tensor]:
        """The interval of keys of each row of one sequence, if that is what its mask says."""
        chosen, start, stop = call.visibility.entry(batch)
        length, n_keys = call.shape[2:]
        if length != n_keys:
            raise ValueError(
                f"layer {self.name}: {length} queries over {n_keys} keys; implied_prior needs "
                "whole sequences (no cached decoding, no cross-attention)"
            )
        ordered = torch.equal(chosen, torch.arange(length))
        if call.visibility.dense is not None or not ordered or bool((stop <= start).any()):
            raise ValueError(f"layer {self.name}: padding and irregular masks cannot be fitted")
        if bool((start.diff() < 0).any() | (stop.diff() < 0).any()):
            raise ValueError(f"layer {self.name}: irregular masks cannot be fitted")
        return start, stop

    def solve(self, max_lag: int | None, *, held_out: bool = True) -> _Solution:
        """kappa, u and what speaks for them; `held_out` fits without each group as well."""
        longest, groups = self.longest, len(self.groups)
        most = longest - 1 if max_lag is None else min(int(max_lag), longest - 1)
        every, each = torch.ones(1, groups).double(), torch.eye(groups).double()
        held_out = held_out and groups > 1
        # All inputs explain themselves; the others explain each group.
        fitted = torch.cat([every, 1 - each]) if held_out else every
        tested = torch.cat([every, each]) if held_out else every
        kernel, sink, explained = self._solve(fitted, tested, most)
        lags, keys = _System(self, fitted, most).counts()
        lags, keys = lags[:: self.heads].unsqueeze(1), keys[:: self.heads].unsqueeze(1)
        seen = (lags[0, 0] > 0).nonzero()
        first = most if self.causal or not len(seen) else int(seen[0])
        shown = slice(first, int(seen[-1]) + 1)
        kernel, sink = self._gauged(kernel, sink, most, shown)
        total = torch.stack(self.variances).sum(0)
        share = torch.where(total > 0, explained[0] / total.clamp(min=1e-300), nan)
        whole = LagTablePrior(kernel[0], first_lag=first - most) + KeyTablePrior(sink[0])
        return _Solution(
            whole,
            first - most,
            share.clamp(0.0, 1.0).numpy(),
            *self._unseen(explained[1:]),
            torch.where(lags[1:, :, shown] > 0, kernel[1:], nan),
            torch.where(keys[1:] > 0, sink[1:], nan),
        )

    def _solve(self, fitted: Tensor, tested: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """kappa and u of sets of groups, and the variance that they explain in other sets."""
        # About a dozen numbers for each unknown are held.
        together = max(1, _NUMBERS // (12 * self.heads * (2 * most + 1 + self.longest)))
        parts = []
        for some, others in zip(fitted.split(together), tested.split(together), strict=True):
            kernel, sink = _System(self, some, most).solve()
            parts.append((kernel, sink, _System(self, others, most).explained(kernel, sink)))
        each = (
            torch.cat(part).unflatten(0, (len(fitted), -1)) for part in zip(*parts, strict=True)
        )
        return tuple(each)

    def _unseen(self, explained: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Share of variance explained in held-out groups and its 95 % interval, (heads,) each."""
        count = len(explained)
        if not count:
            return (np.full(self.heads, nan),) * 3
        variances = torch.stack(self.variances)
        total = variances.sum(0)
        mean = torch.where(total > 0, explained.sum(0) / total.clamp(min=1e-300), nan).numpy()
        by_group = explained / variances.clamp(min=1e-300)
        half = by_group.std(0).numpy() * student_quantile(count) / math.sqrt(count)
        return mean, mean - half, mean + half

    def _gauged(
        self, kernel: Tensor, sink: Tensor, most: int, shown: slice
    ) -> tuple[Tensor, Tensor]:
        """kappa at the lags that are shown, with mean 0, and u with median 0, without drift."""
        if most == self.longest - 1 and self.longest > 2:
            kernel, sink = _without_drift(kernel, sink, most)
        kernel = kernel[..., shown]
        kernel = kernel - kernel.mean(-1, keepdim=True)
        return kernel, sink - sink.median(-1, keepdim=True).values


class _System:
    """The normal equations of sets of groups of inputs, as an operator on (kappa, u).

    kappa and u have a row for each head of each set; `sets` has shape (sets, groups), 1 where a set
    holds a group, else 0.
    """

    def __init__(self, fit: _Fit, sets: Tensor, most: int) -> None:
        self.fit, self.longest, self.count = fit, fit.longest, 2 * most + 1
        self.lags = torch.arange(1 - self.longest, self.longest).clamp(-most, most) + most
        self.sets = sets
        self.numbers: dict[int, Tensor] = {}
        for length in fit.geometries:
            counts = [group[length].count if length in group else 0 for group in fit.groups]
            numbers = sets @ torch.tensor(counts).double()
            self.numbers[length] = numbers.repeat_interleave(fit.heads).unsqueeze(-1)

    def explained(self, kernel: Tensor, sink: Tensor) -> Tensor:
        """Variance that any (kappa, u) take from these inputs, one number a row."""
        right, image = self.right(), self.apply(kernel, sink)
        parts = zip((kernel, sink), right, image, strict=True)
        return sum((part * (2 * r - a)).sum(-1) for part, r, a in parts)

    def _spread(self, kernel: Tensor, length: int) -> Tensor:
        places = self.lags[self.longest - length : self.longest + length - 1]
        return kernel[..., places]

    def _fold(self, values: Tensor, length: int) -> Tensor:
        places = self.lags[self.longest - length : self.longest + length - 1]
        out = values.new_zeros(*values.shape[:-1], self.count)
        return out.index_add_(-1, places, values)

    def right(self) -> tuple[Tensor, Tensor]:
        """D^T (1 - mean over rows) of the logits."""
        groups, heads = len(self.fit.groups), self.fit.heads
        kernel = torch.zeros(groups, heads, self.count, dtype=torch.float64)
        sink = torch.zeros(groups, heads, self.longest, dtype=torch.float64)
        for at, group in enumerate(self.fit.groups):
            for length, sums in group.items():
                kernel[at] += self._fold(sums.by_lag, length)
                sink[at, :, :length] += sums.by_key
        kernel, sink = (torch.tensordot(self.sets, part, 1) for part in (kernel, sink))
        return kernel.flatten(0, 1), sink.flatten(0, 1)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Pairs at each lag and key."""
        kernel, sink = self._zeros()
        for length, number in self.numbers.items():
            geometry = self.fit.geometries[length]
            kernel += number * self._fold(geometry.lags, length)
            sink[:, :length] += number * geometry.keys
        return kernel, sink

    def _zeros(self) -> tuple[Tensor, Tensor]:
        rows = len(self.sets) * self.fit.heads
        kernel = torch.zeros(rows, self.count, dtype=torch.float64)
        return kernel, kernel.new_zeros(rows, self.longest)

    def apply(self, kernel: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        """D^T (1 - mean over rows) D (kappa, u)."""
        out_kernel, out_sink = self._zeros()
        for length, number in self.numbers.items():
            geometry = self.fit.geometries[length]
            wide, keys = self._spread(kernel, length), sink[..., :length]
            mean = (geometry.rows_from_lags(wide) + geometry.rows_from_keys(keys)) / geometry.rows
            lag = geometry.lags * wide + geometry.lags_from_keys(keys)
            lag = lag - geometry.lags_from_rows(mean)
            key = geometry.keys * keys + geometry.keys_from_lags(wide)
            key = key - geometry.keys_from_rows(mean)
            out_kernel += number * self._fold(lag, length)
            out_sink[..., :length] += number * key
        return out_kernel, out_sink

    def solve(self) -> tuple[Tensor, Tensor]:
        """Conjugate gradients, all rows at once, scaled by the counts."""
        split = self.count
        scale = torch.cat(self.counts(), dim=-1).clamp(min=1.0).rsqrt()

        def operator(x: Tensor) -> Tensor:
            x = x * scale
            return torch.cat(self.apply(x[:, :split], x[:, split:]), dim=-1) * scale

        residual = torch.cat(self.right(), dim=-1) * scale
        goal = _TOLERANCE * residual.norm(dim=-1).clamp(min=1e-300)
        x = torch.zeros_like(residual)
        direction, power = residual.clone(), residual.square().sum(-1)
        # Narrow windows over long inputs need about as many steps as there are unknowns.
        for _ in range(max(_MOST_STEPS, 2 * residual.shape[-1])):
            # A set rests once all of its heads are there.
            active = (power.sqrt() > goal).view(len(self.sets), -1).any(-1)
            if not bool(active.any()):
                break
            image = operator(direction)
            curvature = (direction * image).sum(-1)
            moves = active.repeat_interleave(self.fit.heads) & (curvature > 0)
            step = torch.where(moves, power / curvature.clamp(min=1e-300), 0.0).unsqueeze(-1)
            x.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1.0)
            now = residual.square().sum(-1)
            direction.mul_((now / power.clamp(min=1e-300)).unsqueeze(-1)).add_(residual)
            power = now
        x = x * scale
        return x[:, :split], x[:, split:]


def _diagonals(blocks: Tensor) -> Tensor:
    """Sums along i - j of blocks, from the smallest lag: one reshape puts diagonals in columns."""
    *heads, rows, columns = blocks.shape
    width = rows + columns
    # Rows one number narrower than they are read shift by one each.
    held = blocks.new_zeros(*heads, rows * width)
    narrow = held[..., rows - 1 : rows - 1 + rows * (width - 1)].unflatten(-1, (rows, width - 1))
    narrow[..., :columns] = blocks
    return held.unflatten(-1, (rows, width)).sum(-2)[..., :-1].flip(-1)


def _without_drift(kernel: Tensor, sink: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Move u's typical slope into kappa: b (j - i) is a function of the lag, up to a row constant.

    The median step over half the length: a spike at the first key does not tilt it.
    """
    half = sink.shape[-1] // 2
    slope = (sink[..., half:] - sink[..., :-half]).median(-1, keepdim=True).values / half
    index = torch.arange(sink.shape[-1], dtype=sink.dtype)
    lags = torch.arange(-most, most + 1, dtype=sink.dtype)
    return kernel - slope * lags, sink - slope * index
