"""A plan of any length at any zoom: exact cells where there is room, pooled ones elsewhere.

Nothing of length x length is ever formed: a view takes the queries and, in blocks, the keys that it
shows, and one normaliser for each query, which is kept for the next view.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.adapters.capture import CapturedCall
from goatviz.analysis.inputs import text_array
from goatviz.results import PLAN_ROW, make_result
from goatviz.transport.call import AttentionCall
from goatviz.transport.rows import TransportPlan, solve_rows
from goatviz.transport.solvers import SolverReport, Verdict, cross_check, doubly_stochastic
from goatviz.transport.visibility import entry_of

if TYPE_CHECKING:
    import xarray as xr

#: Rules by which the weights of several keys become one cell.
POOLS = ("max", "mean")
#: The longest plan whose doubly stochastic counterpart is formed.
MAX_BALANCED = 512
# Share of a row's largest weight below which a weight is too dark to be seen on a linear scale.
_DARK = 0.05
# Below this mass on the keys that are not left out, a row has no weights on them.
_LEAST_MASS = 1e-12
# Number of pairs whose logits are held at a time, which fits a processor's cache.
_BLOCK = 2**18


class PlanView(NamedTuple):
    """One view of a plan.

    Attributes
    ----------
    weights : array of float32
        Shape (rows, columns): weights, pooled where a cell holds several keys; NaN where every
        pair of a cell is forbidden.
    queries : array of int
        The query of each row.
    key_edges : array of int
        First key of each column, and the end of the last column, shape (columns + 1,).
    query_range, key_range : tuple of int
        The half-open window that the view shows.
    rule : str
        How cells were made, in words, for the screen.
    """

    weights: np.ndarray
    queries: np.ndarray
    key_edges: np.ndarray
    query_range: tuple[int, int]
    key_range: tuple[int, int]
    rule: str

    @property
    def exact(self) -> bool:
        """Whether every cell is one pair, and no query of the window is left out."""
        rows, columns = self.weights.shape
        return (
            rows == self.query_range[1] - self.query_range[0]
            and columns == self.key_range[1] - self.key_range[0]
        )


class PlanCell(NamedTuple):
    """One pair, exactly, in float64.

    Attributes
    ----------
    weight, prior : float
        p_ij, and the mass of the prior alone.
    score : float
        Content score q.k times the scale of the attention call.
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


class _SolvedRow(NamedTuple):
    """One query's plan over all keys.

    Attributes
    ----------
    of : tuple
        The query and the temperature.
    whole : TransportPlan
        The plan with its extra column, if there is one.
    allowed : array of int
        1 where the query may see the key.
    masses, levels : dict of str to array
        Values of every key: those that a bin of keys adds up, and those that it averages, which are
        0 where forbidden.
    attrs : dict
        Numbers of the whole row.
    report : SolverReport, optional
        POT's report on it, once it has been asked for.
    """

    of: tuple[int, float]
    whole: TransportPlan
    allowed: np.ndarray
    masses: dict[str, np.ndarray]
    levels: dict[str, np.ndarray]
    attrs: dict[str, Any]
    report: SolverReport | None = None


