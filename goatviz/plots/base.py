"""A picture as data, and its lowering to a plotly figure: the only place that knows of layout.

A `Panel` holds traces on one pair of axes and the words around them. `single`, `grid` and `menu`
give panels their place: titles, legends, colour bars and captions are measured for the narrowest
width that a figure is shown at, so that nothing overlaps there; a wider page only gives more room.
"""

from __future__ import annotations

import base64
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from goatviz.plots import style
from goatviz.plots.figure import MENU_HEIGHT, Figure

Trace = dict[str, Any]

#: The narrowest figure, in pixels: a narrow notebook, and the default of an image export.
NARROWEST = 660
#: The narrowest that stands beside others.
NARROW = 340
#: Bytes of JSON that a figure with a menu may hold.
LIMIT_BYTES = 2_000_000

_EDGE = 10  # Pixels between text and the figure's edge.
_LINE = 15  # Pixels that a line of small text is high.
_ROW = 20  # Pixels that a row of a legend is high.
_SYMBOL = 46  # Pixels that plotly adds to a legend entry's text for its symbol.
_TEMPLATE = style.TEMPLATE.to_plotly_json()
# Kinds of numbers that plotly takes in binary form.
_BINARY = ("f4", "f8", "i1", "i2", "i4", "u1", "u2", "u4")


@dataclass(frozen=True)
class Panel:
    """Traces on one pair of axes, and what is said around them.

    Attributes
    ----------
    title : str
        Plain text above the axes.
    traces : sequence of dict
        plotly traces without axis names; see `goatviz.plots.marks`.
    x, y : mapping
        plotly's axis settings; each has a "title" with its unit, such as "lag [tokens]".
    note : str
        One or two lines below the title, plain text.
    caption : sequence of str
        Sentences below the figure, plain text; those that several panels share are shown once.
    shapes, annotations : sequence of dict
        plotly's, with references "x", "y", "x domain" or "y domain" of this panel.
    height : int
        Pixels of the plot area.
    masked : bool
        Whether the ground between the cells of a map stands for what is not allowed.
    """

    title: str
    traces: Sequence[Trace]
    x: Mapping[str, Any] = field(default_factory=dict)
    y: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    caption: Sequence[str] = ()
    shapes: Sequence[dict[str, Any]] = ()
    annotations: Sequence[dict[str, Any]] = ()
    height: int = 260
    masked: bool = False


@dataclass(frozen=True)
class Entry:
    """What a menu offers: panels under a label.

    Attributes
    ----------
    label : str
        "head 3"; within its group no other entry has it.
    panels : sequence of Panel
        As many for every entry.
    group : str
        "layer 2". Several groups are a first menu, and their entries a second one.
    subtitle : str
        Below the figure's title, plain text.
    rank : float
        The menu opens on the entry with the highest, and so does each group.
    """

    label: str
    panels: Sequence[Panel]
    group: str = ""
    subtitle: str = ""
    rank: float = 0.0


@dataclass(frozen=True)
class Words:
    """The text around all panels of a figure, plain."""

    title: str = ""
    subtitle: str = ""
    caption: Sequence[str] = ()


def single(panel: Panel, *, width: int = NARROWEST) -> Figure:
    """One panel as a figure of its own, its title and note above.

    Parameters
    ----------
    panel : Panel
        What is drawn.
    width : int
        The narrowest width that the figure is shown at, pixels.

    Examples
    --------
    >>> single(Panel("Squares", [{"type": "scatter", "y": [0, 1, 4]}])).layout.title.text
    'Squares'
    """
    return _figure(*_column([panel], width))


def as_figure(drawn: Panel | Sequence[Panel] | Figure) -> Figure:
    """A panel, or some below each other, as a figure narrow enough to stand beside others."""
    if isinstance(drawn, Figure):
        return drawn
    return _figure(*_column([drawn] if isinstance(drawn, Panel) else drawn, NARROW))


