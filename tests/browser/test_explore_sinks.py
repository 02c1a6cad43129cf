"""explore_sinks in JupyterLab: keys and mouse choose, and the page shows the kernel's numbers."""

import re

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import json
import threading
import numpy as np
import torch
from goatviz import explore_sinks
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots.base import as_figure
torch.manual_seed(0)
model = CausalLM(ModelConfig(vocab_size=32, training_length=32, embed_dim=64, num_layers=3,
                             num_heads=4, positions="none")).eval()
inputs = [torch.randint(32, (1, 40 + 8 * n)) for n in range({count})]
in_main = set()
model.register_forward_pre_hook(
    lambda *_: in_main.add(threading.current_thread() is threading.main_thread()))
explorer = explore_sinks(model, inputs)
explorer.set(layer=0, head=0)


def trace(panel, name):
    # NaN as null; plotly's own JSON would pack arrays.
    figure = as_figure(explorer.picture({{}}).figures[panel])
    (found,) = [t for t in figure.data if t.name == name]
    lists = {{axis: np.asarray(found[axis]).tolist() for axis in "xyz" if axis in found}}
    return json.loads(json.dumps(lists).replace("NaN", "null"))
"""
TRACE = """([panel, name]) => {
    const graph = document.querySelector(
        `.goatviz-figure[aria-label="Attention sinks: ${panel}"] .js-plotly-plot`);
    const trace = graph && graph._fullData.find(each => each.name === name);
    if (!trace) return null;
    const number = value => (Number.isNaN(value) ? null : value);
    const row = values => [...values].map(number);
    return {
        x: trace.x && row(trace.x),
        y: trace.y && row(trace.y),
        z: trace.z && [...trace.z].map(row),
    };
}"""
#: Where on the screen a cell of the overview lies.
PLACE = """([layer, head]) => {
    const graph = document.querySelector(
        '.goatviz-figure[aria-label="Attention sinks: heads"] .js-plotly-plot');
    graph.scrollIntoView({ block: "center" });
    const { xaxis, yaxis } = graph._fullLayout;
    const box = graph.getBoundingClientRect();
    return [box.left + xaxis._offset + xaxis.d2p(head), box.top + yaxis._offset + yaxis.d2p(layer)];
}"""


@pytest.fixture
def opened(lab):
    """How to make a notebook with the explorer of so many inputs, run."""

    def make(count=4):
        page = lab.run(SETUP.format(count=count), "explorer")
        page.locator(".goatviz-map-canvas").wait_for()
        return page

    return make


@pytest.fixture
def page(opened):
    page = opened()
    said(page, "Layer 0, head 0 ")
    page.wait_for_function(f"place => ({TRACE})(place) !== null", arg=["signal", "queries"])
    return page


def said(page, text):
    """Wait until the summary says so."""
    page.wait_for_function(
        "text => document.querySelector('.goatviz-summary')?.textContent.includes(text)", arg=text
    )


def agree(lab, page, panel, name):
    """The page's trace is the kernel's."""
    wanted = lab.ask(f"trace({panel!r}, {name!r})")
    page.wait_for_function(f"place => ({TRACE})(place) !== null", arg=[panel, name])
    page.wait_for_timeout(300)
    found = page.evaluate(TRACE, [panel, name])
    for axis, values in wanted.items():
        assert found[axis] == values, (panel, name, axis)


def test_the_page_shows_the_kernels_numbers(lab, page):
    agree(lab, page, "heads", "importance")
    agree(lab, page, "sink rate", "model")
    agree(lab, page, "sink rate", "95 % interval")
    agree(lab, page, "importance", "importance")
    agree(lab, page, "signal", "queries")
    assert page.locator(".goatviz-controls .goatviz-error").inner_text() == ""


def test_the_keyboard_moves_threshold_layer_and_head(lab, page):
    slider = page.locator("input[type=range][name=threshold]")
    slider.focus()
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    said(page, "at ε = 0.05 ")
    assert lab.ask("explorer.threshold") == 0.05
    page.wait_for_function(f"() => ({TRACE})(['heads', 'importance above ε = 0.05']) !== null")
    above = page.evaluate(TRACE, ["heads", "importance above ε = 0.05"])
    cells = page.evaluate(TRACE, ["heads", "importance"])
    count = sum(value > 0.05 for row in cells["z"] for value in row)
    # Each frame is five points and a gap.
    assert count > 0 and len(above["x"]) == 6 * count
    for name, key, text in (("layer", "ArrowDown", "Layer 1, head 0 "), ("head", "End", "head 3 ")):
        page.locator(f"select[name={name}]").focus()
        page.keyboard.press(key)
        said(page, text)
    assert lab.ask("[explorer.layer, explorer.head]") == [1, 3]
    agree(lab, page, "sink rate", "layer 1, head 3")


def test_a_click_on_a_cell_shows_that_heads_keys_and_plan(lab, page):
    for layer, head in ((2, 1), (0, 3)):
        x, y = page.evaluate(PLACE, [layer, head])
        page.mouse.move(x, y)
        page.mouse.click(x, y)
        said(page, f"Layer {layer}, head {head} ")
        page.wait_for_function(
            "text => document.querySelector('.goatviz-map-rule').textContent.includes(text)",
            arg=f"Plan of layer {layer}, head {head}, first input",
        )
        assert page.locator("select[name=layer]").input_value() == str(layer)
        agree(lab, page, "sink rate", f"layer {layer}, head {head}")
        agree(lab, page, "importance", "importance")


def test_profiling_can_be_stopped_and_goes_on(lab, opened):
    page = opened(600)
    cancel = page.get_by_role("button", name="Cancel")
    cancel.click()
    said(page, "Stopped at ")
    cancel.wait_for(state="hidden")
    # The plan of any head can be looked at all the same, and the work goes on in the cells' thread.
    summary = page.locator(".goatviz-summary").inner_text()
    before = int(re.search(r"Stopped at (\d+) %", summary)[1]) / 100
    page.locator("select[name=layer]").select_option(index=1)
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map-rule').textContent.includes('layer 1, head 0')"
    )
    page.wait_for_function(
        "before => document.querySelector('progress').value > before + 0.005", arg=before
    )
    assert cancel.is_visible() and lab.ask("sorted(in_main)") == [True]
    lab.ask("explorer.cancel()")


def test_errors_are_seen_in_the_page(lab, page):
    lab.ask("setattr(explorer, 'head', 9)")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls .goatviz-error').textContent"
        ".match(/head must be .*got 9/) !== null"
    )
