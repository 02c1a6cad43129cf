"""Views of a plan at any zoom are its cells, pooled by the rule they state."""

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis.levels import PlanLevels
from goatviz.attention import Attention
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior

LENGTH = 70


def captured(prior=None, *, length=LENGTH, heads=4, kv_heads=2, seed=0, **keep):
    torch.manual_seed(seed)
    layer = Attention(32, heads, num_kv_heads=kv_heads, prior=prior).eval()
    options = {"statistics": (), "keep": "projections", **keep}
    with capture(layer, **options) as record, torch.no_grad():
        layer(3 * torch.randn(2, length, 32))
    return record


def priors():
    learned = goat_prior(2, rank=3, sink_rank=2, training_length=32)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter)
    return {"none": None, "goat": learned, "alibi": ALiBiPrior(2), "bucket": BucketPrior(2)}


@pytest.mark.parametrize("name", ["none", "goat", "alibi", "bucket"])
def test_with_room_for_all_a_view_is_the_plan(name):
    record = captured(priors()[name])
    for head, batch in ((0, 0), (3, 1)):
        whole = record.plan(head=head, batch=batch)
        view = PlanLevels(record.calls[0], head=head, batch=batch).view((0, LENGTH), (0, LENGTH))
        assert view.exact and view.rule == "every query; every key"
        wanted = np.where(whole.allowed, whole.weights, np.nan)
        np.testing.assert_allclose(view.weights, wanted, atol=2e-6)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_cells_are_pooled_by_the_rule_they_state(pool):
    record = captured(priors()["goat"])
    whole = record.plan(head=1)
    weights = np.where(whole.allowed, whole.weights, np.nan)
    view = PlanLevels(record.calls[0], head=1).view((5, 65), (2, 69), rows=7, columns=9, pool=pool)
    assert view.queries[0] == 5 and view.queries[-1] == 64 and len(view.queries) == 7
    assert view.key_edges[0] == 2 and view.key_edges[-1] == 69
    for row, query in enumerate(view.queries):
        for column in range(9):
            cell = weights[query, view.key_edges[column] : view.key_edges[column + 1]]
            cell = cell[~np.isnan(cell)]
            if not len(cell):
                assert np.isnan(view.weights[row, column])
                continue
            wanted = cell.max() if pool == "max" else cell.mean()
            assert view.weights[row, column] == pytest.approx(wanted, abs=2e-6)
    what = {"max": "largest", "mean": "mean"}[pool]
    assert view.rule == f"7 of 60 queries; keys: the {what} of 7 to 8"


def test_normalisers_are_computed_once(monkeypatch):
    levels = PlanLevels(captured(priors()["goat"]).calls[0])
    first = levels.view((0, LENGTH), (0, LENGTH), rows=10)
    asked = []
    inner = levels._logits
    monkeypatch.setattr(levels, "_logits", lambda r, k: (asked.append((len(r), k)), inner(r, k))[1])
    again = levels.view((0, LENGTH), (20, 30), rows=10)
    # Queries before the first of these keys have nothing to ask.
    assert asked == [(int((first.queries >= 20).sum()), slice(20, 30))]
    np.testing.assert_array_equal(again.weights, first.weights[:, 20:30])


def test_blocks_do_not_show(monkeypatch):
    call = captured(priors()["goat"]).calls[0]
    whole = PlanLevels(call).view((0, LENGTH), (0, LENGTH), rows=20, columns=30)
    monkeypatch.setattr("goatviz.analysis.levels._BLOCK", 100)
    small = PlanLevels(call).view((0, LENGTH), (0, LENGTH), rows=20, columns=30)
    np.testing.assert_allclose(small.weights, whole.weights, atol=1e-6)


def test_a_sequence_far_too_long_to_be_formed():
    record = captured(length=40_000, heads=1, kv_heads=1)
    levels = PlanLevels(record.calls[0])
    view = levels.view((0, 40_000), (0, 40_000), rows=8, columns=64)
    assert view.weights.shape == (8, 64) and np.nanmax(view.weights) <= 1
    query = int(view.queries[5])
    row = record.plan(queries=slice(query, query + 1)).weights[0].numpy()
    wanted = [
        row[a:b].max() if a <= query else np.nan
        for a, b in zip(view.key_edges[:-1], view.key_edges[1:], strict=True)
    ]
    np.testing.assert_allclose(view.weights[5], wanted, rtol=1e-5)


def test_cells_are_exact_and_say_what_is_forbidden():
    record = captured(priors()["alibi"])
    levels = PlanLevels(record.calls[0], head=2, batch=1)
    plan = record.plan(head=2, batch=1)
    cell = levels.cell(40, 12)
    assert cell.weight == pytest.approx(float(plan.weights[40, 12]), rel=1e-12) and cell.allowed
    assert cell.score == pytest.approx(float(plan.scores[40, 12]), rel=1e-12)
    prior = plan.log_prior[40, :41].softmax(-1)
    assert cell.prior == pytest.approx(float(prior[12]), rel=1e-12)
    assert cell.log_prior == pytest.approx(float(prior[12].log()), rel=1e-12)
    ahead = levels.cell(12, 40)
    assert not ahead.allowed and ahead.weight == 0.0 and ahead.log_prior == -np.inf


def test_a_window_is_cut_to_what_there_is():
    view = PlanLevels(captured().calls[0]).view((-5, 10), (60, 500))
    assert view.query_range == (0, 10) and view.key_range == (60, 70)
    assert np.isnan(view.weights).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"queries": (5, 5)}, "queries must be a non-empty window of 0 .. 70"),
        ({"keys": (90, 99)}, "keys must be a non-empty window of 0 .. 70"),
        ({"rows": 0}, "rows must be an integer of at least 1, got 0"),
        ({"columns": 2.5}, "columns must be an integer of at least 1, got 2.5"),
        ({"pool": "sum"}, "pool must be one of max, mean; got 'sum'"),
    ],
)
def test_bad_views(options, says):
    levels = PlanLevels(captured().calls[0])
    asked = {"queries": (0, 70), "keys": (0, 70), **options}
    with pytest.raises((TypeError, ValueError), match=says):
        levels.view(asked.pop("queries"), asked.pop("keys"), **asked)


def test_what_has_no_levels():
    with pytest.raises(TypeError, match="call must be a CapturedCall, got int"):
        PlanLevels(3)
    with pytest.raises(ValueError, match="statistics only"):
        PlanLevels(captured(keep="statistics").calls[0])
    call = captured().calls[0]
    with pytest.raises(ValueError, match=r"head must be an integer in 0 .. 3, got 4"):
        PlanLevels(call, head=4)
    with pytest.raises(ValueError, match=r"batch must be an integer in 0 .. 1, got -1"):
        PlanLevels(call, batch=-1)
    with pytest.raises(ValueError, match=r"key must be an integer in 0 .. 69, got 70"):
        PlanLevels(call).cell(0, 70)
