"""What the pictures of sweeps and grids say is what the results hold."""

import numpy as np
import pytest

from goatviz.analysis.length import over_depths
from goatviz.plots import draw_extrapolation, draw_length, draw_needle
from goatviz.plots.length import MAX_WRITTEN, UNITS, accuracy_panel, depth_panel, map_panel
from goatviz.plots.schemes import Focus
from tests.factories import SCHEMES, grid_result, length_result

ROPE = "<b>rope</b>"


def named(traces, name):
    """The one trace of a name, as plotly shows it."""
    (trace,) = [trace for trace in traces if trace["name"] == name]
    return trace


def unmeasured(result, **place):
    """The result, one cell of it not measured."""
    for values in result.data_vars.values():
        here = {dim: value for dim, value in place.items() if dim in values.dims}
        values.loc[here] = 0 if values.dtype.kind == "i" else np.nan
    return result


# --- lines ---


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_lines_whiskers_and_marks_are_the_sweeps(measure):
    sweep = length_result()
    panel = accuracy_panel(sweep, measure=measure)
    for scheme, name in (("goat", "goat"), (ROPE, "&lt;b&gt;rope&lt;/b&gt;")):
        line, one = named(panel.traces, name), sweep.sel(scheme=scheme)
        np.testing.assert_array_equal(line["y"], one[f"mean_{measure}"])
        whiskers = line["error_y"]
        np.testing.assert_allclose(line["y"] + whiskers["array"], one[f"mean_{measure}_high"])
        np.testing.assert_allclose(line["y"] - whiskers["arrayminus"], one[f"mean_{measure}_low"])
        count = one[UNITS[measure]].sum("run")
        np.testing.assert_array_equal(line["customdata"][:, 3], count)
        assert UNITS[measure] in line["hovertemplate"] and "2 runs" in line["hovertemplate"]
        dots = named(panel.traces, f"{name}, each run")
        np.testing.assert_array_equal(dots["y"], one[measure].values.ravel())
        np.testing.assert_array_equal(dots["customdata"][:, 0], np.repeat([0, 1], 3))
    chance = named(panel.traces, f"chance ({sweep.attrs[f'chance_{measure}']:.3g})")
    assert set(chance["y"]) == {sweep.attrs[f"chance_{measure}"]}
    assert panel.y["title"].endswith("right [1]") and "[tokens" in panel.x["title"]


def test_the_training_length_is_marked_and_the_note_says_n():
    panel = accuracy_panel(length_result())
    assert [shape["x0"] for shape in panel.shapes] == [5.0]
    assert "n = 12 examples" in panel.note and "trained at 32 tokens" in panel.note


def test_what_was_not_measured_is_a_gap_and_is_said():
    panel = accuracy_panel(length_result())
    line = named(panel.traces, "learned")
    assert np.isnan(line["y"][2]) and np.isfinite(line["y"][:2]).all()
    assert panel.caption == ["Not measured at every length: learned."]


def test_one_run_has_no_small_marks():
    names = [trace["name"] for trace in accuracy_panel(length_result("one run")).traces]
    assert len(names) == len(SCHEMES) + 1 and not any("each run" in name for name in names)
    names = [t["name"] for t in accuracy_panel(length_result(), Focus(runs=False)).traces]
    assert not any("each run" in name for name in names)


def test_the_figure_is_the_panel():
    sweep = length_result()
    figure, panel = draw_length(sweep, measure="token"), accuracy_panel(sweep, measure="token")
    assert figure.layout.title.text == "Length extrapolation: needle"
    assert figure.layout.title.subtitle.text.replace("<br>", " ").strip() == panel.note
    assert [trace.name for trace in figure.data] == [trace["name"] for trace in panel.traces]
    for trace, drawn in zip(panel.traces, figure.data, strict=True):
        np.testing.assert_array_equal(drawn.y, trace["y"])


def test_the_old_name_warns_and_draws_the_same():
    with pytest.warns(DeprecationWarning, match="draw_extrapolation is now draw_length"):
        old = draw_extrapolation(length_result(), measure="token")
    assert old.to_json() == draw_length(length_result(), measure="token").to_json()


@pytest.mark.parametrize("depth", [None, 0.5])
def test_a_grid_by_length_is_pooled_or_at_one_depth(depth):
    grid = grid_result()
    result = over_depths(grid) if depth is None else grid.sel(depth=depth)
    panel = accuracy_panel(result, measure="token")
    line = named(panel.traces, "goat")
    np.testing.assert_array_equal(line["y"], result["token"].sel(scheme="goat"))
    assert panel.note.startswith("all depths; " if depth is None else "depth 50 %; ")


