"""What the figures of attention sinks show is what the profile holds."""

import json
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest

from goatviz.plots import SINK_KINDS, Figure, draw_sinks, sink_panels, sink_view, style
from goatviz.plots.menus import MAX_CHOICES
from goatviz.plots.sink_view import View, choice_of
from goatviz.results import SINK_PROFILE, make_result, save_result

LIMIT_BYTES = 2_000_000
HOSTILE = ["the", "the", "<s>", "</script>", "<b>", "Ã©", "café", "日本", "🙂", "Ġcaf\u00c3\u00a9"]
MAPS = ("logits", "probabilities")


def sink_result(
    layers=3,
    heads=4,
    keys=30,
    *,
    inputs=5,
    tokens=None,
    maps=8,
    causal=True,
    column=False,
    prior="learned",
    bins=(24, 20),
    notes="",
    absent=((0, 1),),
    seed=0,
):
    """A profile as an analysis would make it: strength of the sink grows with layer and head."""
    rng = np.random.default_rng(seed)
    shape = (layers, heads)
    present = np.ones(shape, dtype=bool)
    for place in absent:
        present[place] = False

    def of_heads(values):
        values = np.array(np.broadcast_to(values, np.broadcast_shapes(np.shape(values))), float)
        values[~present] = np.nan
        return values

    strength = np.clip(np.add.outer(np.arange(layers), np.arange(heads)) / (layers + heads), 0, 1)
    strength = np.clip(strength + 0.15 * rng.standard_normal(shape), 0.01, 0.95)
    position = np.arange(keys)
    n = keys
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, n + 1)))
    uniform = (harmonic[n] - harmonic[:n]) / (n - position) if causal else np.full(n, 1 / n)
    noise = np.exp(0.4 * rng.standard_normal((*shape, n)))
    importance = (1 - strength[..., None]) * uniform * noise
    importance[..., 0] += strength
    importance = np.minimum(importance, 1.0)
    observers = inputs * (n - position) if causal else np.full(n, inputs * n)
    rare = observers < min(4, inputs * n)
    importance[..., rare] = np.nan
    importance = of_heads(importance)
    width = 0.15 * importance if inputs > 1 else np.full_like(importance, np.nan)
    first = np.clip(strength + 0.08 * rng.standard_normal((inputs, *shape)), 0.0, 0.99)
    first[:, ~present] = np.nan
    thresholds = np.linspace(0, 1, 101)
    above = first[..., None] > thresholds
    sink_rate = of_heads(above.mean(axis=0))
    rate = above[:, present].mean(axis=(0, 1))
    spread = 0.08 * np.sqrt(4 * rate * (1 - rate)) if inputs > 1 else np.full(101, np.nan)
    edges = np.linspace(0, 12, bins[0] + 1)
    masses = np.linspace(0, 1, bins[1] + 1)
    centre, mass = (edges[:-1] + edges[1:]) / 2, (masses[:-1] + masses[1:]) / 2
    mean_mass = strength[..., None] / (1 + np.exp((centre - 7) / 2))
    count = np.floor(
        4000
        * np.exp(-0.5 * ((centre - 3) / 1.5) ** 2)[:, None]
        * np.exp(-0.5 * ((mass - mean_mass[..., None]) / 0.08) ** 2)
    )
    low, high = np.full(shape, 1 / n), np.clip(0.1 + 0.8 * strength, 0, 0.98)
    data = {
        "layer_name": [f"transformer.h.{at}.attn" for at in range(layers)],
        "present": present,
        "importance": importance,
        "importance_low": importance - width,
        "importance_high": importance + width,
        "observers": np.broadcast_to(observers, (layers, n)),
        "first_importance": first,
        "sink_rate": sink_rate,
        "any_sink_rate": np.minimum(1, sink_rate + 0.1 * (1 - thresholds)),
        "model_sink_rate": rate,
        "model_sink_rate_low": np.clip(rate - spread, 0, 1),
        "model_sink_rate_high": np.clip(rate + spread, 0, 1),
        "first_mass": of_heads(strength),
        "largest_mass": of_heads(np.clip(strength + 0.1, 0, 1)),
        "recent_mass": of_heads(1 - strength),
        "sink_column_mass": of_heads(0.3 * strength if column else np.zeros(shape)),
        "entropy": of_heads(3 - strength),
        "content_range": of_heads(2 + strength),
        "margin": of_heads(4 * strength) if prior != "none" else np.full(shape, np.nan),
        "protected_length": of_heads(np.exp(4 * strength))
        if prior != "none"
        else np.full(shape, np.nan),
        "range_stop": edges[1:],
        "mass_stop": masses[1:],
        "signal_count": np.where(present[..., None, None], count, 0),
        "signal_first_mass": of_heads(mean_mass),
        "signal_largest_mass": of_heads(np.minimum(1, mean_mass + 0.1)),
        "signal_recent_mass": of_heads(1 - mean_mass - 0.05),
        "prior_first_low": of_heads(low) if prior != "none" else np.full(shape, np.nan),
        "prior_first_high": of_heads(high) if prior != "none" else np.full(shape, np.nan),
    }
    coords = {
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "key": position,
        "input": np.arange(inputs),
        "threshold": thresholds,
        "range_bin": edges[:-1],
        "mass_bin": masses[:-1],
    }
    if tokens is not None:
        data["token"] = np.asarray(tokens, dtype=str)
    if maps:
        allowed = np.tri(maps, dtype=bool) if causal else np.ones((maps, maps), dtype=bool)
        logits = rng.standard_normal((*shape, maps, maps))
        logits[..., 0] += 4 * strength[..., None]
        weights = np.where(allowed, np.exp(logits), 0)
        weights /= weights.sum(axis=-1, keepdims=True)
        data["map_logits"] = of_heads(np.where(allowed, logits, np.nan))
        data["map_probability"] = of_heads(np.where(allowed, weights, np.nan))
        data["map_allowed"] = np.broadcast_to(allowed, (layers, maps, maps))
        coords |= {"map_query": np.arange(maps), "map_key": np.arange(maps)}
    attrs = {
        "source": "gpt2 <small>",
        "n_inputs": inputs,
        "length": n,
        "length_min": max(1, n - 3) if inputs > 1 else n,
        "threshold": 0.3,
        "min_observers": min(4, inputs * n),
        "recent": 128,
        "first_key": 0,
        "causal": int(causal),
        "confidence": 0.95,
        "n_queries": inputs * n,
        "notes": notes,
        "prior": prior,
    }
    return make_result(SINK_PROFILE, data, coords=coords, attrs=attrs)


