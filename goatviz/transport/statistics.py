"""Exact statistics of a plan from queries and keys, without the plan: O(length) memory.

Three implementations agree: "reference", dense and in float64, is the definition; "blockwise"
streams over blocks of queries and computes everything; "fused" derives what it can from a flash
kernel's output and log-normaliser. The latter two have modules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goatviz import checks
from goatviz.transport import flash
from goatviz.transport.blockwise import sweep
from goatviz.transport.call import AttentionCall
from goatviz.transport.visibility import entry_of

#: What one fused call yields.
CHEAP_STATISTICS = flash.STATISTICS
#: Everything that can be computed of a row.
ROW_STATISTICS = (
    *CHEAP_STATISTICS,
    "lag_mean",
    "lag_std",
    "largest_weight",
    "content_range",
    "gathered_mass",
)
IMPLEMENTATIONS = ("auto", "blockwise", "fused", "reference")
# Queries and keys from which a CPU's kernel computes the cheap statistics faster than blocks: the
# shortest length of benchmarks/diagnostics.py. Few queries do not repay the copies of all keys.
_FUSED_FROM = 2048
# Beyond this, scores of allowed pairs reach the logits of forbidden ones, or overflow float32.
_LARGEST_SCORE = 1e28

#: Keys of each query, (batch or 1, n_queries, m), or a function of the call that returns them.
Places = Tensor | Callable[[AttentionCall], Tensor]


@dataclass(frozen=True, eq=False)
class RowStatistics:
    r"""Statistics of each query's row p_i of a plan; those not asked for are None.

    Every Tensor has shape (batch, query heads, n_queries) unless said otherwise, in float32
    (float64 for float64 input). Rows of queries without an allowed key are NaN.

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
    gathered_mass : Tensor
        Shape (..., n_queries, m): weight of each query's own keys `at`, 0 where they are
        forbidden, NaN where `at` is -1.
    visible : Tensor of int64
        Keys that the query may use, shape (batch or 1, query heads or 1, n_queries).
    keys : tuple of int
        The chosen keys.
    recent : int
        Size of the recent window in tokens.
    impl : str
        The implementation that was used.
    at : Tensor of int64, optional
        Keys of each query, shape (batch or 1, n_queries, m), -1 for none.
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
    gathered_mass: Tensor | None
    visible: Tensor
    keys: tuple[int, ...]
    recent: int
    impl: str
    at: Tensor | None = None

    def asked(self) -> dict[str, Tensor]:
        """The statistics that were asked for, by name."""
        named = {name: getattr(self, name) for name in ROW_STATISTICS}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, eq=False)
class IncomingMass:
    """Mass that each key receives.

    Attributes
    ----------
    mass : Tensor
        b_j = sum_i a_i p_ij, shape (batch, query heads, n_keys); units of a (default: queries).
    observers : Tensor of int64
        Queries that may use the key, shape (batch or 1, query heads or 1, n_keys).
    impl : str
        The implementation that was used.
    """

    mass: Tensor
    observers: Tensor
    impl: str

    @property
    def importance(self) -> Tensor:
        """Mass divided by the number of observers; NaN for keys without observers."""
        return torch.where(self.observers > 0, self.mass / self.observers.clamp(min=1), math.nan)


