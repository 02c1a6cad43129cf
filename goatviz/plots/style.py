"""One look: colours, scales, fonts and the template of every figure.

Colours are told apart by colour-blind readers (Okabe and Ito's set for lines, viridis for
probabilities, an orange-purple scale centred at 0 for log-priors); text and grid are mid-tones on a
transparent ground, readable on light and dark pages alike.
"""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale, sample_colorscale

INK = "#74797f"
GRID = "rgba(128,128,128,0.22)"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#7570b3")
MASKED = "rgba(128,128,128,0.25)"
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

TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "Inter, Helvetica, Arial, sans-serif", "size": 12, "color": INK},
        "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        "colorway": list(LINES),
        "xaxis": {
            "gridcolor": GRID,
            "zeroline": False,
            "linecolor": GRID,
            "ticks": "outside",
            "tickcolor": GRID,
            "automargin": True,
            "exponentformat": "power",
        },
        "yaxis": {
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
    }
)


def colour_table() -> list[tuple[int, int, int]]:
    """The sequential scale as 256 colours by 8-bit code: 1 is its low end, 255 its high end.

    Code 0 stands for what has no value, and is never drawn.
    """
    shares = np.linspace(0.0, 1.0, 255)
    sampled = sample_colorscale(get_colorscale(SEQUENTIAL), shares.tolist(), colortype="tuple")
    colours = [tuple(round(255 * part) for part in colour) for colour in sampled]
    return [(0, 0, 0), *colours]


def escape(text: object) -> str:
    """Text as plotly shows it: its labels are pseudo-HTML, and a token may be `<b>`."""
    return html.escape(str(text), quote=False)


def symmetric_limit(values: np.ndarray) -> float:
    """The largest finite magnitude, for a scale centred at 0; 1 where there is none."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    return largest if largest > 0 else 1.0
