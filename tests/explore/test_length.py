"""The explorer of lengths as a plain object: what it draws and says is what the result holds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import traitlets
import xarray as xr

from goatviz.analysis.length import farthest_scheme, over_depths
from goatviz.analysis.perplexity import loss_difference
from goatviz.explore import LengthExplorer, explore_length
from goatviz.plots.base import as_figure, as_json
from goatviz.plots.length import accuracy_panel, depth_panel, map_panel
from goatviz.plots.mass import GROUPS, mass_panel
from goatviz.plots.perplexity import difference_panel, loss_panel
from goatviz.plots.schemes import Focus
from goatviz.results import load_shipped_result
from tests.factories import figure_text, mass_result

SHIPPED = {
    "sweep": lambda: explore_length(load_shipped_result("passkey-sweep")),
    "both": lambda: explore_length(
        load_shipped_result("needle-sweep"), grid=load_shipped_result("needle-grid")
    ),
    "grid": lambda: explore_length(load_shipped_result("needle-grid")),
    "text": lambda: explore_length(load_shipped_result("text-eltec")),
    "mass": lambda: explore_length(mass_result()),
}


def without(result, scheme, length, count="examples"):
    """The result, one scheme of it not measured at a length."""
    result = result.copy(deep=True)
    place = {"scheme": scheme, "length": length}
    for name, values in result.data_vars.items():
        if set(place) <= set(values.dims):
            empty = 0 if values.dtype.kind == "i" else np.nan
            result[name].loc[place] = empty
    return result


def panels(explorer, **values):
    """The figures of a picture's panels."""
    drawn = explorer.picture(values).figures
    return {name: as_figure(panel) for name, panel in drawn.items()}


def same(panel, other):
    """Whether two panels are the same picture."""
    return as_figure(panel).to_json() == as_figure(other).to_json()


def line(figure, name):
    (found,) = [t for t in figure.data if t.name == name and t.mode == "lines+markers"]
    return found


def shown(explorer, panel):
    """The figure that the widget of a panel shows now."""
    return json.loads(figure_text(explorer, panel))


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in SHIPPED.items()}


@pytest.fixture(params=SHIPPED)
def explorer(request, made):
    """One of each kind, the same for all tests, in the state in which it began."""
    found = made[request.param]
    before = found.values()
    yield found
    found.set(**before)


# --- any result ---


def test_what_is_drawn_is_what_the_widgets_show(explorer):
    for scheme in explorer.schemes[:2]:
        for length in (explorer.lengths[0], explorer.lengths[-1]):
            figures = panels(explorer, scheme=scheme, length=length)
            explorer.set(scheme=scheme, length=length)
            assert explorer.error == ""
            assert list(figures) == list(explorer.panels) == list(explorer.parts)
            for name, panel in explorer.picture({}).figures.items():
                assert figure_text(explorer, name) == as_json(panel)
            assert len(explorer.draw().data) == sum(len(each.data) for each in figures.values())
            said = explorer.picture({}).summary
            assert scheme in said and f"{length:,} tokens" in said and "rained at" in said


def test_drawing_changes_nothing(explorer):
    before, seen = explorer.values(), explorer.summary
    explorer.draw(scheme=explorer.schemes[1], length=explorer.lengths[0], others="hidden")
    assert explorer.values() == before and explorer.summary == seen


def test_every_panel_is_one_pair_of_axes_with_titles_and_a_least_width(explorer):
    assert isinstance(explorer, LengthExplorer)
    for name, figure in panels(explorer).items():
        assert explorer.panels[name] >= 340
        axes = [axis for axis in figure.layout._props if axis.startswith(("xaxis", "yaxis"))]
        assert sorted(axes) == ["xaxis", "yaxis"]
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
        assert len(figure.to_json()) < 100_000


def test_others_are_shown_dimmed_or_hidden(explorer):
    chosen, other = explorer.schemes[0], explorer.schemes[1]
    pictures = {
        others: panels(explorer, scheme=chosen, others=others)
        for others in ("shown", "dimmed", "hidden")
    }
    for panel in [name for name in explorer.panels if name != "depth and length"]:
        drawn = {
            others: [t for t in figures[panel].data if t.legendgroup in explorer.schemes]
            for others, figures in pictures.items()
        }
        assert {t.legendgroup for t in drawn["hidden"]} == {chosen}
        for others, faint in (("shown", None), ("dimmed", 0.4)):
            by_scheme = {t.legendgroup: t for t in drawn[others] if t.error_y.array is not None}
            assert by_scheme[chosen].opacity is None
            assert by_scheme[chosen].line.width > 3
            if other in by_scheme:  # the reference of a difference has no line of its own
                assert by_scheme[other].opacity == faint


