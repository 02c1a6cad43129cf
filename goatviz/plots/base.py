"""A picture as data, and its lowering to a plotly figure: the only place that knows about layout.

A `Panel` holds traces on one pair of axes and the text around them. `single`, `grid` and `menu`
arrange panels: titles, legends, colour bars and captions are measured for the narrowest width at
which a figure is shown, so that nothing overlaps there; a wider page only gives more room.
"""

from __future__ import annotations

import base64
import itertools
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

#: Smallest width of a figure, in pixels: a narrow notebook, and the default of an image export.
NARROWEST = 660
#: Smallest width of a figure beside others.
NARROW = 340
#: Largest number of bytes of JSON in a figure with a menu.
LIMIT_BYTES = 2_000_000

_EDGE = 10  # Pixels between text and the edge of the figure.
_LINE = 15  # Height of a line of small text in pixels.
_ROW = 20  # Height of a row of a legend in pixels.
_SYMBOL = 46  # Pixels that plotly adds to the text of a legend entry for its symbol.
# Types of numbers that plotly reads in binary form.
_BINARY = ("f4", "f8", "i1", "i2", "i4", "u1", "u2", "u4")


@dataclass(frozen=True)
class Panel:
    """Traces on one pair of axes, and the text around them.

    Attributes
    ----------
    title : str
        Plain text above the axes.
    traces : sequence of dict
        plotly traces without axis names; see `goatviz.plots.marks`.
    x, y : mapping
        plotly's axis settings, each with a "title" that has its unit, such as "lag [tokens]".
    note : str
        One or two lines below the title, plain text.
    caption : sequence of str
        Sentences below the figure, plain text; those that panels share are shown once.
    shapes, annotations : sequence of dict
        plotly's shapes and annotations, with references "x", "y", "x domain" or "y domain" of this
        panel.
    height : int
        Height of the plot area in pixels.
    masked : bool
        Whether the ground shows where a map has no cells because they are masked.
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
    """An entry of a menu: panels under a label.

    Attributes
    ----------
    label : str
        Text of the entry, such as "head 3", unique within its group.
    panels : sequence of Panel
        Panels of the entry; every entry has the same number.
    group : str
        Text of the group, such as "layer 2". If there are several groups, a first menu chooses the
        group and a second one its entry.
    subtitle : str
        Plain text below the title of the figure.
    rank : float
        The menu, and each group, opens on the entry with the highest rank.
    """

    label: str
    panels: Sequence[Panel]
    group: str = ""
    subtitle: str = ""
    rank: float = 0.0


@dataclass(frozen=True)
class Words:
    """Plain text around all panels of a figure."""

    title: str = ""
    subtitle: str = ""
    caption: Sequence[str] = ()


def single(panel: Panel, *, width: int = NARROWEST) -> Figure:
    """One panel as a figure, with its title and note above.

    Parameters
    ----------
    panel : Panel
        Panel to draw.
    width : int
        Smallest width at which the figure is shown, pixels.

    Examples
    --------
    >>> single(Panel("Squares", [{"type": "scatter", "y": [0, 1, 4]}])).layout.title.text
    'Squares'
    """
    return _figure(*_column([panel], width))


def as_figure(drawn: Panel | Sequence[Panel] | Figure) -> Figure:
    """A panel, or several below each other, as a figure narrow enough to stand beside others."""
    if isinstance(drawn, Figure):
        return drawn
    return _figure(*_column([drawn] if isinstance(drawn, Panel) else drawn, NARROW))


def as_json(drawn: Panel | Sequence[Panel] | go.Figure, buffers: list[bytes] | None = None) -> str:
    """`as_figure` as plotly's JSON, but without making a Figure: fast enough for sliders.

    Parameters
    ----------
    drawn : Panel, sequence of Panel, or plotly.graph_objects.Figure
        A panel, panels one below the other, or a whole figure.
    buffers : list of bytes, optional
        List that takes the bytes of each array; "bdata" is then an index into it. Without one,
        arrays are written as base64.

    Raises
    ------
    TypeError
        If `drawn` is neither a plotly Figure nor panels.
    """
    if isinstance(drawn, go.Figure):
        return drawn.to_json(validate=False)
    panels = [drawn] if isinstance(drawn, Panel) else drawn
    if not isinstance(panels, Sequence) or not all(isinstance(one, Panel) for one in panels):
        raise TypeError(f"drawn must be a plotly Figure or panels, got {type(drawn).__name__}")
    data, layout = _column(panels, NARROW)
    # What a wider page needs to set the text anew (explore/front/figure.js).
    words = _column_words(panels)
    layout["meta"] = {
        "width": NARROW,
        "title": words.title,
        "subtitle": words.subtitle,
        "caption": list(words.caption),
    }

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _packed(value, buffers)
        return style.TEMPLATE if value is style.template() else value.item()

    content = {"data": data, "layout": layout}
    return json.dumps(content, default=plain, separators=(",", ":"), allow_nan=False)


def grid(
    panels: Sequence[Panel],
    words: Words,
    *,
    columns: int = 2,
    linked: str = "",
) -> Figure:
    """Panels in rows, in reading order, under one title and with one legend.

    Parameters
    ----------
    panels : sequence of Panel
        At least one.
    words : Words
        Title, subtitle and caption of the figure.
    columns : int
        Number of panels in a row.
    linked : {"", "x", "y", "xy"}
        Axes that zoom together, if they have the same title.

    Raises
    ------
    ValueError
        If there is no panel.
    """
    if not panels:
        raise ValueError("panels must hold at least one panel, got none")
    words = _with_captions(words, panels)
    place = _Place([panels], [words], columns, NARROWEST, menus=0)
    return _figure(*place.lower(panels, words, linked))


def menu(entries: Sequence[Entry], words: Words, *, columns: int = 2) -> Figure:
    """One figure with a menu of entries, or with two menus, such as one of layers and one of heads.

    The figure opens on the entry of the highest rank. Only one entry is drawn at a time; plotly.js
    alone replaces the numbers that differ, so that menus work in a saved page too.

    Parameters
    ----------
    entries : sequence of Entry
        At least one; a single entry has no menu.
    words, columns
        As in `grid`; the subtitle of an entry follows that of `words`.

    Raises
    ------
    ValueError
        If there is no entry, or entries have different numbers of panels.
    """
    if not entries:
        raise ValueError("entries must hold at least one entry, got none")
    counts = {len(entry.panels) for entry in entries}
    if len(counts) > 1:
        raise ValueError(f"entries must have equally many panels, got {sorted(counts)}")
    groups = list(dict.fromkeys(entry.group for entry in entries))
    texts = [_words_of(entry, words) for entry in entries]
    menus = 0 if len(entries) == 1 else 1 if len(groups) == 1 else 2
    place = _Place([entry.panels for entry in entries], texts, columns, NARROWEST, menus=menus)
    lowered = [
        place.lower(entry.panels, text, "") for entry, text in zip(entries, texts, strict=True)
    ]
    opening = max(range(len(entries)), key=lambda at: entries[at].rank)
    data, layout, updates = _differences(lowered, opening)
    if menus:
        layout["updatemenus"] = _menus(entries, groups, opening, updates, place)
    return _figure(data, layout)


def _column(panels: Sequence[Panel], width: int) -> tuple[list[Trace], dict[str, Any]]:
    """Panels below each other, under the title and note of the first."""
    words = _column_words(panels)
    first, *others = panels
    first = replace(first, title="", note="")
    place = _Place([[first, *others]], [words], 1, width, menus=0)
    return place.lower([first, *others], words, "x")


def _column_words(panels: Sequence[Panel]) -> Words:
    return _with_captions(Words(panels[0].title, panels[0].note), panels)


def _figure(data: list[Trace], layout: dict[str, Any]) -> Figure:
    return Figure(data=data, layout=layout, _validate=False)


# --- text ---


def wrapped(text: str, pixels: float, size: int) -> list[str]:
    """Lines of plain text that fit into a width at a font size, escaped for plotly."""
    characters = max(8, int(pixels / (0.56 * size)))
    lines = textwrap.wrap(text, characters, break_on_hyphens=False)
    return [style.escape(line) for line in lines]


def _subtitle_text(lines: Sequence[str]) -> str:
    """Lines below a title; plotly would set a single one lower, close to what follows."""
    return "<br>".join([*lines, ""] if len(lines) == 1 else lines)


def _text_width(text: object, size: int = 12) -> float:
    lines = str(text).split("<br>")
    return 0.56 * size * max(len(line) for line in lines)


def _words_of(entry: Entry, words: Words) -> Words:
    parts = [part for part in (words.subtitle, entry.subtitle) if part]
    return replace(_with_captions(words, entry.panels), subtitle="; ".join(parts))


def _with_captions(words: Words, panels: Sequence[Panel]) -> Words:
    """Words with the captions of the panels, each sentence once."""
    caption = [*words.caption, *(line for panel in panels for line in panel.caption)]
    return replace(words, caption=list(dict.fromkeys(caption)))


# --- places ---


class _Place:
    """The place of everything in a figure, the same for all entries of a menu.

    Columns and rows have the room that their neediest panel in any entry needs.
    """

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
        self.width = width
        needs = [_measured(panel) for panels in alternatives for panel in panels]
        column = np.tile(np.arange(count) % self.columns, len(alternatives))
        row = np.tile(np.arange(count) // self.columns, len(alternatives))
        left, right, below, height = np.array(needs).T
        self.left, self.right = (_largest(side, column) for side in (left, right))
        self.inner = width - self.left[0] - self.right[-1]
        gaps = sum(self.right[:-1]) + sum(self.left[1:])
        self.plot_width = (self.inner - gaps) / self.columns
        self.room = self.plot_width + min(self.right)
        headings = [_heading(panel, self.room)[1] for panels in alternatives for panel in panels]
        self.headers = _largest(np.array(headings), row)
        subtitle = max(len(self.subtitle(text)) for text in words)
        title = max(len(self.title(text)) for text in words)
        self.top = _EDGE + (4 + 20 * title if title else 0) + _LINE * subtitle + 6
        self.top += MENU_HEIGHT if menus else 0
        self.legend_width, self.legend_rows = self._legend(alternatives)
        self.caption_lines = max(len(self.caption(text)) for text in words)
        heights, belows = _largest(height, row), _largest(below, row)
        self.foot = belows[-1] + _ROW * self.legend_rows + (6 if self.legend_rows else 0)
        self.bottom = self.foot + _LINE * self.caption_lines + (_EDGE if self.caption_lines else 4)
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
        """Where the plot area of a column begins and ends, as fractions of the plot's width."""
        start = column * self.plot_width + sum(self.right[:column]) + sum(self.left[1 : column + 1])
        return start / self.inner, min((start + self.plot_width) / self.inner, 1.0)

    def _legend(self, alternatives: Sequence[Sequence[Panel]]) -> tuple[int, int]:
        """The width of legend texts in pixels, or 0 if they all fit in one row; and the rows.

        A row is as wide as the plot. In several rows plotly gives every entry the same width.
        """
        rows = [
            {trace["name"]: None for panel in panels for trace in panel.traces if _in_legend(trace)}
            for panels in alternatives
        ]
        most = max(map(len, rows))
        if not most:
            return 0, 0
        room = self.inner
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
            lines, _ = _heading(panel, self.room)
            if lines:
                at = across[0], upward[1]
                layout["annotations"].append(_text_at(*at, lines, 13, yanchor="bottom", yshift=3))
        caption = self.caption(words)
        if caption:
            shift = {"xshift": _EDGE - self.left[0], "yshift": -self.foot}
            layout["annotations"].append(_text_at(0.0, 0.0, caption, 11, yanchor="top", **shift))
        layout["showlegend"] = any(_in_legend(trace) for trace in data)
        # Legend symbols look like the traces, unless marks are too small to show their colour.
        tiny = any(
            _in_legend(one) and np.min(one.get("marker", {}).get("size", 9)) < 5 for one in data
        )
        layout["legend"]["itemsizing"] = "constant" if tiny else "trace"
        return data, layout

    def _frame(self, words: Words) -> dict[str, Any]:
        layout: dict[str, Any] = {
            "template": style.template(),
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
                "subtitle": {"text": _subtitle_text(self.subtitle(words))},
                "x": 0.0,
                "xref": "container",
                "xanchor": "left",
                "y": 1.0,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": _EDGE, "t": _EDGE},
            }
        return layout

    def _axis(self, side: str, settings: Mapping[str, Any], panel: Panel) -> dict[str, Any]:
        """The axis of a panel, with as many ticks as there is room for."""
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
            # The last tick stays: it shows where the axis ends.
            axis["ticktext"], axis["tickvals"] = texts[::-step][::-1], places[::-step][::-1]
        return axis


