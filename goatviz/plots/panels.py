"""Several figures as one: each keeps its traces, axes, legend and colour bars in a cell of its own.

Figures are moved, not drawn again: axes are renumbered, and whatever is placed on the paper is
placed in the cell.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from goatviz.plots import style
from goatviz.plots.figure import Figure

#: Pixels between cells: titles stand above, ticks and axis titles below and to the left.
_GAPS = {"left": 70, "right": 90, "top": 60, "bottom": 60}
#: Height of a figure that does not say.
HEIGHT = 400
#: Pixels that a row of a legend is high.
_LEGEND_PX = 60


def side_by_side(
    figures: Sequence[go.Figure], *, title: str = "", columns: int = 2, width: int = 1100
) -> Figure:
    """One figure with each of these in a cell, in reading order.

    Parameters
    ----------
    figures : sequence of plotly.graph_objects.Figure
        With Cartesian axes. One alone comes back as it is, in a copy.
    title : str
        Above all of them.
    columns : int
        Cells in a row.
    width : int
        Pixels that gaps are reckoned for; the figure stays as wide as its page.

    Returns
    -------
    Figure
        As high as its rows together.

    Raises
    ------
    ValueError
        If there is no figure, or no column.

    Examples
    --------
    >>> both = side_by_side([Figure(go.Scatter(y=[1, 2])), Figure(go.Scatter(y=[3, 4]))])
    >>> [trace.xaxis for trace in both.data]
    ['x', 'x2']
    """
    if not figures:
        raise ValueError("figures must hold at least one figure, got none")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns!r}")
    if len(figures) == 1:
        return Figure(figures[0])
    parts = [_plain(figure) for figure in figures]
    rows = [parts[at : at + columns] for at in range(0, len(parts), columns)]
    heights = [max(_height(layout) for _, layout in row) for row in rows]
    total, head = sum(heights), 50 if title else 10
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "template": style.TEMPLATE,
        "height": total + head,
        "margin": {"l": 5, "r": 5, "t": head, "b": 5},
        "annotations": [],
        "shapes": [],
    }
    if title:
        layout["title"] = {"text": style.escape(title)}
    above = 0
    for row, height in zip(rows, heights, strict=True):
        for column, (traces, own) in enumerate(row):
            legend = bool(own.get("legend")) and _LEGEND_PX
            left, right = column / columns, (column + 1) / columns
            cell = _Cell(
                (left + _GAPS["left"] / width, right - _GAPS["right"] / width),
                (
                    1 - (above + height - _GAPS["bottom"] - legend) / total,
                    1 - (above + _GAPS["top"]) / total,
                ),
                number=len([name for name in layout if re.match(r"xaxis", name)]),
                legend=len([name for name in layout if re.match(r"legend", name)]),
                bar=len([name for name in layout if re.match(r"coloraxis", name)]),
            )
            cell.place(traces, own, data, layout)
        above += height
    return Figure(go.Figure(data=data, layout=layout))


def _plain(figure: go.Figure) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout as plain dicts whose arrays stay arrays."""
    return [dict(trace._props) for trace in figure.data], copy.deepcopy(figure.layout._props)


def _height(layout: dict[str, Any]) -> int:
    return int(layout.get("height") or HEIGHT)


