"""Two plans of the same queries and keys, compared pair by pair, at any zoom.

Exact weights are subtracted first and pooled afterwards, so that a difference that pooling one plan
by itself would hide stays visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from goatviz import checks
from goatviz.analysis.levels import (
    POOLS,
    PlanLevels,
    PlanView,
    cell_grid,
    cell_rule,
    whole_bins,
)

#: Most queries whose rows are compared for a distance; of more, evenly spaced ones are.
MOST_ROWS = 1024
# Number of pairs whose differences are held at a time.
_BLOCK = 2**20


class DifferenceCell(NamedTuple):
    """One pair of two plans, exactly, in float64.

    Attributes
    ----------
    difference : float
        p_ij - p'_ij; a pair that a plan forbids has weight 0 in it.
    weight, other : float
        p_ij and p'_ij.
    allowed : bool
        Whether the query may see the key in one of the plans.
    """

    difference: float
    weight: float
    other: float
    allowed: bool


class PlanDistance(NamedTuple):
    r"""How far two plans are apart.

    Attributes
    ----------
    queries : array of int
        The queries that were compared and that may use a key in one of the plans.
    variation : array of float64
        Total variation distance of each, 1/2 sum_j |p_ij - p'_ij|, in [0, 1]; mass that a row has
        on no key, as with the column of a sink, counts as one more entry.
    mean : float
        Mean of `variation`.
    count : int
        Number of queries of the plans.
    largest : float
        The difference of largest magnitude, p_ij - p'_ij, among the compared queries.
    query, key : int
        Where it is.
    """

    queries: np.ndarray
    variation: np.ndarray
    mean: float
    count: int
    largest: float
    query: int
    key: int


class PlanDifference:
    r"""Views of p_ij - p'_ij, the weights of one plan less those of another one.

    Parameters
    ----------
    one, other : PlanLevels
        Plans of as many queries and as many keys.

    Raises
    ------
    TypeError
        If one is not a PlanLevels.
    ValueError
        If their sizes differ.

    Examples
    --------
    >>> import torch
    >>> from goatviz import capture, load_pretrained
    >>> model = load_pretrained("copy-mixture-4-goat").model
    >>> with capture(model, statistics=(), keep="projections") as record:
    ...     _ = model(torch.arange(64)[None] % 32)
    >>> call = record.calls[0]
    >>> difference = PlanDifference(PlanLevels(call, head=0), PlanLevels(call, head=1))
    >>> view = difference.view((0, 64), (0, 64), rows=16, columns=16)
    >>> view.rule
    '16 of 64 queries; keys: the largest difference, by magnitude, of 4'
    >>> bool(0 < difference.distance().mean < 1)
    True
    """

    def __init__(self, one: PlanLevels, other: PlanLevels) -> None:
        checks.instance("one", one, PlanLevels, "a PlanLevels")
        checks.instance("other", other, PlanLevels, "a PlanLevels")
        if (one.queries, one.keys) != (other.queries, other.keys):
            raise ValueError(
                f"other must have {one.queries:,} queries and {one.keys:,} keys as the first plan "
                f"has, got {other.queries:,} and {other.keys:,}"
            )
        self.one, self.other = one, other
        self._distance: PlanDistance | None = None

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.one.queries

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.one.keys

    def pairs(self, queries: int, keys: int) -> int:
        """About how many pairs a view of `queries` rows and `keys` keys has to visit."""
        return self.one.pairs(queries, keys) + self.other.pairs(queries, keys)

    def view(
        self,
        queries: tuple[int, int],
        keys: tuple[int, int],
        *,
        rows: int = 512,
        columns: int = 512,
        pool: str = "max",
        without: Sequence[int] = (),
        progress: Callable[[float], None] | None = None,
    ) -> PlanView:
        """The difference in a window, in at most `rows` x `columns` cells.

        Parameters
        ----------
        queries, keys, rows, columns, without, progress
            As in `PlanLevels.view`.
        pool : {"max", "mean"}
            What a cell of several keys holds: the difference of largest magnitude, or their mean
            over the keys that the query may see in one of the plans.

        Returns
        -------
        PlanView
            Differences of weights, in [-1, 1]; NaN where both plans forbid every pair.

        Raises
        ------
        ValueError
            As in `PlanLevels.view`.
        """
        checks.one_of("pool", pool, POOLS)
        frame = self.other.view(queries, keys, rows=1, columns=1, without=without)
        chosen, edges = cell_grid((self.queries, self.keys), queries, keys, rows, columns)
        cells = np.full((len(chosen), len(edges) - 1), np.nan, np.float32)
        for at, start, values in self._blocks(frame.query_range, edges, rows, without, progress):
            cells[:, at] = _pooled(values, edges[at] - start, pool)
        what = {"max": "the largest difference, by magnitude, of", "mean": "the mean difference of"}
        rule = cell_rule(len(chosen), frame.query_range, edges, what[pool])
        left_out = frame.rule.partition("; without ")
        return frame._replace(
            weights=cells, queries=chosen, key_edges=edges, rule=rule + "".join(left_out[1:])
        )

    def cell(self, query: int, key: int) -> DifferenceCell:
        """One pair, exactly.

        Raises
        ------
        ValueError
            If there is no such pair.
        """
        cells = [plan.cell(query, key) for plan in (self.one, self.other)]
        one, other = (cell.weight if cell.allowed else 0.0 for cell in cells)
        return DifferenceCell(one - other, one, other, any(cell.allowed for cell in cells))

    def distance(self, progress: Callable[[float], None] | None = None) -> PlanDistance:
        """How far the plans are apart, over at most 1,024 evenly spaced queries.

        Parameters
        ----------
        progress : callable, optional
            As in `PlanLevels.view`.

        Raises
        ------
        ValueError
            If no query may use a key.
        """
        if self._distance is None:
            self._distance = self._measure((0, self.queries), progress)
        return self._distance

    def variation(self, query: int) -> float:
        """Total variation distance of one query's rows, as in `distance`.

        Raises
        ------
        ValueError
            If there is no such query, or it may use no key.
        """
        query = checks.index("query", query, self.queries)
        return self._measure((query, query + 1), None).mean

    def _measure(
        self, window: tuple[int, int], progress: Callable[[float], None] | None
    ) -> PlanDistance:
        size = (self.queries, self.keys)
        rows, edges = cell_grid(size, window, (0, self.keys), MOST_ROWS, self.keys)
        total, moved, seen = (np.zeros(len(rows)) for _ in range(3))
        best, place = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        for _, start, values in self._blocks(window, edges, MOST_ROWS, (), progress):
            known = np.nan_to_num(values.astype(np.float64))
            seen += np.isfinite(values).any(1)
            total += np.abs(known).sum(1)
            moved += known.sum(1)
            at = np.abs(known).argmax(1)
            found = known[np.arange(len(rows)), at]
            larger = np.abs(found) > np.abs(best)
            best, place = np.where(larger, found, best), np.where(larger, start + at, place)
        used = seen > 0
        if not used.any():
            raise ValueError("plans must have a query that may use some key, got none")
        variation = (total + np.abs(moved))[used] / 2
        at = int(np.abs(best).argmax())
        return PlanDistance(
            queries=rows[used],
            variation=variation,
            mean=float(variation.mean()),
            count=self.queries,
            largest=float(best[at]),
            query=int(rows[at]),
            key=int(place[at]),
        )

    def _blocks(
        self,
        window: tuple[int, int],
        edges: np.ndarray,
        rows: int,
        without: Sequence[int],
        progress: Callable[[float], None] | None,
    ) -> Iterator[tuple[slice, int, np.ndarray]]:
        """Exact differences of groups of whole cells: the cells, their first key, the numbers."""
        most = max(1, _BLOCK // min(rows, window[1] - window[0]))
        for at, keys in whole_bins(edges, most):
            span = (keys.start, keys.stop)
            room = {"rows": rows, "columns": keys.stop - keys.start, "without": without}
            one, other = (
                plan.view(window, span, **room).weights for plan in (self.one, self.other)
            )
            # Where only one of them allows a pair, the other has no mass there.
            both = np.isnan(one) & np.isnan(other)
            yield at, keys.start, np.where(both, np.nan, np.nan_to_num(one) - np.nan_to_num(other))
            if progress is not None:
                progress(at.stop / (len(edges) - 1))


def _pooled(values: np.ndarray, starts: np.ndarray, pool: str) -> np.ndarray:
    """Cells of several keys: the value of largest magnitude, or the mean; NaN is left out."""
    known, seen = np.nan_to_num(values), np.isfinite(values)
    count = np.add.reduceat(seen, starts, axis=1, dtype=np.int64)
    if pool == "mean":
        with np.errstate(invalid="ignore"):
            return np.add.reduceat(known, starts, axis=1) / count
    high = np.maximum.reduceat(known, starts, axis=1)
    low = np.minimum.reduceat(known, starts, axis=1)
    return np.where(count > 0, np.where(high >= -low, high, low), np.nan)


def comparison_text(difference: PlanDifference, query: int) -> str:
    """The distance of two plans in a sentence, for captions and screen readers."""
    far = difference.distance()
    many = f"{len(far.queries):,} of {far.count:,}" if len(far.queries) < far.count else "all"
    if far.largest == 0:
        return f"Both plans give the same weights ({many} queries compared)."
    return (
        f"Total variation distance {difference.variation(query):.3g} for query {query:,}, "
        f"{far.mean:.3g} on average over {many} queries; largest difference {far.largest:+.3g}, "
        f"query {far.query:,}, key {far.key:,}."
    )
