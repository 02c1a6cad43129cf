"""Traces and axes of a sink profile: what the figures and the explorer of sinks are composed of.

They draw one thing each, and know nothing of menus, subplots or captions.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from goatviz.plots import legacy_marks as marks
from goatviz.plots import sink_view, style
from goatviz.plots.sink_view import Choice, View

#: Points of one importance curve; longer inputs are pooled.
MAX_POINTS = 400
#: More keys than this are drawn on logarithmic axes.
MAX_LINEAR = 64
#: Keys along a curve that still have room for their token.
MAX_TOKENS = 40
#: Layers and heads whose cells still have room for a number.
MAX_NUMBERS = 12
#: Layers and heads whose cells can be framed; in smaller cells a sink is a dot.
MAX_FRAMES = 24
#: Where the axes of importances and their intervals end, if they are logarithmic.
FLOOR = 1e-7
#: What stands for sinks.
SINK = style.LINES[1]


# --- layers x heads ---


def head_places(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Where layers and heads stand along their axes."""
    return (
        sink_view.places(view.profile["layer"].values),
        sink_view.places(view.profile["head"].values),
    )


def head_cells(view: View, values: np.ndarray, *, name: str, what: str) -> go.Heatmap:
    """A value in [0, 1] of every head, as a map of layers and heads, without its colour bar."""
    y, x = head_places(view)
    present = view.present
    z = marks.finite_or_empty(np.where(present, values, np.nan))
    numbers = max(present.shape) <= MAX_NUMBERS
    where, pairs = _pairs(view)
    gap = _gap(view)
    return go.Heatmap(
        x=marks.compact(x),
        y=marks.compact(y),
        z=z,
        customdata=pairs,
        text=sink_view.cell_texts(z) if numbers else None,
        texttemplate="%{text}" if numbers else None,
        textfont={"size": 9 if len(x) > 8 else 11},
        colorscale=style.SEQUENTIAL,
        zmin=0.0,
        zmax=1.0,
        showscale=False,
        name=name,
        hovertemplate=f"{where}<br>{what} %{{z:.4g}}<extra></extra>",
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
    )


def empty_cells(view: View, values: np.ndarray) -> list[tuple[go.Heatmap, str]]:
    """Cells without a value, by the reason, each with its colour."""
    y, x = head_places(view)
    present = view.present
    where, pairs = _pairs(view)
    gap = _gap(view)
    found = []
    for name, cells, color in (
        ("no such head", ~present, style.MASKED),
        ("no value", present & ~np.isfinite(values), style.NOT_A_NUMBER),
    ):
        if cells.any():
            trace = go.Heatmap(
                x=marks.compact(x),
                y=marks.compact(y),
                z=np.where(cells, np.float32(1), np.float32(np.nan)),
                customdata=pairs,
                colorscale=[[0, color], [1, color]],
                showscale=False,
                name=name,
                hovertemplate=f"{where}<br>{name}<extra></extra>",
                hoverongaps=False,
                xgap=gap,
                ygap=gap,
            )
            found.append((trace, color))
    return found


def above_cells(view: View, values: np.ndarray) -> go.Scatter:
    """A mark in every head whose value exceeds the threshold."""
    y, x = head_places(view)
    z = marks.finite_or_empty(np.where(view.present, values, np.nan))
    mark = marks.frames if max(view.present.shape) <= MAX_FRAMES else marks.dots
    name = f"importance above ε = {view.threshold:g}"
    return mark(x, y, np.nan_to_num(z) > view.threshold, name=name, color=SINK)


def head_axes(view: View) -> tuple[dict[str, object], dict[str, object]]:
    """The axis of heads and that of layers, the first layer on top."""
    y, x = head_places(view)
    heads = {
        "title_text": "head",
        "showgrid": False,
        "range": [x[0] - 0.5, x[-1] + 0.5],
        **sink_view.id_ticks(x, view.profile["head"].values),
    }
    layers = {
        "title_text": "layer",
        "showgrid": False,
        "range": [y[-1] + 0.5, y[0] - 0.5],
        **sink_view.id_ticks(y, view.profile["layer"].values),
    }
    return heads, layers


def weight_bar(threshold: float) -> dict[str, object]:
    """A colour bar from 0 to 1 with the threshold among its ticks."""
    ticks = [at for at in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(at - threshold) > 0.1]
    return {
        "title": "prob.",
        "thickness": 12,
        "x": 1.01,
        "tickvals": [*ticks, threshold],
        "ticktext": [*(f"{at:g}" for at in ticks), f"ε = {threshold:g}"],
    }


