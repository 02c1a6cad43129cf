"""A plan of any length at any zoom: exact cells where there is room, pooled ones where not.

Nothing of length x length is ever formed: a view takes the queries that it shows, blocks of the
keys that it shows, and one normaliser for each query, which is kept for the next view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from goatviz.adapters.capture import CapturedCall, problem_of
from goatviz.results import PLAN_ROW, make_result
from goatviz.transport.fused import dense_window
from goatviz.transport.rows import solve_rows
from goatviz.transport.solvers import cross_check

#: Rules by which the weights of several keys become one cell.
POOLS = ("max", "mean")
# Pairs whose logits are held at a time.
_BLOCK = 2**22


class PlanView(NamedTuple):
    """What one view of a plan shows.

    Attributes
    ----------
    weights : array of float32
        Shape (rows, columns): weights, pooled where a cell holds several keys; NaN where every
        pair of a cell is forbidden.
    queries : array of int
        The query of each row.
    key_edges : array of int
        Where the keys of each column begin, and the end of the last, shape (columns + 1,).
    query_range, key_range : tuple of int
        The window that was asked for, half-open.
    rule : str
        How cells came about, in words, for the screen.
    """

    weights: np.ndarray
    queries: np.ndarray
    key_edges: np.ndarray
    query_range: tuple[int, int]
    key_range: tuple[int, int]
    rule: str

    @property
    def exact(self) -> bool:
        """Whether every cell is one pair and every query of the window is there."""
        rows, columns = self.weights.shape
        return (
            rows == self.query_range[1] - self.query_range[0]
            and columns == self.key_range[1] - self.key_range[0]
        )


class PlanCell(NamedTuple):
    """One pair, exact: float64.

    Attributes
    ----------
    weight, prior : float
        p_ij, and the mass that the prior alone puts there.
    score : float
        Content score q.k times the kernel's scale.
    log_prior : float
        Nats, normalised over the keys that the query may see.
    allowed : bool
        Whether the query may see the key.
    """

    weight: float
    prior: float
    score: float
    log_prior: float
    allowed: bool


class PlanLevels:
    r"""Views of p_ij = exp(s_ij + K_ij - log Z_i) of one captured head, at any zoom.

    Parameters
    ----------
    call : CapturedCall
        Captured with keep="projections".
    head, batch : int
        Which query head of which sequence.

    Raises
    ------
    TypeError
        If `call` is no captured call.
    ValueError
        If it holds statistics only, or there is no such head or sequence.

    Examples
    --------
    >>> from goatviz import capture, load_pretrained
    >>> model = load_pretrained("copy-mixture-1-goat").model
    >>> with capture(model, statistics=(), keep="projections") as record:
    ...     _ = model(torch.zeros(1, 64, dtype=torch.long))
    >>> view = PlanLevels(record.calls[0]).view((0, 64), (0, 64), rows=16, columns=16)
    >>> view.weights.shape, view.rule
    ((16, 16), '16 of 64 queries; keys: the largest of 4')
    """

    def __init__(self, call: CapturedCall, *, head: int = 0, batch: int = 0) -> None:
        if not isinstance(call, CapturedCall):
            raise TypeError(f"call must be a CapturedCall, got {type(call).__name__}")
        if call.call is None:
            raise ValueError(
                "call holds statistics only; capture(..., keep='projections') keeps q and k"
            )
        for name, value, count in (("batch", batch, call.shape[0]), ("head", head, call.shape[1])):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
                raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value!r}")
        self.call, self.head, self.batch = call, head, batch
        self._problem = problem_of(call.call)
        self._kv_head = head // (self._problem.q.shape[1] // self._problem.k.shape[1])
        # log Z_i in the gauge of `_logits`; NaN where no view has asked yet.
        self._normalisers = torch.full((self.queries,), torch.nan, dtype=torch.float64)

    @property
    def queries(self) -> int:
        """How many there are."""
        return self._problem.q.shape[2]

    @property
    def keys(self) -> int:
        """How many there are."""
        return self._problem.k.shape[2]

    @torch.no_grad()
    def view(
        self,
        queries: tuple[int, int],
        keys: tuple[int, int],
        *,
        rows: int = 512,
        columns: int = 512,
        pool: str = "max",
    ) -> PlanView:
        """The plan in a window, in at most `rows` x `columns` cells.

        Parameters
        ----------
        queries, keys : tuple of int
            Half-open ranges; they are cut to what there is.
        rows, columns : int
            Room. More queries than rows: evenly spaced ones. More keys than columns: pooled.
        pool : {"max", "mean"}
            The largest weight of a cell's keys, or the mean over those that the query may see.

        Raises
        ------
        ValueError
            If a window is empty, there is no room, or no such rule.
        """
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        for name, value in (("rows", rows), ("columns", columns)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        first, last = _cut(queries, self.queries, "queries")
        start, stop = _cut(keys, self.keys, "keys")
        chosen = np.unique(np.linspace(first, last - 1, min(rows, last - first)).round())
        chosen = chosen.astype(np.int64)
        edges = np.linspace(start, stop, min(columns, stop - start) + 1).round().astype(np.int64)
        weights = self._pooled(torch.from_numpy(chosen), edges, pool)
        return PlanView(
            weights=weights,
            queries=chosen,
            key_edges=edges,
            query_range=(first, last),
            key_range=(start, stop),
            rule=_rule(len(chosen), last - first, edges, pool),
        )

    def cell(self, query: int, key: int) -> PlanCell:
        """One pair, exact.

        Raises
        ------
        ValueError
            If there is no such pair.
        """
        for name, value, count in (("query", query, self.queries), ("key", key, self.keys)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
                raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value!r}")
        row = dense_window(
            self._problem, batch=self.batch, head=self.head, queries=slice(query, query + 1)
        )
        log_prior = row.log_prior[0].log_softmax(-1)
        return PlanCell(
            weight=float(row.weights[0, key]),
            prior=float(log_prior[key].exp()),
            score=float(row.scores[0, key]),
            log_prior=float(log_prior[key]),
            allowed=bool(row.allowed[0, key]),
        )

    @torch.no_grad()
    def row(
        self,
        query: int,
        *,
        temperature: float = 1.0,
        points: int = 1024,
        tokens: Sequence[str] | None = None,
        check: bool = False,
    ) -> xr.Dataset:
        r"""One query's plan, argmin_p -<p, s_i> + tau KL(p || pi_i), and what it is made of.

        Parameters
        ----------
        query : int
            Which.
        temperature : float
            tau in units of the scores, above 0: towards 0 the largest score takes all, towards
            infinity the prior is left. 1 is what the model does.
        points : int
            Room: more keys are pooled, masses summed and scores averaged.
        tokens : sequence of str, optional
            One for each key; kept where nothing is pooled.
        check : bool
            Solve the same row through POT, and keep its verdict.

        Returns
        -------
        xarray.Dataset
            Schema "plan_row", float64; potential, entropy, KL, margin, content range, largest
            weight and its key, and the verdict are attributes.

        Raises
        ------
        ValueError
            If there is no such query, or an argument is out of range.
        """
        if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < self.queries:
            raise ValueError(f"query must be in 0 .. {self.queries - 1}, got {query!r}")
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
        if isinstance(points, bool) or not isinstance(points, int) or points < 1:
            raise ValueError(f"points must be a positive integer, got {points!r}")
        if tokens is not None and len(tokens) != self.keys:
            raise ValueError(f"tokens must hold {self.keys} texts, got {len(tokens)}")
        window = dense_window(
            self._problem, batch=self.batch, head=self.head, queries=slice(query, query + 1)
        )
        plan = solve_rows(
            window.scores,
            log_prior=window.log_prior,
            temperature=float(temperature),
            mask=window.allowed,
        )
        edges = np.linspace(0, self.keys, min(points, self.keys) + 1).round().astype(np.int64)
        allowed = window.allowed[0].cpu().numpy()
        seen = np.add.reduceat(allowed, edges[:-1], dtype=np.int64)
        shown = {"weights": plan.weights, "prior": plan.log_prior.exp()}
        data = {
            name: np.where(seen > 0, np.add.reduceat(values[0].cpu().numpy(), edges[:-1]), np.nan)
            for name, values in shown.items()
        }
        for name, values in (("scores", window.scores), ("log_prior", plan.log_prior)):
            used = np.where(allowed, values[0].cpu().numpy(), 0.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                data[name] = np.add.reduceat(used, edges[:-1]) / seen
        data |= {"key_stop": edges[1:], "allowed": seen > 0}
        if tokens is not None and len(seen) == self.keys:
            data["key_token"] = np.array([str(token) for token in tokens], dtype=object)
        best = int(plan.weights[0].argmax())
        return make_result(
            PLAN_ROW,
            data,
            coords={"key": edges[:-1]},
            attrs={
                "query": query,
                "keys": self.keys,
                "temperature": float(temperature),
                "potential": float(plan.potential[0]),
                "entropy": float(plan.entropy[0]),
                "kl_to_prior": float(plan.kl_to_prior[0]),
                "content_range": float(plan.content_range[0]),
                "margin": float(plan.margin[0]),
                "largest_weight": float(plan.weights[0, best]),
                "largest_key": best,
                "verdict": cross_check(plan).verdict.value if check else "not checked",
            },
        )

    def _pooled(self, rows: Tensor, edges: np.ndarray, pool: str) -> np.ndarray:
        """Cells of these queries and bins of keys."""
        normaliser = self._normalised(rows)
        found = np.full((len(rows), len(edges) - 1), np.nan, dtype=np.float32)
        step = max(1, _BLOCK // len(rows))
        column = 0
        while column < len(edges) - 1:
            # As many whole bins as the block has room for, and one at least.
            stop = int(np.searchsorted(edges, edges[column] + step, side="right")) - 1
            stop = min(max(stop, column + 1), len(edges) - 1)
            logits, allowed = self._logits(rows, slice(int(edges[column]), int(edges[stop])))
            weights = (logits - normaliser.unsqueeze(-1)).exp().float().numpy()
            starts = (edges[column:stop] - edges[column]).astype(np.intp)
            seen = np.add.reduceat(allowed.numpy(), starts, axis=-1, dtype=np.int64)
            if pool == "max":
                value = np.maximum.reduceat(weights, starts, axis=-1)
            else:
                value = np.add.reduceat(weights, starts, axis=-1) / np.maximum(seen, 1)
            found[:, column:stop] = np.where(seen > 0, value, np.nan)
            column = stop
        return found

    def _normalised(self, rows: Tensor) -> Tensor:
        """log Z of these queries, over all keys and the extra column if there is one."""
        asked = rows[self._normalisers[rows].isnan()]
        if len(asked):
            total = torch.full((len(asked),), -torch.inf, dtype=torch.float64)
            step = max(1, _BLOCK // len(asked))
            for start in range(0, self.keys, step):
                logits, _ = self._logits(asked, slice(start, min(start + step, self.keys)))
                total = torch.logaddexp(total, logits.logsumexp(-1))
            if self._problem.sink is not None:
                total = torch.logaddexp(total, self._problem.sink[self.head].double().cpu())
            self._normalisers[asked] = total
        return self._normalisers[rows]

    def _logits(self, rows: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """Scores plus log-prior on the CPU, -inf where forbidden, and what is allowed."""
        problem, batch, head = self._problem, self.batch, self.head
        q, k = problem.q[batch, head, rows], problem.k[batch, self._kv_head, keys]
        logits = (problem.scale * q.double() @ k.double().mT).cpu()
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        if problem.prior is not None:
            logits = logits + self._log_prior(rows, keys)
        allowed = problem.visibility.block(rows, keys, batch=batch, head=head).cpu()
        if problem.bias is not None:
            bias = problem.bias[batch if problem.bias.shape[0] > 1 else 0]
            bias = bias[head if bias.shape[0] > 1 else 0][rows][:, keys].cpu().double()
            logits = logits + torch.where(allowed, bias, 0.0)
        return logits.masked_fill(~allowed, -torch.inf), allowed

    def _log_prior(self, rows: Tensor, keys: slice) -> Tensor:
        prior = self._problem.prior
        query, key = self._problem.query_pos[rows], self._problem.key_pos[keys]
        head = self._kv_head if prior.num_heads > 1 else 0
        if self._problem.sink is not None or not prior.has_lanes:
            # An extra column has a logit of its own, so that a constant of the row would count.
            return prior.log_prior(query, key)[head].detach().cpu().double()
        factors = prior.factors(query, key)
        product = factors.query[head].double() @ factors.key[head].double().mT
        return (product + factors.key_bias[head].double()).detach().cpu()


def _cut(window: tuple[int, int], count: int, name: str) -> tuple[int, int]:
    start, stop = int(window[0]), int(window[1])
    start, stop = max(0, start), min(stop, count)
    if start >= stop:
        raise ValueError(f"{name} must be a non-empty window of 0 .. {count}, got {window}")
    return start, stop


def _rule(rows: int, queries: int, edges: np.ndarray, pool: str) -> str:
    said = "every query" if rows == queries else f"{rows:,} of {queries:,} queries"
    widths = np.diff(edges)
    low, high = int(widths.min()), int(widths.max())
    if high == 1:
        return f"{said}; every key"
    many = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    what = {"max": "the largest of", "mean": "the mean of"}[pool]
    return f"{said}; keys: {what} {many}"