def test_the_choice_is_marked_by_a_band_and_a_ring(explorer):
    length = explorer.lengths[1]
    figure = panels(explorer, length=length)[next(iter(explorer.panels))]
    bands = [s for s in figure.layout.shapes if s.type == "rect"]
    assert len(bands) == 1 and bands[0].x0 < np.log2(length) < bands[0].x1
    (ring,) = [t for t in figure.data if t.name == "chosen"]
    chosen = line(figure, explorer.scheme)
    assert (ring.x[0], ring.y[0]) in set(zip(chosen.x, chosen.y, strict=True))
    dashed = [shape for shape in figure.layout.shapes if shape.type == "line"]
    assert len(dashed) == 1


def test_a_click_on_a_line_chooses_scheme_and_length(explorer):
    scheme, length = explorer.schemes[1], explorer.lengths[0]
    name = {"<b>rope</b>": "&lt;b&gt;rope&lt;/b&gt;"}.get(scheme, scheme)
    view = explorer.parts[next(iter(explorer.panels))]
    click = {"kind": "click", "trace": name, "x": np.log2(length) + 0.1, "y": 0.5, "index": 0}
    view.received(click)
    assert (explorer.scheme, explorer.length) == (scheme, length)
    assert explorer.scheme == scheme
    # Chance belongs to no scheme: the length alone is chosen.
    view.received(click | {"trace": "chance (0.1)", "x": 99.0})
    assert (explorer.scheme, explorer.length) == (scheme, explorer.lengths[-1])


def test_controls_and_traits_are_one(explorer):
    explorer.set_state({"length": explorer.lengths[0]})
    assert explorer.length == explorer.lengths[0]
    explorer.others = "hidden"
    assert explorer.others == "hidden"
    assert {name for name, it in explorer.controls.items() if it.kind != "button"} == {
        *explorer.shown
    }


@pytest.mark.parametrize(
    ("name", "value"), [("scheme", "ropes"), ("others", "gone"), ("length", 65)]
)
def test_what_is_no_value_is_said_where_the_reader_looks(explorer, name, value):
    before = explorer.summary
    explorer.set(**{name: value})
    assert f"ValueError: {name} must be one of" in explorer.error
    assert explorer.summary == before
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got {value!r}"):
        explorer.draw(**{name: value})
    good = {"scheme": explorer.schemes[0], "others": "shown", "length": explorer.lengths[0]}
    explorer.set(**{name: good[name]})
    assert explorer.error == ""


def test_errors_of_a_click_are_said(explorer):
    click = {"kind": "click", "trace": "goat", "x": "?", "y": 0, "index": 0}
    explorer._received(explorer, {"part": next(iter(explorer.panels)), **click}, [])
    assert explorer.error.startswith("ValueError: could not convert")


def test_single_runs_are_shown_on_request(explorer):
    def dots(runs):
        return [
            t
            for f in panels(explorer, runs=runs).values()
            for t in f.data
            if t.type == "scatter" and t.mode == "markers"
        ]

    assert not [t for t in dots(False) if t.name != "chosen"]
    several = not explorer.controls["runs"].disabled
    assert bool([t for t in dots(True) if "each run" in t.name]) == several
    with pytest.raises(TypeError, match="runs must be True or False, got 1"):
        explorer.draw(runs=1)
    with pytest.raises(traitlets.TraitError):
        explorer.runs = "yes"


def test_an_exported_page_moves_scheme_and_length(explorer):
    vary = explorer._default_vary()
    assert vary == {"scheme": explorer.schemes, "length": explorer.lengths}


def test_it_opens_on_the_scheme_farthest_from_the_others(explorer, made):
    shown = {
        "sweep": "goat",  # 0.7513 beside 0.0391, 0.0078, 0.4648 and 0
        "both": "goat",
        "grid": "goat",
        "text": "rope-interpolated",  # 3.7454 beside 1.6013, 2.4749, 3.5994 and 1.6575
    }
    (name,) = [name for name, one in made.items() if one is explorer]
    if name in shown:
        assert explorer.scheme == shown[name]
    else:
        values = mass_result()["mean_token"].isel(length=-1)
        apart = {
            str(s): abs(float(values.sel(scheme=s) - values.drop_sel(scheme=s).mean()))
            for s in values["scheme"].values
        }
        assert explorer.scheme == max(apart, key=apart.get)
    assert "farthest" in explorer.controls["scheme"].hint


