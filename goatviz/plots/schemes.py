"""What figures of sweeps share: the looks of position schemes, the axis of lengths, the focus.

One table holds the colour, dash and marker of each scheme, the same in every figure. A `Focus`
says which scheme, length and depth are chosen, and how the other schemes are drawn.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz.plots import marks, style
from goatviz.plots.base import Panel
from goatviz.plots.marks import Trace

if TYPE_CHECKING:
    import xarray as xr

#: How the schemes that are not chosen are drawn.
OTHERS = ("shown", "dimmed", "hidden")
_DIM = 0.4
# Fraction of a step of the axis over which the schemes at one place are spread.
_SPREAD = 0.4
# Half the width of the band at the chosen place, as a fraction of a step.
_BAND = 0.26


# --- looks ---


@dataclass(frozen=True)
class Look:
    """How a scheme is drawn: it differs from others in colour, dash and marker."""

    color: str
    dash: str
    symbol: str
    width: float = 2.0
    size: float = 8.0

    def line(self) -> dict[str, Any]:
        """plotly's settings of a line with markers."""
        return {
            "line": {"color": self.color, "dash": self.dash, "width": self.width},
            "marker": {"color": self.color, "symbol": self.symbol, "size": self.size},
        }


_BLUE, _VERMILION, _GREEN, _PINK, _OCHRE, _TEAL, _BROWN, _PURPLE = style.LINES
#: Looks by name of the position scheme. GOAT is the most prominent; "none" and "uniform", which use
#: no positions, share a colour.
SCHEMES = {
    "goat": Look(_VERMILION, "solid", "circle", 3.0, 10.0),
    "rope": Look(_BLUE, "dash", "square"),
    "rope-interpolated": Look(_TEAL, "dot", "diamond"),
    "alibi": Look(_GREEN, "dashdot", "triangle-up"),
    "bucket": Look(_OCHRE, "longdash", "pentagon"),
    "sinusoidal": Look(_PINK, "longdashdot", "x"),
    "learned": Look(_BROWN, "longdash", "star"),
    "none": Look(_PURPLE, "dot", "cross"),
    "uniform": Look(_PURPLE, "dash", "hexagon"),
}
_OTHER_LOOKS = tuple(
    Look(color, dash, symbol)
    for color, dash, symbol in itertools.product(
        style.LINES, ("dash", "dot", "dashdot", "longdash"), ("hourglass", "bowtie", "star-diamond")
    )
)


def scheme_look(name: str) -> Look:
    """The look of a scheme; that of an unknown scheme depends on its name alone.

    Examples
    --------
    >>> scheme_look("goat").color
    '#d55e00'
    """
    unknown = _OTHER_LOOKS[zlib.crc32(name.encode()) % len(_OTHER_LOOKS)]
    return SCHEMES.get(name, unknown)


# --- focus ---


@dataclass(frozen=True)
class Focus:
    """What is chosen in a figure of several schemes.

    Attributes
    ----------
    scheme : str
        Scheme that is drawn stronger than the others; empty: all alike.
    others : {"shown", "dimmed", "hidden"}
        How the other schemes are drawn.
    length : int, optional
        Length that is marked.
    depth : float, optional
        Depth that is marked, as a fraction of the text before the answer.
    runs : bool
        Whether single runs are shown.

    Examples
    --------
    >>> Focus("goat", others="hidden").shows("rope")
    False
    """

    scheme: str = ""
    others: str = "shown"
    length: int | None = None
    depth: float | None = None
    runs: bool = True

    def shows(self, scheme: str) -> bool:
        """Whether a scheme is drawn at all."""
        return scheme == self.scheme or self.others != "hidden"

    def look(self, scheme: str) -> Look:
        """The look of a scheme, stronger if it is the chosen one."""
        look = scheme_look(scheme)
        if scheme != self.scheme:
            return look
        return replace(look, width=look.width + 1.5, size=look.size + 2)

    def opacity(self, scheme: str) -> dict[str, float]:
        """plotly's opacity of a scheme's traces, if it is not 1."""
        dim = self.others == "dimmed" and scheme != self.scheme
        return {"opacity": _DIM} if dim else {}


ALL_ALIKE = Focus()


# --- traces ---


def drawn_schemes(
    result: xr.Dataset, places: np.ndarray, focus: Focus
) -> Iterator[tuple[str, xr.Dataset, np.ndarray]]:
    """The name, part of the result and places on the axis of every scheme that is drawn."""
    schemes = [str(scheme) for scheme in result["scheme"].values]
    for at, scheme in enumerate(schemes):
        if focus.shows(scheme):
            yield scheme, result.isel(scheme=at), spread(places, at, len(schemes))


def interval_line(
    scheme: str,
    x: np.ndarray,
    one: xr.Dataset,
    field: str,
    focus: Focus,
    *,
    hover: str,
    detail: Sequence[np.ndarray],
    **trace: Any,
) -> Trace:
    """A scheme's line with whiskers.

    Parameters
    ----------
    scheme : str
        Name of the scheme.
    x : array
        Places on the axis.
    one : xarray.Dataset
        The scheme's part of a result.
    field : str
        Field of the values; those of its intervals end in "_low" and "_high".
    focus : Focus
        What is chosen.
    hover : str
        plotly's template. `%{customdata[0]}` is the first of `detail`, 1 and 2 are the ends of the
        interval (see `interval_text`), and the rest of `detail` follows.
    detail : sequence of array
        The place as a number, and other values that `hover` shows.
    **trace
        Further settings of the trace.
    """
    place, *others = detail
    values, low, high = (one[f"{field}{end}"].values for end in ("", "_low", "_high"))
    return {
        "type": "scatter",
        "x": x,
        "y": values,
        "name": style.escape(scheme),
        "legendgroup": scheme,
        "mode": "lines+markers",
        **focus.look(scheme).line(),
        **focus.opacity(scheme),
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": high - values,
            "arrayminus": values - low,
            "width": 4,
            "thickness": 1.5,
        },
        "customdata": np.stack([place, low, high, *others], axis=-1),
        "hovertemplate": f"{hover}<extra></extra>",
        "zorder": 2 if scheme == "goat" else 1,
        **trace,
    }


