"""One look: colours, scales, fonts and the template of every figure.

Colour-blind readers can tell the colours apart: lines after Okabe and Ito, with a contrast of at
least 3:1 on white and on JupyterLab's dark ground; viridis for probabilities; orange and purple
around 0 for log-priors. The ground is transparent and text is dark; `ADAPTIVE_CSS` turns it light
on dark pages, since no single colour has a contrast of 4.5:1 on both.
"""

from __future__ import annotations

import html
from functools import cache

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale, sample_colorscale

#: Colours of text on light and on dark pages, and of the ground of exported images.
TEXT = {"light": "#30363d", "dark": "#dfe2e6"}
GROUND = {"light": "#ffffff", "dark": "#111111"}
#: Colour of neutral lines: chance, thresholds, uniform attention.
INK = "#777c82"
GRID = "rgba(128,128,128,0.22)"
LINES = ("#0a7abf", "#d55e00", "#00966d", "#c0619a", "#ad7b00", "#1f97b3", "#9a6b53", "#7d75c4")
MASKED = "rgba(128,128,128,0.25)"
MENU = "rgba(128,128,128,0.12)"
NOT_A_NUMBER = "#d81b9a"
MINUS_INFINITY = "#1a1a1a"
PLUS_INFINITY = "#e8000b"

SEQUENTIAL = "Viridis"
#: Purple below, near-white at 0, orange above: centred, and safe for colour-blind readers.
DIVERGING = [
    [0.0, "#40206b"],
    [0.17, "#6a51a3"],
    [0.34, "#a9a0cf"],
    [0.5, "#f4f2f0"],
    [0.66, "#f0b169"],
    [0.83, "#cf6a0a"],
    [1.0, "#7a3203"],
]

#: No font is called "goatviz": the name lets a style sheet find the text of our figures.
FONT = "goatviz, Inter, Helvetica, Arial, sans-serif"

#: Style sheet that turns the text of our figures light on pages that declare a dark theme:
#: JupyterLab, VS Code, and saved pages, whose root has the class "goatviz-page".
ADAPTIVE_CSS = f"""
.js-plotly-plot :is(.infolayer, .menulayer, [class*="tick"]) text[style*="goatviz"] {{
  fill: var(--goatviz-text, {TEXT["light"]}) !important; }}
body:is([data-jp-theme-light="false"], .vscode-dark) {{ --goatviz-text: {TEXT["dark"]}; }}
@media (prefers-color-scheme: dark) {{ :root.goatviz-page {{ --goatviz-text: {TEXT["dark"]}; }} }}
"""

#: Template of every figure, as plain data; `template` is the object that plotly expects.
TEMPLATE = {
    "layout": {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": TEXT["light"]},
        "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        "colorway": list(LINES),
        "barmode": "relative",
        "xaxis": {
            "title": {"standoff": 5, "font": {"size": 12}},
            "gridcolor": GRID,
            "zeroline": False,
            "linecolor": GRID,
            "ticks": "outside",
            "tickcolor": GRID,
            "automargin": True,
            "exponentformat": "power",
        },
        "yaxis": {
            "title": {"standoff": 5, "font": {"size": 12}},
            "gridcolor": GRID,
            "zeroline": False,
            "linecolor": GRID,
            "ticks": "outside",
            "tickcolor": GRID,
            "automargin": True,
            "exponentformat": "power",
        },
        "hoverlabel": {"font": {"family": "Menlo, Consolas, monospace", "size": 12}},
        "legend": {"bgcolor": "rgba(0,0,0,0)"},
        "margin": {"l": 60, "r": 30, "t": 80, "b": 60},
    },
}


@cache
def template() -> go.layout.Template:
    """The template of every figure, made once: plotly takes long to read its own schema for it."""
    return go.layout.Template(TEMPLATE)


def colour_table() -> list[tuple[int, int, int]]:
    """The sequential scale as 256 colours by 8-bit code: 1 is its low end, 255 its high end.

    Code 0 stands for a missing value and is never drawn.
    """
    colours = sequential(np.linspace(0.0, 1.0, 255))
    return [(0, 0, 0), *(tuple(round(255 * part) for part in colour) for colour in colours)]


def diverging_table() -> list[tuple[int, int, int]]:
    """The diverging scale in the same way: 1 is its low end, 128 its middle, 255 its high end."""
    colours = sample_colorscale(DIVERGING, np.linspace(0.0, 1.0, 255).tolist(), colortype="tuple")
    return [(0, 0, 0), *(tuple(round(255 * part) for part in colour) for colour in colours)]


def sequential(shares: np.ndarray) -> list[tuple[float, float, float]]:
    """Colours of the sequential scale at places from 0 to 1; red, green and blue from 0 to 1."""
    return sample_colorscale(get_colorscale(SEQUENTIAL), shares.tolist(), colortype="tuple")


def ink_on(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever has a contrast of at least 4.5:1 with a colour (WCAG 2.2)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#000000" if luminance > 0.179 else "#ffffff"


def escape(text: object) -> str:
    """Text escaped for plotly, whose labels are pseudo-HTML; a token may be `<b>`."""
    return html.escape(str(text), quote=False)


def symmetric_limit(values: np.ndarray) -> float:
    """The largest finite magnitude, for a scale centred at 0; 1 if there is none."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    return largest if largest > 0 else 1.0
