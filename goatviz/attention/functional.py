"""softmax(scores / tau + log prior) V: a readable definition, and the same through one kernel.

`impl` is used as given: nothing falls back silently. "reference" is the definition, in float64;
"sdpa" is one unmodified call of scaled_dot_product_attention on lanes. `backends` has them all.
"""

from __future__ import annotations

import math

from torch import Tensor

from goatviz import checks
from goatviz.attention.backends import IMPLEMENTATIONS, attend, solve
from goatviz.attention.inputs import AttentionInputs
from goatviz.priors.base import PositionsLike, Prior, default_positions
from goatviz.priors.fixed import UniformPrior
from goatviz.transport.call import check_query_key
from goatviz.transport.rows import TransportPlan


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
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "sdpa",
) -> Tensor:
    r"""Attention with a prior: o_i = sum_j p_ij v_j.

    p_i = softmax_j(softcap(<q_i, k_j>/(tau sqrt d)) + K_ij).

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
    window : int, optional
        Allow only keys less than so many tokens from the query, in index: 1 is the query's own
        position. The SDPA backends then take a dense mask.
    softcap : float, optional
        c > 0 of c tanh(x / c), applied to the scaled scores before the prior is added; served by
        "reference" and "flex", and by "flash" for slopes or no prior.
    impl : str
        "reference": the float64 definition. "sdpa": one fused call on lanes, or the row of K
        itself for a single query of float32; "sdpa_flash", "sdpa_efficient", "sdpa_cudnn" and
        "sdpa_math" name PyTorch's kernel. "sdpa_bias": one call with the dense log-prior as mask
        (heads x n_queries x n_keys numbers). "flex": compiled FlexAttention on tables of the prior,
        without gradients on a CPU. "flash": flash-attn 2, on a GPU in half precision. See
        `goatviz.attention.BACKENDS`.

    Returns
    -------
    Tensor
        Shape (batch, query heads, n_queries, d_v), in the dtype of `q`.

    Raises
    ------
    ValueError
        For shapes, head counts or an `impl` that do not fit, what the backend does not serve (a
        prior without lanes under "sdpa", gradients under "flex" on a CPU), a query with no
        allowed key, or (reference) NaN scores.
    ImportError
        If `impl` is "flash" and flash-attn is not installed.
    TypeError
        If an argument is of the wrong kind or dtype.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). The kernel multiplies by
    1/(tau sqrt d), so lanes carry K divided by that number. In float32 a lane keeps key-only terms
    to 3e-8 of their range over the keys, wherever the positions begin. With lanes, heads are padded
    to a multiple of 8 channels. On a CPU, ``torch.set_flush_denormal(True)`` before any other work
    spares it weights below 1e-38, on which some processors are slow. flash-attn 4 serves
    "sdpa_flash" after ``torch.nn.attention.activate_flash_attention_impl("FA4")``.

    Examples
    --------
    >>> import torch
    >>> from goatviz.priors import ALiBiPrior
    >>> q, k, v = (torch.ones(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    >>> out = prior_attention(q, k, v, prior=ALiBiPrior(1).double(), impl="reference")
    >>> torch.testing.assert_close(out, v)
    """
    checks.one_of("impl", impl, IMPLEMENTATIONS)
    inputs = _inputs(
        q,
        k,
        v,
        prior=prior,
        query_pos=query_pos,
        key_pos=key_pos,
        causal=causal,
        padding_mask=padding_mask,
        temperature=temperature,
        window=window,
        softcap=softcap,
    )
    return attend(inputs, impl)


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
    window: int | None = None,
    softcap: float | None = None,
) -> TransportPlan:
    """The transport plan that `prior_attention` applies to the values, dense and in float64.

    Parameters
    ----------
    q, k, prior, query_pos, key_pos, causal, padding_mask, temperature, window, softcap
        As in `prior_attention`.

    Returns
    -------
    TransportPlan
        Over scores of shape (batch, query heads, n_queries, n_keys).

    Examples
    --------
    >>> import torch
    >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    >>> attention_plan(q, k).weights[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    inputs = _inputs(
        q,
        k,
        None,
        prior=prior,
        query_pos=query_pos,
        key_pos=key_pos,
        causal=causal,
        padding_mask=padding_mask,
        temperature=temperature,
        window=window,
        softcap=softcap,
    )
    return solve(inputs)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    prior: Prior | None,
    query_pos: PositionsLike | None,
    key_pos: PositionsLike | None,
    causal: bool,
    padding_mask: Tensor | None,
    temperature: float,
    window: int | None,
    softcap: float | None,
) -> AttentionInputs:
    """The arguments, checked; without values (a plan needs none) the keys stand in for them."""
    prior = UniformPrior() if prior is None else prior
    _check_call(q, k, prior, causal, temperature)
    if v is None:
        v = k
    else:
        _check_value(k, v)
    if window is not None:
        checks.positive_int("window", window)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, above=0)
    query_points, key_points = default_positions(
        q.shape[2], k.shape[2], query_pos, key_pos, causal=causal
    )
    return AttentionInputs(
        q,
        k,
        v,
        prior=prior,
        query_points=query_points,
        key_points=key_points,
        consecutive=query_pos is None and key_pos is None and q.shape[2] <= k.shape[2],
        causal=causal,
        padding_mask=padding_mask,
        temperature=temperature,
        window=window,
        softcap=softcap,
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
