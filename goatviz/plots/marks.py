"""Named marks: the small pieces that panels are composed of.

A mark turns arrays into plotly traces of one look, as plain dicts; it knows nothing of layers,
heads or results. Texts are escaped by whoever knows that they are texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from goatviz.plots import style

Trace = dict[str, Any]

#: Probabilities below this share one colour on a logarithmic scale.
FLOOR = 1e-4
#: Cells that have no colour of their own, and what they get instead.
SPECIAL = {
    "NaN": style.NOT_A_NUMBER,
    "−∞": style.MINUS_INFINITY,
    "+∞": style.PLUS_INFINITY,
}
#: Tokens along an axis that still have room for their text, and characters of one.
MAX_TOKENS, MAX_CHARACTERS = 32, 12
#: Characters of one token in a hover text.
HOVERED_CHARACTERS = 60
_STEPS = np.linspace(0.0, 1.0, 49)
_LOG_COLORS = [
    [0.0, sample_colorscale(style.SEQUENTIAL, 0.0)[0]],
    *(
        [float(FLOOR ** (1.0 - step)), sample_colorscale(style.SEQUENTIAL, float(step))[0]]
        for step in _STEPS
    ),
]


# --- curves and points ---


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
) -> Trace:
    """A line through all points; `hover` is what a reader sees at each."""
    return {
        "type": "scatter",
        "x": compact(x),
        "y": np.asarray(y, dtype=np.float32),
        "name": name,
        "mode": "lines" if len(x) > 1 else "markers",
        "line": {"color": color, "width": width, "dash": dash},
        "marker": {"color": color},
        "hovertemplate": f"{hover}<extra></extra>",
        **trace,
    }


def band(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, *, name: str, color: str, **trace: Any
) -> Trace:
    """The range between two curves, filled."""
    x = compact(x)
    return {
        "type": "scatter",
        "x": np.concatenate([x, x[::-1]]),
        "y": np.concatenate([high, low[::-1]]).astype(np.float32),
        "name": name,
        "fill": "toself",
        "fillcolor": translucent(color, 0.25),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        **trace,
    }


def points(
    x: np.ndarray,
    y: np.ndarray,
    *,
    name: str,
    color: str,
    hover: str = "",
    symbol: str = "circle",
    size: float = 9,
    **trace: Any,
) -> Trace:
    """Markers; without `hover` they do not answer the mouse."""
    answer = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "name": name,
        "mode": "markers",
        "marker": {"symbol": symbol, "size": size, "color": color},
        **answer,
        **trace,
    }


def stems(
    x: np.ndarray, y: np.ndarray, *, name: str, color: str, hover: str, **trace: Any
) -> Trace:
    """Points on stalks from 0, for a spectrum."""
    y = np.asarray(y, dtype=np.float32)
    stalks = {
        "type": "data",
        "symmetric": False,
        "array": np.zeros_like(y),
        "arrayminus": y,
        "color": color,
        "thickness": 2,
        "width": 0,
    }
    x = np.asarray(x, dtype=np.float64)
    return points(x, y, name=name, color=color, hover=hover, error_y=stalks, **trace)


def bars(x: np.ndarray, y: np.ndarray, *, name: str, color: str, hover: str, **trace: Any) -> Trace:
    """Bars from 0 that touch each other."""
    return {
        "type": "bar",
        "x": compact(x),
        "y": np.asarray(y, dtype=np.float32),
        "name": name,
        "marker": {"color": color, "line": {"width": 0}},
        "hovertemplate": f"{hover}<extra></extra>",
        **trace,
    }


# --- maps ---


def heatmap(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, *, name: str, hover: str, **trace: Any
) -> Trace:
    """Cells of numbers; what is not finite stays empty. `{value}` in `hover` is the cell's."""
    hover = hover if "{value" not in hover else hover.replace("{value}", "%{z:.4g}")
    return {
        "type": "heatmap",
        "x": compact(x),
        "y": compact(y),
        "z": finite_or_empty(z),
        "name": name,
        "hovertemplate": f"{hover}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,
        **trace,
    }


def signed_map(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, *, name: str, hover: str, unit: str, **trace: Any
) -> Trace:
    """A map of log-priors or scores: diverging, centred at 0, with its colour bar."""
    limit = style.symmetric_limit(np.asarray(z, dtype=np.float32))
    return heatmap(
        x,
        y,
        z,
        name=name,
        hover=hover,
        colorscale=style.DIVERGING,
        zmin=-limit,
        zmax=limit,
        showscale=True,
        colorbar={"title": {"text": unit}},
        **trace,
    )


