"""Exact statistics of a plan from queries and keys, without the plan: O(length) memory.

Three implementations say the same: "reference", dense and in float64, is the definition;
"blockwise" streams over blocks of queries and does everything; "fused" reads what a flash kernel
and its log-normaliser already know, in one or two calls. Dense plans live in `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from goatviz.transport.blockwise import WIDEST_ROW, sweep
from goatviz.transport.problem import LogPrior, Problem, make_problem
from goatviz.transport.rows import TransportPlan, solve_rows
from goatviz.transport.visibility import Visibility

#: What one fused call yields.
CHEAP_STATISTICS = (
    "log_normaliser",
    "entropy",
    "expected_score",
    "expected_log_prior",
    "kl_to_prior",
    "key_mass",
    "recent_mass",
    "sink_mass",
)
#: Everything known of a row.
ROW_STATISTICS = (
    *CHEAP_STATISTICS,
    "lag_mean",
    "lag_std",
    "largest_weight",
    "content_range",
)
IMPLEMENTATIONS = ("auto", "blockwise", "fused", "reference")

# A forbidden key's lane in a fused call: far below any logit, far above -inf (0 * inf is NaN).
_FORBIDDEN = 1e5
# Nats of prior in a lane, of which a sum over all keys is taken, beyond which float32 is not good
# for 1e-5.
_LARGEST_LANE = 8.0
# Rows of a dense window that are computed together.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class RowStatistics:
    r"""Statistics of each query's row p_i of a plan; those not asked for are None.

    Every Tensor has shape (batch, query heads, n_queries) unless said otherwise, in float32
    (float64 for float64 input). Rows of queries that may use no key are NaN.

    Attributes
    ----------
    log_normaliser : Tensor
        log sum_j exp(logit_ij), nats, in the gauge of `prior.log_prior`; the extra column counts.
    entropy : Tensor
        -sum p log p, nats, the extra column included.
    expected_score : Tensor
        sum p s of the scaled scores: minus the transport cost over tau.
    expected_log_prior : Tensor
        sum p log pi, nats, with pi normalised over the allowed keys (and the extra column).
    kl_to_prior : Tensor
        sum p log(p / pi), nats.
    key_mass : Tensor
        Shape (..., n_queries, len(keys)): weight of each chosen key, 0 where it is forbidden.
    recent_mass : Tensor
        Weight of the keys less than `recent` tokens away.
    sink_mass : Tensor
        Weight of the extra column; 0 without one.
    lag_mean, lag_std : Tensor
        Mean and standard deviation of lag = query - key, tokens, over the real keys.
    largest_weight : Tensor
        max_j p_ij over the real keys.
    content_range : Tensor
        max_j s_ij - min_j s_ij over the allowed keys.
    visible : Tensor of int64
        Keys that the query may use, shape (batch or 1, query heads or 1, n_queries).
    keys : tuple of int
        The chosen keys.
    recent : int
        Tokens of the recent window.
    impl : str
        What computed it.
    """

    log_normaliser: Tensor | None
    entropy: Tensor | None
    expected_score: Tensor | None
    expected_log_prior: Tensor | None
    kl_to_prior: Tensor | None
    key_mass: Tensor | None
    recent_mass: Tensor | None
    sink_mass: Tensor | None
    lag_mean: Tensor | None
    lag_std: Tensor | None
    largest_weight: Tensor | None
    content_range: Tensor | None
    visible: Tensor
    keys: tuple[int, ...]
    recent: int
    impl: str

    def asked(self) -> dict[str, Tensor]:
        """The statistics that were asked for, by name."""
        named = {name: getattr(self, name) for name in ROW_STATISTICS}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, eq=False)
class IncomingMass:
    """What each key receives.

    Attributes
    ----------
    mass : Tensor
        b_j = sum_i a_i p_ij, shape (batch, query heads, n_keys); units of a (default: queries).
    observers : Tensor of int64
        Queries that may use the key, shape (batch or 1, query heads or 1, n_keys).
    impl : str
        What computed it.
    """

    mass: Tensor
    observers: Tensor
    impl: str

    @property
    def importance(self) -> Tensor:
        """Mass divided by the number of observers; NaN where nobody may use the key."""
        return torch.where(self.observers > 0, self.mass / self.observers.clamp(min=1), math.nan)


def row_statistics(
    q: Tensor,
    k: Tensor,
    *,
    prior: LogPrior | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    statistics: Iterable[str] = ROW_STATISTICS,
    sink: Tensor | None = None,
    softcap: float | None = None,
    query_pos: Tensor | None = None,
    key_pos: Tensor | None = None,
    impl: str = "auto",
) -> RowStatistics:
    r"""Statistics of every row of p_i = softmax_j(scale <q_i, k_j> + K_ij), no L x L array.

    Parameters
    ----------
    q : Tensor
        Queries, shape (batch, query heads, n_queries, d). Half precision is computed in float32.
    k : Tensor
        Keys, shape (batch, key-value heads, n_keys, d); query heads are a multiple.
    prior : Prior, optional
        K: 1 head, or one for each key-value head; default uniform.
    scale : float, optional
        1/tau; default 1/sqrt(d).
    causal : bool
        Forbid keys after the query. Without positions, queries are the last n_queries of the
        keys (cached decoding).
    window : int, optional
        Forbid keys `window` or more tokens away (sliding window attention).
    mask : Tensor, optional
        Boolean, True = allowed: padding of shape (batch, n_keys), or pairs of shape (batch or 1,
        query heads or 1, n_queries, n_keys), which add to `causal` and `window`. A floating mask
        of that second shape is added to the logits and counts as log-prior; -inf forbids.
    keys : sequence of int
        Keys whose weight is returned.
    recent : int
        Tokens, of the recent window.
    statistics : iterable of str
        Names out of `ROW_STATISTICS`; default all.
    sink : Tensor, optional
        Logits of one extra column that takes mass and has no key, shape (query heads,), nats
        (GPT-OSS). It is a key of score 0 whose log-prior is this logit.
    softcap : float, optional
        c of c tanh(x / c), applied to the scaled inner products (Gemma 2).
    query_pos, key_pos : Tensor, optional
        Positions, shape (length,) or (length, 1 + axes); column 0 is the sequence index.
    impl : {"auto", "blockwise", "fused", "reference"}
        Blocks of queries, which does everything; flash kernels (only `CHEAP_STATISTICS`, no
        window, dense mask or softcap, a prior with lanes; float32 errors grow to 1e-6 of the
        largest expected logit); the dense float64 definition. "auto" takes kernels for the cheap
        statistics where they apply and are faster (on an accelerator; on a CPU beyond 32,768
        keys), else blocks, and the result says which.

    Returns
    -------
    RowStatistics
        Equal for all implementations up to rounding.

    Raises
    ------
    ValueError
        For shapes, names, values or an `impl` that do not fit, and for NaN or infinite q, k.
    TypeError
        For tensors or masks of the wrong dtype.

    Notes
    -----
    With lse_i the log-normaliser: p_ij = exp(logit_ij - lse_i), H_i = lse_i - E_p[logit_i], and
    E_p[<q_i, k_j>] = <q_i, sum_j p_ij k_j>: one fused call with the keys as values. Source: the
    one-sided entropic transport reading of Litman 2025 (arXiv 2508.08369).

    Examples
    --------
    >>> import torch
    >>> q = k = torch.zeros(1, 1, 4, 8)
    >>> rows = row_statistics(q, k, statistics=["entropy", "key_mass"])
    >>> rows.entropy.exp().round().flatten().tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    names = _names(statistics)
    problem = make_problem(
        q,
        k,
        prior=prior,
        scale=scale,
        causal=causal,
        window=window,
        mask=mask,
        sink=sink,
        softcap=softcap,
        query_pos=query_pos,
        key_pos=key_pos,
    )
    return statistics_of(problem, names, keys=keys, recent=recent, impl=impl)


