"""Figures of attention sinks: which heads have one, on which key, how often, and with what signal.

Everything is drawn from a "sink_profile" result. Layer and head are chosen inside the figure;
what does not fit is pooled or left out of the menu, and the caption says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from unicodedata import east_asian_width

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from goatviz.plots import marks, style
from goatviz.plots.figure import Figure
from goatviz.results import SINK_PROFILE, check_result

#: A menu of more entries than this is no longer a menu, and the page no longer light.
MAX_CHOICES = 48
#: Points of one importance curve; longer inputs are pooled.
MAX_POINTS = 400
#: More keys than this are drawn on logarithmic axes.
MAX_LINEAR = 64
#: Keys along a curve, and along one side of a map, that still have room for their token.
MAX_TOKENS, MAX_MAP_TOKENS = 40, 32
#: Cells of all maps of a figure together, and along one side of one map.
MAX_CELLS, MAX_SIDE = 220_000, 160
#: Bins along one side of a density.
MAX_BINS = 64
#: Layers and heads whose cells still have room for a number.
MAX_NUMBERS = 12
#: Layers and heads whose cells can be framed; in smaller cells a sink is a dot.
MAX_FRAMES = 24
#: Layers that a legend can hold; more are told by a colour bar.
MAX_LEGEND = 6
#: Characters of a caption's line that a narrow page (900 pixels) can show.
LINE = 128

#: Where the axes of importances and their intervals end, if they are logarithmic.
FLOOR = 1e-7

_SINK = style.LINES[1]


@dataclass(frozen=True)
class _View:
    """What is asked for: a profile with all its dimensions, and how to look at it."""

    profile: xr.Dataset
    threshold: float
    layer: int | None

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Indices of the heads that are present, in order."""
        return [(int(a), int(b)) for a, b in np.argwhere(self.profile["present"].values)]


@dataclass(frozen=True)
class _Choice:
    """One entry of a menu: some heads (indices) of one layer, drawn as one."""

    label: str
    name: str
    layer: int
    heads: tuple[int, ...]

    @property
    def subtitle(self) -> str:
        return f"{self.label} ({style.escape(self.name)})"


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
    profile = _with_all_dimensions(profile)
    if layer is not None:
        layers = profile["layer"].values
        if isinstance(layer, bool) or layer not in layers.tolist():
            raise ValueError(f"layer must be one of {_listed(layers)}, got {layer!r}")
        profile = profile.sel(layer=[layer])
    if not profile["present"].values.any():
        raise ValueError("profile holds no head that is present")
    return _DRAWINGS[kind](_View(profile, float(threshold), layer))


