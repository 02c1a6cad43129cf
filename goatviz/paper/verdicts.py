"""How a claim is judged: limits, numbers with intervals, and the verdict that follows from them.

Nothing here knows any claim. A number counts for a claim only if its value and every interval of it
lie on the claimed side of the limit; a sampled number without any interval never does.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class Verdict(enum.StrEnum):
    """What can be said of a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTED = "not tested"


class Outcome(enum.StrEnum):
    """What one number says of one limit; open: an interval crosses the limit, or there is none."""

    HOLDS = "holds"
    OPEN = "open"
    FAILS = "fails"


@dataclass(frozen=True)
class Measured:
    """A number that decides, with its intervals.

    Attributes
    ----------
    value : float
        The number.
    low, high : float
        95 % interval over examples; NaN without one.
    over : str
        Number and kind of these examples, such as "12 pieces".
    seed_low, seed_high : float
        95 % interval over training seeds; NaN without one.
    seeds : int
        Number of training seeds; 0 if nothing was trained.
    exact : bool
        Whether the number is computed from given weights or formulas without sampling.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""
    seed_low: float = math.nan
    seed_high: float = math.nan
    seeds: int = 1
    exact: bool = False

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The intervals that are known."""
        both = ((self.low, self.high), (self.seed_low, self.seed_high))
        return [ends for ends in both if all(map(math.isfinite, ends))]


_SIDES = {
    "below": lambda value, limit: value < limit,
    "at most": lambda value, limit: value <= limit,
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
}


@dataclass(frozen=True)
class Criterion:
    """A limit for one number.

    Attributes
    ----------
    name : str
        What the number is.
    side : {"below", "at most", "at least", "above"}
        Where it must lie.
    limit : float
        The limit.
    unit : str
        Unit of both; "" for a share or a count.
    digits : str
        Format of the number.

    Examples
    --------
    >>> str(Criterion("whole answers right at 16 x", "at least", 0.95))
    'whole answers right at 16 x: at least 0.95'
    """

    name: str
    side: Literal["below", "at most", "at least", "above"]
    limit: float
    unit: str = ""
    digits: str = ".3f"

    def __str__(self) -> str:
        return f"{self.name}: {self.side} {self.limit:.4g} {self.unit}".rstrip()

    def holds(self, value: float) -> bool:
        """Whether a value lies on the claimed side."""
        return _SIDES[self.side](value, self.limit)

    def outcome(self, measured: Measured) -> Outcome:
        """What a number says.

        Examples
        --------
        >>> limit = Criterion("share", "at least", 0.9)
        >>> limit.outcome(Measured(0.95, low=0.92, high=0.97)).value
        'holds'
        >>> limit.outcome(Measured(0.95, low=0.88, high=0.97)).value
        'open'
        """
        sides = {self.holds(end) for ends in measured.intervals for end in ends}
        if not measured.exact and not sides:
            return Outcome.OPEN
        sides.add(self.holds(measured.value))
        if len(sides) > 1:
            return Outcome.OPEN
        return Outcome.HOLDS if sides.pop() else Outcome.FAILS

    def text(self, value: float) -> str:
        """A value in the format of this criterion, or "" if it is not finite."""
        return f"{value:{self.digits}}" if math.isfinite(value) else ""


def judge(rule: Sequence[Criterion], measured: Sequence[Measured]) -> Verdict:
    """The verdict of a rule on its numbers.

    Reproduced if every number holds; not reproduced if none lies on the claimed side; partly if
    some do, or if an interval of one that does crosses its limit; not tested without numbers.

    Parameters
    ----------
    rule : sequence of Criterion
        One criterion for each number.
    measured : sequence of Measured
        The numbers; none, or a value that is not finite, leaves the claim untested.

    Raises
    ------
    ValueError
        If there are numbers, and not one for each criterion.

    Examples
    --------
    >>> rule = [Criterion("loss", "below", 0.0, "nats")]
    >>> judge(rule, [Measured(-0.1, low=-0.2, high=-0.05)]).value
    'reproduced'
    >>> judge(rule, [Measured(-0.1, low=-0.2, high=0.05)]).value
    'partly'
    >>> judge(rule, []).value
    'not tested'
    """
    if measured and len(measured) != len(rule):
        raise ValueError(f"measured must hold {len(rule)} numbers, got {len(measured)}")
    if not measured or not all(math.isfinite(one.value) for one in measured):
        return Verdict.NOT_TESTED
    pairs = list(zip(rule, measured, strict=True))
    if all(limit.outcome(one) is Outcome.HOLDS for limit, one in pairs):
        return Verdict.REPRODUCED
    if any(limit.holds(one.value) for limit, one in pairs):
        return Verdict.PARTLY
    return Verdict.NOT_REPRODUCED
