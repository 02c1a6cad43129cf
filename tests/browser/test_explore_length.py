"""explore_length in JupyterLab: controls, clicks and figures agree with the kernel, offline."""

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import numpy as np
from goatviz import explore_length, load_shipped_result
from goatviz.plots.base import as_figure
explorer = {make}
def listed(values):
    return [None if value != value else float(value) for value in np.ravel(values)]
def kernel():
    return [
        [listed(t.z) if t.type == "heatmap" else listed(t.x) + listed(t.y) for t in figure.data]
        for figure in map(as_figure, explorer.picture({{}}).figures.values())
    ]
"""
BOTH = """explore_length(
    load_shipped_result("needle-sweep"), grid=load_shipped_result("needle-grid")
)"""
TEXT = 'explore_length(load_shipped_result("text-eltec"))'
DRAWN = """() => {
    const listed = (values) => [...values].flatMap(
        value => value?.length === undefined ? [Number.isNaN(value) ? null : value] : listed(value)
    );
    return [...document.querySelectorAll('.goatviz-figure .js-plotly-plot')].map(graph =>
        (graph._fullData ?? []).map(trace =>
            trace.type === 'heatmap' ? listed(trace.z) : [...listed(trace.x), ...listed(trace.y)]
        )
    );
}"""


@pytest.fixture
def opened(lab):
    """How to make a notebook with one explorer, run."""

    def make(expression):
        page = lab.run(SETUP.format(make=expression), "explorer")
        page.locator(".js-plotly-plot .main-svg").first.wait_for()
        return page

    return make


def agree(lab, page):
    """Wait until every figure of the page holds, number by number, what the kernel draws."""
    wanted = lab.ask("kernel()")
    for _ in range(200):
        if page.evaluate(DRAWN) == wanted:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(DRAWN) == wanted


def control(page, label):
    return page.locator(f'.goatviz-controls :is(select, input)[aria-label^="{label}"]')


def choose(page, label, *keys):
    """Move a control by the keyboard alone."""
    control(page, label).focus()
    for key in keys:
        page.keyboard.press(key)


def says(page, words):
    page.wait_for_function(
        "words => document.querySelector('.goatviz-summary').textContent.includes(words)",
        arg=words,
    )


def test_the_keyboard_chooses_scheme_length_depth_and_measure(lab, opened):
    page = opened(BOTH)
    assert page.locator(".goatviz-figure").count() == 3
    says(page, "goat at 1,024 tokens, the task's own depths")
    agree(lab, page)
    choose(page, "Scheme", "ArrowDown")
    choose(page, "Length", "ArrowUp", "ArrowUp")
    choose(page, "Depth", "ArrowDown", "ArrowDown")
    choose(page, "Measure", "ArrowDown")
    says(page, "rope at 256 tokens, depth 30 %")
    says(page, "of answer tokens right")
    assert lab.ask("explorer.values()") == {
        "scheme": "rope",
        "others": "shown",
        "length": 256,
        "depth": 0.3,
        "measure": "token",
        "runs": True,
    }
    agree(lab, page)
    choose(page, "Others", "ArrowDown", "ArrowDown")
    choose(page, "Single runs", "Space")
    page.wait_for_function("() => document.querySelector('.js-plotly-plot')._fullData.length === 3")
    # A single scheme's map has as many curves with single runs as without: nothing to wait for.
    for _ in range(50):
        if lab.ask("[explorer.others, explorer.runs]") == ["hidden", False]:
            break
        page.wait_for_timeout(100)
    assert lab.ask("[explorer.others, explorer.runs]") == ["hidden", False]
    agree(lab, page)


def test_a_click_chooses_a_cell_and_a_point(lab, opened):
    page = opened(BOTH)
    agree(lab, page)
    cells = page.locator(".js-plotly-plot").nth(1).locator(".nsewdrag")
    box = cells.bounding_box()
    # The second of five lengths, the fourth of five depths.
    page.mouse.click(box["x"] + box["width"] * 1.5 / 5, box["y"] + box["height"] * 3.5 / 5)
    says(page, "goat at 128 tokens, depth 70 %")
    assert lab.ask("[explorer.length, explorer.depth]") == [128, 0.7]
    assert control(page, "Length").evaluate("e => e.selectedOptions[0].text") == "128"
    assert control(page, "Depth").evaluate("e => e.selectedOptions[0].text") == "70 %"
    agree(lab, page)
    curve = page.locator(".js-plotly-plot").nth(0)
    place = curve.evaluate(
        """graph => {
            const trace = graph._fullData.find(each => each.name === 'rope');
            const layout = graph._fullLayout, box = graph.getBoundingClientRect();
            return [
                box.x + layout._size.l + layout.xaxis.d2p(trace.x[3]),
                box.y + layout._size.t + layout.yaxis.d2p(trace.y[3]),
            ];
        }"""
    )
    page.mouse.move(*place)
    page.mouse.click(*place)
    says(page, "rope at 512 tokens, depth 70 %")
    agree(lab, page)


def test_losses_their_differences_and_what_is_wrong(lab, opened):
    page = opened(TEXT)
    says(page, "rope-interpolated in windows of 16,384 tokens")
    lab.ask("setattr(explorer, 'scheme', 'goat')")
    says(page, "goat in windows of 16,384 tokens")
    agree(lab, page)
    choose(page, "Reference", "ArrowDown")
    says(page, "difference from rope-interpolated on the same pieces")
    choose(page, "Measure", "ArrowDown")
    page.wait_for_function(
        "() => document.querySelector('.js-plotly-plot').layout.yaxis.title.text"
        " === 'perplexity [1]'"
    )
    agree(lab, page)

    lab.ask("setattr(explorer, 'length', 65)")
    alert = page.locator(".goatviz-controls [role=alert]")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls [role=alert]').textContent"
    )
    assert (
        "length must be one of 256, 512, 1024, 2048, 4096, 8192, 16384; got 65"
        in alert.inner_text()
    )
    lab.ask("setattr(explorer, 'length', 512)")
    says(page, "goat in windows of 512 tokens")
    assert alert.inner_text() == ""
    agree(lab, page)
