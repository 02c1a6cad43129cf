"""A notebook with an explorer as an app: Voila serves it, and its slider moves the figure."""

from contextlib import suppress

import nbformat
import pytest
import torch
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from goatviz.explore import explore_plan
from goatviz.training import load_pretrained
from tests.browser.lab import LOOPBACK, free_port, serving
from tests.browser.numbers import agree, expected

pytestmark = pytest.mark.browser

CODE = """
import torch
from goatviz import explore_plan, load_pretrained
ids = torch.randint(32, (1, 48), generator=torch.Generator().manual_seed(0))
explore_plan(load_pretrained("copy-mixture-1-goat"), ids)
"""
#: Voila's own style sheets of icons; the page is whole without them.
ICONS = {
    f"https://cdn.jsdelivr.net/npm/@fortawesome/fontawesome-free@%5E5/css/{name}.min.css"
    for name in ("all", "v4-shims")
}


@pytest.fixture
def served(tmp_path):
    """The address at which Voila serves the notebook."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "app.ipynb")
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    folders = {name: tmp_path / name.lower() for name in names}
    port = free_port()
    url = f"http://{LOOPBACK}:{port}/"
    command = ["voila", str(tmp_path / "app.ipynb"), "--no-browser", f"--port={port}"]
    # A page would start a kernel; a file of Voila's own does not.
    with serving(
        [*command, f"--Voila.ip={LOOPBACK}"],
        f"{url}voila/static/voila.js",
        tmp_path / "log",
        folders,
    ):
        yield url


#: What the page says where its restoring ended without the widget, as on a busy machine.
LATE = "Error displaying widget: model not found"


def open_app(page, address):
    """Open the app, and again if ipywidgets did not find the widget in time; nothing else."""
    for _ in range(3):
        page.goto(address)
        with suppress(PlaywrightTimeout):
            page.locator(".goatviz-explorer .main-svg").first.wait_for(timeout=60_000)
            return
        assert LATE in page.locator("body").inner_text()
    raise AssertionError(f"three times: {LATE}")


def test_a_slider_moves_the_figure_in_voila(served, offline_context, offline_page):
    page = offline_page
    open_app(page, served)
    ids = torch.randint(32, (1, 48), generator=torch.Generator().manual_seed(0))
    explorer = explore_plan(load_pretrained("copy-mixture-1-goat"), ids)
    shown = page.locator(".goatviz-explorer")
    agree(shown, expected(explorer))
    slider = page.locator(".goatviz-controls input[type=range]")
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    place = float(slider.input_value())
    agree(shown, expected(explorer, temperature=float(f"{10**place:.12g}")))
    assert place == pytest.approx(-0.3)
    assert set(offline_context.outside_requests) <= ICONS
