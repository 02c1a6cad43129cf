"""Attention kernels that also return the log-normaliser, which `flash` needs, by device.

On CUDA that is the public `flex_attention`, compiled by Triton; where this PyTorch has it without
the log-normaliser, or has no Triton, the operator behind memory-efficient attention. No public
function serves a CPU (compiled `flex_attention` returns no log-normaliser there; `varlen_attn` is
for half precision on CUDA), so the CPU's flash operator is used. Private operators are taken only
if their signature is the known one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

#: softmax(<q, k>) v and its log-normaliser in nats, shape (batch, heads, queries), of q, k, v of
#: shape (batch, heads, length, width) with equal heads; True forbids keys after the query.
Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

# Positions of a block of the mask that `flex_attention` skips, or takes whole.
_MASK_BLOCK = 128
# Narrowest queries, keys and values that Triton multiplies.
_NARROWEST = 16
# Tiles that fit 100 KiB of shared memory at 128 float32 channels; products in full float32; one
# kernel for few queries and for many.
_FLEX_OPTIONS = {
    "BLOCK_M": 64,
    "BLOCK_N": 32,
    "num_stages": 1,
    "FLOAT32_PRECISION": "'ieee'",
    "FORCE_USE_FLEX_ATTENTION": True,
}
#: Private operators of `torch.ops.aten`, used where no public function serves.
CPU_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
CUDA_OPERATOR = "_scaled_dot_product_efficient_attention"


class Kernel(NamedTuple):
    """A kernel by the name of the function behind it."""

    name: str
    attend: Attend


@functools.cache
def kernel_for(device: str) -> Kernel | str:
    """The kernel for a type of device, or what is missing, in words."""
    if device == "cpu":
        operator = _operator(CPU_OPERATOR, ("query", "key", "value", "dropout_p", "is_causal"), 2)
        if operator is None:
            return _without(CPU_OPERATOR)
        return Kernel(CPU_OPERATOR, functools.partial(by_cpu_operator, operator))
    if device != "cuda":
        return f"anything on a device of type {device}"
    if hasattr(flex, "AuxRequest") and importlib.util.find_spec("triton") is not None:
        return Kernel("flex_attention", by_flex_attention)
    arguments = ("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p")
    operator = _operator(CUDA_OPERATOR, (*arguments, "is_causal"), 4)
    if operator is None:
        return f"{_without(CUDA_OPERATOR)}, nor Triton with flex_attention(return_aux=)"
    return Kernel(CUDA_OPERATOR, functools.partial(by_efficient_operator, operator))


def by_cpu_operator(
    operator: Callable, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """`Attend` by the CPU's flash operator."""
    out, lse = operator(*_same_width(q, k, v), 0.0, causal, scale=1.0)
    return out[..., : v.shape[-1]], lse


def by_efficient_operator(
    operator: Callable, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """`Attend` by the operator of memory-efficient attention, which pads its log-normaliser."""
    out, lse, _, _ = operator(*_same_width(q, k, v), None, True, 0.0, causal, scale=1.0)
    return out[..., : v.shape[-1]], lse[..., : q.shape[2]]


def by_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, *, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """`Attend` by `torch.nn.attention.flex_attention`, whose log-normaliser is in nats.

    Parameters
    ----------
    q, k, v, causal
        See `Attend`; causal calls have as many queries as keys.
    compiled : bool
        False evaluates the same call as one dense product, for tests without a GPU.
    """
    run = _compiled_flex_attention() if compiled else flex.flex_attention
    wide = [F.pad(x, (0, max(0, _NARROWEST - x.shape[-1]))).contiguous() for x in (q, k, v)]
    out, aux = run(
        *wide,
        block_mask=causal_blocks(q.shape[2], q.device) if causal else None,
        scale=1.0,
        return_aux=flex.AuxRequest(lse=True),
        kernel_options=_FLEX_OPTIONS,
    )
    return out[..., : v.shape[-1]], aux.lse


def causal_blocks(length: int, device: torch.device) -> flex.BlockMask:
    """The causal mask of as many queries as keys; (length / 128) squared numbers, no more."""
    count = -(-length // _MASK_BLOCK)
    block = torch.arange(count, dtype=torch.int32, device=device)
    # Blocks before a row's own are whole, and its own is cut by the diagonal.
    cut, whole = block.new_zeros(count, count), block.expand(count, -1).contiguous()
    cut[:, 0] = block
    return flex.BlockMask.from_kv_blocks(
        torch.ones_like(block)[None, None],
        cut[None, None],
        block[None, None],
        whole[None, None],
        BLOCK_SIZE=_MASK_BLOCK,
        mask_mod=_not_later,
        seq_lengths=(length, length),
    )


def _not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.cache
def _compiled_flex_attention() -> Callable:
    # A whole graph or an error: not compiled, it would hold the plan.
    return torch.compile(flex.flex_attention, fullgraph=True, dynamic=True)


def _same_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros appended up to one width, a multiple of 8."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return [F.pad(x, (0, width - x.shape[-1])).contiguous() for x in tensors]


def _operator(name: str, arguments: tuple[str, ...], outputs: int) -> Callable | None:
    """A private operator of PyTorch, if it takes these arguments first and `scale` by name."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "default" not in packet.overloads():
        return None
    schema = packet.default._schema
    names = tuple(argument.name for argument in schema.arguments)
    fits = names[: len(arguments)] == arguments and "scale" in names
    return packet.default if fits and len(schema.returns) == outputs else None


def _without(name: str) -> str:
    return f"anything here: torch {torch.__version__} has no aten::{name} of the known signature"
