"""A saved, trusted notebook shows the last state of its explorers before anything has run."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from plotly.offline import get_plotlyjs

from goatviz.explore import explore_length
from goatviz.results import load_shipped_result
from tests.browser.numbers import agree, expected

pytestmark = pytest.mark.browser

CELLS = (
    "import torch\n"
    "from goatviz import explore_length, explore_plan, explore_prior, explore_sinks\n"
    "from goatviz import load_pretrained, load_shipped_result\n"
    'sweep, grid = load_shipped_result("needle-sweep"), load_shipped_result("needle-grid")\n'
    "ids = torch.randint(97, 123, (1, 64), generator=torch.Generator().manual_seed(0))",
    "explorer = explore_length(sweep, grid=grid)\nexplorer",
    'model = load_pretrained("passkey-goat")\nplan = explore_plan(model, ids)\nplan',
    "prior = explore_prior(model)\nprior",
    "sinks = explore_sinks(model, ids)\nsinks",
    'explore_length(load_shipped_result("text-eltec"))',
    'explorer.set(scheme="rope", length=256, depth=0.3, measure="token")',
    "plan.set(layer=2, head=1, query=40)",
    "sinks.profile()\nsinks.set(layer=1, head=2)",
)
LAST = {"scheme": "rope", "length": 256, "depth": 0.3, "measure": "token"}
#: Titles of the other three, and some of what they say.
OTHERS = {
    "Learned prior": "as learned",
    "Attention sinks": "Layer 1, head 2",
    "Length extrapolation: text": "rope-interpolated in windows of 16,384",
}
#: Of a notebook with five explorers; README states it.
LIMIT_BYTES = 6_000_000


def trust(path, data):
    """Say of a notebook that its outputs may be shown, to the Jupyter that keeps `data`."""
    command = [Path(sys.executable).with_name("jupyter-trust"), path]
    environment = os.environ | {"JUPYTER_DATA_DIR": str(data)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def saved(lab_server):
    """An executed notebook in Lab's folder, as nbclient leaves it."""
    path = lab_server.root / lab_server.write("saved.ipynb", *CELLS)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, store_widget_state=True)
    # In a thread without the event loop of a browser.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(client.async_execute())).result()
    nbformat.write(notebook, path)
    return path


def test_the_last_state_is_seen_without_a_run(saved, own_lab):
    assert saved.stat().st_size < LIMIT_BYTES
    library = json.dumps(get_plotlyjs(), ensure_ascii=False)
    assert saved.read_text(encoding="utf-8").count(library) == 1
    trust(saved, own_lab.server.root.parent / "data")
    own_lab.open(saved.name)
    page = own_lab.page
    page.locator(".jp-WindowedPanel-outer").hover()
    explorers = page.locator(".goatviz-explorer")
    for at in range(2):
        explorers.nth(at).locator(".js-plotly-plot .main-svg").first.wait_for()
    length = explore_length(
        load_shipped_result("needle-sweep"), grid=load_shipped_result("needle-grid")
    )
    agree(explorers.nth(0), expected(length, **LAST))
    controls = explorers.nth(0).locator(".goatviz-controls")
    for name, text in (("scheme", "rope"), ("length", "256"), ("depth", "30 %")):
        chosen = controls.locator(f"[name={name}]").evaluate("e => e.selectedOptions[0].text")
        assert chosen == text
    # The map's pixels were saved, too.
    rule = explorers.nth(1).locator(".goatviz-map-rule")
    assert "Layer 2, head 1" in rule.inner_text()
    assert "Query 40" in explorers.nth(1).locator(".goatviz-summary").inner_text()
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector('.goatviz-map-canvas');
            const { data } = canvas.getContext('2d').getImageData(
                0, 0, canvas.width, canvas.height);
            return document.querySelector('.goatviz-map').dataset.painted
                && new Set(new Uint32Array(data.buffer)).size > 100;
        }"""
    )
    # Lab takes off the page what is far from the window.
    for title, words in OTHERS.items():
        other = explorers.filter(has=page.locator(f'.goatviz-controls[aria-label="{title}"]'))
        for _ in range(20):
            if other.count():
                break
            page.mouse.wheel(0, 400)
            page.wait_for_timeout(100)
        other.locator(".js-plotly-plot .main-svg").first.wait_for()
        assert words in other.locator(".goatviz-summary").text_content()
    # Nobody ran a cell: the kernel that Lab has started knows nothing.
    assert own_lab.ask("'explorer' in globals()") is False
