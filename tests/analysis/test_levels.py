"""Views of a plan at any zoom are its cells, pooled by the rule they state."""

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.adapters.capture import CapturedCall
from goatviz.analysis.levels import PlanLevels, colour_decades, colour_scale
from goatviz.attention import Attention
from goatviz.examples import example_text
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior
from goatviz.transport import AttentionCall

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


def test_a_row_is_solved_once_for_all_windows(monkeypatch):
    (call,) = captured(ALiBiPrior(2)).calls
    levels = PlanLevels(call)
    solve, solved = PlanLevels._plan, []

    def counted(self, query, temperature):
        solved.append((query, temperature))
        return solve(self, query, temperature)

    monkeypatch.setattr(PlanLevels, "_plan", counted)
    whole, checked = levels.row(20), levels.row(20, check=True)
    part = levels.row(20, keys=(3, 11))
    assert solved == [(20, 1.0)] and part.attrs == whole.attrs
    assert part["weights"].equals(whole["weights"].sel(key=slice(3, 10)))
    assert checked.attrs["verdict"] == "agrees" and whole.attrs["verdict"] == "not checked"
    assert not levels.row(21).identical(whole) and levels.row(20).identical(whole)
    levels.row(20, temperature=2.0)
    assert solved[1:] == [(21, 1.0), (20, 1.0), (20, 2.0)]


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
        ({"without": [70]}, r"without must be an integer in 0 .. 69, got 70"),
        ({"without": 0}, "without must be a list of integers, got 0"),
        ({"pool": "sum"}, "pool must be one of max, mean; got 'sum'"),
    ],
)
def test_bad_views(options, says):
    levels = PlanLevels(captured().calls[0])
    asked = {"queries": (0, 70), "keys": (0, 70), **options}
    with pytest.raises((TypeError, ValueError), match=says):
        levels.view(asked.pop("queries"), asked.pop("keys"), **asked)


def renormalised(record, without, **head):
    """Dense weights without some keys, by a softmax over the others in float64."""
    plan = record.plan(**head)
    logits = plan.logits.clone()
    logits[:, list(without)] = -torch.inf
    hidden = ~plan.allowed
    hidden[:, list(without)] = True
    return plan, logits.softmax(-1).masked_fill(hidden, torch.nan).numpy()


@pytest.mark.parametrize("without", [(0,), (3, 0, 4, 3), (69,), tuple(range(10, 60))])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_keys_are_left_out_of_every_row(pool, without, monkeypatch):
    record = captured(priors()["goat"])
    plan, weights = renormalised(record, without, head=1, batch=1)
    # Some rows have next to nothing left.
    weights[plan.weights[:, np.setdiff1d(range(LENGTH), without)].sum(-1) < 1e-12] = np.nan
    levels = PlanLevels(record.calls[0], head=1, batch=1)
    before = levels.view((0, LENGTH), (0, LENGTH))
    monkeypatch.setattr("goatviz.analysis.levels._BLOCK", 1000)
    view = levels.view((0, LENGTH), (0, LENGTH), pool=pool, without=without)
    np.testing.assert_allclose(view.weights, weights, atol=1e-6)
    rest = 1 - plan.weights[:, sorted(set(without))].sum(-1, keepdim=True).numpy()
    plain = (rest > 1e-6).flatten() & ~np.isnan(weights).all(1)
    by_share = np.where(np.isnan(weights), np.nan, plan.weights.numpy() / rest.clip(1e-6))
    np.testing.assert_allclose(view.weights[plain], by_share[plain], atol=1e-5)
    few = levels.view((0, LENGTH), (2, 69), columns=9, pool=pool, without=without)
    for column in range(9):
        cell = weights[:, few.key_edges[column] : few.key_edges[column + 1]]
        seen = ~np.isnan(cell).all(1)
        wanted = (np.nanmax if pool == "max" else np.nanmean)(cell[seen], axis=1)
        np.testing.assert_allclose(few.weights[seen, column], wanted, atol=1e-6)
        assert np.isnan(few.weights[~seen, column]).all()
    again = levels.view((0, LENGTH), (0, LENGTH))
    np.testing.assert_array_equal(again.weights, before.weights)


def sharp(gap, **options):
    """Levels of one head whose every query prefers key 0 by `gap` nats."""
    k = torch.linspace(0, 1, 8, dtype=torch.float64)[None, None, :, None]
    k[..., 0, :] = gap
    call = AttentionCall.from_tensors(torch.ones_like(k), k, scale=1.0, **options)
    return PlanLevels(CapturedCall(0, "layer", call)), k[0, 0, :, 0]


@pytest.mark.parametrize("gap", [16.0, 25.0])
def test_a_row_keeps_its_precision_beside_a_sink(gap):
    levels, logits = sharp(gap)
    view = levels.view((0, 8), (0, 8), without=[0])
    assert np.isnan(view.weights[0]).all()
    for query in range(1, 8):
        wanted = logits[1 : query + 1].softmax(-1)
        np.testing.assert_allclose(view.weights[query, 1 : query + 1], wanted, rtol=1e-6)
    assert view.rule == "every query; every key; without key 0: each row normalised over the others"
    assert levels.view((0, 8), (0, 8), without=[0, 1]).rule.endswith(
        "; without keys 0, 1: each row normalised over the others"
    )
    assert "without 7 keys" in levels.view((0, 8), (0, 8), without=range(7)).rule


def test_rows_with_nothing_else_are_not_a_number():
    levels, _ = sharp(40.0)
    assert np.isnan(levels.view((0, 8), (0, 8), without=[0]).weights).all()
    # What a column without a key takes is left to it.
    levels, logits = sharp(3.0, sink=torch.tensor([1.0]))
    row = levels.view((0, 8), (0, 8), without=[0]).weights[7, 1:]
    wanted = torch.cat([logits[1:], torch.ones(1)]).softmax(-1)[:-1]
    np.testing.assert_allclose(row, wanted, rtol=1e-6)


def test_the_colour_scale_follows_the_spread():
    causal = np.tril(np.ones((600, 600))) / np.arange(1, 601)[:, None]
    causal[causal == 0] = np.nan
    assert colour_scale(causal) == "linear"
    sink = 0.1 * causal
    sink[:, 0] = 0.9
    assert colour_scale(sink) == "log" and colour_scale(sink[:, 1:]) == "linear"
    for nothing in (np.full((2, 2), np.nan), np.zeros((2, 2))):
        assert colour_scale(nothing) == "linear"


def test_the_colour_scale_of_real_heads(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(example_text(), return_tensors="pt")["input_ids"][:, :200]
    options = {"statistics": ["key_mass"], "keep": "projections"}
    with capture(model, **options) as record, torch.no_grad():
        model(ids)
    for call in (record.calls[layer] for layer in (0, 12, 24)):
        for head, first in enumerate(call.rows.key_mass[0, :, :, 0].mean(-1)):
            view = PlanLevels(call, head=head).view((0, 200), (0, 200), rows=64, columns=64)
            scale = colour_scale(view.weights)
            # Head 3 of the first layer looks at few keys.
            assert call.layer > 0 or head == 3 or scale == "linear"
            assert first < 0.3 or scale == "log"


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


def test_a_logarithmic_scale_reaches_many_weights():
    assert colour_decades(np.full((4, 4), 0.25)) == 5
    assert colour_decades(np.full((4, 4), np.nan)) == 5
    faint = np.array([1.0, *[10.0**-8.5] * 9])
    assert colour_decades(faint) == 9  # rounded up
    assert colour_decades(faint**4) == 12
