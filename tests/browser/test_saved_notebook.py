"""A saved, trusted notebook shows the last state of its explorers before anything has run."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from plotly.offline import get_plotlyjs

from goatviz.explore import explore_length
from goatviz.plots.base import as_figure
from goatviz.results import load_shipped_result

pytestmark = pytest.mark.browser

CELLS = (
    "import torch\n"
    "from goatviz import explore_length, explore_plan, load_pretrained, load_shipped_result\n"
    'sweep, grid = load_shipped_result("needle-sweep"), load_shipped_result("needle-grid")\n'
    "ids = torch.randint(97, 123, (1, 64), generator=torch.Generator().manual_seed(0))",
    "explorer = explore_length(sweep, grid=grid)\nexplorer",
    'plan = explore_plan(load_pretrained("passkey-goat"), ids)\nplan',
    'explorer.set(scheme="rope", length=256, depth=0.3, measure="token")',
    "plan.set(layer=2, head=1, query=40)",
)
LAST = {"scheme": "rope", "length": 256, "depth": 0.3, "measure": "token"}
#: Of a notebook, beside one plotly.js.
LIMIT_BYTES = 1_000_000
DRAWN = """() => {
    const listed = (values) => [...values].flatMap(
        value => value?.length === undefined ? [Number.isNaN(value) ? null : value] : listed(value)
    );
    const explorer = document.querySelector('.goatviz-explorer');
    return [...explorer.querySelectorAll('.goatviz-figure .js-plotly-plot')].map(graph =>
        (graph._fullData ?? []).map(trace =>
            trace.type === 'heatmap' ? listed(trace.z) : [...listed(trace.x), ...listed(trace.y)]
        )
    );
}"""


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


def listed(values):
    return [None if value != value else float(value) for value in np.ravel(values)]


def test_the_last_state_is_seen_without_a_run(saved, own_lab):
    library = len(json.dumps(get_plotlyjs()))
    assert saved.stat().st_size < library + LIMIT_BYTES
    trust(saved, own_lab.server.root.parent / "data")
    own_lab.open(saved.name)
    page = own_lab.page
    explorers = page.locator(".goatviz-explorer")
    for at in range(2):
        explorers.nth(at).locator(".js-plotly-plot .main-svg").first.wait_for()
    picture = explore_length(
        load_shipped_result("needle-sweep"), grid=load_shipped_result("needle-grid")
    ).picture(LAST)
    wanted = [
        [listed(t.z) if t.type == "heatmap" else listed(t.x) + listed(t.y) for t in figure.data]
        for figure in map(as_figure, picture.figures.values())
    ]
    for _ in range(200):
        if page.evaluate(DRAWN) == wanted:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(DRAWN) == wanted
    assert explorers.nth(0).locator(".goatviz-summary").inner_text() == picture.summary
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
    # Nobody ran a cell: the kernel that Lab has started knows nothing.
    assert own_lab.ask("'explorer' in globals()") is False
