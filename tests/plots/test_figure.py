"""The Figure stays on this machine, and save_html writes whole files."""

import re

import plotly.graph_objects as go
import plotly.io as pio
import pytest

import goatviz.files
from goatviz.figures import plot_prior
from goatviz.plots import CONFIG, save_html
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
