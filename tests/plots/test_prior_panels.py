"""Panels of a scaled prior: what they show, that they can be read, and that they stay light."""

import copy

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from torch import nn

from goatviz.analysis import prior_profile, prior_sources
from goatviz.analysis.prior_mix import PriorMixer
from goatviz.models import goat_prior
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.panels import side_by_side
from goatviz.plots.prior_panels import PRIOR_PANELS, draw_prior_panel, mix_summary
from goatviz.priors import ALiBiPrior, KeyTablePrior, UniformPrior


def lively(heads=2):
    torch.manual_seed(0)
    prior = goat_prior(heads, rank=3, sink_rank=2, training_length=64)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.7)
    return prior


def mixer(prior=None, *, length=64, causal=True):
    return PriorMixer(prior_sources(prior or lively(), causal=causal)[0], length=length)


def trace(figure, name):
    (found,) = [each for each in figure.data if each.name == name]
    return found


@pytest.mark.parametrize("scales", [{}, {"sink": 0.0, "relative": 0.0, "recency": 0.0}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 64, 1000, 40_000])
@pytest.mark.parametrize("panel", PRIOR_PANELS)
def test_every_panel_at_every_length(panel, length, causal, scales):
    mix = mixer(length=length, causal=causal).mix(**scales, content_range=1.0)
    before = mix.copy(deep=True)
    figure = draw_prior_panel(mix, panel)
    assert mix.identical(before)
    assert isinstance(figure, Figure) and figure.layout.title.text
    # Every name and value is one that plotly knows.
    checked = go.Figure(copy.deepcopy(figure.to_dict()))
    assert checked.layout.template == style.TEMPLATE
    for axis in (checked.layout.xaxis, checked.layout.yaxis):
        title = axis.title.text
        assert any(unit in title for unit in ("[token", "[nats]", "probability"))
    assert len(figure.to_json()) < 400_000
    for each in figure.data:
        if isinstance(each, go.Heatmap):
            assert not np.isinf(np.asarray(each.z, dtype=float)).any()
    if panel == "plan":
        # What the query may not see is the ground that the cells leave open.
        assert figure.layout.plot_bgcolor == style.MASKED
        np.testing.assert_array_equal(np.isnan(trace(figure, "plan").z), ~mix["allowed"].values)


@pytest.mark.parametrize("prior", [UniformPrior(), ALiBiPrior(1), KeyTablePrior(torch.ones(1, 1))])
@pytest.mark.parametrize("panel", PRIOR_PANELS)
def test_priors_that_lack_something(panel, prior):
    figure = draw_prior_panel(mixer(prior).mix(), panel)
    if panel == "spectrum":
        said = [note.text for note in figure.layout.annotations]
        assert said == ["length", "no Fourier term"]


@pytest.mark.parametrize("panel", PRIOR_PANELS)
def test_traces_are_the_same_whatever_the_scales_are(panel):
    source = mixer()
    names = {
        tuple((each.type, each.name) for each in draw_prior_panel(source.mix(**scales), panel).data)
        for scales in ({}, {"sink": 0.0}, {"sink": 0.0, "relative": 0.0, "recency": 0.0})
    }
    assert len(names) == 1


def test_what_is_drawn_is_the_result():
    mix = mixer(length=50).mix(sink=0.5, relative=2.0, content_range=2.0)
    for panel, name, field in (
        ("sink", "u(j)", "sink"),
        ("sink", "learned", "learned_sink"),
        ("kernel", "κ(lag)", "kernel"),
        ("kernel", "learned", "learned_kernel"),
        ("last query", "π", "last"),
        ("last query", "learned", "learned_last"),
        ("spectrum", "amplitude", "amplitude"),
        ("spectrum", "learned", "learned_amplitude"),
        ("margin", "margin", "margin"),
        ("margin", "learned", "learned_margin"),
    ):
        shown = trace(draw_prior_panel(mix, panel), name).y
        wanted = np.where(np.isfinite(mix[field]), mix[field], np.nan).astype(np.float32)
        np.testing.assert_array_equal(shown, wanted, err_msg=f"{panel}: {name}")
    plan = trace(draw_prior_panel(mix, "plan"), "plan")
    np.testing.assert_array_equal(plan.z, mix["probability"].values.astype(np.float32))
    period = trace(draw_prior_panel(mix, "spectrum"), "amplitude").x
    np.testing.assert_allclose(period, 2 * np.pi / mix["frequency"])
    reach = trace(draw_prior_panel(mix, "margin"), "reach of content")
    assert set(reach.y) == {2.0}
    enough = trace(draw_prior_panel(mix, "margin"), "enough for half the mass")
    np.testing.assert_allclose(enough.y[1:], np.log(np.arange(1, 50)), rtol=1e-6)