def check_contract(figure):
    assert isinstance(figure, Figure)
    assert figure.layout.title.text and figure.layout.title.subtitle.text
    for x, y in {(t.xaxis or "x", t.yaxis or "y") for t in figure.data}:
        for name, kind in ((x, "x"), (y, "y")):
            axis = figure.layout[f"{kind}axis{name[1:]}"]
            assert axis.title.text or axis.showticklabels is False, f"axis {name} has no title"
    special = {"not allowed", "NaN", "−∞", "+∞", "no such head", "no value"}
    for trace in heatmaps(figure):
        z = np.asarray(trace.z, dtype=float)
        assert not np.isinf(z).any(), "an infinite value has no colour"
        if trace.name == "queries":
            continue
        marked = [
            ~np.isnan(np.asarray(other.z, dtype=float))
            for other in figure.data
            if other.name in special
            and isinstance(other, go.Heatmap)
            and other.xaxis == trace.xaxis
        ]
        marked = np.logical_or.reduce([np.zeros(z.shape, dtype=bool), *marked])
        assert (np.isnan(z) <= marked).all(), "a gap without a mark"
    assert len(figure.to_json()) < LIMIT_BYTES


def heatmaps(figure):
    marked = {"not allowed", "no such head", "no value"}
    return [t for t in figure.data if isinstance(t, go.Heatmap) and t.name not in marked]


def named(traces, name):
    (trace,) = [t for t in traces if t.name == name]
    return trace


def labels(figure):
    return [button.label for button in figure.layout.updatemenus[0].buttons]


def chosen(figure, label):
    """The traces that are visible after the menu's entry of this label is taken."""
    (button,) = [b for b in figure.layout.updatemenus[0].buttons if b.label == label]
    visible = button.args[0]["visible"]
    assert len(visible) == len(figure.data)
    return [trace for trace, shown in zip(figure.data, visible, strict=True) if shown]


def captions(figure):
    return " ".join(a.text for a in figure.layout.annotations)


def uniform_importance(j, n, causal):
    return np.mean([1 / (i + 1) for i in range(j, n)]) if causal else 1 / n


@pytest.fixture(scope="module")
def profile():
    return sink_result()


# --- every kind ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("keys", "inputs"), [(1, 1), (2, 1), (64, 3), (1000, 2), (16_384, 2)])
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_every_kind_at_every_length(kind, keys, inputs, causal):
    result = sink_result(2, 3, keys, inputs=inputs, maps=min(keys, 40), causal=causal)
    check_contract(draw_sinks(result, kind=kind))


@pytest.mark.parametrize(
    ("layers", "heads", "keys", "maps"), [(12, 12, 16_384, 64), (32, 32, 300, 64), (1, 128, 64, 40)]
)
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_large_models_stay_light(kind, layers, heads, keys, maps):
    figure = draw_sinks(sink_result(layers, heads, keys, maps=maps, bins=(90, 70)), kind=kind)
    check_contract(figure)
    if kind not in ("overview", "rate"):
        assert len(labels(figure)) <= MAX_CHOICES + (kind == "signal")
        assert "menu: " in captions(figure)


