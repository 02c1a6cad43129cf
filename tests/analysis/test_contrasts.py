"""Contrasts: the same numbers as the results they come from, with intervals over runs apart."""

import numpy as np
import pytest
from scipy import stats

from goatviz.analysis import loss_difference
from goatviz.analysis.contrasts import loss_contrast, share_contrast
from goatviz.analysis.intervals import difference_interval, student_interval, wilson_interval
from goatviz.results import load_shipped_result


@pytest.mark.parametrize("name", ["text-eltec", "dna-sweep"])
def test_a_difference_of_schemes_is_the_paired_one(name):
    sweep = load_shipped_result(name)
    length = int(sweep["length"][2])
    paired = loss_difference(sweep, "rope").sel(scheme="goat", length=length)
    found = loss_contrast(sweep, "goat", length, less="rope")
    wanted = [float(paired[f"difference{end}"]) for end in ("", "_low", "_high")]
    np.testing.assert_allclose(found[:3], wanted)
    assert (found.examples, found.seeds) == (sweep.sizes["piece"], sweep.sizes["run"])


def test_a_difference_of_lengths_over_runs_is_students():
    sweep = load_shipped_result("text-eltec")
    found = loss_contrast(sweep, "rope", 4096, at=256)
    runs = sweep["run_loss"].sel(scheme="rope")
    apart = (runs.sel(length=4096) - runs.sel(length=256)).values
    freedom = len(apart) - 1
    wanted = stats.t.interval(0.95, freedom, loc=apart.mean(), scale=stats.sem(apart))
    np.testing.assert_allclose((found.seed_low, found.seed_high), wanted)
    assert found.value == pytest.approx(apart.mean())


def test_shares_keep_their_interval_and_stay_shares():
    sweep = load_shipped_result("passkey-sweep")
    one = sweep.sel(scheme="goat", length=512)
    found = share_contrast(sweep, "goat", 512)
    wanted = [float(one[f"mean_strict{end}"]) for end in ("", "_low", "_high")]
    np.testing.assert_allclose(found[:3], wanted)
    assert 0 <= found.seed_low < found.value < found.seed_high == 1
    apart = share_contrast(sweep, "goat", 512, less="alibi", measure="token")
    runs = sweep["token"].sel(length=512)
    assert apart.value == pytest.approx(
        float((runs.sel(scheme="goat") - runs.sel(scheme="alibi")).mean())
    )
    assert apart.low < apart.value < apart.high and apart.examples == 1280


def test_newcombe_is_known_from_his_paper():
    # Newcombe 1998 (Statistics in Medicine 17, 873), example a, method 10: 56/70 less 48/80.
    shares = []
    for right, count in ((56, 70), (48, 80)):
        low, high = wilson_interval(right, count)
        shares.append((right / count, float(low), float(high)))
    low, high = difference_interval(*shares)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_students_interval_needs_two_values():
    assert np.isnan(student_interval(np.array([1.0]))).all()
    assert student_interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0)
    low, high = student_interval(np.array([0.0, 1.0]))
    assert (low, high) == pytest.approx((0.5 - 12.706 / 2, 0.5 + 12.706 / 2), abs=1e-3)


def test_what_is_not_there_is_named():
    novels = load_shipped_result("text-eltec")
    with pytest.raises(ValueError, match="scheme must be one of goat, .* got 'colour'"):
        loss_contrast(novels, "colour", 256)
    with pytest.raises(ValueError, match="at must be one of 256, .* got 300"):
        loss_contrast(novels, "goat", 256, at=300)
    with pytest.raises(ValueError, match="less must be one of"):
        share_contrast(load_shipped_result("passkey-sweep"), "goat", 64, less="colour")
    with pytest.raises(TypeError, match="length_sweep"):
        share_contrast(load_shipped_result("text-eltec"), "goat", 256)
