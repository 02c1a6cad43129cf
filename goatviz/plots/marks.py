"""Named marks: the small pieces that panels are composed of.

A mark turns arrays into plotly traces of one look, as plain dicts; it knows nothing about layers,
heads or results. Names and hover texts must be escaped by the caller.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from goatviz.plots import style

Trace = dict[str, Any]

#: Probabilities below this share one colour on a logarithmic scale.
FLOOR = 1e-4
#: Values that are not on the colour scale, and their colours.
SPECIAL = {
    "NaN": style.NOT_A_NUMBER,
    "−∞": style.MINUS_INFINITY,
    "+∞": style.PLUS_INFINITY,
}
#: Largest number of tokens along an axis with room for their text, and of characters of a token.
MAX_TOKENS, MAX_CHARACTERS = 32, 12
#: Largest number of characters of a token in a hover text.
HOVERED_CHARACTERS = 60
#: A query and a key as hovering names them.
PAIR = "query %{y}, key %{x}"
_STEPS = np.linspace(0.0, 1.0, 49)


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
    """A line through all points; `hover` is plotly's template for each."""
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
    """Markers; without `hover` they do not react to the mouse."""
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


def ring(
    x: np.ndarray, y: np.ndarray, *, name: str, color: str, size: float, width: float, **trace: Any
) -> Trace:
    """An open circle around each point."""
    mark = points(x, y, name=name, color=color, symbol="circle-open", size=size, **trace)
    return mark | {"marker": {**mark["marker"], "line": {"width": width}}}


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
    """Cells of numbers, empty where not finite; `{value}` in `hover` stands for the number."""
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
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    allowed: np.ndarray,
    *,
    name: str,
    hover: str,
    unit: str,
    where: str = PAIR,
    **trace: Any,
) -> list[Trace]:
    """A map of log-priors or scores on a diverging scale centred at 0, with its colour bar.

    Cells that are not allowed stay empty, see `special_cells`.
    """
    shown = np.where(allowed, values, np.nan)
    limit = style.symmetric_limit(np.asarray(shown, dtype=np.float32))
    scale = {"colorscale": style.DIVERGING, "zmin": -limit, "zmax": limit}
    bar = {"showscale": True, "colorbar": {"title": {"text": unit}}}
    cells = heatmap(x, y, shown, name=name, hover=hover, **scale, **bar, **trace)
    return [cells, *special_cells(x, y, values, allowed, where=where, **trace)]


def probability_map(
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    allowed: np.ndarray,
    *,
    name: str,
    hover: str,
    unit: str = "prob.",
    where: str = PAIR,
    **trace: Any,
) -> list[Trace]:
    """A map of probabilities on a sequential scale, logarithmic down to `FLOOR`; exact on hover.

    The values are probabilities, the spacing of the colours is logarithmic, and the colour bar is
    a trace of its own. Cells that are not allowed stay empty, see `special_cells`.
    """
    shown = np.where(allowed, values, np.nan)
    scale = {"colorscale": _log_colors(), "zmin": 0.0, "zmax": 1.0}
    cells = heatmap(x, y, shown, name=name, hover=hover, **scale, **trace)
    decades = np.arange(round(np.log10(FLOOR)), 1)
    ticks = [f"≤{FLOOR:g}"] + [f"{10.0**d:g}" for d in decades[1:]]
    bar = colour_bar(
        "probability bar",
        colorscale=style.SEQUENTIAL,
        cmin=float(decades[0]),
        cmax=0.0,
        colorbar={"tickvals": decades.tolist(), "ticktext": ticks, "title": {"text": unit}},
    )
    return [cells, bar, *special_cells(x, y, values, allowed, where=where, **trace)]


