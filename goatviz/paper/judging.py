"""A claim as data, a claim with its verdict, and both as text. No claim is made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from goatviz.paper.evidence import Evidence
from goatviz.paper.exhibit import scale_text
from goatviz.paper.verdicts import Criterion, Measured, Outcome, Verdict, judge

#: What is said in place of a value of the paper.
UNKNOWN = "its value is not known here"


@dataclass(frozen=True)
class Claim:
    """A claim, and the rule that judges it.

    Attributes
    ----------
    slug : str
        Name and anchor.
    words : str
        The claim in one sentence.
    place : str
        Where the paper makes it, or who does.
    paper_scale : str
        Key of `PAPER_SCALES`.
    paper_value : str
        The paper's number, where it is known here.
    figure : str
        Slug of the exhibit that shows the numbers; "" for none.
    reads : tuple of str
        Names of the shipped results and weights behind the numbers; the first tells our scale.
    rule : tuple of Criterion
        One limit for each number.
    measure : callable, optional
        Numbers from the evidence; None for a claim that is not tested.
    note : str
        What the numbers do not say, or why nothing is tested.
    beside : bool
        True for evidence beside the paper's claims.
    scale : str
        Our scale, where no checkpoint tells it.
    """

    slug: str
    words: str
    place: str
    paper_scale: str
    paper_value: str = UNKNOWN
    figure: str = ""
    reads: tuple[str, ...] = ()
    rule: tuple[Criterion, ...] = ()
    measure: Callable[[Evidence], list[Measured]] | None = None
    note: str = ""
    beside: bool = False
    scale: str = "nothing was trained"


class Number(NamedTuple):
    """A number that decides, as text: its limit, value, intervals, count, and what it says."""

    limit: str
    value: str
    intervals: list[str]
    count: str
    outcome: str


@dataclass(frozen=True)
class Judged:
    """A claim with its numbers and verdict.

    Attributes
    ----------
    claim : Claim
        The claim.
    measured : tuple of Measured
        Its numbers, in the order of the rule.
    verdict : Verdict
        What follows from them.
    scale : str
        Scale of our models.
    """

    claim: Claim
    measured: tuple[Measured, ...]
    verdict: Verdict
    scale: str

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What each number says of its limit."""
        pairs = zip(self.claim.rule, self.measured, strict=True)
        return tuple(limit.outcome(one) for limit, one in pairs) if self.measured else ()

    def numbers(self) -> list[Number]:
        """Each number as text, in the order of the rule."""
        if not self.measured:
            return []
        rows = zip(self.claim.rule, self.measured, self.outcomes, strict=True)
        return [
            Number(
                str(limit),
                f"{limit.text(one.value)} {limit.unit}".rstrip(),
                _intervals(limit, one),
                _counts(one),
                outcome.value,
            )
            for limit, one, outcome in rows
        ]


def judged_by(claim: Claim, evidence: Evidence) -> Judged:
    """A claim with the numbers that its measure takes from the evidence, and its verdict."""
    measured = claim.measure(evidence) if claim.measure else []
    scale = scale_text(evidence.checkpoint(claim.reads[0])) if claim.reads else claim.scale
    return Judged(claim, tuple(measured), judge(claim.rule, measured), scale)


def counts_text(judged: Sequence[Judged]) -> str:
    """How many claims have each verdict.

    Examples
    --------
    >>> from goatviz.paper.claims import claim_named, judge_claims
    >>> counts_text(judge_claims(claims=[claim_named("goat-flat")]))
    '1 reproduced'
    """
    counts = {verdict: sum(one.verdict is verdict for one in judged) for verdict in Verdict}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def claims_text(judged: Sequence[Judged]) -> str:
    """Verdicts as lines of text: verdict, how many limits hold, and the claim.

    Examples
    --------
    >>> from goatviz.paper.claims import claim_named, judge_claims
    >>> print(claims_text(judge_claims(claims=[claim_named("goat-flat")])))
    reproduced       2 of 2  GOAT's perplexity stays flat to 16 times the training length.
    """
    lines = []
    for one in judged:
        hold = sum(outcome is Outcome.HOLDS for outcome in one.outcomes)
        limits = f"{hold} of {len(one.measured)}" if one.measured else ""
        lines.append(f"{one.verdict:<16} {limits:<6}  {one.claim.words}")
    return "\n".join(lines)


def _intervals(limit: Criterion, one: Measured) -> list[str]:
    """The intervals that are known, as text."""
    parts = []
    for what, *ends in (("examples", one.low, one.high), ("seeds", one.seed_low, one.seed_high)):
        low, high = map(limit.text, ends)
        if low and high:
            parts.append(f"{what} [{low}, {high}]")
    return parts


def _counts(one: Measured) -> str:
    seeds = "one seed" if one.seeds == 1 else f"{one.seeds} seeds"
    parts = [one.over or ("exact" if one.exact else "no interval is known")]
    return "; ".join([*parts, seeds] if one.seeds else parts)
