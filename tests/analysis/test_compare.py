"""Differences of plans against their dense weights."""

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis.compare import PlanDifference, comparison_text
from goatviz.analysis.levels import PlanLevels
from goatviz.transport import AttentionCall, Hide, SinkColumn
from goatviz.transport.changes import changed_call
from tests.factories import ids, tiny_lm

LENGTH = 90


@pytest.fixture(scope="module")
def calls():
    model = tiny_lm()
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(ids(1, LENGTH))
    return record.calls


def dense(levels):
    """Weights with NaN where a pair is forbidden, float64."""
    plan = levels.call.projections.plan(levels.batch, levels.head)
    return torch.where(plan.allowed, plan.weights, torch.nan).numpy()


def levels_of(captured, call, **options):
    return PlanLevels(type(captured)(captured.layer, captured.name, call), **options)


@pytest.fixture(scope="module")
def pair(calls):
    """A plan, and one that hides keys and has a column that takes mass."""
    one = PlanLevels(calls[1], head=1)
    changed = changed_call(calls[1].call, 0, 1, [Hide([0, 5]), SinkColumn(1.0)])
    return one, levels_of(calls[1], changed)


def difference_of(one, other):
    a, b = dense(one), dense(other)
    both = np.isnan(a) & np.isnan(b)
    return np.where(both, np.nan, np.nan_to_num(a) - np.nan_to_num(b))


def test_exact_cells_are_differences_of_exact_weights(pair):
    wanted = difference_of(*pair)
    view = PlanDifference(*pair).view((10, 60), (3, 80))
    np.testing.assert_allclose(view.weights, wanted[10:60, 3:80], atol=1e-6)
    assert view.exact and view.rule == "every query; every key"
    for query, key in ((50, 0), (50, 5), (50, 20), (20, 50)):
        cell = PlanDifference(*pair).cell(query, key)
        assert cell.allowed == (key <= query)
        assert cell.difference == pytest.approx(np.nan_to_num(wanted[query, key]), abs=1e-7)
        assert cell.difference == cell.weight - cell.other


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_pooled_cells_are_pooled_exact_differences(pair, pool, monkeypatch):
    wanted = difference_of(*pair)
    for block in (2**20, 400):
        monkeypatch.setattr("goatviz.analysis.compare._BLOCK", block)
        view = PlanDifference(*pair).view((0, LENGTH), (0, LENGTH), rows=30, columns=9, pool=pool)
        assert view.weights.shape == (30, 9)
        for row, query in enumerate(view.queries):
            for column, (start, stop) in enumerate(
                zip(view.key_edges, view.key_edges[1:], strict=False)
            ):
                values = wanted[query, start:stop]
                values = values[np.isfinite(values)]
                found = view.weights[row, column]
                if not len(values):
                    assert np.isnan(found)
                    continue
                best = values[np.abs(values).argmax()] if pool == "max" else values.mean()
                assert found == pytest.approx(best, abs=1e-6)
    what = "the largest difference, by magnitude," if pool == "max" else "the mean difference"
    assert view.rule == f"30 of 90 queries; keys: {what} of 10"


def test_a_view_without_the_sink_is_of_normalised_rows(pair):
    view = PlanDifference(*pair).view((0, LENGTH), (0, LENGTH), without=[0])
    parts = [each.view((0, LENGTH), (0, LENGTH), without=[0]).weights for each in pair]
    both = np.isnan(parts[0]) & np.isnan(parts[1])
    wanted = np.where(both, np.nan, np.nan_to_num(parts[0]) - np.nan_to_num(parts[1]))
    np.testing.assert_allclose(view.weights, wanted, atol=1e-6)
    assert view.rule.endswith("; without key 0: each row normalised over the others")


def test_distances_are_those_of_rows(pair, monkeypatch):
    wanted = np.nan_to_num(difference_of(*pair))
    # What is on no key is one more entry.
    rows = [np.nan_to_num(dense(each)).sum(1) for each in pair]
    variation = (np.abs(wanted).sum(1) + np.abs(rows[0] - rows[1])) / 2
    difference = PlanDifference(*pair)
    far = difference.distance()
    np.testing.assert_allclose(far.variation, variation, atol=1e-5)
    assert far.mean == pytest.approx(variation.mean(), abs=1e-6)
    at = np.unravel_index(np.abs(wanted).argmax(), wanted.shape)
    assert abs(far.largest) == pytest.approx(abs(wanted[at]), abs=1e-6)
    assert wanted[far.query, far.key] == pytest.approx(far.largest, abs=1e-6)
    assert difference.variation(40) == pytest.approx(variation[40], abs=1e-6)
    text = comparison_text(difference, 40)
    assert f"{far.mean:.3g} on average over all queries" in text
    assert f"largest difference {far.largest:+.3g}, query {far.query}, key {far.key}." in text
    monkeypatch.setattr("goatviz.analysis.compare.MOST_ROWS", 7)
    few = PlanDifference(*pair)
    assert few.distance().queries.tolist() == np.linspace(0, 89, 7).round().astype(int).tolist()
    np.testing.assert_allclose(
        few.distance().variation, variation[few.distance().queries], atol=1e-5
    )
    assert "over 7 of 90 queries" in comparison_text(few, 40)


def test_a_plan_is_at_no_distance_from_itself(calls):
    one = PlanLevels(calls[0])
    same = PlanDifference(one, PlanLevels(calls[0]))
    assert same.distance().mean == same.distance().largest == 0.0
    assert comparison_text(same, 3).startswith("Both plans give the same weights")


def test_bad_input(calls):
    one = PlanLevels(calls[0])
    q = torch.zeros(1, 1, 12, 4)
    short = levels_of(calls[0], AttentionCall.from_tensors(q, q))
    with pytest.raises(ValueError, match="other must have 90 queries and 90 keys .* got 12 and 12"):
        PlanDifference(one, short)
    with pytest.raises(TypeError, match="other must be a PlanLevels"):
        PlanDifference(one, calls[0])
    with pytest.raises(ValueError, match="pool must be one of max, mean"):
        PlanDifference(one, one).view((0, 9), (0, 9), pool="sum")
    with pytest.raises(ValueError, match="queries must be a non-empty window"):
        PlanDifference(one, one).view((9, 9), (0, 9))
