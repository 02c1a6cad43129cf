"""FlexAttention with a separable prior: a table of lags and a table of keys, read in the kernel.

The tables keep the prior in full precision whatever the dtype of queries and keys, need no lanes,
and serve softcaps and windows. The kernel is compiled at its first call, which takes seconds, on a
CPU for every size anew; there PyTorch has its forward pass alone.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from goatviz.attention.inputs import AttentionInputs
from goatviz.priors.base import readable
from goatviz.priors.fixed import UniformPrior
from goatviz.priors.separable import is_separable, key_table, lag_table

#: Queries and keys of one block of the mask.
_BLOCK = 128


def hindrance() -> str | None:
    """Why the kernel cannot be compiled here, or None."""
    if torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return None
    return "there is no C++ compiler"


def attend(inputs: AttentionInputs) -> Tensor:
    """softmax(softcap(scale q k^T) + K) v by compiled FlexAttention.

    Raises
    ------
    ValueError
        For a prior that is not separable, positions that are not whole numbers, or gradients on
        a CPU.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    _check(inputs)
    inputs.check_rows()
    n_queries = q.shape[2]
    query_index = inputs.query_points[:, 0].to(q.device, torch.long)
    key_index = inputs.key_points[:, 0].to(q.device, torch.long)
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        # PyTorch refuses tensors there that could want gradients, even where none is recorded.
        q, k, v = q.detach(), k.detach(), v.detach()
    alone = on_cpu and n_queries == 1
    if alone:
        # PyTorch's own template for one query does not compile on a CPU: two of the same do.
        q, query_index = q.repeat(1, 1, 2, 1), query_index.repeat(2)
    out = compiled(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(inputs, query_index, key_index),
        block_mask=_block_mask(inputs, query_index, key_index),
        scale=inputs.scale,
        enable_gqa=inputs.is_grouped,
    )
    return out[:, :, :n_queries] if alone else out


@functools.cache
def compiled(device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled as one graph or not at all: without that the whole plan is formed.

    On a CPU each size is compiled anew, up to `torch._dynamo.config.recompile_limit` of them: for
    sizes that vary PyTorch writes code there that does not compile.
    """
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)


def _check(inputs: AttentionInputs) -> None:
    if not is_separable(inputs.prior):
        raise ValueError(
            "impl='flex' serves priors that are sums of functions of the lag and of the key on a "
            f"sequence, got {type(inputs.prior).__name__} with parts "
            f"{', '.join(inputs.prior.components())}; use impl='sdpa'"
        )
    tensors = (inputs.q, inputs.k, inputs.v, *inputs.prior.parameters())
    if (
        inputs.q.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(each.requires_grad for each in tensors)
    ):
        raise ValueError(
            "impl='flex' has no gradients on a CPU: call it under torch.no_grad(), or use "
            "impl='sdpa'"
        )
    if inputs.consecutive or not readable():
        return
    for name, points in (("query_pos", inputs.query_points), ("key_pos", inputs.key_points)):
        if bool((points[:, 0] != points[:, 0].round()).any()):
            raise ValueError(f"impl='flex' takes whole positions, got fractions in {name}")


def _score_mod(
    inputs: AttentionInputs, query_index: Tensor, key_index: Tensor
) -> Callable[..., Tensor] | None:
    """The scores' softcap, and the tables' entries added."""
    softcap, prior = inputs.softcap, inputs.prior
    flat = isinstance(prior, UniformPrior)
    if flat and softcap is None:
        return None
    if flat:
        return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
    lowest, lags = _lags(inputs, query_index, key_index)
    exact = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    lag_values = _per_query_head(inputs, lag_table(prior, lags.double()).to(inputs.q.device, exact))
    keys = inputs.key_points[:, 0].double()
    key_values = _per_query_head(inputs, key_table(prior, keys).to(inputs.q.device, exact))
    last = lag_values.shape[1] - 1

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        # Forbidden pairs of a block that is open in part are computed, too, and thrown away.
        lag = (query_index[i] - key_index[j] - lowest).clamp(0, last)
        return score + lag_values[h, lag] + key_values[h, j]

    return add


def _lags(inputs: AttentionInputs, query_index: Tensor, key_index: Tensor) -> tuple[int, Tensor]:
    """The smallest lag that is needed, and all from it to the largest."""
    if inputs.consecutive:
        lowest, highest = 1 - inputs.k.shape[2], inputs.k.shape[2] - 1
    else:
        lowest = int(query_index.min() - key_index.max())
        highest = int(query_index.max() - key_index.min())
    if inputs.causal:
        lowest, highest = 0, max(highest, 0)
    return lowest, torch.arange(lowest, highest + 1, device=query_index.device)


def _per_query_head(inputs: AttentionInputs, table: Tensor) -> Tensor:
    table = inputs.to_query_heads(table, "prior", head_dim=0)
    return table.contiguous()


def _block_mask(inputs: AttentionInputs, query_index: Tensor, key_index: Tensor) -> BlockMask:
    """Which blocks are open, in part or as a whole, from the least and largest index of each."""
    causal, window, keep = inputs.causal, inputs.window, inputs.padding()
    low_query, high_query = _extremes(query_index)
    low_key, high_key = _extremes(key_index)
    most, least = high_query[:, None] - low_key, low_query[:, None] - high_key
    some, whole = torch.ones_like(most, dtype=torch.bool), torch.ones_like(most, dtype=torch.bool)
    if causal:
        some, whole = some & (most >= 0), whole & (least >= 0)
    if window is not None:
        some, whole = some & (least < window), whole & (most < window)
        if not causal:
            some, whole = some & (most > -window), whole & (least > -window)
    some, whole = some[None, None], whole[None, None]
    if keep is not None:
        blocks = F.pad(keep, (0, -keep.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
        sizes = F.pad(torch.ones_like(keep), (0, -keep.shape[1] % _BLOCK)).unflatten(
            1, (-1, _BLOCK)
        )
        some = some & blocks.any(-1)[:, None, None]
        whole = whole & (blocks == sizes).all(-1)[:, None, None]

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        lag = query_index[i] - key_index[j]
        pair = (lag >= 0) if causal else (lag == lag)
        if window is not None:
            pair = pair & (lag < window)
            if not causal:
                pair = pair & (lag > -window)
        return pair if keep is None else pair & keep[b, j]

    part = _listed(some & ~whole)
    full = _listed(whole)
    return BlockMask.from_kv_blocks(
        *part,
        *full,
        BLOCK_SIZE=_BLOCK,
        mask_mod=allowed,
        seq_lengths=(len(query_index), len(key_index)),
    )


def _extremes(index: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest index in each block."""
    last = index[-1:].expand(-len(index) % _BLOCK)
    blocks = torch.cat([index, last]).unflatten(0, (-1, _BLOCK))
    return blocks.amin(1), blocks.amax(1)


def _listed(open_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of open blocks in each row of blocks, and their places, first ones first."""
    places = torch.argsort(open_blocks.int(), dim=-1, descending=True, stable=True)
    return open_blocks.sum(-1, dtype=torch.int32), places.to(torch.int32)
