"""Named marks: the small pieces that figures are composed of.

A mark turns arrays into traces of one look; it knows nothing of layers, heads or results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from goatviz.plots import style

#: Probabilities below this share one colour on a logarithmic scale.
FLOOR = 1e-4
#: Cells that have no colour of their own, and what they get instead.
SPECIAL = {
    "not allowed": style.MASKED,
    "NaN": style.NOT_A_NUMBER,
    "−∞": style.MINUS_INFINITY,
    "+∞": style.PLUS_INFINITY,
}
_STEPS = np.linspace(0.0, 1.0, 49)
_LOG_COLORS = [
    [0.0, sample_colorscale(style.SEQUENTIAL, 0.0)[0]],
    *(
        [float(FLOOR ** (1.0 - step)), sample_colorscale(style.SEQUENTIAL, float(step))[0]]
        for step in _STEPS
    ),
]


def curve(
    x: np.ndarray,
    y: np.ndarray,
    *,
    name: str,
    color: str,
    hover: str,
    dash: str = "solid",
    width: float = 2.0,
    **trace: Any,
) -> go.Scatter:
    """A line through all points; `hover` is what a reader sees at each."""
    return go.Scatter(
        x=compact(x),
        y=np.asarray(y, dtype=np.float32),
        name=name,
        mode="lines" if len(x) > 1 else "markers",
        line={"color": color, "width": width, "dash": dash},
        hovertemplate=hover + "<extra></extra>",
        **trace,
    )


def band(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, *, name: str, color: str, **trace: Any
) -> go.Scatter:
    """The range between two curves, filled."""
    x = compact(x)
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]).astype(np.float32),
        name=name,
        fill="toself",
        fillcolor=translucent(color, 0.25),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        **trace,
    )


def stems(
    x: np.ndarray, y: np.ndarray, *, name: str, color: str, hover: str, **trace: Any
) -> go.Scatter:
    """Points on stalks from 0, for a spectrum."""
    y = np.asarray(y, dtype=np.float32)
    return go.Scatter(
        x=np.asarray(x, dtype=np.float64),
        y=y,
        name=name,
        mode="markers",
        marker={"color": color, "size": 9},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": np.zeros_like(y),
            "arrayminus": y,
            "color": color,
            "thickness": 2,
            "width": 0,
        },
        hovertemplate=hover + "<extra></extra>",
        **trace,
    )


def signed_map(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, *, hover: str, bar: dict[str, Any], **trace: Any
) -> go.Heatmap:
    """A heatmap of log-priors or scores: diverging, centred at 0, non-finite cells empty."""
    z = finite_or_empty(z)
    limit = style.symmetric_limit(z)
    return go.Heatmap(
        x=compact(x),
        y=compact(y),
        z=z,
        colorscale=style.DIVERGING,
        zmin=-limit,
        zmax=limit,
        colorbar=bar,
        hovertemplate=hover.replace("{value}", "%{z:.4g}") + "<extra></extra>",
        hoverongaps=False,
        **trace,
    )


def probability_map(
    x: np.ndarray, y: np.ndarray, p: np.ndarray, *, hover: str, **trace: Any
) -> go.Heatmap:
    """A heatmap of probabilities: sequential, logarithmic down to `FLOOR`, exact on hover.

    The values stay probabilities; the logarithm is in the spacing of the colours. Its colour bar
    is a mark of its own, `probability_bar`.
    """
    return go.Heatmap(
        x=compact(x),
        y=compact(y),
        z=finite_or_empty(p),
        colorscale=_LOG_COLORS,
        zmin=0.0,
        zmax=1.0,
        showscale=False,
        hovertemplate=hover.replace("{value}", "%{z:.4g}") + "<extra></extra>",
        hoverongaps=False,
        **trace,
    )


def probability_bar(**bar: Any) -> go.Scatter:
    """The colour bar of every `probability_map`, in decades."""
    decades = np.arange(round(np.log10(FLOOR)), 1)
    ticks = [f"≤{FLOOR:g}"] + [f"{10.0**d:g}" for d in decades[1:]]
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "color": [0.0],
            "colorscale": style.SEQUENTIAL,
            "cmin": float(decades[0]),
            "cmax": 0.0,
            "showscale": True,
            "colorbar": {"tickvals": decades, "ticktext": ticks, "title": "prob.", **bar},
        },
        showlegend=False,
        hoverinfo="skip",
        name="probability bar",
    )


def special_cells(
    x: np.ndarray, y: np.ndarray, values: np.ndarray, allowed: np.ndarray, **trace: Any
) -> list[go.Heatmap]:
    """Cells that have no colour of their own: not allowed, NaN, minus or plus infinity."""
    places = (
        ~allowed,
        allowed & np.isnan(values),
        allowed & np.isneginf(values),
        allowed & np.isposinf(values),
    )
    marks = []
    for (name, color), where in zip(SPECIAL.items(), places, strict=True):
        if not where.any():
            continue
        marks.append(
            go.Heatmap(
                x=compact(x),
                y=compact(y),
                z=np.where(where, np.float32(1), np.float32(np.nan)),
                colorscale=[[0, color], [1, color]],
                showscale=False,
                hovertemplate="query %{y}, key %{x}<br>" + name + "<extra></extra>",
                hoverongaps=False,
                name=name,
                **trace,
            )
        )
    return marks


def frames(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> go.Scatter:
    """A frame just inside each chosen cell of a heatmap whose cells are one unit wide."""
    row, col = np.nonzero(where)
    around = 0.43 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1], [np.nan, np.nan]])
    return go.Scatter(
        x=(x[col][:, None] + around[:, 0]).ravel().astype(np.float32),
        y=(y[row][:, None] + around[:, 1]).ravel().astype(np.float32),
        name=name,
        mode="lines",
        line={"color": color, "width": 2},
        hoverinfo="skip",
        **trace,
    )


def dots(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> go.Scatter:
    """A dot in each chosen cell of a heatmap that is too fine for `frames`."""
    row, col = np.nonzero(where)
    return go.Scatter(
        x=compact(x[col]),
        y=compact(y[row]),
        name=name,
        mode="markers",
        marker={"color": color, "size": 3 if max(where.shape) <= 64 else 1.5},
        hoverinfo="skip",
        **trace,
    )


def count_map(
    x: np.ndarray, y: np.ndarray, counts: np.ndarray, *, most: float, hover: str, **trace: Any
) -> go.Heatmap:
    """A heatmap of counts: transparent at 0, then logarithmic up to `most`, exact on hover.

    It is grey and the ground shows through, so that curves of any colour can lie on it.
    """
    most = max(most, 2.0)
    return go.Heatmap(
        x=compact(x),
        y=compact(y),
        z=np.where(counts > 0, counts, np.nan).astype(np.float32),
        colorscale=[[0.0, _count_color(0.0)]]
        + [[float(most ** (step - 1.0)), _count_color(step)] for step in _STEPS],
        zmin=0.0,
        zmax=most,
        showscale=False,
        hovertemplate=hover.replace("{value}", "%{z:,.0f}") + "<extra></extra>",
        hoverongaps=False,
        **trace,
    )


def count_bar(most: float, **bar: Any) -> go.Scatter:
    """The colour bar of every `count_map` up to `most`, in decades."""
    top = float(np.log10(max(most, 2.0)))
    decades = np.arange(np.floor(top) + 1)
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "color": [0.0],
            "colorscale": [[float(step), _count_color(step)] for step in _STEPS],
            "cmin": 0.0,
            "cmax": top,
            "showscale": True,
            "colorbar": {
                "tickvals": decades,
                "ticktext": [f"{10.0**decade:,.0f}" for decade in decades],
                **bar,
            },
        },
        showlegend=False,
        hoverinfo="skip",
        name="count bar",
    )


def legend_square(name: str, color: str) -> go.Scatter:
    """A legend entry for cells of one colour, without data of its own."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={"symbol": "square", "size": 11, "color": color},
        name=name,
        hoverinfo="skip",
    )


def caption(text: str, *, y: float = 0.0, yshift: int = -60) -> dict[str, Any]:
    """A line of small text under a figure, as a layout annotation."""
    return {
        "text": text,
        "x": 0.0,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "yshift": yshift,
        "showarrow": False,
        "align": "left",
        "font": {"size": 11},
    }


def finite_or_empty(values: np.ndarray) -> np.ndarray:
    """float32 with NaN where plotly has no colour to give."""
    values = np.asarray(values, dtype=np.float32)
    return np.where(np.isfinite(values), values, np.float32(np.nan))


def compact(values: np.ndarray) -> np.ndarray:
    """Coordinates in the smallest type that plotly encodes and that is still exact."""
    values = np.asarray(values)
    if values.dtype.kind in "iu" and values.size and np.abs(values).max() < 2**31:
        return values.astype(np.int32)
    # Bin centres are halves: exact in float32 up to 2^23 tokens.
    return values.astype(np.float32) if np.abs(values).max(initial=0.0) < 2**23 else values


def translucent(color: str, alpha: float) -> str:
    """A hex colour with an opacity."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _count_color(step: float) -> str:
    return f"rgba(128,128,128,{0.1 + 0.65 * float(step):.3f})"
