"""Panels of the explorer of lengths: one pair of axes each, and nothing that the result lacks."""

import numpy as np
import pytest

from goatviz.analysis.perplexity import loss_difference
from goatviz.plots.length_panels import (
    MAX_TICKS,
    MAX_WRITTEN,
    accuracy_panel,
    depth_panel,
    difference_panel,
    loss_panel,
    map_panel,
    mass_panel,
)
from goatviz.plots.schemes import Focus
from goatviz.results import load_shipped_result

FOCUS = Focus("goat", length=256)


def difference():
    return loss_difference(load_shipped_result("text-eltec"), "rope", resamples=20)


PANELS = {
    "accuracy": lambda focus: accuracy_panel(load_shipped_result("needle-sweep"), focus),
    "map": lambda focus: map_panel(load_shipped_result("needle-grid"), focus),
    "depth": lambda focus: depth_panel(load_shipped_result("needle-grid"), focus),
    "loss": lambda focus: loss_panel(load_shipped_result("text-eltec"), focus),
    "position": lambda focus: loss_panel(load_shipped_result("text-eltec"), focus, kind="position"),
    "difference": lambda focus: difference_panel(difference(), focus, "256"),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_small_says_what_it_shows_and_names_units(name):
    figure = PANELS[name](FOCUS)
    assert figure.layout.height == 400 and figure.layout.title.text
    assert figure.layout.title.subtitle.text
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert axis.title.text.startswith("share of") or "[" in axis.title.text
    assert len(figure.to_json()) < 50_000
    for trace in figure.data:
        assert trace.hovertemplate or trace.hoverinfo == "skip"


@pytest.mark.parametrize("name", [name for name in PANELS if name != "map"])
def test_hidden_schemes_leave_nothing_behind(name):
    figure = PANELS[name](Focus("goat", "hidden", 256))
    assert {trace.legendgroup for trace in figure.data} - {None} == {"goat"}
    everything = {trace.legendgroup for trace in PANELS[name](FOCUS).data} - {None}
    assert len(everything) >= 4
    # What is left keeps its colour, so that a reader knows it again.
    left, whole = (
        next(t.line.color for t in each.data if t.legendgroup == "goat")
        for each in (figure, PANELS[name](FOCUS))
    )
    assert left == whole


@pytest.mark.parametrize("draw", [accuracy_panel, map_panel, depth_panel, loss_panel, mass_panel])
@pytest.mark.parametrize("wrong", [None, 3, {}])
def test_wrong_types_are_refused(draw, wrong):
    with pytest.raises(TypeError, match="expected a"):
        draw(wrong, FOCUS)


def test_one_result_is_not_the_other():
    with pytest.raises(TypeError, match="'length_sweep', got 'perplexity_sweep'"):
        accuracy_panel(load_shipped_result("text-eltec"), FOCUS)
    with pytest.raises(TypeError, match="'loss_difference', got 'perplexity_sweep'"):
        difference_panel(load_shipped_result("text-eltec"), FOCUS, "256")


def many(result, dim, count):
    """The result, its last length repeated at ever longer ones."""
    places = np.r_[np.arange(result.sizes[dim]), [-1] * (count - result.sizes[dim])]
    longer = result.isel({dim: places})
    last = int(result[dim][-1])
    extra = [last * 2**power for power in range(1, count - result.sizes[dim] + 1)]
    return longer.assign_coords({dim: [*result[dim].values, *extra]})


@pytest.mark.parametrize("count", [7, 8, 13, 20])
def test_of_many_lengths_few_are_named_and_the_last_is(count):
    figure = accuracy_panel(many(load_shipped_result("needle-sweep"), "length", count), FOCUS)
    named = figure.layout.xaxis.ticktext
    assert len(named) == len(figure.layout.xaxis.tickvals) <= MAX_TICKS
    assert named[-1].startswith(f"{64 * 2 ** (count - 1):,}")
    line = figure.data[0]
    assert len(line.x) == count


def test_cells_of_wide_maps_are_not_written_in():
    grid = load_shipped_result("needle-grid")
    assert map_panel(grid, FOCUS).data[0].text is not None
    wide = many(grid, "length", MAX_WRITTEN + 1)
    assert map_panel(wide, FOCUS).data[0].text is None


def test_without_a_chosen_length_nothing_is_marked():
    figure = accuracy_panel(load_shipped_result("needle-sweep"), Focus("goat"))
    assert not [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert not [trace for trace in figure.data if trace.name == "chosen"]
