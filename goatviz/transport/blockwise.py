"""Row statistics and incoming mass, streamed over blocks of queries: O(block x length) memory.

Everything here is in base 2 (scores are scaled by log2 e beforehand), since exp2 is the cheaper
exponential. Long rows are swept twice, in tiles that stay in cache. The public functions and the
definition of every statistic live in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from goatviz.transport.call import AttentionCall
from goatviz.transport.convolution import prior_normaliser
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
    buffers = _Buffers(device, dtype)
    partition = None
    for b in range(batch):
        # The same for all entries that share their allowed pairs.
        if PRIOR_EXPECTATIONS & set(names) and (b == 0 or call.visibility.batch > 1):
            partition = prior_normaliser(call, b)
        entry = _Entry(call, names, keys, recent, b, partition)
        if len(entry.chosen) == 0:
            continue
        size, width, together = entry.block_shape(*held)
        for block in _blocks(entry.start, entry.stop, size, width, device):
            gauge = entry.gauge(block)
            for h in range(0, heads, together):
                these = slice(h, h + together)
                a = None if query_mass is None else query_mass[b, block.rows].to(dtype)
                solved, columns = entry.solve(block, these, gauge, buffers, a)
                seen = entry.seen(block, these)
                for name, value in solved.items():
                    kept = seen if value.ndim == 2 else seen.unsqueeze(-1)
                    values[name][b, these, block.rows] = torch.where(kept, value, math.nan)
                for span, part in columns:
                    at = span if entry.every else entry.chosen[span].to(device)
                    mass[b, these, at] += part
    return values, mass


class _Tile(NamedTuple):
    """Some of a block's columns, and which pairs of them are forbidden."""

    columns: slice
    outside: list[tuple[slice, Tensor]]


class _Block(NamedTuple):
    """Some queries of one batch entry and the keys that any of them may use."""

    rows: slice
    stop: Tensor
    tiles: list[_Tile]


def _blocks(
    start: Tensor, stop: Tensor, size: int, width: int, device: torch.device
) -> Iterator[_Block]:
    for a in range(0, len(start), size):
        first, last = start[a : a + size], stop[a : a + size]
        seen = last > first
        if not bool(seen.any()):
            continue
        low, high = int(first[seen].min()), int(last[seen].max())
        # Every query of the block may use the keys of [inner_low, inner_high).
        inner_low, inner_high = int(first.max()), int(last.min())
        edges = [(low, inner_low), (inner_high, high)]
        if inner_low >= inner_high:
            edges = [(low, high)]
        tiles = []
        for left in range(low, high, width):
            right = min(left + width, high)
            outside = []
            for begin, end in edges:
                begin, end = max(begin, left), min(end, right)
                if end > begin:
                    columns = torch.arange(begin, end)
                    forbidden = (columns < first.unsqueeze(-1)) | (columns >= last.unsqueeze(-1))
                    outside.append((slice(begin - left, end - left), forbidden.to(device)))
            tiles.append(_Tile(slice(left, right), outside))
        yield _Block(slice(a, a + len(first)), last, tiles)


class _Buffers:
    """Memory that all blocks reuse; allocating it anew would cost page faults."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._held: dict[str, Tensor] = {}
        self._kind = {"device": device, "dtype": dtype}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        if name not in self._held or self._held[name].numel() < count:
            self._held[name] = torch.empty(count, **self._kind)
        return self._held[name][:count].view(*shape)


class _State:
    """Running maximum, total and extremes of a block's rows, updated tile by tile."""

    def __init__(self, like: Tensor) -> None:
        self.top = like.new_full(like.shape[:2], -math.inf)
        self.total = like.new_zeros(like.shape[:2])
        self.moment = like.new_zeros(like.shape[:2])
        self.low = like.new_full(like.shape[:2], math.inf)
        self.high = like.new_full(like.shape[:2], -math.inf)

    @property
    def base(self) -> Tensor:
        """The maximum, 0 for rows without any key."""
        return torch.where(torch.isneginf(self.top), 0.0, self.top)

    def add(self, logits: Tensor, top: Tensor, index: Tensor | None, weights: Tensor) -> None:
        """Add one tile: subtract the maximum so far from `logits`, and write exp2 to `weights`."""
        before = self.top
        self.top = torch.maximum(before, top)
        base = self.base
        fade = torch.exp2(before - base)
        logits.sub_(base.unsqueeze(-1))
        torch.exp2(logits, out=weights)
        self.total = self.total * fade + weights.sum(-1)
        if index is not None:
            self.moment = self.moment * fade + weights @ index