def test_accuracy_by_depth_is_the_grids():
    grid = grid_result()
    panel = depth_panel(grid, Focus("goat", length=64, depth=0.5), measure="token")
    for scheme, name in (("goat", "goat"), (ROPE, "&lt;b&gt;rope&lt;/b&gt;")):
        one = grid.sel(scheme=scheme, length=64)
        np.testing.assert_array_equal(named(panel.traces, name)["y"], one["token"])
    assert panel.title == "Accuracy by depth at 64 tokens" and panel.x["title"] == "depth [%]"
    empty = depth_panel(grid, Focus("goat", length=48))
    assert "not measured" in empty.annotations[0]["text"]
    assert [trace["name"][:6] for trace in empty.traces] == ["chance"]


# --- the choice ---


def test_the_choice_is_a_band_and_a_ring():
    focus = Focus("goat", length=64)
    panel = accuracy_panel(length_result(), focus)
    (band,) = [shape for shape in panel.shapes if shape["type"] == "rect"]
    assert band["x0"] < 6.0 < band["x1"]
    ring, line = named(panel.traces, "chosen"), named(panel.traces, "goat")
    assert (ring["x"][0], ring["y"][0]) == (line["x"][2], line["y"][2])
    # What was not measured has no ring.
    panel = accuracy_panel(length_result(), Focus("learned", length=64))
    assert not [trace for trace in panel.traces if trace["name"] == "chosen"]


def test_hidden_schemes_leave_nothing_behind():
    panel = accuracy_panel(length_result(), Focus("goat", "hidden", 64))
    assert {trace.get("legendgroup", "goat") for trace in panel.traces} == {"goat"}
    everything = accuracy_panel(length_result())
    assert (
        named(panel.traces, "goat")["line"]["color"]
        == named(everything.traces, "goat")["line"]["color"]
    )


# --- maps ---


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_maps_hold_the_grid_on_one_scale(measure):
    grid = grid_result()
    figure = draw_needle(grid, measure=measure)
    cells = [trace for trace in figure.data if trace.name == "share"]
    assert len(cells) == len(SCHEMES)
    for scheme, trace in zip(SCHEMES, cells, strict=True):
        one = grid.sel(scheme=scheme)
        np.testing.assert_allclose(trace.z, one[measure], rtol=1e-6)
        np.testing.assert_array_equal(trace.customdata[..., 2], one[f"{measure}_low"])
        assert (trace.zmin, trace.zmax) == (0.0, 1.0)
    (bar,) = [trace.colorbar for trace in cells if trace.showscale]
    at_chance = bar.tickvals[bar.ticktext.index("chance")]
    assert at_chance == grid.attrs[f"chance_{measure}"]
    assert figure.layout.title.text == "Depth and length: needle"
    texts = " ".join(note.text for note in figure.layout.annotations)
    assert "&lt;b&gt;rope" in texts and "<b>rope" not in texts


def test_cells_are_counted_from_zero_and_depths_run_downwards():
    panel = map_panel(grid_result(), "goat")
    assert panel.x["ticktext"] == ["32", "64"] and panel.y["ticktext"] == ["10", "50", "90"]
    assert panel.x["range"] == [-0.5, 1.5] and panel.y["range"] == [2.5, -0.5]


def test_a_missing_cell_is_grey_and_says_so():
    grid = unmeasured(grid_result(), scheme="goat", length=32, depth=0.1)
    cells, grey = map_panel(grid, "goat").traces
    assert np.isnan(cells["z"][0, 0]) and cells["text"][0][0] == ""
    assert grey["name"] == "not measured"
    np.testing.assert_array_equal(np.isnan(cells["z"]), ~np.isnan(grey["z"]))


def test_the_chosen_cell_or_column_is_framed():
    def frame(depth):
        focus = Focus("goat", length=64, depth=depth)
        outer, _ = [t for t in map_panel(grid_result(), "goat", focus).traces if "line" in t]
        return min(outer["x"]), max(outer["x"]), min(outer["y"]), max(outer["y"])

    assert frame(0.9) == pytest.approx((0.54, 1.46, 1.54, 2.46))
    assert frame(None) == pytest.approx((0.54, 1.46, -0.46, 2.46))


def test_cells_of_wide_maps_are_not_written_in():
    grid = grid_result()
    wide = grid.isel(length=[1] * (MAX_WRITTEN + 1))
    wide = wide.assign_coords(length=2 ** np.arange(5, 6 + MAX_WRITTEN))
    assert "text" in map_panel(grid, "goat").traces[0]
    assert "text" not in map_panel(wide, "goat").traces[0]


# --- errors ---


def test_errors():
    for draw, result in ((draw_length, length_result()), (draw_needle, grid_result())):
        with pytest.raises(ValueError, match="measure must be one of strict, token; got 'f1'"):
            draw(result, measure="f1")
        empty = result.assign(examples=0 * result["examples"])
        with pytest.raises(ValueError, match="must hold at least one example, got none"):
            draw(empty)
    with pytest.raises(TypeError, match="expected a Dataset of schema 'length_sweep'"):
        draw_length(grid_result())
    with pytest.raises(TypeError, match="expected a Dataset of schema 'needle_grid'"):
        draw_needle(length_result())