def probability_map(
    x: np.ndarray, y: np.ndarray, p: np.ndarray, *, name: str, hover: str, **trace: Any
) -> Trace:
    """A map of probabilities: sequential, logarithmic down to `FLOOR`, exact on hover.

    The values stay probabilities; the logarithm is in the spacing of the colours. Its colour bar
    is a mark of its own, `probability_bar`.
    """
    return heatmap(
        x, y, p, name=name, hover=hover, colorscale=_LOG_COLORS, zmin=0.0, zmax=1.0, **trace
    )


def probability_bar(title: str = "prob.") -> Trace:
    """The colour bar of every `probability_map`, in decades."""
    decades = np.arange(round(np.log10(FLOOR)), 1)
    ticks = [f"≤{FLOOR:g}"] + [f"{10.0**d:g}" for d in decades[1:]]
    return colour_bar(
        "probability bar",
        colorscale=style.SEQUENTIAL,
        cmin=float(decades[0]),
        cmax=0.0,
        colorbar={"tickvals": decades.tolist(), "ticktext": ticks, "title": {"text": title}},
    )


def count_map(
    x: np.ndarray,
    y: np.ndarray,
    counts: np.ndarray,
    *,
    most: float,
    name: str,
    hover: str,
    **trace: Any,
) -> Trace:
    """A map of counts: transparent at 0, then logarithmic up to `most`, exact on hover.

    It is grey and the ground shows through, so that curves of any colour can lie on it.
    """
    most = max(most, 2.0)
    return heatmap(
        x,
        y,
        np.where(counts > 0, counts, np.nan),
        name=name,
        hover=hover.replace("{value}", "%{z:,.0f}"),
        colorscale=[[0.0, _count_color(0.0)]]
        + [[float(most ** (step - 1.0)), _count_color(step)] for step in _STEPS],
        zmin=0.0,
        zmax=most,
        **trace,
    )


def count_bar(most: float, title: str) -> Trace:
    """The colour bar of every `count_map` up to `most`, in decades."""
    top = float(np.log10(max(most, 2.0)))
    decades = np.arange(np.floor(top) + 1)
    return colour_bar(
        "count bar",
        colorscale=[[float(step), _count_color(step)] for step in _STEPS],
        cmin=0.0,
        cmax=top,
        colorbar={
            "tickvals": decades.tolist(),
            "ticktext": [f"{10.0**decade:,.0f}" for decade in decades],
            "title": {"text": title},
        },
    )


def special_cells(
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    allowed: np.ndarray,
    *,
    where: str = "query %{y}, key %{x}",
    **trace: Any,
) -> list[Trace]:
    """Allowed cells that have no colour of their own: NaN, minus or plus infinity, with legends.

    What is not allowed stays empty: `Panel.masked` gives it a ground. `where` is how hovering
    names a cell.
    """
    places = (
        allowed & np.isnan(values),
        allowed & np.isneginf(values),
        allowed & np.isposinf(values),
    )
    marks = []
    for (name, color), cells in zip(SPECIAL.items(), places, strict=True):
        if cells.any():
            hover = f"{where}<br>{name}"
            marks.append(flat_cells(x, y, cells, name=name, color=color, hover=hover, **trace))
            marks.append(legend_square(name, color))
    return marks


def flat_cells(
    x: np.ndarray,
    y: np.ndarray,
    where: np.ndarray,
    *,
    name: str,
    color: str,
    hover: str = "",
    **trace: Any,
) -> Trace:
    """Cells of one colour; what hovering says defaults to their name."""
    return heatmap(
        x,
        y,
        np.where(where, np.float32(1), np.float32(np.nan)),
        name=name,
        hover=hover or name,
        colorscale=[[0, color], [1, color]],
        **trace,
    )


def cell_numbers(x: np.ndarray, y: np.ndarray, shares: np.ndarray) -> Trace:
    """Two decimals in three characters on the cells of a map in the sequential scale, 0 to 1.

    Black or white, whichever has a contrast of 4.5:1.
    """
    row, column = np.nonzero(np.isfinite(shares))
    values = shares[row, column]
    inks = [style.ink_on(color) for color in style.sequential(np.clip(values, 0, 1))]
    return {
        "type": "scatter",
        "x": compact(x[column]),
        "y": compact(y[row]),
        "text": ["1" if value >= 0.995 else f"{value:.2f}"[1:] for value in values],
        "mode": "text",
        "textfont": {"color": inks, "size": 9 if len(x) > 8 else 11},
        "hoverinfo": "skip",
        "showlegend": False,
        "name": "numbers",
    }


def legend_square(name: str, color: str) -> Trace:
    """A legend entry for cells of one colour, without data of its own."""
    return points([None], [None], name=name, color=color, symbol="square", size=11)


