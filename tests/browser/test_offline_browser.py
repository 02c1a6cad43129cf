"""The browser fixture itself: it sees attempts to leave the machine, and figures draw in it."""

import shutil
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.browser.conftest import find_browser, is_local

OUTSIDE = "http://example.invalid/x.png"


def test_request_to_another_machine_is_aborted_and_recorded(
    tmp_path, offline_context, offline_page
):
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><title>t</title><img alt="x" src="{OUTSIDE}">')
    offline_page.goto(page.as_uri())
    assert offline_context.outside_requests == [OUTSIDE]
    with pytest.raises(AssertionError, match="outside this machine"):
        offline_context.assert_quiet()


def test_socket_to_another_machine_is_recorded(offline_context, offline_page):
    offline_page.goto("data:text/html,<title>t</title>")
    offline_page.evaluate(
        """() => new Promise(done => {
            const socket = new WebSocket('ws://example.invalid/feed');
            socket.onclose = () => done(null);
        })"""
    )
    assert offline_context.outside_requests == ["ws://example.invalid/feed"]


@pytest.mark.parametrize(
    "script", ["console.error('wrong')", "setTimeout(() => { throw new Error('wrong') })"]
)
def test_page_errors_are_recorded(tmp_path, offline_context, offline_page, script):
    page = tmp_path / "page.html"
    # Timers run in order, so when the title has changed the exception has been thrown.
    done = "setTimeout(() => { document.title = 'done' })"
    page.write_text(f"<!doctype html><title>t</title><script>{script}; {done}</script>")
    offline_page.goto(page.as_uri())
    offline_page.wait_for_function("() => document.title === 'done'")
    assert len(offline_context.console_errors) == 1
    assert "wrong" in offline_context.console_errors[0]
    with pytest.raises(AssertionError, match="errors"):
        offline_context.assert_quiet()


def test_loopback_is_let_through(offline_context, offline_page):
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>hello</title><link rel=icon href='data:,'>")

        def log_message(self, *args):
            pass

    # A thread a connection: the browser opens spare ones, and one server would wait on those. Not
    # HTTPServer, which asks the name service for this machine's name before it listens.
    with ThreadingTCPServer(("127.0.0.1", 0), Hello) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        offline_page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        assert offline_page.title() == "hello"
        server.shutdown()
    offline_context.assert_quiet()


def test_plotly_figure_draws_offline(tmp_path, offline_context, offline_page):
    z = np.arange(12.0).reshape(3, 4)
    path = tmp_path / "figure.html"
    go.Figure(go.Heatmap(z=z)).write_html(path)
    offline_page.goto(path.as_uri())
    offline_page.locator(".js-plotly-plot .main-svg").first.wait_for(state="visible")
    drawn = offline_page.evaluate(
        "() => document.querySelector('.js-plotly-plot')._fullData[0].z.map(row => [...row])"
    )
    np.testing.assert_array_equal(drawn, z)
    offline_context.assert_quiet()


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("file:///tmp/a.html", True),
        ("data:text/plain,a", True),
        ("blob:null/1", True),
        ("about:blank", True),
        ("http://127.0.0.1:8888/lab", True),
        ("ws://127.0.0.1:8888/api", True),
        ("http://127.0.0.1.example.org/", False),
        ("http://example.org/?127.0.0.1", False),
        ("https://127.0.0.1@example.org/", False),
        ("wss://example.org/", False),
    ],
)
def test_what_counts_as_local(url, local):
    assert is_local(url) is local


def test_missing_browser_fails_and_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium.*BROWSER=no"):
        find_browser()
