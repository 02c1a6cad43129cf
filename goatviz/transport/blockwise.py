"""Row statistics and incoming mass, streamed over blocks of queries: O(block x length) memory.

Everything here is in base 2 (scores are scaled by log2 e beforehand), since exp2 is the cheaper
exponential. Long rows are swept twice, in tiles that stay in cache. The public functions and the
definition of every statistic live in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from goatviz.transport.call import AttentionCall
from goatviz.transport.convolution import LagAndKey, lag_and_key
from goatviz.transport.lanes import Operands
from goatviz.transport.tiles import Block, Buffers, Tile, Totals, blocks
from goatviz.transport.visibility import entry_of

#: Keys of a row that are held at once; longer rows are swept twice.
WIDEST_ROW = 2**15

_LOG2E = 1.0 / math.log(2.0)
_LN2 = math.log(2.0)
# Logits that are held together, and the most rows among them: on a CPU a few such blocks fit its
# cache; on an accelerator they keep it busy.
_BLOCK_CPU = 2**20, 128
_BLOCK_ACCELERATOR = 2**26, 256
# Largest change of a key-only prior across a block's rows, nats, that float32 resolves to 1e-5.
_STEEPEST = 128.0
# Logit of a forbidden pair, bits: its exp2 is 0, and 0 times it is 0 (0 times -inf is NaN).
_FORBIDDEN = -1e30
#: Statistics that need an expectation under the plan, and those that need the prior's normaliser.
EXPECTATIONS = frozenset({"entropy", "expected_score", "expected_log_prior", "kl_to_prior"})
PRIOR_EXPECTATIONS = frozenset({"expected_log_prior", "kl_to_prior"})
# Statistics that tell the content from the prior.
_PARTS = frozenset({"expected_score", *PRIOR_EXPECTATIONS})
# Statistics in the gauge of `log_prior`.
_IN_THE_GAUGE = frozenset({"log_normaliser", *PRIOR_EXPECTATIONS})
_LAGS = frozenset({"lag_mean", "lag_std"})


@torch.no_grad()
def sweep(
    call: AttentionCall,
    names: Sequence[str],
    *,
    keys: Sequence[int] = (),
    recent: int = 1,
    query_mass: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Named row statistics (see `RowStatistics`) and, with a query mass, the incoming mass.

    Returns
    -------
    values, mass
        Shapes (batch, heads, n_queries) and (batch, heads, n_keys), the latter in float64.
    """
    batch, heads, _, n_keys = call.shape
    device, dtype = call.device, call.dtype
    values = {
        name: torch.full(
            (*call.shape[:3], *((len(keys),) if name == "key_mass" else ())),
            math.nan,
            device=device,
            dtype=dtype,
        )
        for name in names
    }
    mass = None
    if query_mass is not None:
        mass = torch.zeros(batch, heads, n_keys, dtype=torch.float64, device=device)
    held = _BLOCK_CPU if device.type == "cpu" else _BLOCK_ACCELERATOR
    buffers = Buffers(device, dtype)
    parts = partition = None
    for b in range(batch):
        # The same for all entries that share their allowed pairs.
        if PRIOR_EXPECTATIONS & set(names) and (b == 0 or call.visibility.batch > 1):
            parts = lag_and_key(call, b)
            partition = None if parts is None else parts.normaliser()
        entry = _Entry(call, names, keys, recent, b, parts, partition)
        if len(entry.chosen) == 0:
            continue
        size, width, together = entry.block_shape(*held)
        for block in blocks(entry.start, entry.stop, size, width, device):
            gauge = entry.gauge(block)
            entry.refer(block)
            a = None if query_mass is None else query_mass[b, block.rows].to(dtype)
            totals = []
            for h in range(0, heads, together):
                these = slice(h, h + together)
                total, columns = entry.solve(block, these, gauge, buffers, a)
                totals.append(total)
                for span, part in columns:
                    at = span if entry.every else entry.chosen[span].to(device)
                    mass[b, these, at] += part
            seen = entry.seen(block, slice(None))
            for name, value in entry.values(block, gauge, Totals.of_heads(totals)).items():
                kept = seen if value.ndim == 2 else seen.unsqueeze(-1)
                values[name][b, :, block.rows] = torch.where(kept, value, math.nan)
    return values, mass


class _Terms(NamedTuple):
    """Logits of a tile in bits, and their parts where something needs them by themselves."""

    scores: Tensor | None
    prior: Tensor | None
    logits: Tensor