def incoming_mass(
    q: Tensor,
    k: Tensor,
    *,
    query_mass: Tensor | None = None,
    prior: LogPrior | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    query_pos: Tensor | None = None,
    key_pos: Tensor | None = None,
    impl: str = "auto",
) -> IncomingMass:
    r"""Mass that each key receives: b_j = sum_i a_i p_ij, no L x L array.

    Parameters
    ----------
    q, k, prior, scale, causal, window, mask, sink, softcap, query_pos, key_pos
        As in `row_statistics`.
    query_mass : Tensor, optional
        a_i >= 0, shape (batch or 1, n_queries); default 1 for every query. Queries of mass 0
        (padding) do not count as observers.
    impl : {"auto", "blockwise", "fused", "reference"}
        As in `row_statistics`; "auto" takes kernels on an accelerator, blocks on a CPU.

    Returns
    -------
    IncomingMass
        The extra column's share is missing from the sum over keys.

    Raises
    ------
    ValueError, TypeError
        As in `row_statistics`.

    Notes
    -----
    b_j = exp(log sum_i exp(logit_ij - lse_i + log a_i)) is the log-normaliser of the transposed
    problem: the other half-step of Sinkhorn's iteration, and one more forward call of the kernel
    with queries and keys exchanged.

    Examples
    --------
    >>> import torch
    >>> q = k = torch.zeros(1, 1, 2, 8)
    >>> incoming_mass(q, k).mass.flatten().tolist()
    [1.5, 0.5]
    """
    problem = make_problem(
        q,
        k,
        prior=prior,
        scale=scale,
        causal=causal,
        window=window,
        mask=mask,
        sink=sink,
        softcap=softcap,
        query_pos=query_pos,
        key_pos=key_pos,
    )
    return incoming_of(problem, query_mass=query_mass, impl=impl)


