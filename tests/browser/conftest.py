"""A real Chromium that cannot leave this machine, and tells of every attempt to.

Playwright drives the browser of the system; none is downloaded. A test that asks for a fixture
from here and finds no browser fails: ``make test BROWSER=no`` is the way to leave such tests out.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

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


@pytest.fixture
def offline_context(tmp_path: Path) -> Iterator[OfflineContext]:
    """A fresh browser with an empty profile; see `OfflineContext`."""
    executable = find_browser()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "browser-profile",
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
def offline_page(offline_context: OfflineContext) -> Page:
    """The one page of `offline_context`; ask for both to read what it requested."""
    pages = offline_context.context.pages
    return pages[0] if pages else offline_context.new_page()


@pytest.fixture
def offline_rules() -> ModuleType:
    """This module, for the tests of its own functions."""
    return sys.modules[__name__]