def test_the_farthest_scheme_is_sought_where_two_were_measured():
    values = np.array([[0.5, 0.9, 0.1], [0.5, 0.2, np.nan], [0.5, 0.8, np.nan]])
    result = xr.DataArray(
        values,
        coords={"scheme": ["a", "b", "c"], "length": [64, 128, 256]},
        dims=("scheme", "length"),
    )
    assert farthest_scheme(result) == "b"
    assert farthest_scheme(result.transpose().isel(length=[1, 0])) == "b"
    assert farthest_scheme(result.sel(length=[64])) == "a"
    assert farthest_scheme(result.sel(length=[256])) == "a"


# --- answers ---


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_accuracy_is_the_sweeps(measure):
    explorer, sweep = SHIPPED["sweep"](), load_shipped_result("passkey-sweep")
    picture = explorer.picture({"scheme": "rope", "length": 256, "measure": measure})
    focus = Focus("rope", length=256)
    panel = accuracy_panel(sweep, focus, measure=measure)
    assert same(picture.figures["accuracy by length"], panel)
    one = sweep.sel(scheme="rope", length=256)
    low, high = float(one[f"mean_{measure}_low"]), float(one[f"mean_{measure}_high"])
    unit = {"strict": "examples", "token": "tokens"}[measure]
    said = picture.summary
    assert f"rope at 256 tokens: {float(one[f'mean_{measure}']):.4f} of" in said
    assert f"95 % interval {low:.4f} to {high:.4f}; n = {int(one[unit].sum()):,} {unit}" in said
    assert f"Chance {sweep.attrs[f'chance_{measure}']:.3g}; trained at 64 tokens." in said


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_maps_rows_and_columns_are_the_grids(measure):
    explorer, grid = SHIPPED["both"](), load_shipped_result("needle-grid")
    given = {"scheme": "rope", "length": 256, "depth": 0.3, "measure": measure}
    figures, focus = explorer.picture(given).figures, Focus("rope", length=256, depth=0.3)
    wanted = accuracy_panel(grid.sel(depth=0.3), focus, measure=measure)
    assert same(figures["accuracy by length"], wanted)
    wanted = replace(
        map_panel(grid, "rope", focus, measure=measure), title="Depth and length: rope"
    )
    assert same(figures["depth and length"], wanted)
    assert same(figures["accuracy by depth"], depth_panel(grid, focus, measure=measure))
    one = grid.sel(scheme="rope", length=256, depth=0.3)
    said = explorer.picture(given).summary
    assert f"rope at 256 tokens, depth 30 %: {float(one[measure]):.4f} of" in said
    assert f"{float(one[f'{measure}_low']):.4f} to {float(one[f'{measure}_high']):.4f}" in said


def test_the_chosen_cell_is_framed_and_a_click_chooses_one():
    explorer = SHIPPED["both"]()
    view = explorer.parts["depth and length"]
    view.received({"kind": "click", "trace": "", "x": 2, "y": 4, "index": [4, 2]})
    assert (explorer.length, explorer.depth) == (256, 0.9)
    assert explorer.depth == 0.9 and explorer.error == ""

    def frame():
        (outer, _) = [t for t in panels(explorer)["depth and length"].data if t.name == "chosen"]
        return min(outer.x), max(outer.x), min(outer.y), max(outer.y)

    assert frame() == pytest.approx((1.54, 2.46, 3.54, 4.46))
    explorer.depth = "all"
    assert frame() == pytest.approx((1.54, 2.46, -0.46, 4.46))


def test_a_click_in_the_profile_of_depths_chooses_scheme_and_depth():
    explorer = SHIPPED["grid"]()
    view = explorer.parts["accuracy by depth"]
    view.received({"kind": "click", "trace": "alibi", "x": 68.7, "y": 1, "index": 3})
    assert (explorer.scheme, explorer.depth) == ("alibi", 0.7)