@torch.no_grad()
def statistics_of(
    problem: Problem,
    names: Sequence[str] = ROW_STATISTICS,
    *,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    impl: str = "auto",
) -> RowStatistics:
    """`row_statistics` of a checked problem."""
    keys = _check_keys(keys, problem.k.shape[2])
    _check_recent(recent)
    names = _names(names)
    impl = _choose(problem, impl, only_cheap=set(names) <= set(CHEAP_STATISTICS))
    if impl == "reference":
        found, _ = _reference(problem, names, keys, recent, None)
    elif impl == "fused":
        found = _fused_rows(problem, names, keys, recent)
    else:
        found, _ = sweep(problem, names, keys=keys, recent=recent)
    return _row_result(problem, found, keys, recent, impl)


@torch.no_grad()
def incoming_of(
    problem: Problem, *, query_mass: Tensor | None = None, impl: str = "auto"
) -> IncomingMass:
    """`incoming_mass` of a checked problem."""
    query_mass = _check_query_mass(query_mass, problem)
    if impl == "auto" and problem.q.device.type == "cpu":
        impl = "blockwise"
    impl = _choose(problem, impl, only_cheap=True)
    if impl == "reference":
        _, mass = _reference(problem, (), (), 1, query_mass)
    elif impl == "fused":
        mass = _fused_incoming(problem, query_mass)
    else:
        _, mass = sweep(problem, (), query_mass=query_mass)
    return _incoming_result(problem, mass, query_mass, impl)


@torch.no_grad()
def all_of(
    problem: Problem,
    names: Sequence[str] = ROW_STATISTICS,
    *,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    query_mass: Tensor | None = None,
    impl: str = "auto",
) -> tuple[RowStatistics, IncomingMass]:
    """Row statistics and incoming mass together: one pass over the blocks yields both."""
    if impl == "auto" and problem.q.device.type == "cpu":
        impl = "blockwise"
    if impl != "blockwise":
        rows = statistics_of(problem, names, keys=keys, recent=recent, impl=impl)
        return rows, incoming_of(problem, query_mass=query_mass, impl=impl)
    keys = _check_keys(keys, problem.k.shape[2])
    _check_recent(recent)
    query_mass = _check_query_mass(query_mass, problem)
    found, mass = sweep(problem, _names(names), keys=keys, recent=recent, query_mass=query_mass)
    return (
        _row_result(problem, found, keys, recent, impl),
        _incoming_result(problem, mass, query_mass, impl),
    )


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


