"""The kernels that can compute attention with a prior, each with what it serves and what not.

A backend is chosen by name, and refuses what it cannot serve: nothing falls back silently.
`BACKENDS` lists them; `Backend.hindrance` says why one cannot run on this machine.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from goatviz.attention import flex
from goatviz.attention.inputs import AttentionInputs
from goatviz.priors.base import Prior
from goatviz.priors.fixed import LinearPrior, UniformPrior
from goatviz.transport.rows import TransportPlan, solve_rows

_HALF = (torch.bfloat16, torch.float16)
#: Kernels work on widths that are multiples of this; on a CPU, too, they are slower on others.
_WIDTH = 8
#: Largest head that flash-attn takes.
_LARGEST_HEAD = 256


def _everywhere() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute attention with a prior.

    Attributes
    ----------
    name : str
        Its name as an `impl`.
    summary : str
        What it is and what it serves, in one line.
    compute : callable
        From `AttentionInputs` to the output, shape (batch, query heads, n_queries, d_v); raises
        a ValueError for inputs that it does not serve.
    hindrance : callable
        Returns why it cannot run on this machine, or None.
    needs_lanes : bool
        Whether every prior but the uniform one must have lanes.
    """

    name: str
    summary: str
    compute: Callable[[AttentionInputs], Tensor]
    hindrance: Callable[[], str | None] = _everywhere
    needs_lanes: bool = False


def attend(inputs: AttentionInputs, impl: str) -> Tensor:
    """softmax(softcap(scale q k^T) + K) v by the backend of that name."""
    return BACKENDS[impl].compute(inputs)


def solve(inputs: AttentionInputs) -> TransportPlan:
    """The plan itself, dense and in float64: the definition."""
    q, k = inputs.q, inputs.k
    keys = inputs.to_query_heads(k.double(), "k", head_dim=1)
    scores = q.double() @ keys.mT / math.sqrt(q.shape[-1])
    temperature = inputs.temperature
    if inputs.softcap is not None:
        scores = _capped(scores / temperature, inputs.softcap)
        temperature = 1.0
    log_prior = inputs.dense_log_prior().double()
    mask = inputs.mask()
    return solve_rows(
        scores,
        log_prior=log_prior.expand_as(scores),
        temperature=temperature,
        mask=None if mask is None else mask.to(q.device).expand_as(scores),
    )


def _reference(inputs: AttentionInputs) -> Tensor:
    values = inputs.to_query_heads(inputs.v.double(), "v", head_dim=1)
    return (solve(inputs).weights @ values).to(inputs.q.dtype)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


# --- scaled_dot_product_attention ---


def _sdpa(inputs: AttentionInputs) -> Tensor:
    """Lanes and one call; a single query needs no lanes, for its row of K is at hand."""
    _refuse_softcap(inputs, "sdpa")
    if isinstance(inputs.prior, UniformPrior):
        mask, is_causal = inputs.kernel_mask()
        return _call_sdpa(inputs, inputs.q, inputs.k, inputs.v, mask, is_causal)
    inputs.prior._check_lanes()
    if inputs.q.shape[2] == 1 and inputs.q.dtype not in _HALF:
        alike = inputs.k.shape[-1] == inputs.v.shape[-1]
        return _sdpa_bias(inputs) if alike else _one_query(inputs)
    mask, is_causal = inputs.kernel_mask()
    return _call_sdpa(inputs, *widened(inputs), mask, is_causal)[..., : inputs.v.shape[-1]]