def test_all_depths_of_a_grid_alone_are_pooled():
    pooled = over_depths(load_shipped_result("needle-grid"))
    figure = panels(SHIPPED["grid"]())["accuracy by length"]
    np.testing.assert_array_equal(line(figure, "rope").y, pooled["strict"].sel(scheme="rope"))
    # With a sweep, "all" is what the sweep measured: other questions, at the task's own depths.
    figure = panels(SHIPPED["both"]())["accuracy by length"]
    sweep = load_shipped_result("needle-sweep")
    np.testing.assert_array_equal(line(figure, "rope").y, sweep["mean_strict"].sel(scheme="rope"))


@pytest.mark.parametrize("depth", [0.2, True, "none"])
def test_depths_that_are_not_there(depth):
    with pytest.raises(ValueError, match=f"depth must be one of all, 0.1, .*; got {depth!r}"):
        SHIPPED["grid"]().draw(depth=depth)
    with pytest.raises(ValueError, match="measure must be one of strict, token; got 'f1'"):
        SHIPPED["grid"]().draw(measure="f1")
    with pytest.raises(ValueError, match="values must be among .*, got 'depth'"):
        SHIPPED["sweep"]().draw(depth=depth)


# --- losses ---


@pytest.mark.parametrize("measure", ["loss", "perplexity"])
def test_losses_are_the_sweeps_and_differences_are_paired(measure):
    explorer, sweep = SHIPPED["text"](), load_shipped_result("text-eltec")
    values = {"scheme": "goat", "reference": "alibi", "length": 1024, "measure": measure}
    figures, focus = explorer.picture(values).figures, Focus("goat", length=1024)
    difference = loss_difference(sweep, "alibi")
    for kind in ("length", "position"):
        wanted = loss_panel(sweep, focus, kind=kind, measure=measure)
        assert same(figures[f"loss by {kind}"], wanted)
    assert same(figures["loss difference"], difference_panel(difference, focus))
    one = sweep.sel(scheme="goat", length=1024)
    apart = float(difference["difference"].sel(scheme="goat", length=1024))
    said = explorer.picture(values).summary
    assert f"loss {float(one['mean_loss']):.4f} (" in said
    assert f"perplexity {float(one['perplexity']):.4f} (" in said
    assert f"difference from alibi on the same pieces: {apart:+.4f} (" in said
    assert "12 pieces, 5 runs" in said


def test_measures_and_references_that_are_not_there():
    explorer = SHIPPED["text"]()
    with pytest.raises(ValueError, match="measure must be one of loss, perplexity; got 'token'"):
        explorer.draw(measure="token")
    with pytest.raises(ValueError, match="reference must be one of goat, .*; got 'gpt'"):
        explorer.draw(reference="gpt")


def test_a_click_by_position_chooses_the_scheme_alone():
    explorer = SHIPPED["text"]()
    explorer.length = 512
    view = explorer.parts["loss by position"]
    view.received({"kind": "click", "trace": "alibi", "x": 4.0, "y": 2, "index": 0})
    assert (explorer.scheme, explorer.length) == ("alibi", 512)


# --- masses ---


def test_masses_are_the_sweeps():
    explorer, sweep = SHIPPED["mass"](), mass_result()
    picture = explorer.picture({"scheme": "goat", "length": 64})
    for panel, of in zip(explorer.panels, ("accuracy", *GROUPS), strict=True):
        assert same(picture.figures[panel], mass_panel(sweep, Focus("goat", length=64), of=of))
    one = sweep.sel(scheme="goat", length=64)
    assert f"{float(one['mean_token']):.4f} of answer tokens right" in picture.summary
    for group in GROUPS:
        mean, low, high = (float(one[f"mean_{group}_mass{end}"]) for end in ("", "_low", "_high"))
        assert f"{mean:.4f} ({low:.4f} to {high:.4f})" in picture.summary
    assert "Heads chosen at 32 tokens" in picture.summary


# --- one scheme, missing cells, wrong results ---


@pytest.mark.parametrize(
    ("name", "other"), [("passkey-sweep", "goat"), ("needle-grid", "rope"), ("text-eltec", "goat")]
)
def test_one_scheme_alone(name, other):
    explorer = explore_length(load_shipped_result(name).sel(scheme=[other]))
    assert explorer.schemes == [other] and explorer.controls["others"].disabled
    assert explorer.error == ""
    explorer.set(others="hidden", length=explorer.lengths[0])
    assert other in explorer.summary


