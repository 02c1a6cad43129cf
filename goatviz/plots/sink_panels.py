"""One head among all, as single figures of one pair of axes: what the explorer of sinks shows.

Composed from the same traces as `goatviz.plots.sinks`, in a form that fits a column of a page; what
a caption would say there, the explorer says in words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from goatviz.plots import legacy_marks as marks
from goatviz.plots import sink_marks, sink_view, style
from goatviz.plots.figure import Figure
from goatviz.plots.sink_view import Choice, View

#: Pixels that a panel is high; the overview grows with its layers.
HEIGHT = 470
#: Characters of a subtitle's line that a panel of 340 pixels has room for.
LINE = 50
#: Pixels of a row of the overview, and the most that its plot is high.
ROW, TALLEST = 20, 760
_HEAD = style.LINES[3]


def overview_panel(view: View, chosen: Choice, key: int) -> Figure:
    """Importance of one key in every head; those above the threshold are marked.

    Parameters
    ----------
    view : View
        A whole profile and the threshold.
    chosen : Choice
        The one head that is looked at, framed.
    key : int
        Whose importance; the first key's is the one that makes sinks.
    """
    values = sink_view.key_importance(view, key)
    cells = sink_marks.head_cells(view, values, name="importance", what="importance")
    cells.update(showscale=True, colorbar=sink_marks.weight_bar(view.threshold))
    empty = sink_marks.empty_cells(view, values)
    traces = [cells, *(trace for trace, _ in empty), sink_marks.above_cells(view, values)]
    y, x = sink_marks.head_places(view)
    here = np.zeros(view.present.shape, dtype=bool)
    here[chosen.layer, chosen.heads[0]] = True
    # Dark below white: one of them is seen on every colour.
    for color, width in (("#000000", 5), ("#ffffff", 2.5)):
        frame = marks.frames(x, y, here, name="chosen head", color=color)
        frame.update(line_width=width, showlegend=False)
        traces.append(frame)
    traces += [marks.legend_square(trace.name, color) for trace, color in empty]
    along, upward = sink_marks.head_axes(view)
    text = sink_view.key_text(view, key)
    title = f"Importance of {'the ' if text.startswith('first') else ''}{text}"
    height = max(HEIGHT, min(ROW * len(y), TALLEST) + 200)
    return _panel(traces, along, upward, title, sink_view.overview_lines(view, key), height=height)


def rate_panel(view: View, chosen: Choice) -> Figure:
    """The model's sink rate over the threshold, and the chosen head's."""
    profile = view.profile
    head = marks.curve(
        profile["threshold"].values.astype(np.float64),
        profile["sink_rate"].values[chosen.layer, chosen.heads[0]],
        name=chosen.label,
        color=_HEAD,
        hover=f"{chosen.label}<br>ε = %{{x:.3g}}<br>a sink in %{{y:.4g}} of the inputs",
    )
    ends = np.array([0.0, 1.0])
    line = sink_marks.threshold_line(view, np.full(2, view.threshold), ends)
    line.name = f"ε = {view.threshold:g}"
    traces = [*sink_marks.rate_curves(view), head, line]
    along = {"title_text": "threshold ε [probability]", "range": [0, 1]}
    upward = {"title_text": "sink rate [share]", "range": [0, 1.02]}
    lines = [sink_view.rate_text(view)]
    return _panel(traces, along, upward, "Sink rate over the threshold", lines)


def importance_panel(view: View, chosen: Choice, key: int) -> Figure:
    """Importance of every key in the chosen head, and what uniform attention would give it."""
    keys = view.profile["key"].values
    edges = sink_view.log_bins(keys, sink_marks.MAX_POINTS)
    line = sink_marks.threshold_along_keys(view)
    line.name = f"ε = {view.threshold:g}"
    curves = sink_marks.importance_curves(view, chosen, edges)
    traces = [sink_marks.uniform_curve(view, edges), line, *curves]
    (at,) = np.flatnonzero(keys == key)
    value = view.profile["importance"].values[chosen.layer, chosen.heads[0], at]
    if np.isfinite(value):
        traces.append(
            go.Scatter(
                x=sink_marks.key_places(view, keys[[at]]),
                y=[value],
                name=sink_view.key_text(view, key),
                mode="markers",
                marker={"symbol": "circle-open", "size": 11, "color": _HEAD, "line_width": 2.5},
                hoverinfo="skip",
                # The first key needs no name, and the legend has little room.
                showlegend=key != view.profile.attrs["first_key"],
            )
        )
    lowest = sink_marks.lowest_importance(view, chosen, edges)
    along, upward, room = sink_marks.importance_axes(view, lowest)
    lines = [sink_view.head_text(chosen)]
    if len(edges) - 1 < len(keys):
        lines.append(f"{len(keys):,} keys in {len(edges) - 1} bins: the largest of each")
    return _panel(
        traces, along, upward, "Importance of every key", lines, height=HEIGHT + room, room=room
    )


def signal_panel(view: View, chosen: Choice) -> Figure:
    """Mass of the first key over the content range of the query, in the chosen head."""
    counts = sink_view.signal_of(view.profile, chosen).count
    most = float(counts.max(initial=0.0))
    lines = [sink_view.head_text(chosen)]
    traces: list[go.Trace] = []
    if most > 0:
        bar = marks.count_bar(most, title="queries", thickness=12)
        traces = [bar, *sink_marks.signal_traces(view, chosen, most)]
        lines.append(sink_view.margin_text(view.profile, chosen))
    else:
        lines.append("no query sees two keys, the first among them")
    along, upward = sink_marks.SIGNAL_AXES
    return _panel(traces, along, upward, "Signal against sink", lines)


def _panel(
    traces: Sequence[go.Trace],
    along: dict[str, object],
    upward: dict[str, object],
    title: str,
    lines: Sequence[str],
    *,
    height: int = HEIGHT,
    room: int = 0,
) -> Figure:
    """Lay the panel out by pixels: title and subtitle, plot, axis with `room`, legend.

    A figure is made at once: every later change would cost milliseconds, and a slider waits.
    """
    wrapped = [part for line in lines if line for part in textwrap.wrap(line, LINE)]
    entries = {
        trace.name
        for trace in traces
        if isinstance(trace, go.Scatter) and trace.showlegend is not False
    }
    # Two entries in a row have room in the narrowest panel.
    top, axis, legend = 48 + 15 * len(wrapped), 56 + room, 19 * -(-len(entries) // 2)
    layout = {
        "template": style.TEMPLATE,
        "title": {
            "text": title,
            "subtitle": {"text": "<br>".join(style.escape(part) for part in wrapped)},
            "yref": "container",
            "y": 1.0,
            "yanchor": "top",
            "pad": {"t": 14},
        },
        "xaxis": along,
        "yaxis": upward,
        "height": height,
        "margin": {"t": top, "l": 56, "r": 20, "b": axis + legend},
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "x": 0.0,
            "y": 0.0,
            "yref": "container",
            "yanchor": "bottom",
            "itemsizing": "constant",
            "font": {"size": 11},
        },
    }
    return Figure(go.Figure(data=list(traces), layout=layout))
