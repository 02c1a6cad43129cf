"""What the pictures of attention sinks show is what the profile holds."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from goatviz import bins
from goatviz.plots import SINK_KINDS, Figure, draw_sinks, marks
from goatviz.plots.base import LIMIT_BYTES
from goatviz.plots.sink_curves import importance_panel, rate_panel, signal_panel
from goatviz.plots.sink_maps import heads_panel, map_panel, places
from goatviz.results import SINK_PROFILE, load_result, save_result, with_all_dimensions
from tests.factories import HOSTILE, SINK_CASES, sink_result

MENUS = ("profile", "signal", "logits", "probabilities")
MAPS = ("logits", "probabilities")
PLACES = [(0, 0), (1, 2), (2, 3)]
NEW = [name for name in SINK_PROFILE.optional if name.startswith(("layer_", "signal_", "model_"))]


def named(picture, name):
    """The one trace of a name, in a panel or a figure."""
    traces = picture.traces if hasattr(picture, "traces") else picture.to_dict()["data"]
    (trace,) = [trace for trace in traces if trace.get("name") == name]
    return trace


def names(picture):
    traces = picture.traces if hasattr(picture, "traces") else picture.to_dict()["data"]
    return [trace["name"] for trace in traces if trace.get("visible", True)]


def captions(figure):
    return " ".join(note.text for note in figure.layout.annotations).replace("<br>", " ")


def has_maps(case):
    return case not in ("no maps", "32 x 32")


# --- every kind ---


@pytest.mark.parametrize("case", SINK_CASES)
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_every_kind_draws_within_the_limit(kind, case):
    if kind in MAPS and not has_maps(case):
        with pytest.raises(ValueError, match=r"pass maps=True to sink_profile"):
            draw_sinks(sink_result(case), kind=kind)
        return
    if kind == "hidden" and case == "no maps":
        with pytest.raises(ValueError, match=r"pass norms=True or spectra=True to sink_profile"):
            draw_sinks(sink_result(case), kind=kind)
        return
    figure = draw_sinks(sink_result(case), kind=kind)
    assert isinstance(figure, Figure)
    go.Figure(figure.to_dict())  # plotly knows every setting
    assert len(figure.to_json(validate=False)) < LIMIT_BYTES
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert axis.title.text


@pytest.mark.parametrize("kind", SINK_KINDS)
@pytest.mark.parametrize(
    "part", [{"layer": 1}, {"head": 2}, {"layer": 1, "head": 2}, {"input": 0}, {"layer": [0, 2]}]
)
def test_selections_draw_and_the_result_stays(kind, part):
    profile = sink_result()
    before = profile.copy(deep=True)
    draw_sinks(profile.sel(part), kind=kind)
    draw_sinks(profile.sel(part, drop=True), kind=kind)
    assert profile.identical(before)


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_a_profile_of_gaps_is_drawn_with_marks(kind):
    profile = sink_result()
    for name in ("importance", "signal_first_mass", "map_logits", "model_sink_rate"):
        profile[name][:] = np.nan
    profile["signal_count"][:] = 0
    figure = draw_sinks(profile, kind=kind)
    if kind in ("overview", "logits"):
        assert "NaN" in names(figure)
    if kind == "signal":
        assert any("no query" in note.text for note in figure.layout.annotations)


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_an_older_profile_draws_what_it_has(kind):
    older = sink_result().drop_vars([*NEW, "sink_rank", "margin_text", "uniform_importance"])
    for name in ("rate_text", "n_heads"):
        del older.attrs[name]
    figure = draw_sinks(older, kind=kind)
    assert "opens on" not in captions(figure)
    assert not {"lowest possible", "uniform attention", "layer 1"} & set(names(figure))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("toy", "MixedHeads · 5 inputs of 27 to 30 tokens · causal · prior: learned"),
        ("llama", "LlamaForCausalLM · 3 inputs of 40 tokens · causal · no explicit prior"),
        ("bert", "BertModel · 3 inputs of 40 tokens · not causal · no explicit prior"),
        ("one input", "1 input of 30 tokens"),
        ("gpt-oss", "⚠ an extra column takes mass"),
        ("hostile", "&lt;i&gt;net&lt;/i&gt; · 1 input of 20 tokens"),
    ],
)
def test_the_caption_says_what_was_watched(case, words):
    for kind in ("overview", "rate", "signal"):
        assert words in captions(draw_sinks(sink_result(case), kind=kind))


# --- menus ---


def strongest(profile):
    """Labels of the head whose first key is most important."""
    mean = bins.mean_of_finite(profile["first_importance"].values)
    layer, head = np.unravel_index(np.nanargmax(mean), mean.shape)
    return int(profile["layer"][layer]), int(profile["head"][head])


@pytest.mark.parametrize("case", ["toy", "12 x 12", "gpt2"])
@pytest.mark.parametrize("kind", MENUS)
def test_a_menu_opens_on_the_strongest_sink_and_reaches_every_head(kind, case):
    profile = sink_result(case)
    figure = draw_sinks(profile, kind=kind)
    layer, head = strongest(profile)
    assert figure.layout.title.subtitle.text.startswith(f"layer {layer}, head {head} (")
    assert "opens on the strongest sink" in captions(figure)
    layers, *heads = figure.layout.updatemenus
    assert [button.label for button in layers.buttons] == [
        f"layer {n}" for n in profile["layer"].values
    ]
    for at, one in enumerate(heads):
        expected = [f"head {n}" for n in np.flatnonzero(profile["present"].values[at])]
        assert [b.label for b in one.buttons][: len(expected)] == expected
        rest = [button.label for button in one.buttons][len(expected) :]
        assert rest == (["all heads"] if kind == "signal" else [])
        assert one.buttons[one.active].label != "all heads"


@pytest.mark.parametrize("kind", MENUS)
def test_more_heads_than_a_menu_holds_are_the_strongest_sinks(kind):
    if kind in MAPS:
        return
    profile = sink_result("32 x 32")
    figure = draw_sinks(profile, kind=kind)
    assert "the 400 strongest sinks of 1,024 heads; layers= and heads=" in captions(figure)
    _, *heads = figure.layout.updatemenus
    labels = [button.label for one in heads for button in one.buttons]
    assert sum(label != "all heads" for label in labels) == 400
    layer, head = strongest(profile)
    assert f"layer {layer}, head {head}" in figure.layout.title.subtitle.text
    # What the caption promises: any other head is drawn.
    rank = profile["sink_rank"].values
    layer, head = np.argwhere(rank == rank.max())[0]
    chosen = draw_sinks(profile, kind=kind, layers=int(layer), heads=[int(head)])
    assert not chosen.layout.updatemenus
    assert chosen.layout.title.subtitle.text.startswith(f"layer {layer}, head {head} (")


@pytest.mark.parametrize("kind", MENUS)
def test_a_choice_shows_that_head(kind):
    profile = sink_result()
    whole = draw_sinks(profile, kind=kind)
    alone = draw_sinks(profile, kind=kind, layers=1, heads=2)
    chosen = whole.choose(layer=1, head=2)
    assert chosen.layout.title.subtitle.text == alone.layout.title.subtitle.text
    one, other = (json.loads(each.to_json(validate=False))["data"] for each in (chosen, alone))
    one = {trace["name"]: trace for trace in one}
    # Densities share one scale of counts and one budget of bins in a menu.
    for trace in other:
        if trace["name"] not in ("queries", "count bar"):
            assert all(one[trace["name"]].get(side) == trace.get(side) for side in "xyz")


def test_layers_and_heads_select():
    profile = sink_result()
    one = draw_sinks(profile, kind="profile", layers=[2, 0], heads=range(2))
    layers, *heads = one.layout.updatemenus
    assert [button.label for button in layers.buttons] == ["layer 0", "layer 2"]
    assert [len(menu.buttons) for menu in heads] == [2, 2]
    assert "all heads" not in str(draw_sinks(profile, kind="signal", heads=[0, 1]).layout)
    for name, wrong in (("layers", 3), ("layers", []), ("heads", [0, 7])):
        with pytest.raises(ValueError, match=rf"{name} must be among 0 to [23], got"):
            draw_sinks(profile, **{name: wrong})
    with pytest.raises(TypeError, match="heads must be an integer, got True"):
        draw_sinks(profile, heads=True)


# --- overview ---


def test_the_overview_is_the_profile():
    profile = sink_result("no maps")
    profile.attrs["recent"] = 8
    figure = draw_sinks(profile)
    titles = [note.text for note in figure.layout.annotations if "<b>" in note.text]
    fields = {
        "Importance of the first key": profile["importance"].sel(key=0),
        "Largest weight": profile["largest_mass"],
        "Last 8 keys": profile["recent_mass"],
    }
    assert [title.replace("</b><br><b>", " ") for title in titles] == [
        f"<b>{t}</b>" for t in fields
    ]
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    for trace, expected in zip(maps, fields.values(), strict=True):
        np.testing.assert_array_equal(trace.z, expected.values.astype(np.float32))
        assert (trace.zmin, trace.zmax) == (0, 1)
    assert "no such head" in captions(figure)


def test_recent_keys_are_left_out_where_they_are_all_keys():
    assert sink_result().attrs["recent"] > sink_result().attrs["length"]
    for kind in ("overview", "signal"):
        assert "ast 128" not in str(draw_sinks(sink_result(), kind=kind).to_dict())


def test_the_extra_column_is_drawn_where_there_is_one():
    figure = draw_sinks(sink_result("gpt-oss"))
    *_, column = [trace for trace in figure.data if trace.type == "heatmap" and trace.name != "NaN"]
    expected = sink_result("gpt-oss")["sink_column_mass"].values.astype(np.float32)
    np.testing.assert_array_equal(column.z, expected)


@pytest.mark.parametrize("kind", sorted({*SINK_KINDS} - {"logits", "hidden"}))
def test_captions_say_that_rows_have_mass_below_one(kind):
    column = sink_result("gpt-oss")["sink_column_mass"].values
    figure = draw_sinks(sink_result("gpt-oss"), kind=kind)
    assert f"takes {column.mean():.3f} on average" in captions(figure)
    assert captions(figure).count("not renormalised") == 1
    assert "renormalised" not in captions(draw_sinks(sink_result("llama"), kind=kind))


def test_the_rate_in_words_is_that_of_the_threshold_drawn():
    profile = sink_result()
    for kind in ("overview", "rate"):
        assert profile.attrs["rate_text"] in draw_sinks(
            profile, kind=kind
        ).layout.title.subtitle.text.replace("&gt;", ">")
        # Another threshold's rate was not computed with the profile.
        assert not draw_sinks(profile, kind=kind, threshold=0.5).layout.title.subtitle.text


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("case", ["toy", "32 x 32"])
def test_sinks_are_marked_where_importance_exceeds_the_threshold(case, threshold):
    profile = sink_result(case).assign_attrs(threshold=threshold)
    values = profile["importance"].sel(key=0).values
    panel = heads_panel(profile, "Importance", values)
    marked = named(panel, f"importance above ε = {threshold:g}")
    inside = np.isfinite(marked["x"])
    at = {
        (round(y), round(x)) for x, y in zip(marked["x"][inside], marked["y"][inside], strict=True)
    }
    assert at == {tuple(pair) for pair in np.argwhere(values > np.float32(threshold)).tolist()}


def test_numbers_in_cells_are_the_values_in_an_ink_that_reads():
    profile = sink_result()
    values = profile["importance"].sel(key=0).values
    panel = heads_panel(profile, "Importance", values)
    numbers = named(panel, "numbers")
    for x, y, text in zip(numbers["x"], numbers["y"], numbers["text"], strict=True):
        assert float(text) == pytest.approx(values[y, x], abs=0.0051)
    assert set(numbers["textfont"]["color"]) == {"#000000", "#ffffff"}
    many = sink_result("32 x 32")
    assert "numbers" not in names(heads_panel(many, "", many["largest_mass"].values))


@pytest.mark.parametrize("place", PLACES)
def test_the_chosen_head_is_framed(place):
    profile = sink_result()
    panel = heads_panel(profile, "", profile["largest_mass"].values, chosen=place)
    frames = [trace for trace in panel.traces if trace["name"] == "chosen head"]
    assert len(frames) == 2
    for frame in frames:
        assert (round(np.nanmean(frame["y"][:4])), round(np.nanmean(frame["x"][:4]))) == place
        # A click goes to the cell below.
        assert frame["hoverinfo"] == "skip"


def test_heads_with_gaps_between_them_keep_their_names():
    profile = sink_result().sel(head=[0, 3], layer=[0, 2])
    panel = heads_panel(profile, "", profile["largest_mass"].values)
    assert panel.x["ticktext"] == ["0", "3"] and list(panel.traces[0]["x"]) == [0, 1]
    assert panel.traces[0]["customdata"].tolist() == [[[0, 0], [0, 3]], [[2, 0], [2, 3]]]
    assert places(np.array([4, 5, 6])).tolist() == [4, 5, 6]


# --- importance of keys ---


@pytest.mark.parametrize(("layer", "head"), PLACES)
def test_importances_are_those_of_the_head(layer, head):
    profile = sink_result()
    part = profile.sel(layer=layer, head=head)
    panel = importance_panel(profile, layer, head, key=5)
    curve, band = named(panel, "importance"), named(panel, "95 % interval")
    np.testing.assert_array_equal(curve["x"], profile["key"])
    np.testing.assert_array_equal(curve["y"], part["importance"])
    high, low = np.split(band["y"], 2)
    known = np.isfinite(part["importance_low"].values)
    np.testing.assert_allclose(high, part["importance_high"].values[known], rtol=1e-6)
    np.testing.assert_allclose(low[::-1], part["importance_low"].values[known], rtol=1e-6)
    uniform = named(panel, "uniform attention")
    expected = profile["uniform_importance"].sel(layer=layer).values[uniform["customdata"]]
    np.testing.assert_allclose(uniform["y"], expected, rtol=1e-6)
    assert set(named(panel, "threshold ε = 0.3")["y"]) == {np.float32(0.3)}
    ring = named(panel, "key 5")
    assert ring["x"].item() == 5 and ring["y"].item() == part["importance"].sel(key=5).item()
    assert "tokens" in panel.x["title"] and "probability" in panel.y["title"]


def test_one_input_has_no_interval():
    profile = sink_result("one input")
    for panel in (importance_panel(profile, 0, 0), rate_panel(profile)):
        assert not [name for name in names(panel) if "interval" in name]
        assert "One input: no interval." in panel.caption


def test_long_inputs_are_pooled_to_the_largest_of_each_bin():
    profile = sink_result("long")
    panel = importance_panel(profile, 0, 1, points=100)
    curve, importance = named(panel, "importance"), profile["importance"].values[0, 1]
    key, start, last = curve["customdata"][:, [0, 2, 3]].astype(int).T
    assert len(key) <= 100 and (start[0], last[-1]) == (0, 2999)
    np.testing.assert_array_equal(start[1:], last[:-1] + 1)
    np.testing.assert_array_equal(curve["x"], key + 1)
    for k, a, b, y in zip(key, start, last, curve["y"], strict=True):
        if np.isfinite(importance[a : b + 1]).any():
            assert y == importance[k] == np.nanmax(importance[a : b + 1])
    assert any(line.startswith(f"3,000 keys in {len(key)} bins") for line in panel.caption)
    assert panel.x["type"] == panel.y["type"] == "log"
    assert dict(zip(panel.x["ticktext"], panel.x["tickvals"], strict=True))["1,000"] == 1001


# --- rate ---


def test_rates_are_the_curves_of_the_profile():
    profile = sink_result()
    panel = rate_panel(profile)
    for name, field in (
        ("model", profile["model_sink_rate"]),
        ("a sink at any key", profile["model_any_sink_rate"]),
        *((f"layer {n}", profile["layer_sink_rate"].sel(layer=n)) for n in range(3)),
    ):
        np.testing.assert_array_equal(named(panel, name)["y"], field.values.astype(np.float32))
    high, low = np.split(named(panel, "95 % interval")["y"], 2)
    np.testing.assert_allclose(high, profile["model_sink_rate_high"], rtol=1e-6)
    np.testing.assert_allclose(low[::-1], profile["model_sink_rate_low"], rtol=1e-6)
    assert list(named(panel, "threshold ε = 0.3")["x"]) == [np.float32(0.3)] * 2
    head = named(rate_panel(profile, (1, 2)), "layer 1, head 2")
    expected = profile["sink_rate"].sel(layer=1, head=2).values.astype(np.float32)
    np.testing.assert_array_equal(head["y"], expected)


def test_the_rate_of_one_layer_is_drawn_by_heads_and_of_many_with_a_bar():
    figure = draw_sinks(sink_result(), kind="rate", layers=0)
    absent = np.flatnonzero(~sink_result()["present"].values[0])
    heads = [f"head {n}" for n in range(4) if n not in absent]
    assert [name for name in names(figure) if name.startswith("head")] == heads
    many = draw_sinks(sink_result("12 x 12"), kind="rate")
    shown = [t.name for t in many.data if t.showlegend]
    assert "layer bar" in names(many) and not [n for n in shown if n.startswith("layer ")]


# --- signal ---


@pytest.mark.parametrize(("layer", "head"), [*PLACES, (2, None)])
def test_the_signal_holds_every_query_and_its_means(layer, head):
    profile = sink_result()
    prefix = "layer_signal" if head is None else "signal"
    part = profile.sel(layer=layer) if head is None else profile.sel(layer=layer, head=head)
    panel = signal_panel(profile, layer, head)
    density, count = named(panel, "queries"), part[f"{prefix}_count"].values
    assert np.nansum(density["z"]) == count.sum()
    assert len(density["x"]) == density["z"].shape[1] + 1
    queries = count.sum(-1)
    for name, field in (("first key (mean)", "first"), ("largest (mean)", "largest")):
        mean = named(panel, name)["y"]
        weight = np.nansum(density["z"], axis=0)
        total = np.nansum(queries * part[f"{prefix}_{field}_mass"].values)
        assert np.nansum(weight * mean) == pytest.approx(total, rel=1e-5)
    assert "score" in panel.x["title"]


@pytest.mark.parametrize("shape", [(64, 64), (5, 10)])
@pytest.mark.parametrize("case", ["toy", "12 x 12"])
def test_nothing_drawn_lies_outside_the_bounds(case, shape):
    profile = sink_result(case)
    for layer, head in ((0, 0), (1, 1), (2, None)):
        panel = signal_panel(profile, layer, head, shape=shape)
        low, high = (named(panel, f"{end} possible") for end in ("lowest", "highest"))
        mean, density = named(panel, "first key (mean)")["y"], named(panel, "queries")
        np.testing.assert_array_equal(low["x"], density["x"])
        known = np.isfinite(mean)
        assert (low["y"][:-1] <= mean + 1e-6)[known].all()
        assert (mean <= high["y"][:-1] + 1e-6)[known].all()
        # Each bin's are those of the profile at its end.
        stop = profile["range_stop"].values
        ends = np.abs(stop - density["x"][1:, None]).argmin(axis=1)
        prefix = "layer_signal" if head is None else "signal"
        part = profile.sel(layer=layer) if head is None else profile.sel(layer=layer, head=head)
        expected = part[f"{prefix}_lower"].values[ends].astype(np.float32)
        np.testing.assert_array_equal(low["y"][:-1], expected)


def test_without_bounds_the_caption_does_not_speak_of_them():
    panel = signal_panel(sink_result("gpt-oss"), 1, 0)
    assert not [name for name in names(panel) if "possible" in name]
    assert not [line for line in panel.caption if "possible" in line]


def test_the_margin_follows_the_head():
    profile = sink_result()
    figure = draw_sinks(profile, kind="signal")
    for layer, head in PLACES[1:]:
        text = figure.choose(layer=layer, head=head).layout.title.subtitle.text
        expected = profile["margin_text"].sel(layer=layer, head=head).item()
        text = text.replace("<br>", " ").strip()
        assert text == f"layer {layer}, head {head} (layers.{layer}); {expected}"


# --- maps ---


@pytest.mark.parametrize(
    ("kind", "field"), [("logits", "map_logits"), ("probabilities", "map_probability")]
)
def test_maps_are_the_profile(kind, field):
    profile = sink_result()
    panel = map_panel(profile, kind, 1, 3, 100)
    shown = panel.traces[0]
    expected = profile[field].sel(layer=1, head=3).values.astype(np.float32)
    np.testing.assert_array_equal(shown["z"], expected)
    assert panel.masked
    if kind == "logits":
        assert shown["zmin"] == -shown["zmax"] == -np.nanmax(np.abs(expected))
    else:
        assert (shown["zmin"], shown["zmax"]) == (0, 1)


@pytest.mark.parametrize("kind", MAPS)
def test_large_maps_are_pooled_to_means_over_what_is_allowed(kind):
    profile = sink_result("long")
    panel = map_panel(profile, kind, 0, 1, 160)
    shown = panel.traces[0]
    field = "map_logits" if kind == "logits" else "map_probability"
    values = profile[field].values[0, 1]
    assert shown["z"].shape == (134, 134)
    for row, column in ((0, 0), (50, 20), (133, 133), (7, 6)):
        cell = values[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert shown["z"][row, column] == pytest.approx(np.nanmean(cell), rel=1e-4)
    assert any("3 × 3" in line for line in panel.caption)


# --- tokens ---

ESCAPED = ["the", "the", "&lt;s&gt;", "&lt;/script&gt;", "&lt;b&gt;", *HOSTILE[5:]]


def test_hostile_tokens_are_text():
    profile = sink_result("hostile")
    tokens = profile["token"].values.tolist()
    escaped = [ESCAPED[HOSTILE.index(token)] for token in tokens]
    panel = importance_panel(profile, 1, 1)
    assert panel.x["ticktext"] == escaped and panel.x["tickvals"] == list(range(20))
    assert list(named(panel, "importance")["text"]) == escaped
    for kind in MAPS:
        panel = map_panel(profile, kind, 1, 1, 100)
        assert panel.x["ticktext"] == panel.y["ticktext"] == escaped
        assert panel.traces[0]["x"].dtype.kind == "i", "token texts must never be coordinates"
        hover = panel.traces[0]["hovertemplate"]
        assert "query %{y:,d} “%{customdata[0]}”, key %{x:,d} “%{customdata[1]}”" in hover
        pairs = panel.traces[0]["customdata"]
        assert [pairs[i][i] for i in range(20)] == [[text, text] for text in marks.hovered(tokens)]
    for kind in SINK_KINDS:
        figure = draw_sinks(profile, kind=kind)
        assert "<img" not in str(figure.layout)
        text = figure.to_html(include_plotlyjs=False, full_html=False)
        assert text.split("Plotly.newPlot")[1].count("</script>") == 1


def test_many_keys_have_tokens_on_hover_only():
    profile = sink_result("gpt2")
    texts = np.array([f"<{n}>" for n in range(40)])
    profile["token"] = ("key", texts)
    panel = importance_panel(profile, 0, 0)
    assert "ticktext" not in panel.x
    assert named(panel, "importance")["text"][7] == "&lt;7&gt;"


# --- files and refusals ---


def test_a_loaded_profile_draws_as_the_computed_one(tmp_path):
    path = save_result(sink_result("hostile"), tmp_path / "sinks.nc")
    for kind in SINK_KINDS:
        drawn = [draw_sinks(one, kind=kind) for one in (sink_result("hostile"), load_result(path))]
        assert drawn[0].to_json(validate=False) == drawn[1].to_json(validate=False)


@pytest.mark.parametrize("wrong", [None, 3, {}, np.zeros(3)])
def test_wrong_types_are_refused(wrong):
    with pytest.raises(TypeError, match="sink_profile"):
        draw_sinks(wrong)


def test_wrong_arguments_are_refused():
    profile = sink_result()
    with pytest.raises(TypeError, match="plan_slice"):
        draw_sinks(profile.assign_attrs(schema="plan_slice"))
    with pytest.raises(ValueError, match="kind must be one of overview, profile.*got 'map'"):
        draw_sinks(profile, kind="map")
    for threshold in (-0.1, 1, np.nan):
        with pytest.raises(ValueError, match="threshold must be a finite number of at least 0"):
            draw_sinks(profile, threshold=threshold)
    for threshold in ("0.3", True, [0.3]):
        with pytest.raises(TypeError, match="threshold must be"):
            draw_sinks(profile, threshold=threshold)
    layer, head = np.argwhere(~profile["present"].values)[0]
    with pytest.raises(ValueError, match="hold a head that is present"):
        draw_sinks(profile.sel(layer=[layer], head=[head]))


def test_dimensions_that_a_selection_dropped_come_back():
    profile = sink_result()
    whole = with_all_dimensions(profile.sel(layer=1, head=2, input=0), SINK_PROFILE)
    assert (whole["layer"].item(), whole["head"].item()) == (1, 2)
    expected = profile.sel(layer=[1], head=[2], input=[0])
    for name in whole.data_vars:
        np.testing.assert_array_equal(whole[name], expected[name], err_msg=name)
        assert whole[name].dims == SINK_PROFILE.fields[name].dims
