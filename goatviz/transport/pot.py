"""One plan's problem as POT solves it, and the verdict on POT's answer.

POT is not taken on trust: if its answer is not finite, violates its own marginals, came with a
warning, or has a higher objective than the plan, that is reported as a failure of the solver.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from goatviz.transport.reports import SolverReport, Verdict
from goatviz.transport.rows import TransportPlan

# Bound on the mass that the temperature may leave off the best key for the linear programme to
# count as the plan's limit.
_LIMIT_TOLERANCE = 1e-6

# Kernel entries below this can vanish once POT multiplies them by a scaling smaller than one.
_UNDERFLOW = 1e-290

# What POT's functions are known to raise on degenerate data; anything else is our own fault.
_POT_FAULTS = (ArithmeticError, AssertionError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Settings:
    tolerance: float
    marginal_tolerance: float
    max_iterations: int
    warm_start: bool


@dataclass(frozen=True, eq=False)
class Rows:
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
    def of(cls, plan: TransportPlan, index: tuple[int, ...]) -> Rows:
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
class Answer:
    coupling: np.ndarray | None
    log: dict
    seconds: float
    fault: str | None


def call(solve: Callable[[ModuleType], tuple[np.ndarray, dict]]) -> Answer:
    """Call solve(ot), with POT's warnings caught and counted as faults."""
    # Here and not at the top: POT takes a second to import, and most processes never need it.
    import ot

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            coupling, log = solve(ot)
            fault = None
        except _POT_FAULTS as raised:
            coupling, log, fault = None, {}, f"POT raised {type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - start
    warned = [item for item in caught if issubclass(item.category, UserWarning | RuntimeWarning)]
    if fault is None and warned:
        fault = "POT warned: " + " ".join(str(warned[0].message).split()).split(". ")[0]
    return Answer(coupling, log, seconds, fault)