def _pairs(view: View) -> tuple[str, np.ndarray | None]:
    """How a hover text names a cell's layer and head, and the names it needs for that."""
    layers, heads = view.profile["layer"].values, view.profile["head"].values
    y, x = head_places(view)
    if np.array_equal(x, heads) and np.array_equal(y, layers):
        return "layer %{y}, head %{x}", None
    pairs = np.stack(np.meshgrid(layers, heads, indexing="ij"), axis=-1).astype(np.int32)
    return "layer %{customdata[0]}, head %{customdata[1]}", pairs


def _gap(view: View) -> int:
    return 1 if max(view.present.shape) <= MAX_FRAMES else 0


# --- over the threshold ---


def threshold_line(view: View, x: np.ndarray, y: np.ndarray) -> go.Scatter:
    """The threshold, across whatever it is compared with."""
    name = f"threshold ε = {view.threshold:g}"
    return marks.curve(x, y, name=name, color=SINK, dash="dot", width=1.5, hover=name)


def rate_curves(view: View) -> list[go.Scatter]:
    """The model's sink rate over the threshold, its interval below it, and that at any key."""
    profile = view.profile
    thresholds = profile["threshold"].values.astype(np.float64)
    any_rate = sink_view.mean_of_finite(
        np.where(view.present[..., None], profile["any_sink_rate"].values, np.nan), (0, 1)
    )
    low, high = (profile[f"model_sink_rate_{end}"].values for end in ("low", "high"))
    inside = np.isfinite(low) & np.isfinite(high)
    color = style.LINES[0]
    drawn = []
    if inside.any():
        drawn.append(
            marks.band(
                thresholds[inside],
                low[inside],
                high[inside],
                name=f"{sink_view.confidence_text(view)} interval",
                color=color,
            )
        )
    drawn.append(
        marks.curve(
            thresholds,
            any_rate,
            name="a sink at any key",
            color=style.LINES[2],
            dash="dash",
            hover="ε = %{x:.3g}<br>a sink at any key %{y:.4g}",
        )
    )
    hover = "model<br>ε = %{x:.3g}<br>sink rate %{y:.4g}"
    if inside.any():
        hover += " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
    drawn.append(
        marks.curve(
            thresholds,
            profile["model_sink_rate"].values,
            name="model",
            color=color,
            width=3.5,
            hover=hover,
            customdata=np.stack([low, high], axis=-1).astype(np.float32),
        )
    )
    return drawn


# --- over the keys ---


def is_logarithmic(view: View) -> bool:
    """Whether there are so many keys that their axis is logarithmic in key + 1."""
    return view.profile.sizes["key"] > MAX_LINEAR


def key_places(view: View, keys: np.ndarray) -> np.ndarray:
    """Where keys stand along their axis."""
    return keys + 1 if is_logarithmic(view) else keys


def importance_curves(view: View, choice: Choice, edges: np.ndarray) -> list[go.Scatter]:
    """The importance of every key for one head, its interval below it.

    Keys are pooled between `edges` (as indices): of each bin the largest importance is drawn, at
    its key.
    """
    profile = view.profile
    keys = profile["key"].values
    tokens = profile["token"].values if "token" in profile else None
    pooled = len(edges) - 1 < len(keys)
    data = profile.isel(layer=choice.layer, head=choice.heads[0])
    value = data["importance"].values.astype(np.float64)
    at = sink_view.largest(value, edges)
    low, high = (data[f"importance_{end}"].values[at] for end in ("low", "high"))
    columns = [keys[at], keys[edges[:-1]], keys[edges[1:] - 1], data["observers"].values[at]]
    hover = f"{choice.label}<br>key %{{customdata[0]:,d}}"
    if tokens is not None:
        hover += " “%{text}”"
    if pooled:
        hover += ", the largest of %{customdata[1]:,d} to %{customdata[2]:,d}"
    hover += "<br>importance %{y:.4g}"
    if np.isfinite(profile["importance_low"].values).any():
        hover += " [%{customdata[4]:.4g}, %{customdata[5]:.4g}]"
        columns += [low, high]
    hover += "<br>seen by %{customdata[3]:,d} queries"
    drawn = []
    inside = np.isfinite(low) & np.isfinite(high)
    if inside.any():
        floor = FLOOR if is_logarithmic(view) else -np.inf
        drawn.append(
            marks.band(
                key_places(view, keys[at][inside]),
                np.maximum(low[inside], floor),
                np.maximum(high[inside], floor),
                name=f"{sink_view.confidence_text(view)} interval",
                color=style.LINES[0],
            )
        )
    drawn.append(
        marks.curve(
            key_places(view, keys[at]),
            value[at],
            name="importance",
            color=style.LINES[0],
            hover=hover,
            customdata=np.stack(columns, axis=-1).astype(np.float32),
            text=None if tokens is None else [sink_view.shortened(tokens[i]) for i in at],
        )
    )
    return drawn


