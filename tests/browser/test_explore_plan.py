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


def kernel_has(lab, expression, wanted):
    """Wait until an expression in the kernel has this value: the page shows its window first."""
    for _ in range(100):
        found = lab.ask(expression)
        if found == wanted:
            break
        lab.page.wait_for_timeout(50)
    assert found == wanted


def test_compared_maps_move_together(lab):
    against = SETUP.replace("task_ids)", 'task_ids, against={"layer": 1, "head": 2})')
    page = lab.run(against, "explorer")
    rules = page.locator(".goatviz-map-rule")
    canvases = page.locator(".goatviz-map-canvas")
    canvases.nth(2).wait_for()
    titles = [rules.nth(at).inner_text().split(" \u00b7")[0] for at in range(3)]
    assert titles[1] == "Layer 1, head 2"
    assert titles[2].startswith("Difference: ") and titles[2].endswith(", minus layer 1, head 2")
    page.locator(".goatviz-map-bar").nth(2).locator("button").first.click()
    for at in range(3):
        page.wait_for_function(
            """at => document.querySelectorAll('.goatviz-map-rule')[at].textContent
                .includes('queries 24\u201371, keys 24\u201371 \u00b7 every query; every key')""",
            arg=at,
        )
    kernel_has(lab, "list(explorer.key_range)", [24, 72])
    # A pair that is chosen in one is chosen in all, and its exact difference is said.
    canvases.nth(2).focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.wait_for_function(
        """() => document.querySelectorAll('.goatviz-map-status')[2].textContent
            .includes(': weight ')"""
    )
    said = page.locator(".goatviz-map-status").nth(2).inner_text()
    kernel_has(lab, "[explorer.query, explorer.key]", [26, 25])
    query, key = 26, 25
    assert said.startswith(f"query {query}, key {key}: difference ")
    cell = lab.ask(f"explorer.parts['difference'].levels.cell({query}, {key})._asdict()")
    found = [
        float(part)
        for part in said.split("difference ")[1].replace(": weight ", " and ").split(" and ")
    ]
    wanted = [cell["difference"], cell["weight"], cell["other"]]
    assert found == pytest.approx(wanted, rel=1e-5)
    kernel_has(lab, "[list(one.selection) for one in explorer._maps()]", [[query, key]] * 3)
    # Another head: its map is whole again, and so is the one that stays.
    page.get_by_role("combobox", name="Head").select_option(index=1)
    for at in range(3):
        page.wait_for_function(
            """at => document.querySelectorAll('.goatviz-map-rule')[at].textContent
                .includes('queries 0\u201395, keys 0\u201395')""",
            arg=at,
        )
    kernel_has(lab, "[explorer.key_range, explorer.error]", [[], ""])


def test_the_input_is_chosen(lab):
    inputs = SETUP.replace("task_ids)", "[task_ids, task_ids[:, :40]])")
    page = lab.run(inputs, "explorer")
    shown(page, "Query 95: plan and prior")
    page.get_by_role("combobox", name="Input").select_option(index=1)
    agree(shown(page, "Query 39: plan and prior"), kernels(lab, page))
    assert lab.ask("[explorer.input, explorer.map.size]") == [1, [40, 40]]
