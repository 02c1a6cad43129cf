"""Images are drawn by a browser of this machine, without configuration and without a network."""

import struct
from xml.etree import ElementTree

import numpy as np
import pytest

from goatviz.figures import plot_plan
from goatviz.plots.figure import image_options
from tests.browser.conftest import find_browser


@pytest.mark.browser
def test_images_need_no_configuration(tmp_path, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    assert image_options()["path"] == find_browser()
    figure = plot_plan(np.eye(3), tokens=["<b>", "$x$", "␣日"])
    figure.write_image(tmp_path / "plan.png", width=900, theme="dark")
    data = (tmp_path / "plan.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20]) == (900,)
    figure.write_image(tmp_path / "plan.svg")
    texts = [one.text for one in ElementTree.parse(tmp_path / "plan.svg").iter() if one.text]
    # MathJax would draw the second.
    assert {"<b>", "$x$", "␣日"} <= set(texts)
    figure.write_image(tmp_path / "plan.pdf")
    assert (tmp_path / "plan.pdf").read_bytes()[:5] == b"%PDF-"