class _Normal(NamedTuple):
    """Normalisers of a block's rows, in bits; `sink` is the extra column's logit."""

    keys_only: Tensor
    normaliser: Tensor
    share: Tensor
    sink: Tensor | None
    norm: Tensor

    @property
    def sink_share(self) -> Tensor:
        return (
            torch.zeros_like(self.keys_only)
            if self.sink is None
            else (self.sink - self.normaliser).exp2()
        )


class _Entry:
    """One batch entry: its keys, prior and counts, and the sweep over its blocks."""

    def __init__(
        self,
        call: AttentionCall,
        names: Sequence[str],
        keys: Sequence[int],
        recent: int,
        batch: int,
        parts: LagAndKey | None,
        partition: Tensor | None,
    ) -> None:
        self.call = call
        self.parts = parts
        self.partition = partition
        self.names = frozenset(names)
        self.recent = recent
        self.batch = batch
        self.device, self.dtype = call.device, call.dtype
        self.chosen, self.start, self.stop = call.visibility.entry(batch)
        self.every = torch.equal(self.chosen, torch.arange(call.shape[3]))
        self.key_index = call.key_pos[self.chosen, 0].contiguous()
        self.index = self.key_index.to(device=self.device, dtype=self.dtype)
        place = {int(key): at for at, key in enumerate(self.chosen.tolist())} if keys else {}
        self.places = [place.get(key, -1) for key in keys]
        count = call.visibility.count()
        self.count = entry_of(count, batch).to(self.device)
        dense = call.visibility.dense
        self.dense = None if dense is None else entry_of(dense, batch)
        self.prior_group = call.shape[1]
        self.factors = factors = None
        if call.prior is not None:
            self.prior_group //= call.prior.num_heads
            if call.prior.has_lanes and len(self.chosen):
                factors = call.prior.factors(call.query_pos, call.key_pos[self.chosen])
                kind = {"device": self.device, "dtype": self.dtype}
                self.factors = (
                    (_LOG2E * factors.query.double()).to(**kind),
                    factors.key.to(**kind),
                    _LOG2E * factors.key_bias.double().to(self.device),
                )
        # Whether the log-prior is left in its lanes; a normaliser of pairs needs its values.
        summed = partition is None and bool(PRIOR_EXPECTATIONS & self.names)
        self.by_lanes = factors is not None and call.bias is None and not summed
        # Whether nothing needs the scores by themselves.
        self.at_once = self.by_lanes and call.softcap is None and "content_range" not in self.names
        self.operands = Operands(call, batch, self.chosen, factors if self.by_lanes else None)

    def block_shape(self, held: int, rows: int) -> tuple[int, int, int]:
        """Rows of a block, columns of a tile and heads together: about `held` numbers at once."""
        widest = len(self.chosen) if self.dense is not None else int((self.stop - self.start).max())
        widest = max(widest, 1)
        if widest <= WIDEST_ROW:
            size, width = min(rows, held // widest), len(self.chosen)
        else:
            size, width = rows, held // rows
        if self.dtype == torch.float32 and self.factors is not None and len(self.chosen) > 1:
            step = self.factors[2].diff(dim=-1).abs().median(-1).values.max()
            size = min(size, int(_STEEPEST / max(_LN2 * float(step), 1e-6)))
        size = max(16, size)
        cells = min(size, len(self.start)) * min(width, widest + size)
        return size, width, max(1, min(self.call.shape[1], held // cells))

    def seen(self, block: Block, heads: slice) -> Tensor:
        """Which of the block's queries may use any key, shape (heads or 1, rows)."""
        return self._keys_seen(block, heads) > 0

    def _keys_seen(self, block: Block, heads: slice) -> Tensor:
        """How many keys each of the block's queries may use, shape (heads or 1, rows)."""
        return (self.count[heads] if len(self.count) > 1 else self.count)[:, block.rows]

    def refer(self, block: Block) -> None:
        """Take key-only terms relative to the key to which `gauge` takes them."""
        columns = slice(block.tiles[0].columns.start, block.tiles[-1].columns.stop)
        self.operands.refer_to(self._middle(block), columns)

    def gauge(self, block: Block) -> Tensor | None:
        """Bits that bring this block's logits into the gauge of `log_prior`, (prior heads, rows).

        Key-only terms are taken relative to the last key of the block's middle row: m j grows
        without bound, and float32 would lose the differences that matter.
        """
        needed = self.call.sink is not None or self.names & _IN_THE_GAUGE
        if self.factors is None or not needed:
            return None
        call, middle = self.call, self._middle(block)
        query, key, _ = self.factors
        if self.parts is None:
            at = call.key_pos[self.chosen[middle : middle + 1]]
            exact = call.prior.log_prior(call.query_pos[block.rows], at)
        else:
            exact = self.parts.column(block.rows, middle).unsqueeze(-1)
        exact = exact.to(self.device)
        ours = query[:, block.rows].double() @ key[:, middle, :, None].double()
        return (_LOG2E * exact.double() - ours).squeeze(-1).to(self.dtype)

    def solve(
        self,
        block: Block,
        heads: slice,
        gauge: Tensor | None,
        buffers: Buffers,
        query_mass: Tensor | None,
    ) -> tuple[Totals, list[tuple[slice, Tensor]]]:
        """Totals of a block's rows, and the mass that its columns receive, tile by tile."""
        names = self.names
        totals = Totals(self.operands.queries[heads, block.rows])
        index = self.index if names & _LAGS else None
        tiles = [self._masked(block, tile, heads) for tile in block.tiles]
        for tile in tiles:
            terms = self._terms(block, tile, heads, buffers, totals)
            weights = buffers.take("weights", terms.logits.shape)
            at = None if index is None else index[tile.columns]
            totals.add(terms.logits, terms.logits.amax(-1), at, weights)
        totals.guess = (totals.moment / totals.total).round()
        received = []
        if query_mass is not None:
            norm = self._normal(totals, block, heads, gauge).norm
            mass = torch.where(self.seen(block, heads), query_mass * norm, 0.0).unsqueeze(1)
        for tile in tiles:
            if len(tiles) > 1:
                terms = self._terms(block, tile, heads, buffers)
                terms.logits.sub_(totals.base.unsqueeze(-1))
                weights = buffers.take("weights", terms.logits.shape)
                torch.exp2(terms.logits, out=weights)
            if query_mass is not None:
                part = torch.bmm(mass, weights).squeeze(1).double()
                received.append((tile.columns, part))
            if names & EXPECTATIONS:
                if self._has_prior:
                    self._sum_prior(totals, block, tile, heads, terms, weights, buffers)
                # Nothing needs the logits any more; a third array would crowd the cache.
                totals.below += terms.logits.mul_(weights).sum(-1)
            for at in self.places:
                if tile.columns.start <= at < tile.columns.stop:
                    totals.keys[at] = weights[..., at - tile.columns.start].clone()
            if "recent_mass" in names:
                totals.recent += self._recent(block, tile, weights)
            if index is not None:
                held = buffers.take("scores", weights.shape)
                distance = torch.sub(index[tile.columns], totals.guess.unsqueeze(-1), out=held)
                moved = weights.mul_(distance)
                totals.moved += moved.sum(-1)
                totals.square += _dot(moved, distance, buffers)
        return totals, received

    def values(self, block: Block, gauge: Tensor | None, totals: Totals) -> dict[str, Tensor]:
        """The named statistics of a block's rows, (query heads, rows), from their totals."""
        heads = slice(0, self.call.shape[1])
        normal = self._normal(totals, block, heads, gauge)
        total, share = totals.total, normal.share
        shift = self._shift(gauge, heads)
        below = totals.below / total
        entropy = total.log2() - below
        score = share * (below + totals.base)
        prior = normal.norm * totals.prior
        if self.by_lanes:
            score = score - prior
        elif self._has_prior:
            score = normal.norm * totals.score
        partition = totals.partition
        if self.partition is not None:
            partition = self._partition(block, heads, gauge)
        elif not self._has_prior:
            partition = self._keys_seen(block, heads).to(self.dtype).log2().expand_as(total)
        if normal.sink is not None:
            sink, sink_share = normal.sink, normal.sink_share
            entropy = share * (entropy + normal.normaliser - normal.keys_only)
            entropy = entropy + sink_share * (normal.normaliser - sink)
            prior = prior + sink_share * sink
            partition = torch.logaddexp2(partition, sink)
        expected_log_prior = prior - partition
        correction = totals.moved / total
        square = totals.square / total - correction.square()
        query = self.call.query_pos[block.rows, 0].to(self.device)
        each = [normal.norm * totals.keys.get(at, torch.zeros_like(total)) for at in self.places]
        full = normal.normaliser if shift is None else normal.normaliser + shift
        values = {
            "log_normaliser": full * _LN2,
            "entropy": entropy * _LN2,
            "expected_score": score * _LN2,
            "expected_log_prior": expected_log_prior * _LN2,
            "kl_to_prior": -(entropy + expected_log_prior) * _LN2,
            "key_mass": torch.stack(each, -1) if each else total.new_zeros(*total.shape, 0),
            "recent_mass": normal.norm * totals.recent,
            "sink_mass": normal.sink_share,
            "lag_mean": (query - totals.guess.double()).to(self.dtype) - correction,
            "lag_std": square.clamp(min=0).sqrt(),
            "largest_weight": normal.norm,
            "content_range": (totals.high - totals.low) * _LN2,
        }
        return {name: value for name, value in values.items() if name in self.names}

    def _partition(self, block: Block, heads: slice, gauge: Tensor | None) -> Tensor:
        """The prior's own normaliser in bits, without the gauge, (heads, rows)."""
        exact = self.partition[:, block.rows].to(self.device)
        if gauge is not None:
            exact = exact - gauge.double()
        return exact.to(self.dtype)[self._prior_heads(heads)]

    def _prior_heads(self, heads: slice) -> Tensor:
        """The prior's head for each of these query heads."""
        return torch.arange(self.call.shape[1])[heads] // self.prior_group

    @property
    def _has_prior(self) -> bool:
        return self.call.prior is not None or self.call.bias is not None

    def _normal(self, totals: Totals, block: Block, heads: slice, gauge: Tensor | None) -> _Normal:
        keys_only = totals.base + totals.total.log2()
        if self.call.sink is None:
            return _Normal(
                keys_only, keys_only, torch.ones_like(keys_only), None, 1.0 / totals.total
            )
        sink = (self.call.sink_logits(self.batch, heads, block.rows) * _LOG2E).to(self.dtype)
        shift = self._shift(gauge, heads)
        sink = sink if shift is None else sink - shift
        normaliser = torch.logaddexp2(keys_only, sink)
        share = torch.exp2(keys_only - normaliser)
        return _Normal(keys_only, normaliser, share, sink, share / totals.total)

    def _shift(self, gauge: Tensor | None, heads: slice) -> Tensor | None:
        return None if gauge is None else gauge[self._prior_heads(heads)]

    def _masked(self, block: Block, tile: Tile, heads: slice) -> Tile:
        """A tile with what a dense mask forbids."""
        if self.dense is None:
            return tile
        allowed = self.dense[heads] if len(self.dense) > 1 else self.dense
        allowed = allowed[:, block.rows, tile.columns].to(self.device)
        return tile._replace(outside=[(slice(None), ~allowed)])

    def _terms(
        self,
        block: Block,
        tile: Tile,
        heads: slice,
        buffers: Buffers,
        totals: Totals | None = None,
    ) -> _Terms:
        """Logits of a tile in bits and their parts; the range of scores goes to `totals`."""
        at = heads, block.rows, tile.columns
        rows = len(self.operands.queries[heads]), len(self.operands.queries[0, block.rows])
        shape = (*rows, tile.columns.stop - tile.columns.start)
        held = buffers.take("scores", shape)
        if self.at_once:
            logits = self.operands.logits(*at, out=held)
            _fill(logits, tile.outside, _FORBIDDEN)
            return _Terms(None, None, logits)
        scores = self.operands.scores(*at, out=held)
        if self.call.softcap is not None:
            cap = self.call.softcap * _LOG2E
            scores.div_(cap).tanh_().mul_(cap)
        ranged = totals is not None and "content_range" in self.names
        if ranged:
            _fill(scores, tile.outside, math.inf)
            totals.low = torch.minimum(totals.low, scores.amin(-1))
        _fill(scores, tile.outside, _FORBIDDEN)
        if ranged:
            totals.high = torch.maximum(totals.high, scores.amax(-1))
        if not self._has_prior:
            return _Terms(scores, None, scores)
        held = buffers.take("logits", shape)
        if self.by_lanes:
            return _Terms(scores, None, self.operands.add_lanes(scores, *at, out=held))
        prior = self._prior(block, tile, heads, buffers)
        return _Terms(scores, prior, torch.add(scores, prior, out=held))

    def _prior(self, block: Block, tile: Tile, heads: slice, buffers: Buffers) -> Tensor:
        """Log-prior of a tile in bits, (heads, rows or 1, columns), without the gauge."""
        call, out = self.call, None
        which = self._prior_heads(heads)
        if self.factors is not None:
            query, key, _ = self.factors
            out = self._bias(block, tile, which)
            if query.shape[-1]:
                phi, psi = query[which, block.rows], key[which, tile.columns]
                held = buffers.take("prior", (len(phi), phi.shape[1], psi.shape[1]))
                out = torch.baddbmm(out, phi, psi.mT, out=held)
        elif call.prior is not None:
            points = call.key_pos[self.chosen[tile.columns]]
            out = call.prior.log_prior(call.query_pos[block.rows], points)
            out = (_LOG2E * out.double()).to(device=self.device, dtype=self.dtype)[which]
        if call.bias is not None:
            bias = entry_of(call.bias, self.batch)
            bias = bias[heads] if len(bias) > 1 else bias
            columns = tile.columns if self.every else self.chosen[tile.columns].to(bias.device)
            bias = bias[:, block.rows][..., columns].to(self.device).double()
            # Forbidden pairs may hold -inf here; the mask forbids them already.
            bias = (_LOG2E * bias).clamp(min=_FORBIDDEN).to(self.dtype)
            out = bias if out is None else out + bias
        return out

    def _middle(self, block: Block) -> int:
        return max(int(block.stop[len(block.stop) // 2]) - 1, 0)

    def _sum_prior(
        self,
        totals: Totals,
        block: Block,
        tile: Tile,
        heads: slice,
        terms: _Terms,
        weights: Tensor,
        buffers: Buffers,
    ) -> None:
        """Add a tile's expected score and log-prior and its share of the prior's normaliser."""
        if not self.names & _PARTS:
            return
        if self.by_lanes:
            # What remains of the expected logit is the expected score.
            at = heads, block.rows, tile.columns
            totals.prior += self.operands.expected_lanes(weights, *at)
            return
        totals.score += _dot(weights, terms.scores, buffers)
        if not self.names & PRIOR_EXPECTATIONS:
            return
        prior = terms.prior
        totals.prior += _dot(weights, prior.expand_as(weights), buffers)
        if self.partition is not None:
            return
        if prior.shape[1] == 1 and self.dense is None:
            part = _shared_normaliser(prior, weights.shape[1], tile.outside)
        else:
            prior = prior.expand_as(weights).clone() if prior.shape != weights.shape else prior
            _fill(prior, tile.outside, -math.inf)
            top = prior.amax(-1, keepdim=True)
            top = torch.where(torch.isneginf(top), 0.0, top)
            part = prior.sub_(top).exp2_().sum(-1).log2() + top.squeeze(-1)
        totals.partition = torch.logaddexp2(totals.partition, part)

    def _bias(self, block: Block, tile: Tile, which: Tensor) -> Tensor:
        """Key-only terms in bits, relative to the block's own key, (heads, 1, columns)."""
        bias, middle = self.factors[2], self._middle(block)
        bias = bias[which, tile.columns] - bias[which, middle : middle + 1]
        return bias.to(self.dtype).unsqueeze(1)

    def _recent(self, block: Block, tile: Tile, weights: Tensor) -> Tensor | float:
        index = self.call.query_pos[block.rows, 0].contiguous()
        first = torch.searchsorted(self.key_index, index - self.recent, right=True)
        last = torch.searchsorted(self.key_index, index + self.recent)
        low = max(int(first.min()), tile.columns.start)
        high = min(int(last.max()), tile.columns.stop)
        if high <= low:
            return 0.0
        columns = torch.arange(low, high)
        near = (columns >= first.unsqueeze(-1)) & (columns < last.unsqueeze(-1))
        slab = weights[..., low - tile.columns.start : high - tile.columns.start]
        return (slab * near.to(self.device)).sum(-1)


def _dot(a: Tensor, b: Tensor, buffers: Buffers) -> Tensor:
    """sum_j a_ij b_ij without a new block of memory."""
    return torch.mul(a, b, out=buffers.take("product", a.shape)).sum(-1)


def _fill(values: Tensor, outside: list[tuple[slice, Tensor]], fill: float) -> None:
    for columns, forbidden in outside:
        values[..., columns].masked_fill_(forbidden, fill)


def _shared_normaliser(prior: Tensor, rows: int, outside: list[tuple[slice, Tensor]]) -> Tensor:
    """log2 sum 2^prior of a key-only term; the keys that all rows share are summed once."""
    inner = torch.ones(prior.shape[-1], dtype=torch.bool, device=prior.device)
    parts = []
    for columns, forbidden in outside:
        inner[columns] = False
        slab = prior[..., columns].expand(-1, rows, -1).masked_fill(forbidden, -math.inf)
        parts.append(torch.logsumexp(slab * _LN2, -1))
    if bool(inner.any()):
        parts.append(torch.logsumexp(prior[..., inner] * _LN2, -1).expand(-1, rows))
    return torch.logsumexp(torch.stack(parts), 0) * _LOG2E