def _draw_overview(view: _View) -> Figure:
    profile = view.profile
    present = profile["present"].values.astype(bool)
    panels = [
        ("First key: importance", "importance", _mean(profile["first_importance"].values)),
        ("Largest weight", "mean weight", profile["largest_mass"].values),
        (f"Last {profile.attrs['recent']:,} keys", "mean weight", profile["recent_mass"].values),
    ]
    column = profile["sink_column_mass"].values
    if np.any(column[present & np.isfinite(column)] != 0):
        panels.append(("Extra sink column", "mean weight", column))
    rows, cols = (1, 3) if len(panels) == 3 else (2, 2)
    layers, heads = profile["layer"].values, profile["head"].values
    y, x = _evenly(layers), _evenly(heads)
    one = int(np.clip(24 * len(layers), 200, 900))
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
    where, pairs = "layer %{y}, head %{x}", None
    if not (np.array_equal(x, heads) and np.array_equal(y, layers)):
        pairs = np.stack(np.meshgrid(layers, heads, indexing="ij"), axis=-1).astype(np.int32)
        where = "layer %{customdata[0]}, head %{customdata[1]}"
    gap = 1 if max(present.shape) <= MAX_FRAMES else 0
    legend: dict[str, str] = {}
    for at, (title, what, values) in enumerate(panels):
        place = {"row": at // cols + 1, "col": at % cols + 1}
        z = marks.finite_or_empty(np.where(present, values, np.nan))
        numbers = max(present.shape) <= MAX_NUMBERS
        figure.add_trace(
            go.Heatmap(
                x=marks.compact(x),
                y=marks.compact(y),
                z=z,
                customdata=pairs,
                text=_cell_texts(z) if numbers else None,
                texttemplate="%{text}" if numbers else None,
                textfont={"size": 9 if len(heads) > 8 else 11},
                colorscale=style.SEQUENTIAL,
                zmin=0.0,
                zmax=1.0,
                showscale=at == 0,
                colorbar=_weight_bar(view.threshold),
                name=title,
                hovertemplate=f"{where}<br>{what} %{{z:.4g}}<extra></extra>",
                hoverongaps=False,
                xgap=gap,
                ygap=gap,
            ),
            **place,
        )
        for name, cells, color in (
            ("no such head", ~present, style.MASKED),
            ("no value", present & np.isnan(z), style.NOT_A_NUMBER),
        ):
            if cells.any():
                legend[name] = color
                figure.add_trace(
                    go.Heatmap(
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
                    ),
                    **place,
                )
        if at == 0:
            mark = marks.frames if max(present.shape) <= MAX_FRAMES else marks.dots
            name = f"importance above ε = {view.threshold:g}"
            above = np.nan_to_num(z) > view.threshold
            figure.add_trace(mark(x, y, above, name=name, color=_SINK), **place)
        figure.update_xaxes(title_text="head", **_ids(x, heads), **place)
        figure.update_yaxes(title_text="layer", **_ids(y, layers), **place)
        if place["col"] > 1:
            figure.update_yaxes(title_text="", showticklabels=False, **place)
    for name, color in legend.items():
        figure.add_trace(marks.legend_square(name, color))
    figure.update_xaxes(showgrid=False, range=[x[0] - 0.5, x[-1] + 0.5])
    figure.update_yaxes(showgrid=False, range=[y[-1] + 0.5, y[0] - 0.5])
    figure.update_layout(
        title={"text": "Attention sinks", "subtitle": {"text": _rate_text(view)}},
        legend={"itemsizing": "constant"},
    )
    lines = [f"all panels on one scale, mean over the inputs; {_interval_text(view)}"]
    return _finish(figure, view, height=height, top=120, lines=lines)


def _draw_profile(view: _View) -> Figure:
    profile, attrs = view.profile, view.profile.attrs
    choices, lines = _menu(view)
    keys = profile["key"].values
    tokens = profile["token"].values if "token" in profile else None
    logarithmic = len(keys) > MAX_LINEAR
    edges = _log_bins(keys, MAX_POINTS if len(choices) <= 12 else MAX_POINTS * 3 // 5)
    pooled = len(edges) - 1 < len(keys)
    has_interval = bool(np.isfinite(profile["importance_low"].values).any())
    shift = 1 if logarithmic else 0
    lowest = np.inf

    def traces(choice: _Choice) -> list[go.Scatter]:
        nonlocal lowest
        data = profile.isel(layer=choice.layer, head=choice.heads[0])
        value = data["importance"].values.astype(np.float64)
        at = _largest(value, edges)
        y = value[at]
        positive = y[y > 0]
        lowest = min(lowest, positive.min(initial=np.inf))
        low, high = (data[f"importance_{end}"].values[at] for end in ("low", "high"))
        columns = [keys[at], keys[edges[:-1]], keys[edges[1:] - 1], data["observers"].values[at]]
        hover = f"{choice.label}<br>key %{{customdata[0]:,d}}"
        if tokens is not None:
            hover += " “%{text}”"
        if pooled:
            hover += ", the largest of %{customdata[1]:,d} to %{customdata[2]:,d}"
        hover += "<br>importance %{y:.4g}"
        if has_interval:
            hover += " [%{customdata[4]:.4g}, %{customdata[5]:.4g}]"
            columns += [low, high]
        hover += "<br>seen by %{customdata[3]:,d} queries"
        drawn = []
        inside = np.isfinite(low) & np.isfinite(high)
        if inside.any():
            floor = FLOOR if logarithmic else -np.inf
            drawn.append(
                marks.band(
                    keys[at][inside] + shift,
                    np.maximum(low[inside], floor),
                    np.maximum(high[inside], floor),
                    name=f"{_confidence(view)} interval",
                    color=style.LINES[0],
                )
            )
        drawn.append(
            marks.curve(
                keys[at] + shift,
                y,
                name="importance",
                color=style.LINES[0],
                hover=hover,
                customdata=np.stack(columns, axis=-1).astype(np.float32),
                text=None if tokens is None else [_shortened(tokens[i]) for i in at],
            )
        )
        return drawn

    figure = Figure()
    length = attrs["length"]
    reference = np.unique(np.concatenate([keys[edges[:-1]], keys[-1:]]))
    causal = bool(attrs["causal"])
    figure.add_trace(
        marks.curve(
            reference + shift,
            _uniform_importance(reference, length, causal=causal),
            name="uniform attention",
            color=style.INK,
            dash="dash",
            width=1.5,
            hover="key %{customdata:,d}<br>under uniform attention %{y:.4g}",
            customdata=marks.compact(reference),
        )
    )
    ends = np.array([keys[0], keys[-1]]) + shift
    figure.add_trace(_threshold_line(view, ends, np.full(2, view.threshold)))
    _add_choices(figure, choices, traces, "Importance of each key")
    room = 0
    if tokens is not None and len(keys) <= MAX_TOKENS:
        room = _token_room(tokens)
        figure.update_xaxes(**_token_ticks(keys, tokens, 15), tickangle=90)
    elif logarithmic:
        wanted = _log_ticks(keys)
        figure.update_xaxes(tickvals=(wanted + 1).tolist(), ticktext=[f"{key:,}" for key in wanted])
    else:
        figure.update_xaxes(tickformat=",d")
    name = "key j [tokens]"
    if logarithmic:
        figure.update_xaxes(type="log")
        bottom = max(min(lowest / 2, 1e-2), FLOOR)
        figure.update_yaxes(type="log", dtick=1, range=[float(np.log10(bottom)), 0.15])
        name += " (logarithmic in j + 1)"
    else:
        figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title_text=name)
    figure.update_yaxes(title_text="importance [probability]")
    kind = f"mean of 1/(i + 1) over queries i = j … {length - 1:,}" if causal else f"1/{length:,}"
    lines.append(_interval_text(view))
    lines.append(f"importance: mean weight over the queries that see the key; dashed: {kind}")
    if pooled:
        lines.append(
            f"{len(keys):,} keys pooled to {len(edges) - 1} bins: each point is the largest "
            "importance in its bin, at its key"
        )
    if np.isnan(profile["importance"].values[profile["present"].values.astype(bool)]).any():
        lines.append(f"no value for keys seen by fewer than {attrs['min_observers']:,} queries")
    return _finish(figure, view, height=400, top=110, room=room, lines=lines)


def _draw_rate(view: _View) -> Figure:
    profile = view.profile
    thresholds = profile["threshold"].values.astype(np.float64)
    present = profile["present"].values.astype(bool)
    rates = np.where(present[..., None], profile["sink_rate"].values, np.nan)
    layers = profile["layer"].values
    if view.layer is None:
        part, curves = "layer", {f"layer {n}": _mean(r) for n, r in zip(layers, rates, strict=True)}
    else:
        part = "head"
        curves = {
            f"layer {layers[0]}, head {profile['head'].values[at]}": rates[0, at]
            for at in np.flatnonzero(present[0])
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
        ids = layers if part == "layer" else profile["head"].values[present[0]]
        figure.add_trace(_order_bar(part, ids, bar))
    any_rate = _mean(np.where(present[..., None], profile["any_sink_rate"].values, np.nan), (0, 1))
    low, high = (profile[f"model_sink_rate_{end}"].values for end in ("low", "high"))
    inside = np.isfinite(low) & np.isfinite(high)
    model = style.LINES[0]
    if inside.any():
        figure.add_trace(
            marks.band(
                thresholds[inside],
                low[inside],
                high[inside],
                name=f"{_confidence(view)} interval",
                color=model,
            )
        )
    figure.add_trace(
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
    figure.add_trace(
        marks.curve(
            thresholds,
            profile["model_sink_rate"].values,
            name="model",
            color=model,
            width=3.5,
            hover=hover,
            customdata=np.stack([low, high], axis=-1).astype(np.float32),
        )
    )
    figure.add_trace(_threshold_line(view, np.full(2, view.threshold), np.array([0.0, 1.0])))
    figure.update_xaxes(title_text="threshold ε [probability]", range=[0, 1])
    figure.update_yaxes(title_text="sink rate [share of inputs × heads]", range=[0, 1.02])
    figure.update_layout(title={"text": "Sink rate", "subtitle": {"text": _rate_text(view)}})
    lines = [
        _interval_text(view),
        "sink: the first key's importance exceeds ε; dashed: any key's does, mean over the heads "
        "drawn",
        "thin: each layer, mean over its heads" if part == "layer" else "thin: each head",
    ]
    return _finish(figure, view, height=420, top=90, lines=lines)


def _draw_signal(view: _View) -> Figure:
    profile = view.profile
    singles, lines = _menu(view)
    last = max(layer for layer, _ in view.heads)
    whole = _Choice(
        f"layer {profile['layer'].values[last]}, all heads",
        str(profile["layer_name"].values[last]),
        last,
        tuple(head for layer, head in view.heads if layer == last),
    )
    choices = [whole, *singles] if len(view.heads) > 1 else singles
    signals = {choice: _signal(profile, choice, _range_bins(profile, choice)) for choice in choices}
    most = max(signal.count.max(initial=0.0) for signal in signals.values())
    first = "first key" if profile.attrs["first_key"] == 0 else f"key {profile.attrs['first_key']}"

    def traces(choice: _Choice) -> list[go.Trace]:
        signal = signals[choice]
        drawn = [
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
            (f"{first} (mean)", _SINK, "solid", signal.first),
            ("largest (mean)", style.LINES[0], "longdash", signal.largest),
            (f"last {profile.attrs['recent']:,} (mean)", style.LINES[2], "dot", signal.recent),
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
    _add_choices(
        figure,
        choices,
        traces,
        "Signal and sink",
        note=lambda choice: _margin_text(profile, choice),
    )
    figure.update_xaxes(title_text="content range of the query [score]")
    figure.update_yaxes(title_text="weight [probability]", range=[-0.02, 1.02])
    lines.append(f"grey: queries by content range and by the mass of the {first}")
    if any(np.isfinite(signal.lower).all() for signal in signals.values()):
        lines.append(
            f"orange: the exact range of the {first}'s mass over all contents of range w, "
            "σ(logit π ∓ w), π its least and its largest prior mass; the paper's looser form is "
            "π·exp(∓w)"
        )
    if len(choices) > len(singles):
        lines.append("all heads: counts are summed, means weighted by them, bounds the outermost")
    return _finish(figure, view, height=440, top=125, lines=lines)


def _draw_logits(view: _View) -> Figure:
    return _draw_maps(view, "map_logits", "Mean attention logits", "logit {value} nats")


def _draw_probabilities(view: _View) -> Figure:
    return _draw_maps(view, "map_probability", "Mean attention probabilities", "weight {value}")


def _draw_maps(view: _View, field: str, title: str, what: str) -> Figure:
    profile = view.profile
    if field not in profile:
        raise ValueError(f"profile holds no {field}: pass maps=True to sink_profile")
    choices, lines = _menu(view)
    side = min(MAX_SIDE, int((MAX_CELLS / len(choices)) ** 0.5))
    positions = [profile[dim].values for dim in ("map_query", "map_key")]
    bins = [_even_bins(len(each), side) for each in positions]
    queries, keys = (each[b[:-1]] for each, b in zip(positions, bins, strict=True))
    pooled = (len(queries), len(keys)) != (len(positions[0]), len(positions[1]))
    texts = None if pooled else _map_tokens(profile, queries, keys)
    if texts is None:
        cell = "query %{y}, key %{x}" + (" (first of its bin)" if pooled else "")
    else:
        cell = "query %{y:,d} “%{y}”, key %{x:,d} “%{x}”"

    def traces(choice: _Choice) -> list[go.Heatmap]:
        data = profile.isel(layer=choice.layer, head=choice.heads[0])
        values = data[field].values.astype(np.float64)
        if "map_allowed" in profile:
            allowed = data["map_allowed"].values.astype(bool)
        else:
            allowed = np.isfinite(values)
        values, allowed = _pooled(values, allowed, *bins) if pooled else (values, allowed)
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
    _add_choices(figure, choices, traces, title)
    figure.update_xaxes(title_text="key j [tokens]", tickformat=",d", showgrid=False)
    figure.update_yaxes(
        title_text="query i [tokens]", tickformat=",d", showgrid=False, autorange="reversed"
    )
    room = 0
    if texts is not None:
        room = _token_room(texts[1])
        figure.update_yaxes(**_token_ticks(queries, texts[0], 17))
        figure.update_xaxes(**_token_ticks(keys, texts[1], 18), tickangle=90)
    if view.profile.attrs["n_inputs"] > 1:
        lines.append("mean over the inputs")
    if pooled:
        lines.append(
            f"pooled from {len(positions[0])} × {len(positions[1])}: mean over the allowed cells "
            "of each bin; fewer heads (layer=) are drawn finer"
        )
    return _finish(figure, view, height=560, top=110, room=room, lines=lines)


_DRAWINGS: dict[str, Callable[[_View], Figure]] = {
    "overview": _draw_overview,
    "profile": _draw_profile,
    "rate": _draw_rate,
    "signal": _draw_signal,
    "logits": _draw_logits,
    "probabilities": _draw_probabilities,
}
SINK_KINDS = tuple(_DRAWINGS)


# --- selections ---


def _with_all_dimensions(profile: xr.Dataset) -> xr.Dataset:
    """The profile with the dimensions that a selection dropped, each of length 1."""
    fields = {name: f for name, f in SINK_PROFILE.fields.items() if name in profile.variables}
    coords, data = {}, {}
    for name, field in fields.items():
        array = profile[name]
        missing = tuple(at for at, dim in enumerate(field.dims) if dim not in array.dims)
        data[name] = (field.dims, np.expand_dims(array.values, missing))
        for dim, size in zip(field.dims, data[name][1].shape, strict=True):
            given = profile.coords.get(dim)
            coords[dim] = np.arange(size) if given is None else np.atleast_1d(given.values)
    return xr.Dataset(data, coords=coords, attrs=profile.attrs)


def _menu(view: _View) -> tuple[list[_Choice], list[str]]:
    """The heads to choose from, and what the caption says of those left out."""
    profile = view.profile
    layers, heads = profile["layer"].values, profile["head"].values
    present = profile["present"].values.astype(bool)
    counts = present.sum(axis=1)
    first = len(layers) - 1
    while first > 0 and counts[first - 1 :].sum() <= MAX_CHOICES:
        first -= 1
    kept = [pair for pair in view.heads if pair[0] >= first][:MAX_CHOICES]
    if not kept:
        kept = view.heads[-MAX_CHOICES:]
    lines = []
    if len(kept) < len(view.heads):
        shown = sorted({layer for layer, _ in kept})
        if len(kept) < counts[shown].sum():
            lines.append(
                f"menu: {len(kept)} of {counts[shown].sum()} heads of layer "
                f"{_listed(layers[shown])} (select others from the profile)"
            )
        if len(shown) < np.count_nonzero(counts):
            what = "layer" if len(shown) == 1 else "layers"
            lines.append(
                f"menu: {what} {_listed(layers[shown])} of {_listed(layers)} "
                "(choose another with layer=)"
            )
    choices = [
        _Choice(
            f"layer {layers[layer]}, head {heads[head]}",
            str(profile["layer_name"].values[layer]),
            layer,
            (head,),
        )
        for layer, head in kept
    ]
    return choices, lines


def _listed(values: np.ndarray) -> str:
    """Numbers as a sentence holds them: `3`, `0 to 11`, `0, 4, 5`."""
    if len(values) > 2 and np.all(np.diff(values) == 1):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


# --- pooling for display ---


def _mean(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """The mean over what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(finite, values, 0.0).sum(axis) / finite.sum(axis)


def _even_bins(count: int, most: int) -> np.ndarray:
    """Edges, as indices, of at most `most` bins of about equal width."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).round().astype(int))


def _log_bins(keys: np.ndarray, most: int) -> np.ndarray:
    """Edges, as indices, of at most `most` bins, equal on an axis logarithmic in key + 1."""
    if len(keys) <= most:
        return np.arange(len(keys) + 1)
    inner = np.searchsorted(keys + 1, np.geomspace(keys[0] + 1, keys[-1] + 2, most + 1)[1:-1])
    return np.unique(np.concatenate([[0], inner, [len(keys)]]))


def _largest(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """In each bin, the index of the largest value that is a number; else of its first."""
    ranked = np.where(np.isnan(values), -np.inf, values)
    return np.array([a + np.argmax(ranked[a:b]) for a, b in zip(edges, edges[1:], strict=False)])


def _pooled(
    values: np.ndarray, allowed: np.ndarray, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the allowed cells of each bin, and which bins hold any."""

    def total(cells: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(cells, rows[:-1], axis=0), cols[:-1], axis=1)

    seen = total(allowed.astype(np.float64))
    with np.errstate(invalid="ignore"):
        return total(np.where(allowed, values, 0.0)) / seen, seen > 0


@dataclass(frozen=True)
class _RangeBins:
    """Which range bins are drawn, pooled `step` by `step`, between which edges."""

    count: int
    step: int
    edges: np.ndarray


@dataclass(frozen=True)
class _Signal:
    """The density, means and bounds of one menu entry."""

    range_edges: np.ndarray
    mass_edges: np.ndarray
    centres: np.ndarray
    count: np.ndarray
    first: np.ndarray
    largest: np.ndarray
    recent: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def _range_bins(profile: xr.Dataset, choice: _Choice) -> _RangeBins:
    """Range bins up to the last that this entry has queries in."""
    counts = profile["signal_count"].values[choice.layer, list(choice.heads)]
    used = (np.nan_to_num(counts) > 0).any(axis=(0, 2))
    count = int(used.nonzero()[0].max(initial=0)) + 1
    edges = _edges(profile["range_bin"].values, profile["range_stop"].values)[: count + 1]
    step = -(-count // MAX_BINS)
    return _RangeBins(count, step, np.append(edges[:-1:step], edges[-1]))


def _edges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Edges of adjoining bins; an open last bin is drawn as wide as the one before."""
    edges = np.append(start, stop[-1]).astype(np.float64)
    if not np.isfinite(edges[-1]):
        edges[-1] = edges[-2] + (edges[-2] - edges[-3] if len(edges) > 2 else 1.0)
    return edges


def _signal(profile: xr.Dataset, choice: _Choice, bins: _RangeBins) -> _Signal:
    heads = list(choice.heads)

    def taken(name: str) -> np.ndarray:
        return profile[name].values[choice.layer, heads].astype(np.float64)

    starts = np.arange(0, bins.count, bins.step)
    counts = np.nan_to_num(taken("signal_count")[:, : bins.count])
    queries = counts.sum(axis=-1)
    count = np.add.reduceat(counts.sum(axis=0), starts, axis=0)
    step = -(-count.shape[1] // MAX_BINS)
    masses = np.arange(0, count.shape[1], step)
    mass_edges = _edges(profile["mass_bin"].values, profile["mass_stop"].values)

    def mean(name: str) -> np.ndarray:
        values = taken(name)[:, : bins.count]
        weights = np.where(np.isfinite(values), queries, 0.0)
        total = np.add.reduceat((weights * np.nan_to_num(values)).sum(axis=0), starts)
        with np.errstate(invalid="ignore"):
            return total / np.add.reduceat(weights.sum(axis=0), starts)

    centres = (bins.edges[:-1] + bins.edges[1:]) / 2
    low, high = taken("prior_first_low"), taken("prior_first_high")
    return _Signal(
        bins.edges,
        np.append(mass_edges[:-1:step], mass_edges[-1]),
        centres,
        np.add.reduceat(count, masses, axis=1),
        mean("signal_first_mass"),
        mean("signal_largest_mass"),
        mean("signal_recent_mass"),
        _bound(np.min(low), -centres),
        _bound(np.max(high), centres),
    )


def _bound(prior: float, shift: np.ndarray) -> np.ndarray:
    """The mass whose log-odds are the prior's, shifted: sigmoid(logit(prior) + shift)."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1.0 / (1.0 + np.exp(-shift - (np.log(prior) - np.log1p(-prior))))


def _uniform_importance(keys: np.ndarray, length: int, *, causal: bool) -> np.ndarray:
    """Importance of keys under uniform attention: mean of 1/(i + 1) over i = j … n − 1, or 1/n."""
    length = max(length, int(keys[-1]) + 1)
    if not causal:
        return np.full(len(keys), 1.0 / length)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, length + 1))])
    return (harmonic[length] - harmonic[keys]) / (length - keys)


# --- texts ---


def _rate_text(view: _View) -> str:
    """The model's sink rate at the threshold: off the profile's grid, counted without interval."""
    profile = view.profile
    inputs = _inputs(profile.attrs["n_inputs"])
    what = "first key" if profile.attrs["first_key"] == 0 else f"key {profile.attrs['first_key']}"
    end = f"at ε = {view.threshold:g} ({what}, strict >, {inputs})"
    if view.layer is not None:
        end += ", all layers"
    (at,) = np.nonzero(np.isclose(profile["threshold"].values, view.threshold, rtol=0, atol=1e-6))
    if len(at) == 0:
        heads = profile["present"].values.astype(bool)
        values = profile["first_importance"].values[:, heads]
        values = values[np.isfinite(values)]
        rate = np.mean(values > view.threshold) if values.size else np.nan
        return f"sink rate of the heads drawn {100 * rate:.1f} % {end}"
    rate, low, high = (
        100 * float(profile[f"model_sink_rate{end}"].values[at[0]]) for end in ("", "_low", "_high")
    )
    interval = f" [{low:.1f}, {high:.1f}]" if np.isfinite([low, high]).all() else ""
    return f"sink rate {rate:.1f} %{interval} {end}"


def _margin_text(profile: xr.Dataset, choice: _Choice) -> str:
    margin, protected = (
        profile[name].values[choice.layer, list(choice.heads)].astype(np.float64)
        for name in ("margin", "protected_length")
    )
    margin = margin[~np.isnan(margin)]
    if not len(margin):
        return ""
    if len(choice.heads) > 1:
        return f"margins δ = {_number(margin.min())} to {_number(margin.max())} nats"
    text = f"margin δ = {_number(margin[0])} nats"
    if np.isnan(protected[0]):
        return text
    return f"{text} protects about {_number(protected[0])} tokens (margin law)"


def _number(value: float) -> str:
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−")


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count:,} inputs"


def _interval_text(view: _View) -> str:
    if view.profile.attrs["n_inputs"] == 1:
        return "one input: no interval"
    return f"interval: {_confidence(view)}, over the inputs"


def _confidence(view: _View) -> str:
    return f"{100 * view.profile.attrs['confidence']:g} %"


def _cell_texts(z: np.ndarray) -> list[list[str]]:
    """Two decimals in three characters, so that twelve cells in a row have room for them."""

    def text(value: float) -> str:
        if np.isnan(value):
            return ""
        return "1" if value >= 0.995 else f"{value:.2f}".removeprefix("0")

    return [[text(value) for value in row] for row in z]


def _shortened(token: object) -> str:
    text = str(token)
    return style.escape(text if len(text) <= 40 else f"{text[:39]}…")


def _token_room(tokens: np.ndarray) -> int:
    """Pixels that upright tokens need below an axis."""
    wide = {"W": 2, "F": 2}
    longest = max(sum(wide.get(east_asian_width(c), 1) for c in str(t)) for t in tokens)
    return max(0, 6 * longest - 12)


def _token_ticks(at: np.ndarray, tokens: np.ndarray, pixels: int) -> dict[str, object]:
    """Integer axes with token texts: repeated labels would hide keys, tags would be markup."""
    return {
        "tickvals": at.tolist(),
        "ticktext": [style.escape(token) for token in tokens],
        "title_standoff": 10,
        "tickfont_size": 11 if len(at) <= 400 // pixels else 9,
    }


def _map_tokens(
    profile: xr.Dataset, queries: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of both sides of a map, if they are known and have room."""
    if "token" not in profile or max(len(queries), len(keys)) > MAX_MAP_TOKENS:
        return None
    known = profile["token"].to_series()
    if not (np.isin(queries, known.index).all() and np.isin(keys, known.index).all()):
        return None
    return known.loc[queries].to_numpy(), known.loc[keys].to_numpy()


# --- pieces of figures ---


def _evenly(ids: np.ndarray) -> np.ndarray:
    """Places of cells: the ids themselves where they follow one another, else their order."""
    return ids if np.all(np.diff(ids) == 1) else np.arange(len(ids))


def _ids(at: np.ndarray, ids: np.ndarray) -> dict[str, object]:
    """Ticks at every id, or at every second, fourth, … such that at most twelve are left."""
    step = 1
    while len(ids) > 12 * step:
        step *= 2
    return {"tickvals": at[::step].tolist(), "ticktext": [str(i) for i in ids[::step]]}


def _log_ticks(keys: np.ndarray) -> np.ndarray:
    steps = (1, 2, 5) if keys[-1] <= 20_000 else (1,)
    wanted = np.array([0, *(s * 10**d for d in range(10) for s in steps)])
    return wanted[(wanted >= keys[0]) & (wanted <= keys[-1])]


def _weight_bar(threshold: float) -> dict[str, object]:
    """A colour bar from 0 to 1 with the threshold among its ticks."""
    ticks = [at for at in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(at - threshold) > 0.1]
    return {
        "title": "prob.",
        "thickness": 12,
        "x": 1.01,
        "tickvals": [*ticks, threshold],
        "ticktext": [*(f"{at:g}" for at in ticks), f"ε = {threshold:g}"],
    }


def _threshold_line(view: _View, x: np.ndarray, y: np.ndarray) -> go.Scatter:
    name = f"threshold ε = {view.threshold:g}"
    return marks.curve(x, y, name=name, color=_SINK, dash="dot", width=1.5, hover=name)


def _along(names: Sequence[str]) -> tuple[list[str], list[list] | None]:
    """Colours of curves in an order, and their scale if they are too many for a legend."""
    if len(names) <= MAX_LEGEND:
        return [style.LINES[(at + 3) % len(style.LINES)] for at in range(len(names))], None
    # Neither the darkest nor the brightest: both grounds must show every curve.
    places = np.linspace(0.2, 0.85, len(names))
    colors = [sample_colorscale(style.SEQUENTIAL, float(place))[0] for place in places]
    return colors, [[at / (len(colors) - 1), color] for at, color in enumerate(colors)]


def _order_bar(name: str, ids: np.ndarray, scale: list[list]) -> go.Scatter:
    ticks = _ids(np.arange(len(ids)), ids)
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


def _add_choices(
    figure: Figure,
    choices: Sequence[_Choice],
    traces: Callable[[_Choice], list[go.Trace]],
    title: str,
    *,
    note: Callable[[_Choice], str] | None = None,
) -> None:
    """Add every entry's traces, the first's visible, and a menu that switches between them.

    Cells that are not allowed are alike for most heads, so equal marks are added once. `note`
    writes the figure's first annotation.
    """
    always = set(range(len(figure.data)))
    shared: dict[bytes, int] = {}
    owned: list[set[int]] = []
    for choice in choices:
        mine = set()
        for trace in traces(choice):
            key = np.asarray(trace.z).tobytes() if trace.name == "not allowed" else None
            at = shared.get(key) if key is not None else None
            if at is None:
                at = len(figure.data)
                trace.visible = not owned
                figure.add_trace(trace)
                if key is not None:
                    shared[key] = at
            mine.add(at)
        owned.append(mine)
    names = {trace.name for trace in figure.data if isinstance(trace, go.Heatmap)}
    for name, color in (
        ("not allowed", style.MASKED),
        ("NaN", style.NOT_A_NUMBER),
        ("−∞", style.MINUS_INFINITY),
        ("+∞", style.PLUS_INFINITY),
    ):
        if name in names:
            always.add(len(figure.data))
            figure.add_trace(marks.legend_square(name, color))
    figure.update_layout(title={"text": title, "subtitle": {"text": choices[0].subtitle}})
    if note is not None:
        figure.layout.annotations[0].text = note(choices[0])
    if len(choices) == 1:
        return
    buttons = []
    for choice, mine in zip(choices, owned, strict=True):
        layout = {"title.subtitle.text": choice.subtitle}
        if note is not None:
            layout["annotations[0].text"] = note(choice)
        visible = [at in always or at in mine for at in range(len(figure.data))]
        buttons.append(
            {"label": choice.label, "method": "update", "args": [{"visible": visible}, layout]}
        )
    figure.update_layout(
        updatemenus=[
            {
                "buttons": buttons,
                "x": 1.0,
                "xanchor": "right",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": 24},
                "bgcolor": "rgba(128,128,128,0.12)",
                "bordercolor": style.GRID,
            }
        ]
    )


def _in_legend(trace: go.Trace) -> bool:
    return isinstance(trace, go.Scatter) and trace.showlegend is not False


def _finish(
    figure: Figure,
    view: _View,
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
        f"{_inputs(attrs['n_inputs'])} of {lengths} tokens",
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
