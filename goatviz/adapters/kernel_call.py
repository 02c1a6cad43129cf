"""One attention call of a Hugging Face model as its kernel gets it, read as an `AttentionCall`.

Each implementation has a kind of mask, an alignment of queries with keys, and options of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from goatviz.adapters.watch import check_dropout
from goatviz.transport.visibility import Visibility, split_mask

#: Options that change the weights in ways that an AttentionCall cannot express.
_UNREADABLE = ("head_mask", "indices", "block_indices", "cache", "block_table")
#: Options that hold keys chosen by an indexer, and implementations whose mask says the same.
_CHOSEN, _MASKED = ("indices", "block_indices"), ("eager", "sdpa")
#: Number of masks whose intervals are remembered, since layers share masks.
_HELD_MASKS = 4


class Masks:
    """Intervals of the most recent masks: every layer gets the same tensor."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, tuple[Visibility, Tensor | None]]] = []

    def read(self, mask: Tensor, n_queries: int, n_keys: int) -> tuple[Visibility, Tensor | None]:
        version = -1 if mask.is_inference() else mask._version
        for held, at, read in self._seen:
            size = read[0].n_queries, read[0].n_keys
            if held is mask and at == version and size == (n_queries, n_keys):
                return read
        read = _read_mask(mask, n_queries, n_keys)
        self._seen = [(mask, version, read), *self._seen[: _HELD_MASKS - 1]]
        return read


def _read_mask(mask: Tensor, n_queries: int, n_keys: int) -> tuple[Visibility, Tensor | None]:
    """Allowed pairs and additive rest of a boolean or additive mask, which may be one row."""
    size = (-1, -1, n_queries, n_keys)
    allowed, bias = split_mask(mask[..., :n_keys])
    if bool((allowed == allowed[:, :1]).all()):
        allowed = allowed[:, :1]
    return (
        Visibility.from_mask(allowed.expand(size)),
        None if bias is None else bias.float().expand(size),
    )