def _largest(pixels: np.ndarray, groups: np.ndarray) -> list[int]:
    """The largest number in each group 0, 1, …"""
    return [int(pixels[groups == group].max()) for group in range(groups.max() + 1)]


def _measured(panel: Panel) -> tuple[int, int, int, int]:
    """Pixels that a panel needs: left of its plot area, right of it, below it, and its height."""
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
    return int(left), int(right), below, panel.height


def _heading(panel: Panel, room: float) -> tuple[list[str], int]:
    """The lines of a panel's title and note, and their height in pixels."""
    title = wrapped(panel.title, room, 14)
    note = wrapped(panel.note, room, 11)
    lines = [f"<b>{line}</b>" for line in title]
    lines += [f'<span style="font-size:11px">{line}</span>' for line in note]
    height = 18 * len(title) + _LINE * len(note)
    return lines, height + 12 if height else 0


def _text_at(x: float, y: float, lines: Sequence[str], size: int, **place: Any) -> dict[str, Any]:
    """An annotation at a place of the whole figure, flush left."""
    return {
        "text": "<br>".join(lines),
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "align": "left",
        "showarrow": False,
        "font": {"size": size},
        **place,
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
    """A shape or annotation with the references of its panel in the figure."""
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
    """A trace on the axes of its panel; only the first of equal legend entries is shown."""
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
    """The colour bar of a trace, or None if it shows none."""
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
    """One menu of entries; or one of groups, and for each group a menu of its entries."""
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
    beside = (max(map(_text_width, groups)) + 62) / place.inner
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
    """The traces of all entries merged, the layout of the opening, and the update of each entry.

    Traces are matched by axes, type and name; an entry that lacks a trace hides it.
    """
    keyed = [_keyed(data) for data, _ in lowered]
    keys = list(dict.fromkeys(key for traces in [keyed[opening], *keyed] for key in traces))
    hidden = {"visible": False}
    flat = [
        [_flat({"visible": True} | traces.get(key, hidden)) for key in keys] for traces in keyed
    ]
    varying = []
    for entries in zip(*flat, strict=True):
        names = ["visible"] if hidden in entries else []
        names += _varying([entry for entry in entries if entry != hidden])
        varying.append(names)
    changed = [at for at, names in enumerate(varying) if names]
    attributes = list(dict.fromkeys(name for names in varying for name in names))
    data = []
    for key in keys:
        template = next(traces[key] for traces in keyed if key in traces)
        data.append(keyed[opening].get(key, template | hidden))
    layouts = [
        _flat({name: value for name, value in layout.items() if name != "template"})
        for _, layout in lowered
    ]
    moving = _varying(layouts)
    updates = []
    for entry, layout in zip(flat, layouts, strict=True):
        values = {name: [entry[at].get(name) for at in changed] for name in attributes}
        updates.append([values, {name: layout.get(name) for name in moving}, changed])
    return data, dict(lowered[opening][1]), updates


def _varying(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which some entries differ."""

    def differ(name: str) -> bool:
        first = entries[0].get(name)
        others = (entry.get(name) for entry in entries[1:])
        return any(type(other) is not type(first) or other != first for other in others)

    return [name for name in dict.fromkeys(itertools.chain(*entries)) if differ(name)]


def _keyed(data: Sequence[Trace]) -> dict[tuple[Any, ...], Trace]:
    keyed: dict[tuple[Any, ...], Trace] = {}
    for trace in data:
        key = (trace["xaxis"], trace.get("type"), trace.get("name"))
        count = sum(1 for other in keyed if other[:3] == key)
        keyed[*key, count] = trace
    return keyed


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as a menu's button can hold them.

    Arrays are packed; they and lists, such as those of annotations and shapes, stay whole.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _packed(value)
    return flat


def _packed(value: Any, buffers: list[bytes] | None = None) -> Any:
    """A value as JSON can hold it: arrays in plotly's binary form; see `as_json`."""
    if not isinstance(value, np.ndarray):
        return value
    kind = f"{value.dtype.kind}{value.dtype.itemsize}"
    if kind not in _BINARY:
        return value.tolist()
    content = np.ascontiguousarray(value).tobytes()
    packed: dict[str, Any] = {"dtype": kind}
    if buffers is None:
        packed["bdata"] = base64.b64encode(content).decode()
    else:
        packed["bdata"] = len(buffers)
        buffers.append(content)
    if value.ndim > 1:
        packed["shape"] = ", ".join(map(str, value.shape))
    return packed
