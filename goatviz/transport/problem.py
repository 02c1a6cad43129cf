"""The arguments of one attention call, checked: queries, keys, prior and allowed pairs.

What is computed from them lives in `fused` and `blockwise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from goatviz.transport.visibility import Visibility


class LogPrior(Protocol):
    """What is asked of a prior: `goatviz.Prior` has it."""

    num_heads: int
    has_lanes: bool

    def log_prior(self, query_pos, key_pos) -> Tensor: ...

    def factors(self, query_pos, key_pos): ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Checked arguments of one attention call; made by `make_problem`.

    Attributes
    ----------
    q, k : Tensor
        float32 or float64, shapes (batch, query heads, n_queries, d), (batch, kv heads, n_keys, d).
    scale : float
        Of the inner products.
    visibility : Visibility
        The allowed pairs.
    query_pos, key_pos : Tensor
        float64 positions, shape (length, 1 + axes).
    prior, bias, sink, softcap
        As in `row_statistics`.
    """

    q: Tensor
    k: Tensor
    scale: float
    visibility: Visibility
    query_pos: Tensor
    key_pos: Tensor
    prior: LogPrior | None = None
    bias: Tensor | None = None
    sink: Tensor | None = None
    softcap: float | None = None


def make_problem(
    q: Tensor,
    k: Tensor,
    *,
    prior: LogPrior | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    visibility: Visibility | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    query_pos: Tensor | None = None,
    key_pos: Tensor | None = None,
) -> Problem:
    """Check the arguments of `row_statistics`; `visibility` replaces causal, window and mask.

    Returns
    -------
    Problem
        In float32 or float64, on the device of `q`.
    """
    for tensor, name in ((q, "q"), (k, "k")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, d), none of them 0, "
                f"got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, which holds no numbers")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            hint = " (float16 overflows above 65,504)" if tensor.dtype == torch.float16 else ""
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values{hint}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head size, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must share a dtype, got {q.dtype} and {k.dtype}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if prior is not None:
        if not (hasattr(prior, "log_prior") and hasattr(prior, "has_lanes")):
            raise TypeError(f"prior must be a goatviz Prior, got {type(prior).__name__}")
        if prior.num_heads not in (1, kv_heads):
            raise ValueError(
                f"prior must have 1 or {kv_heads} heads (the key-value heads), "
                f"got {prior.num_heads}"
            )
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if sink is not None:
        sink = torch.as_tensor(sink)
        if sink.shape != (heads,) or not bool(torch.isfinite(sink).all()):
            raise ValueError(
                f"sink must hold {heads} finite logits, one for each query head, "
                f"got shape {tuple(sink.shape)}"
            )
        sink = sink.detach().double().to(q.device)
    query_pos, key_pos = _positions(q, k, query_pos, key_pos, causal)
    pairs = (q.shape[0], heads, q.shape[2], k.shape[2])
    if visibility is None:
        if window is not None and (isinstance(window, bool) or int(window) != window or window < 1):
            raise ValueError(f"window must be a positive number of tokens, got {window!r}")
        visibility, bias = _visibility(mask, pairs, query_pos, key_pos, causal, window)
    elif (visibility.n_queries, visibility.n_keys) != pairs[2:]:
        raise ValueError(
            f"visibility must be of {pairs[2]} queries and {pairs[3]} keys, "
            f"got {visibility.n_queries} and {visibility.n_keys}"
        )
    if bias is not None:
        _check_pairs("bias", bias, pairs)
        bias = bias.detach()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return Problem(
        q.detach().to(dtype),
        k.detach().to(dtype),
        scale,
        visibility,
        query_pos,
        key_pos,
        prior,
        bias,
        sink,
        softcap,
    )


def _positions(
    q: Tensor, k: Tensor, query_pos: Tensor | None, key_pos: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    n_queries, n_keys = q.shape[2], k.shape[2]
    points = {}
    for name, given, count in (("query_pos", query_pos, n_queries), ("key_pos", key_pos, n_keys)):
        if given is None:
            continue
        given = torch.as_tensor(given).double().cpu()
        given = given.unsqueeze(-1) if given.ndim == 1 else given
        if given.ndim != 2 or len(given) != count or not bool(torch.isfinite(given[:, 0]).all()):
            raise ValueError(
                f"{name} must hold {count} finite positions, shape (length,) or (length, 1 + axes),"
                f" got {tuple(given.shape)}"
            )
        points[name] = given
    keys = points.get("key_pos")
    if keys is None:
        keys = torch.arange(n_keys, dtype=torch.float64).unsqueeze(-1)
    if "query_pos" in points:
        return points["query_pos"], keys
    if n_queries <= n_keys:
        return keys[n_keys - n_queries :], keys
    if causal or "key_pos" in points:
        raise ValueError(
            f"q has {n_queries} queries and k {n_keys} keys: causal attention needs query_pos"
        )
    return torch.arange(n_queries, dtype=torch.float64).unsqueeze(-1), keys


def _visibility(
    mask: Tensor | None,
    pairs: tuple[int, int, int, int],
    query_pos: Tensor,
    key_pos: Tensor,
    causal: bool,
    window: int | None,
) -> tuple[Visibility, Tensor | None]:
    rules = {"causal": causal, "window": window}
    index = query_pos[:, 0].contiguous(), key_pos[:, 0].contiguous()
    if mask is None:
        return Visibility.from_rules(*index, **rules), None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
    if mask.ndim == 2:
        if mask.dtype != torch.bool:
            raise TypeError(f"a mask of shape (batch, n_keys) must be boolean, got {mask.dtype}")
        if mask.shape != (pairs[0], pairs[3]):
            raise ValueError(
                f"mask must have shape {(pairs[0], pairs[3])} (batch, n_keys) or "
                f"{pairs} (batch, heads, n_queries, n_keys), got {tuple(mask.shape)}"
            )
        return Visibility.from_rules(*index, **rules, padding_mask=mask), None
    _check_pairs("mask", mask, pairs)
    bias = None
    allowed = mask
    if mask.is_floating_point():
        if bool((torch.isnan(mask) | torch.isposinf(mask)).any()):
            raise ValueError("mask must not hold NaN or +inf; -inf forbids a pair")
        allowed, bias = ~torch.isneginf(mask), mask
    elif mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean or floating point, got {mask.dtype}")
    if causal or window is not None:
        own = Visibility.from_rules(*index, **rules)
        own = own.block(slice(None), slice(None)).to(allowed.device)
        allowed = allowed & own
    return Visibility.from_mask(allowed), bias


def _check_pairs(name: str, value: Tensor, pairs: tuple[int, int, int, int]) -> None:
    fits = value.ndim == 4 and value.shape[2:] == pairs[2:]
    if not (fits and value.shape[0] in (1, pairs[0]) and value.shape[1] in (1, pairs[1])):
        raise ValueError(
            f"{name} must have shape {pairs} (batch, heads, n_queries, n_keys; the first two may "
            f"be 1), got {tuple(value.shape)}"
        )
