"""The picture of a row shows its masses, and says when keys were pooled."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis.levels import PlanLevels, row_summary
from goatviz.attention import Attention
from goatviz.plots.base import as_figure
from goatviz.plots.plan import row_panels
from goatviz.priors import ALiBiPrior


def levels(length=30):
    torch.manual_seed(0)
    layer = Attention(16, 2, prior=ALiBiPrior(2)).eval()
    with capture(layer, statistics=(), keep="projections") as record, torch.no_grad():
        layer(3 * torch.randn(1, length, 16))
    return PlanLevels(record.calls[0])


def test_a_row_is_the_plans():
    source = levels()
    row = source.row(20)
    cells = [source.cell(20, key) for key in range(30)]
    seen = row["allowed"].values
    assert seen.tolist() == [cell.allowed for cell in cells] == [True] * 21 + [False] * 9
    for name, part in (("weights", "weight"), ("prior", "prior"), ("scores", "score")):
        wanted = np.array([getattr(cell, part) for cell in cells])
        np.testing.assert_allclose(row[name].values[seen], wanted[seen], rtol=1e-9)
    assert np.isnan(row["weights"].values[~seen]).all()
    assert row.attrs["verdict"] == "not checked"
    assert source.row(20, check=True).attrs["verdict"] == "agrees"


def test_pooled_rows_keep_their_mass():
    source = levels(500)
    whole, pooled = source.row(450), source.row(450, points=17)
    assert pooled.sizes["key"] == 17 and int(pooled["key_stop"][-1]) == 500
    for name in ("weights", "prior"):
        assert float(pooled[name].sum()) == pytest.approx(1.0)
        first = whole[name].values[: int(pooled["key_stop"][0])].sum()
        assert float(pooled[name][0]) == pytest.approx(first)
    assert "up to 30 keys a point" in row_panels(pooled)[0].note
    assert "a point" not in row_panels(whole)[0].note


def test_a_window_of_keys_is_a_part_of_the_row():
    source = levels(500)
    tokens = [f"t{i}" for i in range(500)]
    whole = source.row(450, tokens=tokens, check=True, mean_of=(100, 300))
    window = source.row(450, tokens=tokens, check=True, mean_of=(100, 300), keys=(120, 420))
    part = whole.isel(key=slice(120, 420))
    for name in whole.variables:
        if name == "mean":
            np.testing.assert_allclose(window[name], part[name], rtol=1e-12)
        else:
            np.testing.assert_array_equal(window[name], part[name])
    assert window.attrs == whole.attrs
    few = source.row(450, keys=(120, 420), points=30)
    assert few["key"].values.tolist() == list(range(120, 420, 10)) and few["key_stop"][-1] == 420
    sums = part["weights"].values.reshape(30, 10).sum(1)
    np.testing.assert_allclose(few["weights"], sums, rtol=1e-12)
    assert "keys 120–419 of 500" in row_panels(few)[0].note
    assert "of 500" not in row_panels(whole)[0].note
    with pytest.raises(ValueError, match="keys must be a non-empty window of 0 .. 500"):
        source.row(450, keys=(500, 501))


def test_potential_and_entropy_are_those_of_the_row():
    row = levels().row(25, temperature=0.5)
    seen = row["allowed"].values
    logits = (row["scores"] / 0.5 + row["log_prior"]).values[seen]
    assert row.attrs["potential"] == pytest.approx(-0.5 * np.logaddexp.reduce(logits)) or row.attrs[
        "potential"
    ] == pytest.approx(0.5 * np.logaddexp.reduce(logits))
    weights = row["weights"].values[seen]
    assert row.attrs["entropy"] == pytest.approx(-(weights * np.log(weights)).sum())
    assert row.attrs["largest_weight"] == pytest.approx(weights.max())


def test_the_picture_has_curves_with_units_and_tokens():
    row = levels().row(20, tokens=["<b>" if i == 4 else f"w{i}" for i in range(30)])
    figure = as_figure(row_panels(row))
    go.Figure(figure.to_dict())  # plotly knows every property
    assert [trace.name for trace in figure.data] == [
        "plan",
        "prior",
        "score / τ",
        "log-prior",
        "−potential / τ",
    ]
    np.testing.assert_array_equal(figure.data[0].y, row["weights"])
    np.testing.assert_array_equal(figure.data[2].y, row["scores"])
    assert figure.layout.yaxis.title.text == "probability [1]"
    assert figure.layout.yaxis2.title.text == "log-mass [nats]"
    (ticks,) = {panel.x["ticktext"][4] for panel in row_panels(row)}
    assert ticks == "&lt;b&gt;"
    assert "“&lt;b&gt;”" in figure.data[0].text[4]
    # Where scores and log-prior together reach this level, the plan would be 1.
    level = figure.data[4].y[row["allowed"].values]
    logits = (row["scores"] + row["log_prior"]).values[row["allowed"].values]
    np.testing.assert_allclose(np.exp(logits - level), row["weights"].values[:21], rtol=1e-9)
    assert row_summary(row).startswith("Query 20 at temperature 1: largest weight 0.")


def test_what_others_find_is_drawn_beside_the_plan():
    source = levels()
    row = source.row(20, check=True, balanced=True)
    np.testing.assert_allclose(row["solver"][:21], row["weights"][:21], atol=1e-12)
    assert row.attrs["solver"] == "semi relaxed" and row.attrs["solver_difference"] < 1e-12
    # Causal and doubly stochastic: only the identity is both.
    np.testing.assert_allclose(row["balanced"][:21], np.arange(21) == 20, atol=1e-9)
    names = [trace.name for trace in as_figure(row_panels(row)).data]
    assert names[:4] == ["POT", "plan", "prior", "doubly stochastic"] and len(names) == 7
    assert "POT (semi relaxed): agrees, largest difference" in row_summary(row)


def test_many_of_pots_points_are_drawn_as_few_rings_below_the_plan():
    row = levels(300).row(250, check=True)
    pot, plan, *_ = as_figure(row_panels(row)).data
    assert pot.name == "POT, 40 of 251 points" and plan.name == "plan"
    assert pot.mode == "markers" and pot.marker.symbol == "circle-open"
    places = pot.x.astype(int)
    assert len(places) == len(set(places)) == 40
    np.testing.assert_array_equal(pot.y, row["solver"].values[places])
    largest = np.argsort(-row["solver"].values[:251])[:20]
    assert {*largest} <= {*places} and places.min() < 20 and places.max() == 250
    pooled = as_figure(row_panels(levels(300).row(299, check=True, points=150))).data[0]
    assert len(pooled.customdata) == len(pooled.x) == 40


def test_a_two_sided_plan_has_its_own_doubly_stochastic_counterpart():
    torch.manual_seed(0)
    layer = Attention(16, 2, causal=False).eval()
    with capture(layer, statistics=(), keep="projections") as record, torch.no_grad():
        layer(3 * torch.randn(1, 24, 16))
    source = PlanLevels(record.calls[0], head=1)
    weights = source.balanced_weights(0.7)
    np.testing.assert_allclose(weights.sum(0), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    row = source.row(5, temperature=0.7, balanced=True)
    np.testing.assert_allclose(row["balanced"], weights[5])
    pooled = source.row(5, temperature=0.7, balanced=True, points=4)
    assert float(pooled["balanced"].sum()) == pytest.approx(1.0)


def test_long_plans_are_not_balanced():
    with pytest.raises(ValueError, match="must be of a plan of at most 512 queries and keys"):
        levels(600).row(3, balanced=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"query": 30}, "query must be an integer in 0 .. 29, got 30"),
        ({"query": 1, "temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"query": 1, "points": 0}, "points must be an integer of at least 1, got 0"),
        ({"query": 1, "tokens": ["a"]}, "tokens must hold 30 texts, got 1"),
    ],
)
def test_rows_that_are_not_there(options, says):
    with pytest.raises(ValueError, match=says):
        levels().row(**options)


def test_what_is_no_row():
    with pytest.raises(TypeError, match="expected a plan_row Dataset"):
        row_panels({})