def _one_query(inputs: AttentionInputs) -> Tensor:
    """One row as plain products: where keys and values differ in width, PyTorch has no fused kernel
    on a CPU, and its general one scales and copies all keys."""
    q, k, v = inputs.q, inputs.k, inputs.v
    heads, groups = q.shape[1], (k.shape[1], q.shape[1] // k.shape[1])
    bias = _bias(inputs)
    bias = bias.expand(*bias.shape[:-3], heads, 1, -1).unflatten(-3, groups).squeeze(-2)
    scores = (inputs.scale * q).view(-1, *groups, q.shape[-1]) @ k.mT + bias
    return (scores.softmax(dim=-1) @ v).view(*q.shape[:3], v.shape[-1])


def _sdpa_bias(inputs: AttentionInputs) -> Tensor:
    """The dense log-prior as the kernel's additive mask."""
    _refuse_softcap(inputs, "sdpa_bias")
    return _call_sdpa(inputs, inputs.q, inputs.k, inputs.v, _bias(inputs), False)


def _bias(inputs: AttentionInputs) -> Tensor:
    """The dense log-prior with -inf where forbidden, in the queries' dtype.

    A constant along a row changes nothing; with the top at 0, half precision is finest where the
    mass is.
    """
    bias, mask = inputs.dense_log_prior(), inputs.mask()
    if mask is not None:
        bias = bias.masked_fill(~mask.to(inputs.q.device), -math.inf)
    return (bias - bias.detach().amax(dim=-1, keepdim=True)).to(inputs.q.dtype)


def _call_sdpa(
    inputs: AttentionInputs, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    value_dim = v.shape[-1]
    if value_dim != q.shape[-1] and q.shape[2] > 1:
        # Fused kernels want one width; the general one, which takes several, forms the plan, which
        # for a single query is one row.
        width = max(q.shape[-1], value_dim)
        q, k, v = (_padded(each, width) for each in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=inputs.scale,
        enable_gqa=inputs.is_grouped,
    )
    return out[..., :value_dim]


def _sdpa_by(kernel: SDPBackend, name: str) -> Callable[[AttentionInputs], Tensor]:
    """`_sdpa` by one kernel of PyTorch and no other."""

    def compute(inputs: AttentionInputs) -> Tensor:
        try:
            with sdpa_kernel(kernel):
                return _sdpa(inputs)
        except RuntimeError as error:
            if "kernel" not in str(error):
                raise
            raise ValueError(
                f"impl={name!r} does not serve this call: PyTorch has no such kernel for "
                f"{inputs.q.dtype} on {inputs.q.device.type} with heads of {inputs.q.shape[-1]}, "
                "this mask and this prior's lanes"
            ) from error

    return compute


def widened(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with the prior's lanes behind them, and values, all of one width.

    The widths are padded with zeros to a multiple of 8. scale <q, k> is the whole logit.
    """
    q, k, v, lanes = inputs.q, inputs.k, inputs.v, inputs.lanes()
    phi = inputs.to_query_heads(lanes.query.to(q.device), "prior", head_dim=0)
    psi = lanes.key.to(k.device).expand(k.shape[1], -1, -1)
    width = max(q.shape[-1] + phi.shape[-1], v.shape[-1])
    width = -(-width // _WIDTH) * _WIDTH
    return _joined(q, phi, width), _joined(k, psi, width), _padded(v, width)


def _joined(content: Tensor, lanes: Tensor, width: int) -> Tensor:
    parts = [content, lanes.expand(content.shape[0], -1, -1, -1)]
    spare = width - content.shape[-1] - lanes.shape[-1]
    if spare:
        parts.append(content.new_zeros(()).expand(*content.shape[:3], spare))
    return torch.cat(parts, dim=-1)


def _padded(tensor: Tensor, width: int) -> Tensor:
    spare = width - tensor.shape[-1]
    return F.pad(tensor, (0, spare)) if spare else tensor


def _refuse_softcap(inputs: AttentionInputs, name: str) -> None:
    if inputs.softcap is not None:
        raise ValueError(
            f"impl={name!r} has no softcap, got softcap={inputs.softcap:g}; use impl='flex', "
            "'reference', or 'flash' with slopes"
        )


# --- flash-attn ---


def _flash_hindrance() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'goatviz[flash]', or flash-attn-4)"
    return _no_gpu()


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no NVIDIA GPU"


def _flash(inputs: AttentionInputs) -> Tensor:
    """flash-attn on lanes, or with its own slopes where they are the whole prior."""
    _check_flash(inputs)
    function, generation = _flash_attn()
    slopes = _alibi_slopes(inputs) if generation == 2 else None
    if slopes is None and not isinstance(inputs.prior, UniformPrior):
        if inputs.softcap is not None:
            raise ValueError(
                "impl='flash' caps a prior's lanes along with the scores: with "
                f"softcap={inputs.softcap:g} it serves the uniform prior and, by flash-attn 2, "
                "ALiBi's slopes"
            )
        inputs.prior._check_lanes()
        q, k, v = widened(inputs)
    else:
        width = -(-max(inputs.q.shape[-1], inputs.v.shape[-1]) // _WIDTH) * _WIDTH
        q, k, v = (_padded(each, width) for each in (inputs.q, inputs.k, inputs.v))
    if q.shape[-1] > _LARGEST_HEAD:
        raise ValueError(
            f"impl='flash' takes heads of up to {_LARGEST_HEAD} channels, got {q.shape[-1]} "
            "with the prior's lanes"
        )
    out = _call_flash(function, inputs, q, k, v, slopes=slopes)
    return out[..., : inputs.v.shape[-1]]


def _flash_attn() -> tuple[Callable[..., Any], int]:
    """flash_attn_func, and the generation of flash-attn that it is of: 2 if that is installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as error:
            hindrance = _flash_hindrance() or error
            raise ImportError(f"impl='flash' cannot run: {hindrance}") from error
        return flash_attn_func, 4
    return flash_attn_func, 2


def _call_flash(
    function: Callable[..., Any], inputs: AttentionInputs, *qkv: Tensor, slopes: Tensor | None
) -> Tensor:
    """One call in flash-attn's own layout, (batch, length, heads, d)."""
    window, only = inputs.window, {}
    before = -1 if window is None else window - 1
    if slopes is not None:
        # Generation 4 has none, and is not given the argument.
        only["alibi_slopes"] = slopes
    found = function(
        *(each.transpose(1, 2) for each in qkv),
        softmax_scale=inputs.scale,
        causal=inputs.causal,
        window_size=(before, 0 if inputs.causal and window is not None else before),
        softcap=0.0 if inputs.softcap is None else inputs.softcap,
        **only,
    )
    # Generation 4 returns the log-sum-exp, or None, beside it.
    out = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


def _check_flash(inputs: AttentionInputs) -> None:
    if inputs.q.dtype not in _HALF:
        raise ValueError(f"impl='flash' takes bfloat16 and float16, got {inputs.q.dtype}")
    if inputs.padding_mask is not None:
        raise ValueError("impl='flash' takes no padding_mask; use impl='sdpa' or 'flex'")
    if not inputs.consecutive and (inputs.causal or inputs.window is not None):
        raise ValueError(
            "impl='flash' numbers keys 0, 1, ... and takes the queries for the last of them: leave "
            "query_pos and key_pos out, or use impl='sdpa' or 'flex'"
        )


def _alibi_slopes(inputs: AttentionInputs) -> Tensor | None:
    """The prior as slopes for each query head, where it is nothing else and needs no gradient."""
    prior = inputs.prior
    if not isinstance(prior, LinearPrior) or not inputs.consecutive:
        return None
    if not (inputs.causal or getattr(prior, "symmetric", False)):
        # The kernel's slopes fall with |i - j|.
        return None
    slopes = prior.slope()
    if torch.is_grad_enabled() and slopes.requires_grad:
        # The kernel has no gradient for them.
        return None
    slopes = slopes.detach().float().expand(inputs.k.shape[1])
    return inputs.to_query_heads(slopes, "prior", head_dim=0).to(inputs.q.device)


# --- all of them ---

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa_backend(kernel: str, summary: str, hindrance: Callable[[], str | None]) -> Backend:
    name = f"sdpa_{kernel}"
    return Backend(name, summary, _sdpa_by(_KERNELS[kernel], name), hindrance, needs_lanes=True)


BACKENDS: dict[str, Backend] = {
    each.name: each
    for each in (
        Backend("reference", "the definition: dense, float64, any prior", _reference),
        Backend(
            "sdpa",
            "lanes and one call of PyTorch's kernel, which it chooses",
            _sdpa,
            needs_lanes=True,
        ),
        _sdpa_backend("flash", "the same, by FlashAttention inside PyTorch", _everywhere),
        _sdpa_backend("efficient", "the same, by the memory-efficient kernel", _no_gpu),
        _sdpa_backend("cudnn", "the same, by cuDNN", _no_gpu),
        _sdpa_backend("math", "the same, by plain products; forms the plan", _everywhere),
        Backend("sdpa_bias", "the dense log-prior as mask: any prior, heads x n x n", _sdpa_bias),
        Backend(
            "flex",
            "compiled, a table of lags and of keys: softcap, windows, priors without lanes",
            flex.attend,
            flex.hindrance,
        ),
        Backend(
            "flash",
            "flash-attn 2 or 4: lanes, or slopes (2) where they are the prior; windows",
            _flash,
            _flash_hindrance,
        ),
    )
}
IMPLEMENTATIONS = tuple(BACKENDS)


def default_impl(prior: Prior) -> str:
    """The backend of a prior by default: "sdpa", or "sdpa_bias" without lanes."""
    return "sdpa" if prior.has_lanes else "sdpa_bias"