def cell_texts(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, texts: np.ndarray, *, most: float
) -> list[Trace]:
    """Texts in the cells of a sequential map from 0 to `most`, black or white by their ground.

    Their size fits the cells; where that would be too small plotly leaves them out.
    """
    red, green, blue = np.moveaxis(np.array(style.colour_table()[1:]) / 255, -1, 0) ** 2.2
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    step = np.clip(np.nan_to_num(z) / most, 0.0, 1.0) * (len(luminance) - 1)
    # Black and white have the same contrast, 4.6:1, against a ground of this luminance.
    light = luminance[step.astype(int)] > 0.179
    return [
        {
            **flat_cells(x, y, where & np.isfinite(z), name=name, color="rgba(0,0,0,0)"),
            "text": np.where(where, texts, "").tolist(),
            "texttemplate": "%{text}",
            "textfont": {"color": color},
            "hoverinfo": "skip",
            "hovertemplate": None,
        }
        for name, color, where in (("black", "#000000", light), ("white", "#ffffff", ~light))
        if (where & np.isfinite(z)).any()
    ]


def frames(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> Trace:
    """A frame just inside each chosen cell of a map whose cells are one unit wide."""
    row, col = np.nonzero(where)
    around = 0.43 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1], [np.nan, np.nan]])
    return {
        "type": "scatter",
        "x": (x[col][:, None] + around[:, 0]).ravel().astype(np.float32),
        "y": (y[row][:, None] + around[:, 1]).ravel().astype(np.float32),
        "name": name,
        "mode": "lines",
        "line": {"color": color, "width": 2},
        "hoverinfo": "skip",
        **trace,
    }


def dots(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> Trace:
    """A dot in each chosen cell of a map that is too fine for `frames`."""
    row, col = np.nonzero(where)
    size = 3 if max(where.shape) <= 64 else 1.5
    return points(compact(x[col]), compact(y[row]), name=name, color=color, size=size, **trace)


# --- lines and words on a panel ---


def upright(x: float, *, dash: str = "dash", color: str = style.INK) -> dict[str, Any]:
    """A shape: a vertical line from the bottom to the top of the axes."""
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "y domain",
        "line": {"color": color, "width": 1.5, "dash": dash},
    }


def level(y: float, *, dash: str = "dash", color: str = style.INK) -> dict[str, Any]:
    """A shape: a horizontal line from one end of the axes to the other."""
    line = upright(y, dash=dash, color=color)
    return line | {"x0": 0, "x1": 1, "xref": "x domain", "y0": y, "y1": y, "yref": "y"}


def shade(low: float, high: float) -> dict[str, Any]:
    """A shape: a band behind everything, from one place on the horizontal axis to another."""
    return {
        "type": "rect",
        "x0": low,
        "x1": high,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "y domain",
        "fillcolor": style.MASKED,
        "opacity": 0.7,
        "line": {"width": 0},
        "layer": "below",
    }


def notice(text: str) -> dict[str, Any]:
    """An annotation in the middle of empty axes; `text` is plain."""
    return {
        "text": style.escape(text),
        "x": 0.5,
        "y": 0.5,
        "xref": "x domain",
        "yref": "y domain",
        "showarrow": False,
    }


# --- ticks ---


def tick_format(positions: np.ndarray) -> str:
    """Positions as they are, or in thousands and millions where those would not fit."""
    return "~s" if len(positions) and np.max(positions) >= 10_000 else ",d"


def token_ticks(positions: np.ndarray, tokens: np.ndarray, dim: str) -> dict[str, Any]:
    """Tokens as ticks where they have room: positions stay numbers, since tokens repeat."""
    if len(positions) > MAX_TOKENS:
        return {}
    texts = [shortened(str(token)) for token in tokens]
    upright = {"tickangle": 90} if dim == "key" else {}
    return {"tickvals": positions.tolist(), "ticktext": texts, **upright}


def shortened(token: str, characters: int = MAX_CHARACTERS) -> str:
    """A token of at most so many characters, escaped."""
    cut = token if len(token) <= characters else f"{token[: characters - 1]}…"
    return style.escape(cut)


def hovered(tokens: np.ndarray) -> np.ndarray:
    """Tokens as a hover text has room for them, escaped: an array of objects."""
    return np.array([shortened(str(token), HOVERED_CHARACTERS) for token in tokens], object)


# --- numbers as plotly takes them ---


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


def colour_bar(name: str, **marker: Any) -> Trace:
    """A colour bar without data of its own."""
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "mode": "markers",
        "marker": {"color": [0.0], "showscale": True, **marker},
        "showlegend": False,
        "hoverinfo": "skip",
        "name": name,
    }


def _count_color(step: float) -> str:
    return f"rgba(128,128,128,{0.1 + 0.65 * float(step):.3f})"
