"""A real Chromium that cannot leave this machine, and tells of every attempt to.

Playwright drives the browser of the system; none is downloaded. A test that asks for a fixture
from here and finds no browser fails: ``make test BROWSER=no`` is the way to leave such tests out.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Route, sync_playwright
from playwright.sync_api import WebSocketRoute as SocketRoute

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LOCAL_SCHEMES = {"file", "data", "blob", "about"}
LOOPBACK = "127.0.0.1"
TIMEOUT_MS = 60_000


def is_local(url: str) -> bool:
    """Tell whether ``url`` stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in LOCAL_SCHEMES or parts.hostname == LOOPBACK


def find_browser() -> str:
    """Return the path of a Chromium, or fail the test with the command that installs one."""
    for name in EXECUTABLES:
        if path := shutil.which(name):
            return path
    pytest.fail(
        f"This test needs a browser and none of {', '.join(EXECUTABLES)} is on PATH. Install one "
        "(Debian, Ubuntu: apt-get install chromium), or leave the browser tests out with "
        "`make test BROWSER=no` (pytest -m 'not browser').",
        pytrace=False,
    )


@dataclass
class OfflineContext:
    """A browser context whose requests to other machines are aborted and written down.

    Attributes
    ----------
    context : playwright.sync_api.BrowserContext
        The context itself, for what the methods here do not cover.
    outside_requests : list of str
        Every address asked for that is not file:, data:, blob:, about: or on 127.0.0.1.
    console_errors : list of str
        Every console message of level error and every uncaught exception of a page.
    """

    context: BrowserContext
    outside_requests: list[str] = field(default_factory=list)
    console_errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context.set_default_timeout(TIMEOUT_MS)
        self.context.route("**/*", self._gate)
        self.context.route_web_socket(re.compile("^wss?://"), self._gate_socket)
        self.context.on("console", self._note_console)
        self.context.on("weberror", lambda error: self.console_errors.append(str(error.error)))

    def _gate(self, route: Route) -> None:
        if is_local(route.request.url):
            route.continue_()
        else:
            self.outside_requests.append(route.request.url)
            route.abort()

    def _gate_socket(self, socket: SocketRoute) -> None:
        if is_local(socket.url):
            socket.connect_to_server()
        else:
            self.outside_requests.append(socket.url)
            socket.close()

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console_errors.append(message.text)

    def new_page(self) -> Page:
        """Open another page."""
        return self.context.new_page()

    def assert_quiet(self) -> None:
        """Assert that no page left this machine and that none reported an error."""
        assert self.outside_requests == [], "a page asked for something outside this machine"
        assert self.console_errors == [], "a page reported errors"


@contextmanager
def offline_browser(profile: Path) -> Iterator[OfflineContext]:
    """A browser that cannot leave this machine, with an empty profile in that folder."""
    executable = find_browser()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=list(FLAGS),
            service_workers="block",
            viewport={"width": 1280, "height": 1000},
        )
        try:
            yield OfflineContext(context)
        finally:
            context.close()


@pytest.fixture
def offline_context(tmp_path: Path) -> Iterator[OfflineContext]:
    """A fresh browser with an empty profile; see `OfflineContext`."""
    with offline_browser(tmp_path / "browser-profile") as context:
        yield context


@pytest.fixture
def offline_page(offline_context: OfflineContext) -> Page:
    """The one page of `offline_context`; ask for both to read what it requested."""
    pages = offline_context.context.pages
    return pages[0] if pages else offline_context.new_page()


@pytest.fixture
def offline_rules() -> ModuleType:
    """This module, for the tests of its own functions."""
    return sys.modules[__name__]


@dataclass
class Lab:
    """A JupyterLab on this machine, and notebooks in it.

    Attributes
    ----------
    url : str
        Where it listens.
    root : pathlib.Path
        The folder that it shows.
    """

    url: str
    root: Path

    def write(self, name: str, *cells: str) -> str:
        """Write a notebook of code cells; return its name."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, self.root / name)
        return name

    def run(self, page: Page, name: str, *, timeout_ms: int = 120_000) -> None:
        """Open a notebook, run all of it, and fail with the traceback if a cell raised."""
        self.end_kernels()
        page.goto(f"{self.url}/lab/tree/{name}?reset")
        page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget")
        page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").wait_for()
        page.wait_for_function(
            """() => {
                const panel = window.jupyterapp.shell.currentWidget;
                const session = panel.context && panel.context.sessionContext.session;
                const kernel = session && session.kernel;
                return kernel && kernel.status === "idle"
                    && kernel.connectionStatus === "connected";
            }"""
        )
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function(
            """() => {
                const panel = window.jupyterapp.shell.currentWidget;
                const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code');
                const all = cells.every(cell => cell.executionCount !== null);
                const failed = cells.some(cell => [...Array(cell.outputs.length).keys()].some(
                    at => cell.outputs.get(at).type === 'error'));
                const idle = panel.context.sessionContext.session.kernel.status === 'idle';
                return failed || (cells.length && all && idle);
            }""",
            timeout=timeout_ms,
        )
        errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        assert errors.count() == 0, errors.first.inner_text()

    def end_kernels(self) -> None:
        """End the kernels of the notebooks before: each holds half a gigabyte."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        address = f"{self.url}/api/sessions"
        for session in json.loads(opener.open(address, timeout=30).read()):
            request = urllib.request.Request(f"{address}/{session['id']}", method="DELETE")
            opener.open(request, timeout=30).close()

    def ask(self, page: Page, expression: str) -> Any:
        """Evaluate an expression in the notebook's kernel; return it through JSON."""
        code = f"import json as _json; print(_json.dumps({expression}))"
        said = page.evaluate(
            """async code => {
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
            }""",
            code,
        )
        return json.loads(said)


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab of this test process, with settings and notebooks of its own."""
    find_browser()
    with jupyterlab(tmp_path_factory.mktemp("lab")) as started:
        yield started


@contextmanager
def jupyterlab(home: Path) -> Iterator[Lab]:
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
    log = (home / "log").open("wb")
    # Without a token: it listens on the loopback address only, and for this test alone.
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
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
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            f"--ServerApp.root_dir={root}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {name: str(folder) for name, folder in folders.items()},
    )
    url = f"http://{LOOPBACK}:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(600):
            assert server.poll() is None, (home / "log").read_text()
            try:
                opener.open(f"{url}/api/status", timeout=2).read()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"JupyterLab did not start: {(home / 'log').read_text()}")
        yield Lab(url, root)
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