@cache
def _log_colors() -> list[list[float | str]]:
    """The sequential scale for values whose colours are spaced logarithmically above `FLOOR`."""
    colors = [sample_colorscale(style.SEQUENTIAL, float(step))[0] for step in _STEPS]
    stops = [float(FLOOR ** (1.0 - step)) for step in _STEPS]
    return [[0.0, colors[0]], *map(list, zip(stops, colors, strict=True))]


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
    """A map of counts: transparent at 0, then logarithmic up to `most`; exact on hover.

    It is a translucent grey, so that curves of any colour can lie on it.
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
    """The colour bar of a `count_map` up to `most`, in decades."""
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
    where: str = PAIR,
    **trace: Any,
) -> list[Trace]:
    """Allowed cells that are NaN, minus or plus infinity, each with an entry in the legend.

    Cells that are not allowed stay empty; `Panel.masked` gives them a ground. `where` names a cell
    on hovering.
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
    """Cells of one colour; `hover` defaults to their name."""
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
    """Numbers in the cells of a sequential map from 0 to 1: two decimals in three characters.

    They are black or white, whichever has a contrast of 4.5:1.
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
    """A legend entry for cells of one colour, without data."""
    return points([None], [None], name=name, color=color, symbol="square", size=11)


def cell_texts(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, texts: np.ndarray, *, most: float
) -> list[Trace]:
    """Texts in the cells of a sequential map from 0 to `most`, black or white for contrast.

    Their size fits the cells; plotly leaves them out where they would be too small.
    """
    shares = np.clip(np.nan_to_num(z) / most, 0.0, 1.0)
    inks = np.array([style.ink_on(color) for color in style.sequential(shares.ravel())])
    traces = []
    for name, color in (("black", "#000000"), ("white", "#ffffff")):
        where = (inks == color).reshape(z.shape)
        if (where & np.isfinite(z)).any():
            cells = flat_cells(x, y, where & np.isfinite(z), name=name, color="rgba(0,0,0,0)")
            traces.append(
                {
                    **cells,
                    "text": np.where(where, texts, "").tolist(),
                    "texttemplate": "%{text}",
                    "textfont": {"color": color},
                    "hoverinfo": "skip",
                    "hovertemplate": None,
                }
            )
    return traces


def frames(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> Trace:
    """A frame just inside each chosen cell of a map with cells one unit wide."""
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


def double_frame(x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str) -> list[Trace]:
    """The outline of a block of cells one unit wide, white on black: visible on every colour."""
    rows, columns = np.nonzero(where)
    if not rows.size:
        return []
    left, right = x[columns.min()] - 0.46, x[columns.max()] + 0.46
    top, bottom = y[rows.min()] - 0.46, y[rows.max()] + 0.46
    return [
        {
            "type": "scatter",
            "x": [left, right, right, left, left],
            "y": [top, top, bottom, bottom, top],
            "name": name,
            "mode": "lines",
            "line": {"color": color, "width": width},
            "showlegend": False,
            "hoverinfo": "skip",
        }
        for color, width in (("#000000", 5), ("#ffffff", 2))
    ]


def dots(
    x: np.ndarray, y: np.ndarray, where: np.ndarray, *, name: str, color: str, **trace: Any
) -> Trace:
    """A dot in each chosen cell of a map too fine for `frames`."""
    row, col = np.nonzero(where)
    size = 3 if max(where.shape) <= 64 else 1.5
    return points(compact(x[col]), compact(y[row]), name=name, color=color, size=size, **trace)


# --- lines and words on a panel ---


def upright(x: float, *, dash: str = "dash", color: str = style.INK) -> dict[str, Any]:
    """A shape: a vertical line across the axes."""
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


def level(y: float, *, color: str = style.INK) -> dict[str, Any]:
    """A shape: a horizontal line across the axes."""
    line = upright(y, color=color)
    return line | {"x0": 0, "x1": 1, "xref": "x domain", "y0": y, "y1": y, "yref": "y"}


def shade(low: float, high: float) -> dict[str, Any]:
    """A shape: a vertical band behind everything, from one place on the axis to another."""
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
    """An annotation in the middle of empty axes, from plain text."""
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
    """The format of positions: in full, or in thousands and millions if that would not fit."""
    return "~s" if len(positions) and np.max(positions) >= 10_000 else ",d"


def token_ticks(positions: np.ndarray, tokens: np.ndarray, dim: str) -> dict[str, Any]:
    """Ticks at positions with tokens as texts, if there is room; tokens may repeat."""
    if len(positions) > MAX_TOKENS:
        return {}
    texts = [shortened(str(token)) for token in tokens]
    upright = {"tickangle": 90} if dim == "key" else {}
    return {"tickvals": positions.tolist(), "ticktext": texts, **upright}


def shortened(token: str, characters: int = MAX_CHARACTERS) -> str:
    """A token of at most so many characters, escaped."""
    return style.escape(cut(token, characters))


def cut(token: str, characters: int = MAX_CHARACTERS) -> str:
    """A token of at most so many characters, as it is."""
    return token if len(token) <= characters else f"{token[: characters - 1]}…"


def hovered(tokens: np.ndarray) -> np.ndarray:
    """Tokens shortened for a hover text and escaped, an array of objects."""
    return np.array([shortened(str(token), HOVERED_CHARACTERS) for token in tokens], object)


# --- numbers as plotly takes them ---


def finite_or_empty(values: np.ndarray) -> np.ndarray:
    """Values as float32, with NaN for infinities, which plotly cannot colour."""
    values = np.asarray(values, dtype=np.float32)
    return np.where(np.isfinite(values), values, np.float32(np.nan))


def compact(values: np.ndarray) -> np.ndarray:
    """Coordinates in the smallest exact type that plotly encodes."""
    values = np.asarray(values)
    if values.dtype.kind in "iu" and values.size and np.abs(values).max() < 2**31:
        return values.astype(np.int32)
    # Centres of bins may be halves: exact in float32 up to 2^23 tokens.
    return values.astype(np.float32) if np.abs(values).max(initial=0.0) < 2**23 else values


def translucent(color: str, alpha: float) -> str:
    """A hexadecimal colour with an opacity."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def colour_bar(name: str, **marker: Any) -> Trace:
    """A colour bar without data."""
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