def test_cells_that_were_not_measured():
    sweep = without(load_shipped_result("needle-sweep"), "sinusoidal", 512)
    grid = without(load_shipped_result("needle-grid"), "sinusoidal", 512)
    explorer = explore_length(sweep, grid=grid, scheme="sinusoidal")
    for depth in ("all", 0.5):
        explorer.set(length=512, depth=depth)
        assert explorer.error == "" and "not measured" in explorer.summary
        figures = panels(explorer)
        assert np.isnan(line(figures["accuracy by length"], "sinusoidal").y[3])
        assert np.isnan(line(figures["accuracy by depth"], "sinusoidal").y).all()
        assert not [t for t in figures["accuracy by length"].data if t.name == "chosen"]
        cells, grey, *_ = figures["depth and length"].data
        np.testing.assert_array_equal(np.isnan(cells.z), ~np.isnan(np.asarray(grey.z, dtype=float)))
        assert grey.name == "not measured" and np.isnan(cells.z[:, 3]).all()
    said = explorer.picture({"length": 512, "scheme": "goat"}).summary
    assert "not measured" not in said


def test_lengths_without_a_measured_cell_cannot_be_chosen():
    sweep = load_shipped_result("passkey-sweep")
    for scheme in sweep["scheme"].values:
        sweep = without(sweep, scheme, 1024)
    assert explore_length(sweep).lengths == [64, 128, 256, 512]


def test_a_length_that_the_grid_lacks():
    grid = load_shipped_result("needle-grid").sel(length=[64, 128, 256])
    explorer = explore_length(load_shipped_result("needle-sweep"), grid=grid)
    assert explorer.lengths == [64, 128, 256, 512, 1024] and explorer.length == 1024
    figures = panels(explorer)
    notes = [note.text for note in figures["accuracy by depth"].layout.annotations]
    assert "not measured by depth at this length" in notes
    explorer.depth = 0.5
    assert "not measured" in explorer.summary and explorer.error == ""


def test_losses_and_masses_that_were_not_measured():
    sweep = without(load_shipped_result("text-eltec"), "none", 2048)
    explorer = explore_length(sweep, scheme="none")
    explorer.length = 2048
    assert "none in windows of 2,048 tokens: not measured" in explorer.summary
    explorer = explore_length(mass_result(), scheme="learned")
    assert explorer.error == ""
    assert "learned at 64 tokens: not measured" in explorer.summary


def test_scheme_names_are_text():
    explorer = explore_length(mass_result())
    explorer.set(scheme="<b>rope</b>", others="hidden")
    assert explorer.summary.startswith("<b>rope</b> at ")  # plain text, written as such
    for panel in explorer.panels:
        figure = shown(explorer, panel)
        for trace in figure["data"]:
            said = trace.get("name", "") + trace.get("hovertemplate", "")
            assert "<b>rope" not in said


@pytest.mark.parametrize("wrong", [None, 3, {}, np.zeros(3)])
def test_what_is_no_result(wrong):
    wanted = "length_sweep, needle_grid, mass_sweep, perplexity_sweep"
    with pytest.raises(TypeError, match=f"result must be a Dataset of one of {wanted}, got"):
        explore_length(wrong)


def test_other_results():
    sweep, text = load_shipped_result("needle-sweep"), load_shipped_result("text-eltec")
    grid = load_shipped_result("needle-grid")
    with pytest.raises(TypeError, match="got a loss_difference"):
        explore_length(loss_difference(text, "goat", resamples=10))
    with pytest.raises(TypeError, match="'needle_grid', got 'perplexity_sweep'"):
        explore_length(sweep, grid=text)
    with pytest.raises(TypeError, match="grid goes with a length_sweep only.*perplexity_sweep"):
        explore_length(text, grid=grid)
    with pytest.raises(ValueError, match="grid must have the sweep's task, passkey, got needle"):
        explore_length(load_shipped_result("passkey-sweep"), grid=grid)
    with pytest.raises(ValueError, match="grid must have the sweep's schemes, .*, got goat"):
        explore_length(sweep, grid=grid.sel(scheme=["goat"]))
    with pytest.raises(ValueError, match="scheme must be one of goat, .*; got 'gpt'"):
        explore_length(sweep, scheme="gpt")
    with pytest.raises(ValueError, match=r"lacks the dimension scheme: .* sel\(scheme=\[...\]\)"):
        explore_length(sweep.sel(scheme="goat"))
    empty = sweep.copy(deep=True)
    empty["examples"] *= 0
    with pytest.raises(ValueError, match="length_sweep must hold at least one measured cell"):
        explore_length(empty)