def test_a_large_overview_keeps_its_ticks_apart():
    figure = draw_sinks(sink_result(128, 128, 20, maps=0, bins=(2, 2)))
    check_contract(figure)
    assert list(figure.layout.xaxis.tickvals) == list(range(0, 128, 16))
    assert heatmaps(figure)[0].texttemplate is None


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_a_profile_of_nothing_but_gaps(kind):
    result = sink_result()
    for name in ("first_importance", "importance", "signal_first_mass", "map_logits"):
        result[name][:] = np.nan
    result["signal_count"][:] = 0
    result["range_stop"][-1] = np.inf
    result["model_sink_rate"][:] = np.nan
    figure = draw_sinks(result, kind=kind)
    check_contract(figure)
    if kind == "overview":
        gaps = [t for t in figure.data if isinstance(t, go.Heatmap) and t.name == "no value"]
        assert [np.nansum(t.z) for t in gaps] == [11]
    if kind == "logits":
        assert any(t.name == "NaN" for t in chosen(figure, "layer 1, head 0"))


@pytest.mark.parametrize("kind", SINK_KINDS)
@pytest.mark.parametrize(
    "chosen_part", [{"layer": 1}, {"head": 2}, {"layer": 1, "head": 2}, {"input": 0}, {"key": 0}]
)
def test_selections_draw(profile, kind, chosen_part):
    check_contract(draw_sinks(profile.sel(chosen_part), kind=kind))
    check_contract(draw_sinks(profile.sel(chosen_part, drop=True), kind=kind))


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_drawing_leaves_the_result_alone(profile, kind):
    before = profile.copy(deep=True)
    draw_sinks(profile, kind=kind, threshold=0.2, layer=1)
    assert profile.identical(before)


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_the_caption_says_what_was_watched(kind):
    result = sink_result(notes="two inputs were cut | a <b> note")
    text = captions(draw_sinks(result, kind=kind))
    assert "gpt2 &lt;small&gt; · 5 inputs of 27 to 30 tokens · causal · prior: learned" in text
    assert "⚠ two inputs were cut<br>⚠ a &lt;b&gt; note" in text
    other = sink_result(inputs=1, causal=False, prior="none")
    text = captions(draw_sinks(other, kind=kind))
    assert "1 input of 30 tokens · not causal · no explicit prior" in text and "⚠" not in text


# --- overview ---


def test_overview_is_the_profile(profile):
    figure = draw_sinks(profile)
    first, largest, recent = heatmaps(figure)
    mean = profile["first_importance"].mean("input").values
    np.testing.assert_allclose(first.z, mean, rtol=1e-6)
    np.testing.assert_array_equal(largest.z, profile["largest_mass"].values.astype(np.float32))
    np.testing.assert_array_equal(recent.z, profile["recent_mass"].values.astype(np.float32))
    assert np.argwhere(~np.isnan(named(figure.data[:2], "no such head").z)).tolist() == [[0, 1]]
    for row, col in np.ndindex(first.z.shape):
        value = first.z[row, col]
        text = first.text[row][col]
        assert text == "" if np.isnan(value) else float(text) == pytest.approx(value, abs=0.0051)
    assert all((t.zmin, t.zmax) == (0, 1) for t in (first, largest, recent))
    assert recent.name == "Last 128 keys"


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 0.95])
def test_sinks_are_framed_where_the_mean_exceeds_the_threshold(profile, threshold):
    epsilon = 0.3 if threshold is None else threshold
    figure = draw_sinks(profile, threshold=threshold)
    mean = profile["first_importance"].mean("input").values
    frames = named(figure.data, f"importance above ε = {epsilon:g}")
    centres = {(round(y), round(x)) for x, y in zip(frames.x, frames.y, strict=True) if x == x}
    assert centres == {tuple(at) for at in np.argwhere(mean > epsilon)}
    bar = heatmaps(figure)[0].colorbar
    assert bar.ticktext[list(bar.tickvals).index(epsilon)] == f"ε = {epsilon:g}"


def test_cells_too_small_for_a_frame_have_a_dot():
    result = sink_result(30, 30, 20, maps=0)
    dots = named(draw_sinks(result).data, "importance above ε = 0.3")
    mean = result["first_importance"].mean("input").values
    assert set(zip(dots.y, dots.x, strict=True)) == {tuple(at) for at in np.argwhere(mean > 0.3)}


def test_the_subtitle_is_the_rate_of_the_model(profile):
    at = profile.sel(threshold=0.3)
    low, rate, high = (100 * float(at[f"model_sink_rate{e}"]) for e in ("_low", "", "_high"))
    wanted = f"sink rate {rate:.1f} % [{low:.1f}, {high:.1f}] at ε = 0.3 "
    wanted += "(first key, strict >, 5 inputs)"
    for kind in ("overview", "rate"):
        assert draw_sinks(profile, kind=kind).layout.title.subtitle.text == wanted
        part = draw_sinks(profile, kind=kind, layer=1).layout.title.subtitle.text
        assert part == wanted + ", all layers"
    one = draw_sinks(sink_result(inputs=1)).layout.title.subtitle.text
    assert "[" not in one and "1 input)" in one


def test_a_threshold_off_the_grid_is_counted(profile):
    values = profile["first_importance"].values
    rate = 100 * np.mean(values[np.isfinite(values)] > 0.3141)
    text = draw_sinks(profile, threshold=0.3141).layout.title.subtitle.text
    assert text.startswith(f"sink rate of the heads drawn {rate:.1f} % at ε = 0.3141")