def semi_relaxed(rows: Rows, settings: Settings) -> SolverReport:
    reference = rows.source[:, None] * np.exp(rows.log_prior)
    # A single temperature is POT's `reg`; several are divided out, since rows do not interact.
    one = np.ptp(rows.temperature) == 0
    reg = float(rows.temperature[0]) if one else 1.0
    cost = -(rows.scores if one else rows.content)
    # A key whose whole kernel column underflows carries no mass in POT's arithmetic, but its
    # zero column sum would make POT give up on all the others.
    seen = (np.exp(-cost / reg) * reference).max(0) > _UNDERFLOW
    fill = np.full(int(seen.sum()), 1.0 / max(int(seen.sum()), 1))
    # Without POT's log: its objective is 0 log 0 = NaN, with a warning, wherever c has a zero.
    answer = call(
        lambda ot: (
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
    return _judge("semi_relaxed", rows, settings, answer, seen, None)


def balanced(rows: Rows, settings: Settings) -> SolverReport:
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
    answer = call(
        lambda ot: ot.bregman.sinkhorn_log(
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
    return _judge("balanced", rows, settings, answer, seen, target)


def _judge(
    name: str,
    rows: Rows,
    settings: Settings,
    answer: Answer,
    seen: np.ndarray,
    target: np.ndarray | None,
) -> SolverReport:
    """The verdict on an entropic answer of POT, whose columns are the seen keys."""
    failed = _failure(name, rows, answer)
    if answer.coupling is None:
        return failed
    if not np.isfinite(answer.coupling).all():
        warned = answer.fault or "without a warning"
        return replace(failed, reason=f"POT's plan is not finite ({warned})")

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
        warned = f" ({answer.fault})" if answer.fault else ""
        return replace(failed, reason=f"POT violates its own {' and '.join(broken)}{warned}")
    if answer.fault is not None:
        return failed
    if difference > settings.tolerance:
        return _dispute(failed, rows, settings, decoupled=target is None)
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


def _failure(name: str, rows: Rows, answer: Answer) -> SolverReport:
    """A report of failure, which later checks refine."""
    return SolverReport(
        solver=name,
        verdict=Verdict.SOLVER_FAILED,
        reason=answer.fault or "",
        largest_difference=math.nan,
        source_error=None,
        target_error=None,
        objective_excess=None,
        seconds=answer.seconds,
        iterations=answer.log["niter"] + 1 if "niter" in answer.log else None,
        index=rows.index,
    )


def _dispute(
    report: SolverReport, rows: Rows, settings: Settings, *, decoupled: bool
) -> SolverReport:
    """Decide between the plan and POT's sound but different one by their objectives."""
    excess, noise = _excess(report.weights, rows)
    if decoupled:
        # Rows do not interact, so each row that differs has its own winner.
        differs = np.abs(report.weights - rows.weights).max(1) > settings.tolerance
        lost = np.where(differs, excess - noise, math.inf)
        row = int(lost.argmin())
        excess, lost = float(excess[row]), float(lost[row])
        where = f"query {row}{at(rows.index)}"
    else:
        excess, lost = float(rows.source @ excess), float(rows.source @ (excess - noise))
        where = f"the whole plan{at(rows.index)}"
    detail = f"weights differ by {report.largest_difference:.1e}"
    finite = excess if math.isfinite(excess) else None
    if lost > 0:
        return replace(
            report,
            objective_excess=finite,
            reason=f"{detail}, but POT's objective is the higher one, by {excess:.1e} nats "
            f"in {where}: POT did not reach its optimum",
        )
    return replace(
        report,
        verdict=Verdict.DISAGREES,
        objective_excess=finite,
        reason=f"{detail}, and POT's plan is feasible with an objective at least as low "
        f"(difference {excess:.1e} nats in {where})",
    )


def _excess(weights: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
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


def linear_programme(rows: Rows, settings: Settings) -> SolverReport:
    n, m = rows.allowed.shape
    width = float(-rows.scores.min())
    # Any cost above the allowed keys' will do: with a free target, rows are independent.
    cost = np.where(rows.allowed, -rows.scores, 2 * width + 1)
    # Every key can hold the whole mass; the last source supplies what the queries do not.
    source = np.append(rows.source, m - 1.0)
    target = np.ones(m)
    answer = call(
        lambda ot: ot.emd(
            source,
            target,
            np.vstack([cost, np.zeros((1, m))]),
            numItermax=max(settings.max_iterations, 10_000_000),
            log=True,
        )
    )
    failed = _failure("linear_programme", rows, answer)
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
            f"{at(rows.index)}: POT did not reach its optimum",
        )

    return _compare_with_limit(failed, rows, settings)


def _compare_with_limit(report: SolverReport, rows: Rows, settings: Settings) -> SolverReport:
    """Check the bounds between plan and programme that hold at any temperature."""
    # The best key, and among ties the one the prior favours: its bounds are the sharpest.
    best = np.where(rows.scores == 0, rows.log_prior, -math.inf).argmax(1)
    every = np.arange(len(rows.source))
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
            report,
            verdict=Verdict.DISAGREES,
            reason=f"query {row}{at(rows.index)} leaves {off[row]:.1e} of its mass off the "
            f"programme's key (bound {bound[row]:.1e}) and costs {surplus[row]:.1e} "
            f"temperatures more (bound {allowance[row]:.1e})",
        )
    if bound.max() > _LIMIT_TOLERANCE:
        row = int(bound.argmax())
        return replace(
            report,
            verdict=Verdict.NOT_APPLICABLE,
            reason="the temperature is too high for the programme to determine the plan: the "
            f"bound on the mass off the best key is {bound[row]:.1e} in query {row}"
            f"{at(rows.index)}, above {_LIMIT_TOLERANCE:g}",
        )
    return replace(
        report,
        verdict=Verdict.AGREES,
        reason=f"mass off the best key at most {off.max():.1e} (bound {bound.max():.1e})",
    )


def at(index: tuple[int, ...]) -> str:
    return f" of batch element {index}" if index else ""


SOLVERS: dict[str, Callable[[Rows, Settings], SolverReport]] = {
    "semi_relaxed": semi_relaxed,
    "balanced": balanced,
    "linear_programme": linear_programme,
}
