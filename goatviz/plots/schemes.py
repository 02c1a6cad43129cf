"""How schemes look beside each other, on an axis of lengths, in every figure of a sweep.

Colour, dash and marker tell a scheme apart. A `Focus` says which one a reader looks at, and what
becomes of the others. What the numbers are is the business of `length`, `mass` and `perplexity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure

#: What becomes of the schemes that were not chosen.
OTHERS = ("shown", "dimmed", "hidden")
#: Height of a panel, in pixels.
PANEL_HEIGHT = 400
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
# Share of a step of the axis by which the whiskers of schemes stand beside each other.
_SPREAD = 0.28
_DIM = 0.4


@dataclass(frozen=True)
class Focus:
    """What a reader looks at.

    Attributes
    ----------
    scheme : str
        Drawn stronger than the others.
    others : {"shown", "dimmed", "hidden"}
        What becomes of those.
    length : int, optional
        Marked on axes of lengths.
    runs : bool
        Whether single runs are shown.

    Examples
    --------
    >>> Focus("goat", others="hidden").shows("rope")
    False
    """

    scheme: str
    others: str = "shown"
    length: int | None = None
    runs: bool = True

    def shows(self, scheme: str) -> bool:
        """Whether that scheme is drawn at all."""
        return scheme == self.scheme or self.others != "hidden"

    def strengthen(self, scheme: str, trace: dict[str, Any]) -> dict[str, Any]:
        """The look of a trace of that scheme, as strong as it shall be."""
        if scheme != self.scheme:
            return {**trace, "opacity": _DIM} if self.others == "dimmed" else trace
        if "line" not in trace:
            return trace
        size = trace["marker"]["size"] + 2
        return {
            **trace,
            "line": {**trace["line"], "width": 3.5},
            "marker": {**trace["marker"], "size": size},
        }


def focused(focus: Focus | None, scheme: str, trace: dict[str, Any]) -> dict[str, Any]:
    """As `Focus.strengthen`, and unchanged without a focus."""
    return trace if focus is None else focus.strengthen(scheme, trace)


# --- traces ---


def scheme_line(at: int, scheme: str) -> dict[str, Any]:
    """How the line of a scheme looks: colour, dash and marker all tell it apart."""
    return {
        "name": style.escape(scheme),
        "legendgroup": scheme,
        "line": {
            "color": style.LINES[at % len(style.LINES)],
            "width": 2,
            "dash": _DASHES[at % len(_DASHES)],
        },
        "marker": {"symbol": _MARKERS[at % len(_MARKERS)], "size": 9},
    }


def run_marks(at: int, scheme: str) -> dict[str, Any]:
    """How the small marks of a scheme's single runs look."""
    return {
        "name": f"{style.escape(scheme)}, each run",
        "legendgroup": scheme,
        "showlegend": False,
        "mode": "markers",
        "marker": {
            "color": marks.translucent(style.LINES[at % len(style.LINES)], 0.55),
            "size": 5,
            "symbol": _MARKERS[at % len(_MARKERS)],
        },
    }


def interval_line(
    at: int,
    scheme: str,
    x: np.ndarray,
    y: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    detail: Sequence[np.ndarray],
    hover: str,
    focus: Focus | None = None,
) -> go.Scatter:
    """A scheme's line with whiskers; `hover` reads place, low, high and then `detail`.

    Parameters
    ----------
    at, scheme : int, str
        Which of the schemes, and its name.
    x, y, low, high : array
        Places on the axis, values, and the ends of their intervals.
    detail : sequence of array
        The place as a number, and what else is said after the interval.
    hover : str
        plotly's template: `%{customdata[0]}` is the place, 1 and 2 the ends, then the rest.
    focus : Focus, optional
        What is looked at.
    """
    place, *rest = detail
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        **focused(focus, scheme, scheme_line(at, scheme)),
        error_y=whiskers(y, low, high),
        customdata=np.stack([place, low, high, *rest], axis=-1),
        hovertemplate=hover + "<extra></extra>",
    )