def test_the_extra_column_is_drawn_where_there_is_one(profile):
    result = sink_result(column=True)
    column = heatmaps(draw_sinks(result))[3]
    assert column.name == "Extra sink column"
    np.testing.assert_array_equal(column.z, result["sink_column_mass"].values.astype(np.float32))
    assert len(heatmaps(draw_sinks(profile))) == 3


def test_heads_with_gaps_between_them_keep_their_names(profile):
    figure = draw_sinks(profile.sel(head=[0, 3], layer=[0, 2]))
    (first, *_) = heatmaps(figure)
    assert list(figure.layout.xaxis.ticktext) == ["0", "3"] and list(first.x) == [0, 1]
    assert first.customdata.tolist() == [[[0, 0], [0, 3]], [[2, 0], [2, 3]]]


# --- importance of keys ---


@pytest.mark.parametrize("label", ["layer 0, head 0", "layer 2, head 3"])
def test_each_choice_shows_its_own_importance(profile, label):
    traces = chosen(draw_sinks(profile, kind="profile"), label)
    layer, head = int(label[6]), int(label[-1])
    data = profile.sel(layer=layer, head=head)
    curve, band = named(traces, "importance"), named(traces, "95 % interval")
    np.testing.assert_array_equal(curve.x, profile["key"])
    np.testing.assert_array_equal(curve.y, data["importance"].values.astype(np.float32))
    assert label in curve.hovertemplate
    high, low = np.split(np.asarray(band.y), 2)
    np.testing.assert_allclose(high, data["importance_high"], rtol=1e-6)
    np.testing.assert_allclose(low[::-1], data["importance_low"], rtol=1e-6)
    line = named(traces, "threshold ε = 0.3")
    assert set(line.y) == {np.float32(0.3)}


def test_absent_heads_are_no_choice_and_the_first_is_shown(profile):
    figure = draw_sinks(profile, kind="profile")
    assert len(labels(figure)) == 11 and "layer 0, head 1" not in labels(figure)
    before = [t for t in figure.data if t.visible is not False]
    assert before == chosen(figure, "layer 0, head 0")
    only = draw_sinks(profile.sel(layer=2, head=1), kind="profile")
    assert not only.layout.updatemenus
    assert only.layout.title.subtitle.text == "layer 2, head 1 (transformer.h.2.attn)"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [1, 2, 30, 700])
def test_the_uniform_reference_is_its_formula(keys, causal):
    result = sink_result(1, 1, keys, causal=causal, absent=())
    reference = named(draw_sinks(result, kind="profile").data, "uniform attention")
    at = np.asarray(reference.customdata)
    assert at[0] == 0 and at[-1] == keys - 1
    wanted = [uniform_importance(j, keys, causal) for j in at]
    np.testing.assert_allclose(reference.y, wanted, rtol=1e-6)


def test_one_input_has_no_interval():
    for kind in ("profile", "rate"):
        figure = draw_sinks(sink_result(inputs=1), kind=kind)
        assert not [t for t in figure.data if "interval" in (t.name or "")]
        assert "one input: no interval" in captions(figure)


def test_long_inputs_are_pooled_to_the_largest_of_each_bin():
    result = sink_result(1, 1, 5000, absent=(), maps=0)
    result["importance"][0, 0, 3777] = 0.9
    figure = draw_sinks(result, kind="profile")
    curve = named(figure.data, "importance")
    importance = result["importance"].values[0, 0]
    key, start, last = np.asarray(curve.customdata)[:, :3].astype(int).T
    assert len(key) <= 400
    assert start[0] == 0 and last[-1] == 4999
    np.testing.assert_array_equal(start[1:], last[:-1] + 1)
    np.testing.assert_array_equal(curve.x, key + 1)
    for k, a, b, y in zip(key, start, last, curve.y, strict=True):
        if np.isfinite(importance[a : b + 1]).any():
            assert a <= k <= b
            assert y == np.float32(importance[k]) == np.float32(np.nanmax(importance[a : b + 1]))
    assert 3777 in key
    assert f"5,000 keys pooled to {len(key)} bins" in captions(figure)
    axis = figure.layout.xaxis
    assert axis.type == figure.layout.yaxis.type == "log"
    assert dict(zip(axis.ticktext, axis.tickvals, strict=True))["1,000"] == 1001


def test_keys_too_few_queries_see_are_told():
    assert "fewer than 4 queries" in captions(draw_sinks(sink_result(inputs=1), kind="profile"))
    assert "fewer than" not in captions(draw_sinks(sink_result(causal=False), kind="profile"))


# --- rate ---


