"""The same transport problem through an independent solver: POT, Python Optimal Transport.

Here live ``cross_check``, which holds a plan against POT's answers and says which of the two is
at fault when they differ, and ``doubly_stochastic``, the balanced problem with a fixed target.
POT's answers are never taken on trust: a solver whose own marginals or objective are wrong is
reported as failed. Closed forms live in ``goatviz.transport.rows``.
"""

from __future__ import annotations

import enum
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import ot
import torch
from torch import Tensor

from goatviz.transport.rows import TransportPlan, solve_rows

# Bound on the mass that the temperature may leave off the best key for the linear programme to
# count as the plan's limit.
_LIMIT_TOLERANCE = 1e-6

# Kernel entries below this can vanish once POT multiplies them by a scaling smaller than one.
_UNDERFLOW = 1e-290

# What POT's functions are known to raise on degenerate data; anything else is our own fault.
_POT_FAULTS = (ArithmeticError, AssertionError, RuntimeError, ValueError)


class Verdict(enum.StrEnum):
    """What a cross-check can conclude; only a sound answer of POT can disagree."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    SOLVER_FAILED = "solver failed"
    NOT_APPLICABLE = "not applicable"


# From the finding that matters most to the one that matters least.
_SEVERITY = (
    Verdict.DISAGREES,
    Verdict.SOLVER_FAILED,
    Verdict.NOT_APPLICABLE,
    Verdict.AGREES,
)


@dataclass(frozen=True)
class SolverReport:
    """One solver's answer about one plan (of a batch, the worst).

    Attributes
    ----------
    solver : str
        ``"semi_relaxed"``, ``"balanced"`` or ``"linear_programme"``.
    verdict : Verdict
        Compares equal to its text, such as ``"agrees"``.
    reason : str
        Why, with the numbers it rests on.
    largest_difference : float
        Largest absolute difference between POT's row-conditional weights and the plan's; NaN
        where POT gave no finite answer.
    source_error, target_error : float or None
        POT's own violation of the marginals it was given, on a total mass of one; the target's
        is None where the target is free.
    objective_excess : float or None
        POT's objective minus the plan's in nats (in the worst row, for decoupled rows); positive
        if POT's plan is the worse one. None where it was not needed or not finite.
    seconds : float
        Time spent in POT, summed over the batch.
    iterations : int or None
        POT's iterations, the largest of the batch; None where POT does not tell.
    index : tuple of int
        Batch index that the report is about.
    weights : array of float64, shape (n_queries, n_keys), optional
        POT's row-conditional weights of that batch element, right or wrong; None where POT gave
        no finite answer or the check compares no weights.
    """

    solver: str
    verdict: Verdict
    reason: str
    largest_difference: float
    source_error: float | None
    target_error: float | None
    objective_excess: float | None
    seconds: float
    iterations: int | None
    index: tuple[int, ...] = ()
    weights: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        parts = [f"{self.solver.replace('_', ' ')} (POT {ot.__version__}): {self.verdict}"]
        if self.verdict is not Verdict.AGREES or self.solver == "linear_programme":
            parts.append(self.reason)
        if math.isfinite(self.largest_difference):
            parts.append(f"largest weight difference {self.largest_difference:.1e}")
        if self.source_error is not None and math.isfinite(self.source_error):
            parts.append(f"POT's source marginal error {self.source_error:.1e}")
        if self.target_error is not None and math.isfinite(self.target_error):
            parts.append(f"POT's target marginal error {self.target_error:.1e}")
        if self.iterations is not None:
            parts.append(f"{self.iterations} iteration{'s' if self.iterations != 1 else ''}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """The report as plain numbers and text for JSON; None for what is not finite."""
        plain = asdict(replace(self, weights=None))
        plain |= {"verdict": str(self.verdict), "index": list(self.index)}
        del plain["weights"]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in plain.items()
        }


@dataclass(frozen=True)
class CrossCheck:
    """What independent solvers say about a plan; ``str`` gives one line per solver.

    Attributes
    ----------
    reports : tuple of SolverReport
        In the order asked for; ``check["balanced"]`` picks one.
    tolerance : float
        Largest difference of weights that counted as agreement.
    n_problems : int
        Number of batch elements, each solved on its own.
    """

    reports: tuple[SolverReport, ...]
    tolerance: float
    n_problems: int

    @property
    def verdict(self) -> Verdict:
        """One verdict: any disagreement, else any agreement, else failure, else not applicable."""
        found = {report.verdict for report in self.reports}
        order = (Verdict.DISAGREES, Verdict.AGREES, Verdict.SOLVER_FAILED)
        return next((item for item in order if item in found), Verdict.NOT_APPLICABLE)

    @property
    def agrees(self) -> bool:
        """Whether at least one solver agrees and none disagrees."""
        return self.verdict is Verdict.AGREES

    def __getitem__(self, solver: str) -> SolverReport:
        for report in self.reports:
            if report.solver == solver:
                return report
        names = [report.solver for report in self.reports]
        raise KeyError(f"solver: got {solver!r}, wanted one of {names}")

    def __iter__(self) -> Iterator[SolverReport]:
        return iter(self.reports)

    def __str__(self) -> str:
        return "\n".join(map(str, self.reports))

    def to_dict(self) -> dict[str, object]:
        """The whole check as plain numbers and text, for JSON."""
        return {
            "verdict": str(self.verdict),
            "tolerance": self.tolerance,
            "n_problems": self.n_problems,
            "pot_version": ot.__version__,
            "reports": [report.to_dict() for report in self.reports],
        }


def cross_check(
    plan: TransportPlan,
    *,
    solver: str | Sequence[str] = ("semi_relaxed", "balanced"),
    tolerance: float | None = None,
    marginal_tolerance: float | None = None,
    max_iterations: int = 10_000,
    warm_start: bool = True,
) -> CrossCheck:
    r"""Solve a plan's problem again through POT, and say whether the two answers agree.

    .. math::
        \min_{G \ge 0,\; G 1 = a} \; -\langle G, S\rangle
            + \tau \, \mathrm{KL}(G \,\|\, \mathrm{diag}(a)\,\Pi)

    Parameters
    ----------
    plan : TransportPlan
        Any plan, optimal or not. Batches are solved one by one in float64 and the worst element
        is reported.
    solver : str or sequence of str
        One or several of the names in the notes, or ``"all"``.
    tolerance : float, optional
        Largest difference of weights that counts as agreement; by default 1e-10 for a float64
        plan and 1e-5 for a float32 one.
    marginal_tolerance : float, optional
        Violation of POT's own marginals beyond which POT counts as failed: of the source in
        units of each query's mass, of the target on a total mass of one. By default 1e-9 for a
        float64 plan and 1e-6 for a float32 one, whose incoming mass is no more exact.
    max_iterations : int
        Limit on POT's Sinkhorn iterations.
    warm_start : bool
        Whether the balanced check starts at the plan's potentials, where the exact plan is a
        fixed point. False starts from zero: more independent, and often too slow to converge.

    Returns
    -------
    CrossCheck
        "solver failed" where POT is at fault: its answer is not finite, breaks its own
        marginals, came with a warning, or is a feasible plan of *higher* objective than the
        one it should beat. "disagrees" only where POT's sound answer differs and is at least as
        good.

    Raises
    ------
    KeyError
        If a solver is unknown.
    ValueError
        If no solver is named, or a tolerance or `max_iterations` is not positive.
    TypeError
        If `plan` is not a TransportPlan.

    Notes
    -----
    ``"semi_relaxed"``
        The problem itself: ``ot.unbalanced.sinkhorn_unbalanced`` with ``reg_m=(inf, 0)`` and the
        reference measure ``c = diag(a) Pi``, after subtracting each row's maximum.
    ``"balanced"``
        A fixed-point check: ``ot.bregman.sinkhorn_log`` with the plan's own incoming mass as
        target and the cost ``-S - tau log(a pi)``. The plan is right if POT finds the same plan
        *and* a constant target potential; without the second, any reweighting of keys would
        pass.
    ``"linear_programme"``
        The limit of low temperature: ``ot.emd`` with a free target (one more source, of zero
        cost, takes up the slack of targets that could each hold everything). With
        :math:`j^*` the best key of a row, :math:`g` its lead over the runner-up and :math:`V` the
        programme's value, the exact plan satisfies at *every* temperature
        :math:`1 - p_{j^*} \le (1/\pi_{j^*} - 1) e^{-g/\tau}` and
        :math:`0 \le -\langle p, s\rangle - V \le \tau \log(1/\pi_{j^*})`. A violation is a
        disagreement. If the first bound exceeds 1e-6 in some row the temperature is too high
        for the programme to determine the plan, and the check is not applicable.

    References
    ----------
    Litman, arXiv 2508.08369; Flamary et al., POT: Python Optimal Transport, JMLR 22 (2021).

    Examples
    --------
    >>> import torch
    >>> from goatviz.transport.rows import solve_rows
    >>> from goatviz.transport.solvers import cross_check
    >>> check = cross_check(solve_rows(torch.eye(3, dtype=torch.float64)))
    >>> [str(report.verdict) for report in check]
    ['agrees', 'agrees']
    """
    if not isinstance(plan, TransportPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, wanted a TransportPlan")
    names = [solver] if isinstance(solver, str) else list(solver)
    if names == ["all"]:
        names = list(_SOLVERS)
    if not names:
        raise ValueError(f"solver: got none, wanted one of {list(_SOLVERS)}")
    for name in names:
        if name not in _SOLVERS:
            raise KeyError(f"solver: got {name!r}, wanted 'all' or one of {list(_SOLVERS)}")
    double = plan.scores.dtype == torch.float64
    if tolerance is None:
        tolerance = 1e-10 if double else 1e-5
    if marginal_tolerance is None:
        marginal_tolerance = 1e-9 if double else 1e-6
    for name, value in (("tolerance", tolerance), ("marginal_tolerance", marginal_tolerance)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, wanted a positive number")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: got {max_iterations}, wanted at least 1")
    settings = _Settings(tolerance, marginal_tolerance, max_iterations, warm_start)

    reports = []
    for name in names:
        found = [
            _SOLVERS[name](_Rows.of(plan, index), settings)
            for index in itertools.product(*map(range, plan.batch_shape))
        ]
        if not found:
            raise ValueError(f"plan: batch shape {tuple(plan.batch_shape)}, wanted no empty batch")
        reports.append(_worst(found))
    return CrossCheck(tuple(reports), tolerance, math.prod(plan.batch_shape))


@dataclass(frozen=True, eq=False)
class BalancedPlan:
    """A plan with both marginals fixed, from `doubly_stochastic`; float64, without gradients.

    Attributes
    ----------
    weights : Tensor, shape (..., n_queries, n_keys)
        Row-conditional weights ``diag(1 / a) G``.
    coupling : Tensor, shape (..., n_queries, n_keys)
        The plan ``G``, with row sums ``source_mass`` and column sums ``target_mass``.
    source_mass : Tensor, shape (..., n_queries)
    target_mass : Tensor, shape (..., n_keys)
    source_error, target_error : float
        Largest violation of each marginal, relative to the total mass.
    iterations : int
        POT's Sinkhorn iterations, the largest of the batch.
    n_excluded : int
        Allowed entries, over the batch, that no plan with these marginals can use.
    """

    weights: Tensor
    coupling: Tensor
    source_mass: Tensor
    target_mass: Tensor
    source_error: float
    target_error: float
    iterations: int
    n_excluded: int


def doubly_stochastic(
    scores: Tensor | TransportPlan,
    *,
    log_prior: Tensor | None = None,
    temperature: float | None = None,
    mask: Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> BalancedPlan:
    r"""Solve attention with a *uniform target*: balanced entropic transport (Sinkformer).

    .. math::
        \min_{G \ge 0,\; G 1 = a,\; G^\top 1 = \frac{\sum_i a_i}{m} 1} \; -\langle G, S\rangle
            + \tau \, \mathrm{KL}(G \,\|\, \mathrm{diag}(a)\,\Pi)

    through POT's ``ot.bregman.sinkhorn_log``. It is *not* softmax attention, whose target is
    free; the difference between the two plans is what the free target buys.

    Parameters
    ----------
    scores : Tensor of shape (..., n_queries, n_keys), or TransportPlan
        Content scores; or a plan, whose scores, prior, temperature, allowed keys and source mass
        are then used.
    log_prior, mask : Tensor, optional
        As in `solve_rows`; not with a plan.
    temperature : float, optional
        As in `solve_rows`, 1 by default, the same for every query of a batch element; not with a
        plan.
    tolerance : float
        Largest violation of the target marginal, as a Euclidean norm on a total mass of one.
    max_iterations : int
        Limit on Sinkhorn iterations.

    Returns
    -------
    BalancedPlan

    Raises
    ------
    ValueError
        If the allowed keys admit no plan with these marginals, if Sinkhorn does not converge, if
        temperatures differ between queries, or for any fault that `solve_rows` names.
    TypeError
        As in `solve_rows`.

    Notes
    -----
    A mask can leave allowed entries that no feasible plan may use. They are found exactly first
    and left out, since Sinkhorn would otherwise approach their zeros forever. The causal mask is
    the extreme case: the only lower-triangular doubly stochastic matrix is the identity, whatever
    the scores, and that is what comes back.

    References
    ----------
    Litman, arXiv 2508.08369 (one-sided against two-sided transport); Sander et al., Sinkformers,
    AISTATS 2022.

    Examples
    --------
    >>> import torch
    >>> from goatviz.transport.solvers import doubly_stochastic
    >>> balanced = doubly_stochastic(torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
    >>> [round(mass, 6) for mass in balanced.coupling.sum(0).tolist()]
    [0.5, 0.5]
    """
    if isinstance(scores, TransportPlan):
        given = {"log_prior": log_prior, "temperature": temperature, "mask": mask}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{', '.join(extra)}: given beside a plan, which has its own")
        plan = scores
    else:
        plan = solve_rows(
            scores,
            log_prior=log_prior,
            temperature=1.0 if temperature is None else temperature,
            mask=mask,
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance: got {tolerance}, wanted a positive number")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: got {max_iterations}, wanted at least 1")

    couplings, iterations, excluded, errors = [], [0], 0, [(0.0, 0.0)]
    for index in itertools.product(*map(range, plan.batch_shape)):
        rows = _Rows.of(plan, index)
        if np.ptp(rows.temperature) > 0:
            raise ValueError(
                "temperature: differs between queries, wanted one value for a balanced problem"
            )
        n, m = rows.allowed.shape
        target = np.full(m, 1.0 / m)
        usable = _usable(rows.source, target, rows.allowed, index)
        excluded += int((rows.allowed & ~usable).sum())
        cost = np.full((n, m), math.inf)
        # In nats, with each row's maximum at zero: neither changes a balanced plan.
        logits = rows.content + rows.log_prior
        shifted = logits - np.where(usable, logits, -math.inf).max(1, keepdims=True)
        cost[usable] = -shifted[usable]
        answer = _call(
            lambda a=rows.source, b=target, cost=cost: ot.bregman.sinkhorn_log(
                a, b, cost, 1.0, numItermax=max_iterations, stopThr=tolerance, log=True
            )
        )
        if answer.fault is None and not np.isfinite(answer.coupling).all():
            answer.fault = "POT's plan is not finite"
        if answer.fault is not None:
            reached = f"; target error {answer.log['err'][-1]:.1e}" if answer.log else ""
            raise ValueError(
                f"max_iterations: balanced Sinkhorn did not reach tolerance {tolerance:g} in "
                f"{max_iterations} iterations{_at(index)} ({answer.fault}{reached}); wanted "
                "more iterations, a larger tolerance or a larger temperature"
            )
        errors.append(
            (
                float(np.abs(answer.coupling.sum(1) - rows.source).max()),
                float(np.abs(answer.coupling.sum(0) - target).max()),
            )
        )
        iterations.append(answer.log["niter"] + 1)
        couplings.append(answer.coupling)

    source = plan.source_mass.detach().double()
    total = source.sum(-1)
    stacked = np.stack(couplings) if couplings else np.zeros((0, plan.n_queries, plan.n_keys))
    coupling = torch.from_numpy(stacked).reshape(plan.scores.shape).to(source.device)
    coupling = coupling * total[..., None, None]
    return BalancedPlan(
        weights=coupling / source.unsqueeze(-1),
        coupling=coupling,
        source_mass=source,
        target_mass=(total / plan.n_keys).unsqueeze(-1).expand(*plan.batch_shape, plan.n_keys),
        source_error=max(error for error, _ in errors),
        target_error=max(error for _, error in errors),
        iterations=max(iterations),
        n_excluded=excluded,
    )


@dataclass(frozen=True)
class _Settings:
    tolerance: float
    marginal_tolerance: float
    max_iterations: int
    warm_start: bool


@dataclass(frozen=True, eq=False)
class _Rows:
    """One batch element in float64 arrays, its source mass scaled to a total of one."""

    scores: np.ndarray  # row maximum subtracted; zero where not allowed
    content: np.ndarray  # scores / temperature
    log_prior: np.ndarray
    temperature: np.ndarray
    source: np.ndarray
    allowed: np.ndarray
    weights: np.ndarray
    log_weights: np.ndarray
    index: tuple[int, ...]
    epsilon: float

    @classmethod
    def of(cls, plan: TransportPlan, index: tuple[int, ...]) -> _Rows:
        def array(tensor: Tensor) -> np.ndarray:
            return tensor.detach()[index].cpu().double().numpy()

        allowed = plan.allowed[index].cpu().numpy()
        raw = array(plan.scores)
        top = np.where(allowed, raw, -math.inf).max(1, keepdims=True)
        scores = np.where(allowed, raw, top) - top
        temperature = array(plan.temperature)
        source = array(plan.source_mass)
        log_weights = array(plan.log_weights)
        return cls(
            scores=scores,
            content=scores / temperature[:, None],
            log_prior=array(plan.log_prior),
            temperature=temperature,
            source=source / source.sum(),
            allowed=allowed,
            weights=np.exp(log_weights),
            log_weights=log_weights,
            index=index,
            epsilon=torch.finfo(plan.scores.dtype).eps,
        )


@dataclass(eq=False)
class _Answer:
    coupling: np.ndarray | None
    log: dict
    seconds: float
    fault: str | None


def _call(solve: Callable[[], tuple[np.ndarray, dict]]) -> _Answer:
    """Run POT with its warnings caught and read as faults."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            coupling, log = solve()
            fault = None
        except _POT_FAULTS as raised:
            coupling, log, fault = None, {}, f"POT raised {type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - start
    told = [item for item in caught if issubclass(item.category, UserWarning | RuntimeWarning)]
    if fault is None and told:
        fault = "POT warned: " + " ".join(str(told[0].message).split()).split(". ")[0]
    return _Answer(coupling, log, seconds, fault)


def _semi_relaxed(rows: _Rows, settings: _Settings) -> SolverReport:
    reference = rows.source[:, None] * np.exp(rows.log_prior)
    # One temperature is POT's own; several are divided out, since rows do not interact.
    one = np.ptp(rows.temperature) == 0
    reg = float(rows.temperature[0]) if one else 1.0
    cost = -(rows.scores if one else rows.content)
    # A key whose whole kernel column underflows carries no mass in POT's arithmetic, but its
    # zero column sum would make POT give up on all the others.
    seen = (np.exp(-cost / reg) * reference).max(0) > _UNDERFLOW
    fill = np.full(int(seen.sum()), 1.0 / max(int(seen.sum()), 1))
    # Without POT's log: its objective is 0 log 0 = NaN, with a warning, wherever c has a zero.
    answer = _call(
        lambda: (
            ot.unbalanced.sinkhorn_unbalanced(
                rows.source,
                fill,
                np.ascontiguousarray(cost[:, seen]),
                reg,
                (math.inf, 0.0),
                reg_type="kl",
                c=np.ascontiguousarray(reference[:, seen]),
                numItermax=settings.max_iterations,
                stopThr=1e-13,
            ),
            {},
        )
    )
    return _judge("semi_relaxed", rows, settings, answer, seen, None, None)


def _balanced(rows: _Rows, settings: _Settings) -> SolverReport:
    incoming = rows.source @ rows.weights
    seen = incoming > 0
    logits = np.where(rows.allowed, rows.content + rows.log_prior, -math.inf)
    top = logits.max(1, keepdims=True)
    # The cost -S - tau log(a pi) in nats. A constant along a row changes no balanced plan.
    logits = logits - top + np.log(rows.source)[:, None]
    start = None
    if settings.warm_start:
        row_potential = np.log(rows.source) - np.logaddexp.reduce(logits, axis=1)
        start = (row_potential, np.zeros(int(seen.sum())))
    target = incoming[seen] / incoming.sum()
    answer = _call(
        lambda: ot.bregman.sinkhorn_log(
            rows.source,
            target,
            np.ascontiguousarray(-logits[:, seen]),
            1.0,
            numItermax=settings.max_iterations,
            # A float32 plan's incoming mass is rounded: its exact plan may not exist.
            stopThr=min(1e-13 if rows.epsilon < 1e-12 else 1.0, settings.marginal_tolerance / 2),
            warmstart=start,
            log=True,
        )
    )
    iterations = answer.log["niter"] + 1 if "niter" in answer.log else None
    return _judge("balanced", rows, settings, answer, seen, target, iterations)


def _judge(
    name: str,
    rows: _Rows,
    settings: _Settings,
    answer: _Answer,
    seen: np.ndarray,
    target: np.ndarray | None,
    iterations: int | None,
) -> SolverReport:
    """The verdict on an entropic answer of POT, whose columns are the seen keys."""
    failed = SolverReport(
        solver=name,
        verdict=Verdict.SOLVER_FAILED,
        reason=answer.fault or "",
        largest_difference=math.nan,
        source_error=None,
        target_error=None,
        objective_excess=None,
        seconds=answer.seconds,
        iterations=iterations,
        index=rows.index,
    )
    if answer.coupling is None:
        return failed
    if not np.isfinite(answer.coupling).all():
        told = answer.fault or "without a warning"
        return replace(failed, reason=f"POT's plan is not finite ({told})")

    coupling = np.zeros(rows.weights.shape)
    coupling[:, seen] = answer.coupling
    sums = coupling.sum(1)
    weights = coupling / np.where(sums > 0, sums, 1.0)[:, None]
    difference = float(np.abs(weights - rows.weights).max())
    failed = replace(
        failed,
        weights=weights,
        largest_difference=difference,
        source_error=float(np.abs(sums - rows.source).max()),
        target_error=(
            None if target is None else float(np.abs(answer.coupling.sum(0) - target).max())
        ),
    )
    # Relative to each query's own mass, so that a light query cannot hide behind a heavy one.
    source_error = float(np.abs(sums / rows.source - 1).max())
    broken = []
    if source_error > settings.marginal_tolerance:
        broken.append(f"source marginal by {source_error:.1e} of a query's mass")
    if failed.target_error is not None and failed.target_error > settings.marginal_tolerance:
        broken.append(f"target marginal by {failed.target_error:.1e}")
    if broken:
        told = f" ({answer.fault})" if answer.fault else ""
        return replace(failed, reason=f"POT violates its own {' and '.join(broken)}{told}")
    if answer.fault is not None:
        return failed

    if difference > settings.tolerance:
        excess, noise = _excess(weights, rows)
        if target is None:
            # Rows do not interact, so each row that differs has its own winner.
            differs = np.abs(weights - rows.weights).max(1) > settings.tolerance
            lost = np.where(differs, excess - noise, math.inf)
            row = int(lost.argmin())
            excess, lost = float(excess[row]), float(lost[row])
            where = f"query {row}{_at(rows.index)}"
        else:
            excess, lost = float(rows.source @ excess), float(rows.source @ (excess - noise))
            where = f"the whole plan{_at(rows.index)}"
        detail = f"weights differ by {difference:.1e}"
        finite = excess if math.isfinite(excess) else None
        if lost > 0:
            return replace(
                failed,
                objective_excess=finite,
                reason=f"{detail}, but POT's objective is the higher one, by {excess:.1e} nats "
                f"in {where}: POT did not reach its optimum",
            )
        return replace(
            failed,
            verdict=Verdict.DISAGREES,
            objective_excess=finite,
            reason=f"{detail}, and POT's plan is feasible with an objective at least as low "
            f"(difference {excess:.1e} nats in {where})",
        )

    if target is not None:
        potential = answer.log["log_v"] - target @ answer.log["log_v"]
        # Ten tolerances, because POT's potential inherits the differences of all its queries.
        drift = float((rows.weights[:, seen] * np.abs(potential)).max())
        if drift > 10 * settings.tolerance:
            return replace(
                failed,
                verdict=Verdict.DISAGREES,
                reason="POT finds the same plan but needs a target potential that varies between "
                f"keys (by up to {drift:.1e} in weight): keys are reweighted",
            )
    return replace(
        failed,
        verdict=Verdict.AGREES,
        reason=f"weights differ by at most {difference:.1e}, within {settings.tolerance:g}",
    )


def _excess(weights: np.ndarray, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """Objective of other weights minus that of the plan, per row in nats, and its rounding.

    By the Bregman identity f(P) - f(Q) = <grad f(Q), P - Q> + KL(P || Q): the gradient is nearly
    constant along a row if Q is nearly optimal, so that differences of plans far below the
    square root of machine epsilon still have a sign.
    """
    plan = rows.weights
    held = rows.allowed & (plan > 0)
    log_plan = np.where(held, rows.log_weights, 0.0)
    log_prior = np.where(rows.allowed, rows.log_prior, 0.0)
    slope = np.where(held, log_plan - log_prior - rows.content, 0.0)
    level = (plan * slope).sum(1, keepdims=True)
    moved = weights - plan
    ratio = np.where(held, moved, 0.0) / np.where(held, np.maximum(plan, 1e-290), 1.0)
    near = np.abs(ratio) < 1e-3
    small = np.where(near, ratio, 0.0)
    series = plan * small * small * (0.5 - small * (1 / 6 - small * (1 / 12 - small / 20)))
    log_weights = np.log(np.where(weights > 0, weights, 1.0))
    direct = weights * (log_weights - log_plan) - moved
    divergence = np.where(near, series, direct)
    gained = np.where(held, moved * (slope - level) + divergence, 0.0)

    new = rows.allowed & ~held & (weights > 0)
    entered = weights * (log_weights - log_prior - rows.content - level - 1)
    gained = gained + np.where(new, entered, 0.0)
    gained = np.where(~rows.allowed & (weights > 0), math.inf, gained)
    size = 1 + np.abs(log_plan) + np.abs(log_prior) + np.abs(rows.content)
    noise = 8 * rows.epsilon * (np.abs(moved) * np.where(rows.allowed, size, 0.0)).sum(1)
    return gained.sum(1), noise


def _linear_programme(rows: _Rows, settings: _Settings) -> SolverReport:
    n, m = rows.allowed.shape
    width = float(-rows.scores.min())
    # Dearer than any allowed key is dear enough: with the target free, rows are independent.
    cost = np.where(rows.allowed, -rows.scores, 2 * width + 1)
    # Every key can hold the whole mass; the last source fills what the queries leave.
    source = np.append(rows.source, m - 1.0)
    target = np.ones(m)
    answer = _call(
        lambda: ot.emd(
            source,
            target,
            np.vstack([cost, np.zeros((1, m))]),
            numItermax=max(settings.max_iterations, 10_000_000),
            log=True,
        )
    )
    failed = SolverReport(
        solver="linear_programme",
        verdict=Verdict.SOLVER_FAILED,
        reason=answer.fault or "",
        largest_difference=math.nan,
        source_error=None,
        target_error=None,
        objective_excess=None,
        seconds=answer.seconds,
        iterations=None,
        index=rows.index,
    )
    if answer.coupling is None:
        return failed
    if not np.isfinite(answer.coupling).all():
        return replace(failed, reason="POT's plan is not finite")
    coupling = answer.coupling[:n]
    sums = coupling.sum(1)
    weights = coupling / np.where(sums > 0, sums, 1.0)[:, None]
    failed = replace(
        failed,
        largest_difference=float(np.abs(weights - rows.weights).max()),
        source_error=float(np.abs(sums - rows.source).max()),
        target_error=float(np.abs(answer.coupling.sum(0) - target).max() / m),
    )
    if answer.fault is not None:
        return failed
    source_error = float(np.abs(sums / rows.source - 1).max())
    if max(source_error, failed.target_error) > settings.marginal_tolerance:
        return replace(
            failed,
            reason=f"POT violates its own marginals by {source_error:.1e} (source) and "
            f"{failed.target_error:.1e} (target)",
        )
    # With each row's maximum at zero, the best plan on the allowed keys costs exactly nothing.
    loss = (weights * cost).sum(1)
    if loss.max() > 1e-9 * max(width, np.finfo(float).tiny):
        row = int(loss.argmax())
        return replace(
            failed,
            reason=f"POT's plan is {loss[row]:.1e} above the best key of query {row}"
            f"{_at(rows.index)}: POT did not reach its optimum",
        )

    # The best key, and among ties the one the prior favours: its bounds are the sharpest.
    best = np.where(rows.scores == 0, rows.log_prior, -math.inf).argmax(1)
    every = np.arange(n)
    others = rows.allowed.copy()
    others[every, best] = False
    lead = -np.where(others, rows.content, -math.inf).max(1)
    rest = np.where(others, rows.log_prior, -math.inf)
    log_odds = np.logaddexp.reduce(rest, axis=1) - rows.log_prior[every, best]
    lone = ~others.any(1)
    log_bound = np.where(lone, -math.inf, log_odds - np.where(lone, 0.0, lead))
    bound = np.exp(np.minimum(log_bound, 0.0))
    off = np.where(others, rows.weights, 0.0).sum(1)
    surplus = -(rows.weights * rows.content).sum(1)
    allowance = -rows.log_prior[every, best]
    slack = 64 * rows.epsilon + settings.tolerance
    over = np.maximum(off - bound, (surplus - allowance) / (1 + allowance))
    if over.max() > slack:
        row = int(over.argmax())
        return replace(
            failed,
            verdict=Verdict.DISAGREES,
            reason=f"query {row}{_at(rows.index)} leaves {off[row]:.1e} of its mass off the "
            f"programme's key (bound {bound[row]:.1e}) and costs {surplus[row]:.1e} "
            f"temperatures more (bound {allowance[row]:.1e})",
        )
    if bound.max() > _LIMIT_TOLERANCE:
        row = int(bound.argmax())
        return replace(
            failed,
            verdict=Verdict.NOT_APPLICABLE,
            reason="the temperature is too high for the programme to determine the plan: the "
            f"bound on the mass off the best key is {bound[row]:.1e} in query {row}"
            f"{_at(rows.index)}, above {_LIMIT_TOLERANCE:g}",
        )
    return replace(
        failed,
        verdict=Verdict.AGREES,
        reason=f"mass off the best key at most {off.max():.1e} (bound {bound.max():.1e})",
    )


_SOLVERS: dict[str, Callable[[_Rows, _Settings], SolverReport]] = {
    "semi_relaxed": _semi_relaxed,
    "balanced": _balanced,
    "linear_programme": _linear_programme,
}


def _worst(reports: list[SolverReport]) -> SolverReport:
    """The report that matters most, with the seconds and iterations of all."""

    def rank(report: SolverReport) -> tuple[int, float]:
        difference = report.largest_difference
        return (
            _SEVERITY.index(report.verdict),
            -difference if math.isfinite(difference) else -math.inf,
        )

    known = [report.iterations for report in reports if report.iterations is not None]
    return replace(
        min(reports, key=rank),
        seconds=sum(report.seconds for report in reports),
        iterations=max(known) if known else None,
    )


def _usable(
    source: np.ndarray, target: np.ndarray, allowed: np.ndarray, index: tuple[int, ...]
) -> np.ndarray:
    """Allowed entries that some plan with these marginals gives mass to."""
    if allowed.all():
        return allowed
    answer = _call(
        lambda: ot.emd(source, target, np.where(allowed, 0.0, 1.0), numItermax=10_000_000, log=True)
    )
    if answer.fault is not None:
        raise ValueError(f"mask: POT could not decide its feasibility{_at(index)}: {answer.fault}")
    stray = float(answer.coupling[~allowed].sum())
    if stray > 1e-9:
        raise ValueError(
            f"mask: no plan on the allowed keys has a uniform target{_at(index)}, "
            f"{stray:.3g} of the mass has nowhere to go; wanted a mask that admits one"
        )
    # An unused entry can gain mass if its key can push mass back along used entries to its
    # query: a cycle in the residual graph, here folded onto the queries.
    used = allowed & (answer.coupling > 1e-12)
    reach = ((allowed.astype(np.float32) @ used.T.astype(np.float32)) > 0) | np.eye(
        len(source), dtype=bool
    )
    while True:
        further = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        if (further == reach).all():
            break
        reach = further
    # Key j hands mass back to the queries that use it, used[i', j], which must reach query i.
    back = (reach.T.astype(np.float32) @ used.astype(np.float32)) > 0
    return allowed & back


def _at(index: tuple[int, ...]) -> str:
    return f" of batch element {index}" if index else ""
