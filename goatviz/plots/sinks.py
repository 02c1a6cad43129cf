"""Figures of attention sinks: which heads have one, on which key, how often, and with what signal.

Everything is drawn from a "sink_profile" result. Layer and head are chosen inside the figure;
what does not fit is pooled or left out of the menu, and the caption says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from goatviz.plots import legacy_marks as marks
from goatviz.plots import sink_marks, sink_view, style
from goatviz.plots.figure import Figure
from goatviz.plots.menus import add_choices
from goatviz.plots.sink_marks import MAX_POINTS
from goatviz.plots.sink_view import Choice, View
from goatviz.results import SINK_PROFILE, check_result

#: Cells of all maps of a figure together, and along one side of one map.
MAX_CELLS, MAX_SIDE = 220_000, 160
#: Layers that a legend can hold; more are told by a colour bar.
MAX_LEGEND = 6
#: Characters of a caption's line that a narrow page (900 pixels) can show.
LINE = 128

#: Pixels between the menu and the plot.
_PAD = 24


def draw_sinks(
    profile: xr.Dataset,
    *,
    kind: str = "overview",
    threshold: float | None = None,
    layer: int | None = None,
) -> Figure:
    """Draw a sink profile.

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.sink_profile`, or a selection from it.
    kind : {"overview", "profile", "rate", "signal", "logits", "probabilities"}
        All heads at a glance; the importance of every key; the sink rate over the threshold; the
        first key's mass over the content range, inside the bounds of the prior; the mean logits
        or mean weights, as maps of query and key.
    threshold : float, optional
        Importance above which (strictly) a key is a sink; default the profile's own.
    layer : int, optional
        Draw this layer only; default all. A rate of the model stays that of all its layers.

    Returns
    -------
    Figure
        A plotly Figure below 2 MB; nothing is shown, saved or computed.

    Raises
    ------
    TypeError
        If `profile` is not a sink profile, or `threshold` no number.
    ValueError
        If `kind` is unknown, `threshold` is outside [0, 1), the profile lacks this layer or has no
        head, or a map is asked of a profile without maps.
    """
    check_result(profile, SINK_PROFILE)
    if kind not in SINK_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SINK_KINDS)}, got {kind!r}")
    if threshold is None:
        threshold = profile.attrs["threshold"]
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}")
    profile = sink_view.with_all_dimensions(profile)
    if layer is not None:
        layers = profile["layer"].values
        if isinstance(layer, bool) or layer not in layers.tolist():
            raise ValueError(f"layer must be one of {sink_view.listed(layers)}, got {layer!r}")
        profile = profile.sel(layer=[layer])
    if not profile["present"].values.any():
        raise ValueError("profile holds no head that is present")
    return _DRAWINGS[kind](View(profile, float(threshold), layer))


def _draw_overview(view: View) -> Figure:
    profile = view.profile
    panels = [
        ("First key: importance", "importance", sink_view.first_importance(view)),
        ("Largest weight", "mean weight", profile["largest_mass"].values),
        (f"Last {profile.attrs['recent']:,} keys", "mean weight", profile["recent_mass"].values),
    ]
    column = profile["sink_column_mass"].values
    if np.any(column[view.present & np.isfinite(column)] != 0):
        panels.append(("Extra sink column", "mean weight", column))
    rows, cols = (1, 3) if len(panels) == 3 else (2, 2)
    one = int(np.clip(24 * profile.sizes["layer"], 200, 900))
    height = one * rows + 90 * (rows - 1)
    figure = Figure(
        make_subplots(
            rows=rows,
            cols=cols,
            horizontal_spacing=0.04,
            vertical_spacing=90 / height if rows > 1 else None,
            subplot_titles=[panel[0] for panel in panels],
        )
    )
    heads, layers = sink_marks.head_axes(view)
    legend: dict[str, str] = {}
    for at, (title, what, values) in enumerate(panels):
        place = {"row": at // cols + 1, "col": at % cols + 1}
        cells = sink_marks.head_cells(view, values, name=title, what=what)
        if at == 0:
            cells.update(showscale=True, colorbar=sink_marks.weight_bar(view.threshold))
        figure.add_trace(cells, **place)
        for empty, color in sink_marks.empty_cells(view, values):
            legend[empty.name] = color
            figure.add_trace(empty, **place)
        if at == 0:
            figure.add_trace(sink_marks.above_cells(view, values), **place)
        figure.update_xaxes(**heads, **place)
        figure.update_yaxes(**layers, **place)
        if place["col"] > 1:
            figure.update_yaxes(title_text="", showticklabels=False, **place)
    for name, color in legend.items():
        figure.add_trace(marks.legend_square(name, color))
    figure.update_layout(
        title={"text": "Attention sinks", "subtitle": {"text": sink_view.rate_text(view)}},
        legend={"itemsizing": "constant"},
    )
    lines = [f"all panels on one scale, mean over the inputs; {sink_view.interval_text(view)}"]
    return _finish(figure, view, height=height, top=120, lines=lines)


def _draw_profile(view: View) -> Figure:
    profile, attrs = view.profile, view.profile.attrs
    choices, lines = sink_view.choices_of(view)
    keys = profile["key"].values
    edges = sink_view.log_bins(keys, MAX_POINTS if len(choices) <= 12 else MAX_POINTS * 3 // 5)
    figure = Figure()
    figure.add_trace(sink_marks.uniform_curve(view, edges))
    figure.add_trace(sink_marks.threshold_along_keys(view))
    add_choices(
        figure,
        choices,
        lambda choice: sink_marks.importance_curves(view, choice, edges),
        "Importance of each key",
        pad=_PAD,
    )
    lowest = min(sink_marks.lowest_importance(view, choice, edges) for choice in choices)
    along, upward, room = sink_marks.importance_axes(view, lowest)
    figure.update_xaxes(**along)
    figure.update_yaxes(**upward)
    length = attrs["length"]
    uniform = f"1/{length:,}"
    if attrs["causal"]:
        uniform = f"mean of 1/(i + 1) over queries i = j … {length - 1:,}"
    lines.append(sink_view.interval_text(view))
    lines.append(f"importance: mean weight over the queries that see the key; dashed: {uniform}")
    if len(edges) - 1 < len(keys):
        lines.append(
            f"{len(keys):,} keys pooled to {len(edges) - 1} bins: each point is the largest "
            "importance in its bin, at its key"
        )
    if np.isnan(profile["importance"].values[view.present]).any():
        lines.append(f"no value for keys seen by fewer than {attrs['min_observers']:,} queries")
    return _finish(figure, view, height=400, top=110, room=room, lines=lines)


def _draw_rate(view: View) -> Figure:
    profile = view.profile
    thresholds = profile["threshold"].values.astype(np.float64)
    rates = np.where(view.present[..., None], profile["sink_rate"].values, np.nan)
    layers = profile["layer"].values
    if view.layer is None:
        part, curves = (
            "layer",
            {f"layer {n}": sink_view.mean_of_finite(r) for n, r in zip(layers, rates, strict=True)},
        )
    else:
        part = "head"
        curves = {
            f"layer {layers[0]}, head {profile['head'].values[at]}": rates[0, at]
            for at in np.flatnonzero(view.present[0])
        }
    colors, bar = _along(list(curves))
    figure = Figure()
    for (name, rate), color in zip(curves.items(), colors, strict=True):
        figure.add_trace(
            marks.curve(
                thresholds,
                rate,
                name=name,
                color=color,
                width=1.0,
                hover=f"{name}<br>ε = %{{x:.3g}}<br>sink rate %{{y:.4g}}",
                showlegend=len(curves) <= MAX_LEGEND,
            )
        )
    if bar is not None:
        ids = layers if part == "layer" else profile["head"].values[view.present[0]]
        figure.add_trace(_order_bar(part, ids, bar))
    figure.add_traces(sink_marks.rate_curves(view))
    line = sink_marks.threshold_line(view, np.full(2, view.threshold), np.array([0.0, 1.0]))
    figure.add_trace(line)
    figure.update_xaxes(title_text="threshold ε [probability]", range=[0, 1])
    figure.update_yaxes(title_text="sink rate [share of inputs × heads]", range=[0, 1.02])
    figure.update_layout(
        title={"text": "Sink rate", "subtitle": {"text": sink_view.rate_text(view)}}
    )
    lines = [
        sink_view.interval_text(view),
        "sink: the first key's importance exceeds ε; dashed: any key's does, mean over the heads "
        "drawn",
        "thin: each layer, mean over its heads" if part == "layer" else "thin: each head",
    ]
    return _finish(figure, view, height=420, top=90, lines=lines)


def _draw_signal(view: View) -> Figure:
    profile = view.profile
    singles, lines = sink_view.choices_of(view)
    last = max(layer for layer, _ in view.heads)
    whole = Choice(
        f"layer {profile['layer'].values[last]}, all heads",
        str(profile["layer_name"].values[last]),
        last,
        tuple(head for layer, head in view.heads if layer == last),
    )
    choices = [whole, *singles] if len(view.heads) > 1 else singles
    signals = [sink_view.signal_of(profile, choice) for choice in choices]
    most = max(signal.count.max(initial=0.0) for signal in signals)
    first = sink_view.first_key_text(view)
    figure = Figure()
    figure.add_annotation(
        text="",
        x=0.0,
        y=1.0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        yshift=4,
        showarrow=False,
    )
    figure.add_trace(marks.count_bar(most, title="queries", thickness=12))
    add_choices(
        figure,
        choices,
        lambda choice: sink_marks.signal_traces(view, choice, most),
        "Signal and sink",
        pad=_PAD,
        note=lambda choice: sink_view.margin_text(profile, choice),
    )
    along, upward = sink_marks.SIGNAL_AXES
    figure.update_xaxes(**along)
    figure.update_yaxes(**upward)
    lines.append(f"grey: queries by content range and by the mass of the {first}")
    if any(np.isfinite(signal.lower).all() for signal in signals):
        lines.append(
            f"orange: the exact range of the {first}'s mass over all contents of range w, "
            "σ(logit π ∓ w), π its least and its largest prior mass; the paper's looser form is "
            "π·exp(∓w)"
        )
    if len(choices) > len(singles):
        lines.append("all heads: counts are summed, means weighted by them, bounds the outermost")
    return _finish(figure, view, height=440, top=125, lines=lines)


def _draw_logits(view: View) -> Figure:
    return _draw_maps(view, "map_logits", "Mean attention logits", "logit {value} nats")


def _draw_probabilities(view: View) -> Figure:
    return _draw_maps(view, "map_probability", "Mean attention probabilities", "weight {value}")


def _draw_maps(view: View, field: str, title: str, what: str) -> Figure:
    profile = view.profile
    if field not in profile:
        raise ValueError(f"profile holds no {field}: pass maps=True to sink_profile")
    choices, lines = sink_view.choices_of(view)
    side = min(MAX_SIDE, int((MAX_CELLS / len(choices)) ** 0.5))
    positions = [profile[dim].values for dim in ("map_query", "map_key")]
    bins = [sink_view.even_bins(len(each), side) for each in positions]
    queries, keys = (each[b[:-1]] for each, b in zip(positions, bins, strict=True))
    pooled = (len(queries), len(keys)) != (len(positions[0]), len(positions[1]))
    texts = None if pooled else sink_view.map_tokens(profile, queries, keys)
    if texts is None:
        cell = "query %{y}, key %{x}" + (" (first of its bin)" if pooled else "")
    else:
        cell = "query %{y:,d} “%{y}”, key %{x:,d} “%{x}”"

    def traces(choice: Choice) -> list[go.Heatmap]:
        data = profile.isel(layer=choice.layer, head=choice.heads[0])
        values = data[field].values.astype(np.float64)
        if "map_allowed" in profile:
            allowed = data["map_allowed"].values.astype(bool)
        else:
            allowed = np.isfinite(values)
        values, allowed = (
            sink_view.pooled_mean(values, allowed, *bins) if pooled else (values, allowed)
        )
        shown = np.where(allowed, values, np.nan)
        hover = f"{choice.label}<br>{cell}<br>{what}"
        if field == "map_logits":
            bar = {"title": "nats", "thickness": 12}
            drawn = marks.signed_map(keys, queries, shown, hover=hover, bar=bar, name="logit")
        else:
            drawn = marks.probability_map(keys, queries, shown, hover=hover, name="probability")
        return [drawn, *marks.special_cells(keys, queries, values, allowed)]

    figure = Figure()
    if field == "map_probability":
        figure.add_trace(marks.probability_bar(thickness=12))
    add_choices(figure, choices, traces, title, pad=_PAD)
    figure.update_xaxes(title_text="key j [tokens]", tickformat=",d", showgrid=False)
    figure.update_yaxes(
        title_text="query i [tokens]", tickformat=",d", showgrid=False, autorange="reversed"
    )
    room = 0
    if texts is not None:
        room = sink_view.token_room(texts[1])
        figure.update_yaxes(**sink_view.token_ticks(queries, texts[0], 17))
        figure.update_xaxes(**sink_view.token_ticks(keys, texts[1], 18), tickangle=90)
    if view.profile.attrs["n_inputs"] > 1:
        lines.append("mean over the inputs")
    if pooled:
        lines.append(
            f"pooled from {len(positions[0])} × {len(positions[1])}: mean over the allowed cells "
            "of each bin; fewer heads (layer=) are drawn finer"
        )
    return _finish(figure, view, height=560, top=110, room=room, lines=lines)


_DRAWINGS: dict[str, Callable[[View], Figure]] = {
    "overview": _draw_overview,
    "profile": _draw_profile,
    "rate": _draw_rate,
    "signal": _draw_signal,
    "logits": _draw_logits,
    "probabilities": _draw_probabilities,
}
SINK_KINDS = tuple(_DRAWINGS)


# --- pieces of figures ---


def _along(names: Sequence[str]) -> tuple[list[str], list[list] | None]:
    """Colours of curves in an order, and their scale if they are too many for a legend."""
    if len(names) <= MAX_LEGEND:
        return [style.LINES[(at + 3) % len(style.LINES)] for at in range(len(names))], None
    # Neither the darkest nor the brightest: both grounds must show every curve.
    places = np.linspace(0.2, 0.85, len(names))
    colors = [sample_colorscale(style.SEQUENTIAL, float(place))[0] for place in places]
    return colors, [[at / (len(colors) - 1), color] for at, color in enumerate(colors)]


def _order_bar(name: str, ids: np.ndarray, scale: list[list]) -> go.Scatter:
    ticks = sink_view.id_ticks(np.arange(len(ids)), ids)
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "color": [0.0],
            "colorscale": scale,
            "cmin": 0.0,
            "cmax": float(len(ids) - 1),
            "showscale": True,
            "colorbar": {"title": name, "thickness": 12, **ticks},
        },
        showlegend=False,
        hoverinfo="skip",
        name=f"{name} bar",
    )


def _in_legend(trace: go.Trace) -> bool:
    return isinstance(trace, go.Scatter) and trace.showlegend is not False


def _finish(
    figure: Figure,
    view: View,
    *,
    height: int,
    top: int,
    lines: Sequence[str],
    room: int = 0,
) -> Figure:
    """Lay the figure out by pixels: `top`, plot, `room` and titles of the axis, legend, caption."""
    attrs = view.profile.attrs
    shortest, longest = attrs["length_min"], attrs["length"]
    lengths = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    about = [
        attrs["source"],
        f"{sink_view.inputs_text(attrs['n_inputs'])} of {lengths} tokens",
        "causal" if attrs["causal"] else "not causal",
        "no explicit prior" if attrs["prior"] == "none" else f"prior: {attrs['prior']}",
    ]
    notes = [f"⚠ {note}" for note in attrs["notes"].split(" | ") if note.strip()]
    wrapped = [
        style.escape(part)
        for line in [" · ".join(about), *lines, *notes]
        for part in textwrap.wrap(line, LINE)
    ]
    below = 56 + room
    entries = {trace.name for trace in figure.data if _in_legend(trace)}
    # A page of 900 pixels shows four entries in a row.
    legend = 14 + 19 * -(-len(entries) // 4)
    figure.update_layout(
        template=style.TEMPLATE,
        height=top + height + below + legend + 15 * len(wrapped) + 16,
        showlegend=True,
        margin={"t": top, "b": below + legend + 15 * len(wrapped) + 16, "l": 70, "r": 80},
        legend={
            "orientation": "h",
            "x": 0.0,
            "y": -below / height,
            "yanchor": "top",
        },
    )
    figure.add_annotation(marks.caption("<br>".join(wrapped), yshift=-below - legend))
    return figure