def test_rates_are_the_curves_of_the_profile(profile):
    figure = draw_sinks(profile, kind="rate", threshold=0.25)
    model = named(figure.data, "model")
    np.testing.assert_array_equal(model.y, profile["model_sink_rate"].values.astype(np.float32))
    high, low = np.split(np.asarray(named(figure.data, "95 % interval").y), 2)
    np.testing.assert_allclose(high, profile["model_sink_rate_high"], rtol=1e-6)
    np.testing.assert_allclose(low[::-1], profile["model_sink_rate_low"], rtol=1e-6)
    for layer in range(3):
        wanted = profile["sink_rate"].sel(layer=layer).mean("head")
        np.testing.assert_allclose(named(figure.data, f"layer {layer}").y, wanted, rtol=1e-6)
    anywhere = profile["any_sink_rate"].mean(["layer", "head"])
    np.testing.assert_allclose(named(figure.data, "a sink at any key").y, anywhere, rtol=1e-6)
    line = named(figure.data, "threshold ε = 0.25")
    assert list(line.x) == [0.25, 0.25]


def test_the_rate_of_one_layer_is_drawn_by_heads(profile):
    figure = draw_sinks(profile, kind="rate", layer=0)
    names = [t.name for t in figure.data if (t.name or "").startswith("layer")]
    assert names == ["layer 0, head 0", "layer 0, head 2", "layer 0, head 3"]
    many = draw_sinks(sink_result(20, 2), kind="rate")
    assert not [t for t in many.data if t.name.startswith("layer ") and t.showlegend]
    assert named(many.data, "layer bar").marker.showscale


# --- signal ---


def test_the_signal_of_a_head(profile):
    traces = chosen(draw_sinks(profile, kind="signal"), "layer 1, head 2")
    data = profile.sel(layer=1, head=2)
    density = named(traces, "queries")
    bins = density.z.shape[1]
    count = data["signal_count"].values[:bins]
    np.testing.assert_array_equal(np.nan_to_num(density.z), count.T)
    assert np.isnan(density.z[count.T == 0]).all()
    np.testing.assert_allclose(density.x, np.append(profile["range_bin"], 12)[: bins + 1])
    np.testing.assert_allclose(density.y, np.append(profile["mass_bin"], 1), rtol=1e-6)
    assert not profile["signal_count"].values[2, :, bins:].any()
    seen = count.sum(axis=1) > 0
    for name, field in (
        ("first key (mean)", "signal_first_mass"),
        ("largest (mean)", "signal_largest_mass"),
        ("last 128 (mean)", "signal_recent_mass"),
    ):
        curve = named(traces, name)
        np.testing.assert_allclose(curve.y[seen], data[field].values[:bins][seen], rtol=1e-6)
        assert np.isnan(curve.y[~seen]).all()


def test_envelopes_are_the_exact_range_of_the_mass(profile):
    traces = chosen(draw_sinks(profile, kind="signal"), "layer 2, head 1")
    data = profile.sel(layer=2, head=1)
    lower, upper = named(traces, "lowest possible"), named(traces, "highest possible")
    width = np.asarray(lower.x, dtype=float)
    density = named(traces, "queries")
    np.testing.assert_allclose(width, (density.x[1:] + density.x[:-1]) / 2)
    for curve, sign, prior in (
        (lower, -1, float(data["prior_first_low"])),
        (upper, 1, float(data["prior_first_high"])),
    ):
        odds = prior / (1 - prior) * np.exp(sign * width)
        np.testing.assert_allclose(curve.y, odds / (1 + odds), rtol=1e-5)
        loose = prior * np.exp(sign * width)
        assert np.all(sign * np.asarray(curve.y) <= sign * loose + 1e-6)
    assert "π·exp(∓w)" in captions(draw_sinks(profile, kind="signal"))


def test_certain_priors_have_certain_bounds(profile):
    certain = profile.copy(deep=True)
    certain["prior_first_low"][:], certain["prior_first_high"][:] = 0.0, 1.0
    traces = chosen(draw_sinks(certain, kind="signal"), "layer 1, head 1")
    assert set(named(traces, "lowest possible").y) == {0.0}
    assert set(named(traces, "highest possible").y) == {1.0}


def test_without_a_prior_there_are_no_bounds():
    figure = draw_sinks(sink_result(prior="none"), kind="signal")
    assert not [t for t in figure.data if "possible" in t.name]
    assert "exact range" not in captions(figure) and "margin" not in captions(figure)


def test_the_first_entry_is_the_whole_last_layer(profile):
    figure = draw_sinks(profile, kind="signal")
    assert labels(figure)[0] == "layer 2, all heads"
    assert "layer 2, all heads" in figure.layout.title.subtitle.text
    traces = chosen(figure, "layer 2, all heads")
    data = profile.sel(layer=2)
    density = named(traces, "queries")
    bins = density.z.shape[1]
    count = data["signal_count"].values[:, :bins]
    np.testing.assert_array_equal(np.nan_to_num(density.z), count.sum(axis=0).T)
    queries = count.sum(axis=-1)
    mean = (queries * data["signal_first_mass"].values[:, :bins]).sum(0) / queries.sum(0)
    np.testing.assert_allclose(named(traces, "first key (mean)").y, mean, rtol=1e-5)
    assert labels(draw_sinks(profile, kind="signal", layer=0))[0] == "layer 0, all heads"


