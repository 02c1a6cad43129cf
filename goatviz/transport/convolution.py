"""The normaliser of a prior made of lag and key terms: a convolution, not one exp per pair.

log sum_j exp(kappa(i - j) + u(j)) over consecutive tokens is a positive convolution of exp(kappa)
with exp(u). It is summed block by block as products of a Toeplitz block with all key blocks that
stand at the same distance, in float64: no cancellation, and one exponential per lag. `blockwise`
tries this first and sums pair by pair where it does not apply.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from goatviz.priors.base import Prior
from goatviz.priors.separable import is_separable, key_table, lag_table
from goatviz.transport.call import AttentionCall

_LOG2E = 1.0 / math.log(2.0)
# Sizes of a block in positions, tried in this order.
_BLOCKS = (256, 64)
# Bits between the largest and the smallest term of two blocks; float64 holds about 1,074.
_WIDEST = 900.0
# Rows on which the parts are compared with the prior itself, and the nats they may differ by.
_CHECKED_ROWS = 5
_TOLERANCE = 1e-3


class _Band(NamedTuple):
    """Consecutive queries and keys; lags from `low` to `high`, inclusive, are allowed."""

    first_query: int
    queries: int
    first_key: int
    keys: int
    low: int
    high: int


class LagAndKey(NamedTuple):
    """A log-prior kappa(i - j) + u(j) on a band of lags, in the gauge of `log_prior`.

    Attributes
    ----------
    kernel : Tensor
        kappa over all lags between the band's queries and keys, from the smallest, in nats,
        float64, shape (prior heads, n_queries + n_keys - 1).
    bias : Tensor
        u over the keys, in nats, float64, shape (prior heads, keys).
    band : _Band
        The queries and keys.
    """

    kernel: Tensor
    bias: Tensor
    band: _Band

    def column(self, rows: slice, key: int) -> Tensor:
        """The log-prior of one of the keys for some queries, nats, shape (prior heads, rows)."""
        # Lags grow from the one between the first query and the last key.
        start = self.band.keys - 1 - key
        stop = start + self.band.queries
        return self.kernel[:, start:stop][:, rows] + self.bias[:, key, None]

    def normaliser(self) -> Tensor | None:
        """log sum_j exp(K_ij) in bits, (prior heads, n_queries); None beyond float64's range."""
        return _convolve(self.kernel, self.bias, self.band)


@torch.no_grad()
def lag_and_key(call: AttentionCall, batch: int) -> LagAndKey | None:
    """A call's prior as functions of the lag and of the key, or None if it is no such sum.

    None also unless the allowed pairs are a band of lags of consecutive tokens.
    """
    if call.prior is None or call.bias is not None or call.visibility.dense is not None:
        return None
    band = _band(call, batch)
    if band is None:
        return None
    parts = _parts(call.prior, band)
    return None if parts is None else LagAndKey(*parts, band)


@torch.no_grad()
def prior_normaliser(call: AttentionCall, batch: int) -> Tensor | None:
    """log sum_j exp(K_ij) over the allowed keys in bits, or None if it is not a convolution.

    Returns
    -------
    Tensor or None
        float64, shape (prior heads, n_queries), in the gauge of `log_prior`; -inf for queries
        without keys. None where `lag_and_key` is, and beyond float64's range.
    """
    parts = lag_and_key(call, batch)
    return None if parts is None else parts.normaliser()


def _band(call: AttentionCall, batch: int) -> _Band | None:
    """The band of lags that a batch entry's intervals form, or None."""
    chosen, start, stop = call.visibility.entry(batch)
    seen = stop > start
    if call.key_pos.shape[1] > 1 or not bool(seen.any()):
        return None
    query, key = call.query_pos[:, 0], call.key_pos[chosen, 0]
    for points in (query, key):
        if not bool((points == points.round()).all()) or not bool((points.diff() == 1).all()):
            return None
    query, last = query.long(), len(key)
    first_key = int(key[0])
    if int(query[0]) < 0 or first_key < 0:
        return None
    place = query - first_key
    low, high = int(query[0]) - int(key[-1]), int(query[-1]) - first_key
    cut = seen & (stop < last)
    if bool(cut.any()):
        low = int((place + 1 - stop)[cut][0])
    cut = seen & (start > 0)
    if bool(cut.any()):
        high = int((place - start)[cut][0])
    same = (start == (place - high).clamp(0, last)) & (stop == (place - low + 1).clamp(0, last))
    if not bool((same | ~seen).all()):
        return None
    return _Band(int(query[0]), len(query), first_key, last, low, high)


