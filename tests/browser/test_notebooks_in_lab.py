"""Every notebook in a real JupyterLab: it runs, its explorers answer keys, and the page's numbers
are the kernel's. Screenshots are left in build/screenshots for somebody to look at.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "build" / "screenshots"

#: Cells whose output is an explorer, by number.
EXPLORERS = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    return [...panel.content.model.cells].map((cell, number) => [number, cell]).filter(
        ([, cell]) => cell.type === 'code' && [...Array(cell.outputs.length).keys()].some(
            at => JSON.stringify(cell.outputs.get(at).toJSON().data ?? {}).includes('Explorer')))
        .map(([number]) => number);
}"""
#: By label, every curve and map that is drawn; numbers as text, so that NaN survives.
SHOWN = """() => {
    const found = {};
    for (const root of document.querySelectorAll('.goatviz-figure')) {
        const graph = root.querySelector('.js-plotly-plot');
        if (!graph || !graph._fullData) continue;
        const plain = value => value && value.length !== undefined && typeof value !== 'string'
            ? [...value].map(plain) : value;
        const data = graph.data.map((trace, at) => {
            const full = graph._fullData[at];
            const values = full.z ?? full.y ?? [];
            return [trace.name ?? '', plain(values).map(v => Array.isArray(v)
                ? v.map(String) : String(v))];
        });
        found[root.getAttribute('aria-label')] = data;
    }
    return found;
}"""
#: The same from the kernel's side: every FigureView of every explorer that is open.
KERNEL = """
(lambda json, np, widgets: {
    view.label: [
        [trace.get("name", ""), (lambda packed: np.frombuffer(
            view.figure["buffers"][packed["bdata"]], packed["dtype"]).reshape(
                [int(n) for n in str(packed.get("shape", "-1")).split(",")]).astype(str).tolist()
            if isinstance(packed, dict) else [[str(v) for v in row] if isinstance(row, list)
                else str(row) for row in packed])(
            trace.get("z") if trace.get("z") is not None else trace.get("y", []))]
        for trace in json.loads(view.figure["text"])["data"]]
    for page in widgets for view in getattr(page, "parts", {}).values()
    if type(view).__name__ == "FigureView" and view.label and view.figure})(
    __import__("json"), __import__("numpy"),
    list(__import__("ipywidgets").widgets.widget._instances.values()))
"""
SETTLED = """() => [...document.querySelectorAll('.goatviz-figure')].every(
    root => Number(root.dataset.drawn ?? 0) > 0)
    && [...document.querySelectorAll('.goatviz-controls-line')].every(
        line => line.dataset.busy === 'no')"""


def numbers(values):
    """Texts of numbers, in whatever nesting, as an array; what has no number is NaN."""
    flat = [item for row in values for item in (row if isinstance(row, list) else [row])]
    return np.array(
        [np.nan if v in ("null", "None", "undefined", "") else float(v) for v in flat], dtype=float
    )


def agree(page, lab):
    """Compare every figure in the page with the kernel's; return how many there were."""
    shown, wanted = page.evaluate(SHOWN), lab.ask(" ".join(KERNEL.split()))
    assert shown
    for label, traces in shown.items():
        assert [name for name, _ in traces] == [name or "" for name, _ in wanted[label]], label
        for (name, found), (_, kernels) in zip(traces, wanted[label], strict=True):
            here, there = numbers(found), numbers(kernels)
            assert len(here) == len(there), (label, name)
            np.testing.assert_allclose(here, there, rtol=1e-6, err_msg=f"{label}: {name}")
    return len(shown)


def settle_and_agree(page, lab):
    """As `agree`, once what was under way has ended."""
    for _ in range(40):
        settle(page)
        try:
            return agree(page, lab)
        except AssertionError:
            page.wait_for_timeout(500)
    return agree(page, lab)


def settle(page):
    page.wait_for_function(SETTLED, timeout=120_000)
    page.wait_for_timeout(400)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_explorers_answer(own_lab, path):
    lab, page = own_lab, own_lab.page
    shutil.copy(path, lab.server.root / path.name)
    page.set_viewport_size({"width": 1280, "height": 1400})
    lab.open(path.name)
    lab.run_all(timeout_ms=300_000)
    explorers = page.evaluate(EXPLORERS)
    assert explorers, "a notebook has something to touch"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for number in explorers:
        page.evaluate(
            "number => window.jupyterapp.shell.currentWidget.content.scrollToItem(number, 'start')",
            number,
        )
        page.locator(".goatviz-controls").first.wait_for()
        assert settle_and_agree(page, lab) >= 1
        page.screenshot(path=SCREENSHOTS / f"{path.stem}-{number}.png")
    # The last one, by keyboard alone.
    before = page.evaluate(SHOWN)
    explorer = page.locator(".goatviz-explorer").last
    slider = explorer.get_by_role("slider")
    if slider.count():
        slider.first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
    else:
        explorer.get_by_role("combobox").first.focus()
        page.keyboard.press("ArrowDown")
    page.wait_for_function(
        f"before => JSON.stringify(({SHOWN})()) !== before", arg=json.dumps(before), timeout=60_000
    )
    settle_and_agree(page, lab)
    lab.show_in("Dark")
    settle(page)
    page.screenshot(path=SCREENSHOTS / f"{path.stem}-dark.png")
    said = page.locator(".goatviz-controls .goatviz-error").all_inner_texts()
    assert set(said) <= {""}