def test_fine_densities_are_pooled_without_losing_queries():
    result = sink_result(1, 2, bins=(150, 130), absent=())
    traces = chosen(draw_sinks(result, kind="signal"), "layer 0, head 1")
    density = named(traces, "queries")
    assert max(density.z.shape) <= 64
    assert len(density.x) == density.z.shape[1] + 1 and len(density.y) == density.z.shape[0] + 1
    assert np.nansum(density.z) == result["signal_count"].sel(layer=0, head=1).sum()


def test_the_margin_law_follows_the_menu(profile):
    figure = draw_sinks(profile, kind="signal")
    for button in figure.layout.updatemenus[0].buttons[1:]:
        layer, head = int(button.label[6]), int(button.label[-1])
        margin, length = (
            float(profile[name].sel(layer=layer, head=head))
            for name in ("margin", "protected_length")
        )
        text = button.args[1]["annotations[0].text"]
        wanted = f"margin δ = {margin:.3g} nats protects about {length:.3g} tokens (margin law)"
        assert text == wanted
    first = figure.layout.updatemenus[0].buttons[0].args[1]["annotations[0].text"]
    assert figure.layout.annotations[0].text == first and first.startswith("margins δ = ")


# --- maps ---


@pytest.mark.parametrize(
    ("kind", "field", "title"),
    [
        ("logits", "map_logits", "Mean attention logits"),
        ("probabilities", "map_probability", "Mean attention probabilities"),
    ],
)
def test_maps_are_the_profile(profile, kind, field, title):
    figure = draw_sinks(profile, kind=kind)
    assert figure.layout.title.text == title
    traces = chosen(figure, "layer 1, head 3")
    (shown,) = [t for t in traces if t.name in ("logit", "probability")]
    wanted = profile[field].sel(layer=1, head=3).values.astype(np.float32)
    np.testing.assert_array_equal(shown.z, wanted)
    allowed = profile["map_allowed"].sel(layer=1).values
    masked = [t for t in traces if t.name == "not allowed" and isinstance(t, go.Heatmap)]
    np.testing.assert_array_equal(np.isnan(masked[0].z), allowed)
    if kind == "logits":
        assert shown.zmin == -shown.zmax and shown.zmax == np.nanmax(np.abs(wanted))
    else:
        assert (shown.zmin, shown.zmax) == (0, 1)
        assert named(figure.data, "probability bar").marker.showscale


@pytest.mark.parametrize("kind", MAPS)
def test_large_maps_are_pooled_to_means(kind):
    result = sink_result(1, 2, 400, maps=400, absent=())
    figure = draw_sinks(result, kind=kind)
    check_contract(figure)
    traces = chosen(figure, "layer 0, head 1")
    (shown,) = [t for t in traces if t.name in ("logit", "probability")]
    assert shown.z.shape == (160, 160) and "pooled from 400 × 400" in captions(figure)
    field = "map_logits" if kind == "logits" else "map_probability"
    values = result[field].values[0, 1]
    edges = np.append(shown.y, 400)
    for row, col in ((0, 0), (50, 20), (159, 159), (7, 6)):
        cell = values[edges[row] : edges[row + 1], edges[col] : edges[col + 1]]
        assert shown.z[row, col] == pytest.approx(np.nanmean(cell), rel=1e-5)


@pytest.mark.parametrize("kind", MAPS)
def test_maps_must_have_been_made(kind):
    with pytest.raises(ValueError, match="maps=True"):
        draw_sinks(sink_result(maps=0), kind=kind)


# --- tokens ---

ESCAPED = ["the", "the", "&lt;s&gt;", "&lt;/script&gt;", "&lt;b&gt;", *HOSTILE[5:]]


@pytest.fixture(scope="module")
def hostile():
    return sink_result(2, 2, 10, inputs=1, tokens=HOSTILE, maps=10, absent=())


def test_hostile_tokens_are_text_along_a_curve(hostile):
    figure = draw_sinks(hostile, kind="profile")
    assert list(figure.layout.xaxis.ticktext) == ESCAPED
    assert list(figure.layout.xaxis.tickvals) == list(range(10))
    curve = named(chosen(figure, "layer 1, head 1"), "importance")
    assert list(curve.x) == list(range(10)) and curve.x.dtype.kind == "i"
    assert list(curve.text) == ESCAPED and "%{text}" in curve.hovertemplate


@pytest.mark.parametrize("kind", MAPS)
def test_hostile_tokens_are_text_along_a_map(hostile, kind):
    figure = draw_sinks(hostile, kind=kind)
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert list(axis.ticktext) == ESCAPED
        assert list(axis.tickvals) == list(range(10))
    for trace in heatmaps(figure):
        assert trace.x.dtype.kind == "i", "token texts must never be coordinates"
        # An axis of ticks speaks their text; a format makes it speak the number.
        assert "query %{y:,d} “%{y}”, key %{x:,d} “%{x}”" in trace.hovertemplate


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_no_token_closes_the_script(hostile, kind):
    text = draw_sinks(hostile, kind=kind).to_html(include_plotlyjs=False, full_html=False)
    assert text.split("Plotly.newPlot")[1].count("</script>") == 1


