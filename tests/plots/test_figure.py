"""The Figure stays on this machine, and save_html writes whole files."""

import importlib.util
import io
import re
import shutil

import kaleido
import plotly.graph_objects as go
import plotly.io as pio
import pytest

import goatviz.files
from goatviz.figures import plot_prior
from goatviz.plots import CONFIG, save_html
from goatviz.plots.style import GROUND
from goatviz.priors import ALiBiPrior


@pytest.fixture
def figure():
    return plot_prior(ALiBiPrior(2), length=16)


def scripts_from_elsewhere(text):
    return re.findall(r"<(?:script|link)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]+", text)


def test_the_cloud_button_is_off_everywhere(figure, tmp_path, monkeypatch):
    assert CONFIG["showSendToCloud"] is False
    bundle = figure._repr_mimebundle_()
    for content in bundle.values():
        assert content["config"]["showSendToCloud"] is False
    shown = []
    monkeypatch.setattr(pio, "show", lambda *args, **kwargs: shown.append(kwargs))
    figure.show()
    assert shown[0]["config"]["showSendToCloud"] is False
    figure.write_html(tmp_path / "a.html", include_plotlyjs=False)
    texts = [
        figure.to_html(include_plotlyjs=False),
        (tmp_path / "a.html").read_text(encoding="utf-8"),
        save_html(figure, tmp_path / "b.html").read_text(encoding="utf-8"),
        figure._repr_html_(),
    ]
    for text in texts:
        assert '"showSendToCloud": false' in text
        assert not scripts_from_elsewhere(text)


def test_save_html_is_one_file(figure, tmp_path):
    path = save_html(figure, tmp_path / "prior.html")
    assert list(tmp_path.iterdir()) == [path]
    assert 4_000_000 < path.stat().st_size < 7_000_000
    save_html(go.Figure(), tmp_path / "plain.html")


def test_save_html_refuses(figure, tmp_path):
    with pytest.raises(TypeError, match="figure must be a plotly Figure, got str"):
        save_html("figure", tmp_path / "a.html")
    with pytest.raises(ValueError, match=r"end in \.html"):
        save_html(figure, tmp_path / "a.png")
    with pytest.raises(ValueError, match="existing folder"):
        save_html(figure, tmp_path / "none" / "a.html")


def test_a_failed_write_leaves_the_old_file(figure, tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(goatviz.files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_html(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- images ---


@pytest.fixture
def rendered(monkeypatch):
    """What kaleido is asked for, in place of an image."""
    asked = []

    def calc(figure, opts, kopts):
        asked.append((figure, opts, kopts))
        return b"image"

    monkeypatch.setattr(kaleido, "calc_fig_sync", calc)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", {"google-chrome": "/opt/chrome", "mine": "/mine"}.get)
    return asked


def test_an_image_is_written_whole(figure, tmp_path, rendered):
    figure.write_image(tmp_path / "a.svg", width=900, theme="dark")
    assert (tmp_path / "a.svg").read_bytes() == b"image" and len(list(tmp_path.iterdir())) == 1
    plain, options, browser = rendered.pop()
    assert (options["format"], options["width"], options["scale"]) == ("svg", 900, 1)
    assert options["height"] == plain["layout"]["height"] <= figure.layout.height
    assert plain["layout"]["paper_bgcolor"] == GROUND["dark"]
    # Without MathJax nothing is fetched, and "$x$" stays text.
    assert browser == {"mathjax": False, "path": "/opt/chrome"}
    stream = io.BytesIO()
    figure.write_image(stream, "pdf")
    assert stream.getvalue() == b"image" and rendered.pop()[1]["format"] == "pdf"


def test_a_failed_image_leaves_the_old_file(figure, tmp_path, rendered, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fails(*_, **__):
        raise TimeoutError("the browser is stuck")

    monkeypatch.setattr(kaleido, "calc_fig_sync", fails)
    with pytest.raises(TimeoutError, match="stuck"):
        figure.write_image(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_images_are_refused_by_name(figure, tmp_path, rendered):
    endings = r"file must end in \.png, \.jpg, \.jpeg, \.webp, \.svg or \.pdf, got 'a.gif'"
    with pytest.raises(ValueError, match=endings):
        figure.write_image(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="file must lie in an existing folder"):
        figure.write_image(tmp_path / "none" / "a.png")
    with pytest.raises(ValueError, match="format must be one of png, .*; got 'gif'"):
        figure.to_image("gif")
    with pytest.raises(ValueError, match="theme must be one of light, dark; got 'red'"):
        figure.write_image(tmp_path / "a.png", theme="red")
    assert not rendered and not list(tmp_path.iterdir())


def test_the_browser_is_found_or_asked_for(figure, rendered, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "mine")
    figure.to_image()
    assert rendered.pop()[2]["path"] == "mine"
    monkeypatch.setenv("BROWSER_PATH", "nowhere")
    with pytest.raises(RuntimeError, match="BROWSER_PATH must name a browser that can be run, got"):
        figure.to_image()
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    figure.to_image()
    # Kaleido itself looks in other places.
    assert rendered.pop()[2] == {"mathjax": False}

    def none(*_, **__):
        raise RuntimeError("no browser")

    monkeypatch.setattr(kaleido, "calc_fig_sync", none)
    with pytest.raises(RuntimeError, match="none of chromium, .*apt-get install chromium"):
        figure.to_image()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="an image needs kaleido: pip install"):
        figure.to_image()