def uniform_curve(view: View, edges: np.ndarray) -> go.Scatter:
    """Importance under uniform attention, at the first key of every bin and at the last key."""
    keys, attrs = view.profile["key"].values, view.profile.attrs
    reference = np.unique(np.concatenate([keys[edges[:-1]], keys[-1:]]))
    return marks.curve(
        key_places(view, reference),
        sink_view.uniform_importance(reference, attrs["length"], causal=bool(attrs["causal"])),
        name="uniform attention",
        color=style.INK,
        dash="dash",
        width=1.5,
        hover="key %{customdata:,d}<br>under uniform attention %{y:.4g}",
        customdata=marks.compact(reference),
    )


def threshold_along_keys(view: View) -> go.Scatter:
    """The threshold from the first key to the last."""
    keys = view.profile["key"].values
    ends = key_places(view, np.array([keys[0], keys[-1]]))
    return threshold_line(view, ends, np.full(2, view.threshold))


def importance_axes(view: View, lowest: float) -> tuple[dict[str, object], dict[str, object], int]:
    """The axis of keys, that of importances down to `lowest`, and pixels that tokens need."""
    keys = view.profile["key"].values
    tokens = view.profile["token"].values if "token" in view.profile else None
    along: dict[str, object] = {}
    upward: dict[str, object] = {"title_text": "importance [probability]"}
    name, room = "key j [tokens]", 0
    if tokens is not None and len(keys) <= MAX_TOKENS:
        room = sink_view.token_room(tokens)
        along |= {**sink_view.token_ticks(keys, tokens, 15), "tickangle": 90}
    elif is_logarithmic(view):
        wanted = sink_view.log_ticks(keys)
        along |= {
            "tickvals": (wanted + 1).tolist(),
            "ticktext": [f"{key:,}" for key in wanted],
        }
    else:
        along["tickformat"] = ",d"
    if is_logarithmic(view):
        along["type"] = "log"
        bottom = max(min(lowest / 2, 1e-2), FLOOR)
        upward |= {"type": "log", "dtick": 1, "range": [float(np.log10(bottom)), 0.15]}
        name += " (logarithmic in j + 1)"
    else:
        upward["rangemode"] = "tozero"
    return {"title_text": name, **along}, upward, room


def lowest_importance(view: View, choice: Choice, edges: np.ndarray) -> float:
    """The least positive importance that is drawn of a head; infinity where there is none."""
    value = view.profile["importance"].values[choice.layer, choice.heads[0]].astype(np.float64)
    drawn = value[sink_view.largest(value, edges)]
    return float(drawn[drawn > 0].min(initial=np.inf))


# --- over the content range ---


def signal_traces(view: View, choice: Choice, most: float) -> list[go.Trace]:
    """Queries by content range and first key's mass, bounds of that mass, and means of masses."""
    signal = sink_view.signal_of(view.profile, choice)
    first = sink_view.first_key_text(view)
    drawn: list[go.Trace] = [
        marks.count_map(
            signal.range_edges,
            signal.mass_edges,
            signal.count.T,
            most=most,
            hover=(
                f"{choice.label}<br>content range about %{{x:.3g}}, {first}'s mass about "
                "%{y:.3g}<br>{value} queries"
            ),
            name="queries",
        )
    ]
    for name, dash, y in (
        ("lowest possible", "dash", signal.lower),
        ("highest possible", "dashdot", signal.upper),
    ):
        if np.isfinite(y).all():
            drawn.append(
                marks.curve(
                    signal.centres,
                    y,
                    name=name,
                    color=style.LINES[4],
                    dash=dash,
                    hover=f"{choice.label}<br>content range %{{x:.3g}}<br>{name} %{{y:.4g}}",
                )
            )
    for name, color, dash, y in (
        (f"{first} (mean)", SINK, "solid", signal.first),
        ("largest (mean)", style.LINES[0], "longdash", signal.largest),
        (f"last {view.profile.attrs['recent']:,} (mean)", style.LINES[2], "dot", signal.recent),
    ):
        drawn.append(
            marks.curve(
                signal.centres,
                y,
                name=name,
                color=color,
                dash=dash,
                width=2.5,
                hover=f"{choice.label}<br>content range %{{x:.3g}}<br>{name} %{{y:.4g}}",
                marker={"size": 4, "color": color},
            )
        )
        # A bin without neighbours would be a line without length.
        drawn[-1].mode = "lines+markers"
    return drawn


SIGNAL_AXES: tuple[dict[str, object], dict[str, object]] = (
    {"title_text": "content range of the query [score]"},
    {"title_text": "weight [probability]", "range": [-0.02, 1.02]},
)
