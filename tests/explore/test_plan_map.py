"""The map's kernel side: bytes that stand for weights, answers to every question, errors shown."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis.levels import PlanLevels
from goatviz.attention import Attention
from goatviz.explore import PlanMap, ShownPlan
from goatviz.explore.plan_map import (
    MOST_CELLS,
    colour_range,
    to_codes,
    to_shares,
    weight_texts,
)
from goatviz.plots.style import colour_table


def levels(length=40, *, head=0, seed=0):
    torch.manual_seed(seed)
    layer = Attention(16, 2).eval()
    with capture(layer, statistics=(), keep="projections") as record, torch.no_grad():
        layer(4 * torch.randn(1, length, 16))
    return PlanLevels(record.calls[0], head=head)


def answers(widget, monkeypatch, *messages):
    sent = []
    monkeypatch.setattr(widget, "send", sent.append)
    for message in messages:
        widget.received(message)
    return sent


def decoded(widget):
    """Weights that the widget's bytes stand for, NaN where they stand for nothing."""
    view = widget.view
    codes = np.frombuffer(widget.pixels, np.uint8).reshape(view["rows"], view["columns"])
    low, high = view["range"]["low"], view["range"]["high"]
    share = (codes.astype(float) - 1) / 254
    linear = view["range"]["kind"] == "linear"
    value = low + share * (high - low) if linear else low * (high / low) ** share
    return np.where(codes == 0, np.nan, value)


def test_the_first_picture_is_there_without_a_page():
    source = levels()
    widget = PlanMap(ShownPlan(source), scale="linear")
    wanted = source.view((0, 40), (0, 40)).weights
    assert np.array_equal(np.isnan(decoded(widget)), np.isnan(wanted))
    half = widget.view["range"]["high"] / 254 / 2
    np.testing.assert_allclose(decoded(widget), wanted, atol=half + 1e-6)
    assert widget.view["exact"] and widget.size == [40, 40] and widget.error == ""
    assert widget.summary.startswith("Largest in view: 1, query 0, key 0")


def test_logarithmic_colours_keep_decades_apart(monkeypatch):
    source = levels()
    widget = PlanMap(ShownPlan(source), scale="log")
    wanted = source.view((0, 40), (0, 40)).weights
    floor = widget.view["range"]["low"]
    found = decoded(widget)
    shown = np.nan_to_num(wanted) > floor
    np.testing.assert_allclose(found[shown], wanted[shown], rtol=0.03)
    assert np.allclose(found[~shown & ~np.isnan(wanted)], floor)


def test_codes_at_the_ends_of_their_range():
    scale = colour_range("linear", highest=0.5)
    assert to_codes(np.array([0.0, 0.25, 0.5, 0.9, np.nan]), scale) == bytes([1, 128, 255, 255, 0])
    scale = colour_range("log", highest=1.0)
    assert to_codes(np.array([0.0, 1e-5, 1.0, np.nan]), scale) == bytes([1, 1, 255, 0])
    assert colour_range("linear", highest=0.0)["high"] == 1.0


@pytest.mark.parametrize("kind", ["linear", "log", "signed"])
def test_a_scale_tells_the_weights_of_its_shares(kind):
    scale = colour_range(kind, highest=0.5)
    texts = weight_texts(scale)
    weights = np.array([float(text.replace("\N{MINUS SIGN}", "-")) for text in texts])
    np.testing.assert_allclose(to_shares(weights, scale), [0, 0.25, 0.5, 0.75, 1], atol=2e-3)
    assert np.isnan(to_shares(np.array([np.nan]), scale)).all()


def test_its_panel_is_the_window_with_its_colours(monkeypatch):
    source = levels()
    widget = PlanMap(ShownPlan(source, "A head", key_tokens=[f"k{n}" for n in range(40)]))
    ask = {"kind": "view", "id": 1, "queries": [10, 30], "keys": [5, 25], "rows": 20, "columns": 20}
    answers(widget, monkeypatch, ask)
    widget.selection = [12, 7]
    panel = widget.panel()
    cells, bar, _, frame = panel.traces
    wanted = to_shares(source.view((10, 30), (5, 25)).weights, widget.view["range"])
    np.testing.assert_allclose(cells["z"], wanted, rtol=1e-6)
    assert np.isnan(wanted).any() and panel.masked
    assert cells["x"].tolist() == list(range(5, 25))
    assert cells["y"].tolist() == list(range(10, 30))
    assert panel.x["range"] == [4.5, 24.5] and panel.y["range"] == [29.5, 9.5]
    assert panel.x["ticktext"][0] == "k5" and "ticktext" not in panel.y
    assert bar["marker"]["colorbar"]["ticktext"] == weight_texts(widget.view["range"])
    assert (min(frame["x"]), max(frame["y"])) == (6.54, 12.46)
    assert panel.title == "A head" and panel.note.startswith("every query; every key; ")
    widget.scale = "linear"
    assert widget.panel().note.endswith("; linear colours")
    weights = source.view((10, 30), (5, 25)).weights
    np.testing.assert_allclose(
        widget.panel().traces[0]["z"], weights / np.nanmax(weights), rtol=1e-6
    )
    widget.scale, widget.without = "auto", True
    lesser = source.view((10, 30), (5, 25), without=(0,)).weights
    found = widget.panel()
    texts = found.traces[1]["marker"]["colorbar"]["ticktext"]
    scale = {"kind": "log", "low": float(texts[0]), "high": float(texts[-1])}
    assert found.note.endswith("; logarithmic colours; without the sink")
    np.testing.assert_allclose(found.traces[0]["z"], to_shares(lesser, scale), atol=1e-3)


