"""Which keys each query may use, in O(length): causal, windowed, padded, cached, or anything else.

In practice a mask leaves each query an interval of the keys that exist, so that two numbers per
query describe it. Any other mask is kept dense, as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Rows of a dense mask that are processed together.
_ROWS = 1024
#: Nats. An entry at or below the first always forbids its pair; one at or below the second does so
#: unless others lie between the second and the third.
_NEVER_A_BIAS, _FORBIDS, _ORDINARY = -1e8, -9999.0, -1000.0


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a mask into the pairs that it allows and what it adds to their logits.

    A boolean mask is True where a pair is allowed. An entry of an additive mask forbids its pair
    if it is -inf, at most half of the dtype's lowest number, or at most -1e8. Since some code
    writes -1e4, an entry of at most -9999 forbids its pair too, unless other entries lie between
    -9999 and -1000: those are a sign of a graded bias, such as ALiBi's over thousands of tokens,
    all of whose pairs are allowed.

    Parameters
    ----------
    mask : Tensor
        Boolean or floating point, of any shape.

    Returns
    -------
    allowed : Tensor of bool
        Allowed pairs, in the shape of the mask.
    bias : Tensor or None
        The mask where it allows and 0 elsewhere; None if that is 0 throughout.

    Raises
    ------
    TypeError
        If the mask is neither boolean nor floating point.
    ValueError
        If the mask holds NaN or +inf.

    Examples
    --------
    >>> allowed, bias = split_mask(torch.tensor([0.0, -1e4, -2.0]))
    >>> allowed.tolist(), bias.tolist()
    ([True, False, True], [0.0, 0.0, -2.0])
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise TypeError(f"mask must be boolean or floating point, got {mask.dtype}")
    # NaN is not below +inf either. A maximum needs no second array of the mask's size.
    if mask.numel() and not bool(mask.amax() < torch.inf):
        raise ValueError("mask must not hold NaN or +inf, got some; -inf forbids a pair")
    # In the mask's own precision: bfloat16 rounds -1e4 to -9984.
    forbids = torch.tensor(_FORBIDS, dtype=mask.dtype).item()
    graded = bool(((mask > forbids) & (mask <= _ORDINARY)).any())
    limit = max(torch.finfo(mask.dtype).min / 2, _NEVER_A_BIAS) if graded else forbids
    allowed = mask > limit
    bias = torch.where(allowed, mask, 0.0)
    return allowed, bias if bool(bias.any()) else None


@dataclass(frozen=True, eq=False)
class Visibility:
    """The allowed pairs of one attention call.

    Attributes
    ----------
    n_queries, n_keys : int
        Lengths in tokens.
    keys : tuple of Tensor
        For each batch entry, or once for all: indices of the keys that some query may use, in the
        order that `start` and `stop` count in.
    start, stop : Tensor of int64, shape (batch or 1, n_queries)
        Query i may use `keys[start : stop]`; nothing where they are equal.
    dense : Tensor of bool, shape (batch or 1, heads or 1, n_queries, n_keys), optional
        The mask itself, if some query's keys are not an interval; `keys`, `start` and `stop` are
        then empty.
    """

    n_queries: int
    n_keys: int
    keys: tuple[Tensor, ...] = ()
    start: Tensor | None = None
    stop: Tensor | None = None
    dense: Tensor | None = None
    _place: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_rules(
        cls,
        query_index: Tensor,
        key_index: Tensor,
        *,
        causal: bool,
        window: int | None = None,
        padding_mask: Tensor | None = None,
    ) -> Visibility:
        """Allowed pairs from rules about indices.

        Parameters
        ----------
        query_index, key_index : Tensor
            Sequence indices in tokens, shapes (n_queries,) and (n_keys,), in any order.
        causal : bool
            Forbid keys whose index exceeds the query's.
        window : int, optional
            Forbid keys `window` or more tokens away.
        padding_mask : Tensor of bool, shape (batch, n_keys), optional
            True at real keys.
        """
        query_index, key_index = query_index.double().cpu(), key_index.double().cpu()
        order = torch.argsort(key_index, stable=True)
        keeps = [None] if padding_mask is None else list(padding_mask.cpu())
        keys, starts, stops = [], [], []
        for keep in keeps:
            chosen = order if keep is None else order[keep[order]]
            index = key_index[chosen].contiguous()
            start = torch.zeros(len(query_index), dtype=torch.long)
            stop = torch.full_like(start, len(chosen))
            if causal:
                stop = torch.searchsorted(index, query_index, right=True)
            if window is not None:
                start = torch.searchsorted(index, query_index - window, right=True)
                if not causal:
                    stop = torch.searchsorted(index, query_index + window)
            keys.append(chosen)
            starts.append(start)
            stops.append(torch.maximum(start, stop))
        return cls(
            len(query_index), len(key_index), tuple(keys), torch.stack(starts), torch.stack(stops)
        )

    @classmethod
    def from_mask(cls, mask: Tensor) -> Visibility:
        """Allowed pairs from a dense boolean mask, True = allowed; intervals are found exactly.

        Parameters
        ----------
        mask : Tensor of bool, shape (batch or 1, heads or 1, n_queries, n_keys)
            Read in blocks of rows; kept only if some query's keys are not an interval.

        Raises
        ------
        TypeError
            If `mask` is not boolean.
        ValueError
            If it does not have four dimensions.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        if mask.ndim != 4:
            raise ValueError(
                "mask must have shape (batch or 1, heads or 1, n_queries, n_keys), "
                f"got {tuple(mask.shape)}"
            )
        n_queries, n_keys = mask.shape[2:]
        if mask.shape[1] > 1 and mask.stride(1) == 0:
            mask = mask[:, :1]
        if mask.shape[0] > 1 and mask.stride(0) == 0:
            mask = mask[:1]
        if mask.shape[1] > 1:
            return cls(n_queries, n_keys, dense=mask)
        entries = [_intervals(entry[0]) for entry in mask]
        if any(entry is None for entry in entries):
            return cls(n_queries, n_keys, dense=mask)
        keys, starts, stops = zip(*entries, strict=True)
        return cls(n_queries, n_keys, keys, torch.stack(starts), torch.stack(stops))

    @property
    def batch(self) -> int:
        """Number of batch entries with a mask of their own; 1 if all share one."""
        return len(self.keys) if self.dense is None else self.dense.shape[0]

    def entry(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """`keys`, `start` and `stop` of one batch entry (every key and interval when dense)."""
        if self.dense is not None:
            start = torch.zeros(self.n_queries, dtype=torch.long)
            return torch.arange(self.n_keys), start, torch.full_like(start, self.n_keys)
        batch = batch if len(self.keys) > 1 else 0
        return self.keys[batch], self.start[batch], self.stop[batch]

    def of_entry(self, batch: int) -> Visibility:
        """The allowed pairs of one batch entry alone."""
        if self.batch == 1:
            return self
        if self.dense is not None:
            return Visibility(self.n_queries, self.n_keys, dense=self.dense[batch : batch + 1])
        at = slice(batch, batch + 1)
        return Visibility(self.n_queries, self.n_keys, self.keys[at], self.start[at], self.stop[at])

    def count(self) -> Tensor:
        """Keys that each query may use, shape (batch or 1, heads or 1, n_queries)."""
        if self.dense is not None:
            return _by_rows(self.dense, lambda rows: rows.sum(-1))
        return (self.stop - self.start).unsqueeze(1)

    def observers(self, query_mask: Tensor | None = None) -> Tensor:
        """Queries that may use each key, shape (batch or 1, heads or 1, n_keys).

        Parameters
        ----------
        query_mask : Tensor of bool, shape (batch, n_queries), optional
            Count only these.
        """
        if self.dense is not None:
            total = None
            for a in range(0, self.n_queries, _ROWS):
                rows = self.dense[:, :, a : a + _ROWS]
                if query_mask is not None:
                    rows = rows & query_mask.to(rows.device)[:, None, a : a + _ROWS, None]
                part = rows.sum(-2)
                total = part if total is None else total + part
            return total
        batch = max(self.batch, 1 if query_mask is None else len(query_mask))
        out = torch.zeros(batch, 1, self.n_keys, dtype=torch.long)
        for b in range(batch):
            keys, start, stop = self.entry(b)
            if query_mask is not None:
                chosen = entry_of(query_mask, b).cpu()
                start, stop = start[chosen], stop[chosen]
            steps = torch.zeros(len(keys) + 1, dtype=torch.long)
            steps.scatter_add_(0, start, torch.ones_like(start))
            steps.scatter_add_(0, stop, -torch.ones_like(stop))
            out[b, 0, keys] = steps.cumsum(0)[:-1]
        return out

    def real_queries(self, first: int) -> Tensor:
        """Queries of self-attention that are not padding, shape (batch or 1, n_queries).

        A query is padding if no query may use its key, or if it may use no key itself.

        Parameters
        ----------
        first : int
            Index of the first query among the keys; the others follow.
        """
        used = (self.observers() > 0).any(1)[:, first : first + self.n_queries]
        return used & (self.count() > 0).any(1).to(used.device)

    def _places(self, batch: int) -> Tensor:
        """Place of each key in the order of the intervals, -1 for keys that no query may use."""
        number = batch if len(self.keys) > 1 else 0
        if number not in self._place:
            chosen = self.keys[number]
            place = torch.full((self.n_keys,), -1, dtype=torch.long)
            place[chosen] = torch.arange(len(chosen))
            self._place[number] = place
        return self._place[number]

    def may_see(self, queries: Tensor, keys: slice, *, batch: int = 0) -> Tensor:
        """Queries that might use a key of the window, shape (queries,); the others cannot.

        Takes O(queries + keys) with intervals; a dense mask rules no query out.
        """
        if self.dense is not None:
            return torch.ones(len(queries), dtype=torch.bool)
        _, start, stop = self.entry(batch)
        places = self._places(batch)[keys]
        places = places[places >= 0]
        if not len(places):
            return torch.zeros(len(queries), dtype=torch.bool)
        return (start[queries] <= places.max()) & (stop[queries] > places.min())

    def block(
        self, queries: slice | Tensor, keys: slice, *, batch: int = 0, head: int | slice = 0
    ) -> Tensor:
        """The dense mask of a window of pairs, shape (queries, keys), True = allowed.

        Several heads whose masks differ give shape (heads, queries, keys).
        """
        columns = range(self.n_keys)[keys]
        if self.dense is not None:
            dense = entry_of(self.dense, batch)[:, queries][..., keys]
            return entry_of(dense, head)
        place = self._places(batch)[columns.start : columns.stop : columns.step]
        return self._inside(place, queries, batch)

    def pairs(self, queries: slice, keys: Tensor, *, batch: int = 0) -> Tensor:
        """Which of its m given keys each query may use, shape (queries, m), True = allowed.

        Parameters
        ----------
        queries : slice
            Some queries.
        keys : Tensor of int64, shape (queries, m)
            m keys for each query. A dense mask gives shape (heads or 1, queries, m).
        batch : int
            Which batch entry.
        """
        if self.dense is not None:
            dense = entry_of(self.dense, batch)[:, queries]
            return dense.gather(-1, keys.to(dense.device).expand(len(dense), -1, -1))
        return self._inside(self._places(batch)[keys], queries, batch)

    def _inside(self, place: Tensor, queries: slice | Tensor, batch: int) -> Tensor:
        """Whether places of keys lie in the queries' intervals, shape (queries, m)."""
        _, start, stop = self.entry(batch)
        low, high = start[queries].unsqueeze(-1), stop[queries].unsqueeze(-1)
        return (place >= 0) & (place >= low) & (place < high)


def entry_of(values: Tensor, at: int | slice | Sequence[int]) -> Tensor:
    """One entry along the first dimension, or the only one, which all share."""
    return values[at if len(values) > 1 else 0]


def _intervals(mask: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys, starts and stops of a mask (n_queries, n_keys), or None if a row is not an interval."""
    used = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
    for rows in mask.split(_ROWS):
        used |= rows.any(0)
    keys = used.nonzero().flatten()
    if len(keys) == 0:
        nothing = torch.zeros(mask.shape[0], dtype=torch.long)
        return keys.cpu(), nothing, nothing.clone()
    every = len(keys) == mask.shape[1]
    starts, stops = [], []
    for rows in mask.split(_ROWS):
        rows = rows if every else rows[:, keys]
        numbers = rows.to(torch.uint8)
        start = numbers.argmax(-1)
        count = rows.sum(-1)
        last = rows.shape[1] - 1 - numbers.flip(-1).argmax(-1)
        seen = count > 0
        if bool((seen & (last - start + 1 != count)).any()):
            return None
        starts.append(torch.where(seen, start, 0))
        stops.append(torch.where(seen, last + 1, 0))
    return keys.cpu(), torch.cat(starts).cpu(), torch.cat(stops).cpu()


def _by_rows(mask: Tensor, function) -> Tensor:
    return torch.cat([function(rows) for rows in mask.split(_ROWS, dim=2)], dim=2)
