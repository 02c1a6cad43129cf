"""The same transport problem through an independent solver: POT, Python Optimal Transport.

``cross_check`` compares a plan with POT's answers and, where they differ, says which of the two is
at fault; ``doubly_stochastic`` solves the balanced problem, whose target is fixed. Closed forms
live in ``goatviz.transport.rows``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.transport import pot
from goatviz.transport.reports import CrossCheck, SolverReport, Verdict
from goatviz.transport.rows import TransportPlan, solve_rows

# From the finding that matters most to the one that matters least.
_SEVERITY = (
    Verdict.DISAGREES,
    Verdict.SOLVER_FAILED,
    Verdict.NOT_APPLICABLE,
    Verdict.AGREES,
)


def cross_check(
    plan: TransportPlan,
    *,
    solver: str | Sequence[str] = ("semi_relaxed", "balanced"),
    tolerance: float | None = None,
    marginal_tolerance: float | None = None,
    max_iterations: int = 10_000,
    warm_start: bool = True,
) -> CrossCheck:
    r"""Solve a plan's problem again with POT, and report whether the two answers agree.

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
    ValueError
        If a solver is unknown or none is named, or a tolerance or `max_iterations` is not
        positive.
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
    checks.instance("plan", plan, TransportPlan, "a TransportPlan")
    names = [solver] if isinstance(solver, str) else list(solver)
    if names == ["all"]:
        names = list(pot.SOLVERS)
    if not names or not set(names) <= set(pot.SOLVERS):
        listed = ", ".join(pot.SOLVERS)
        raise ValueError(f"solver must be 'all' or among {listed}; got {solver!r}")
    double = plan.scores.dtype == torch.float64
    if tolerance is None:
        tolerance = 1e-10 if double else 1e-5
    if marginal_tolerance is None:
        marginal_tolerance = 1e-9 if double else 1e-6
    settings = pot.Settings(
        checks.number("tolerance", tolerance, above=0),
        checks.number("marginal_tolerance", marginal_tolerance, above=0),
        checks.positive_int("max_iterations", max_iterations),
        warm_start,
    )

    if 0 in plan.batch_shape:
        raise ValueError(f"plan must have no empty batch, got shape {tuple(plan.batch_shape)}")
    problems = [
        pot.Rows.of(plan, index) for index in itertools.product(*map(range, plan.batch_shape))
    ]
    reports = [_worst([pot.SOLVERS[name](rows, settings) for rows in problems]) for name in names]
    return CrossCheck(tuple(reports), settings.tolerance, len(problems))


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
    the extreme case: the only lower-triangular doubly stochastic matrix is the identity, which is
    returned whatever the scores.

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
        checks.not_given("a plan", log_prior=log_prior, temperature=temperature, mask=mask)
        plan = scores
    else:
        tau = 1.0 if temperature is None else temperature
        plan = solve_rows(scores, log_prior=log_prior, temperature=tau, mask=mask)
    checks.number("tolerance", tolerance, above=0)
    checks.positive_int("max_iterations", max_iterations)
    solved = [
        _balanced(pot.Rows.of(plan, index), tolerance, max_iterations)
        for index in itertools.product(*map(range, plan.batch_shape))
    ]
    source = plan.source_mass.detach().double()
    total = source.sum(-1)
    couplings = [one.coupling for one in solved]
    stacked = np.stack(couplings) if couplings else np.zeros((0, plan.n_queries, plan.n_keys))
    coupling = torch.from_numpy(stacked).reshape(plan.scores.shape).to(source.device)
    coupling = coupling * total[..., None, None]
    return BalancedPlan(
        weights=coupling / source.unsqueeze(-1),
        coupling=coupling,
        source_mass=source,
        target_mass=(total / plan.n_keys).unsqueeze(-1).expand(*plan.batch_shape, plan.n_keys),
        source_error=max((one.source_error for one in solved), default=0.0),
        target_error=max((one.target_error for one in solved), default=0.0),
        iterations=max((one.iterations for one in solved), default=0),
        n_excluded=sum(one.n_excluded for one in solved),
    )


class _Balanced(NamedTuple):
    """The balanced plan of one batch element, on a total mass of one."""

    coupling: np.ndarray
    source_error: float
    target_error: float
    iterations: int
    n_excluded: int


def _balanced(rows: pot.Rows, tolerance: float, max_iterations: int) -> _Balanced:
    if np.ptp(rows.temperature) > 0:
        raise ValueError(
            "temperature must be the same for every query of a balanced problem, got "
            f"{rows.temperature.min():g} to {rows.temperature.max():g}"
        )
    n, m = rows.allowed.shape
    target = np.full(m, 1.0 / m)
    usable = _usable(rows.source, target, rows.allowed, rows.index)
    cost = np.full((n, m), math.inf)
    # In nats, with each row's maximum at zero: neither changes a balanced plan.
    logits = rows.content + rows.log_prior
    shifted = logits - np.where(usable, logits, -math.inf).max(1, keepdims=True)
    cost[usable] = -shifted[usable]
    answer = pot.call(
        lambda ot: ot.bregman.sinkhorn_log(
            rows.source, target, cost, 1.0, numItermax=max_iterations, stopThr=tolerance, log=True
        )
    )
    if answer.fault is None and not np.isfinite(answer.coupling).all():
        answer.fault = "POT's plan is not finite"
    if answer.fault is not None:
        reached = f"; target error {answer.log['err'][-1]:.1e}" if answer.log else ""
        raise ValueError(
            f"max_iterations must suffice for tolerance {tolerance:g}, got {max_iterations}: "
            f"balanced Sinkhorn did not converge{pot.at(rows.index)} ({answer.fault}{reached}); "
            "allow more iterations, a larger tolerance or a larger temperature"
        )
    return _Balanced(
        answer.coupling,
        float(np.abs(answer.coupling.sum(1) - rows.source).max()),
        float(np.abs(answer.coupling.sum(0) - target).max()),
        answer.log["niter"] + 1,
        int((rows.allowed & ~usable).sum()),
    )


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
    answer = pot.call(
        lambda ot: ot.emd(
            source, target, np.where(allowed, 0.0, 1.0), numItermax=10_000_000, log=True
        )
    )
    if answer.fault is not None:
        raise ValueError(
            "mask must admit a plan with a uniform target, and POT could not decide "
            f"it{pot.at(index)}: {answer.fault}"
        )
    stray = float(answer.coupling[~allowed].sum())
    if stray > 1e-9:
        raise ValueError(
            f"mask must admit a plan with a uniform target, got one{pot.at(index)} where "
            f"{stray:.3g} of the mass has nowhere to go"
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