class KernelCall(NamedTuple):
    """One attention call as its kernel gets it.

    Attributes
    ----------
    path, module
        The layer.
    query, key : Tensor
        As in `AttentionCall`.
    mask : object
        Whatever the implementation takes as a mask.
    implementation : str
        Name of the kernel, which decides what the mask means.
    options : mapping
        The kernel's other arguments.
    tokens : int, optional
        Number of tokens that the layer's cache has seen, including this call's.
    cross : bool
        Whether the keys are those of another sequence.
    whole_mask : object
        The layer's mask before its indexer chose keys: a key that it never chooses is no padding.
    """

    path: str
    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Any
    implementation: str
    options: Mapping[str, Any]
    tokens: int | None = None
    cross: bool = False
    whole_mask: Any = None

    def options_of_call(self, masks: Masks) -> dict[str, Any]:
        """Arguments of `AttentionCall.from_tensors`, without queries, keys and values."""
        self._check_readable()
        module, options = self.module, self.options
        n_queries, n_keys = self.query.shape[2], self.key.shape[2]
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        cross = self.cross or _is_cross(self.path, module)
        self_attention = n_keys >= n_queries and not cross
        gone, first = 0, n_keys - n_queries
        known = self_attention and self.tokens is not None and self.tokens >= n_queries
        if known:
            # A cache holds the newest tokens, or has free places after them.
            gone = max(self.tokens - n_keys, 0)
            first = self.tokens - n_queries - gone
        visibility, bias = self._visible(masks, causal, first)
        position_bias = options.get("position_bias")
        if position_bias is not None:
            position_bias = position_bias[..., :n_queries, :n_keys].detach().float()
            bias = position_bias if bias is None else bias + position_bias
        sink, softcap = _sink(module, options), options.get("softcap")
        if self.implementation == "sdpa":
            # This kernel supports neither; old versions ignore them, new ones raise an error.
            sink = softcap = None
        if not known:
            first = _first_query(visibility, first) if self_attention and causal else max(first, 0)
        scale, whole, real = options.get("scaling"), self.whole_mask, visibility
        if isinstance(whole, Tensor) and whole.ndim == 4 and whole.shape[3] >= n_keys:
            real, _ = masks.read(whole, n_queries, n_keys)
        return {
            "scale": None if scale is None else float(scale),
            "visibility": visibility,
            "query_pos": torch.arange(n_queries) + first + gone,
            "key_pos": torch.arange(n_keys) + gone,
            "gone": gone,
            "bias": bias,
            "sink": sink,
            "softcap": softcap,
            "query_mask": real.real_queries(first) if self_attention else None,
        }

    def _check_readable(self) -> None:
        options = self.options
        if self.query.is_meta:
            raise ValueError("the model is on the meta device, which holds no numbers")
        check_dropout(self.module, options.get("dropout") or 0.0)
        unreadable = [
            name
            for name in _UNREADABLE
            if options.get(name) is not None
            and not (name in _CHOSEN and self.implementation in _MASKED)
        ]
        if unreadable:
            raise ValueError(
                f"{self.path} cannot be captured: its weights depend on {', '.join(unreadable)}, "
                f"which it passes to {self.implementation!r} attention"
            )

    def _visible(self, masks: Masks, causal: bool, first: int) -> tuple[Visibility, Tensor | None]:
        """Allowed pairs of a call whose first query is at key `first`, and what its mask adds."""
        mask, implementation, query = self.mask, self.implementation, self.query
        batch, heads, n_queries, _ = query.shape
        n_keys = self.key.shape[2]
        rows, index = torch.arange(n_queries), torch.arange(n_keys)
        if isinstance(mask, BlockMask):
            dense = create_mask(mask.mask_mod, batch, heads, n_queries, n_keys, device=query.device)
            if bool((dense == dense[:, :1]).all()):
                dense = dense[:, :1]
            return Visibility.from_mask(dense), None
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return masks.read(mask, n_queries, n_keys)
        if "flash" in implementation and (
            mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        ):
            if mask is None and _is_packed(self.options, batch):
                raise ValueError(
                    f"{self.path} cannot be captured: flash attention gets several sequences "
                    "packed into one; pad them into a batch instead"
                )
            window = self.options.get("sliding_window")
            keep = None if mask is None else mask[:, -n_keys:].bool()
            rules = {"causal": causal, "window": window, "padding_mask": keep}
            return Visibility.from_rules(rows + first, index, **rules), None
        if mask is None and implementation == "sdpa" and causal and n_queries > 1:
            # This kernel aligns its causal flag at the first key.
            return Visibility.from_rules(rows, index, causal=True), None
        if mask is None and (
            implementation in ("eager", "sdpa", "flex_attention") or not causal or n_queries == 1
        ):
            return Visibility.from_rules(rows, index, causal=False), None
        came = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        came = "no mask" if mask is None else f"{came} as its mask"
        raise TypeError(
            f"{type(self.module).__name__} got {came} under {implementation!r}; known are "
            "four-dimensional tensors, BlockMask, (batch, keys) under flash attention, and None "
            "under eager, sdpa, flex and flash attention"
        )


def _sink(module: nn.Module, options: Mapping[str, Any]) -> Tensor | None:
    """Logits of the extra column: one for each head, or (batch, heads, queries) per query."""
    each = options.get("sinks")
    if each is not None:
        return each.squeeze(-1)
    return options.get("s_aux", getattr(module, "sinks", None))


def _is_packed(options: Mapping[str, Any], batch: int) -> bool:
    """Whether flash attention treats one row as several sequences."""
    index = options.get("position_ids")
    restarts = batch == 1 and index is not None and bool((index.diff(dim=-1) != 1).any())
    return restarts or options.get("cu_seq_lens_q") is not None


def _first_query(visibility: Visibility, last: int) -> int:
    """Index of the first query among the keys: below `last` if a cache has free places."""
    if last == 0 or visibility.dense is not None:
        return last
    rows = torch.arange(visibility.n_queries)
    places = [torch.zeros(1, dtype=torch.long)]
    for b in range(visibility.batch):
        keys, start, stop = visibility.entry(b)
        seen = stop > start
        places.append(keys[stop[seen] - 1] - rows[seen])
    return min(int(torch.cat(places).max()), last)


def _is_cross(path: str, module: nn.Module) -> bool:
    # Where encoder and decoder share a class, cross-attention differs only in causality.
    decodes = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    names = [type(module).__name__, *path.split(".")[-2:]]
    named = any("cross" in name.lower() for name in names)
    return bool(getattr(module, "is_cross_attention", False)) or bool(decodes) or named