def row_statistics(
    q: Tensor,
    k: Tensor,
    *,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    at: Tensor | None = None,
    statistics: Iterable[str] = ROW_STATISTICS,
    impl: str = "auto",
    **call: Any,
) -> RowStatistics:
    r"""Statistics of every row of p_i = softmax_j(scale <q_i, k_j> + K_ij), no L x L array.

    Parameters
    ----------
    q, k : Tensor
        Queries and keys, shapes (batch, query heads, n_queries, d) and (batch, key-value heads,
        n_keys, d).
    keys : sequence of int
        Keys whose weight is returned.
    recent : int
        Size of the recent window in tokens.
    at : Tensor of int64, optional
        Keys of each query whose weight is returned, shape (batch or 1, n_queries, m), -1 for
        none; default the key before the query, m = 1.
    statistics : iterable of str
        Names from `ROW_STATISTICS`; default all.
    impl : {"auto", "blockwise", "fused", "reference"}
        Blocks of queries, which compute everything; flash kernels (only `CHEAP_STATISTICS`, no
        window, dense mask or softcap, a prior with lanes, scores below 16,384; float32 errors
        grow to 1e-6 of the largest expected logit; a CPU, or a CUDA device, and a PyTorch with
        one of the kernels of `goatviz.transport.kernels`); the dense float64 definition. "auto"
        uses kernels for the cheap statistics where they apply and are faster (on CUDA; on a CPU
        from 2,048 queries and keys), else blocks; the result records the choice.
    **call
        The rest of the call: prior, scale, causal, window, mask, bias, sink, softcap, query_pos,
        key_pos, ..., as in `goatviz.transport.call.AttentionCall.from_tensors`.

    Returns
    -------
    RowStatistics
        Equal up to rounding, whatever the implementation.

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
    made = AttentionCall.from_tensors(q, k, **call)
    return statistics_of(made, statistics, keys=keys, recent=recent, at=at, impl=impl)


def incoming_mass(
    q: Tensor,
    k: Tensor,
    *,
    query_mass: Tensor | None = None,
    impl: str = "auto",
    **call: Any,
) -> IncomingMass:
    r"""Mass that each key receives: b_j = sum_i a_i p_ij, no L x L array.

    Parameters
    ----------
    q, k, **call
        As in `row_statistics`.
    query_mass : Tensor, optional
        a_i >= 0, shape (batch or 1, n_queries); default 1, or 0 for padding by `query_mask`.
        Queries of mass 0 do not count as observers.
    impl : {"auto", "blockwise", "fused", "reference"}
        As in `row_statistics`; "auto" uses kernels on CUDA, and blocks on a CPU, where two calls
        of a kernel are slower.

    Returns
    -------
    IncomingMass
        Of the keys alone: an extra column's share is left out.

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
    made = AttentionCall.from_tensors(q, k, **call)
    return incoming_of(made, query_mass=query_mass, impl=impl)


@torch.no_grad()
def statistics_of(
    call: AttentionCall,
    statistics: Iterable[str] = ROW_STATISTICS,
    *,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    at: Places | None = None,
    impl: str = "auto",
) -> RowStatistics:
    """`row_statistics` of an `AttentionCall`; `at` may be a function of the call."""
    asked = _options(call, statistics, keys, recent, at)
    impl = _choose(call, impl, asked.streamed)
    if impl == "reference":
        values, _ = _reference(call, asked, None)
    elif impl == "fused":
        values = flash.rows(call, asked.streamed, asked.keys, asked.recent)
    else:
        values, _ = sweep(call, asked.streamed, keys=asked.keys, recent=asked.recent)
    return _row_result(call, values, asked, impl)


@torch.no_grad()
def incoming_of(
    call: AttentionCall, *, query_mass: Tensor | None = None, impl: str = "auto"
) -> IncomingMass:
    """`incoming_mass` of an `AttentionCall`."""
    query_mass = _query_mass(call, query_mass)
    impl = _choose(call, _without_gain(call, impl), ())
    if impl == "reference":
        _, mass = _reference(call, None, query_mass)
    elif impl == "fused":
        mass = flash.incoming(call, query_mass)
    else:
        _, mass = sweep(call, (), query_mass=query_mass)
    return _incoming_result(call, mass, query_mass, impl)


