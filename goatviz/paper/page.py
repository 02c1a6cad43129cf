"""The gallery as one HTML document that needs no network: verdicts first, then the exhibits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import plotly.io as pio
from plotly.offline import get_plotlyjs

from goatviz.pages import page_text
from goatviz.paper.exhibit import PAPER_SCALES, Exhibit
from goatviz.paper.judging import Judged, counts_text
from goatviz.plots.figure import CONFIG

PAPER = "Litman and Guo, You Need Better Attention Priors, ICML 2026 (arXiv 2601.15380)"
#: Part of every page by which it is recognised.
MARK = '<meta name="generator" content="goatviz reproduce">'


def gallery_page(exhibits: Sequence[Exhibit], judged: Sequence[Judged]) -> str:
    """The whole page as one HTML document with plotly.js inside.

    Parameters
    ----------
    exhibits : sequence of Exhibit
        Figures, in order.
    judged : sequence of Judged
        Claims with their verdicts; a claim links to its exhibit if that is among them.
    """
    folder = files("goatviz") / "paper"
    groups = [
        ("What the paper claims", [one for one in judged if not one.claim.beside]),
        ("Beside it: what it does not say, and what others found",
         [one for one in judged if one.claim.beside]),
    ]  # fmt: skip
    return page_text(
        "paper/gallery.html.j2",
        css=(folder / "gallery.css").read_text(encoding="utf-8"),
        script=(folder / "gallery.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        paper=PAPER,
        mark=MARK,
        scales=PAPER_SCALES,
        groups=[(title, counts_text(some), some) for title, some in groups if some],
        titles={exhibit.slug: exhibit.title for exhibit in exhibits},
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