def test_both_ends_of_a_long_row_can_be_read():
    mix = mixer(length=100_000).mix()
    figure = draw_prior_panel(mix, "last query")
    axis = figure.layout.xaxis
    assert list(axis.ticktext)[0] == "0" and list(axis.ticktext)[-1] == "99,999"
    for place, text in zip(axis.tickvals, axis.ticktext, strict=True):
        assert f"{int(mix['last_key'][place]):,}" == text
    assert "a point" in axis.title.text
    # The first and the last keys are exact, and lie as far apart as the bins between.
    width = (mix["last_stop"] - mix["last_key"]).values
    breaks = sorted(shape.x0 for shape in figure.layout.shapes)
    assert np.all(width[: int(breaks[0] + 0.5)] == 1) and np.all(width[int(breaks[1] + 0.5) :] == 1)
    assert np.all(np.diff(trace(figure, "π").x) == 1)


def test_panels_stand_side_by_side_with_their_bars():
    mix = mixer().mix()
    both = side_by_side([draw_prior_panel(mix, name) for name in ("sink", "plan", "spectrum")])
    bar = trace(both, "probability bar").marker.colorbar
    left, right = both.layout.xaxis2.domain
    low, high = both.layout.yaxis2.domain
    assert right < bar.x < right + 0.05 and bar.y == pytest.approx((low + high) / 2)
    line = both.layout.shapes[0]
    assert line.xref == "x3" and line.x0 == 64


def test_a_mix_in_words():
    source = mixer(
        KeyTablePrior(torch.tensor([[6.0, 0.0]])) + ALiBiPrior(1, slopes=[0.01]), length=99
    )
    said = mix_summary(source.mix(recency=0.0, sink=0.5, content_range=2.0, temperature=0.5))
    assert "99 tokens: sink × 0.5, recency off." in said
    assert "key 0 leads by a margin of 3 nats" in said
    assert "up to 21 tokens (1 + e^margin)" in said
    assert "moves log-odds by at most 4 nats" in said and "and can unseat it" in said
    assert "cannot unseat it" in mix_summary(source.mix(recency=0.0, content_range=2.0))
    off = mix_summary(source.mix(recency=0.0, sink=0.0))
    assert "no key leads" in off and "Entropy 4.6 of at most 4.6 nats (99 keys)" in off
    assert "as learned" in mix_summary(source.mix())
    assert "sees one key" in mix_summary(mixer(length=1).mix())
    steep = mixer(KeyTablePrior(torch.tensor([[800.0, 0.0]]))).mix()
    assert "any number of tokens" in mix_summary(steep) and "100% of the prior" in mix_summary(
        steep
    )
    long = mix_summary(mixer(length=3000).mix())
    assert "Plan: 125 queries, evenly spaced; mass summed in 125 equal bins" in long


def test_wrong_results_and_panels_are_refused():
    with pytest.raises(TypeError, match="prior_mix.*prior_profile"):
        draw_prior_panel(prior_profile(ALiBiPrior(1), length=8), "sink")
    with pytest.raises(TypeError, match="expected a prior_mix Dataset, got NoneType"):
        mix_summary(None)
    with pytest.raises(ValueError, match="panel must be one of sink, kernel.*got 'matrix'"):
        draw_prior_panel(mixer().mix(), "matrix")