def as_json(drawn: Panel | Sequence[Panel] | go.Figure) -> str:
    """`as_figure` as plotly's JSON, without a Figure on the way: for sliders.

    Raises
    ------
    TypeError
        If it is neither a plotly Figure nor a panel or several.
    """
    if isinstance(drawn, go.Figure):
        return drawn.to_json(validate=False)
    panels = [drawn] if isinstance(drawn, Panel) else drawn
    if not isinstance(panels, Sequence) or not all(isinstance(one, Panel) for one in panels):
        raise TypeError(f"drawn must be a plotly Figure or panels, got {type(drawn).__name__}")
    data, layout = _column(panels, NARROW)
    content = {"data": data, "layout": layout}
    return json.dumps(content, default=_plain, separators=(",", ":"), allow_nan=False)


def grid(
    panels: Sequence[Panel],
    words: Words,
    *,
    columns: int = 2,
    linked: str = "",
    width: int = NARROWEST,
) -> Figure:
    """Panels side by side and below each other, in reading order, under one title and legend.

    Parameters
    ----------
    panels : sequence of Panel
        At least one.
    words : Words
        Title, subtitle and caption of the figure.
    columns : int
        Panels in a row.
    linked : {"", "x", "y", "xy"}
        Axes that zoom together, as far as they have one title.
    width : int
        The narrowest width that the figure is shown at, pixels.

    Raises
    ------
    ValueError
        If there is no panel.
    """
    if not panels:
        raise ValueError("panels must hold at least one panel, got none")
    words = _with_captions(words, panels)
    place = _Place([panels], [words], columns, width, menus=0)
    return _figure(*place.lower(panels, words, linked))


def menu(
    entries: Sequence[Entry],
    words: Words,
    *,
    columns: int = 2,
    linked: str = "",
    width: int = NARROWEST,
) -> Figure:
    """One figure of which a reader chooses the entry: by layer and head, say, in two menus.

    Only one entry is drawn; a choice replaces the numbers that differ, by plotly alone, so that
    it works in a saved page too. The figure opens on the entry of the highest rank.

    Parameters
    ----------
    entries : sequence of Entry
        At least one; a single one has no menu.
    words, columns, linked, width
        As in `grid`; an entry's subtitle follows that of `words`.

    Raises
    ------
    ValueError
        If there is no entry, or entries differ in their number of panels.
    """
    if not entries:
        raise ValueError("entries must hold at least one entry, got none")
    counts = {len(entry.panels) for entry in entries}
    if len(counts) > 1:
        raise ValueError(f"entries must have equally many panels, got {sorted(counts)}")
    groups = list(dict.fromkeys(entry.group for entry in entries))
    texts = [_words_of(entry, words) for entry in entries]
    menus = 0 if len(entries) == 1 else 1 if len(groups) == 1 else 2
    place = _Place([entry.panels for entry in entries], texts, columns, width, menus=menus)
    lowered = [
        place.lower(entry.panels, text, linked) for entry, text in zip(entries, texts, strict=True)
    ]
    opening = max(range(len(entries)), key=lambda at: entries[at].rank)
    data, layout, updates = _differences(lowered, opening)
    if menus:
        layout["updatemenus"] = _menus(entries, groups, opening, updates, place)
    return _figure(data, layout)


def _column(panels: Sequence[Panel], width: int) -> tuple[list[Trace], dict[str, Any]]:
    """Panels below each other, the first one's title and note above them all."""
    first, *others = panels
    words = _with_captions(Words(first.title, first.note), panels)
    first = replace(first, title="", note="")
    place = _Place([[first, *others]], [words], 1, width, menus=0)
    return place.lower([first, *others], words, "x")


def _figure(data: list[Trace], layout: dict[str, Any]) -> Figure:
    return Figure(data=data, layout=layout, _validate=False)


# --- text ---


def wrapped(text: str, pixels: float, size: int) -> list[str]:
    """Lines of plain text that fit into a width at a font size, escaped for plotly."""
    characters = max(8, int(pixels / (0.56 * size)))
    return [style.escape(line) for line in textwrap.wrap(text, characters)]


