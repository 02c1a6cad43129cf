"""Queries and keys of one batch entry, with a prior's lanes beside them, all in bits.

The inner product of a whole column is then score plus log-prior, and one with the lanes alone is
the log-prior. `blockwise` sweeps over them; which keys a query may use is not decided here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from goatviz.priors.base import Factors
from goatviz.transport.call import AttentionCall

_LOG2E = 1.0 / math.log(2.0)


class Operands:
    """Both sides of a batch entry's inner products, in the precision of its statistics.

    Attributes
    ----------
    queries : Tensor
        Scaled queries and query lanes, shape (query heads, n_queries, d + lanes).
    keys : Tensor
        Keys and key lanes as columns, shape (key-value heads, d + lanes, chosen keys): a tile's
        lanes are then long rows, by which thin products are fast.
    content : int
        d.
    """

    def __init__(
        self, call: AttentionCall, batch: int, chosen: Tensor, factors: Factors | None
    ) -> None:
        keys = call.k[batch].to(call.dtype)
        if not torch.equal(chosen, torch.arange(call.shape[3])):
            keys = keys[:, chosen.to(call.device)]
        queries, scale = call.q[batch].to(call.dtype), call.scale * _LOG2E
        self.content = keys.shape[-1]
        self._group = len(queries) // len(keys)
        self._bias = None
        if factors is None:
            self.queries, self.keys = queries * scale, keys.mT
            return
        heads, width = len(queries), self.content + factors.query.shape[-1] + 1
        query = (_LOG2E * factors.query.double()).to(queries)
        self.queries = queries.new_ones(*queries.shape[:2], width)
        torch.mul(queries, scale, out=self.queries[..., : self.content])
        self.queries[..., self.content : -1] = query.repeat_interleave(heads // len(query), dim=0)
        self.keys = keys.new_zeros(len(keys), width, len(chosen))
        self.keys[:, : self.content] = keys.mT
        self.keys[:, self.content : -1] = factors.key.to(keys).mT
        self._bias = _LOG2E * factors.key_bias.double().to(call.device)

    def refer_to(self, key: int, columns: slice) -> None:
        """Take the key-only terms of these columns relative to one key's.

        m j grows without bound, and float32 would lose the differences that matter.
        """
        if self._bias is not None:
            self.keys[:, -1, columns] = (self._bias[:, columns] - self._bias[:, [key]]).to(
                self.keys.dtype
            )

    def query_lanes(self, heads: slice, rows: slice) -> Tensor:
        """Lanes of some queries, shape (heads, rows, lanes)."""
        return self.queries[heads, rows, self.content :]

    def key_lanes(self, heads: slice, columns: slice) -> Tensor:
        """Lanes of some keys for each of these query heads, shape (heads, lanes, columns)."""
        return self._of_heads(heads, columns, slice(self.content, None))

    def scores(self, heads: slice, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Inner products of the content alone, written to `out`, (heads, rows, columns)."""
        part = slice(0, self.content)
        keys = self._of_heads(heads, columns, part)
        return torch.bmm(self.queries[heads, rows, part], keys, out=out)

    def logits(self, heads: slice, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Inner products of content and lanes together, written to `out`."""
        keys = self._of_heads(heads, columns, slice(None))
        return torch.bmm(self.queries[heads, rows], keys, out=out)

    def add_lanes(self, scores: Tensor, heads: slice, rows: slice, columns: slice, out: Tensor):
        """Scores plus the inner products of the lanes, written to `out`."""
        keys = self.key_lanes(heads, columns)
        return torch.baddbmm(scores, self.query_lanes(heads, rows), keys, out=out)

    def expected_lanes(self, weights: Tensor, heads: slice, rows: slice, columns: slice) -> Tensor:
        """sum_j w_ij <phi_i, psi_j>, shape (heads, rows): a thin product, no sum over the tile."""
        moments = torch.bmm(self.key_lanes(heads, columns), weights.mT)
        return torch.linalg.vecdot(self.query_lanes(heads, rows), moments.mT)

    def _of_heads(self, heads: slice, columns: slice, part: slice) -> Tensor:
        keys = self.keys[:, part, columns]
        if self._group == 1:
            return keys[heads]
        which = torch.arange(len(self.queries))[heads] // self._group
        first, last = int(which[0]), int(which[-1])
        keys = keys[first : last + 1]
        return keys[which - first] if len(which) > 1 else keys
