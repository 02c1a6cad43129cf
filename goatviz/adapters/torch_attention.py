"""torch.nn.MultiheadAttention, alone or inside torch's Transformer layers, watched as it runs.

Hooks would switch off torch's fast path and so change the bits of the outputs. Instead each
watched module gets a `forward` of its own, which calls that of its class.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goatviz.adapters.watch import (
    Observe,
    allowed_by,
    check_dropout,
    is_same,
    replaced_forwards,
)


def find_torch_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every torch.nn.MultiheadAttention, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


@contextmanager
def watch_torch_attention(
    model: nn.Module, modules: Mapping[str, nn.Module], observe: Observe
) -> Iterator[None]:
    """Report every call of these modules to `observe`; outputs keep every bit.

    The key of zeros that add_zero_attn appends is a sink column of logit 0. The learned key of
    add_bias_kv, which has a value, counts as one more key after the last.

    Parameters
    ----------
    model : nn.Module
        The model that holds the modules. Its TransformerEncoderLayers are watched too (but not
        subclasses that override forward), since their fast path does not call the module.
    modules : mapping
        From `find_torch_attention(model)`.
    observe : callable
        observe(path, q, k, **options), as in `AttentionCall.from_tensors`.

    Raises
    ------
    ValueError
        If a module is already being watched or, while the model runs, applies attention dropout.
    """
    reported = _Reported()
    forwards = [
        (module, _attention_forward(module, path, observe, reported))
        for path, module in modules.items()
    ]
    paths = {id(module): path for path, module in modules.items()}
    for layer in model.modules():
        fast = isinstance(layer, nn.TransformerEncoderLayer) and (
            type(layer).forward is nn.TransformerEncoderLayer.forward
        )
        if fast and id(layer.self_attn) in paths:
            path = paths[id(layer.self_attn)]
            forwards.append((layer, _layer_forward(layer, path, observe, reported)))
    with replaced_forwards(forwards):
        yield


class _Reported(threading.local):
    """Ids of the modules that have reported during the current call of their layer, by thread."""

    def __init__(self) -> None:
        self.modules: set[int] = set()


def _attention_forward(
    module: nn.MultiheadAttention, path: str, observe: Observe, reported: _Reported
) -> Callable[..., Any]:
    original = type(module).forward
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(module, *args, **kwargs).arguments
        inputs = (given[name] for name in ("query", "key", "value"))
        masks = (given.get(name) for name in ("key_padding_mask", "attn_mask"))
        observe(path, **_call(module, *inputs, *masks))
        reported.modules.add(id(module))
        return original(module, *args, **kwargs)

    return forward


def _layer_forward(
    layer: nn.TransformerEncoderLayer, path: str, observe: Observe, reported: _Reported
) -> Callable[..., Any]:
    original = type(layer).forward
    module = layer.self_attn

    def forward(
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        reported.modules.discard(id(module))
        out = original(layer, src, src_mask, src_key_padding_mask, is_causal)
        if id(module) not in reported.modules:
            # The fast path: one operation for the whole layer.
            x, padding = src, src_key_padding_mask
            if x.is_nested:
                x, padding = _padded(x)
            with torch.no_grad():
                x = layer.norm1(x) if layer.norm_first else x
            observe(path, **_call(module, x, x, x, padding, src_mask))
        return out

    return forward


@torch.no_grad()
def _call(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> dict[str, Any]:
    check_dropout(module, module.dropout)
    if query.is_nested:
        query, key_padding_mask = _padded(query)
        key = value = query
    itself = is_same(query, key)
    q, k, v = (_batched(module, x) for x in (query, key, value))
    if query.ndim == 2 and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    weights, biases = _weights(module)
    q, k, v = (
        F.linear(x, weight, bias)
        for x, weight, bias in zip((q, k, v), weights, biases, strict=True)
    )
    n_keys = k.shape[1]
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(len(k), -1, -1)], dim=1)
        v = torch.cat([v, module.bias_v.expand(len(v), -1, -1)], dim=1)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask, bias = _masks(q, k, n_keys, key_padding_mask, attn_mask)
    query_mask = None
    if itself and key_padding_mask is not None:
        query_mask = allowed_by(key_padding_mask)[0]
    return {
        "q": q,
        "k": k,
        "v": v,
        "causal": False,
        "mask": mask,
        "bias": bias,
        # A key of zeros whose value is zero has logit 0 and only takes mass.
        "sink": q.new_zeros(module.num_heads) if module.add_zero_attn else None,
        "query_pos": q.shape[2],
        "key_pos": k.shape[2],
        "query_mask": query_mask,
    }


def _padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as a padded one, and where the padding is."""
    lengths = torch.tensor([len(row) for row in x.unbind()], device=x.device)
    x = torch.nested.to_padded_tensor(x, 0.0)
    return x, torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(-1)


def _batched(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The input in shape (batch, length, embed_dim)."""
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _weights(module: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_bias is None:
        return weights, (None, None, None)
    return weights, module.in_proj_bias.chunk(3)


def _masks(
    q: Tensor,
    k: Tensor,
    n_keys: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Allowed pairs and additive rest; every query may use keys appended after `n_keys`."""
    batch, heads, n_queries, _ = q.shape
    appended = (0, k.shape[2] - n_keys)
    keep = bias = None
    if key_padding_mask is not None:
        keep, bias = allowed_by(key_padding_mask)
        keep = F.pad(keep, appended, value=True)
        bias = None if bias is None else bias[:, None, None, :].expand(-1, 1, n_queries, -1)
    allowed = keep
    if attn_mask is not None:
        shape = (batch, heads, n_queries, n_keys)
        pairs = attn_mask.reshape(shape) if attn_mask.ndim == 3 else attn_mask[None, None]
        allowed, rest = allowed_by(pairs)
        allowed = F.pad(allowed, appended, value=True)
        allowed = allowed if keep is None else allowed & keep[:, None, None, :]
        if rest is not None:
            bias = rest if bias is None else bias + rest
    return allowed, None if bias is None else F.pad(bias, appended)