def test_many_keys_have_tokens_on_hover_only():
    result = sink_result(1, 1, 41, tokens=[f"<{i}>" for i in range(41)], maps=33, absent=())
    figure = draw_sinks(result, kind="profile")
    assert figure.layout.xaxis.ticktext is None
    assert named(figure.data, "importance").text[7] == "&lt;7&gt;"
    assert draw_sinks(result, kind="logits").layout.xaxis.ticktext is None


# --- refusals ---


@pytest.mark.parametrize("wrong", [None, 3, {}, np.zeros(3)])
def test_wrong_types_are_refused(wrong):
    with pytest.raises(TypeError, match="expected a sink_profile"):
        draw_sinks(wrong)


def test_wrong_arguments_are_refused(profile):
    with pytest.raises(TypeError, match="plan_slice"):
        draw_sinks(profile.assign_attrs(schema="plan_slice"))
    with pytest.raises(ValueError, match="kind must be one of overview, profile.*got 'map'"):
        draw_sinks(profile, kind="map")
    for threshold in (-0.1, 1, 1.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="threshold must be at least 0 and below 1"):
            draw_sinks(profile, threshold=threshold)
    for threshold in ("0.3", True, [0.3]):
        with pytest.raises(TypeError, match="threshold must be a number"):
            draw_sinks(profile, threshold=threshold)
    for layer in (3, -1, True, "0", [0, 1]):
        with pytest.raises(ValueError, match="layer must be one of 0 to 2, got"):
            draw_sinks(profile, layer=layer)
    with pytest.raises(ValueError, match="no head that is present"):
        draw_sinks(profile.sel(layer=[0], head=[1]))
    for kind in SINK_KINDS:
        check_contract(draw_sinks(profile, kind=kind, layer=np.int64(1)))