class PlanLevels:
    r"""Views of p_ij = exp(s_ij + K_ij - log Z_i) of one captured head, at any zoom.

    Parameters
    ----------
    call : CapturedCall
        A call captured with keep="projections".
    head, batch : int
        Numbers of the query head and the sequence.

    Raises
    ------
    TypeError
        If `call` is not a captured call.
    ValueError
        If it holds statistics only, keys have left its cache, or there is no such head or sequence.

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
        checks.instance("call", call, CapturedCall, "a CapturedCall")
        self._call = call.projections
        if self._call.gone:
            raise ValueError(
                f"call must hold every key of its text, got {call!r}; plan_slice shows what is left"
            )
        self.batch = checks.index("batch", batch, call.shape[0])
        self.head = checks.index("head", head, call.shape[1])
        self.call = call
        self._balanced: tuple[float, np.ndarray] | None = None
        self._row: _SolvedRow | None = None
        # log Z_i of the call's logits; NaN until a view needs it.
        self._normalisers = torch.full((self.queries,), torch.nan, dtype=torch.float64)
        self._left_out: tuple[int, ...] = ()
        self._reduced: PlanLevels | None = None

    def pairs(self, queries: int, keys: int) -> int:
        """About how many pairs a view of `queries` rows and `keys` keys has to visit."""
        return queries * (keys + self.keys)

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.call.shape[2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.call.shape[3]

    @property
    def first_key(self) -> int:
        """The first key that some query sees, which is where a sink usually is: not padding."""
        return first_key(self._call, self.batch) or 0

    @torch.no_grad()
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
        """The plan in a window, in at most `rows` x `columns` cells.

        Parameters
        ----------
        queries, keys : tuple of int
            Half-open ranges, which are cut to those of the plan.
        rows, columns : int
            Largest numbers of cells. Of more queries, evenly spaced ones are taken; more keys are
            pooled.
        pool : {"max", "mean"}
            The largest weight of a cell's keys, or the mean over those that the query may see.
        without : sequence of int
            Keys to leave out: their weights are NaN, and every row is normalised over the other
            keys, p_ij / (1 - sum_{k in without} p_ik), from the logits, so that a row keeps its
            precision however little mass is left. Below a mass of 1e-12, a row is NaN.
        progress : callable, optional
            Function called with the share of the work that is done; an error that it raises ends
            the work.

        Raises
        ------
        ValueError
            If a window is empty, a number of cells is below 1, or there is no such pool or key.
        """
        checks.one_of("pool", pool, POOLS)
        chosen, edges = cell_grid((self.queries, self.keys), queries, keys, rows, columns)
        numbers = torch.from_numpy(chosen)
        left_out = tuple(sorted(set(checks.places("without", without, self.keys))))
        source = self._leaving_out(left_out) if left_out else self
        weights = source._pooled(numbers, edges, pool, progress)
        if left_out:
            weights[source._mass(numbers).numpy() < _LEAST_MASS] = np.nan
        queries, keys = _cut(queries, self.queries, "queries"), (int(edges[0]), int(edges[-1]))
        what = {"max": "the largest of", "mean": "the mean of"}[pool]
        rule = cell_rule(len(chosen), queries, edges, what) + _left_out_text(left_out)
        return PlanView(weights, chosen, edges, queries, keys, rule)

    def cell(self, query: int, key: int) -> PlanCell:
        """One pair, exactly.

        Raises
        ------
        ValueError
            If there is no such pair.
        """
        query = checks.index("query", query, self.queries)
        key = checks.index("key", key, self.keys)
        row = self._call.plan(self.batch, self.head, slice(query, query + 1))
        return PlanCell(
            weight=float(row.weights[0, key]),
            prior=float(row.log_prior[0, key].exp()),
            score=float(row.scores[0, key]),
            log_prior=float(row.log_prior[0, key]),
            allowed=bool(row.allowed[0, key]),
        )

    @torch.no_grad()
    def row(
        self,
        query: int,
        *,
        temperature: float = 1.0,
        points: int = 1024,
        keys: tuple[int, int] | None = None,
        tokens: Sequence[str] | None = None,
        check: bool = False,
        balanced: bool = False,
        mean_of: tuple[int, int] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> xr.Dataset:
        r"""One query's plan, argmin_p -<p, s_i> + tau KL(p || pi_i), with its scores and prior.

        Parameters
        ----------
        query : int
            Number of the query.
        temperature : float
            tau in units of the scores, above 0: towards 0 the largest score takes all, towards
            infinity only the prior is left. 1 is the model's own.
        points : int
            Largest number of points. More keys are pooled: masses are summed, scores averaged.
        keys : tuple of int, optional
            Half-open range of the keys that are shown; default all. The row is normalised over all
            keys, and attributes are of the whole row, whatever the range.
        tokens : sequence of str, optional
            One for each key; kept where nothing is pooled.
        check : bool
            Whether to solve the same row by POT, and keep its verdict and its plan.
        balanced : bool
            Whether to add the row of the doubly stochastic plan, as in `balanced_weights`.
        mean_of : tuple of int, optional
            Half-open range of queries whose mean plan is added, at the model's own temperature.
        progress : callable, optional
            As in `view`, for that mean.

        Returns
        -------
        xarray.Dataset
            Schema "plan_row", float64; potential, entropy, KL, margin, content range, largest
            weight and its key, and the verdict are attributes.

        Raises
        ------
        ValueError
            If there is no such query, an argument is out of range, or `balanced_weights` refuses
            the balanced plan.
        """
        query = checks.index("query", query, self.queries)
        temperature = checks.number("temperature", temperature, above=0)
        points = checks.positive_int("points", points)
        if tokens is not None and len(tokens) != self.keys:
            raise ValueError(f"tokens must hold {self.keys} texts, got {len(tokens)}")
        solved = self._solved(query, temperature)
        if check and solved.report is None:
            solved = self._row = solved._replace(report=_report(solved.whole))
        start, stop = (0, self.keys) if keys is None else _cut(keys, self.keys, "keys")
        edges = np.linspace(start, stop, min(points, stop - start) + 1).round().astype(np.int64)

        def pooled(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values[start:stop], edges[:-1] - start)

        seen = pooled(solved.allowed)
        data = {
            name: np.where(seen > 0, pooled(values), np.nan)
            for name, values in solved.masses.items()
        }
        for name, values in solved.levels.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                data[name] = pooled(values) / seen
        data |= {"key_stop": edges[1:], "allowed": seen > 0}
        report = solved.report if check else None
        others = {}
        if report is not None and report.weights is not None:
            others["solver"] = report.weights[0, : self.keys]
        if balanced:
            others["balanced"] = self.balanced_weights(temperature)[query]
        mean_start, mean_stop = -1, -1
        if mean_of is not None:
            mean_start, mean_stop = _cut(mean_of, self.queries, "mean_of")
            data["mean"] = self._mean(torch.arange(mean_start, mean_stop), edges, progress)
        for name, values in others.items():
            data[name] = np.where(seen > 0, pooled(np.asarray(values)), np.nan)
        if tokens is not None and len(seen) == stop - start:
            data["key_token"] = text_array(tokens[start:stop])
        return make_result(
            PLAN_ROW,
            data,
            coords={"key": edges[:-1]},
            attrs=solved.attrs
            | {
                "query": query,
                "keys": self.keys,
                "temperature": temperature,
                "mean_start": mean_start,
                "mean_stop": mean_stop,
                "verdict": "not checked" if report is None else report.verdict.value,
                "solver": "" if report is None else report.solver.replace("_", " "),
                "solver_difference": np.nan if report is None else report.largest_difference,
            },
        )

    @torch.no_grad()
    def balanced_weights(self, temperature: float = 1.0) -> np.ndarray:
        """The doubly stochastic plan: with a uniform target in place of a free one.

        Parameters
        ----------
        temperature : float
            tau, as in `row`.

        Returns
        -------
        array of float64, shape (queries, keys)
            Weights; those of the latest temperature are kept.

        Raises
        ------
        ValueError
            Beyond 512 queries or keys, or if no such plan exists or Sinkhorn does not converge.

        Notes
        -----
        Under the causal mask it is the identity, whatever the scores
        (`goatviz.doubly_stochastic`).
        """
        if max(self.queries, self.keys) > MAX_BALANCED:
            raise ValueError(
                f"balanced must be of a plan of at most {MAX_BALANCED} queries and keys, got "
                f"{self.queries:,} and {self.keys:,}"
            )
        if self._balanced is None or self._balanced[0] != temperature:
            window = self._call.logits(self.batch, self.head)
            balanced = doubly_stochastic(
                window.scores,
                log_prior=window.log_prior,
                temperature=temperature,
                mask=window.allowed,
            )
            self._balanced = (temperature, balanced.weights.cpu().numpy())
        return self._balanced[1]

    def _leaving_out(self, keys: tuple[int, ...]) -> PlanLevels:
        """The levels of the plan without these keys; the latest are kept."""
        reduced = self._reduced
        if reduced is None or reduced._left_out != keys:
            reduced = copy.copy(self)
            reduced._left_out, reduced._reduced = keys, None
            reduced._normalisers = torch.full_like(self._normalisers, torch.nan)
            self._reduced = reduced
        return reduced

    def _mass(self, rows: Tensor) -> Tensor:
        """Mass of these rows on the keys that are not left out, once they are normalised."""
        left = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        for run in _runs(self._left_out):
            logits = self._call.logits(self.batch, self.head, rows, run).logits.cpu()
            left = torch.logaddexp(left, logits.logsumexp(-1))
        others = self._normalisers[rows]
        return (others - torch.logaddexp(others, left)).exp().nan_to_num(nan=0.0)

    def _pooled(
        self, rows: Tensor, edges: np.ndarray, pool: str, progress: Callable[[float], None] | None
    ) -> np.ndarray:
        """Cells of these queries and bins of keys.

        The largest weight of a cell is that of its largest logit, so the normaliser may come later,
        and one pass over the pairs is enough; a mean needs the normaliser first.
        """
        first, last = int(edges[0]), int(edges[-1])
        unknown = self._normalisers[rows].isnan()
        total = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        windows = [slice(0, self.keys)]
        if pool == "max":
            windows = [slice(0, first), slice(last, self.keys)]
        left = sum(window.stop - window.start for window in windows)
        work = _Work(progress, len(rows) * (last - first) + int(unknown.sum()) * left)
        if pool == "mean":
            self._normalise(rows, unknown, windows, total, work)
        cells = np.full((len(rows), len(edges) - 1), np.nan)
        for columns, keys in whole_bins(edges, max(1, _BLOCK // len(rows))):
            work.add(len(rows) * (keys.stop - keys.start))
            used = self._may_see(rows, keys)
            if not len(used):
                continue
            logits, allowed = self._logits(rows[used], keys)
            starts = (edges[columns] - keys.start).astype(np.intp)
            if pool == "max":
                best = np.maximum.reduceat(logits.numpy(), starts, axis=-1)
                cells[used.numpy(), columns] = np.where(np.isneginf(best), np.nan, best)
                new = unknown[used]
                if bool(new.any()):
                    known = used[new]
                    total[known] = torch.logaddexp(total[known], _log_sum(logits[new]))
            else:
                weights = (logits - self._normalisers[rows[used]].unsqueeze(-1)).float().exp()
                mass = np.add.reduceat(weights.numpy(), starts, axis=-1)
                seen = np.add.reduceat(allowed.numpy(), starts, axis=-1, dtype=np.int64)
                with np.errstate(invalid="ignore"):
                    cells[used.numpy(), columns] = np.where(seen > 0, mass / seen, np.nan)
        if pool == "max":
            self._normalise(rows, unknown, windows, total, work)
            cells = np.exp(cells - self._normalisers[rows].unsqueeze(-1).numpy())
        return cells.astype(np.float32)

    def _mean(
        self, rows: Tensor, edges: np.ndarray, progress: Callable[[float], None] | None
    ) -> np.ndarray:
        """Mass that these queries send to each bin of keys, averaged over them."""
        unknown = self._normalisers[rows].isnan()
        total = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        work = _Work(progress, (len(rows) + int(unknown.sum())) * self.keys)
        self._normalise(rows, unknown, [slice(0, self.keys)], total, work)
        mass = np.zeros(len(edges) - 1)
        for columns, keys in whole_bins(edges, max(1, _BLOCK // len(rows))):
            work.add(len(rows) * (keys.stop - keys.start))
            used = self._may_see(rows, keys)
            if len(used):
                logits, _ = self._logits(rows[used], keys)
                weights = (logits - self._normalisers[rows[used]].unsqueeze(-1)).exp().sum(0)
                starts = (edges[columns] - keys.start).astype(np.intp)
                mass[columns] = np.add.reduceat(weights.numpy(), starts)
        return mass / len(rows)

    def _normalise(
        self, rows: Tensor, chosen: Tensor, windows: list[slice], total: Tensor, work: _Work
    ) -> None:
        """Add these windows of keys to the chosen rows' log sum exp, `total`, and keep log Z."""
        numbers = chosen.nonzero().flatten()
        if not len(numbers):
            return
        step = max(1, _BLOCK // len(numbers))
        for window in windows:
            for start in range(window.start, window.stop, step):
                keys = slice(start, min(start + step, window.stop))
                work.add(len(numbers) * (keys.stop - keys.start))
                used = numbers[self._may_see(rows[numbers], keys)]
                if len(used):
                    logits, _ = self._logits(rows[used], keys)
                    total[used] = torch.logaddexp(total[used], _log_sum(logits))
        normalisers = total[numbers]
        if self._call.sink is not None:
            # An extra column is one more term.
            sink = self._call.sink_logits(self.batch, self.head, rows[numbers])
            normalisers = torch.logaddexp(normalisers, sink.cpu())
        self._normalisers[rows[numbers]] = normalisers

    def _may_see(self, rows: Tensor, keys: slice) -> Tensor:
        """Places in `rows` of those that may use some key of the window."""
        return self._call.visibility.may_see(rows, keys, batch=self.batch).nonzero().flatten()

    def _logits(self, rows: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """Logits on the CPU, -inf where forbidden, and the mask of what is allowed."""
        window = self._call.logits(self.batch, self.head, rows, keys, lanes=True)
        logits, allowed = window.logits.cpu(), window.allowed.cpu()
        if gone := [key - keys.start for key in self._left_out if keys.start <= key < keys.stop]:
            logits, allowed = logits.clone(), allowed.clone()
            logits[:, gone], allowed[:, gone] = -torch.inf, False
        return logits, allowed

    def _solved(self, query: int, temperature: float) -> _SolvedRow:
        """One query's row over all keys; the latest is kept, for a window that moves over it."""
        # Read once, for rows may be asked for in several threads.
        row = self._row
        if row is not None and row.of == (query, temperature):
            return row
        whole = self._plan(query, temperature)
        plan = self._real_keys(whole)
        allowed = plan.allowed[0]
        masses = {"weights": plan.weights, "prior": plan.log_prior.exp()}
        levels = {"scores": plan.scores, "log_prior": plan.log_prior}
        best = int(plan.weights[0].argmax())
        row = _SolvedRow(
            (query, temperature),
            whole,
            allowed.long().cpu().numpy(),
            {name: values[0].cpu().numpy() for name, values in masses.items()},
            {n: torch.where(allowed, v[0], 0.0).cpu().numpy() for n, v in levels.items()},
            {
                "potential": float(whole.potential[0]),
                "entropy": float(whole.entropy[0]),
                "kl_to_prior": float(whole.kl_to_prior[0]),
                "content_range": float(plan.content_range[0]),
                "margin": float(plan.margin[0]),
                "largest_weight": float(plan.weights[0, best]),
                "largest_key": best,
            },
        )
        self._row = row
        return row

    def _plan(self, query: int, temperature: float) -> TransportPlan:
        """One query's plan over all keys and the extra column, whose score is 0."""
        row = torch.tensor([query])
        if not bool(self._call.has_keys(self.batch, self.head, row)):
            raise ValueError(f"query must be one that may use some key, got {query}")
        plan = self._call.solve(self.batch, self.head, row)
        return solve_rows(
            plan.scores, log_prior=plan.log_prior, temperature=temperature, mask=plan.allowed
        )

    def _real_keys(self, plan: TransportPlan) -> TransportPlan:
        """The same plan without the extra column, whose mass is then missing from the sum."""
        names = ("scores", "log_prior", "allowed", "log_weights")
        return replace(plan, **{name: getattr(plan, name)[:, : self.keys] for name in names})


class _Work:
    """Counts the pairs that are done and reports their share; the listener may raise to stop."""

    def __init__(self, report: Callable[[float], None] | None, total: int) -> None:
        self._report, self._total, self._done = report, max(total, 1), 0

    def add(self, pairs: int) -> None:
        self._done += pairs
        if self._report is not None:
            self._report(min(1.0, self._done / self._total))


def _log_sum(logits: Tensor) -> Tensor:
    """log sum exp of every row, -inf where nothing is allowed."""
    top = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return (logits - top).float().exp_().sum(-1, dtype=torch.float64).log() + top.squeeze(-1)


def whole_bins(edges: np.ndarray, most: int) -> Iterator[tuple[slice, slice]]:
    """Groups of adjacent bins, and their keys: at most `most` keys, but at least one bin."""
    column = 0
    while column < len(edges) - 1:
        stop = int(np.searchsorted(edges, edges[column] + most, side="right")) - 1
        stop = min(max(stop, column + 1), len(edges) - 1)
        yield slice(column, stop), slice(int(edges[column]), int(edges[stop]))
        column = stop


def _runs(keys: tuple[int, ...]) -> list[slice]:
    """Ascending keys as windows of adjacent ones."""
    parts = np.split(np.array(keys), np.flatnonzero(np.diff(keys) > 1) + 1)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def _report(plan: TransportPlan) -> SolverReport:
    """POT's report on the semi-relaxed problem; if POT fails, the report that decides the check."""
    first = cross_check(plan, solver="semi_relaxed")["semi_relaxed"]
    if first.verdict is not Verdict.SOLVER_FAILED:
        return first
    check = cross_check(plan)
    return next(report for report in check if report.verdict is check.verdict)


def _cut(window: tuple[int, int], count: int, name: str) -> tuple[int, int]:
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise TypeError(f"{name} must be a pair of integers, got {window!r}")
    start, stop = (max(0, checks.integer(name, at)) for at in window)
    return checks.window(name, slice(start, stop), count)


def cell_grid(
    size: tuple[int, int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    rows: int,
    columns: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The query of each row and the edges of the columns of a view; see `PlanLevels.view`."""
    rows, columns = checks.positive_int("rows", rows), checks.positive_int("columns", columns)
    first, last = _cut(queries, size[0], "queries")
    start, stop = _cut(keys, size[1], "keys")
    chosen = np.unique(np.linspace(first, last - 1, min(rows, last - first)).round())
    edges = np.linspace(start, stop, min(columns, stop - start) + 1).round()
    return chosen.astype(np.int64), edges.astype(np.int64)


def cell_rule(rows: int, queries: tuple[int, int], edges: np.ndarray, what: str) -> str:
    """How cells were made, in words; `what` is the rule of those that hold several keys."""
    count = queries[1] - queries[0]
    text = "every query" if rows == count else f"{rows:,} of {count:,} queries"
    widths = np.diff(edges)
    low, high = int(widths.min()), int(widths.max())
    if high == 1:
        return f"{text}; every key"
    many = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{text}; keys: {what} {many}"


def _left_out_text(keys: tuple[int, ...]) -> str:
    if not keys:
        return ""
    which = f"key {keys[0]:,}" if len(keys) == 1 else f"{len(keys):,} keys"
    if 1 < len(keys) <= 4:
        which = f"keys {', '.join(f'{key:,}' for key in keys)}"
    return f"; without {which}: each row normalised over the others"


def first_key(call: AttentionCall, batch: int) -> int | None:
    """The first key that some query of the sequence sees; None if that has left a cache."""
    seen = entry_of(call.visibility.observers() > 0, batch).any(0).nonzero().flatten()
    return int(seen[0]) if len(seen) and not call.gone else None


def colour_scale(weights: np.ndarray) -> str:
    """Which colour scale shows a view: linear, or logarithmic where most weights are too small.

    Logarithmic, if the median of the positive weights is below 5 % of the largest weight of a
    typical row (the median over rows). A sink head has nearly all mass in one column, and a linear
    scale would show nothing else; in a diffuse head, weights are of one order. Rows are compared
    because the first queries have few keys, so that their weights are near 1 in every plan. In
    views of 64 x 64 cells of SmolLM2 on 60 to 600 tokens, heads with more than 0.3 of their mass on
    the first key have at most 3.7 %, and the eight diffuse ones of the first layer 6 to 27 %.

    Parameters
    ----------
    weights : array
        Weights of a view, shape (rows, columns); NaN where nothing is visible.

    Returns
    -------
    {"linear", "log"}
        "linear" if no weight is positive.

    Examples
    --------
    >>> colour_scale(np.full((4, 4), 0.25)), colour_scale(np.array([[0.997, 0.001, 0.002]]))
    ('linear', 'log')
    """
    weights = np.asarray(weights, dtype=np.float64)
    positive = np.where(weights > 0, weights, 0.0)
    largest = positive.max(-1)
    if not largest.any():
        return "linear"
    typical = np.median(largest[largest > 0])
    return "log" if np.median(positive[positive > 0]) < _DARK * typical else "linear"


def colour_decades(weights: np.ndarray) -> int:
    """Decades below the largest weight that a logarithmic scale needs to show much of a view.

    So many that a quarter of the positive weights lie in them, but 5 at least and 12 at most: in
    the plan of a perfect sink, all other keys together get less than 1e-5.

    Parameters
    ----------
    weights : array
        Weights of a view, shape (rows, columns); NaN where nothing is visible.

    Examples
    --------
    >>> colour_decades(np.array([0.5, 0.1, 0.4])), colour_decades(np.array([1.0, *[1e-8] * 9]))
    (5, 8)
    """
    values = np.asarray(weights, dtype=np.float64)
    values = values[np.nan_to_num(values) > 0]
    if not len(values):
        return 5
    floor = np.quantile(values, 0.75) / values.max()
    return int(np.clip(np.ceil(-np.log10(floor) - 1e-9), 5, 12))


def row_summary(row: xr.Dataset) -> str:
    """A row from `PlanLevels.row` in a sentence, for captions and screen readers."""
    attrs = row.attrs
    checked = ""
    if attrs["verdict"] != "not checked":
        checked = f"; POT ({attrs['solver']}): {attrs['verdict']}"
        if np.isfinite(attrs["solver_difference"]):
            checked += f", largest difference {attrs['solver_difference']:.1e}"
    return (
        f"Query {attrs['query']:,} at temperature {attrs['temperature']:.3g}: largest weight "
        f"{attrs['largest_weight']:.4g} on key {attrs['largest_key']:,}; entropy "
        f"{attrs['entropy']:.3g} nats, KL to the prior {attrs['kl_to_prior']:.3g} nats, potential "
        f"{attrs['potential']:.4g}, content range {attrs['content_range']:.3g}, margin of the "
        f"prior {attrs['margin']:.3g} nats{checked}."
    )
