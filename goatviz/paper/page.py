"""The gallery as one HTML document that needs no network."""

from __future__ import annotations

from pathlib import Path

import plotly.io as pio
from plotly.offline import get_plotlyjs

from goatviz.pages import page_text
from goatviz.paper.exhibit import Exhibit
from goatviz.plots.figure import CONFIG

PAPER = "Litman and Guo, You Need Better Attention Priors, ICML 2026 (arXiv 2601.15380)"


def gallery_page(exhibits: list[Exhibit]) -> str:
    """The whole page as one HTML document with plotly.js inside."""
    return page_text(
        "paper/gallery.html.j2",
        css=Path(__file__).with_name("gallery.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        paper=PAPER,
        sections=[(exhibit, _plot(exhibit)) for exhibit in exhibits],
    )


def _plot(exhibit: Exhibit) -> str:
    return pio.to_html(
        exhibit.figure,
        config=CONFIG,
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=f"figure-{exhibit.slug}",
    )
