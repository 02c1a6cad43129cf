"""The one JupyterLab of a test process: its server, a page that stays open, and a warm kernel.

A test hands its cells to `Lab.run`, which runs them in a kernel without names or widgets of the
test before. `jupyterlab` is the server alone, for what needs a kernel and a page of its own.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Page

LOOPBACK = "127.0.0.1"
VIEWPORT = {"width": 1280, "height": 1000}

READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.context?.sessionContext.session?.kernel;
    return kernel && kernel.status === 'idle' && kernel.connectionStatus === 'connected';
}"""
#: Put other cells into the notebook that is open.
REPLACE = """sources => {
    const { sharedModel } = window.jupyterapp.shell.currentWidget.content.model;
    sharedModel.transact(() => {
        sharedModel.deleteCellRange(0, sharedModel.cells.length);
        sharedModel.insertCells(0, sources.map(source => (
            { cell_type: 'code', source, metadata: {}, outputs: [] })));
    });
}"""
DONE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code');
    const all = cells.every(cell => cell.executionCount !== null);
    const failed = cells.some(cell => [...Array(cell.outputs.length).keys()].some(
        at => cell.outputs.get(at).type === 'error'));
    const idle = panel.context.sessionContext.session.kernel.status === 'idle';
    return failed || (cells.length && all && idle);
}"""
EXECUTE = """async code => {
    const panel = window.jupyterapp.shell.currentWidget;
    const kernel = panel.context.sessionContext.session.kernel;
    const future = kernel.requestExecute({ code, store_history: false });
    let text = '';
    future.onIOPub = message => {
        if (message.header.msg_type === 'stream') text += message.content.text;
        if (message.header.msg_type === 'error') text += message.content.traceback;
    };
    await future.done;
    return text;
}"""
#: Whether a theme is there: its colours arrive with its style sheet, after its name; and Lab cannot
#: take its splash screen away twice.
THEMED = """light => {
    const probe = document.createElement('canvas').getContext('2d');
    probe.fillStyle = getComputedStyle(document.body)
        .getPropertyValue('--jp-layout-color0').trim();
    probe.fillRect(0, 0, 1, 1);
    const bright = probe.getImageData(0, 0, 1, 1).data[0] > 128;
    return document.body.dataset.jpThemeLight === String(light) && bright === light
        && !document.getElementById('jupyterlab-splash');
}"""
KERNEL_AT_REST = """
import gc, ipywidgets
ipywidgets.Widget.close_all()
get_ipython().reset(new_session=True)
__import__("gc").collect()
"""


@dataclass
class Server:
    """A JupyterLab on this machine: where it listens, and the folder that it shows."""

    url: str
    root: Path

    def write(self, name: str, *cells: str) -> str:
        """Write a notebook of code cells; return its name."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, self.root / name)
        return name

    def end_kernels(self) -> None:
        """End every kernel: each holds half a gigabyte."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        address = f"{self.url}/api/sessions"
        for session in json.loads(opener.open(address, timeout=30).read()):
            request = urllib.request.Request(f"{address}/{session['id']}", method="DELETE")
            opener.open(request, timeout=30).close()


@dataclass
class Lab:
    """A notebook that is open in a page.

    Attributes
    ----------
    server : Server
        The JupyterLab that shows it.
    page : playwright.sync_api.Page
        The page.
    """

    server: Server
    page: Page

    def open(self, name: str, *, place: str = "lab/tree") -> None:
        """Open a notebook in a kernel of its own, the only one from now on.

        The place "notebooks" is Notebook 7, whose pages JupyterLab's server has, too.
        """
        self.server.end_kernels()
        self.page.goto(f"{self.server.url}/{place}/{name}?reset")
        self.page.wait_for_function(
            "() => window.jupyterapp && window.jupyterapp.shell.currentWidget"
        )
        self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").wait_for()
        self.page.wait_for_function(READY)

    def run(self, *cells: str) -> Page:
        """Replace the notebook's cells, run them, and return the page."""
        self.page.evaluate(REPLACE, [""])
        self.page.mouse.move(0, 0)
        self.page.set_viewport_size(VIEWPORT)
        self.page.evaluate("() => window.jupyterapp.shell.expandLeft()")
        self.show_in("Light")
        assert self.execute(KERNEL_AT_REST) == ""
        self.page.evaluate(REPLACE, list(cells))
        self.run_all()
        return self.page

    def run_all(self, *, timeout_ms: int = 120_000) -> None:
        """Run all of the notebook, and fail with the traceback if a cell raised."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(DONE, timeout=timeout_ms)
        errors = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        assert errors.count() == 0, errors.first.inner_text()

    def show_in(self, theme: str) -> None:
        """Change to the "Light" or the "Dark" theme, and wait until it is there."""
        light = theme == "Light"
        if not self.page.evaluate(THEMED, light):
            self.page.evaluate(
                "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })",
                f"JupyterLab {theme}",
            )
            self.page.wait_for_function(THEMED, arg=light)

    def execute(self, code: str) -> str:
        """Run code in the notebook's kernel; return what it printed."""
        return self.page.evaluate(EXECUTE, code)

    def ask(self, expression: str) -> Any:
        """Evaluate an expression in the notebook's kernel; return it through JSON."""
        return json.loads(self.execute(f"import json as _json; print(_json.dumps({expression}))"))


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: list[str], address: str, log: Path, folders: dict[str, Path]) -> Iterator:
    """Run a server that answers at that address, and end it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                try:
                    opener.open(address, timeout=2).read(1)
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                pytest.fail(f"{command[0]} did not start: {log.read_text()}")
            yield
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextmanager
def jupyterlab(home: Path) -> Iterator[Server]:
    """A JupyterLab that keeps everything it writes in that folder."""
    folders = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    root = home / "notebooks"
    # The pop-up that asks for news would stand over the page, and no option of Lab's stops it.
    silence = folders["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab" / "apputils-extension"
    for folder in (*folders.values(), root, silence):
        folder.mkdir(parents=True, exist_ok=True)
    (silence / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    port = free_port()
    url = f"http://{LOOPBACK}:{port}"
    # Without a token: it listens on the loopback address only, and for this test alone.
    command = [
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ip={LOOPBACK}",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--ServerApp.disable_check_xsrf=True",
        "--expose-app-in-browser",
        "--JupyterNotebookApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--ServerApp.root_dir={root}",
    ]
    with serving(command, f"{url}/api/status", home / "log", folders):
        yield Server(url, root)