@torch.no_grad()
def dense_window(
    problem: Problem,
    *,
    batch: int = 0,
    head: int = 0,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> PlanWindow:
    """A window of one head's plan, computed densely, a block of queries at a time.

    Rows of queries that may use no key are NaN.

    Raises
    ------
    ValueError
        If the window is empty.
    """
    rows = range(problem.q.shape[2])[queries]
    columns = range(problem.k.shape[2])[keys]
    if not len(rows) or not len(columns):
        raise ValueError(f"queries and keys must be a non-empty window, got {queries}, {keys}")
    at = torch.tensor(columns, device=problem.q.device)
    pieces = []
    for a in range(0, len(rows), _ROWS):
        part = torch.tensor(rows[a : a + _ROWS])
        plan = _dense_rows(problem, batch, head, part)
        empty = _without_keys(problem, batch, head, part)
        values = [
            plan.scores[:, at],
            plan.log_prior[:, at],
            (plan.scores + plan.log_prior)[:, at],
            plan.weights[:, at],
        ]
        values = [torch.where(empty, math.nan, value) for value in values]
        sink = torch.where(empty[:, 0], math.nan, plan.weights[:, problem.k.shape[2] :].sum(-1))
        allowed = plan.allowed[:, at] & ~empty
        pieces.append((*values, allowed, sink))
    return PlanWindow(*(torch.cat(part) for part in zip(*pieces, strict=True)))


@torch.no_grad()
def dense_rows(
    problem: Problem, batch: int, head: int, queries: Tensor
) -> tuple[TransportPlan, Tensor]:
    """Some rows of one head's plan over all keys and the extra column (last), float64.

    Returns
    -------
    plan : TransportPlan
        Of the rows asked for; those that may use no key are solved over all of them.
    empty : Tensor of bool
        Which rows these are, shape (rows,).
    """
    plan = _dense_rows(problem, batch, head, queries)
    return plan, _without_keys(problem, batch, head, queries).squeeze(-1)


def _without_keys(problem: Problem, batch: int, head: int, rows: Tensor) -> Tensor:
    """Which of these queries may use no key, shape (rows, 1)."""
    count = problem.visibility.count()
    count = count[batch if len(count) > 1 else 0]
    count = count[head if len(count) > 1 else 0].cpu()
    return (count[rows] == 0).unsqueeze(-1).to(problem.q.device)


# The definition -----------------------------------------------------------------------------


def _dense_rows(problem: Problem, batch: int, head: int, queries: Tensor) -> TransportPlan:
    """A TransportPlan over all keys (and the extra column, last) of some rows, float64."""
    kv = head // (problem.q.shape[1] // problem.k.shape[1])
    scores = (
        problem.scale * problem.q[batch, head, queries].double() @ problem.k[batch, kv].double().mT
    )
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    log_prior = torch.zeros_like(scores)
    if problem.prior is not None:
        values = problem.prior.log_prior(problem.query_pos[queries], problem.key_pos).double()
        log_prior = log_prior + values[kv if len(values) > 1 else 0].to(scores.device)
    allowed = problem.visibility.block(queries, slice(None), batch=batch, head=head)
    allowed = allowed.to(scores.device)
    if problem.bias is not None:
        bias = problem.bias[batch if problem.bias.shape[0] > 1 else 0]
        bias = bias[head if bias.shape[0] > 1 else 0][queries].to(scores.device)
        log_prior = log_prior + torch.where(allowed, bias.double(), 0.0)
    if problem.sink is not None:
        log_prior = torch.cat([log_prior, problem.sink[head].expand(len(scores), 1)], dim=-1)
        scores = F.pad(scores, (0, 1))
        allowed = F.pad(allowed, (0, 1), value=True)
    # A row without any key is solved over all of them here, and never shown.
    return solve_rows(scores, log_prior=log_prior, mask=allowed | ~allowed.any(-1, keepdim=True))


def _reference(
    problem: Problem,
    names: Sequence[str],
    keys: Sequence[int],
    recent: int,
    query_mass: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    batch, heads, n_queries, _ = problem.q.shape
    n_keys = problem.k.shape[2]
    found = _empty(problem, names, keys, dtype=torch.float64)
    mass = problem.q.new_zeros(batch, heads, n_keys, dtype=torch.float64)
    distance = (problem.query_pos[:, :1] - problem.key_pos[:, 0]).to(problem.q.device)
    every = torch.arange(n_queries)
    for b in range(batch):
        for h in range(heads):
            plan = _dense_rows(problem, b, h, every)
            real = plan.weights[:, :n_keys]
            allowed = plan.allowed[:, :n_keys]
            share = real.sum(-1)
            logits = plan.scores + _raw_log_prior(problem, plan, b, h)
            mean = (real * distance).sum(-1) / share
            scores = plan.scores[:, :n_keys]
            values = {
                "log_normaliser": torch.logsumexp(logits.masked_fill(~plan.allowed, -math.inf), -1),
                "entropy": plan.entropy,
                "expected_score": (plan.weights * plan.scores).sum(-1),
                "expected_log_prior": (
                    plan.weights * plan.log_prior.masked_fill(~plan.allowed, 0.0)
                ).sum(-1),
                "kl_to_prior": plan.kl_to_prior,
                "key_mass": real[:, list(keys)],
                "recent_mass": (real * (distance.abs() < recent)).sum(-1),
                "sink_mass": plan.weights[:, n_keys:].sum(-1),
                "lag_mean": mean,
                "lag_std": ((real * (distance - mean.unsqueeze(-1)) ** 2).sum(-1) / share).sqrt(),
                "largest_weight": real.amax(-1),
                "content_range": scores.masked_fill(~allowed, -math.inf).amax(-1)
                - scores.masked_fill(~allowed, math.inf).amin(-1),
            }
            for name in names:
                found[name][b, h] = values[name]
            if query_mass is not None:
                seen = problem.visibility.count()
                seen = seen[b if len(seen) > 1 else 0]
                seen = seen[h if len(seen) > 1 else 0].to(real.device) > 0
                mass[b, h] = (query_mass[b] * seen).double() @ real
    return found, mass


def _raw_log_prior(problem: Problem, plan, batch: int, head: int) -> Tensor:
    """The log-prior as it was given: the plan's own is normalised over each row."""
    raw = torch.zeros_like(plan.scores)
    n_keys = problem.k.shape[2]
    kv = head // (problem.q.shape[1] // problem.k.shape[1])
    if problem.prior is not None:
        values = problem.prior.log_prior(problem.query_pos, problem.key_pos).double()
        raw[:, :n_keys] += values[kv if len(values) > 1 else 0].to(raw.device)
    if problem.bias is not None:
        bias = problem.bias[batch if problem.bias.shape[0] > 1 else 0]
        raw[:, :n_keys] += bias[head if bias.shape[0] > 1 else 0].double().to(raw.device)
    if problem.sink is not None:
        raw[:, n_keys] = problem.sink[head]
    return raw


# One fused call -----------------------------------------------------------------------------


class _Span(NamedTuple):
    """Keys of a fused call: the first `prefix` are open to all, the rest are causal."""

    prefix: int
    causal: bool


def _span(problem: Problem) -> _Span | str:
    """How a flash kernel's own causal flag covers the problem, or what it cannot do."""
    vis = problem.visibility
    if vis.dense is not None:
        return "a dense mask"
    if problem.softcap is not None:
        return "a softcap"
    if problem.bias is not None:
        return "an additive mask"
    if problem.prior is not None and not problem.prior.has_lanes:
        return "a prior without lanes"
    n_queries, n_keys = vis.n_queries, vis.n_keys
    rows = torch.arange(n_queries)
    open_to_all = causal = True
    for b in range(vis.batch):
        chosen, start, stop = vis.entry(b)
        if len(chosen) > 1 and bool((chosen[1:] < chosen[:-1]).any()):
            return "keys out of order"
        if bool(start.any()):
            return "a window"
        open_to_all &= bool((stop == len(chosen)).all())
        # The kernel's own flag forbids the same pairs of the keys that exist.
        before = torch.searchsorted(chosen, rows + (n_keys - n_queries), right=True)
        causal &= bool((stop == before).all())
    if open_to_all:
        return _Span(n_keys, False)
    if causal and n_queries <= n_keys:
        return _Span(n_keys - n_queries, True)
    return "a mask that is neither causal nor open to all queries"


def _choose(problem: Problem, impl: str, *, only_cheap: bool) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl in ("reference", "blockwise"):
        return impl
    span = _span(problem)
    hindrance = span if isinstance(span, str) else None
    if impl == "auto" and not (only_cheap and hindrance is None):
        return "blockwise"
    if impl == "auto" and problem.q.device.type == "cpu" and len(problem.key_pos) <= WIDEST_ROW:
        return "blockwise"
    if hindrance is None and problem.q.device.type != "cpu" and problem.q.dtype == torch.float64:
        hindrance = "float64 on an accelerator"
    if hindrance is None and problem.prior is not None:
        largest = float(_centred_lanes(problem)[1].abs().max())
        if largest > _LARGEST_LANE and problem.q.dtype != torch.float64:
            hindrance = f"a prior of {largest:.0f} nats, which float32 logits cannot resolve"
    if hindrance is None:
        return "fused"
    if impl == "fused":
        raise ValueError(f"impl='fused' cannot do {hindrance}; use impl='blockwise'")
    return "blockwise"


def _centred_lanes(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query lanes, key bias centred on 0 and key lanes, in float64: a row constant is free."""
    factors = problem.prior.factors(problem.query_pos, problem.key_pos)
    bias = factors.key_bias.double()
    middle = (bias.amax(-1, keepdim=True) + bias.amin(-1, keepdim=True)) / 2
    return factors.query.double(), bias - middle, factors.key.double()


def _padding_lane(problem: Problem) -> Tensor | None:
    """-1e5 at keys that nobody may use, shape (batch, 1, n_keys, 1); None if there are none."""
    vis = problem.visibility
    if all(len(vis.entry(b)[0]) == vis.n_keys for b in range(vis.batch)):
        return None
    lane = torch.full((vis.batch, 1, vis.n_keys, 1), -_FORBIDDEN)
    for b in range(vis.batch):
        lane[b, 0, vis.entry(b)[0]] = 0.0
    return lane.to(problem.q).expand(problem.q.shape[0], -1, -1, -1)


def _widened(problem: Problem) -> tuple[Tensor, Tensor]:
    """Queries (scaled) and keys with the prior's lanes appended: <q, k> is the whole logit."""
    q, k = problem.q * problem.scale, problem.k
    query_parts, key_parts = [q], [k]
    batch, heads = q.shape[:2]
    if problem.prior is not None:
        query, bias, key = (x.to(q) for x in _centred_lanes(problem))
        query = query.repeat_interleave(heads // len(query), dim=0)
        query_parts.append(query.expand(batch, -1, -1, -1))
        query_parts.append(q.new_ones(*q.shape[:3], 1))
        key = torch.cat([key, bias.unsqueeze(-1)], dim=-1)
        key_parts.append(key.expand(batch, k.shape[1], -1, -1))
    padding = _padding_lane(problem)
    if padding is not None:
        query_parts.append(q.new_ones(*q.shape[:3], 1))
        key_parts.append(padding.expand(-1, k.shape[1], -1, -1))
    return torch.cat(query_parts, dim=-1), torch.cat(key_parts, dim=-1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(<q, k>) v and its log-normaliser, from the device's flash kernel; heads are equal."""
    width = max(q.shape[-1], v.shape[-1])
    width = -(-width // 8) * 8
    value_width = v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=1.0
        )
    else:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=1.0
        )
        # This kernel rounds the length of its log-normaliser up.
        lse = lse[..., : q.shape[2]]
    return out[..., :value_width], lse


def _attend(q: Tensor, k: Tensor, v: Tensor, span: _Span) -> tuple[Tensor, Tensor]:
    """`_kernel` over a prefix open to all and a causal rest, merged by their normalisers."""
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    parts = []
    if span.prefix:
        parts.append(_kernel(q, k[:, :, : span.prefix], v[:, :, : span.prefix], False))
    if span.prefix < k.shape[2]:
        parts.append(_kernel(q, k[:, :, span.prefix :], v[:, :, span.prefix :], True))
    if len(parts) == 1:
        return parts[0]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * torch.exp(part - lse).unsqueeze(-1) for o, part in parts)
    return out, lse


def _with_sink(problem: Problem, lse: Tensor, gauge: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The log-normaliser with the extra column, and that column's logit, in the kernel's gauge."""
    if problem.sink is None:
        return lse, None
    sink = problem.sink.to(lse)[None, :, None].expand_as(lse)
    if gauge is not None:
        sink = sink - gauge
    return torch.logaddexp(lse, sink), sink


def _fused_gauge(problem: Problem) -> Tensor | None:
    """Nats to add to fused logits for the gauge of `log_prior`, (query heads, n_queries)."""
    if problem.prior is None:
        return None
    query, bias, key = _centred_lanes(problem)
    exact = problem.prior.log_prior(problem.query_pos, problem.key_pos[:1]).double()
    ours = query @ key[:, :1].mT + bias[:, None, :1]
    gauge = (exact - ours).squeeze(-1).to(problem.q)
    return gauge.repeat_interleave(problem.q.shape[1] // len(gauge), dim=0)


def _fused_rows(
    problem: Problem, names: Sequence[str], keys: Sequence[int], recent: int
) -> dict[str, Tensor]:
    expensive = [name for name in names if name not in CHEAP_STATISTICS]
    if expensive:
        raise ValueError(
            f"impl='fused' cannot do {', '.join(expensive)}; use impl='blockwise' or 'auto'"
        )
    span = _span(problem)
    q, k = _widened(problem)
    expected = {"entropy", "expected_score", "expected_log_prior", "kl_to_prior"} & set(names)
    out, lse = _attend(q, k, k if expected else k[..., :1], span)
    gauge = _fused_gauge(problem)
    content = problem.k.shape[-1]
    normaliser, sink = _with_sink(problem, lse, gauge)
    share = torch.exp(lse - normaliser)
    found: dict[str, Tensor] = {}
    if "log_normaliser" in names:
        found["log_normaliser"] = normaliser if gauge is None else normaliser + gauge
    if expected:
        score = share * torch.linalg.vecdot(q[..., :content], out[..., :content])
        prior = torch.zeros_like(score)
        if problem.prior is not None:
            lanes = slice(content, content + _prior_lanes(problem))
            prior = share * torch.linalg.vecdot(q[..., lanes], out[..., lanes])
        if sink is not None:
            prior = prior + sink * torch.exp(sink - normaliser)
        found["expected_score"] = score
        found["entropy"] = normaliser - score - prior
        if {"expected_log_prior", "kl_to_prior"} & set(names):
            partition = _fused_partition(problem, q, k, span)
            if sink is not None:
                partition = torch.logaddexp(partition, sink)
            found["expected_log_prior"] = prior - partition
            found["kl_to_prior"] = score - normaliser + partition
    if "key_mass" in names:
        group = q.shape[1] // k.shape[1]
        chosen = k[:, :, list(keys)].repeat_interleave(group, dim=1)
        mass = torch.exp(q @ chosen.mT - normaliser.unsqueeze(-1))
        index = problem.visibility
        for at, key in enumerate(keys):
            for b in range(q.shape[0]):
                allowed = index.block(slice(None), slice(key, key + 1), batch=b).squeeze(-1)
                mass[b, :, :, at].masked_fill_(~allowed.to(mass.device), 0.0)
        found["key_mass"] = mass
    if "sink_mass" in names:
        found["sink_mass"] = torch.zeros_like(lse) if sink is None else torch.exp(sink - normaliser)
    if "recent_mass" in names:
        near, _ = sweep(_near(problem, recent), ("log_normaliser",))
        own = normaliser if gauge is None else normaliser + gauge
        found["recent_mass"] = torch.exp(near["log_normaliser"] - own).nan_to_num(nan=0.0)
    empty = (problem.visibility.count() == 0).to(lse.device)
    return {
        name: torch.where(empty if value.ndim == 3 else empty.unsqueeze(-1), math.nan, value)
        for name, value in found.items()
        if name in names
    }


def _prior_lanes(problem: Problem) -> int:
    point_q, point_k = problem.query_pos[:1], problem.key_pos[:1]
    return problem.prior.factors(point_q, point_k).query.shape[-1] + 1


def _fused_partition(problem: Problem, q: Tensor, k: Tensor, span: _Span) -> Tensor:
    """The prior's own log-normaliser in the kernel's gauge, (batch, heads, n_queries)."""
    if problem.prior is None:
        count = problem.visibility.count().to(q)
        return count.log().expand(q.shape[0], q.shape[1], -1)
    content = problem.k.shape[-1]
    heads = problem.prior.num_heads
    group = q.shape[1] // heads
    shared = _padding_lane(problem) is None
    batch = slice(0, 1) if shared else slice(None)
    kv = k[batch, :: k.shape[1] // heads, :, content:]
    lanes = _prior_lanes(problem)
    if lanes == 1 and not span.prefix and shared:
        # Key-only terms under a causal mask: one running sum.
        partition = torch.logcumsumexp(kv[..., 0].double(), dim=-1).to(q.dtype)
    else:
        _, partition = _attend(q[batch, ::group, :, content:], kv, kv[..., :1], span)
    return partition.repeat_interleave(group, dim=1).expand(q.shape[0], -1, -1)


def _near(problem: Problem, recent: int) -> Problem:
    """The same problem on the recent keys alone, without the extra column."""
    vis = problem.visibility
    index = problem.query_pos[:, 0].contiguous()
    keys, starts, stops = [], [], []
    for b in range(vis.batch):
        chosen, start, stop = vis.entry(b)
        at = problem.key_pos[chosen, 0].contiguous()
        first = torch.searchsorted(at, index - recent, right=True)
        last = torch.searchsorted(at, index + recent)
        first, last = torch.maximum(start, first), torch.minimum(stop, last)
        keys.append(chosen)
        starts.append(first)
        stops.append(torch.maximum(first, last))
    near = Visibility(
        vis.n_queries, vis.n_keys, tuple(keys), torch.stack(starts), torch.stack(stops)
    )
    values = {field.name: getattr(problem, field.name) for field in fields(Problem)}
    return Problem(**{**values, "visibility": near, "sink": None})


def _fused_incoming(problem: Problem, query_mass: Tensor) -> Tensor:
    span = _span(problem)
    q, k = _widened(problem)
    _, lse = _attend(q, k, k[..., :1], span)
    normaliser, _ = _with_sink(problem, lse, _fused_gauge(problem))
    counted = (query_mass > 0).unsqueeze(1) & (problem.visibility.count() > 0).to(lse.device)
    lane = query_mass.log().unsqueeze(1).to(lse) - normaliser
    lane = torch.where(counted, lane, -_FORBIDDEN)
    # Keys ask, queries answer: log a_i - lse_i is a lane of the queries.
    asking = torch.cat([k, k.new_ones(*k.shape[:3], 1)], dim=-1)
    asking = asking.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    answering = torch.cat([q, lane.unsqueeze(-1)], dim=-1)
    parts = []
    if span.prefix:
        parts.append(_kernel(asking[:, :, : span.prefix], answering, answering[..., :1], False)[1])
    if span.prefix < k.shape[2]:
        # Key j is asked by queries i >= j: reversed in time, that is the kernel's causal mask.
        rest = asking[:, :, span.prefix :].flip(2)
        turned = answering.flip(2)
        parts.append(_kernel(rest, turned, turned[..., :1], True)[1].flip(2))
    mass = torch.cat(parts, dim=2).exp()
    observed = problem.visibility.observers(query_mass > 0) > 0
    return torch.where(observed.to(mass.device), mass, 0.0).double()


# Arguments and results ----------------------------------------------------------------------


def _names(statistics: Iterable[str]) -> tuple[str, ...]:
    if isinstance(statistics, str):
        raise TypeError(f"statistics must be a list of names, got the string {statistics!r}")
    names = tuple(dict.fromkeys(statistics))
    unknown = [name for name in names if name not in ROW_STATISTICS]
    if unknown:
        raise ValueError(
            f"statistics must be among {', '.join(ROW_STATISTICS)}, got {', '.join(unknown)}"
        )
    return names


def _check_keys(keys: Sequence[int], n_keys: int) -> tuple[int, ...]:
    keys = tuple(int(key) for key in keys)
    outside = [key for key in keys if not 0 <= key < n_keys]
    if outside:
        raise ValueError(f"keys must lie in 0 .. {n_keys - 1}, got {outside}")
    return keys


def _check_recent(recent: int) -> None:
    if isinstance(recent, bool) or int(recent) != recent or recent < 1:
        raise ValueError(f"recent must be a positive number of tokens, got {recent!r}")


def _check_query_mass(query_mass: Tensor | None, problem: Problem) -> Tensor:
    batch, _, n_queries, _ = problem.q.shape
    if query_mass is None:
        return torch.ones(batch, n_queries, dtype=torch.float64, device=problem.q.device)
    query_mass = torch.as_tensor(query_mass).to(problem.q.device).double()
    if query_mass.shape not in ((batch, n_queries), (1, n_queries)):
        raise ValueError(
            f"query_mass must have shape {(batch, n_queries)}, got {tuple(query_mass.shape)}"
        )
    if not bool((torch.isfinite(query_mass) & (query_mass >= 0)).all()):
        raise ValueError("query_mass must be finite and at least 0")
    return query_mass.expand(batch, -1)


def _empty(
    problem: Problem, names: Sequence[str], keys: Sequence[int], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    rows = problem.q.shape[:3]
    return {
        name: problem.q.new_full(
            (*rows, len(keys)) if name == "key_mass" else rows, math.nan, dtype=dtype
        )
        for name in names
    }


def _row_result(
    problem: Problem, found: dict[str, Tensor], keys: tuple[int, ...], recent: int, impl: str
) -> RowStatistics:
    visible = problem.visibility.count().to(problem.q.device)
    empty = visible == 0
    values = {}
    for name in ROW_STATISTICS:
        value = found.get(name)
        if value is not None and impl == "reference":
            value = torch.where(empty if value.ndim == 3 else empty.unsqueeze(-1), math.nan, value)
        values[name] = value
    return RowStatistics(**values, visible=visible, keys=keys, recent=int(recent), impl=impl)


def _incoming_result(problem: Problem, mass: Tensor, query_mass: Tensor, impl: str) -> IncomingMass:
    counted = query_mass > 0
    observers = problem.visibility.observers(None if bool(counted.all()) else counted)
    if impl != "reference":
        mass = mass.to(problem.q.dtype)
    return IncomingMass(mass, observers.to(problem.q.device), impl)