def _text_width(text: object, size: int = 12) -> float:
    lines = str(text).split("<br>")
    return 0.56 * size * max(len(line) for line in lines)


def _words_of(entry: Entry, words: Words) -> Words:
    parts = [part for part in (words.subtitle, entry.subtitle) if part]
    return replace(_with_captions(words, entry.panels), subtitle="; ".join(parts))


def _with_captions(words: Words, panels: Sequence[Panel]) -> Words:
    """Words with the panels' captions; what several panels say is said once."""
    caption = [*words.caption, *(line for panel in panels for line in panel.caption)]
    return replace(words, caption=list(dict.fromkeys(caption)))


# --- places ---


@dataclass
class _Cell:
    """Pixels that a panel needs around its plot area."""

    header: int = 0
    left: int = 0
    right: int = 0
    below: int = 0
    height: int = 0

    def widen(self, other: _Cell) -> None:
        for name in vars(self):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


class _Place:
    """Where everything goes, the same for all entries of a menu."""

    def __init__(
        self,
        alternatives: Sequence[Sequence[Panel]],
        words: Sequence[Words],
        columns: int,
        width: int,
        *,
        menus: int,
    ) -> None:
        count = len(alternatives[0])
        self.columns = min(columns, count)
        self.width, self.menus = width, menus
        cells = [_Cell() for _ in range(count)]
        for panels in alternatives:
            for cell, panel in zip(cells, panels, strict=True):
                cell.widen(_measured(panel))
        # Columns and rows share the room that their neediest panel asks for.
        self.left, self.right = (
            [
                max(getattr(cell, side) for cell in cells[at :: self.columns])
                for at in range(self.columns)
            ]
            for side in ("left", "right")
        )
        inner = width - self.left[0] - self.right[-1]
        gaps = sum(self.right[:-1]) + sum(self.left[1:])
        self.plot_width = (inner - gaps) / self.columns
        room = self.plot_width + min(self.right)
        self.rows = [cells[at : at + self.columns] for at in range(0, count, self.columns)]
        self.headers = [0] * len(self.rows)
        for panels in alternatives:
            for at, panel in enumerate(panels):
                row = at // self.columns
                self.headers[row] = max(self.headers[row], _heading(panel, room)[1])
        self.room = room
        subtitle = max(len(self.subtitle(text)) for text in words)
        title = max(len(self.title(text)) for text in words)
        self.top = _EDGE + (4 + 20 * title if title else 0) + _LINE * subtitle + 6
        self.top += MENU_HEIGHT if menus else 0
        self.legend_width, self.legend_rows = self._legend(alternatives)
        self.caption_lines = max(len(self.caption(text)) for text in words)
        last = max(cell.below for cell in self.rows[-1])
        self.foot = last + _ROW * self.legend_rows + (6 if self.legend_rows else 0)
        self.bottom = self.foot + _LINE * self.caption_lines + (_EDGE if self.caption_lines else 4)
        heights = [max(cell.height for cell in row) for row in self.rows]
        belows = [max(cell.below for cell in row) for row in self.rows]
        belows[-1] = 0
        self.plot_height = sum(heights) + sum(belows) + sum(self.headers[1:])
        self.top += self.headers[0]
        self.spans = []
        at = 0
        for number, height in enumerate(heights):
            at += self.headers[number] if number else 0
            self.spans.append((1 - (at + height) / self.plot_height, 1 - at / self.plot_height))
            at += height + belows[number]

    def title(self, words: Words) -> list[str]:
        return wrapped(words.title, self.width - 2 * _EDGE, 16)

    def subtitle(self, words: Words) -> list[str]:
        return wrapped(words.subtitle, self.width - 2 * _EDGE, 12)

    def caption(self, words: Words) -> list[str]:
        lines = [wrapped(line, self.width - 2 * _EDGE, 11) for line in words.caption]
        return [part for line in lines for part in line]

    def across(self, column: int) -> tuple[float, float]:
        """Where a column's plot area begins and ends, as shares of the plot's width."""
        inner = self.width - self.left[0] - self.right[-1]
        start = column * self.plot_width + sum(self.right[:column]) + sum(self.left[1 : column + 1])
        return start / inner, min((start + self.plot_width) / inner, 1.0)

    def _legend(self, alternatives: Sequence[Sequence[Panel]]) -> tuple[int, int]:
        """Pixels of a legend's texts, 0 where they stand in one row as they are; and rows.

        plotly gives a row the width of the plot, and the entries of several rows one width.
        """
        rows = [
            {trace["name"]: None for panel in panels for trace in panel.traces if _in_legend(trace)}
            for panels in alternatives
        ]
        most = max(map(len, rows))
        if not most:
            return 0, 0
        room = self.width - self.left[0] - self.right[-1]
        if max(sum(_text_width(name, 12) + _SYMBOL for name in names) for names in rows) <= room:
            return 0, 1
        widest = max(_text_width(name, 11) for names in rows for name in names) + 4
        widest = min(math.ceil(widest), int(room) - _SYMBOL)
        return widest, math.ceil(most / max(1, room // (widest + _SYMBOL)))

    def lower(
        self, panels: Sequence[Panel], words: Words, linked: str
    ) -> tuple[list[Trace], dict[str, Any]]:
        """Traces and layout of these panels in their places."""
        data: list[Trace] = []
        layout = self._frame(words)
        seen: set[tuple[str, str]] = set()
        leaders: dict[tuple[str, str], str] = {}
        for at, panel in enumerate(panels):
            row, column = divmod(at, self.columns)
            number = "" if at == 0 else str(at + 1)
            across, upward = self.across(column), self.spans[row]
            for trace in panel.traces:
                data.append(_placed(trace, number, across, upward, seen))
            for side, domain, other in (("x", across, "y"), ("y", upward, "x")):
                axis = self._axis(side, getattr(panel, side), panel)
                axis |= {"domain": list(domain), "anchor": f"{other}{number}"}
                if side in linked:
                    title = str(axis.get("title", {}).get("text", ""))
                    leader = leaders.setdefault((side, title), f"{side}{number}")
                    if leader != f"{side}{number}":
                        axis["matches"] = leader
                layout[f"{side}axis{number}"] = axis
            marks = list(panel.shapes)
            if panel.masked:
                marks.insert(0, _ground())
            layout["shapes"] += [_referred(mark, number) for mark in marks]
            layout["annotations"] += [_referred(mark, number) for mark in panel.annotations]
            text, _ = _heading(panel, self.room)
            if text:
                layout["annotations"].append(_header(text, across[0], upward[1]))
        caption = self.caption(words)
        if caption:
            layout["annotations"].append(self._caption(caption))
        layout["showlegend"] = any(_in_legend(trace) for trace in data)
        # Lines look as they are drawn, unless there are marks too small to tell their colour.
        tiny = any(
            _in_legend(one) and np.min(one.get("marker", {}).get("size", 9)) < 5 for one in data
        )
        layout["legend"]["itemsizing"] = "constant" if tiny else "trace"
        return data, layout

    def _frame(self, words: Words) -> dict[str, Any]:
        layout: dict[str, Any] = {
            "template": style.TEMPLATE,
            "height": self.top + self.plot_height + self.bottom,
            "margin": {
                "t": self.top,
                "b": self.bottom,
                "l": self.left[0],
                "r": self.right[-1],
                "autoexpand": False,
            },
            "annotations": [],
            "shapes": [],
            "legend": {
                "orientation": "h",
                "font": {"size": 11},
                "x": 0.0,
                "xanchor": "left",
                "y": -(self.foot - _ROW * self.legend_rows - 4) / self.plot_height,
                "yanchor": "top",
                **({"entrywidth": self.legend_width} if self.legend_width else {}),
                "tracegroupgap": 0,
            },
        }
        if words.title:
            layout["title"] = {
                "text": "<br>".join(self.title(words)),
                "subtitle": {"text": "<br>".join(self.subtitle(words))},
                "x": 0.0,
                "xref": "container",
                "xanchor": "left",
                "y": 1.0,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": _EDGE, "t": _EDGE},
            }
        return layout

    def _caption(self, lines: Sequence[str]) -> dict[str, Any]:
        return {
            "text": "<br>".join(lines),
            "x": 0.0,
            "y": 0.0,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "top",
            "xshift": _EDGE - self.left[0],
            "yshift": -self.foot,
            "showarrow": False,
            "align": "left",
            "font": {"size": 11},
        }

    def _axis(self, side: str, settings: Mapping[str, Any], panel: Panel) -> dict[str, Any]:
        """The panel's axis with as many ticks as have room."""
        axis = dict(settings)
        if isinstance(axis.get("title"), str):
            axis["title"] = {"text": axis["title"]}
        axis["automargin"] = False
        if any(trace.get("type") == "heatmap" for trace in panel.traces):
            axis.setdefault("showgrid", False)
        pixels = self.plot_width if side == "x" else panel.height
        if "ticktext" not in axis:
            axis.setdefault("nticks", max(3, int(pixels // (58 if side == "x" else 36))))
            if side == "x":
                axis.setdefault("tickangle", 0)
            return axis
        texts, places = list(axis["ticktext"]), list(axis["tickvals"])
        upright = side == "y" or axis.get("tickangle") == 90
        if side == "x":
            axis.setdefault("tickangle", 0)
        needed = 15 if upright else max(map(_text_width, texts), default=0) + 8
        step = math.ceil(needed * len(texts) / max(pixels, 1))
        if step > 1:
            # The last one stays: it says how far the axis goes.
            axis["ticktext"], axis["tickvals"] = texts[::-step][::-1], places[::-step][::-1]
        return axis


def _measured(panel: Panel) -> _Cell:
    """Pixels that a panel's axes and colour bar need."""
    y_texts = panel.y.get("ticktext")
    left = 70 if y_texts is None else 30 + max(map(_text_width, y_texts), default=0)
    below = 46
    x_texts = panel.x.get("ticktext")
    if x_texts is not None:
        upright = panel.x.get("tickangle") == 90
        tall = max(map(_text_width, x_texts), default=0) if upright else 0
        lines = max((str(text).count("<br>") for text in x_texts), default=0)
        below = 32 + int(max(tall, 14)) + _LINE * lines
    if not panel.x.get("title"):
        below -= 18
    right = 24
    for trace in panel.traces:
        bar = _bar_of(trace)
        if bar is not None:
            texts = [*bar.get("ticktext", ["0.000"]), bar.get("title", {}).get("text", "")]
            right = max(right, 28 + max(map(_text_width, texts)))
    return _Cell(0, int(left), int(right), below, panel.height)


def _heading(panel: Panel, room: float) -> tuple[str, int]:
    """A panel's title and note as one annotation's text, and the pixels that it needs."""
    title = wrapped(panel.title, room, 14)
    note = wrapped(panel.note, room, 11)
    lines = [f"<b>{line}</b>" for line in title]
    lines += [f'<span style="font-size:11px">{line}</span>' for line in note]
    height = 18 * len(title) + _LINE * len(note)
    return "<br>".join(lines), height + 12 if height else 0


def _header(text: str, x: float, y: float) -> dict[str, Any]:
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 3,
        "align": "left",
        "showarrow": False,
        "font": {"size": 13},
    }


def _ground() -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": 0,
        "x1": 1,
        "y0": 0,
        "y1": 1,
        "xref": "x domain",
        "yref": "y domain",
        "fillcolor": style.MASKED,
        "line": {"width": 0},
        "layer": "below",
    }


def _referred(mark: Mapping[str, Any], number: str) -> dict[str, Any]:
    """A shape or annotation whose references are those of its panel in the figure."""
    moved = {"showarrow": False, **mark} if "text" in mark else dict(mark)
    for side in "xy":
        _, _, domain = str(mark.get(f"{side}ref", side)).partition(" ")
        moved[f"{side}ref"] = f"{side}{number} {domain}".strip()
    return moved


def _placed(
    trace: Trace,
    number: str,
    across: tuple[float, float],
    upward: tuple[float, float],
    seen: set[tuple[str, str]],
) -> Trace:
    """A trace on its panel's axes; of equal legend entries the first is shown."""
    moved = {**trace, "xaxis": f"x{number}", "yaxis": f"y{number}"}
    bar = _bar_of(trace)
    if bar is not None:
        low, high = upward
        bar = {
            "thickness": 11,
            "outlinewidth": 0,
            **bar,
            "title": {"font": {"size": 12}, **bar.get("title", {})},
            "x": across[1],
            "xanchor": "left",
            "xpad": 8,
            "y": (low + high) / 2,
            "yanchor": "middle",
            "len": high - low,
            "lenmode": "fraction",
            "ypad": 0,
        }
        if "marker" in trace and trace["marker"].get("showscale"):
            moved["marker"] = {**trace["marker"], "colorbar": bar}
        else:
            moved["colorbar"] = bar
    if _in_legend(trace):
        look = (trace["name"], str(trace.get("legendgroup", "")))
        if look in seen:
            moved["showlegend"] = False
        seen.add(look)
        moved.setdefault("legendgroup", trace["name"])
        moved["showlegend"] = moved.get("showlegend", True)
    else:
        moved["showlegend"] = False
    return moved


def _bar_of(trace: Trace) -> dict[str, Any] | None:
    """The colour bar that a trace shows, if it does."""
    if trace.get("type") == "heatmap" and trace.get("showscale", True):
        return dict(trace.get("colorbar", {}))
    marker = trace.get("marker", {})
    return dict(marker.get("colorbar", {})) if marker.get("showscale") else None


def _in_legend(trace: Trace) -> bool:
    shown = trace.get("showlegend", trace.get("type") != "heatmap")
    return bool(shown and trace.get("name"))


# --- menus ---


def _menus(
    entries: Sequence[Entry],
    groups: Sequence[str],
    opening: int,
    updates: Sequence[list[Any]],
    place: _Place,
) -> list[dict[str, Any]]:
    """One menu of entries; or one of groups, and for each of them one of its entries."""
    members = {
        group: [at for at, entry in enumerate(entries) if entry.group == group] for group in groups
    }
    if len(groups) == 1:
        buttons = [
            _button(entry.label, update) for entry, update in zip(entries, updates, strict=True)
        ]
        return [_menu(buttons, opening, 0.0, place)]
    at_group = groups.index(entries[opening].group)
    leading = [max(members[group], key=lambda at: entries[at].rank) for group in groups]
    first = []
    for chosen, group in enumerate(groups):
        data, layout, traces = updates[leading[chosen]]
        shown = {f"updatemenus[{n + 1}].visible": n == chosen for n in range(len(groups))}
        active = members[group].index(leading[chosen])
        shown[f"updatemenus[{chosen + 1}].active"] = active
        first.append(_button(group, [data, {**layout, **shown}, traces]))
    inner = place.width - place.left[0] - place.right[-1]
    beside = (max(map(_text_width, groups)) + 62) / inner
    menus = [_menu(first, at_group, 0.0, place)]
    for chosen, group in enumerate(groups):
        buttons = [_button(entries[at].label, updates[at]) for at in members[group]]
        current = opening if chosen == at_group else leading[chosen]
        second = _menu(buttons, members[group].index(current), beside, place)
        second["visible"] = chosen == at_group
        menus.append(second)
    return menus


def _button(label: str, arguments: list[Any]) -> dict[str, Any]:
    return {"label": style.escape(label), "method": "update", "args": arguments}


def _menu(buttons: list[dict[str, Any]], active: int, x: float, place: _Place) -> dict[str, Any]:
    return {
        "buttons": buttons,
        "active": active,
        "x": x,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": place.headers[0] + 4},
        "bgcolor": style.MENU,
        "bordercolor": style.GRID,
        "font": {"size": 12},
    }


def _differences(
    lowered: Sequence[tuple[list[Trace], dict[str, Any]]], opening: int
) -> tuple[list[Trace], dict[str, Any], list[list[Any]]]:
    """The traces of all entries merged, the opening's layout, and each entry's update.

    Traces are matched by axes, type and name; an entry without one of them hides it.
    """
    keyed = [_keyed(data) for data, _ in lowered]
    keys = list(dict.fromkeys(key for traces in [keyed[opening], *keyed] for key in traces))
    flat = [
        [_flat({"visible": True, **traces[key]}) if key in traces else None for key in keys]
        for traces in keyed
    ]
    varying: list[list[str]] = []
    for at in range(len(keys)):
        known = [entry[at] for entry in flat if entry[at] is not None]
        names = dict.fromkeys(name for entry in known for name in entry)
        some_hidden = len(known) < len(flat)
        varying.append(
            [
                name
                for name in names
                if (some_hidden and name == "visible")
                or any(not _same(entry.get(name), known[0].get(name)) for entry in known)
            ]
        )
    traces = [at for at, names in enumerate(varying) if names]
    attributes = list(dict.fromkeys(name for names in varying for name in names))
    data = []
    for key in keys:
        shown = keyed[opening].get(key)
        if shown is None:
            template = next(entry[key] for entry in keyed if key in entry)
            shown = {**template, "visible": False}
        data.append(shown)
    layouts = [_flat_layout(layout) for _, layout in lowered]
    names = dict.fromkeys(name for layout in layouts for name in layout)
    moving = [
        name
        for name in names
        if any(not _same(layout.get(name), layouts[0].get(name)) for layout in layouts)
    ]
    updates = []
    for entry, layout in zip(flat, layouts, strict=True):
        values = {}
        for name in attributes:
            row = []
            for at in traces:
                source = entry[at]
                if source is None:
                    # Hidden: only that counts.
                    source = {"visible": False}
                row.append(_packed(source.get(name)))
            values[name] = row
        updates.append([values, {name: _packed(layout.get(name)) for name in moving}, traces])
    return data, dict(lowered[opening][1]), updates


def _keyed(data: Sequence[Trace]) -> dict[tuple[Any, ...], Trace]:
    keyed: dict[tuple[Any, ...], Trace] = {}
    for trace in data:
        key = (trace["xaxis"], trace.get("type"), trace.get("name"))
        count = sum(1 for other in keyed if other[:3] == key)
        keyed[*key, count] = trace
    return keyed


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; arrays and lists are leaves."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _flat_layout(layout: Mapping[str, Any]) -> dict[str, Any]:
    """A layout by dotted names, annotations and shapes whole."""
    return _flat({name: value for name, value in layout.items() if name != "template"})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and (
                one.tobytes() == other.tobytes()
                if one.dtype != object
                else bool((one == other).all())
            )
        )
    return type(one) is type(other) and one == other


def _packed(value: Any) -> Any:
    """A value as a menu's button can hold it: arrays in plotly's binary form."""
    if not isinstance(value, np.ndarray):
        return value
    kind = f"{value.dtype.kind}{value.dtype.itemsize}"
    if kind not in _BINARY:
        return value.tolist()
    array = np.ascontiguousarray(value)
    packed = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
    if array.ndim > 1:
        packed["shape"] = ", ".join(map(str, array.shape))
    return packed


def _plain(value: Any) -> Any:
    """What JSON does not know, as plotly reads it."""
    if isinstance(value, np.ndarray):
        return _packed(value)
    return _TEMPLATE if value is style.TEMPLATE else value.item()
