"""Statistics from a flash kernel: from the output of one call and its log-normaliser.

A prior's lanes are appended to queries and keys, so that their inner product is the whole logit.
Keys passed as values give the expectations; exchanging queries and keys gives the incoming mass.
`hindrance` names what stands in the way, the lack of a kernel included (`kernels` has them). The
public functions and the definition live in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from goatviz.transport import kernels
from goatviz.transport.blockwise import EXPECTATIONS, PRIOR_EXPECTATIONS, sweep
from goatviz.transport.call import AttentionCall
from goatviz.transport.convolution import prior_normaliser
from goatviz.transport.visibility import Visibility

#: What one fused call yields.
STATISTICS = (
    "log_normaliser",
    "entropy",
    "expected_score",
    "expected_log_prior",
    "kl_to_prior",
    "key_mass",
    "recent_mass",
    "sink_mass",
)
# A forbidden key's lane: far below any logit, far above -inf (0 * inf is NaN).
_FORBIDDEN = 1e5
# Scores beyond this come near that lane, and float32 keeps fewer than two of their decimals.
_LARGEST_SCORE = 2.0**14
# Largest prior in a lane, nats, for which float32 sums over all keys are good to 1e-5.
_LARGEST_LANE = 8.0


class _Span(NamedTuple):
    """Keys of a fused call: the first `prefix` are open to all queries, the rest are causal."""

    prefix: int
    causal: bool


def hindrance(call: AttentionCall, names: Sequence[str]) -> str | None:
    """What keeps a flash kernel from the named statistics of a call, in words; None if nothing."""
    expensive = [name for name in names if name not in STATISTICS]
    if expensive:
        return ", ".join(expensive)
    kernel = kernels.kernel_for(call.device.type)
    if isinstance(kernel, str):
        return kernel
    span = _span(call)
    if isinstance(span, str):
        return span
    if call.device.type != "cpu" and call.dtype == torch.float64:
        return "float64 on an accelerator"
    if call.largest_score > _LARGEST_SCORE:
        return f"scores of up to {call.largest_score:.1e} (by the norms of q and k)"
    if call.prior is not None and call.dtype != torch.float64:
        largest = float(_centred_lanes(call)[1].abs().max())
        if largest > _LARGEST_LANE:
            return f"a prior of {largest:.0f} nats, which float32 logits cannot resolve"
    return None


def rows(
    call: AttentionCall, names: Sequence[str], keys: Sequence[int], recent: int
) -> dict[str, Tensor]:
    """Named row statistics from `STATISTICS`; undefined for queries without keys."""
    q, k = _widened(call)
    expected = EXPECTATIONS & set(names)
    out, lse = _attend(q, k, k if expected else k[..., :1], _span(call))
    gauge = _gauge(call)
    normaliser, sink = _with_sink(call, lse, gauge)
    full = normaliser if gauge is None else normaliser + gauge
    values = {"log_normaliser": full}
    if expected:
        content = call.k.shape[-1]
        share = torch.exp(lse - normaliser)
        score = share * torch.linalg.vecdot(q[..., :content], out[..., :content])
        prior = torch.zeros_like(score)
        if call.prior is not None:
            lanes = slice(content, content + _prior_lanes(call))
            prior = share * torch.linalg.vecdot(q[..., lanes], out[..., lanes])
        if sink is not None:
            prior = prior + sink * torch.exp(sink - normaliser)
        values |= {"expected_score": score, "entropy": normaliser - score - prior}
        if PRIOR_EXPECTATIONS & set(names):
            partition = _partition(call, q, k, gauge)
            if sink is not None:
                partition = torch.logaddexp(partition, sink)
            values["expected_log_prior"] = prior - partition
            values["kl_to_prior"] = score - normaliser + partition
    if "key_mass" in names:
        values["key_mass"] = _key_mass(call, q, k, normaliser, keys)
    if "sink_mass" in names:
        values["sink_mass"] = (
            torch.zeros_like(lse) if sink is None else torch.exp(sink - normaliser)
        )
    if "recent_mass" in names:
        near, _ = sweep(_near(call, recent), ("log_normaliser",))
        values["recent_mass"] = torch.exp(near["log_normaliser"] - full).nan_to_num(nan=0.0)
    return {name: values[name] for name in names}


def incoming(call: AttentionCall, query_mass: Tensor) -> Tensor:
    """Mass that each key receives, float64, shape (batch, query heads, n_keys)."""
    span = _span(call)
    q, k = _widened(call)
    _, lse = _attend(q, k, k[..., :1], span)
    normaliser, _ = _with_sink(call, lse, _gauge(call))
    counted = (query_mass > 0).unsqueeze(1) & (call.visibility.count() > 0).to(lse.device)
    lane = query_mass.log().unsqueeze(1).to(lse) - normaliser
    lane = torch.where(counted, lane, -_FORBIDDEN)
    # Keys and queries change places; log a_i - lse_i is one more lane of the queries.
    asking = torch.cat([k, k.new_ones(*k.shape[:3], 1)], dim=-1)
    asking = asking.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    answering = torch.cat([q, lane.unsqueeze(-1)], dim=-1)
    parts = []
    if span.prefix:
        parts.append(_kernel(asking[:, :, : span.prefix], answering, answering[..., :1], False)[1])
    if span.prefix < k.shape[2]:
        # Key j is used by queries i >= j: reversed in time, that is the kernel's causal mask.
        rest = asking[:, :, span.prefix :].flip(2)
        turned = answering.flip(2)
        parts.append(_kernel(rest, turned, turned[..., :1], True)[1].flip(2))
    mass = torch.cat(parts, dim=2).exp()
    observed = call.visibility.observers(query_mass > 0) > 0
    return torch.where(observed.to(mass.device), mass, 0.0).double()


def _span(call: AttentionCall) -> _Span | str:
    """How the kernel's causal flag can express the call's mask, or what stands in the way."""
    visible = call.visibility
    if visible.dense is not None:
        return "a dense mask"
    if call.softcap is not None:
        return "a softcap"
    if call.bias is not None:
        return "an additive mask"
    if call.prior is not None and not call.prior.has_lanes:
        return "a prior without lanes"
    n_queries, n_keys = visible.n_queries, visible.n_keys
    index = torch.arange(n_queries)
    open_to_all = causal = True
    for b in range(visible.batch):
        chosen, start, stop = visible.entry(b)
        if len(chosen) > 1 and bool((chosen[1:] < chosen[:-1]).any()):
            return "keys out of order"
        if bool(start.any()):
            return "a window"
        open_to_all &= bool((stop == len(chosen)).all())
        # Among the keys that exist, the kernel's flag forbids the same pairs.
        before = torch.searchsorted(chosen, index + (n_keys - n_queries), right=True)
        causal &= bool((stop == before).all())
    if open_to_all:
        return _Span(n_keys, False)
    if causal and n_queries <= n_keys:
        return _Span(n_keys - n_queries, True)
    return "a mask that is neither causal nor open to all queries"


def _centred_lanes(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query lanes, key bias centred on 0 (row constants cancel) and key lanes, in float64."""
    factors = call.prior.factors(call.query_pos, call.key_pos)
    bias = factors.key_bias.double()
    middle = (bias.amax(-1, keepdim=True) + bias.amin(-1, keepdim=True)) / 2
    return factors.query.double(), bias - middle, factors.key.double()


