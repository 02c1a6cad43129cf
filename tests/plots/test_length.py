"""What the pictures of sweeps and grids say is what the results hold."""

import numpy as np
import pytest

from goatviz.plots import draw_extrapolation, draw_needle
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, make_result


def shares(name, right, count):
    with np.errstate(invalid="ignore"):
        share = right / count
    return {name: share, f"{name}_low": share * 0.9, f"{name}_high": share * 0.9 + 0.1}


def a_sweep(schemes=("goat", "<b>rope</b>"), runs=3, missing=False, trained="64"):
    random = np.random.default_rng(0)
    lengths = [64, 96, 128, 1024]
    shape = (len(schemes), runs, len(lengths))
    examples = np.full(shape, 50)
    if missing:
        examples[1, :, 2:] = 0
    right = random.binomial(examples, 0.5)
    tokens = 4 * examples
    right_tokens = random.binomial(tokens, 0.6)
    data = {"examples": examples, "right": right, "tokens": tokens, "right_tokens": right_tokens}
    data["log_probability"] = np.zeros(shape)
    data |= shares("strict", right, examples) | shares("token", right_tokens, tokens)
    data |= shares("mean_strict", right.sum(1), examples.sum(1))
    data |= shares("mean_token", right_tokens.sum(1), tokens.sum(1))
    attrs = {"task": "needle", "training_length": trained, "chance_token": 0.25}
    return make_result(
        LENGTH_SWEEP,
        data,
        coords={"scheme": list(schemes), "run": np.arange(runs), "length": lengths},
        attrs={**attrs, "chance_strict": 0.25**4},
    )


def a_grid(schemes=("goat", "rope", "alibi", "<i>"), hole=False):
    random = np.random.default_rng(1)
    shape = (len(schemes), 3, 2)
    examples = np.full(shape, 20)
    if hole:
        examples[0, 0, 0] = 0
    data = {"examples": examples, "tokens": 12 * examples}
    data |= shares("token", random.binomial(12 * examples, 0.5), 12 * examples)
    data |= shares("strict", random.binomial(examples, 0.5), examples)
    return make_result(
        NEEDLE_GRID,
        data,
        coords={"scheme": list(schemes), "depth": [0.1, 0.5, 0.9], "length": [64, 128]},
        attrs={
            "task": "needle",
            "training_length": "64",
            "chance_token": 0.25,
            "chance_strict": 0.25**12,
        },
    )


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_lines_and_whiskers_are_the_means_and_their_intervals(measure):
    sweep = a_sweep()
    figure = draw_extrapolation(sweep, measure=measure)
    for at, name in enumerate(["goat", "&lt;b&gt;rope&lt;/b&gt;"]):
        (line,) = [t for t in figure.data if t.name == name]
        one = sweep.isel(scheme=at)
        np.testing.assert_allclose(line.y, one[f"mean_{measure}"])
        np.testing.assert_allclose(line.y + line.error_y.array, one[f"mean_{measure}_high"])
        np.testing.assert_allclose(line.y - line.error_y.arrayminus, one[f"mean_{measure}_low"])
        unit = {"strict": "examples", "token": "tokens"}[measure]
        np.testing.assert_array_equal(line.customdata[:, 3], one[unit].sum("run"))
        assert unit in line.hovertemplate and "3 run(s)" in line.hovertemplate
        (dots,) = [t for t in figure.data if t.name == f"{name}, each run"]
        np.testing.assert_allclose(dots.y, one[measure].values.flatten())
        np.testing.assert_array_equal(dots.customdata[:, 0], np.repeat([0, 1, 2], 4))


def test_lengths_are_binary_and_the_training_length_and_chance_are_marked():
    figure = draw_extrapolation(a_sweep(), measure="token")
    np.testing.assert_allclose(figure.layout.xaxis.tickvals, np.log2([64, 96, 128, 1024]))
    assert figure.layout.xaxis.ticktext == ("64", "96", "128<br>2x", "1,024<br>16x")
    assert [shape.x0 for shape in figure.layout.shapes] == [6.0]
    assert "trained at 64" in [note.text for note in figure.layout.annotations]
    (chance,) = [t for t in figure.data if t.name == "chance (0.25)"]
    assert set(chance.y) == {0.25}
    assert "n = 150;" in figure.layout.title.subtitle.text


def test_whiskers_of_schemes_stand_beside_each_other_near_their_length():
    lines = [t for t in draw_extrapolation(a_sweep()).data if t.error_y.array is not None]
    places = np.array([line.x for line in lines])
    assert (np.diff(places, axis=0) > 0.05).all()
    assert np.abs(places - np.log2([64, 96, 128, 1024])).max() < 0.2


def test_what_was_not_measured_is_a_gap_and_is_said():
    figure = draw_extrapolation(a_sweep(missing=True))
    (line,) = [t for t in figure.data if t.name == "&lt;b&gt;rope&lt;/b&gt;"]
    assert np.isnan(line.y[2:]).all() and not np.isnan(line.y[:2]).any()
    notes = [note.text for note in figure.layout.annotations]
    assert "not measured at every length: &lt;b&gt;rope&lt;/b&gt;" in notes


def test_single_runs_have_no_dots_and_several_training_lengths_no_multiples():
    figure = draw_extrapolation(a_sweep(runs=1, trained="64, 128"))
    assert not [t for t in figure.data if "each run" in t.name]
    assert len(figure.layout.shapes) == 2
    assert "2x" not in "".join(figure.layout.xaxis.ticktext)


@pytest.mark.parametrize("measure", ["strict", "token"])
def test_maps_hold_the_grid_on_one_scale(measure):
    grid = a_grid()
    figure = draw_needle(grid, measure=measure)
    assert len(figure.data) == 4
    for at, trace in enumerate(figure.data):
        np.testing.assert_allclose(trace.z, grid[measure].values[at], rtol=1e-6)
        np.testing.assert_allclose(trace.customdata[..., 2], grid[f"{measure}_low"].values[at])
        assert trace.coloraxis == "coloraxis"
    bar = figure.layout.coloraxis
    assert (bar.cmin, bar.cmax) == (0.0, 1.0)
    assert any("chance" in text for text in bar.colorbar.ticktext)
    assert [note.text for note in figure.layout.annotations] == [
        "goat",
        "rope",
        "alibi",
        "&lt;i&gt;",
    ]
    assert figure.layout.yaxis.ticktext == ("10", "50", "90")
    assert figure.layout.yaxis.autorange == "reversed"


def test_a_missing_cell_is_empty():
    trace = draw_needle(a_grid(hole=True)).data[0]
    assert np.isnan(trace.z[0][0]) and trace.text[0][0] == ""


def test_errors():
    with pytest.raises(ValueError, match="measure must be one of strict, token, got 'f1'"):
        draw_extrapolation(a_sweep(), measure="f1")
    with pytest.raises(ValueError, match="measure must be one of strict, token, got 'f1'"):
        draw_needle(a_grid(), measure="f1")
    with pytest.raises(TypeError, match="expected a Dataset of schema 'length_sweep'"):
        draw_extrapolation(a_grid())
    with pytest.raises(TypeError, match="expected a Dataset of schema 'needle_grid'"):
        draw_needle(a_sweep())
    empty = a_sweep()
    empty["examples"] = empty["examples"] * 0
    with pytest.raises(ValueError, match="length_sweep must hold at least one example"):
        draw_extrapolation(empty)
    empty = a_grid()
    empty["examples"] = empty["examples"] * 0
    with pytest.raises(ValueError, match="needle_grid must hold at least one example"):
        draw_needle(empty)