@torch.no_grad()
def all_of(
    call: AttentionCall,
    statistics: Iterable[str] = ROW_STATISTICS,
    *,
    keys: Sequence[int] = (0,),
    recent: int = 128,
    at: Places | None = None,
    impl: str = "auto",
) -> tuple[RowStatistics, IncomingMass]:
    """Row statistics and incoming mass together: one pass over the blocks yields both."""
    impl = _without_gain(call, impl)
    if impl != "blockwise":
        rows = statistics_of(call, statistics, keys=keys, recent=recent, at=at, impl=impl)
        return rows, incoming_of(call, impl=impl)
    asked = _options(call, statistics, keys, recent, at)
    query_mass = _query_mass(call, None)
    options = {"keys": asked.keys, "recent": asked.recent, "query_mass": query_mass}
    values, mass = sweep(call, asked.streamed, **options)
    return (
        _row_result(call, values, asked, impl),
        _incoming_result(call, mass, query_mass, impl),
    )


def previous_keys(call: AttentionCall) -> Tensor:
    """The key one token before each query, shape (1, n_queries, 1); -1 where there is none."""
    wanted, index = call.query_pos[:, 0] - 1, call.key_pos[:, 0]
    order = torch.argsort(index, stable=True)
    place = torch.searchsorted(index[order], wanted.contiguous()).clamp(max=len(index) - 1)
    key = order[place]
    return torch.where(index[key] == wanted, key, -1)[None, :, None]


