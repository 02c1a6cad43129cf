"""The map in JupyterLab: what the page shows is what the kernel computed."""

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import math
import torch
from goatviz import capture, load_pretrained
from goatviz.analysis.levels import PlanLevels
from goatviz.explore import Page, Place, PlanMap, ShownPlan
checkpoint = load_pretrained("copy-mixture-4-goat")
ids = torch.randint(32, (1, 64), generator=torch.Generator().manual_seed(0))
with capture(checkpoint.model, statistics=(), keep="projections") as record, torch.no_grad():
    checkpoint.model(ids)
tokens = ["<img src=x onerror=alert(1)>" if i == 2 else f"t{i}" for i in range(64)]
levels = PlanLevels(record.calls[0], head=0)
plan = record.plan(head=0).weights
widget = PlanMap(ShownPlan(levels, "Head 0", tokens, tokens), scale="linear")
shown = Page({"map": Place(widget)}, label="One map")
"""


@pytest.fixture
def page(lab):
    """A notebook with one map, run and painted."""
    page = lab.run(SETUP, "shown")
    page.locator(".goatviz-map-canvas").wait_for()
    page.wait_for_function(
        "() => Number(document.querySelector('.goatviz-map').dataset.painted) > 0"
    )
    page.wait_for_timeout(150)
    return page


def colour_at(page, query, key, length):
    """Red, green and blue in the middle of a cell, while the whole plan is shown."""
    return page.evaluate(
        """([query, key, length]) => {
            const canvas = document.querySelector('.goatviz-map-canvas');
            const ratio = window.devicePixelRatio || 1;
            const [left, right, top, bottom] = [92, 12, 10, 84];
            const x = left + (canvas.clientWidth - left - right) * (key + 0.5) / length;
            const y = top + (canvas.clientHeight - top - bottom) * (query + 0.5) / length;
            return [...canvas.getContext('2d').getImageData(
                Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3);
        }""",
        [query, key, length],
    )


@pytest.mark.parametrize(
    "scale, named, share",
    [
        ("linear", "linear", "{w} / high"),
        ("log", "logarithmic", "1 + math.log10({w} / high) / 5"),
    ],
)
def test_the_pixels_are_the_kernels_numbers(lab, page, scale, named, share):
    lab.ask(f"setattr(widget, 'scale', {scale!r})")
    page.wait_for_function(
        f"() => document.querySelector('.goatviz-map-rule').textContent.includes('{named} colours')"
    )
    page.wait_for_timeout(150)
    pairs = [(0, 0), (40, 36), (63, 0), (63, 59), (20, 3)]
    share = share.format(w="float(plan[q, k])")
    wanted = lab.ask(
        f"[widget.palette[1 + round(254 * min(1, max(0, {share})))]"
        f" for high in [widget.view['range']['high']]"
        f" for q, k in {pairs}]",
    )
    for (query, key), colour in zip(pairs, wanted, strict=True):
        found = colour_at(page, query, key, 64)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 2, (query, key)
    ahead = colour_at(page, 3, 40, 64)
    assert ahead[0] == ahead[1] == ahead[2]  # forbidden: grey


def test_keys_move_the_cursor_and_the_page_says_the_exact_weight(lab, page):
    canvas = page.locator(".goatviz-map-canvas")
    canvas.focus()
    for key in ["ArrowDown"] * 9 + ["ArrowRight"] * 5:
        page.keyboard.press(key)
    status = page.locator(".goatviz-map-status")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map-status').dataset.weight"
        " && document.querySelector('.goatviz-map-status').textContent.startsWith('query 9')"
    )
    found = float(status.get_attribute("data-weight"))
    assert found == pytest.approx(lab.ask("float(plan[9, 5])"), rel=1e-9)
    assert "“t9”" in status.inner_text() and "key 5" in status.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert lab.ask("widget.selection") == [9, 5]


def test_zoom_fetches_cells_and_shows_tokens_as_text(lab, page):
    canvas = page.locator(".goatviz-map-canvas")
    canvas.focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("+")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map-rule').textContent.includes('queries 28')"
    )
    page.wait_for_timeout(400)
    view = lab.ask("widget.view")
    assert view["queries"] == [28, 36] and view["keys"] == [28, 36]
    assert view["rows"] == view["columns"] == 8 and view["exact"]
    assert view["query_tokens"]["texts"][0] == "t28"
    # A token that is markup stays text: nothing of it is in the document.
    assert page.locator(".goatviz-map img").count() == 0


def test_clicks_select_and_a_drag_along_the_axis_brushes(lab, page):
    bounds = page.locator(".goatviz-map-canvas").bounding_box()
    width, height = bounds["width"] - 92 - 12, bounds["height"] - 10 - 84

    def at(query, key):
        return (
            bounds["x"] + 92 + width * (key + 0.5) / 64,
            bounds["y"] + 10 + height * (query + 0.5) / 64,
        )

    page.mouse.click(*at(50, 46))
    page.wait_for_timeout(300)
    assert lab.ask("widget.selection") == [50, 46]
    page.mouse.move(bounds["x"] + 60, at(10, 0)[1])
    page.mouse.down()
    page.mouse.move(bounds["x"] + 60, at(19, 0)[1], steps=4)
    page.mouse.up()
    page.wait_for_timeout(300)
    assert lab.ask("widget.brush") == [10, 20]
    page.mouse.click(bounds["x"] + 60, at(33, 0)[1])
    page.wait_for_timeout(300)
    # A token's query, at the key that was selected before.
    assert lab.ask("[widget.selection, widget.brush]") == [[33, 46], [10, 20]]


def test_keys_brush_too(lab, page):
    page.locator(".goatviz-map-canvas").focus()
    for key in ["ArrowDown"] * 12 + ["b"] + ["ArrowUp"] * 4 + ["b"]:
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert lab.ask("widget.brush") == [8, 13]
    page.keyboard.press("Escape")
    page.wait_for_timeout(300)
    assert lab.ask("widget.brush") == []


def test_errors_of_the_kernel_are_seen_in_the_page(lab, page):
    lab.ask("setattr(widget, '_shown', None)")
    page.locator(".goatviz-map-canvas").focus()
    page.keyboard.press("+")
    error = page.locator(".goatviz-map .goatviz-error")
    error.wait_for()
    assert "AttributeError" in error.inner_text()
    lab.ask("setattr(widget, '_shown', ShownPlan(levels, 'Head 0', tokens, tokens))")
    page.keyboard.press("-")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map .goatviz-error').textContent === ''"
    )


def test_another_plan_of_another_size_replaces_the_first(lab, page):
    code = """
with capture(checkpoint.model, statistics=(), keep="projections") as longer, torch.no_grad():
    checkpoint.model(torch.randint(32, (1, 3000)))
widget.show(ShownPlan(PlanLevels(longer.calls[0]), "longer"))
"""
    lab.ask(f"exec({code!r})")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map-rule').textContent"
        ".includes('longer · queries 0–2,999')"
    )
    page.wait_for_timeout(500)
    view = lab.ask("widget.view")
    assert view["queries"] == [0, 3000] and 256 < view["rows"] < 3000
    assert "of 3,000 queries; keys: the largest of" in view["rule"]


def test_windows_stay_inside(front):
    assert front("it.clampWindow([-3, 7], 100)") == [0, 10]
    assert front("it.clampWindow([95, 110], 100)") == [85, 100]
    assert front("it.clampWindow([-50, 500], 100)") == [0, 100]
    assert front("it.zoomWindow([0, 64], 64, 0.5, 16)") == [8, 40]
    assert front("it.zoomWindow([10, 11], 64, 0.5, 10.5)") == [10, 11]
    assert front("it.zoomWindow([10, 20], 64, 100, 12)") == [0, 64]


def test_ticks_are_round_and_few(front):
    assert front("it.niceTicks(0, 64, 5)") == [0, 20, 40, 60]
    assert front("it.niceTicks(3.5, 9, 10)") == [4, 5, 6, 7, 8]
    ticks = front("it.niceTicks(0, 131072, 8)")
    assert ticks == list(range(0, 131072, 20000))


def test_codes_stand_for_weights(front):
    linear = "{kind: 'linear', low: 0, high: 0.5}"
    assert front(f"it.decode(0, {linear})") is None
    assert front(f"[1, 128, 255].map(c => it.decode(c, {linear}))") == [0, 0.25, 0.5]
    log = "{kind: 'log', low: 1e-4, high: 1}"
    found = front(f"[1, 128, 255].map(c => it.decode(c, {log}))")
    assert found == pytest.approx([1e-4, 1e-2, 1])
    assert front("[0, 0.25, 0.00001234].map(value => it.number(value))") == [
        "0",
        "0.250",
        "1.23e-5",
    ]


def test_the_newest_question_wins(front):
    sent = front(
        """(() => {
            const sent = [];
            const line = it.newestWins(question => sent.push(question));
            line.ask(1); line.ask(2); line.ask(3);
            line.answered(); line.ask(4); line.answered(); line.answered();
            return [sent, line.idle];
        })()"""
    )
    assert sent == [[1, 3, 4], True]
