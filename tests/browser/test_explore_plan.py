"""explore_plan in JupyterLab: controls, map and row agree with the kernel, and nothing leaves."""

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import numpy as np
import torch
from goatviz import explore_plan, load_pretrained
task_ids = torch.randint(97, 123, (1, 96), generator=torch.Generator().manual_seed(0))
explorer = explore_plan(load_pretrained("passkey-goat"), task_ids)
"""
ROW = """() => {
    const graph = document.querySelector('.js-plotly-plot');
    return graph && graph._fullData
        ? { y: [...graph._fullData[1].y], title: graph.layout.title.text } : null;
}"""


@pytest.fixture
def page(lab):
    page = lab.run(SETUP, "explorer")
    page.locator(".goatviz-map-canvas").wait_for()
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    return page


def shown(page, title):
    """The row's curve in the page, once it has that title."""
    page.wait_for_function(
        f"title => {{ const row = ({ROW})(); return row && row.title === title; }}", arg=title
    )
    return [None if value != value else value for value in page.evaluate(ROW)["y"]]


def kernels(lab, page):
    values = lab.ask(
        "[None if v != v else float(v) for v in np.asarray(explorer.draw().data[1].y)]"
    )
    return values


def agree(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, rel=1e-12)


def test_a_click_in_the_map_draws_that_querys_row(lab, page):
    agree(shown(page, "Query 95: plan and prior"), kernels(lab, page))
    bounds = page.locator(".goatviz-map-canvas").bounding_box()
    height = bounds["height"] - 10 - 48
    page.mouse.click(bounds["x"] + 110, bounds["y"] + 10 + height * (40 + 0.5) / 96)
    agree(shown(page, "Query 40: plan and prior"), kernels(lab, page))
    assert lab.ask("explorer.query") == 40


def test_zooming_the_map_zooms_the_row(lab, page):
    agree(shown(page, "Query 95: plan and prior"), kernels(lab, page))
    buttons = page.locator(".goatviz-map-bar button")
    buttons.nth(0).click()
    page.wait_for_function(f"() => (({ROW})()?.y ?? []).length === 48")
    assert lab.ask("list(explorer.key_range)") == [24, 72]
    agree(shown(page, "Query 95: plan and prior"), kernels(lab, page))
    low, high = page.evaluate("() => document.querySelector('.js-plotly-plot').layout.xaxis.range")
    assert 20 < low < 24.5 and 70.5 < high < 76
    buttons.nth(2).click()
    page.wait_for_function(f"() => (({ROW})()?.y ?? []).length === 96")


def test_the_keyboard_moves_temperature_layer_and_head(lab, page):
    shown(page, "Query 95: plan and prior")
    page.get_by_role("slider", name="Temperature").focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-summary').textContent"
        ".includes('at temperature 0.501')"
    )
    page.wait_for_function(
        "() => document.querySelector('.js-plotly-plot').layout.title.subtitle.text"
        ".includes('temperature 0.501')"
    )
    agree(shown(page, "Query 95: plan and prior"), kernels(lab, page))
    page.get_by_role("combobox", name="Layer").select_option(index=2)
    page.get_by_role("combobox", name="Head").select_option(index=3)
    page.wait_for_function(
        "() => document.querySelector('.goatviz-map-rule').textContent.includes('Layer 2, head 3')"
    )
    page.wait_for_timeout(500)
    agree(shown(page, "Query 95: plan and prior"), kernels(lab, page))
    assert lab.ask("[explorer.layer, explorer.head]") == [2, 3]


def test_errors_of_observers_are_seen(lab, page):
    lab.ask("setattr(explorer, 'query', 500)")
    alert = page.locator(".goatviz-controls .goatviz-error")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls .goatviz-error').textContent !== ''"
    )
    assert "query must be an integer in 0 .. 95, got 500" in alert.inner_text()