def interval_text(digits: str) -> str:
    """The interval of an `interval_line`, for its hover text."""
    return f"(%{{customdata[1]:{digits}}} to %{{customdata[2]:{digits}}})"


def run_dots(
    scheme: str, x: np.ndarray, values: np.ndarray, focus: Focus, *, hover: str, detail: np.ndarray
) -> Trace:
    """A small mark for each run of a scheme at each place; `values` has shape (runs, places)."""
    look = scheme_look(scheme)
    return marks.points(
        np.tile(x, len(values)),
        values.ravel(),
        name=f"{style.escape(scheme)}, each run",
        color=marks.translucent(look.color, 0.55),
        symbol=look.symbol,
        size=5,
        hover=hover,
        customdata=detail,
        legendgroup=scheme,
        showlegend=False,
        **focus.opacity(scheme),
    )


def chance_line(chance: float, ends: Sequence[float]) -> Trace:
    """The accuracy of guessing, from one end of the axis to the other."""
    text = f"chance ({chance:.3g})"
    return reference_line(chance, ends, name=text, hover=f"chance {chance:.3g}")


def reference_line(y: float, ends: Sequence[float], *, name: str, hover: str) -> Trace:
    """A dotted horizontal line with an entry in the legend."""
    return {
        "type": "scatter",
        "x": list(ends),
        "y": [y, y],
        "mode": "lines",
        "name": name,
        "line": {"color": style.INK, "width": 1.5, "dash": "dot"},
        "hovertemplate": f"{hover}<extra></extra>",
    }


# --- places ---


def spread(places: np.ndarray, at: int, schemes: int) -> np.ndarray:
    """Places of one of several schemes, shifted so that whiskers stand side by side."""
    return places + step_of(places) * _SPREAD * ((at + 0.5) / schemes - 0.5)


def step_of(places: np.ndarray) -> float:
    """The smallest distance between neighbouring places; 1 if there is only one."""
    return float(np.diff(places).min()) if len(places) > 1 else 1.0


def ends_of(places: np.ndarray) -> list[float]:
    """The range of an axis with these places."""
    step = step_of(places)
    return [float(places.min()) - 0.45 * step, float(places.max()) + 0.45 * step]


def length_axis(lengths: np.ndarray, trained: str, title: str = "length") -> dict[str, Any]:
    """An axis of lengths at their binary logarithms, with multiples of the training length."""
    numbers = trained_numbers(trained)

    def text(length: int) -> str:
        multiple = len(numbers) == 1 and length % numbers[0] == 0 and length > numbers[0]
        return f"{length:,}" + (f"<br>{length // numbers[0]}×" if multiple else "")

    places = np.log2(lengths)
    return {
        "title": f"{title} [tokens, binary scale]",
        "tickvals": places.tolist(),
        "ticktext": [text(int(length)) for length in lengths],
        "range": ends_of(places),
    }


def trained_numbers(text: str) -> list[int]:
    """Training lengths from the attribute of a result."""
    return [int(part) for part in str(text).split(",")]


def trained_marks(trained: str) -> list[dict[str, Any]]:
    """Shapes: vertical lines at the training lengths, on an axis of lengths."""
    return [marks.upright(float(np.log2(length))) for length in trained_numbers(trained)]


def trained_note(trained: str) -> str:
    """The meaning of those lines, for a note."""
    return f"dashed: trained at {trained} tokens"


def over_lengths(
    panel: Panel, lengths: np.ndarray, trained: str, focus: Focus, title: str = "length"
) -> Panel:
    """A panel with an axis of lengths; training lengths and the chosen length are marked."""
    panel = replace(panel, x=length_axis(lengths, trained, title), shapes=trained_marks(trained))
    place = None if focus.length is None else float(np.log2(focus.length))
    return chosen(panel, np.log2(lengths), place, focus)


def chosen(panel: Panel, places: np.ndarray, place: float | None, focus: Focus) -> Panel:
    """A panel with a band at the chosen place, and a ring around the chosen scheme's point."""
    if place is None:
        return panel
    half = _BAND * step_of(places)
    rings = []
    for trace in panel.traces:
        if trace.get("legendgroup") == focus.scheme and trace["mode"] == "lines+markers":
            near = np.flatnonzero(np.abs(trace["x"] - place) < half)
            if near.size and np.isfinite(trace["y"][near[0]]):
                at = [trace["x"][near[0]]], [trace["y"][near[0]]]
                look = {"color": style.INK, "size": 19, "width": 2, "showlegend": False}
                rings.append(marks.ring(*at, name="chosen", **look))
            break
    shapes = [*panel.shapes, marks.shade(place - half, place + half)]
    return replace(panel, traces=[*panel.traces, *rings], shapes=shapes)