def _padding_lane(call: AttentionCall) -> Tensor | None:
    """-1e5 at keys that no query may use, shape (batch, 1, n_keys, 1); None without such keys."""
    visible = call.visibility
    if all(len(visible.entry(b)[0]) == visible.n_keys for b in range(visible.batch)):
        return None
    lane = torch.full((visible.batch, 1, visible.n_keys, 1), -_FORBIDDEN)
    for b in range(visible.batch):
        lane[b, 0, visible.entry(b)[0]] = 0.0
    return lane.to(call.device, call.dtype).expand(call.shape[0], -1, -1, -1)


def _widened(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Queries (scaled) and keys with the prior's lanes appended: <q, k> is the whole logit."""
    q, k = call.q.to(call.dtype) * call.scale, call.k.to(call.dtype)
    query_parts, key_parts = [q], [k]
    batch, heads = q.shape[:2]
    if call.prior is not None:
        query, bias, key = (x.to(q) for x in _centred_lanes(call))
        query = query.repeat_interleave(heads // len(query), dim=0)
        query_parts.append(query.expand(batch, -1, -1, -1))
        query_parts.append(q.new_ones(*q.shape[:3], 1))
        key = torch.cat([key, bias.unsqueeze(-1)], dim=-1)
        key_parts.append(key.expand(batch, k.shape[1], -1, -1))
    padding = _padding_lane(call)
    if padding is not None:
        query_parts.append(q.new_ones(*q.shape[:3], 1))
        key_parts.append(padding.expand(-1, k.shape[1], -1, -1))
    return torch.cat(query_parts, dim=-1), torch.cat(key_parts, dim=-1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(<q, k>) v and its log-normaliser from the device's kernel, for equal head counts."""
    return kernels.kernel_for(q.device.type).attend(q, k, v, causal)


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


def _with_sink(
    call: AttentionCall, lse: Tensor, gauge: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The log-normaliser with the extra column, and that column's logit, in the kernel's gauge."""
    if call.sink is None:
        return lse, None
    sink = torch.stack([call.sink_logits(b) for b in range(len(lse))]).to(lse)
    if gauge is not None:
        sink = sink - gauge
    return torch.logaddexp(lse, sink), sink


def _gauge(call: AttentionCall) -> Tensor | None:
    """Nats that bring fused logits into the gauge of `log_prior`, (query heads, n_queries)."""
    if call.prior is None:
        return None
    query, bias, key = _centred_lanes(call)
    exact = call.prior.log_prior(call.query_pos, call.key_pos[:1]).double()
    ours = query @ key[:, :1].mT + bias[:, None, :1]
    gauge = (exact - ours).squeeze(-1).to(call.device, call.dtype)
    return gauge.repeat_interleave(call.shape[1] // len(gauge), dim=0)


def _key_mass(
    call: AttentionCall, q: Tensor, k: Tensor, normaliser: Tensor, keys: Sequence[int]
) -> Tensor:
    """Weight of the chosen keys, shape (batch, heads, n_queries, len(keys))."""
    chosen = k[:, :, list(keys)].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mass = torch.exp(q @ chosen.mT - normaliser.unsqueeze(-1))
    for at, key in enumerate(keys):
        for b in range(q.shape[0]):
            allowed = call.visibility.block(slice(None), slice(key, key + 1), batch=b).squeeze(-1)
            mass[b, :, :, at].masked_fill_(~allowed.to(mass.device), 0.0)
    return mass


def _prior_lanes(call: AttentionCall) -> int:
    return call.prior.factors(call.query_pos[:1], call.key_pos[:1]).query.shape[-1] + 1


def _partition(call: AttentionCall, q: Tensor, k: Tensor, gauge: Tensor | None) -> Tensor:
    """The prior's own log-normaliser in the kernel's gauge, (batch, heads, n_queries)."""
    if call.prior is None:
        count = call.visibility.count().to(q)
        return count.log().expand(q.shape[0], q.shape[1], -1)
    if q.device.type == "cpu":
        # A convolution, where it is one, costs less than one more call of the kernel.
        found = [prior_normaliser(call, b) for b in range(call.visibility.batch)]
        if all(each is not None for each in found):
            exact = math.log(2.0) * torch.stack(found)
            exact = exact.repeat_interleave(q.shape[1] // call.prior.num_heads, dim=1)
            return (exact - gauge.double()).to(q.dtype).expand(q.shape[0], -1, -1)
    span, content = _span(call), call.k.shape[-1]
    heads = call.prior.num_heads
    group = q.shape[1] // heads
    shared = _padding_lane(call) is None
    batch = slice(0, 1) if shared else slice(None)
    kv = k[batch, :: k.shape[1] // heads, :, content:]
    if _prior_lanes(call) == 1 and not span.prefix and shared:
        # Key-only terms under a causal mask: one running sum.
        partition = torch.logcumsumexp(kv[..., 0].double(), dim=-1).to(q.dtype)
    else:
        _, partition = _attend(q[batch, ::group, :, content:], kv, kv[..., :1], span)
    return partition.repeat_interleave(group, dim=1).expand(q.shape[0], -1, -1)


def _near(call: AttentionCall, recent: int) -> AttentionCall:
    """The same call on the recent keys alone, without the extra column."""
    visible = call.visibility
    index = call.query_pos[:, 0].contiguous()
    keys, starts, stops = [], [], []
    for b in range(visible.batch):
        chosen, start, stop = visible.entry(b)
        at = call.key_pos[chosen, 0].contiguous()
        first = torch.searchsorted(at, index - recent, right=True)
        last = torch.searchsorted(at, index + recent)
        first, last = torch.maximum(start, first), torch.minimum(stop, last)
        keys.append(chosen)
        starts.append(first)
        stops.append(torch.maximum(first, last))
    near = Visibility(
        visible.n_queries, visible.n_keys, tuple(keys), torch.stack(starts), torch.stack(stops)
    )
    return replace(call, visibility=near, sink=None)
