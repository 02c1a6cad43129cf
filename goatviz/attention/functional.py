"""softmax(scores / tau + log prior) V: a readable definition, and the same through one kernel.

`impl` is used as given: nothing falls back silently. "reference" is the definition, in float64;
"sdpa" is one unmodified call of scaled_dot_product_attention on lanes; "sdpa_bias" gives that
kernel the dense log-prior as its mask, for priors without lanes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from goatviz import checks
from goatviz.priors.base import PositionsLike, Prior, default_positions, readable
from goatviz.priors.fixed import UniformPrior
from goatviz.transport.call import check_query_key
from goatviz.transport.rows import TransportPlan, solve_rows

IMPLEMENTATIONS = ("reference", "sdpa", "sdpa_bias")


def prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prior: Prior | None = None,
    query_pos: PositionsLike | None = None,
    key_pos: PositionsLike | None = None,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "sdpa",
) -> Tensor:
    r"""Attention with a prior: o_i = sum_j p_ij v_j.

    p_i = softmax_j(<q_i, k_j>/(tau sqrt d) + K_ij).

    Parameters
    ----------
    q : Tensor
        Content queries, shape (batch, query heads, n_queries, d).
    k : Tensor
        Content keys, shape (batch, key-value heads, n_keys, d); the number of query heads is a
        multiple of theirs.
    v : Tensor
        Values, shape (batch, key-value heads, n_keys, d_v).
    prior : Prior, optional
        1 head, or one for each key-value head; default uniform.
    query_pos, key_pos : int, sequence or Tensor, optional
        See `as_positions`. Default: keys at 0 .. n_keys - 1, queries at the last of them; see
        `goatviz.priors.base.default_positions`.
    causal : bool
        Forbid keys whose index exceeds the query's.
    padding_mask : Tensor, optional
        Boolean, shape (batch, n_keys), True at real keys.
    temperature : float
        tau > 0; scales the scores, not the prior.
    impl : {"reference", "sdpa", "sdpa_bias"}
        The float64 definition; one fused call on lanes; one call with the dense log-prior as
        its additive mask (which allocates heads x n_queries x n_keys numbers).

    Returns
    -------
    Tensor
        Shape (batch, query heads, n_queries, d_v), in the dtype of `q`.

    Raises
    ------
    ValueError
        For shapes, head counts or an `impl` that do not fit, a prior without lanes under
        impl="sdpa", a query with no allowed key, or (reference) NaN scores.
    TypeError
        If an argument is of the wrong kind or dtype.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). The kernel multiplies by
    1/(tau sqrt d), so lanes carry K divided by that number. In float32 a lane keeps key-only terms
    to 3e-8 of their range over the keys, wherever the positions begin.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> q, k, v = (torch.ones(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    >>> out = prior_attention(q, k, v, prior=ALiBiPrior(1).double(), impl="reference")
    >>> torch.testing.assert_close(out, v)
    """
    prior = UniformPrior() if prior is None else prior
    checks.one_of("impl", impl, IMPLEMENTATIONS)
    _check_call(q, k, prior, causal, temperature)
    _check_value(k, v)
    query_points, key_points = default_positions(
        q.shape[2], k.shape[2], query_pos, key_pos, causal=causal
    )
    return attend(
        q,
        k,
        v,
        prior=prior,
        query_points=query_points,
        key_points=key_points,
        consecutive=query_pos is None and key_pos is None,
        causal=causal,
        padding_mask=padding_mask,
        temperature=temperature,
        impl=impl,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prior: Prior,
    query_points: Tensor,
    key_points: Tensor,
    consecutive: bool,
    causal: bool,
    padding_mask: Tensor | None,
    impl: str,
    temperature: float = 1.0,
) -> Tensor:
    """`prior_attention` of checked arguments; of their values it reads only a padding mask's.

    `consecutive` says that keys are at 0, 1, ... and queries at the last of them, so that the
    kernel's causal flag can replace a mask.
    """
    if impl == "reference":
        plan = _plan(q, k, prior, query_points, key_points, causal, padding_mask, temperature)
        values = _expand_heads(v.double(), q.shape[1], "v", head_dim=1)
        return (plan.weights @ values).to(q.dtype)
    mask, is_causal = _kernel_mask(
        q, k, query_points, key_points, causal, padding_mask, consecutive
    )
    scale = 1.0 / (math.sqrt(q.shape[-1]) * temperature)
    if impl == "sdpa_bias":
        bias = prior._log_prior(*prior._placed(query_points, key_points))
        bias = _expand_heads(bias, q.shape[1], "prior", head_dim=0)
        if is_causal:
            mask = _allowed(query_points, key_points, causal)
        bias = bias.to(q.device).unsqueeze(0)
        if mask is not None:
            bias = bias.masked_fill(~mask.to(q.device), -math.inf)
        # A constant along a row changes nothing; with the top at 0, half precision is finest
        # where the mass is.
        bias = (bias - bias.detach().amax(dim=-1, keepdim=True)).to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    q_full, k_full = _append_lanes(q, k, prior, query_points, key_points, scale)
    value_dim = v.shape[-1]
    width = max(q_full.shape[-1], value_dim)
    if q.dtype in (torch.bfloat16, torch.float16):
        width = -(-width // 8) * 8
    out = F.scaled_dot_product_attention(
        F.pad(q_full, (0, width - q_full.shape[-1])),
        F.pad(k_full, (0, width - k_full.shape[-1])),
        F.pad(v, (0, width - value_dim)),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :value_dim]


def attention_plan(
    q: Tensor,
    k: Tensor,
    *,
    prior: Prior | None = None,
    query_pos: PositionsLike | None = None,
    key_pos: PositionsLike | None = None,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> TransportPlan:
    """The transport plan that `prior_attention` applies to the values, dense and in float64.

    Parameters
    ----------
    q, k, prior, query_pos, key_pos, causal, padding_mask, temperature
        As in `prior_attention`.

    Returns
    -------
    TransportPlan
        Over scores of shape (batch, query heads, n_queries, n_keys).

    Examples
    --------
    >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    >>> attention_plan(q, k).weights[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    prior = UniformPrior() if prior is None else prior
    _check_call(q, k, prior, causal, temperature)
    query_points, key_points = default_positions(
        q.shape[2], k.shape[2], query_pos, key_pos, causal=causal
    )
    return _plan(q, k, prior, query_points, key_points, causal, padding_mask, temperature)


def _plan(
    q: Tensor,
    k: Tensor,
    prior: Prior,
    query_points: Tensor,
    key_points: Tensor,
    causal: bool,
    padding_mask: Tensor | None,
    temperature: float,
) -> TransportPlan:
    keys = _expand_heads(k.double(), q.shape[1], "k", head_dim=1)
    scores = q.double() @ keys.mT / math.sqrt(q.shape[-1])
    log_prior = prior._log_prior(*prior._placed(query_points, key_points)).double().to(q.device)
    log_prior = _expand_heads(log_prior, q.shape[1], "prior", head_dim=0).unsqueeze(0)
    mask = _allowed(query_points, key_points, causal)
    if padding_mask is not None:
        keep = _check_padding(padding_mask, k)
        mask = keep[:, None, None, :] if mask is None else mask.to(q.device) & keep[:, None, None]
    if mask is not None:
        mask = mask.to(q.device).expand_as(scores)
    return solve_rows(
        scores, log_prior=log_prior.expand_as(scores), temperature=temperature, mask=mask
    )


def _append_lanes(
    q: Tensor, k: Tensor, prior: Prior, query_points: Tensor, key_points: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    query_heads, key_heads = q.shape[1], k.shape[1]
    points = prior._placed(query_points, key_points)
    lanes = prior._lanes(*points, q.dtype, scale, centred=True)
    phi = _expand_heads(lanes.query.to(q.device), query_heads, "prior", head_dim=0)
    psi = lanes.key.to(k.device).expand(key_heads, -1, -1)
    return (
        torch.cat([q, phi.expand(q.shape[0], -1, -1, -1)], dim=-1),
        torch.cat([k, psi.expand(k.shape[0], -1, -1, -1)], dim=-1),
    )


def _allowed(query_points: Tensor, key_points: Tensor, causal: bool) -> Tensor | None:
    if not causal:
        return None
    return key_points[:, 0] <= query_points[:, :1]


def _kernel_mask(
    q: Tensor,
    k: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    causal: bool,
    padding_mask: Tensor | None,
    consecutive: bool,
) -> tuple[Tensor | None, bool]:
    """The kernel's boolean mask, or None, and its causal flag."""
    keep = None if padding_mask is None else _check_padding(padding_mask, k)
    if keep is None and not causal:
        return None, False
    if keep is None and consecutive:
        if q.shape[2] == k.shape[2]:
            return None, True
        if q.shape[2] == 1:
            return None, False
    mask = _allowed(query_points, key_points, causal)
    if mask is not None:
        mask = mask.to(q.device)[None, None]
    if keep is not None:
        keep = keep[:, None, None, :].to(q.device)
        mask = keep.expand(-1, -1, q.shape[2], -1) if mask is None else mask & keep
    if readable() and not (keep is None and consecutive):
        _check_rows(mask)
    return mask, False


def _check_rows(mask: Tensor) -> None:
    empty = ~mask.any(dim=-1)
    if bool(empty.any()):
        where = empty.nonzero()[0].tolist()
        raise ValueError(
            f"query {where[-1]} (batch entry {where[0]}) has no allowed key: "
            "padding_mask and causal leave it nothing to attend to"
        )


def _check_call(q: Tensor, k: Tensor, prior: Prior, causal: bool, temperature: float) -> None:
    check_query_key(q, k, prior)
    checks.flag("causal", causal)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _check_value(k: Tensor, v: Tensor) -> None:
    checks.instance("v", v, Tensor, "a Tensor")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have shape {tuple(k.shape[:3])} + (d_v,) like k, got {tuple(v.shape)}"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"v must have the dtype of k, {k.dtype}, got {v.dtype}")


def _check_padding(padding_mask: Tensor, k: Tensor) -> Tensor:
    if padding_mask.dtype != torch.bool:
        raise TypeError(
            f"padding_mask must be boolean (True at real keys), got {padding_mask.dtype}"
        )
    if padding_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"padding_mask must have shape {(k.shape[0], k.shape[2])} (batch, n_keys), "
            f"got {tuple(padding_mask.shape)}"
        )
    return padding_mask.to(k.device)


def _expand_heads(tensor: Tensor, heads: int, name: str, *, head_dim: int) -> Tensor:
    """Repeat heads over the query heads that share them."""
    own = tensor.shape[head_dim]
    if heads % own:
        raise ValueError(f"{name} must have a divisor of {heads} heads, got {own}")
    return tensor if own == heads else tensor.repeat_interleave(heads // own, dim=head_dim)
