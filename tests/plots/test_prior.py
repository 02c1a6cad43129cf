"""What the figures and panels of a prior show is what the result holds."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.colors import sample_colorscale, unlabel_rgb

from goatviz.analysis import prior_profile, prior_sources
from goatviz.analysis.prior_mix import PriorMixer
from goatviz.figures import plot_prior
from goatviz.models import goat_prior
from goatviz.plots import PRIOR_KINDS, draw_prior, marks, style
from goatviz.plots.base import LIMIT_BYTES, single
from goatviz.plots.prior import MIX_PANELS
from goatviz.plots.prior_maps import coarser
from goatviz.priors import ALiBiPrior, KeyTablePrior, Prior, UniformPrior
from tests.factories import PRIOR_CASES, lively, prior_result, tiny_lm, unpacked


def by_name(drawn, name):
    """The visible trace of a name in a panel or a figure."""
    figure = isinstance(drawn, go.Figure)
    traces = unpacked(drawn.to_dict()["data"]) if figure else drawn.traces
    (trace,) = [t for t in traces if t.get("name") == name and t.get("visible", True)]
    return trace


def names(figure):
    return {trace.name for trace in figure.data if trace.visible is not False}


def labels(menu):
    return [button.label for button in menu.buttons]


def size(figure):
    return len(figure.to_json(validate=False))


# --- figures of a profile ---


@pytest.mark.parametrize("case", PRIOR_CASES)
@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_every_kind_of_every_prior_is_known_to_plotly_and_light(kind, case):
    result = prior_result(case)
    figure = draw_prior(result, kind=kind)
    go.Figure(figure.to_dict())
    assert size(figure) < LIMIT_BYTES
    assert result.identical(prior_result(case))


@pytest.mark.parametrize("kind", ["decomposition", "matrix"])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_each_choice_shows_its_own_numbers(kind, head):
    figure = draw_prior(prior_result("toy"), kind=kind).choose(head=head)
    data = prior_result("toy").isel(layer=0).sel(head=head)
    for name, field in (("log-prior", "row_centred"), ("plan", "probability")):
        trace = by_name(figure, name)
        np.testing.assert_array_equal(trace["z"], data[field].values.astype(np.float32))
    if kind == "decomposition":
        for name, field in (("u(j)", "sink"), ("κ(lag)", "kernel"), ("relative", "relative")):
            wanted = data[field].values.astype(np.float32)
            np.testing.assert_array_equal(by_name(figure, name)["y"], wanted)
    assert f"layer 0, head {head} (SumPrior)" in figure.layout.title.subtitle.text


def test_the_kernel_and_its_spectrum():
    figure = draw_prior(prior_result("toy"), kind="kernel").choose(head=1)
    data = prior_result("toy").isel(layer=0).sel(head=1)
    spectrum = by_name(figure, "amplitude")
    np.testing.assert_allclose(spectrum["x"], 2 * np.pi / data["frequency"])
    np.testing.assert_allclose(spectrum["y"], data["amplitude"], rtol=1e-6)
    parts = by_name(figure, "relative")["y"] + by_name(figure, "recency −m·lag")["y"]
    np.testing.assert_allclose(by_name(figure, "κ(lag)")["y"], parts, atol=1e-5)
    assert by_name(figure, "recency −m·lag")["y"][0] == 0


def test_a_prior_without_fourier_term_has_no_spectrum():
    assert names(draw_prior(prior_result("alibi"), kind="kernel")) == {
        "κ(lag)",
        "relative",
        "recency −m·lag",
    }


def test_menus_open_on_the_head_that_tells_most():
    profile = prior_result("model")
    margin = profile["margin"].isel(query=-1).values
    span = np.ptp(profile["kernel"].values, axis=-1)
    for kind, rank in (("decomposition", margin), ("matrix", margin), ("kernel", span)):
        layer, head = np.unravel_index(rank.argmax(), rank.shape)
        figure = draw_prior(profile, kind=kind)
        layers, *heads = figure.layout.updatemenus
        assert layers.active == layer and [menu.active for menu in heads] == list(rank.argmax(1))
        assert f"layer {layer}, head {head} " in figure.layout.title.subtitle.text
        assert any("Menus open on" in note.text for note in figure.layout.annotations)


def test_every_head_of_a_large_profile_is_reached_in_two_menus():
    profile = prior_result("12 x 12")
    for kind in ("decomposition", "kernel", "matrix"):
        layers, *heads = draw_prior(profile, kind=kind).layout.updatemenus
        assert labels(layers) == [f"layer {n}" for n in range(12)]
        assert [labels(menu) for menu in heads] == [[f"head {n}" for n in range(12)]] * 12


def test_of_more_heads_than_a_figure_holds_it_shows_the_leading_ones(monkeypatch):
    monkeypatch.setattr("goatviz.plots.prior.LIMIT_BYTES", 150_000)
    profile = prior_result("12 x 12")
    figure = draw_prior(profile, kind="matrix")
    assert size(figure) < 150_000 and "leading heads of 144" in figure.to_json()
    layers, *heads = figure.layout.updatemenus
    shown = {
        (int(group.split()[1]), int(head.split()[1]))
        for group, menu in zip(labels(layers), heads, strict=True)
        for head in labels(menu)
    }
    margin = profile["margin"].isel(query=-1).values
    order = np.argsort(-margin, axis=None)[: len(shown)]
    assert 1 < len(shown) < 144
    assert shown == set(zip(*np.unravel_index(order, margin.shape), strict=True))


def test_all_heads_at_a_glance():
    profile = prior_result("toy")
    figure = draw_prior(profile, kind="heads")
    last = profile.isel(query=-1)
    span = profile["relative"].max("lag") - profile["relative"].min("lag")
    for name, values in (
        ("Margin of the top key", last["margin"]),
        ("Prior mass on the top key", last["top_mass"]),
        ("Recency slope m", profile["recency_slope"]),
        ("Range of the relative term", span),
    ):
        np.testing.assert_array_equal(by_name(figure, name)["z"], values.values.astype("f4"))
    texts = [t["text"] for t in figure.to_dict()["data"] if "texttemplate" in t]
    for head in range(3):
        key = int(last["margin_key"].values[0, head])
        assert any(f"key {key}" in t[0][head] or f"lag {39 - key}" in t[0][head] for t in texts)


def test_the_heads_of_an_implied_prior_show_what_is_explained():
    profile = prior_result("implied")
    figure = draw_prior(profile, kind="heads")
    share = by_name(figure, "Explained variance of the logits")
    wanted = profile["explained_variance"].values.astype(np.float32)
    np.testing.assert_array_equal(share["z"], wanted)
    assert (share["zmin"], share["zmax"]) == (0.0, 1.0)
    assert "Recency slope m" not in names(figure)
    assert figure.layout.title.text.startswith("Implied prior")
    one = float(profile["explained_variance"].sel(layer=1, head=2))
    chosen = draw_prior(profile).choose(layer=1, head=2)
    assert f"explains {one:.1%} of the logits" in chosen.layout.title.subtitle.text


def test_numbers_in_cells_can_be_read_on_their_ground():
    z = np.linspace(0, 1, 8)[None]
    texts = np.array([[str(n) for n in range(8)]], dtype=object)
    table = np.array(style.colour_table()[1:]) / 255
    linear = np.where(table <= 0.03928, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = (linear @ [0.2126, 0.7152, 0.0722])[(z[0] * 254).astype(int)]
    seen = []
    for trace in marks.cell_texts(np.arange(8), np.arange(1), z, texts, most=1.0):
        ink = {"#000000": 0.0, "#ffffff": 1.0}[trace["textfont"]["color"]]
        for at, text in enumerate(trace["text"][0]):
            if text:
                seen.append(int(text))
                low, high = sorted((ink, luminance[at]))
                assert (high + 0.05) / (low + 0.05) > 4.5
    assert sorted(seen) == list(range(8))


def test_colour_scales():
    figure = draw_prior(prior_result("toy"))
    signed, probability = by_name(figure, "log-prior"), by_name(figure, "plan")
    assert signed["zmin"] == -signed["zmax"] and signed["zmax"] > 0
    assert np.nanmax(np.abs(signed["z"])) == pytest.approx(signed["zmax"])
    assert (probability["zmin"], probability["zmax"]) == (0.0, 1.0)


def test_equal_decades_are_equal_steps_of_colour():
    one = np.arange(1)
    cells = one, one, np.ones((1, 1)), np.ones((1, 1), dtype=bool)
    scale = marks.probability_map(*cells, name="", hover="")[0]["colorscale"]
    places = np.array([place for place, _ in scale])
    colours = np.array([unlabel_rgb(colour) for _, colour in scale])
    for decade in (-4, -3, -2, -1, 0):
        got = [np.interp(10.0**decade, places, colours[:, c]) for c in range(3)]
        wanted = unlabel_rgb(sample_colorscale(style.SEQUENTIAL, 1 + decade / 4)[0])
        np.testing.assert_allclose(got, wanted, atol=2.0)


def test_selections_draw():
    profile = prior_result("toy")
    one = draw_prior(profile.sel(layer=0, head=2))
    assert not one.layout.updatemenus and "head 2" in one.layout.title.subtitle.text
    (menu,) = draw_prior(profile.isel(head=[0, 2])).layout.updatemenus
    assert labels(menu) == ["head 0", "head 2"]
    with pytest.raises(ValueError, match="profile must hold a head that is present"):
        draw_prior(profile.assign(present=profile["present"] & False))


class Broken(Prior):
    """A prior with minus infinity at a known place."""

    has_lanes = False

    def _log_prior(self, query, key):
        values = torch.zeros(1, len(query), len(key), dtype=torch.float64)
        return torch.where(key[:, 0] == 1, -torch.inf, values)


def test_special_cells_have_marks_of_their_own():
    profile = prior_profile(Broken(), length=6)
    cells = profile["row_centred"].values
    cells[0, 0, 4, 2], cells[0, 0, 5, 3], cells[0, 0, 3, 1] = np.nan, np.inf, -np.inf
    figure = draw_prior(profile, kind="matrix")
    for name, place in (("NaN", (4, 2)), ("+∞", (5, 3)), ("−∞", (3, 1))):
        cells = [t for t in figure.data if t.type == "heatmap" and t.name == name]
        assert not np.isnan(cells[0].z[place])
        legend = [t.showlegend for t in figure.data if t.type == "scatter" and t.name == name]
        assert any(legend)
    # What is not allowed is the ground that all cells leave open.
    assert [shape.fillcolor for shape in figure.layout.shapes] == [style.MASKED] * 2
    assert np.isnan(by_name(figure, "plan")["z"][~np.tril(np.ones((6, 6), dtype=bool))]).all()


def test_pooled_figures_say_so():
    figure = draw_prior(prior_profile(ALiBiPrior(1), length=5000, resolution=50, points=64))
    caption = figure.layout.annotations[-1].text.replace("<br>", " ")
    assert "50 of 5,000 queries" in caption and "mass is summed" in caption
    assert "100 keys around %{x" in by_name(figure, "plan")["hovertemplate"]
    u = by_name(figure, "u(j)")
    assert u["customdata"].shape == (len(u["y"]), 2)
    assert figure.layout.xaxis3.title.text == "key j [tokens, bins of 100]"
    long = draw_prior(prior_result("long"))
    assert long.layout.xaxis3.tickformat == "~s"


def test_a_coarser_profile_keeps_mass_means_and_extremes():
    fine = prior_profile(tiny_lm(), length=60)
    coarse = coarser(fine, 12, 20)
    wanted = prior_profile(tiny_lm(), length=60, resolution=12)
    np.testing.assert_array_equal(coarse["query"], wanted["query"])
    np.testing.assert_array_equal(coarse["key_bin"], wanted["key_bin"])
    for field in ("probability", "log_prior", "row_centred", "allowed", "bin_stop"):
        np.testing.assert_allclose(coarse[field], wanted[field], atol=1e-5, err_msg=field)
    curves = prior_profile(tiny_lm(), length=60, points=20)
    for field in ("sink", "sink_low", "sink_high", "kernel", "kernel_low", "kernel_high"):
        np.testing.assert_allclose(coarse[field], curves[field], atol=1e-12, err_msg=field)
    two_sided = coarser(prior_result("bidirectional"), 16, 20)
    assert two_sided.sizes["lag"] <= 20 and int(two_sided["lag_stop"][-1]) == 40


def test_notes_are_shown_and_escaped():
    profile = prior_profile(ALiBiPrior(1), length=8)
    profile.attrs["notes"] = "gated <b>"
    figure = draw_prior(profile)
    assert any("⚠ Gated &lt;b&gt;" in note.text for note in figure.layout.annotations)


def test_the_verb_draws_many_heads_finer_than_it_needs_to():
    model = tiny_lm(num_layers=12, num_heads=12, embed_dim=144, prior_rank=1, sink_rank=1)
    for kind in PRIOR_KINDS:
        figure = plot_prior(model, kind=kind, length=512)
        assert size(figure) < LIMIT_BYTES
        if kind != "heads":
            assert len(labels(figure.layout.updatemenus[0])) == 12
    assert plot_prior(model, kind="matrix", layers=[3, 7]).layout.title.subtitle.text


# --- panels of a mix ---


def mixer(prior=None, *, length=64, causal=True):
    prior = prior or lively(goat_prior(2, rank=3, sink_rank=2, training_length=64))
    return PriorMixer(prior_sources(prior, causal=causal)[0], length=length)


@pytest.mark.parametrize("scales", [{}, {"sink": 0.0, "relative": 0.0, "recency": 0.0}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 64, 1000, 40_000])
def test_every_panel_at_every_length(length, causal, scales):
    mix = mixer(length=length, causal=causal).mix(**scales, content_range=1.0)
    before = mix.copy(deep=True)
    for panel, draw in MIX_PANELS.items():
        drawn = draw(mix)
        figure = single(drawn, width=340)
        go.Figure(figure.to_dict())
        for axis in (drawn.x, drawn.y):
            assert any(unit in axis["title"] for unit in ("[tokens", "[nats]", "probability"))
        assert size(figure) < 400_000
        if panel == "plan":
            plan = by_name(drawn, "plan")
            np.testing.assert_array_equal(np.isnan(plan["z"]), ~mix["allowed"].values)
            assert drawn.masked == (causal and length > 1)
    assert mix.identical(before)


@pytest.mark.parametrize("prior", [UniformPrior(), ALiBiPrior(1), KeyTablePrior(torch.ones(1, 1))])
def test_priors_that_lack_something(prior):
    mix = mixer(prior).mix()
    for draw in MIX_PANELS.values():
        go.Figure(single(draw(mix)).to_dict())
    notes = [note["text"] for note in MIX_PANELS["spectrum"](mix).annotations]
    assert notes == ["length", "no Fourier term"]


@pytest.mark.parametrize("panel", MIX_PANELS)
def test_traces_are_the_same_whatever_the_scales_are(panel):
    source = mixer()
    seen = {
        tuple((t["type"], t["name"]) for t in MIX_PANELS[panel](source.mix(**scales)).traces)
        for scales in ({}, {"sink": 0.0}, {"sink": 0.0, "relative": 0.0, "recency": 0.0})
    }
    assert len(seen) == 1


def test_what_is_drawn_is_the_mix():
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
        shown = by_name(MIX_PANELS[panel](mix), name)["y"]
        wanted = np.where(np.isfinite(mix[field]), mix[field], np.nan)
        np.testing.assert_allclose(shown, wanted, rtol=1e-6, err_msg=f"{panel}: {name}")
    plan = by_name(MIX_PANELS["plan"](mix), "plan")
    np.testing.assert_array_equal(plan["z"], mix["probability"].values.astype(np.float32))
    period = by_name(MIX_PANELS["spectrum"](mix), "amplitude")["x"]
    np.testing.assert_allclose(period, 2 * np.pi / mix["frequency"])
    margin = MIX_PANELS["margin"](mix)
    assert set(by_name(margin, "reach of content")["y"]) == {2.0}
    enough = by_name(margin, "enough for half the mass")["y"]
    np.testing.assert_allclose(enough[1:], np.log(np.arange(1, 50)), rtol=1e-6)


def test_a_panel_takes_a_head_or_a_mix():
    prior = lively(goat_prior(2, rank=3, sink_rank=2, training_length=64))
    mix = mixer(prior, length=40).mix()
    head = prior_profile(prior, length=40).sel(layer=0, head=0)
    for panel in ("sink", "kernel", "plan", "margin", "spectrum"):
        one, other = MIX_PANELS[panel](mix), MIX_PANELS[panel](head)
        assert (one.title, one.x, one.y) == (other.title, other.x, other.y)
        shared = {"sink": "u(j)", "kernel": "κ(lag)", "spectrum": "amplitude"}.get(panel, panel)
        values = [by_name(drawn, shared) for drawn in (one, other)]
        axis = "z" if panel == "plan" else "y"
        np.testing.assert_allclose(values[0][axis], values[1][axis], rtol=1e-5, atol=1e-6)


def test_both_ends_of_a_long_row_can_be_read():
    mix = mixer(length=100_000).mix()
    panel = MIX_PANELS["last query"](mix)
    assert panel.x["ticktext"][0] == "0" and panel.x["ticktext"][-1] == "99,999"
    for place, text in zip(panel.x["tickvals"], panel.x["ticktext"], strict=True):
        assert f"{int(mix['last_key'][place]):,}" == text
    assert "a point" in panel.x["title"]
    # The first and the last keys are exact, and lie as far apart as the bins between.
    width = (mix["last_stop"] - mix["last_key"]).values
    breaks = sorted(shape["x0"] for shape in panel.shapes)
    assert np.all(width[: int(breaks[0] + 0.5)] == 1) and np.all(width[int(breaks[1] + 0.5) :] == 1)
    assert np.all(np.diff(by_name(panel, "π")["x"]) == 1)
