"""What a sweep over queries and keys works on: blocks, their tiles, memory, and running totals.

Which numbers a tile holds, and what follows from the totals of a block, is in `blockwise`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Some of a block's columns, and which pairs of them are forbidden."""

    columns: slice
    outside: list[tuple[slice, Tensor]]


class Block(NamedTuple):
    """Some queries of one batch entry and the keys that any of them may use."""

    rows: slice
    stop: Tensor
    tiles: list[Tile]


def blocks(
    start: Tensor, stop: Tensor, size: int, width: int, device: torch.device
) -> Iterator[Block]:
    for a in range(0, len(start), size):
        first, last = start[a : a + size], stop[a : a + size]
        seen = last > first
        if not bool(seen.any()):
            continue
        low, high = int(first[seen].min()), int(last[seen].max())
        # Every query of the block may use the keys of [inner_low, inner_high).
        inner_low, inner_high = int(first.max()), int(last.min())
        edges = [(low, inner_low), (inner_high, high)]
        if inner_low >= inner_high:
            edges = [(low, high)]
        tiles = []
        for left in range(low, high, width):
            right = min(left + width, high)
            outside = []
            for begin, end in edges:
                begin, end = max(begin, left), min(end, right)
                if end > begin:
                    columns = torch.arange(begin, end)
                    forbidden = (columns < first.unsqueeze(-1)) | (columns >= last.unsqueeze(-1))
                    outside.append((slice(begin - left, end - left), forbidden.to(device)))
            tiles.append(Tile(slice(left, right), outside))
        yield Block(slice(a, a + len(first)), last, tiles)


class Buffers:
    """Memory that all blocks reuse; allocating it anew would cost page faults."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._held: dict[str, Tensor] = {}
        self._kind = {"device": device, "dtype": dtype}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        if name not in self._held or self._held[name].numel() < count:
            self._held[name] = torch.empty(count, **self._kind)
        return self._held[name][:count].view(*shape)


class Totals:
    """What tiles add to a block's rows: extremes, and sums of unnormalised weights times terms."""

    def __init__(self, like: Tensor) -> None:
        rows = like.shape[:2]
        self.top = like.new_full(rows, -math.inf)
        self.total = like.new_zeros(rows)
        self.moment = like.new_zeros(rows)
        self.low = like.new_full(rows, math.inf)
        self.high = like.new_full(rows, -math.inf)
        self.guess = like.new_zeros(rows)
        self.below = like.new_zeros(rows)
        self.score = like.new_zeros(rows)
        self.prior = like.new_zeros(rows)
        self.partition = like.new_full(rows, -math.inf)
        self.recent = like.new_zeros(rows)
        self.moved = like.new_zeros(rows)
        self.square = like.new_zeros(rows)
        self.keys: dict[int, Tensor] = {}

    @classmethod
    def of_heads(cls, parts: Sequence[Totals]) -> Totals:
        """The totals of all heads from those of some."""
        if len(parts) == 1:
            return parts[0]
        whole = copy.copy(parts[0])
        for name, value in vars(whole).items():
            if isinstance(value, Tensor):
                setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        whole.keys = {at: torch.cat([part.keys[at] for part in parts]) for at in whole.keys}
        return whole

    @property
    def base(self) -> Tensor:
        """The maximum, 0 for rows without any key."""
        return torch.where(torch.isneginf(self.top), 0.0, self.top)

    def add(self, logits: Tensor, top: Tensor, index: Tensor | None, weights: Tensor) -> None:
        """Add one tile: subtract the maximum so far from `logits`, and write exp2 to `weights`."""
        before = self.top
        self.top = torch.maximum(before, top)
        base = self.base
        fade = torch.exp2(before - base)
        logits.sub_(base.unsqueeze(-1))
        torch.exp2(logits, out=weights)
        self.total = self.total * fade + weights.sum(-1)
        if index is not None:
            self.moment = self.moment * fade + weights @ index