class _Cell:
    """Where one figure goes, and how its axes are called there."""

    def __init__(
        self,
        across: tuple[float, float],
        upward: tuple[float, float],
        *,
        number: int,
        legend: int,
        bar: int,
    ) -> None:
        self.across, self.upward = across, upward
        self._number, self._legend, self._bar = number, legend, bar

    def place(
        self,
        traces: list[dict[str, Any]],
        own: dict[str, Any],
        data: list[dict[str, Any]],
        layout: dict[str, Any],
    ) -> None:
        """Move traces and layout of a figure into this cell of another."""
        legend = f"legend{self._legend + 1 if self._legend else ''}"
        for trace in traces:
            moved = dict(trace)
            for side in "xy":
                if trace.get("type") != "table":
                    moved[f"{side}axis"] = self._axis(trace.get(f"{side}axis", side))
            if "coloraxis" in trace:
                moved["coloraxis"] = self._coloraxis(trace["coloraxis"])
            elif trace.get("type") == "heatmap" and trace.get("showscale", True):
                moved["colorbar"] = self._colourbar(trace.get("colorbar", {}))
            marker = trace.get("marker", {})
            if marker.get("showscale"):
                bar = self._colourbar(marker.get("colorbar", {}))
                moved["marker"] = {**marker, "colorbar": bar}
            if trace.get("showlegend", True):
                moved["legend"] = legend
            data.append(moved)
        names = [name for name in own if re.fullmatch(r"[xy]axis\d*", name)]
        for side in "xy":
            if f"{side}axis" not in names:
                names.append(f"{side}axis")
        for name in names:
            axis = copy.deepcopy(own.get(name, {}))
            side = name[0]
            low, high = axis.get("domain", (0.0, 1.0))
            axis["domain"] = [self._at(side, low), self._at(side, high)]
            for key in ("anchor", "matches", "overlaying", "scaleanchor"):
                if re.fullmatch(r"[xy]\d*", str(axis.get(key, ""))):
                    axis[key] = self._axis(axis[key])
            axis.setdefault("anchor", self._axis("y" if side == "x" else "x"))
            layout[self._axis(side + name[5:]).replace(side, f"{side}axis", 1)] = axis
        for name in own:
            if name.startswith("coloraxis"):
                axis = copy.deepcopy(own[name])
                axis["colorbar"] = self._colourbar(axis.get("colorbar", {}))
                layout[self._coloraxis(name)] = axis
        for kind in ("annotations", "shapes"):
            layout[kind] += [self._moved(each) for each in own.get(kind, ())]
        layout[legend] = {
            **own.get("legend", {}),
            "orientation": "h",
            "x": self.across[0],
            "xanchor": "left",
            "yref": "paper",
            "y": self.upward[0] - 58 / layout["height"],
            "yanchor": "top",
        }
        self._title(own.get("title", {}), layout, has_titles=bool(own.get("annotations")))

    def _title(self, title: Any, layout: dict[str, Any], *, has_titles: bool) -> None:
        said = title if isinstance(title, dict) else {"text": title}
        text = said.get("text")
        if not text:
            return
        under = (said.get("subtitle") or {}).get("text")
        layout["annotations"].append(
            {
                "text": f"<b>{text}</b>" + (f"<br>{under}" if under else ""),
                "x": self.across[0],
                "y": self.upward[1],
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                # Titles of the figure's own subplots stand between.
                "yshift": 26 if has_titles else 6,
                "align": "left",
                "showarrow": False,
            }
        )

    def _at(self, side: str, share: float) -> float:
        low, high = self.across if side == "x" else self.upward
        return low + share * (high - low)

    def _axis(self, name: str) -> str:
        number = self._number + int(name[1:] or 1)
        return f"{name[0]}{number if number > 1 else ''}"

    def _coloraxis(self, name: str) -> str:
        number = self._bar + int(name[9:] or 1)
        return f"coloraxis{number if number > 1 else ''}"

    def _colourbar(self, bar: dict[str, Any]) -> dict[str, Any]:
        low, high = self.upward
        return {
            **bar,
            "x": self.across[1] + 0.005,
            "xanchor": "left",
            "y": (low + high) / 2,
            "yanchor": "middle",
            "len": high - low,
            "lenmode": "fraction",
            "thickness": 12,
        }

    def _moved(self, mark: dict[str, Any]) -> dict[str, Any]:
        """An annotation or shape: references renamed, places on the paper put into the cell."""
        found = copy.deepcopy(mark)
        for side in "xy":
            reference = str(mark.get(f"{side}ref", "paper"))
            if reference == "paper":
                for key in (side, f"{side}0", f"{side}1"):
                    if key in mark:
                        found[key] = self._at(side, mark[key])
                found[f"{side}ref"] = "paper"
            else:
                name, _, rest = reference.partition(" ")
                found[f"{side}ref"] = f"{self._axis(name)} {rest}".strip()
        return found
