"""The prior that a model carries inside its logits, explicit or not.

Least squares of logits on a function of the lag and a function of the key, with a constant for
every row; streamed, and solved in O(length) memory. The result draws with `goatviz.plot_prior`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from goatviz.adapters.capture import Record, capture, find_attention
from goatviz.analysis.inputs import forward_calls
from goatviz.analysis.prior import PriorSource, prior_profile
from goatviz.priors.table import KeyTablePrior, LagTablePrior
from goatviz.results import PRIOR_PROFILE, check_result
from goatviz.training.checkpoint import Checkpoint
from goatviz.transport.call import AttentionCall

#: Logits of all heads that are held together, and the most rows among them.
_PAIRS, _ROWS = 2**22, 256
_TOLERANCE = 1e-11
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
        Schema "prior_profile" with heads that are query heads, and `explained_variance`, shape
        (layer, head): the share of the logits' variance within rows that kappa and u explain, 1
        for a head that is all prior, NaN for one whose logits do not vary. kappa and
        u are known up to a line (kappa(l) = b l is u(j) = -b j plus a row constant): here half of
        u's steps over half the length rise.

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
    if max_lag is not None and (
        isinstance(max_lag, bool) or int(max_lag) != max_lag or max_lag < 1
    ):
        raise ValueError(f"max_lag must be a positive number of tokens, got {max_lag!r}")
    fits: dict[int, _Fit] = {}
    if isinstance(source, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        if layers is not None:
            raise TypeError("layers must not be given with a Record: capture them alone")
        name, names = "record", source.layers
        _gather(fits, source)
    else:
        name = source.name if isinstance(source, Checkpoint) else type(source).__name__
        model = source.model if isinstance(source, Checkpoint) else source
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"source must be a model, a Checkpoint or a Record, got {type(source).__name__}"
            )
        names = tuple(find_attention(model))
        for arguments in forward_calls(inputs, tokenizer):
            with capture(model, layers=layers, statistics=(), keep="projections") as record:
                with torch.no_grad():
                    model(arguments) if isinstance(arguments, Tensor) else model(**arguments)
            _gather(fits, record)
    sources, explained = [], []
    longest = max(length for fit in fits.values() for length in fit.lengths)
    causal = all(fit.causal for fit in fits.values())
    for layer, fit in sorted(fits.items()):
        kernel, sink, share = fit.solve(max_lag)
        prior = LagTablePrior(kernel, first_lag=fit.first_lag) + KeyTablePrior(sink)
        sources.append(PriorSource(names[layer], prior, fit.causal, layer=layer))
        explained.append(share)
    profile.setdefault("length", longest)
    result = prior_profile(sources, **profile)
    heads = result["head"].values
    values = torch.full((len(sources), len(heads)), math.nan)
    for at, share in enumerate(explained):
        for place, head in enumerate(heads):
            if head < len(share):
                values[at, place] = share[head]
    field_ = PRIOR_PROFILE.fields["explained_variance"]
    result["explained_variance"] = (
        field_.dims,
        values.numpy(),
        {"units": field_.units, "long_name": field_.long_name},
    )
    count = max(sum(fit.lengths.values()) for fit in fits.values())
    result.attrs.update(
        source=name,
        title="Implied prior",
        num_layers=len(names),
        notes=f"least squares of the logits of {count} inputs, longest {longest:,} tokens",
    )
    result.attrs["two_sided"] = int(not causal)
    return check_result(result, PRIOR_PROFILE)


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
class _Fit:
    """Sums of one layer's logits over rows, lags and keys, by sequence length."""

    heads: int
    name: str
    geometries: dict[int, _Geometry] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    by_lag: dict[int, Tensor] = field(default_factory=dict)
    by_key: dict[int, Tensor] = field(default_factory=dict)
    variance: Tensor | float = 0.0
    causal: bool = True
    first_lag: int = 0

    def add(self, call: AttentionCall, batch: int) -> None:
        """Stream one sequence's logits: row-centred sums by lag and by key, and their squares."""
        start, stop = self._intervals(call, batch)
        length = len(start)
        if length not in self.geometries:
            self.geometries[length] = _Geometry(start, stop, length)
            self.lengths[length] = 0
            self.by_lag[length] = torch.zeros(self.heads, 2 * length - 1, dtype=torch.float64)
            self.by_key[length] = torch.zeros(self.heads, length, dtype=torch.float64)
        geometry = self.geometries[length]
        if not (torch.equal(geometry.start, start) and torch.equal(geometry.stop, stop)):
            raise ValueError(f"layer {self.name}: inputs of one length have different masks")
        self.lengths[length] += 1
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
            self.variance = self.variance + logits.square().sum((-2, -1))
            self.by_key[length][:, low:high] += logits.sum(-2)
            place = slice(a - high + length, rows.stop - low + length - 1)
            self.by_lag[length][:, place] += _diagonals(logits)

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

    def solve(self, max_lag: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """kappa (heads, lags), u (heads, keys) and the explained variance (heads,)."""
        longest = max(self.lengths)
        most = longest - 1 if max_lag is None else min(int(max_lag), longest - 1)
        lags = torch.arange(1 - longest, longest).clamp(-most, most) + most
        system = _System(self, longest, lags, 2 * most + 1)
        right = system.right()
        kernel, sink = system.solve(right)
        explained = (right[0] * kernel).sum(-1) + (right[1] * sink).sum(-1)
        total = self.variance
        share = torch.where(total > 0, explained / total.clamp(min=1e-300), math.nan)
        seen = system.counts()[0] > 0
        if most == longest - 1 and longest > 2:
            kernel, sink = _without_drift(kernel, sink, most)
        first = int(seen.nonzero()[0]) if bool(seen.any()) else most
        first = most if self.causal else first
        self.first_lag = first - most
        last = int(seen.nonzero()[-1]) + 1
        kernel = kernel[:, first:last]
        kernel = kernel - kernel.mean(-1, keepdim=True)
        sink = sink - sink.median(-1, keepdim=True).values
        return kernel, sink, share.clamp(0.0, 1.0)


class _System:
    """The normal equations of all lengths together, as an operator on (kappa, u)."""

    def __init__(self, fit: _Fit, longest: int, lags: Tensor, count: int) -> None:
        self.fit, self.longest, self.lags, self.count = fit, longest, lags, count

    def _spread(self, kernel: Tensor, length: int) -> Tensor:
        places = self.lags[self.longest - length : self.longest + length - 1]
        return kernel[..., places]

    def _fold(self, values: Tensor, length: int) -> Tensor:
        places = self.lags[self.longest - length : self.longest + length - 1]
        out = values.new_zeros(*values.shape[:-1], self.count)
        return out.index_add_(-1, places, values)

    def right(self) -> tuple[Tensor, Tensor]:
        fit = self.fit
        kernel = torch.zeros(fit.heads, self.count, dtype=torch.float64)
        sink = torch.zeros(fit.heads, self.longest, dtype=torch.float64)
        for length in fit.lengths:
            kernel += self._fold(fit.by_lag[length], length)
            sink[:, :length] += fit.by_key[length]
        return kernel, sink

    def counts(self) -> tuple[Tensor, Tensor]:
        kernel = torch.zeros(self.count, dtype=torch.float64)
        sink = torch.zeros(self.longest, dtype=torch.float64)
        for length, number in self.fit.lengths.items():
            geometry = self.fit.geometries[length]
            kernel += number * self._fold(geometry.lags, length)
            sink[:length] += number * geometry.keys
        return kernel, sink

    def apply(self, kernel: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        """D^T (1 - mean over rows) D (kappa, u)."""
        out_kernel, out_sink = torch.zeros_like(kernel), torch.zeros_like(sink)
        for length, number in self.fit.lengths.items():
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

    def solve(self, right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Conjugate gradients, all heads at once, scaled by the counts."""
        split = self.count
        scale = torch.cat(self.counts()).clamp(min=1.0).rsqrt()

        def operator(x: Tensor) -> Tensor:
            x = x * scale
            return torch.cat(self.apply(x[:, :split], x[:, split:]), dim=-1) * scale

        residual = torch.cat(right, dim=-1) * scale
        goal = _TOLERANCE * residual.norm(dim=-1).clamp(min=1e-300)
        x = torch.zeros_like(residual)
        direction, power = residual.clone(), residual.square().sum(-1)
        # Narrow windows over long inputs need about as many steps as there are unknowns.
        for _ in range(max(_MOST_STEPS, 2 * residual.shape[-1])):
            if bool((power.sqrt() <= goal).all()):
                break
            image = operator(direction)
            curvature = (direction * image).sum(-1)
            step = torch.where(curvature > 0, power / curvature.clamp(min=1e-300), 0.0)
            x = x + step.unsqueeze(-1) * direction
            residual = residual - step.unsqueeze(-1) * image
            now = residual.square().sum(-1)
            direction = residual + (now / power.clamp(min=1e-300)).unsqueeze(-1) * direction
            power = now
        x = x * scale
        return x[:, :split], x[:, split:]


def _diagonals(blocks: Tensor) -> Tensor:
    """Sums along i - j of blocks, from the smallest lag: one reshape puts diagonals in columns."""
    *heads, rows, columns = blocks.shape
    width = rows + columns - 1
    padded = torch.nn.functional.pad(blocks.flip(-1), (0, rows)).flatten(-2)
    return padded[..., : rows * width].view(*heads, rows, width).sum(-2)


def _without_drift(kernel: Tensor, sink: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Move u's typical slope into kappa: b (j - i) is a function of the lag, up to a row constant.

    The median step over half the length: a spike at the first key does not tilt it.
    """
    half = sink.shape[-1] // 2
    slope = (sink[:, half:] - sink[:, :-half]).median(-1, keepdim=True).values / half
    index = torch.arange(sink.shape[-1], dtype=sink.dtype)
    lags = torch.arange(-most, most + 1, dtype=sink.dtype)
    return kernel - slope * lags, sink - slope * index