def test_everything_draws_from_a_file_without_torch(tmp_path, hostile):
    path = save_result(hostile, tmp_path / "sinks.nc")
    code = f"""
import sys
sys.modules["torch"] = None
import goatviz.plots as plots
from goatviz.results import load_result
for kind in plots.SINK_KINDS:
    plots.draw_sinks(load_result({str(path)!r}), kind=kind)
print("drawn")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "drawn", run.stderr


def test_the_ground_is_the_page(profile):
    for kind in SINK_KINDS:
        figure = draw_sinks(profile, kind=kind)
        assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.template == style.TEMPLATE


# --- panels of an explorer ---

PLACES = [(0, 0), (1, 2), (2, 3)]


def view_of(profile, threshold=0.3):
    return View(sink_view.with_all_dimensions(profile), threshold, None)


def panels(view, layer=0, head=0, key=0):
    chosen = choice_of(view.profile, layer, head)
    return {
        "overview": sink_panels.overview_panel(view, chosen, key),
        "rate": sink_panels.rate_panel(view, chosen),
        "importance": sink_panels.importance_panel(view, chosen, key),
        "signal": sink_panels.signal_panel(view, chosen),
    }


def test_every_panel_keeps_the_contract_and_has_one_pair_of_axes():
    for options in (
        {},
        {"inputs": 1},
        {"layers": 40, "heads": 40, "keys": 3000, "maps": 0},
        {"layers": 1, "heads": 1, "absent": ()},
        {"column": True, "prior": "none", "causal": False},
        {"keys": 10, "tokens": HOSTILE},
        {"keys": 1, "inputs": 1},
    ):
        for figure in panels(view_of(sink_result(**options))).values():
            check_contract(figure)
            axes = [name for name in figure.layout._props if name[1:].startswith("axis")]
            assert sorted(axes) == ["xaxis", "yaxis"]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.57])
def test_the_overview_marks_the_heads_above_the_threshold(profile, threshold):
    figure = panels(view_of(profile, threshold), 2, 1)["overview"]
    cells = named(figure.data, "importance")
    wanted = profile["first_importance"].mean("input").values
    np.testing.assert_allclose(cells.z, wanted.astype(np.float32), rtol=1e-6)
    above = np.argwhere(np.nan_to_num(cells.z) > threshold)
    frames = named(figure.data, f"importance above ε = {threshold:g}")
    middles = {
        (round(float(np.mean(y))), round(float(np.mean(x))))
        for x, y in zip(
            np.reshape(frames.x, (-1, 6))[:, :4], np.reshape(frames.y, (-1, 6))[:, :4], strict=True
        )
    }
    assert middles == {tuple(pair) for pair in above.tolist()}
    subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert subtitle.startswith(f"{len(above)} of 11 heads above ε = {threshold:g} sink rate ")
    low, high = (float(profile[f"model_sink_rate_{e}"].sel(threshold=threshold, method="nearest"))
                 for e in ("low", "high"))  # fmt: skip
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in subtitle


@pytest.mark.parametrize("place", PLACES)
def test_the_chosen_head_is_framed(profile, place):
    figure = panels(view_of(profile), *place)["overview"]
    dark, light = (trace for trace in figure.data if trace.name == "chosen head")
    for frame in (dark, light):
        assert (round(np.nanmean(frame.y[:4])), round(np.nanmean(frame.x[:4]))) == place
        # A click goes to the cell below.
        assert frame.hoverinfo == "skip"


def test_another_key_is_compared_by_its_importance(profile):
    figure = panels(view_of(profile), key=7)["overview"]
    cells = named(figure.data, "importance")
    wanted = profile["importance"].sel(key=7).values.astype(np.float32)
    np.testing.assert_array_equal(cells.z, wanted)
    assert figure.layout.title.text == "Importance of key 7"
    first = panels(view_of(profile), key=0)["overview"]
    assert first.layout.title.text == "Importance of the first key"


@pytest.mark.parametrize("place", PLACES)
def test_the_rate_panel_is_the_rate_of_the_model_and_of_the_head(profile, place):
    figure = panels(view_of(profile, 0.42), *place)["rate"]
    whole = draw_sinks(profile, kind="rate", threshold=0.42)
    for name in ("model", "95 % interval", "a sink at any key"):
        assert named(figure.data, name) == named(whole.data, name)
    head = named(figure.data, "layer {}, head {}".format(*place))
    wanted = profile["sink_rate"].values[place].astype(np.float32)
    np.testing.assert_array_equal(head.y, wanted)
    assert list(named(figure.data, "ε = 0.42").x) == [0.42, 0.42]


@pytest.mark.parametrize("keys", [30, 700])
@pytest.mark.parametrize("place", PLACES)
def test_importance_and_signal_are_those_of_the_figures(keys, place):
    result = sink_result(keys=keys, maps=0)
    layer, head = place
    part = result.isel(layer=layer, head=head)
    drawn = panels(view_of(result), layer, head, key=5)
    for kind, panel in (("profile", drawn["importance"]), ("signal", drawn["signal"])):
        for trace in draw_sinks(part, kind=kind).data:
            if trace.name and not trace.name.startswith("threshold"):
                shown = named(panel.data, trace.name)
                # A menu of one entry says that its traces are visible.
                pair = [Figure(each.update(visible=True)).to_json() for each in (shown, trace)]
                assert json.loads(pair[0]) == json.loads(pair[1])
    mark = named(drawn["importance"].data, "key 5")
    assert mark.y[0] == pytest.approx(float(part["importance"].sel(key=5)))
    assert mark.x[0] == (6 if keys == 700 else 5)


def test_a_head_without_countable_queries_says_so(profile):
    empty = profile.copy(deep=True)
    empty["signal_count"][:] = 0
    figure = panels(view_of(empty))["signal"]
    assert "no query sees two keys" in figure.layout.title.subtitle.text and not figure.data


def test_names_are_text():
    result = sink_result(1, 2, absent=())
    result["layer_name"] = ("layer", ["<img src=x onerror=alert(1)>"])
    for name in ("importance", "signal"):
        text = panels(view_of(result))[name].layout.title.subtitle.text
        assert "&lt;img" in text and "<img" not in text


def test_the_sentence_says_rate_head_margin_and_key(profile):
    view = view_of(profile, 0.3)
    at = profile.sel(threshold=0.3)
    for layer, head in PLACES:
        said = sink_view.sink_sentence(view, choice_of(view.profile, layer, head), 5)
        rate, low, high = (100 * float(at[f"model_sink_rate{e}"]) for e in ("", "_low", "_high"))
        assert f"Sink rate {rate:.1f} % [{low:.1f}, {high:.1f}] at ε = 0.3" in said
        first = profile["first_importance"].values[:, layer, head]
        side = "above" if first.mean() > 0.3 else "not above"
        assert f"importance of the first key {first.mean():.4g}, {side} ε = 0.3" in said
        assert f"a sink in {np.count_nonzero(first > 0.3)} of 5 inputs" in said
        assert (
            f"Margin δ = {float(profile['margin'][layer, head]):.3g} nats protects about " in said
        )
        key = profile["importance"].sel(layer=layer, head=head, key=5)
        assert f"Key 5: importance {float(key):.4g} [" in said
    none = view_of(sink_result(prior="none", inputs=1, notes="an extra column takes mass"))
    said = sink_view.sink_sentence(none, choice_of(none.profile, 0, 0), 0)
    assert "Margin" not in said and "Key" not in said and "of 1 input." in said
    assert said.endswith("Note: an extra column takes mass.")


def test_unknown_importances_are_no_sinks(profile):
    unknown = profile.copy(deep=True)
    unknown["first_importance"][:, 1, 1] = np.nan
    unknown["importance"][1, 1, 29] = np.nan
    view = view_of(unknown)
    drawn = panels(view, 1, 1, key=29)
    assert [t for t in drawn["overview"].data if t.name == "no value"]
    said = sink_view.sink_sentence(view, choice_of(view.profile, 1, 1), 29)
    assert "its first key has no importance in any input" in said
    assert "Key 29: no importance" in said
    assert not [t for t in drawn["importance"].data if t.name == "key 29"]
    assert all(isinstance(t, go.Scatter) for t in drawn["rate"].data)
