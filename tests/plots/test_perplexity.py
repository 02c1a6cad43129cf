"""What the pictures of losses on documents say is what the results hold."""

import json

import numpy as np
import pytest

from goatviz.plots import draw_extrapolation, draw_perplexity
from goatviz.results import PERPLEXITY_SWEEP, make_result


def a_sweep(schemes=("goat", "<b>rope</b>"), runs=3, missing=False, trained="64"):
    random = np.random.default_rng(0)
    lengths, ends, pieces = [64, 128, 1024], [16, 32, 1024], 4
    loss = random.uniform(1, 2, (len(schemes), runs, pieces, len(lengths)))
    place = random.uniform(1, 2, (len(schemes), runs, pieces, len(ends)))
    if missing:
        loss[1, :, :, 1:] = place[1] = np.nan
    data = {"loss": loss, "position_loss": place, "run_loss": loss.mean(2)}
    data["tokens"] = np.full((pieces, len(lengths)), 1024)
    data["position_tokens"] = np.tile([16, 16, 992], (pieces, 1))
    for name, values in (("mean_loss", loss), ("mean_position_loss", place)):
        mean = values.mean((1, 2))
        data |= {name: mean, f"{name}_low": mean - 0.1, f"{name}_high": mean + 0.2}
    for end in ("", "_low", "_high"):
        data[f"perplexity{end}"] = np.exp(data[f"mean_loss{end}"])
    return make_result(
        PERPLEXITY_SWEEP,
        data,
        coords={
            "scheme": list(schemes),
            "run": np.arange(runs),
            "piece": np.arange(pieces),
            "length": lengths,
            "position": ends,
        },
        attrs={"task": "text", "documents": json.dumps(list("abcd")), "training_length": trained},
    )


@pytest.mark.parametrize(
    ("kind", "measure", "tokens"),
    [("length", "mean_loss", 4096), ("position", "mean_position_loss", 64)],
)
def test_lines_and_whiskers_are_the_means_and_their_intervals(kind, measure, tokens):
    sweep = a_sweep()
    figure = draw_perplexity(sweep, kind=kind)
    for at, name in enumerate(["goat", "&lt;b&gt;rope&lt;/b&gt;"]):
        (line,) = [t for t in figure.data if t.name == name]
        one = sweep.isel(scheme=at)
        np.testing.assert_allclose(line.y, one[measure])
        np.testing.assert_allclose(line.error_y.array, 0.2)
        np.testing.assert_allclose(line.error_y.arrayminus, 0.1)
        places, low, high, perplexity, count = np.asarray(line.customdata).T
        np.testing.assert_array_equal(places, sweep[kind])
        np.testing.assert_allclose([low, high], [line.y - 0.1, line.y + 0.2])
        np.testing.assert_allclose(perplexity, np.exp(line.y))
        assert count[0] == tokens
        assert "4 pieces, 3 run(s)" in line.hovertemplate
        # Schemes stand beside each other, close to where they belong.
        assert np.abs(np.asarray(line.x) - np.log2(places)).max() < 0.2
    assert figure.layout.yaxis.title.text == "loss [nats/token]"


def test_single_runs_are_dots_where_there_are_several():
    sweep = a_sweep()
    (dots,) = [t for t in draw_perplexity(sweep).data if t.name == "goat, each run"]
    np.testing.assert_allclose(dots.y, sweep["run_loss"].values[0].flatten())
    np.testing.assert_array_equal(dots.customdata, np.repeat([0, 1, 2], 3))
    assert len(draw_perplexity(a_sweep(runs=1)).data) == 2
    assert len(draw_perplexity(sweep, kind="position").data) == 2


def test_the_training_length_is_marked_and_lengths_named_by_it():
    figure = draw_perplexity(a_sweep())
    assert [shape.x0 for shape in figure.layout.shapes] == [6.0]
    assert "trained at 64" in [note.text for note in figure.layout.annotations]
    assert list(figure.layout.xaxis.ticktext) == ["64", "128<br>2x", "1,024<br>16x"]


def test_what_was_not_measured_is_said():
    figure = draw_perplexity(a_sweep(missing=True))
    notes = " ".join(note.text for note in figure.layout.annotations)
    assert "not measured everywhere: &lt;b&gt;rope&lt;/b&gt;" in notes


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be one of length, position, got 'depth'"):
        draw_perplexity(a_sweep(), kind="depth")
    with pytest.raises(TypeError, match="length_sweep"):
        draw_extrapolation(a_sweep())
    with pytest.raises(ValueError, match="perplexity_sweep lacks mean_loss"):
        draw_perplexity(a_sweep().drop_vars("mean_loss"))
