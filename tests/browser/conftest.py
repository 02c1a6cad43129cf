"""A real Chromium that cannot leave this machine, and tells of every attempt to.

Playwright drives the browser of the system; none is downloaded. A test that asks for a fixture
from here and finds no browser fails: ``make test BROWSER=no`` is the way to leave such tests out.
One browser and one page of JupyterLab serve a process's tests in this folder, one after another.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Route,
    WebError,
    sync_playwright,
)
from playwright.sync_api import WebSocketRoute as SocketRoute

from goatviz.explore.page import front_script
from tests.browser.lab import LOOPBACK, VIEWPORT, Lab, Server, jupyterlab

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
        self.context.on("weberror", self._note_exception)

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

    def _note_exception(self, error: WebError) -> None:
        self.console_errors.append(error.error.stack or str(error.error))

    def new_page(self) -> Page:
        """Open another page."""
        return self.context.new_page()

    def assert_quiet(self) -> None:
        """Assert that no page left this machine and that none reported an error."""
        assert self.outside_requests == [], "a page asked for something outside this machine"
        assert self.console_errors == [], "a page reported errors"

    def forget(self) -> None:
        """Begin new lists: what was noted belongs to the test before."""
        self.outside_requests.clear()
        self.console_errors.clear()


@dataclass
class SharedBrowser:
    """What the tests of this folder share; closed before a test from elsewhere runs.

    Playwright keeps an event loop running in this thread, in which nobody else can start one.
    """

    stack: ExitStack = field(default_factory=ExitStack)
    browser: Browser | None = None
    lab: tuple[Lab, OfflineContext] | None = None
    failures: int = 0

    def context(self) -> OfflineContext:
        """A new context, as empty as a new browser."""
        if self.browser is None:
            executable = find_browser()
            playwright = self.stack.enter_context(sync_playwright())
            self.browser = playwright.chromium.launch(
                executable_path=executable, headless=True, args=list(FLAGS)
            )
            self.stack.callback(self.browser.close)
        return OfflineContext(self.browser.new_context(service_workers="block", viewport=VIEWPORT))

    def notebook(self, server: Server, failures: int) -> tuple[Lab, OfflineContext]:
        """The open notebook; a new one, in a new kernel, if a test has failed since."""
        if failures > self.failures:
            self.close_lab()
        self.failures = failures
        if self.lab is None:
            context = self.context()
            lab = Lab(server, context.new_page())
            lab.open(server.write("tests.ipynb", ""))
            self.lab = lab, context
        return self.lab

    def close_lab(self) -> None:
        """Close the open notebook; its kernel ends when another is opened."""
        if self.lab is not None:
            self.lab[1].context.close()
        self.lab = None

    def close(self) -> None:
        """End the browser."""
        self.close_lab()
        self.browser = None
        self.stack.close()


_shared = SharedBrowser()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the browser where the next test is not from this folder."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _shared.close()


@pytest.fixture
def offline_context() -> Iterator[OfflineContext]:
    """A context of its own, as empty as a fresh browser; see `OfflineContext`."""
    context = _shared.context()
    yield context
    context.context.close()


@pytest.fixture
def offline_page(offline_context: OfflineContext) -> Page:
    """The one page of `offline_context`; ask for both to read what it requested."""
    return offline_context.new_page()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A JupyterLab of this test process, with settings and notebooks of its own."""
    find_browser()
    with jupyterlab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture
def own_server(lab_server: Server) -> Iterator[Server]:
    """The server for tests that end kernels: that of the process's open notebook is given up."""
    _shared.close_lab()
    yield lab_server
    lab_server.end_kernels()


@pytest.fixture
def own_lab(own_server: Server, offline_context: OfflineContext) -> Iterator[Lab]:
    """A page of one's own, in which notebooks open in kernels of their own."""
    yield Lab(own_server, offline_context.new_page())
    offline_context.assert_quiet()


@pytest.fixture
def lab(lab_server: Server, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The process's open notebook; what its page asks for or reports fails the test."""
    lab, context = _shared.notebook(lab_server, request.session.testsfailed)
    context.forget()
    yield lab
    context.assert_quiet()


@pytest.fixture
def front(offline_page: Page) -> Callable[[str], Any]:
    """How to evaluate an expression of what the front end exports, `it`, without a kernel."""
    offline_page.goto("about:blank")
    offline_page.evaluate(
        """async script => {
            const blob = new Blob([script], { type: 'text/javascript' });
            window.it = await import(URL.createObjectURL(blob));
        }""",
        front_script(),
    )
    return lambda expression: offline_page.evaluate(f"async () => {expression}")
