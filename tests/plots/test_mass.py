"""The picture of masses shows the numbers of the sweep, of heads chosen once."""

import numpy as np
import pytest

from goatviz.plots.mass import draw_mass, leading_head, reference_length
from goatviz.results import MASS_GROUPS, MASS_SWEEP, make_result

SCHEMES, RUNS, LENGTHS = ("goat", "<b>rope</b>"), 2, (32, 64, 128)


def make_sweep(seed=0, **attrs):
    rng = np.random.default_rng(seed)
    shape = (len(SCHEMES), RUNS, len(LENGTHS))
    data = {"tokens": np.full(shape, 8), "token": rng.random(shape)}
    data["token_low"], data["token_high"] = data["token"] / 2, (1 + data["token"]) / 2
    for plan in ("", "prior_"):
        for group in MASS_GROUPS:
            values = rng.random((*shape, 2, 3))
            name = f"{plan}{group}_mass"
            data |= {name: values, f"{name}_low": values / 2, f"{name}_high": (1 + values) / 2}
    return make_result(
        MASS_SWEEP,
        data,
        coords={
            "scheme": list(SCHEMES),
            "run": range(RUNS),
            "length": list(LENGTHS),
            "layer": [0, 1],
            "head": [0, 1, 2],
        },
        attrs={
            "task": "needle",
            "training_length": "64",
            "chance_token": 0.25,
            "examples": 4,
            "recent": 16,
            **attrs,
        },
    )


def traces_at(figure, axis):
    return [trace for trace in figure.data if (trace.xaxis or "x") == axis]


def test_each_line_follows_the_heads_chosen_at_the_training_length():
    sweep = make_sweep()
    figure = draw_mass(sweep)
    for axis, group in (("x2", "answer"), ("x3", "recent"), ("x4", "first")):
        traces = traces_at(figure, axis)
        assert len(traces) == 2 * len(SCHEMES)
        for at in range(len(SCHEMES)):
            for trace, plan in zip(traces[2 * at : 2 * at + 2], ("", "prior_"), strict=True):
                each = []
                for run in range(RUNS):
                    one = sweep.isel(scheme=at, run=run)
                    at_trained = one[f"{group}_mass"].sel(length=64).values
                    layer, head = np.unravel_index(at_trained.argmax(), at_trained.shape)
                    each.append(one[f"{plan}{group}_mass"].values[:, layer, head])
                    assert f"{layer}.{head}" in trace.hovertemplate
                assert np.allclose(trace.y, np.mean(each, axis=0))


def test_accuracy_is_the_mean_over_runs_with_the_runs_intervals():
    sweep = make_sweep()
    line = traces_at(draw_mass(sweep), "x")[0]
    one = sweep.isel(scheme=0)
    assert np.allclose(line.y, one["token"].mean("run"))
    assert np.allclose(line.y + line.error_y.array, one["token_high"].max("run"))
    assert np.allclose(line.y - line.error_y.arrayminus, one["token_low"].min("run"))


def test_without_the_training_length_heads_are_chosen_at_the_shortest():
    assert reference_length(make_sweep()) == 64
    assert reference_length(make_sweep(training_length="48")) == 32
    assert reference_length(make_sweep(training_length="32, 64")) == 32


def test_a_run_that_was_not_measured_has_no_head():
    sweep = make_sweep()
    sweep["answer_mass"][0, 1] = np.nan
    assert leading_head(sweep.isel(scheme=0, run=1), "answer", 64) is None
    line = traces_at(draw_mass(sweep), "x2")[0]
    layer, head = leading_head(sweep.isel(scheme=0, run=0), "answer", 64)
    assert np.allclose(line.y, sweep["answer_mass"].values[0, 0, :, layer, head])


def test_scheme_names_are_text():
    figure = draw_mass(make_sweep())
    assert any("&lt;b&gt;rope" in trace.name for trace in figure.data)
    assert not any("<b>rope" in str(trace.hovertemplate) for trace in figure.data)


def test_what_cannot_be_drawn():
    with pytest.raises(TypeError, match="expected a mass_sweep Dataset"):
        draw_mass({})
    sweep = make_sweep()
    sweep["tokens"][:] = 0
    with pytest.raises(ValueError, match="at least one measured cell"):
        draw_mass(sweep)
