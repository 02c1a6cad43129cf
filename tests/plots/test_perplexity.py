"""What the pictures of losses on documents say is what the results hold."""

import numpy as np
import pytest

from goatviz.analysis import loss_difference
from goatviz.plots import draw_length, draw_perplexity
from goatviz.plots.perplexity import difference_panel, loss_panel
from goatviz.plots.schemes import Focus
from tests.factories import perplexity_result

FIELDS = {
    ("length", "loss"): "mean_loss",
    ("length", "perplexity"): "perplexity",
    ("position", "loss"): "mean_position_loss",
    ("position", "perplexity"): "position_perplexity",
}


def named(panel, name):
    (trace,) = [trace for trace in panel.traces if trace["name"] == name]
    return trace


@pytest.mark.parametrize(("kind", "measure"), FIELDS)
def test_lines_and_whiskers_are_the_means_and_their_intervals(kind, measure):
    sweep, field = perplexity_result(), FIELDS[kind, measure]
    other = FIELDS[kind, "perplexity" if measure == "loss" else "loss"]
    panel = loss_panel(sweep, kind=kind, measure=measure)
    for scheme, name in (("goat", "goat"), ("<b>rope</b>", "&lt;b&gt;rope&lt;/b&gt;")):
        line, one = named(panel, name), sweep.sel(scheme=scheme)
        places, low, high, opposite, count = line["customdata"].T
        np.testing.assert_array_equal(line["y"], one[field])
        np.testing.assert_array_equal(low, one[f"{field}_low"])
        np.testing.assert_array_equal(high, one[f"{field}_high"])
        np.testing.assert_array_equal(opposite, one[other])
        np.testing.assert_array_equal(places, sweep[kind])
        tokens = sweep["tokens" if kind == "length" else "position_tokens"].sum("piece")
        np.testing.assert_array_equal(count, tokens)
        assert "3 pieces, 2 runs" in line["hovertemplate"]
        # Schemes stand beside each other, close to where they belong.
        assert np.abs(line["x"] - np.log2(places)).max() < 0.25
    title = {"loss": "loss [nats/token]", "perplexity": "perplexity [1]"}[measure]
    assert panel.y["title"] == title and "[tokens" in panel.x["title"]


@pytest.mark.parametrize("measure", ["loss", "perplexity"])
def test_single_runs_are_marks_by_length_alone(measure):
    sweep = perplexity_result()
    dots = named(loss_panel(sweep, measure=measure), "goat, each run")
    np.testing.assert_array_equal(
        dots["y"], sweep[f"run_{measure}"].sel(scheme="goat").values.ravel()
    )
    np.testing.assert_array_equal(dots["customdata"], np.repeat([0, 1], 3))
    for panel in (loss_panel(sweep, Focus(runs=False)), loss_panel(sweep, kind="position")):
        assert not any("each run" in trace["name"] for trace in panel.traces)


def test_the_training_length_is_marked_and_what_was_not_measured_is_said():
    for kind in ("length", "position"):
        panel = loss_panel(perplexity_result(), kind=kind)
        assert [shape["x0"] for shape in panel.shapes] == [5.0]
        assert "trained at 32 tokens" in panel.note
        assert panel.caption == ["Not measured everywhere: learned."]


def test_differences_are_paired_and_leave_the_reference_out():
    difference = loss_difference(perplexity_result(), "goat", resamples=20)
    panel = difference_panel(difference, Focus("learned", length=32))
    assert "goat" not in [trace["name"] for trace in panel.traces]
    line, one = named(panel, "learned"), difference.sel(scheme="learned")
    np.testing.assert_array_equal(line["y"], one["difference"])
    np.testing.assert_allclose(line["y"] + line["error_y"]["array"], one["difference_high"])
    assert set(named(panel, "goat (reference)")["y"]) == {0.0}
    assert named(panel, "chosen")["y"] == [line["y"][1]]


def test_the_figure_is_the_panel():
    sweep = perplexity_result()
    for kind in ("length", "position"):
        figure, panel = draw_perplexity(sweep, kind=kind), loss_panel(sweep, kind=kind)
        assert figure.layout.title.text == "Loss on documents: text"
        assert [trace.name for trace in figure.data] == [trace["name"] for trace in panel.traces]


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be one of length, position; got 'depth'"):
        draw_perplexity(perplexity_result(), kind="depth")
    with pytest.raises(TypeError, match="length_sweep"):
        draw_length(perplexity_result())
    with pytest.raises(ValueError, match="perplexity_sweep lacks mean_loss"):
        draw_perplexity(perplexity_result().drop_vars("mean_loss"))