def _parts(prior: Prior, band: _Band) -> tuple[Tensor, Tensor] | None:
    """kappa over all lags of the band (from the smallest) and u over its keys, in nats."""
    if not isinstance(prior, Prior) or not is_separable(prior):
        return None
    smallest = band.first_query - (band.first_key + band.keys - 1)
    largest = band.first_query + band.queries - 1 - band.first_key
    keys = band.first_key + torch.arange(band.keys, dtype=torch.float64)
    kernel = lag_table(prior, torch.arange(smallest, largest + 1, dtype=torch.float64)).cpu()
    bias = key_table(prior, keys).cpu()
    # A part's `kind` may be wrong: the parts must add up to the prior itself.
    rows = torch.linspace(0, band.queries - 1, _CHECKED_ROWS).long().unique()
    exact = prior.log_prior((band.first_query + rows).double(), keys).double().cpu()
    lags = (band.first_query + rows[:, None]) - (band.first_key + torch.arange(band.keys))
    ours = kernel[:, lags - smallest] + bias.unsqueeze(1)
    if float((ours - exact).abs().max()) > _TOLERANCE:
        return None
    return kernel, bias


def _convolve(kernel: Tensor, bias: Tensor, band: _Band) -> Tensor | None:
    """log2 of the convolution of exp(kernel) and exp(bias) within the band."""
    smallest = band.first_query - (band.first_key + band.keys - 1)
    lags = smallest + torch.arange(kernel.shape[1])
    kernel = (_LOG2E * kernel).masked_fill((lags < band.low) | (lags > band.high), -math.inf)
    bias = _LOG2E * bias
    for size in _BLOCKS:
        total = _convolve_blocks(kernel, bias, band, size)
        if total is not None:
            return total
    return None


def _convolve_blocks(kernel: Tensor, bias: Tensor, band: _Band, size: int) -> Tensor | None:
    heads = len(kernel)
    row_blocks, key_blocks = -(-band.queries // size), -(-band.keys // size)
    padded = bias.new_full((heads, key_blocks * size), -math.inf)
    padded[:, : band.keys] = bias
    padded = padded.view(heads, key_blocks, size).mT
    key_top = padded.amax(1, keepdim=True)
    # In reverse, so that a block of lags is constant along its antidiagonals: rows of windows.
    weights = torch.exp2(padded - key_top).flip(1)
    finite = padded.masked_fill(torch.isneginf(padded), math.inf).amin(1, keepdim=True)
    spread = (key_top - finite).max()
    # Lags of block pairs d apart: offset + size * d - (size - 1) .. offset + size * d + size - 1.
    origin = band.keys - 1
    reach = size * max(row_blocks, key_blocks) + size
    outer = kernel.new_full((heads, 2 * reach + 1), -math.inf)
    low, high = max(0, reach - origin), min(2 * reach + 1, reach - origin + kernel.shape[1])
    outer[:, low:high] = kernel[:, low - (reach - origin) : high - (reach - origin)]
    total = kernel.new_full((heads, size, row_blocks), -math.inf)
    for apart in range(1 - key_blocks, row_blocks):
        middle = reach + size * apart
        stretch = outer[:, middle - size + 1 : middle + size]
        top = stretch.amax(-1)
        inside = ~torch.isneginf(stretch)
        if not bool(inside.any()):
            continue
        bottom = stretch.masked_fill(~inside, math.inf).amin(-1)
        empty = torch.isneginf(top)
        if float((top - bottom).masked_fill(empty, 0.0).max() + spread) > _WIDEST:
            return None
        top = top.masked_fill(empty, 0.0)
        # Row a, column b of the block is the lag a + b - (size - 1).
        windows = torch.exp2(stretch - top[:, None]).unfold(-1, size, 1)
        first, last = max(0, -apart), min(key_blocks, row_blocks - apart)
        part = torch.bmm(windows.contiguous(), weights[:, :, first:last]).log2()
        part += top[:, None, None] + key_top[:, :, first:last]
        rows = total[:, :, first + apart : last + apart]
        rows.copy_(torch.logaddexp2(rows, part))
    return total.mT.reshape(heads, -1)[:, : band.queries]
