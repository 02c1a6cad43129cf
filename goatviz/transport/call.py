"""One attention call: queries, keys, prior, visibility, and everything else in its logits.

Adapters and layers make `AttentionCall`s, and the arguments are checked once, when one is made.
Its dense float64 logits and plans are the definition; `statistics` serves plans that are too long
to be dense.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from goatviz import checks
from goatviz.priors.base import PositionsLike, Prior, default_positions
from goatviz.transport.rows import TransportPlan, solve_rows
from goatviz.transport.visibility import Visibility, entry_of, split_mask

#: Rows of a dense plan that are computed together.
_ROWS = 256
#: Pairs of `weights_at` that are computed together, in each head.
_PAIRS = 1024
#: Rows of a window that is computed for its diagonal.
_DIAGONAL = 64


class Logits(NamedTuple):
    """Logits of a window and their parts, float64, shape (rows, keys) or (heads, rows, keys).

    Attributes
    ----------
    scores : Tensor
        softcap(scale <q_i, k_j>).
    log_prior : Tensor
        Prior plus bias as given, nats, not normalised.
    logits : Tensor
        Their sum; -inf at forbidden pairs.
    allowed : Tensor of bool
        Shape (rows, keys), or (heads, rows, keys) if masks differ between heads.
    """

    scores: Tensor
    log_prior: Tensor
    logits: Tensor
    allowed: Tensor


class PlanWindow(NamedTuple):
    """A window of one head's plan, float64, each row normalised over all of its keys.

    Attributes
    ----------
    scores, log_prior, logits, weights : Tensor
        Shape (queries, keys): scaled scores, log-prior (nats, normalised over the allowed keys),
        their sum, and the weights. Forbidden pairs have weight 0 and log-prior -inf.
    allowed : Tensor of bool
        Shape (queries, keys).
    sink_weight : Tensor
        Weight of the extra column, shape (queries,); 0 without one.
    """

    scores: Tensor
    log_prior: Tensor
    logits: Tensor
    weights: Tensor
    allowed: Tensor
    sink_weight: Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    r"""Everything that decides a call's weights: p_i = softmax_j(softcap(scale <q_i, k_j>) + K_ij).

    The softmax runs over the keys that query i may use and, with a `sink`, over one extra column
    with that logit. Make one with `from_tensors`, the only place that checks arguments.

    Attributes
    ----------
    shape : tuple of int
        (batch, query heads, n_queries, n_keys).
    kv_heads : int
        Key-value heads, a divisor of the query heads.
    scale : float
        Factor of the inner products.
    visibility : Visibility
        The allowed pairs.
    query_pos, key_pos : Tensor
        float64 positions, shape (length, 1 + axes); column 0 is the sequence index.
    q : Tensor or None
        Shape (batch, query heads, n_queries, d), after rotation, detached, in the dtype of the
        model. q, k, v and bias are None after `without_tensors`.
    k : Tensor or None
        Shape (batch, key-value heads, n_keys, d).
    v : Tensor, optional
        Shape (batch, key-value heads, n_keys, d_v).
    prior : Prior, optional
        K; 1 or key-value heads.
    bias : Tensor, optional
        A dense term of K, shape (batch or 1, query heads or 1, n_queries, n_keys), nats.
    biased : bool
        Whether there is such a bias, or was before `without_tensors`.
    sink : Tensor, optional
        Logits of an extra column that takes mass and has no key, nats, float64: one for each head,
        shape (query heads,), or for each query, shape (batch or 1, query heads, n_queries). Mass
        on real keys is 1 - `RowStatistics.sink_mass`, whether the model drops the column from its
        weights or scales its output by sigmoid(log-normaliser - sink).
    softcap : float, optional
        c of c tanh(x / c), applied to the scaled inner products.
    query_mask : Tensor of bool, optional
        Shape (batch or 1, n_queries), False at padding.
    gone : int
        Number of tokens that have left the cache; `key_pos` starts after them.
    rotary : Tensor, optional
        Rotation of each channel of q and k in radians per token, shape (d,), float64; 0 for
        channels that are not rotated. None if unknown.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    scale: float
    visibility: Visibility
    query_pos: Tensor
    key_pos: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    prior: Prior | None = None
    bias: Tensor | None = None
    biased: bool = False
    sink: Tensor | None = None
    softcap: float | None = None
    query_mask: Tensor | None = None
    gone: int = 0
    rotary: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        *,
        v: Tensor | None = None,
        prior: Prior | None = None,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        mask: Tensor | None = None,
        visibility: Visibility | None = None,
        bias: Tensor | None = None,
        sink: Tensor | None = None,
        softcap: float | None = None,
        query_pos: PositionsLike | None = None,
        key_pos: PositionsLike | None = None,
        query_mask: Tensor | None = None,
        gone: int = 0,
        rotary: Tensor | None = None,
    ) -> AttentionCall:
        """Check the parts of a call and put them together.

        Parameters
        ----------
        q : Tensor
            Queries, shape (batch, query heads, n_queries, d).
        k : Tensor
            Keys, shape (batch, key-value heads, n_keys, d); query heads are a multiple.
        v, sink, softcap, query_mask, gone, rotary
            See the attributes.
        prior : Prior, optional
            K: 1 head, or one for each key-value head; default uniform.
        scale : float, optional
            1/tau; default 1/sqrt(d).
        causal : bool
            Forbid keys after the query.
        window : int, optional
            Forbid keys `window` or more tokens away (sliding window attention).
        mask : Tensor, optional
            Boolean, True = allowed: padding of shape (batch, n_keys), or pairs of shape (batch or
            1, query heads or 1, n_queries, n_keys), in addition to `causal` and `window`. A
            floating-point mask of the second shape is split into forbidden pairs and a log-prior
            by `goatviz.transport.visibility.split_mask`.
        visibility : Visibility, optional
            Replaces `causal`, `window` and `mask`.
        bias : Tensor, optional
            See the attributes; added to the log-prior of a floating-point mask.
        query_pos, key_pos : int, sequence or Tensor, optional
            Positions; default `goatviz.priors.base.default_positions`.

        Raises
        ------
        ValueError
            For shapes or values that do not fit, and for NaN or infinite q or k.
        TypeError
            For arguments of the wrong kind or dtype.

        Examples
        --------
        >>> q = k = torch.zeros(1, 1, 3, 8)
        >>> AttentionCall.from_tensors(q, k).plan(queries=slice(2, 3)).weights.tolist()
        [[0.3333333333333333, 0.3333333333333333, 0.3333333333333333]]
        """
        check_query_key(q, k, prior)
        _check_values(q, k)
        for name, tensor in (("v", v), ("bias", bias)):
            if tensor is not None:
                _check_floating(name, tensor)
        heads, kv_heads = q.shape[1], k.shape[1]
        shape = (q.shape[0], heads, q.shape[2], k.shape[2])
        scale = q.shape[3] ** -0.5 if scale is None else checks.number("scale", scale, above=0)
        if softcap is not None:
            softcap = checks.number("softcap", softcap, above=0)
        if sink is not None:
            sink = _checked_sink(sink, shape).to(q.device)
        checks.flag("causal", causal)
        if visibility is None:
            query_pos, key_pos = default_positions(*shape[2:], query_pos, key_pos, causal=causal)
            if window is not None:
                window = checks.positive_int("window", window)
            rules = {"causal": causal, "window": window}
            visibility, additive = _visible(mask, shape, query_pos, key_pos, rules)
            if additive is not None:
                bias = additive if bias is None else bias + additive
        else:
            query_pos, key_pos = default_positions(*shape[2:], query_pos, key_pos, causal=False)
            if (visibility.n_queries, visibility.n_keys) != shape[2:]:
                raise ValueError(
                    f"visibility must be of {shape[2]} queries and {shape[3]} keys, "
                    f"got {visibility.n_queries} and {visibility.n_keys}"
                )
        if bias is not None:
            _check_pairs("bias", bias, shape)
        return cls(
            shape,
            kv_heads,
            scale,
            visibility,
            query_pos.cpu(),
            key_pos.cpu(),
            *(None if tensor is None else tensor.detach() for tensor in (q, k, v)),
            prior=prior,
            bias=None if bias is None else bias.detach(),
            biased=bias is not None,
            sink=sink,
            softcap=softcap,
            query_mask=query_mask,
            gone=gone,
            rotary=rotary,
        )

    def without_tensors(self) -> AttentionCall:
        """The call without q, k, v and bias: O(length) memory, but it cannot be solved."""
        return replace(self, q=None, k=None, v=None, bias=None)

    def of_head(self, batch: int, head: int) -> AttentionCall:
        """The call of one sequence, and of one head alone if heads share their prior and mask."""
        visibility, at = self.visibility.of_entry(batch), slice(batch, batch + 1)
        shared = visibility.dense is None or visibility.dense.shape[1] == 1
        shared = shared and (self.prior is None or self.prior.num_heads == 1)
        heads = slice(head, head + 1) if shared else slice(None)
        kv = slice(None)
        if shared:
            first = head // (self.shape[1] // self.kv_heads)
            kv = slice(first, first + 1)
        q, k, bias = self.q[at, heads], self.k[at, kv], self.bias
        if bias is not None:
            bias = bias[at if len(bias) > 1 else slice(None)]
            bias = bias[:, heads if bias.shape[1] > 1 else slice(None)]
        return replace(
            self,
            shape=(*q.shape[:3], self.shape[3]),
            kv_heads=k.shape[1],
            visibility=visibility,
            q=q,
            k=k,
            v=None if self.v is None else self.v[at, kv],
            bias=bias,
            sink=None if self.sink is None else self.sink_logits(batch, heads)[None],
            query_mask=None if self.query_mask is None else entry_of(self.query_mask, batch)[None],
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of statistics: float64 for float64 queries, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of q and k."""
        return self.q.device

    @functools.cached_property
    def largest_score(self) -> float:
        """A bound on every |score| before the softcap, by the Cauchy-Schwarz inequality."""
        return abs(self.scale) * _largest_norm(self.q) * _largest_norm(self.k)

    @functools.cached_property
    def causal(self) -> bool:
        """Whether some query may use fewer keys than another of its sequence."""
        count = self.visibility.count()
        real = torch.where(count > 0, count, count.amax(-1, keepdim=True))
        return bool((real != real[..., -1:]).any())

    def sink_logits(
        self, batch: int, head: int | slice = slice(None), rows: slice | Tensor = slice(None)
    ) -> Tensor:
        """Logits of the extra column, nats, float64, shape (rows,) or (heads, rows).

        Parameters
        ----------
        batch, head, rows
            As in `logits`.

        Raises
        ------
        ValueError
            If the call has no such column.

        Examples
        --------
        >>> q = k = torch.zeros(1, 2, 3, 8)
        >>> AttentionCall.from_tensors(q, k, sink=torch.tensor([0.0, 1.0])).sink_logits(0, 1)
        tensor([1., 1., 1.], dtype=torch.float64)
        """
        if self.sink is None:
            raise ValueError("call must have a sink, got none")
        sink = self.sink
        if sink.ndim == 1:
            sink = sink[:, None].expand(-1, self.shape[2])[None]
        return entry_of(sink, batch)[head][..., rows]

    def has_keys(self, batch: int, head: int, rows: slice | Tensor = slice(None)) -> Tensor:
        """Which queries may use any key, shape (rows,)."""
        count = self.visibility.count()
        return entry_of(entry_of(count, batch), head)[rows] > 0

    @torch.no_grad()
    def logits(
        self,
        batch: int = 0,
        head: int | slice | Sequence[int] = 0,
        rows: slice | Tensor = slice(None),
        keys: slice = slice(None),
        *,
        lanes: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Logits:
        """Scores, log-prior and logits of a window: in float64, the definition of every plan.

        Parameters
        ----------
        batch : int
            Which sequence.
        head : int, slice or sequence of int
            Which query head; several give a first dimension of heads.
        rows : slice or Tensor of int64
            Which queries.
        keys : slice
            Which keys.
        lanes : bool
            Compute a prior that has lanes as a product of them: faster for many heads, and equal
            up to rounding in the prior's precision.
        dtype : torch.dtype
            Precision of the result; a prior is evaluated in float64 and then rounded.
        """
        query = self.scale * self.q[batch, head][..., rows, :].to(dtype)
        key = self.k[batch, :, keys][self._shared(head, self.kv_heads)].to(dtype)
        allowed = self.visibility.block(rows, keys, batch=batch, head=head)
        log_prior = bias = None
        if self.prior is not None:
            at = self._shared(head, self.prior.num_heads)
            values = self._by_lanes if lanes and self.prior.has_lanes else self._by_definition
            log_prior = values(at, rows, keys)
        if self.bias is not None:
            bias = entry_of(entry_of(self.bias, batch)[:, rows][..., keys], head)
        return self._together(query @ key.mT, allowed, log_prior, bias)

    def _together(
        self, scores: Tensor, allowed: Tensor, log_prior: Tensor | None, bias: Tensor | None
    ) -> Logits:
        """Combine scaled inner products, allowed pairs, prior and bias into logits."""
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        allowed = allowed.to(scores.device)
        log_prior = None if log_prior is None else log_prior.to(scores)
        if bias is not None:
            bias = torch.where(allowed, bias.to(scores), 0.0)
            log_prior = bias if log_prior is None else log_prior + bias
        if log_prior is None:
            log_prior, logits = scores.new_zeros(()).expand_as(scores), scores
        else:
            logits = scores + log_prior
        return Logits(scores, log_prior, logits.masked_fill(~allowed, -math.inf), allowed)

    @torch.no_grad()
    def weights_at(self, keys: Tensor, log_normaliser: Tensor, *, lanes: bool = False) -> Tensor:
        r"""Weights of some pairs, a few keys for each query: p_ij = exp(logit_ij - lse_i).

        Parameters
        ----------
        keys : Tensor of int64, shape (batch or 1, n_queries, m)
            Keys of each query; -1 for none.
        log_normaliser : Tensor, shape (batch, query heads, n_queries)
            lse, nats: `RowStatistics.log_normaliser`, which limits the weights' precision.
        lanes : bool
            As in `logits`: faster, in the prior's precision.

        Returns
        -------
        Tensor
            float64, shape (batch, query heads, n_queries, m): 0 at forbidden pairs, NaN where
            `keys` is -1. O(n_queries m) memory.

        Raises
        ------
        TypeError, ValueError
            If `keys` has another dtype or shape, or names a key that does not exist.

        Examples
        --------
        >>> q = k = torch.zeros(1, 1, 2, 8)
        >>> call = AttentionCall.from_tensors(q, k)
        >>> call.weights_at(torch.tensor([[[-1], [0]]]), torch.tensor([[[1.0, 2.0]]]).log())
        tensor([[[[   nan],
                  [0.5000]]]], dtype=torch.float64)
        """
        keys = self.check_places(keys)
        out = log_normaliser.new_empty(*self.shape[:3], keys.shape[2], dtype=torch.float64)
        step = max(1, _PAIRS // max(1, keys.shape[2]))
        for a in range(0, self.shape[2], step):
            rows = slice(a, a + step)
            for b in range(self.shape[0]):
                at = entry_of(keys, b)[rows]
                logits = self._logits_at(b, rows, at.clamp(min=0), lanes)
                lse = log_normaliser[b, :, rows, None].to(logits)
                # Rounding of the normaliser may lift a weight above 1.
                weights = (logits - lse).exp().clamp(max=1.0)
                out[b, :, rows] = weights.masked_fill((at < 0).to(weights.device), math.nan)
        return out

    def check_places(self, keys: Tensor, name: str = "keys") -> Tensor:
        """Check keys for `weights_at`, which errors call `name`, and move them to the CPU."""
        checks.instance(name, keys, Tensor, "a Tensor of int64")
        if keys.dtype != torch.int64:
            raise TypeError(f"{name} must be a Tensor of int64, got {keys.dtype}")
        batch, _, n_queries, n_keys = self.shape
        if keys.ndim != 3 or keys.shape[0] not in (1, batch) or keys.shape[1] != n_queries:
            raise ValueError(
                f"{name} must have shape ({batch} or 1, {n_queries}, m): some keys of each query, "
                f"got {tuple(keys.shape)}"
            )
        if keys.numel() and not -1 <= int(keys.min()) <= int(keys.max()) < n_keys:
            raise ValueError(
                f"{name} must be in -1 .. {n_keys - 1} (-1: none), "
                f"got {int(keys.min())} .. {int(keys.max())}"
            )
        return keys.cpu()

    def _logits_at(self, batch: int, rows: slice, keys: Tensor, lanes: bool) -> Tensor:
        """Logits of some rows at each row's own keys (rows, m): float64, (heads, rows, m)."""
        query = self.scale * self.q[batch, :, rows].double()
        key = self.k[batch][:, keys.to(self.device)].double()
        query = query.unflatten(0, (self.kv_heads, -1))
        scores = torch.einsum("kgrd,krmd->kgrm", query, key).flatten(0, 1)
        allowed = self.visibility.pairs(rows, keys, batch=batch)
        log_prior = bias = None
        if self.prior is not None:
            values = self._prior_by_lanes if lanes and self.prior.has_lanes else self._prior_at
            log_prior = values(rows, keys)[self._shared(slice(None), self.prior.num_heads)]
        if self.bias is not None:
            bias = entry_of(self.bias, batch)[:, rows]
            bias = bias.gather(-1, keys.to(bias.device).expand(len(bias), -1, -1))
        return self._together(scores, allowed, log_prior, bias).logits

    def _prior_at(self, rows: slice, keys: Tensor) -> Tensor:
        """Log-prior of pairs, (prior heads, rows, m), read off the diagonals of small windows."""
        points, parts = self.query_pos[rows], []
        for a in range(0, len(points), _DIAGONAL):
            at = keys[a : a + _DIAGONAL]
            window = self.prior.log_prior(points[a : a + _DIAGONAL], self.key_pos[at.flatten()])
            window = window.double().unflatten(-1, at.shape)
            parts.append(window.diagonal(dim1=1, dim2=2).mT)
        return torch.cat(parts, dim=1)

    def _prior_by_lanes(self, rows: slice, keys: Tensor) -> Tensor:
        """The same from lanes, in the prior's precision."""
        query, key = self._lanes_of(self.query_pos[rows], self.key_pos[keys.flatten()])
        return torch.einsum("hrl,hrml->hrm", query, key.unflatten(1, keys.shape))

    def _shared(self, head: int | slice | Sequence[int], sets: int) -> int | Tensor:
        """Which of `sets` parameter sets each head uses; consecutive heads share one."""
        which, group = head, self.shape[1] // sets
        if isinstance(head, int | slice):
            which = range(self.shape[1])[head]
        return which // group if isinstance(which, int) else torch.tensor(which) // group

    def _by_definition(self, at: int | Tensor, rows: slice | Tensor, keys: slice) -> Tensor:
        return self.prior.log_prior(self.query_pos[rows], self.key_pos[keys])[at].double()

    def _by_lanes(self, at: int | Tensor, rows: slice | Tensor, keys: slice) -> Tensor:
        query, key = self._lanes
        return query[at][..., rows, :].double() @ key[at][..., keys, :].double().mT

    @functools.cached_property
    def _lanes(self) -> tuple[Tensor, Tensor]:
        return self._lanes_of(self.query_pos, self.key_pos)

    def _lanes_of(self, query_pos: Tensor, key_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Lanes of queries and keys whose product is the log-prior, its gauge included."""
        factors = self.prior.factors(query_pos, key_pos)
        exact = self.prior.log_prior(query_pos, key_pos[:1]).double()
        bias = factors.key_bias.double().unsqueeze(-1)
        gauge = exact - factors.query.double() @ factors.key[:, :1].double().mT - bias[:, :1]
        return (
            torch.cat([factors.query.double(), gauge, torch.ones_like(gauge)], -1),
            torch.cat([factors.key.double(), torch.ones_like(bias), bias], -1),
        )

    @torch.no_grad()
    def residual(self, output: Tensor, queries: int = 16) -> float:
        r"""A certificate of a kernel: how far its output is from the plan times the values.

        max_i ||o_i - sum_j p_ij v_j||_inf / max_j ||v_j||_inf over evenly spaced queries of every
        sequence and head, with p recomputed in float64. Both sides are convex combinations of
        the values. Rounding leaves about the precision of the kernel's dtype; a mask, scale, prior
        or sink column that the kernel did not apply leaves a number of order 1, and numbers that
        are not finite leave infinity.

        Parameters
        ----------
        output : Tensor
            What the kernel returned, shape (batch, query heads, n_queries, d_v).
        queries : int
            Largest number of queries to compare; padding and queries without keys do not count.

        Raises
        ------
        ValueError
            If the call has no values, or `output` has another shape.
        """
        if self.v is None:
            raise ValueError("call must hold the values v, got none")
        wanted = (*self.shape[:3], self.v.shape[-1])
        if tuple(output.shape) != wanted:
            raise ValueError(f"output must have shape {wanted}, got {tuple(output.shape)}")
        count = min(checks.positive_int("queries", queries), self.shape[2])
        rows = torch.linspace(0, self.shape[2] - 1, count).round().long()
        largest, kv = 0.0, self._shared(slice(None), self.kv_heads)
        for b in range(self.shape[0]):
            logits = self.logits(b, slice(None), rows).logits
            if self.sink is not None:
                column = self.sink_logits(b, slice(None), rows).unsqueeze(-1)
                logits = torch.cat([logits, column], dim=-1)
            weights = torch.softmax(logits, dim=-1)[..., : self.shape[3]]
            expected = weights @ self.v[b][kv].double()
            seen = torch.stack([self.has_keys(b, h, rows) for h in range(self.shape[1])])
            if self.query_mask is not None:
                seen = seen & entry_of(self.query_mask, b)[rows.to(self.query_mask.device)].cpu()
            gap = (output[b][:, rows].double() - expected).abs().amax(-1).to(expected.device)
            gap = gap[seen.to(gap.device)]
            if len(gap):
                largest = max(largest, float(gap.nan_to_num(math.inf).max()))
        scale = float(self.v.abs().max())
        residual = largest / scale if scale else largest
        # Where nothing can be compared, nothing is certified.
        return math.inf if math.isnan(residual) else residual

    @torch.no_grad()
    def solve(self, batch: int, head: int, rows: slice | Tensor = slice(None)) -> TransportPlan:
        """Some rows of a head's plan over all keys and, last, the extra column if there is one.

        A query without keys is solved over all keys; see `has_keys`.
        """
        scores, log_prior, _, allowed = self.logits(batch, head, rows)
        if self.sink is not None:
            column = self.sink_logits(batch, head, rows).unsqueeze(-1)
            log_prior = torch.cat([log_prior, column], dim=-1)
            scores, allowed = F.pad(scores, (0, 1)), F.pad(allowed, (0, 1), value=True)
        return solve_rows(scores, log_prior=log_prior, mask=allowed | ~allowed.any(-1, True))

    def solve_by_blocks(self, batch: int, head: int, rows: range) -> Iterator[TransportPlan]:
        """`solve`, a bounded number of consecutive rows at a time."""
        for start in range(0, len(rows), _ROWS):
            yield self.solve(batch, head, torch.tensor(rows[start : start + _ROWS]))

    @torch.no_grad()
    def plan(
        self,
        batch: int = 0,
        head: int = 0,
        queries: slice = slice(None),
        keys: slice = slice(None),
    ) -> PlanWindow:
        """A window of one head's plan; rows of queries without an allowed key are NaN.

        Raises
        ------
        ValueError
            If the window is empty.
        TypeError
            If `queries` or `keys` is not a slice.
        """
        checks.instance("queries", queries, slice, "a slice")
        checks.instance("keys", keys, slice, "a slice")
        rows, columns = range(self.shape[2])[queries], range(self.shape[3])[keys]
        if not len(rows) or not len(columns):
            raise ValueError(f"queries and keys must be a non-empty window, got {queries}, {keys}")
        at = torch.tensor(columns, device=self.device)
        pieces = []
        for plan in self.solve_by_blocks(batch, head, rows):
            logits = plan.scores + plan.log_prior
            values = [plan.scores, plan.log_prior, logits, plan.weights]
            values = [value[:, at] for value in (*values, plan.allowed)]
            pieces.append((*values, plan.weights[:, self.shape[3] :].sum(-1)))
        window = PlanWindow(*(torch.cat(part) for part in zip(*pieces, strict=True)))
        empty = ~self.has_keys(batch, head, torch.tensor(rows)).to(self.device)
        for value in window:
            value[empty] = False if value.dtype == torch.bool else math.nan
        return window


def _checked_sink(sink: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, n_queries, _ = shape
    sink = torch.as_tensor(sink).detach().double()
    fits = sink.shape == (heads,) or (
        sink.ndim == 3 and len(sink) in (1, batch) and sink.shape[1:] == (heads, n_queries)
    )
    if not fits or not bool(torch.isfinite(sink).all()):
        raise ValueError(
            f"sink must hold finite logits of shape {(heads,)} (query heads) or "
            f"{(batch, heads, n_queries)} (batch or 1, query heads, n_queries), "
            f"got shape {tuple(sink.shape)}"
        )
    return sink


def check_query_key(q: Tensor, k: Tensor, prior: Prior | None) -> None:
    """Raise an error unless the kinds and shapes of queries, keys and a prior fit together."""
    for tensor, name in ((q, "q"), (k, "k")):
        _check_floating(name, tensor)
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, d), none of them 0, "
                f"got {tuple(tensor.shape)}"
            )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head size, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must share a dtype, got {q.dtype} and {k.dtype}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    if prior is not None:
        checks.instance("prior", prior, Prior, "a goatviz Prior")
        if prior.num_heads not in (1, k.shape[1]):
            raise ValueError(
                f"prior must have 1 or {k.shape[1]} heads (the key-value heads), "
                f"got {prior.num_heads}"
            )


def _check_floating(name: str, tensor: Tensor) -> None:
    checks.instance(name, tensor, Tensor, "a Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.itemsize == 1:
        raise TypeError(f"{name} must be of at least 16 bits, got {tensor.dtype}")


def _largest_norm(rows: Tensor) -> float:
    """The largest norm of a row, in float64 only where float32 overflows."""
    rows = rows.detach()
    if rows.dtype != torch.float64:
        largest = float(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).amax())
        if largest < math.inf:
            return largest
    return float(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).amax())


def _check_values(q: Tensor, k: Tensor) -> None:
    for tensor, name in ((q, "q"), (k, "k")):
        if tensor.is_meta:
            raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
        # A finite sum has finite terms only, and takes one pass; finite terms may overflow it.
        if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            hint = " (float16 overflows above 65,504)" if tensor.dtype == torch.float16 else ""
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values{hint}")


def _visible(
    mask: Tensor | None,
    shape: tuple[int, int, int, int],
    query_pos: Tensor,
    key_pos: Tensor,
    rules: dict[str, bool | int | None],
) -> tuple[Visibility, Tensor | None]:
    """Allowed pairs by rules and mask, and what a floating mask adds to the logits."""
    index = query_pos[:, 0].contiguous(), key_pos[:, 0].contiguous()
    if mask is None:
        return Visibility.from_rules(*index, **rules), None
    checks.instance("mask", mask, Tensor, "a Tensor")
    if mask.ndim == 2:
        if mask.dtype != torch.bool:
            raise TypeError(f"a mask of shape (batch, n_keys) must be boolean, got {mask.dtype}")
        if mask.shape != (shape[0], shape[3]):
            raise ValueError(
                f"mask must have shape {(shape[0], shape[3])} (batch, n_keys) or "
                f"{shape} (batch, heads, n_queries, n_keys), got {tuple(mask.shape)}"
            )
        return Visibility.from_rules(*index, **rules, padding_mask=mask), None
    _check_pairs("mask", mask, shape)
    allowed, additive = split_mask(mask)
    if rules["causal"] or rules["window"] is not None:
        ruled = Visibility.from_rules(*index, **rules).block(slice(None), slice(None))
        allowed = allowed & ruled.to(allowed.device)
    return Visibility.from_mask(allowed), additive


def _check_pairs(name: str, value: Tensor, shape: tuple[int, int, int, int]) -> None:
    fits = value.ndim == 4 and value.shape[2:] == shape[2:]
    if not (fits and value.shape[0] in (1, shape[0]) and value.shape[1] in (1, shape[1])):
        raise ValueError(
            f"{name} must have shape {shape} (batch, heads, n_queries, n_keys; the first two may "
            f"be 1), got {tuple(value.shape)}"
        )
