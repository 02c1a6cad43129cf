"""What independent solvers say about a plan: the verdicts, one solver's report, a whole check."""

from __future__ import annotations

import enum
import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np


class Verdict(enum.StrEnum):
    """What a cross-check can conclude; only a sound answer of POT can disagree."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    SOLVER_FAILED = "solver failed"
    NOT_APPLICABLE = "not applicable"


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
        POT's iterations, the largest of the batch; None where POT does not report them.
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
        parts = [f"{self.solver.replace('_', ' ')} (POT {_pot_version()}): {self.verdict}"]
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
        """The report as plain numbers and text for JSON; NaN and infinities become None."""
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
        verdicts = {report.verdict for report in self.reports}
        order = (Verdict.DISAGREES, Verdict.AGREES, Verdict.SOLVER_FAILED)
        return next((item for item in order if item in verdicts), Verdict.NOT_APPLICABLE)

    @property
    def agrees(self) -> bool:
        """Whether at least one solver agrees and none disagrees."""
        return self.verdict is Verdict.AGREES

    def __getitem__(self, solver: str) -> SolverReport:
        for report in self.reports:
            if report.solver == solver:
                return report
        names = ", ".join(report.solver for report in self.reports)
        raise KeyError(f"solver must be one of {names}; got {solver!r}")

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
            "pot_version": _pot_version(),
            "reports": [report.to_dict() for report in self.reports],
        }


def _pot_version() -> str:
    # From the metadata: importing POT takes a second.
    return importlib.metadata.version("POT")