def test_the_palette_gives_every_code_a_colour_of_its_own():
    table = colour_table()
    assert len(table) == 256 and len(set(table[1:])) > 200
    assert all(0 <= part <= 255 for colour in table for part in colour)
    brightness = [sum(colour) for colour in table[1:]]
    assert brightness[0] < brightness[-1]


def test_a_question_gets_its_view_and_an_answer(monkeypatch):
    widget = PlanMap(ShownPlan(levels(300), query_tokens=[f"q{i}" for i in range(300)]))
    ask = {"kind": "view", "id": 7, "queries": [10, 20], "keys": [0, 300]}
    sent = answers(widget, monkeypatch, ask | {"rows": 100, "columns": 50})
    assert sent == [{"kind": "viewed"}]
    view = widget.view
    assert (view["id"], view["rows"], view["columns"]) == (7, 10, 50)
    assert view["query_tokens"] == {"start": 10, "texts": [f"q{i}" for i in range(10, 20)]}
    assert view["key_tokens"] is None and not view["exact"]
    assert len(widget.pixels) == 500


def test_a_page_cannot_ask_for_too_much(monkeypatch):
    widget = PlanMap(ShownPlan(levels()))
    asked = []
    monkeypatch.setattr(
        widget.levels,
        "view",
        lambda *a, progress, **room: asked.append(room) or levels().view((0, 1), (0, 1)),
    )
    ask = {"kind": "view", "id": 1, "queries": [0, 40], "keys": [0, 40]}
    answers(widget, monkeypatch, ask | {"rows": 10**9, "columns": -3})
    assert asked == [{"rows": MOST_CELLS, "columns": 1, "pool": "max", "without": ()}]


def test_a_pair_is_exact(monkeypatch):
    source = levels()
    (said,) = answers(
        PlanMap(ShownPlan(source)), monkeypatch, {"kind": "cell", "query": 9, "key": 4}
    )
    assert said["cell"] == {"query": 9, "key": 4, **source.cell(9, 4)._asdict()}
    (said,) = answers(
        PlanMap(ShownPlan(source)), monkeypatch, {"kind": "cell", "query": 4, "key": 9}
    )
    assert said["cell"]["log_prior"] is None and not said["cell"]["allowed"]


def test_errors_are_shown_answered_and_forgotten(monkeypatch):
    widget = PlanMap(ShownPlan(levels()))
    good = {"kind": "view", "id": 1, "queries": [0, 40], "keys": [0, 40], "rows": 9, "columns": 9}
    assert answers(widget, monkeypatch, good | {"queries": [50, 60]}) == [{"kind": "viewed"}]
    assert widget.error.startswith("ValueError: queries must be a non-empty window of 0 .. 40")
    assert answers(widget, monkeypatch, {"kind": "cell", "query": 99, "key": 0}) == [
        {"kind": "celled"}
    ]
    assert widget.error.startswith("ValueError: query must be an integer in 0 .. 39")
    answers(widget, monkeypatch, good)
    assert widget.error == ""


def test_colours_keep_their_meaning_while_the_window_moves(monkeypatch):
    widget = PlanMap(ShownPlan(levels()))
    first = widget.view["range"]
    ask = {"kind": "view", "id": 1, "queries": [30, 40], "keys": [0, 3], "rows": 9, "columns": 9}
    answers(widget, monkeypatch, ask)
    assert widget.view["range"] == first


def test_another_plan_forgets_what_fits_no_more():
    widget = PlanMap(ShownPlan(levels()))
    widget.selection, widget.brush = [3, 2], [1, 5]
    widget.show(ShownPlan(levels(head=1)))
    assert widget.selection == [3, 2] and widget.plan == 2
    widget.show(ShownPlan(levels(50), "longer"))
    assert widget.selection == [] and widget.brush == []
    assert widget.size == [50, 50] and widget.title == "longer"


