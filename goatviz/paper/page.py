"""The gallery as one HTML document that asks the network for nothing."""

from __future__ import annotations

import html
from typing import Any

import plotly.io as pio
from plotly.offline import get_plotlyjs

from goatviz.paper.exhibit import Exhibit
from goatviz.plots.figure import CONFIG

PAPER = "Litman and Guo, You Need Better Attention Priors, ICML 2026 (arXiv 2601.15380)"


def gallery_page(exhibits: list[Exhibit]) -> str:
    """The whole page as one HTML document with plotly.js inside."""
    sections = []
    for number, exhibit in enumerate(exhibits, start=1):
        plot = pio.to_html(
            exhibit.figure,
            config=CONFIG,
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=f"figure-{exhibit.slug}",
        )
        sections.append(
            _SECTION.format(
                slug=exhibit.slug,
                number=number,
                title=html.escape(exhibit.title),
                plot=plot,
                caption=html.escape(exhibit.caption),
                summary=_items(exhibit.summary),
                provenance=_items(exhibit.provenance),
                claim=html.escape(exhibit.claim),
            )
        )
    contents = "".join(f'<li><a href="#{e.slug}">{html.escape(e.title)}</a></li>' for e in exhibits)
    values: dict[str, Any] = {
        "plotly": get_plotlyjs(),
        "contents": contents,
        "sections": "".join(sections),
        "paper": html.escape(PAPER),
    }
    page = _PAGE
    for name, value in values.items():
        page = page.replace(f"@@{name}@@", value)
    return page


def _items(lines: list[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


_SECTION = """
<section id="{slug}">
<h2>{number}. {title}</h2>
<p>{caption}</p>
<div class="plot" role="group" aria-labelledby="summary-{slug}">{plot}</div>
<ul class="summary" id="summary-{slug}" aria-label="The figure in words">{summary}</ul>
<div class="beside">
<div><h3>Ours: scale and provenance</h3><ul>{provenance}</ul></div>
<div><h3>The paper</h3><p>{claim}</p></div>
</div>
</section>
"""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>goatviz: attention priors, reproduced</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #23272e; --soft: #5b616a; --ground: #ffffff;
  --card: #f6f7f9; --line: #dfe2e7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a5abb4;
  --ground: #14171b; --card: #1c2026; --line: #31363e; --link: #7db8f5; } }
body { margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 68rem; color: var(--ink);
  background: var(--ground); font: 16px/1.55 Inter, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
a { color: var(--link); } p, ul, ol { margin: .4rem 0; } ul, ol { padding-left: 1.2rem; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.plot { margin: .75rem -0.25rem; overflow-x: auto; } .plot > div { min-width: 46rem; }
.plot :is([class*="tick"], .infolayer, .menulayer) text { fill: var(--ink) !important; }
.summary { color: var(--soft); font-size: .9rem; }
.beside { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: 1rem; }
.beside > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; font-size: .88rem; overflow-wrap: anywhere; }
@media (max-width: 44rem) { .beside { grid-template-columns: 1fr; } }
</style>
<script>@@plotly@@</script>
</head>
<body>
<header>
<h1>goatviz: attention priors, reproduced</h1>
<p>Figures of @@paper@@, redrawn from small models trained for goatviz. Each states its own scale
beside what the paper shows.</p>
<nav aria-label="Figures"><ol>@@contents@@</ol></nav>
</header>
<main>@@sections@@</main>
</body>
</html>
"""
