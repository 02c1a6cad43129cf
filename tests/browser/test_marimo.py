"""Every explorer in marimo, where no Jupyter is: controls, numbers and messages, offline.

marimo draws widgets in shadow roots, sets one trait after the other, and each reader of an app is a
session of its own.
"""

import numpy as np
import pytest
import torch

from goatviz.explore import (
    explore_generation,
    explore_length,
    explore_plan,
    explore_prior,
    explore_sinks,
)
from goatviz.results import load_shipped_result
from goatviz.training import load_pretrained
from tests.browser.lab import LOOPBACK, free_port, serving
from tests.browser.numbers import agree, expected

APP = """
import marimo

app = marimo.App(width="full")


@app.cell
def _():
    import json
    import marimo as mo
    import torch
    from goatviz import (
        explore_generation, explore_length, explore_plan, explore_prior, explore_sinks,
        load_pretrained, load_shipped_result,
    )
    ids = torch.randint(97, 123, (1, 48), generator=torch.Generator().manual_seed(0))
    model = load_pretrained("passkey-goat")
    sweep, grid = load_shipped_result("needle-sweep"), load_shipped_result("needle-grid")
    return


@app.cell
def _():
    plan = mo.ui.anywidget(explore_plan(model, ids, tokens=[chr(each) for each in ids[0]]))
    plan
    return


@app.cell
def _():
    prior = mo.ui.anywidget(explore_prior(load_pretrained("copy-mixture-1-goat")))
    prior
    return


@app.cell
def _():
    sinks = mo.ui.anywidget(explore_sinks(model, ids))
    sinks
    return


@app.cell
def _():
    length = mo.ui.anywidget(explore_length(sweep, grid=grid))
    length
    return


@app.cell
def _():
    generation = mo.ui.anywidget(explore_generation(model, ids[:, :16], max_new_tokens=6))
    generation
    return


@app.cell
def _():
    # Runs again whenever a control of one of them moves.
    explorers = (plan, prior, sinks, length, generation)
    values = json.dumps([each.widget.values() for each in explorers])
    mo.Html(f"<output id='kernel'>{values}</output>")
    return


app.run()
"""
#: marimo registers a service worker, and the tests' browser has none.
NO_WORKER = "Error registering service worker"


@pytest.fixture
def served(tmp_path):
    """The address at which marimo serves the app."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    port = free_port()
    url = f"http://{LOOPBACK}:{port}"
    command = ["marimo", "--quiet", "run", str(tmp_path / "app.py"), "--headless", "--no-token"]
    folders = {"XDG_CONFIG_HOME": tmp_path / "config", "XDG_STATE_HOME": tmp_path / "state"}
    address = [f"--host={LOOPBACK}", f"--port={port}"]
    with serving([*command, *address], f"{url}/health", tmp_path / "log", folders):
        yield url


def ids():
    return torch.randint(97, 123, (1, 48), generator=torch.Generator().manual_seed(0))


def explorers():
    """The same, in this process."""
    model = load_pretrained("passkey-goat")
    sweep, grid = load_shipped_result("needle-sweep"), load_shipped_result("needle-grid")
    return (
        explore_plan(model, ids(), tokens=[chr(each) for each in ids()[0]]),
        explore_prior(load_pretrained("copy-mixture-1-goat")),
        explore_sinks(model, ids()),
        explore_length(sweep, grid=grid),
        explore_generation(model, ids()[:, :16], max_new_tokens=6),
    )


def kernel_has(page, number, **values):
    """Wait until the kernel's explorer of that number has these values."""
    page.wait_for_function(
        """([number, values]) => {
            const text = document.querySelector('#kernel')?.textContent;
            return text && Object.entries(values).every(
                ([name, value]) => JSON.parse(text)[number][name] === value);
        }""",
        arg=[number, values],
    )


def press(control, key, times):
    control.focus()
    for _ in range(times):
        control.page.keyboard.press(key)


def moved(page, shown, explorers):
    """Move a control of each, and see the kernel's values and numbers follow."""
    press(shown.nth(0).locator("input[name=temperature]"), "ArrowLeft", 6)
    press(shown.nth(1).locator("input[name=sink_scale]"), "ArrowLeft", 10)
    shown.nth(2).locator("select[name=head]").select_option("2")
    shown.nth(3).locator("select[name=scheme]").select_option("rope")
    shown.nth(4).locator("select[name=head]").select_option("1")
    values = (
        {"temperature": float(f"{10**-0.3:.12g}")},
        {"sink_scale": 0.5},
        {"head": 2},
        {"scheme": "rope"},
        {"head": 1},
    )
    for at, explorer in enumerate(explorers):
        explorer.set(**values[at])
        agree(shown.nth(at), expected(explorer))
        kernel_has(page, at, **values[at])


def asked(page, plan, explorer):
    """Point at a pair of the map and at a token: the kernel answers with numbers and bytes."""
    weights = explorer.draw(query=1, temperature=1.0).data[0].y
    plan.locator(".goatviz-map-canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    status = plan.locator(".goatviz-map-status[data-weight]")
    status.filter(has_text="query 1 ").wait_for()
    assert float(status.get_attribute("data-weight")) == pytest.approx(weights[1], rel=1e-9)
    token = plan.locator(".goatviz-passage-text span").nth(20)
    token.hover()
    weights = np.nan_to_num(explorer.draw(query=20, temperature=1.0).data[0].y)
    most = int(weights.argmax())
    said = f"Query 20 “{chr(ids()[0, 20])}” gives most to key {most} “{chr(ids()[0, most])}”"
    plan.locator(".goatviz-passage").get_by_text(f"{said}: {weights[most]:#.3g}.").wait_for()
    token.click()
    kernel_has(page, 0, query=20)
    explorer.set(query=20)
    agree(plan, expected(explorer))


def clicked(shown, explorer):
    """A click on a cell of a plotly figure is the kernel's business."""
    place = shown.locator(".goatviz-figure").nth(1)
    place.scroll_into_view_if_needed()
    # The second of five lengths, the fourth of five depths.
    cells = place.locator(".nsewdrag")
    box = cells.bounding_box()
    at = {"x": box["width"] * 1.5 / 5, "y": box["height"] * 3.5 / 5}
    cells.hover(position=at, force=True)
    cells.click(position=at, force=True)
    explorer.set(length=128, depth=0.7)
    agree(shown, expected(explorer))


def test_the_page_shows_the_kernels_numbers_and_the_kernel_answers(
    served, offline_context, offline_page
):
    page = offline_page
    page.goto(served)
    shown = page.locator(".goatviz-explorer")
    here = explorers()
    for at, explorer in enumerate(here):
        agree(shown.nth(at), expected(explorer))
    moved(page, shown, here)
    asked(page, shown.nth(0), here[0])
    clicked(shown.nth(3), here[3])
    # Another reader, of the same process: plotly.js and all models are there for both.
    other = offline_context.new_page()
    other.goto(served)
    for at, explorer in enumerate(explorers()):
        agree(other.locator(".goatviz-explorer").nth(at), expected(explorer))
    assert offline_context.outside_requests == []
    assert [each for each in offline_context.console_errors if NO_WORKER not in each] == []
