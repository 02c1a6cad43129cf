"""The figures of training draw what the log and the rows hold."""

import numpy as np
import pytest

from goatviz.plots import draw_losses, draw_training
from goatviz.plots.schemes import scheme_look
from goatviz.plots.training import losses_panel, training_panels
from tests.factories import training_result

ROWS = [
    ("offset 1", "goat", 1.8, 0.01, 1.7),
    ("offset 1", "<i>uniform</i>", 1.9, 0.02, 1.7),
    ("offset 4", "goat", 1.75, 0.01, 1.6),
]


def test_lines_are_the_log_and_skip_what_was_not_logged():
    log = training_result()
    losses, rates = training_panels(log)
    for panel, field in ((losses, "loss"), (rates, "learning_rate")):
        for run, trace in zip(log["run"].values, panel.traces, strict=True):
            values = log[field].sel(run=run).dropna("step")
            np.testing.assert_array_equal(trace["x"], values["step"])
            np.testing.assert_allclose(trace["y"], values, rtol=1e-6)
            assert trace["line"]["color"] == scheme_look(run).color
    assert len(losses.traces[0]["x"]) < len(losses.traces[1]["x"])
    held_out = float(log["held_out"][0])
    assert losses.traces[0]["name"].startswith(f"goat (held out {held_out:.4f} ±")
    assert losses.traces[1]["name"].startswith("&lt;b&gt;rope&lt;/b&gt; (held out")
    assert not any(trace["showlegend"] for trace in rates.traces)
    assert (losses.y["title"], rates.y["title"]) == ("loss [nats/token]", "rate [1]")


def test_a_run_without_a_held_out_loss_says_none():
    log = training_result()
    log["held_out"][:] = np.nan
    assert [trace["name"] for trace in training_panels(log)[0].traces][0] == "goat"


def test_the_figure_is_its_panels():
    figure = draw_training(training_result())
    assert len(figure.data) == 4 and figure.layout.xaxis2.matches == "x"


def test_other_results_are_refused():
    with pytest.raises(TypeError, match="expected a training_log Dataset, got dict"):
        draw_training({})


def test_losses_stand_at_their_group_with_two_standard_errors():
    panel = losses_panel(ROWS)
    optimum, goat, uniform = panel.traces
    assert optimum["y"][0] == 1.7 and optimum["y"][-2] == 1.6
    np.testing.assert_array_equal(goat["y"], [1.8, 1.75])
    assert goat["error_y"]["array"] == [0.02, 0.02] and uniform["error_y"]["array"] == [0.04]
    assert np.round(goat["x"]).tolist() == [0, 1] and goat["x"][0] != uniform["x"][0]
    assert uniform["name"] == "&lt;i&gt;uniform&lt;/i&gt;"
    assert goat["marker"]["color"] == scheme_look("goat").color
    assert panel.x["ticktext"] == ["offset 1", "offset 4"]
    with pytest.raises(ValueError, match="rows must hold at least one"):
        draw_losses([])