def run_dots(
    at: int,
    scheme: str,
    x: np.ndarray,
    values: np.ndarray,
    *,
    detail: np.ndarray,
    hover: str,
    focus: Focus | None = None,
) -> go.Scatter:
    """A small mark for each run of a scheme; `values` has shape (runs, places)."""
    return go.Scatter(
        x=np.tile(x, len(values)),
        y=values.flatten(),
        **focused(focus, scheme, run_marks(at, scheme)),
        customdata=detail,
        hovertemplate=hover + "<extra></extra>",
    )


def whiskers(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """From the lower end of intervals to the upper."""
    return {
        "type": "data",
        "symmetric": False,
        "array": high - mean,
        "arrayminus": mean - low,
        "width": 4,
        "thickness": 1.5,
    }


def chance_line(chance: float, low: float, high: float) -> go.Scatter:
    """What guessing reaches, from one end of the axis to the other."""
    return go.Scatter(
        x=[low, high],
        y=[chance, chance],
        mode="lines",
        name=f"chance ({chance:.3g})",
        line={"color": style.INK, "width": 1.5, "dash": "dot"},
        hovertemplate=f"chance {chance:.3g}<extra></extra>",
    )


def chosen_point(x: float, y: float) -> go.Scatter:
    """A ring around what was chosen."""
    return go.Scatter(
        x=[x],
        y=[y],
        mode="markers",
        name="chosen",
        marker={"symbol": "circle-open", "size": 19, "color": style.INK, "line": {"width": 2}},
        showlegend=False,
        hoverinfo="skip",
    )


def beside(at: int, schemes: int) -> float:
    """By how much of a step a scheme is moved, so that whiskers stand beside each other."""
    return _SPREAD * ((at + 0.5) / schemes - 0.5)


def binary_places(lengths: np.ndarray, at: int, schemes: int) -> np.ndarray:
    """Where one of several schemes stands on a binary axis."""
    return np.log2(lengths) + beside(at, schemes)


# --- axes ---


def binary_axis(
    figure: Figure,
    lengths: np.ndarray,
    trained: str,
    title: str = "length [tokens, binary scale]",
) -> None:
    """Lengths at their logarithms, named with what multiple of the training length they are."""
    numbers = trained_numbers(trained)
    figure.update_xaxes(
        title_text=title,
        tickvals=np.log2(lengths),
        ticktext=[_tick(int(length), numbers) for length in lengths],
        range=binary_ends(lengths),
    )


def binary_ends(lengths: np.ndarray) -> list[float]:
    """Where an axis of these lengths begins and ends."""
    return [float(np.log2(lengths.min())) - 0.35, float(np.log2(lengths.max())) + 0.35]


def mark_trained(figure: Figure, trained: str) -> None:
    """Vertical lines at training lengths, on a binary axis."""
    for length in trained_numbers(trained):
        place = float(np.log2(length))
        figure.add_vline(x=place, line={"color": style.INK, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=place,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            text=f"trained at {length:,}",
            showarrow=False,
            font={"size": 11},
        )


def mark_chosen(figure: Figure, low: float, high: float) -> None:
    """A band behind everything, from one place on the horizontal axis to another."""
    figure.add_vrect(
        x0=low, x1=high, fillcolor=style.MASKED, opacity=0.7, line={"width": 0}, layer="below"
    )


def trained_numbers(text: str) -> list[int]:
    """Training lengths as a result's attribute names them."""
    return [int(part) for part in str(text).split(",")]


def as_panel(figure: Figure, title: str, subtitle: str) -> Figure:
    """The layout of one of several figures side by side: small, its legend at its foot."""
    figure.update_layout(
        template=style.TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}, "y": 0.97, "yanchor": "top"},
        height=PANEL_HEIGHT,
        margin={"l": 56, "r": 12, "t": 78, "b": 124},
        legend={
            "orientation": "h",
            "x": 0.0,
            "yref": "container",
            "y": 0.015,
            "yanchor": "bottom",
            "tracegroupgap": 0,
        },
    )
    figure.update_xaxes(tickangle=0, title_standoff=6)
    return figure


def _tick(length: int, trained: list[int]) -> str:
    text = f"{length:,}"
    if len(trained) == 1 and length % trained[0] == 0 and length > trained[0]:
        text += f"<br>{length // trained[0]}x"
    return text
