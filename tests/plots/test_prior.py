"""What the figures of a prior show is what the profile holds."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.colors import sample_colorscale, unlabel_rgb

from goatviz.analysis import prior_profile
from goatviz.models import goat_prior
from goatviz.plots import draw_prior, style
from goatviz.plots import legacy_marks as marks
from goatviz.priors import ALiBiPrior, Prior


@pytest.fixture
def profile():
    torch.manual_seed(0)
    prior = goat_prior(3, rank=3, sink_rank=2, training_length=64)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return prior_profile(prior, length=40)


def chosen(figure, number):
    """The traces that are visible after the menu's entry of this number is taken."""
    (menu,) = figure.layout.updatemenus
    visible = menu.buttons[number].args[0]["visible"]
    assert len(visible) == len(figure.data)
    return [trace for trace, shown in zip(figure.data, visible, strict=True) if shown]


def by_name(traces, name):
    (trace,) = [t for t in traces if t.name == name]
    return trace


@pytest.mark.parametrize("kind", ["decomposition", "matrix"])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_each_choice_shows_its_own_numbers(profile, kind, head):
    figure = draw_prior(profile, kind=kind)
    traces = chosen(figure, head)
    data = profile.isel(layer=0).sel(head=head)
    for name, field in (("row-centred", "row_centred"), ("probability", "probability")):
        trace = by_name(traces, name)
        np.testing.assert_array_equal(trace.z, data[field].values.astype(np.float32))
        assert f"layer 0, head {head}" in trace.hovertemplate
        assert "query %{y}, key %{x}" in trace.hovertemplate
        assert "%{z" in trace.hovertemplate
    if kind == "decomposition":
        np.testing.assert_array_equal(
            by_name(traces, "sink").y, data["sink"].values.astype(np.float32)
        )
        np.testing.assert_array_equal(
            by_name(traces, "kernel κ").y, data["kernel"].values.astype(np.float32)
        )
    title = figure.layout.updatemenus[0].buttons[head].args[1]["title.subtitle.text"]
    assert f"head {head}" in title


def test_the_first_head_is_shown_before_a_choice(profile):
    figure = draw_prior(profile)
    before = [t for t in figure.data if t.visible is not False]
    assert [t.name for t in before] == [t.name for t in chosen(figure, 0)]


def test_the_kernel_and_its_spectrum(profile):
    traces = chosen(draw_prior(profile, kind="kernel"), 1)
    data = profile.isel(layer=0).sel(head=1)
    spectrum = by_name(traces, "amplitude")
    np.testing.assert_allclose(spectrum.x, data["frequency"].values)
    np.testing.assert_allclose(spectrum.y, data["amplitude"].values, rtol=1e-6)
    parts = by_name(traces, "relative").y + by_name(traces, "recency −m·lag").y
    np.testing.assert_allclose(by_name(traces, "kernel κ").y, parts, atol=1e-5)
    assert by_name(traces, "recency −m·lag").y[0] == 0


def test_all_heads_at_a_glance(profile):
    figure = draw_prior(profile, kind="heads")
    last = profile.isel(query=-1)
    wanted = (last["margin"], last["top_mass"], profile["recency_slope"])
    for trace, values in zip(figure.data, wanted, strict=False):
        np.testing.assert_array_equal(trace.z, values.values.astype(np.float32))
    texts = np.asarray(figure.data[0].text)
    for head in range(3):
        key = int(last["margin_key"].values[0, head])
        assert f"key {key}" in texts[0, head] or f"lag {39 - key}" in texts[0, head]


def test_colour_scales(profile):
    traces = chosen(draw_prior(profile), 0)
    signed, probability = by_name(traces, "row-centred"), by_name(traces, "probability")
    assert signed.zmin == -signed.zmax and signed.zmax > 0
    assert np.nanmax(np.abs(signed.z)) == pytest.approx(signed.zmax)
    assert (probability.zmin, probability.zmax) == (0.0, 1.0)


def test_equal_decades_are_equal_steps_of_colour():
    scale = marks.probability_map(np.arange(1), np.arange(1), np.ones((1, 1)), hover="").colorscale
    places = np.array([place for place, _ in scale])
    colours = np.array([unlabel_rgb(colour) for _, colour in scale])
    for decade in (-4, -3, -2, -1, 0):
        got = [np.interp(10.0**decade, places, colours[:, c]) for c in range(3)]
        wanted = unlabel_rgb(sample_colorscale(style.SEQUENTIAL, 1 + decade / 4)[0])
        np.testing.assert_allclose(got, wanted, atol=2.0)


def test_selections_draw(profile):
    one = draw_prior(profile.sel(layer=0, head=2))
    assert not one.layout.updatemenus
    assert "head 2" in one.layout.title.subtitle.text
    assert len(draw_prior(profile.isel(head=[0, 2])).layout.updatemenus[0].buttons) == 2
    with pytest.raises(ValueError, match="no head that is present"):
        draw_prior(profile.assign(present=profile["present"] & False))


class Broken(Prior):
    """A prior with minus infinity, plus infinity and NaN at known places."""

    has_lanes = False

    def _log_prior(self, query, key):
        values = torch.zeros(1, len(query), len(key), dtype=torch.float64)
        values = torch.where(key[:, 0] == 1, -torch.inf, values)
        return values


def test_special_cells_have_marks_of_their_own():
    profile = prior_profile(Broken(), length=6)
    cells = profile["row_centred"].values
    cells[0, 0, 4, 2], cells[0, 0, 5, 3] = np.nan, np.inf
    cells[0, 0, 3, 1] = -np.inf
    figure = draw_prior(profile, kind="matrix")
    special = {t.name for t in figure.data if isinstance(t, go.Heatmap)}
    assert {"not allowed", "NaN", "−∞", "+∞"} <= special
    for name, place in (("NaN", (4, 2)), ("+∞", (5, 3)), ("−∞", (3, 1))):
        trace = next(t for t in figure.data if isinstance(t, go.Heatmap) and t.name == name)
        assert not np.isnan(trace.z[place]) and name in trace.hovertemplate
    masked = next(t for t in figure.data if t.name == "not allowed")
    above = ~np.tril(np.ones((6, 6), dtype=bool))
    np.testing.assert_array_equal(~np.isnan(masked.z), above)
    legend = {t.name for t in figure.data if isinstance(t, go.Scatter)}
    assert {"not allowed", "NaN", "−∞", "+∞"} <= legend


def test_pooled_figures_say_so():
    figure = draw_prior(prior_profile(ALiBiPrior(1), length=5000, resolution=50, points=64))
    caption = " ".join(a.text for a in figure.layout.annotations)
    assert "mass is summed" in caption and "50 queries, evenly spaced" in caption
    hover = next(t for t in figure.data if t.name == "probability").hovertemplate
    assert "100 keys from %{x}" in hover
    sink = next(t for t in figure.data if t.name == "sink")
    assert sink.customdata.shape == (len(sink.y), 2)


def test_notes_are_shown_and_escaped():
    profile = prior_profile(ALiBiPrior(1), length=8)
    profile.attrs["notes"] = "gated <b>"
    figure = draw_prior(profile)
    assert any("⚠ gated &lt;b&gt;" in a.text for a in figure.layout.annotations)
