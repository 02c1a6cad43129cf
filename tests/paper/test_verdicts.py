"""The arithmetic of verdicts, on made-up numbers at the edges of their limits."""

import math

import pytest

from goatviz.paper import Criterion, Measured, judge

AT_LEAST = Criterion("share", "at least", 0.95)
BELOW = Criterion("loss", "below", 0.0, "nats")


def both(value, low, high, seed_low=None, seed_high=None):
    seeds = (low, high) if seed_low is None else (seed_low, seed_high)
    return Measured(value, low, high, "10 pieces", *seeds, seeds=3)


@pytest.mark.parametrize(
    ("limit", "measured", "outcome"),
    [
        (AT_LEAST, both(0.97, 0.95, 0.99), "holds"),
        (AT_LEAST, both(0.97, 0.9499, 0.99), "open"),
        (AT_LEAST, both(0.97, 0.96, 0.98, 0.5, 1.0), "open"),
        (AT_LEAST, both(0.90, 0.80, 0.96), "open"),
        (AT_LEAST, both(0.90, 0.80, 0.9499), "fails"),
        (AT_LEAST, both(0.90, 0.80, 0.95), "open"),
        (BELOW, both(-0.1, -0.2, -1e-9), "holds"),
        # Below is strict: an interval that ends in the limit does not lie below it.
        (BELOW, both(-0.1, -0.2, 0.0), "open"),
        (BELOW, both(0.1, 0.0, 0.2), "fails"),
        (Criterion("", "above", 0.0), both(0.1, 0.0, 0.2), "open"),
        (Criterion("", "at most", 0.0), both(-0.1, -0.2, 0.0), "holds"),
        # One interval is enough if it is the only one; none is enough for what was not sampled.
        (BELOW, Measured(-0.1, -0.2, -0.05, "3 pieces"), "holds"),
        (BELOW, Measured(-0.1, seed_low=-0.2, seed_high=-0.05, seeds=3), "holds"),
        (BELOW, Measured(-0.1), "open"),
        (BELOW, Measured(0.1), "open"),
        (BELOW, Measured(-0.1, exact=True), "holds"),
        (BELOW, Measured(0.0, exact=True), "fails"),
    ],
)
def test_a_number_holds_only_with_all_of_its_intervals(limit, measured, outcome):
    assert limit.outcome(measured) == outcome


HOLDS, CROSSES = both(-1, -2, -0.5), both(-1, -2, 0.5)
WRONG, WRONG_CROSSES = both(1, 0.5, 2), both(1, -0.5, 2)


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ([HOLDS, HOLDS], "reproduced"),
        ([HOLDS, CROSSES], "partly"),
        ([HOLDS, WRONG], "partly"),
        ([CROSSES, CROSSES], "partly"),
        ([CROSSES, WRONG], "partly"),
        ([WRONG, WRONG], "not reproduced"),
        # What lies on the wrong side supports nothing, however wide its interval.
        ([WRONG_CROSSES, WRONG_CROSSES], "not reproduced"),
        ([HOLDS, Measured(math.nan)], "not tested"),
        ([HOLDS, Measured(math.inf, exact=True)], "not tested"),
        ([], "not tested"),
    ],
)
def test_verdicts(measured, verdict):
    assert judge([BELOW, BELOW], measured) == verdict


def test_every_number_has_its_limit():
    with pytest.raises(ValueError, match="measured must hold 2 numbers, got 1"):
        judge([BELOW, BELOW], [HOLDS])


def test_a_limit_is_read_as_a_sentence():
    assert str(BELOW) == "loss: below 0 nats"
    assert BELOW.text(math.nan) == "" and BELOW.text(-0.25) == "-0.250"