def in_a_loop(*steps):
    """Run steps in an event loop, as a kernel does, until the map is at rest after each."""

    async def run(widget):
        for step in steps:
            step(widget)
            for _ in range(500):
                if widget.progress < 0:
                    break
                await asyncio.sleep(0.01)
        return widget

    return run


def test_a_long_view_is_computed_beside_and_the_same(monkeypatch):
    monkeypatch.setattr("goatviz.explore.plan_map.INLINE_PAIRS", 0)
    source, sent = levels(300), []
    wanted = PlanMap(ShownPlan(source))
    ask = {"kind": "view", "id": 5, "queries": [100, 300], "keys": [0, 300]}
    ask |= {"rows": 50, "columns": 50}
    answers(wanted, monkeypatch, ask)

    async def run():
        widget = PlanMap(ShownPlan(levels(300)))
        monkeypatch.setattr(widget, "send", sent.append)
        return await in_a_loop(lambda w: None, lambda w: w.received(ask), lambda w: None)(widget)

    widget = asyncio.run(run())
    assert widget.view["id"] == 5 and widget.pixels == wanted.pixels and widget.error == ""
    assert sent == [{"kind": "viewed"}]


def test_a_view_that_is_stopped_is_answered_and_shows_nothing(monkeypatch):
    monkeypatch.setattr("goatviz.explore.plan_map.INLINE_PAIRS", 0)
    source, sent, started = levels(300), [], threading.Event()
    inner, go = source.view, threading.Event()

    def slow(*arguments, progress, **room):
        progress(0.5)
        started.set()
        go.wait(10)
        progress(0.9)
        return inner(*arguments, progress=progress, **room)

    async def run():
        widget = await in_a_loop(lambda w: None)(PlanMap(ShownPlan(source)))
        before = widget.view
        monkeypatch.setattr(source, "view", slow)
        monkeypatch.setattr(widget, "send", sent.append)
        ask = {"kind": "view", "id": 9, "queries": [0, 300], "keys": [0, 300]}
        widget.received(ask | {"rows": 9, "columns": 9})
        while not started.is_set():
            await asyncio.sleep(0.01)
        widget.received({"kind": "stop"})
        assert widget.progress == -1.0
        go.set()
        while not sent:
            await asyncio.sleep(0.01)
        return widget, before

    widget, before = asyncio.run(run())
    assert widget.view == before and widget.error == "" and sent == [{"kind": "viewed"}]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"levels": 3}, TypeError, "levels must be PlanLevels, got int"),
        ({"scale": "square"}, ValueError, "scale must be one of auto, linear, log; got 'square'"),
        ({"pool": "sum"}, ValueError, "pool must be one of max, mean; got 'sum'"),
        ({"key_tokens": ["a"]}, ValueError, "key_tokens must hold 40 texts, got 1"),
    ],
)
def test_bad_input(options, error, says):
    with pytest.raises(error, match=says):
        look = {name: options.pop(name) for name in ("scale", "pool") if name in options}
        PlanMap(ShownPlan(**{"levels": levels(), **options}), **look)


def test_without_the_sink_rows_are_normalised_over_the_others():
    source = levels()
    widget = PlanMap(ShownPlan(source), scale="linear")
    widget.without = True
    widget.received(
        {"kind": "view", "id": 1, "queries": [0, 40], "keys": [0, 40], "rows": 40, "columns": 40}
    )
    wanted = source.view((0, 40), (0, 40), without=[0]).weights
    half = widget.view["range"]["high"] / 254 / 2
    np.testing.assert_allclose(decoded(widget), wanted, atol=half + 1e-6)
    assert np.isnan(decoded(widget)[:, 0]).all() and "without key 0" in widget.view["rule"]
    assert widget.state_of(ShownPlan(source))["view"]["rule"] == widget.view["rule"]


def test_the_automatic_scale_is_that_of_the_whole_plan():
    torch.manual_seed(0)
    layer = Attention(16, 2).eval()
    for strength, kind in ((0.1, "linear"), (6.0, "log")):
        with capture(layer, statistics=(), keep="projections") as record, torch.no_grad():
            layer(strength * torch.randn(1, 40, 16))
        widget = PlanMap(ShownPlan(PlanLevels(record.calls[0])))
        assert widget.view["range"]["kind"] == kind
        ask = {"kind": "view", "id": 1, "queries": [39, 40], "keys": [0, 2]}
        widget.received(ask | {"rows": 9, "columns": 9})
        assert widget.view["range"]["kind"] == kind  # kept while the window moves
        widget.scale = "linear"
        widget.received(ask | {"rows": 9, "columns": 9})
        assert widget.view["range"]["kind"] == "linear"