class _Sums:
    """Sums over a row of unnormalised weights times other terms, updated tile by tile."""

    def __init__(self, like: Tensor) -> None:
        self.below = torch.zeros_like(like)
        self.score = torch.zeros_like(like)
        self.prior = torch.zeros_like(like)
        self.partition = torch.full_like(like, -math.inf)
        self.recent = torch.zeros_like(like)
        self.moved = torch.zeros_like(like)
        self.square = torch.zeros_like(like)
        self.keys: dict[int, Tensor] = {}


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
        partition: Tensor | None,
    ) -> None:
        self.call = call
        self.partition = partition
        self.names = frozenset(names)
        self.recent = recent
        self.batch = batch
        self.device, self.dtype = call.device, call.dtype
        self.chosen, self.start, self.stop = call.visibility.entry(batch)
        self.every = torch.equal(self.chosen, torch.arange(call.shape[3]))
        self.keys = call.k[batch].to(self.dtype)
        if not self.every:
            self.keys = self.keys[:, self.chosen.to(self.device)]
        self.key_index = call.key_pos[self.chosen, 0].contiguous()
        self.index = self.key_index.to(device=self.device, dtype=self.dtype)
        place = {int(key): at for at, key in enumerate(self.chosen.tolist())} if keys else {}
        self.places = [place.get(key, -1) for key in keys]
        self.queries = call.q[batch].to(self.dtype) * (call.scale * _LOG2E)
        count = call.visibility.count()
        self.count = entry_of(count, batch).to(self.device)
        dense = call.visibility.dense
        self.dense = None if dense is None else entry_of(dense, batch)
        self.group = call.shape[1] // call.kv_heads
        self.prior_group = call.shape[1]
        self.factors = None
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
        return size, width, max(1, min(len(self.queries), held // cells))

    def seen(self, block: _Block, heads: slice) -> Tensor:
        """Which of the block's queries may use any key, shape (heads or 1, rows)."""
        return self._keys_seen(block, heads) > 0

    def _keys_seen(self, block: _Block, heads: slice) -> Tensor:
        """How many keys each of the block's queries may use, shape (heads or 1, rows)."""
        return (self.count[heads] if len(self.count) > 1 else self.count)[:, block.rows]

    def gauge(self, block: _Block) -> Tensor | None:
        """Bits that bring this block's logits into the gauge of `log_prior`, (prior heads, rows).

        Key-only terms are taken relative to the last key of the block's middle row: m j grows
        without bound, and float32 would lose the differences that matter.
        """
        if self.factors is None:
            return None
        call, middle = self.call, self._middle(block)
        query, key, _ = self.factors
        at = call.key_pos[self.chosen[middle : middle + 1]]
        exact = call.prior.log_prior(call.query_pos[block.rows], at).to(self.device)
        ours = query[:, block.rows].double() @ key[:, middle, :, None].double()
        return (_LOG2E * exact.double() - ours).squeeze(-1).to(self.dtype)

    def solve(
        self,
        block: _Block,
        heads: slice,
        gauge: Tensor | None,
        buffers: _Buffers,
        query_mass: Tensor | None,
    ) -> tuple[dict[str, Tensor], list[tuple[slice, Tensor]]]:
        """Statistics of a block's rows, and the mass that its columns receive, tile by tile."""
        names = self.names
        state = _State(self.queries[heads, block.rows])
        index = self.index if names & _LAGS else None
        tiles = [self._masked(block, tile, heads) for tile in block.tiles]
        for tile in tiles:
            scores = self._scores(block, tile, heads, buffers)
            if "content_range" in names:
                _fill(scores, tile.outside, math.inf)
                state.low = torch.minimum(state.low, scores.amin(-1))
            _fill(scores, tile.outside, _FORBIDDEN)
            logits, prior = self._logits(block, tile, heads, scores, buffers)
            top = high = logits.amax(-1)
            if "content_range" in names:
                high = high if logits is scores else scores.amax(-1)
                state.high = torch.maximum(state.high, high)
            weights = buffers.take("weights", logits.shape)
            state.add(logits, top, None if index is None else index[tile.columns], weights)
        normal = self._normal(state, block, heads, gauge)
        guess = (state.moment / state.total).round()
        sums, received = _Sums(state.total), []
        for tile in tiles:
            if len(tiles) > 1:
                scores = self._scores(block, tile, heads, buffers)
                _fill(scores, tile.outside, _FORBIDDEN)
                logits, prior = self._logits(block, tile, heads, scores, buffers)
                logits.sub_(state.base.unsqueeze(-1))
                torch.exp2(logits, out=buffers.take("weights", logits.shape))
                weights = buffers.take("weights", logits.shape)
            if query_mass is not None:
                a = torch.where(self.seen(block, heads), query_mass * normal.norm, 0.0)
                part = torch.bmm(a.unsqueeze(1), weights).squeeze(1).double()
                received.append((tile.columns, part))
            if names & EXPECTATIONS:
                sums.below += _dot(weights, logits, buffers)
                if self._has_prior:
                    sums.score += _dot(weights, scores, buffers)
            for at in self.places:
                if tile.columns.start <= at < tile.columns.stop:
                    sums.keys[at] = weights[..., at - tile.columns.start].clone()
            if "recent_mass" in names:
                sums.recent += self._recent(block, tile, weights)
            if self._has_prior and names & PRIOR_EXPECTATIONS:
                self._sum_prior(sums, block, tile, heads, prior, weights, buffers)
            if index is not None:
                held = buffers.take("scores", weights.shape)
                distance = torch.sub(index[tile.columns], guess.unsqueeze(-1), out=held)
                moved = weights.mul_(distance)
                sums.moved += moved.sum(-1)
                sums.square += _dot(moved, distance, buffers)
        values = self._values(block, heads, gauge, state, normal, sums, guess)
        return {name: values[name] for name in values if name in names}, received

    def _values(
        self,
        block: _Block,
        heads: slice,
        gauge: Tensor | None,
        state: _State,
        normal: _Normal,
        sums: _Sums,
        guess: Tensor,
    ) -> dict[str, Tensor]:
        total, share = state.total, normal.share
        shift = self._shift(gauge, heads)
        below = sums.below / total
        entropy = total.log2() - below
        score = share * (below + state.base)
        if self._has_prior:
            score = normal.norm * sums.score
        prior = normal.norm * sums.prior
        partition = sums.partition
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
        correction = sums.moved / total
        square = sums.square / total - correction.square()
        query = self.call.query_pos[block.rows, 0].to(self.device)
        each = [normal.norm * sums.keys.get(at, torch.zeros_like(total)) for at in self.places]
        full = normal.normaliser if shift is None else normal.normaliser + shift
        return {
            "log_normaliser": full * _LN2,
            "entropy": entropy * _LN2,
            "expected_score": score * _LN2,
            "expected_log_prior": expected_log_prior * _LN2,
            "kl_to_prior": -(entropy + expected_log_prior) * _LN2,
            "key_mass": torch.stack(each, -1) if each else total.new_zeros(*total.shape, 0),
            "recent_mass": normal.norm * sums.recent,
            "sink_mass": normal.sink_share,
            "lag_mean": (query - guess.double()).to(self.dtype) - correction,
            "lag_std": square.clamp(min=0).sqrt(),
            "largest_weight": normal.norm,
            "content_range": (state.high - state.low) * _LN2,
        }

    def _partition(self, block: _Block, heads: slice, gauge: Tensor | None) -> Tensor:
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

    def _normal(self, state: _State, block: _Block, heads: slice, gauge: Tensor | None) -> _Normal:
        keys_only = state.base + state.total.log2()
        if self.call.sink is None:
            return _Normal(
                keys_only, keys_only, torch.ones_like(keys_only), None, 1.0 / state.total
            )
        sink = (self.call.sink_logits(self.batch, heads, block.rows) * _LOG2E).to(self.dtype)
        shift = self._shift(gauge, heads)
        sink = sink if shift is None else sink - shift
        normaliser = torch.logaddexp2(keys_only, sink)
        share = torch.exp2(keys_only - normaliser)
        return _Normal(keys_only, normaliser, share, sink, share / state.total)

    def _shift(self, gauge: Tensor | None, heads: slice) -> Tensor | None:
        return None if gauge is None else gauge[self._prior_heads(heads)]

    def _masked(self, block: _Block, tile: _Tile, heads: slice) -> _Tile:
        """A tile with what a dense mask forbids."""
        if self.dense is None:
            return tile
        allowed = self.dense[heads] if len(self.dense) > 1 else self.dense
        allowed = allowed[:, block.rows, tile.columns].to(self.device)
        return tile._replace(outside=[(slice(None), ~allowed)])

    def _scores(self, block: _Block, tile: _Tile, heads: slice, buffers: _Buffers) -> Tensor:
        """Content scores of a tile in bits, (heads, rows, columns)."""
        queries = self.queries[heads, block.rows]
        if self.group == 1:
            keys = self.keys[heads, tile.columns]
        else:
            which = torch.arange(heads.start, heads.start + len(queries)) // self.group
            first, last = int(which[0]), int(which[-1])
            keys = self.keys[first : last + 1, tile.columns]
            if len(which) > 1:
                keys = keys[which - first]
        held = buffers.take("scores", (len(queries), queries.shape[1], keys.shape[1]))
        scores = torch.bmm(queries, keys.mT, out=held)
        if self.call.softcap is not None:
            cap = self.call.softcap * _LOG2E
            scores.div_(cap).tanh_().mul_(cap)
        return scores

    def _logits(
        self, block: _Block, tile: _Tile, heads: slice, scores: Tensor, buffers: _Buffers
    ) -> tuple[Tensor, Tensor | None]:
        """Scores plus log-prior, and the log-prior by itself unless only lanes are needed."""
        if not self._has_prior:
            return scores, None
        held = buffers.take("logits", scores.shape)
        if self._by_lanes and self.partition is not None:
            query, key = self._lanes(block, tile, heads)
            return torch.baddbmm(scores, query, key.mT, out=held), None
        prior = self._prior(block, tile, heads, buffers)
        return torch.add(scores, prior, out=held), prior

    @property
    def _by_lanes(self) -> bool:
        return self.factors is not None and self.call.bias is None

    def _lanes(self, block: _Block, tile: _Tile, heads: slice) -> tuple[Tensor, Tensor]:
        """Lanes whose inner products are the log-prior in bits, without the gauge."""
        which = self._prior_heads(heads)
        query, key, _ = self.factors
        query = torch.nn.functional.pad(query[which, block.rows], (0, 1), value=1.0)
        return query, torch.cat([key[which, tile.columns], self._bias(block, tile, which).mT], -1)

    def _prior(self, block: _Block, tile: _Tile, heads: slice, buffers: _Buffers) -> Tensor:
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

    def _middle(self, block: _Block) -> int:
        return max(int(block.stop[len(block.stop) // 2]) - 1, 0)

    def _sum_prior(
        self,
        sums: _Sums,
        block: _Block,
        tile: _Tile,
        heads: slice,
        prior: Tensor | None,
        weights: Tensor,
        buffers: _Buffers,
    ) -> None:
        """Add a tile's expected log-prior and its share of the prior's normaliser."""
        if self._by_lanes:
            # <phi_i, sum_j w_ij psi_j>: a thin product instead of a sum over the tile.
            query, key = self._lanes(block, tile, heads)
            sums.prior += (query * torch.bmm(weights, key)).sum(-1)
        else:
            sums.prior += _dot(weights, prior.expand_as(weights), buffers)
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
        sums.partition = torch.logaddexp2(sums.partition, part)

    def _bias(self, block: _Block, tile: _Tile, which: Tensor) -> Tensor:
        """Key-only terms in bits, relative to the block's own key, (heads, 1, columns)."""
        bias, middle = self.factors[2], self._middle(block)
        bias = bias[which, tile.columns] - bias[which, middle : middle + 1]
        return bias.to(self.dtype).unsqueeze(1)

    def _recent(self, block: _Block, tile: _Tile, weights: Tensor) -> Tensor | float:
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


def _dot(a: Tensor, b: Tensor, buffers: _Buffers) -> Tensor:
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