def _reference(
    call: AttentionCall, asked: _Asked | None, query_mass: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The definition: every statistic from the dense float64 plan, head by head."""
    asked = _Asked((), (), 1, None) if asked is None else asked
    names, keys, recent = asked.names, asked.keys, asked.recent
    batch, heads, _, n_keys = call.shape
    rows = {"dtype": torch.float64, "device": call.device}
    at = asked.at
    width = {"key_mass": (len(keys),), "gathered_mass": () if at is None else at.shape[2:]}
    fields = {name: torch.empty(*call.shape[:3], *width.get(name, ()), **rows) for name in names}
    mass = torch.zeros(batch, heads, n_keys, **rows)
    distance = (call.query_pos[:, :1] - call.key_pos[:, 0]).to(call.device)
    for b in range(batch):
        for h in range(heads):
            plan, logits = call.solve(b, h), call.logits(b, h).logits
            if call.sink is not None:
                logits = torch.cat([logits, call.sink_logits(b, h).unsqueeze(-1)], dim=-1)
            real, allowed = plan.weights[:, :n_keys], plan.allowed[:, :n_keys]
            scores, share = plan.scores[:, :n_keys], real.sum(-1)
            mean = (real * distance).sum(-1) / share
            log_prior = plan.log_prior.masked_fill(~plan.allowed, 0.0)
            own = real[:, :0] if at is None else _own(real, entry_of(at, b))
            values = {
                "log_normaliser": torch.logsumexp(logits, -1),
                "entropy": plan.entropy,
                "expected_score": (plan.weights * plan.scores).sum(-1),
                "expected_log_prior": (plan.weights * log_prior).sum(-1),
                "kl_to_prior": plan.kl_to_prior,
                "key_mass": real[:, list(keys)],
                "recent_mass": (real * (distance.abs() < recent)).sum(-1),
                "sink_mass": plan.weights[:, n_keys:].sum(-1),
                "lag_mean": mean,
                "lag_std": ((real * (distance - mean.unsqueeze(-1)) ** 2).sum(-1) / share).sqrt(),
                "largest_weight": real.amax(-1),
                "content_range": scores.masked_fill(~allowed, -math.inf).amax(-1)
                - scores.masked_fill(~allowed, math.inf).amin(-1),
                "gathered_mass": own,
            }
            for name in names:
                fields[name][b, h] = values[name]
            if query_mass is not None:
                seen = call.has_keys(b, h).to(call.device)
                mass[b, h] = (query_mass[b] * seen) @ real
    return fields, mass


def _own(weights: Tensor, at: Tensor) -> Tensor:
    """Weights of each row's own keys, NaN where the key is -1."""
    at = at.to(weights.device)
    return weights.gather(-1, at.clamp(min=0)).masked_fill(at < 0, math.nan)


def _without_gain(call: AttentionCall, impl: str) -> str:
    """Let "auto" mean blocks on a CPU, where kernels compute incoming mass no faster."""
    return "blockwise" if impl == "auto" and call.device.type == "cpu" else impl


def _choose(call: AttentionCall, impl: str, names: Sequence[str]) -> str:
    """The implementation that computes these statistics (or, without names, incoming mass)."""
    checks.one_of("impl", impl, IMPLEMENTATIONS)
    if impl == "reference":
        return impl
    if call.largest_score > _LARGEST_SCORE:
        raise ValueError(
            f"q and k must have scores below {_LARGEST_SCORE:.0e}, got up to "
            f"{call.largest_score:.1e} (by their norms); impl='reference' holds them in float64"
        )
    if impl == "blockwise":
        return impl
    if impl == "auto" and call.device.type == "cpu" and min(call.shape[2:]) < _FUSED_FROM:
        return "blockwise"
    hindrance = flash.hindrance(call, names)
    if hindrance is None:
        return "fused"
    if impl == "fused":
        raise ValueError(f"impl='fused' cannot do {hindrance}; use impl='blockwise'")
    return "blockwise"


class _Asked(NamedTuple):
    """Checked options of a request for row statistics."""

    names: tuple[str, ...]
    keys: tuple[int, ...]
    recent: int
    at: Tensor | None

    @property
    def streamed(self) -> tuple[str, ...]:
        """Statistics that a pass over the keys computes: the rest follow from the normaliser."""
        if self.at is None:
            return self.names
        others = [name for name in self.names if name != "gathered_mass"]
        return tuple(dict.fromkeys([*others, "log_normaliser"]))


def _options(
    call: AttentionCall,
    statistics: Iterable[str],
    keys: Sequence[int],
    recent: int,
    at: Places | None,
) -> _Asked:
    names = checks.some_of("statistics", statistics, ROW_STATISTICS)
    keys = checks.places("keys", keys, call.shape[3])
    recent = checks.positive_int("recent", recent)
    if "gathered_mass" not in names:
        return _Asked(names, keys, recent, None)
    at = previous_keys if at is None else at
    return _Asked(names, keys, recent, call.check_places(at(call) if callable(at) else at, "at"))


def _query_mass(call: AttentionCall, query_mass: Tensor | None) -> Tensor:
    batch, _, n_queries, _ = call.shape
    if query_mass is None:
        query_mass = torch.ones(1, n_queries) if call.query_mask is None else call.query_mask
    query_mass = torch.as_tensor(query_mass).to(call.device).double()
    if query_mass.shape not in ((batch, n_queries), (1, n_queries)):
        raise ValueError(
            f"query_mass must have shape {(batch, n_queries)}, got {tuple(query_mass.shape)}"
        )
    if not bool((torch.isfinite(query_mass) & (query_mass >= 0)).all()):
        raise ValueError("query_mass must be finite and at least 0, got other values")
    return query_mass.expand(batch, -1)


def _row_result(
    call: AttentionCall, values: dict[str, Tensor], asked: _Asked, impl: str
) -> RowStatistics:
    if asked.at is not None and impl != "reference":
        own = call.weights_at(asked.at, values["log_normaliser"], lanes=True)
        values["gathered_mass"] = own.to(values["log_normaliser"].dtype)
        values = {name: values[name] for name in asked.names}
    visible = call.visibility.count().to(call.device)
    empty = visible == 0
    for name, value in values.items():
        values[name] = value.masked_fill(empty if value.ndim == 3 else empty[..., None], math.nan)
    missing = dict.fromkeys(name for name in ROW_STATISTICS if name not in values)
    options = {"keys": asked.keys, "recent": asked.recent, "at": asked.at, "impl": impl}
    return RowStatistics(**values, **missing, **options, visible=visible)


def _incoming_result(
    call: AttentionCall, mass: Tensor, query_mass: Tensor, impl: str
) -> IncomingMass:
    counted = query_mass > 0
    observers = call.visibility.observers(None if bool(counted.all()) else counted)
    if impl != "reference":
        mass = mass.to(call.dtype)
    return IncomingMass(mass, observers.to(call.device), impl)
