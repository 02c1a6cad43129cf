"""Curves of a "sink_profile": sink rate, importance of every key, and signal against sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.colors import sample_colorscale

from goatviz import bins
from goatviz.plots import marks, style
from goatviz.plots.base import Panel
from goatviz.plots.sink_maps import SINK, head_note, mass_caption, part_of

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of points of an importance curve; longer inputs are pooled.
MAX_POINTS = 400
#: Largest number of keys on linear axes; more have logarithmic ones.
MAX_LINEAR = 64
#: Largest numbers of bins of content range and of mass.
MAX_BINS = (64, 64)
#: Largest number of layers or heads in a legend; more have a colour bar.
MAX_LEGEND = 6
#: Lowest value on logarithmic axes of importance.
FLOOR = 1e-7

_HEAD = style.LINES[3]


# --- by threshold ---


def rate_panel(profile: xr.Dataset, chosen: tuple[int, int] | None = None) -> Panel:
    """The sink rate of the model and of its parts by threshold.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with all its dimensions.
    chosen : tuple of int, optional
        Labels of the layer and head whose rate is drawn beside the model's. Default: every layer,
        or every head if there is only one layer.

    Returns
    -------
    Panel
        Its traces are "model", its interval, "a sink at any key", the parts, and the threshold.
    """
    thresholds = profile["threshold"].values.astype(np.float64)
    caption = [_interval_text(profile), "Sink: the first key's importance exceeds ε."]
    caption += mass_caption(profile)
    if chosen is not None:
        layer, head = chosen
        name = f"layer {layer}, head {head}"
        rate = profile["sink_rate"].sel(layer=layer, head=head).values
        parts = [_part(thresholds, name, rate, _HEAD, 2.0, True)]
    else:
        parts, thin = _parts(profile, thresholds)
        caption.append(thin)
    ends = np.array([0.0, 1.0])
    line = _threshold(profile, np.full(2, profile.attrs["threshold"]), ends)
    return Panel(
        "Sink rate",
        [*parts, *_model_rates(profile, thresholds), line],
        {"title": "threshold ε [probability]", "range": [0, 1]},
        {"title": "sink rate [share]", "range": [0, 1.02]},
        note=profile.attrs.get("rate_text", ""),
        caption=[line for line in caption if line],
    )


def _threshold(profile: xr.Dataset, x: np.ndarray, y: np.ndarray) -> marks.Trace:
    """The line of the threshold."""
    text = f"threshold ε = {profile.attrs['threshold']:g}"
    return marks.curve(x, y, name=text, color=SINK, dash="dot", width=1.5, hover=text)


def _interval_text(profile: xr.Dataset) -> str:
    """The kind of the intervals, or the reason why there are none."""
    if profile.attrs["n_inputs"] == 1:
        return "One input: no interval."
    return f"Interval: {_confidence(profile)}, over the inputs."


def _confidence(profile: xr.Dataset) -> str:
    return f"{100 * profile.attrs['confidence']:g} %"


def _model_rates(profile: xr.Dataset, thresholds: np.ndarray) -> list[marks.Trace]:
    low, high = (profile[f"model_sink_rate_{end}"].values for end in ("low", "high"))
    inside = np.isfinite(low) & np.isfinite(high)
    color = style.LINES[0]
    traces = []
    if inside.any():
        name = f"{_confidence(profile)} interval"
        traces.append(
            marks.band(thresholds[inside], low[inside], high[inside], name=name, color=color)
        )
    if "model_any_sink_rate" in profile:
        traces.append(
            marks.curve(
                thresholds,
                profile["model_any_sink_rate"].values,
                name="a sink at any key",
                color=style.LINES[2],
                dash="dash",
                hover="ε = %{x:.3g}<br>a sink at any key %{y:.4g}",
            )
        )
    hover = "model<br>ε = %{x:.3g}<br>sink rate %{y:.4g}"
    if inside.any():
        hover += " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
    traces.append(
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
    return traces


def _parts(profile: xr.Dataset, thresholds: np.ndarray) -> tuple[list[marks.Trace], str]:
    """The rate of each layer, or of each head of a single layer, and a line of the caption."""
    layers, heads = profile["layer"].values, profile["head"].values
    if len(layers) == 1:
        kept = np.flatnonzero(profile["present"].values[0])
        noun, ids, rates = "head", heads[kept], profile["sink_rate"].values[0, kept]
        thin = f"Thin: each head of layer {layers[0]}."
    elif "layer_sink_rate" in profile:
        noun, ids, rates = "layer", layers, profile["layer_sink_rate"].values
        thin = "Thin: each layer, the mean over its heads."
    else:
        return [], ""
    few = len(ids) <= MAX_LEGEND
    # Neither the darkest nor the brightest colours: curves must be visible on both grounds.
    places = np.linspace(0.2, 0.85, len(ids))
    colors = (
        [style.LINES[(at + 3) % len(style.LINES)] for at in range(len(ids))]
        if few
        else [sample_colorscale(style.SEQUENTIAL, float(place))[0] for place in places]
    )
    traces = [
        _part(thresholds, f"{noun} {number}", rate, color, 1.0, few)
        for number, rate, color in zip(ids, rates, colors, strict=True)
    ]
    if not few:
        traces.append(_order_bar(noun, ids, colors))
    return traces, thin


def _part(
    thresholds: np.ndarray, name: str, rate: np.ndarray, color: str, width: float, shown: bool
) -> marks.Trace:
    return marks.curve(
        thresholds,
        rate,
        name=name,
        color=color,
        width=width,
        hover=f"{name}<br>ε = %{{x:.3g}}<br>sink rate %{{y:.4g}}",
        showlegend=shown,
    )


def _order_bar(name: str, ids: np.ndarray, colors: Sequence[str]) -> marks.Trace:
    """A colour bar for ordered curves, with at most about eight ticks."""
    step = -(-len(ids) // 8)
    return marks.colour_bar(
        f"{name} bar",
        colorscale=[[at / (len(colors) - 1), color] for at, color in enumerate(colors)],
        cmin=0.0,
        cmax=float(len(ids) - 1),
        colorbar={
            "title": {"text": name},
            "tickvals": list(range(0, len(ids), step)),
            "ticktext": [str(number) for number in ids[::step]],
        },
    )


# --- by key ---


def importance_panel(
    profile: xr.Dataset,
    layer: int,
    head: int,
    *,
    points: int = MAX_POINTS,
    key: int | None = None,
) -> Panel:
    """The importance of every key in one head, and its importance under uniform attention.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with all its dimensions.
    layer, head : int
        Labels of the layer and head.
    points : int
        Largest number of bins of keys; the largest importance in each is drawn, at its key.
    key : int, optional
        Label of a key to be marked.

    Returns
    -------
    Panel
        Its traces are "importance", its interval, "uniform attention", the threshold, and
        "key ..." if it is not the first.
    """
    keys, attrs = profile["key"].values, profile.attrs
    fields = ("importance", "importance_low", "importance_high", "observers", "token")
    part = part_of(profile, layer, head, *fields, "uniform_importance")
    edges = bins.log_edges(keys, points)
    curves = _Importance(part, edges)
    caption = [
        _interval_text(profile),
        "Importance: the mean weight over the queries that see the key.",
    ]
    traces = []
    if "uniform_importance" in part and np.isfinite(part["uniform_importance"].values).any():
        traces.append(curves.uniform())
        caption[-1] += " Dashed: under uniform attention."
    ends = key_places(keys, keys[[0, -1]])
    line = _threshold(profile, ends, np.full(2, attrs["threshold"]))
    traces += [line, *curves.traces(_confidence(profile))]
    if key is not None and np.isfinite(part["importance"].sel(key=key).item()):
        traces.append(curves.ring(key, named=key != attrs["first_key"]))
    if curves.pooled:
        caption.append(
            f"{len(keys):,} keys in {len(edges) - 1} bins: each point is the largest importance "
            "of its bin, at its key."
        )
    if np.isnan(part["importance"].values).any():
        caption.append(f"No value for keys seen by fewer than {attrs['min_observers']:,} queries.")
    caption += mass_caption(profile)
    along, upward = curves.axes()
    return Panel(
        "Importance of every key",
        traces,
        along,
        upward,
        note=head_note(part),
        caption=caption,
        height=340,
    )


def is_logarithmic(keys: np.ndarray) -> bool:
    """Whether the axis of so many keys is logarithmic in key + 1."""
    return len(keys) > MAX_LINEAR


def key_places(keys: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Places of some keys along the axis of all keys."""
    return at + 1 if is_logarithmic(keys) else at


class _Importance:
    """The importances of one head, pooled into bins of keys."""

    def __init__(self, part: xr.Dataset, edges: np.ndarray) -> None:
        self.part, self.edges, self.keys = part, edges, part["key"].values
        self.pooled = len(edges) - 1 < len(self.keys)
        value = part["importance"].values.astype(np.float64)
        self.at = bins.bin_argmax(value, edges)
        self.value = value[self.at]
        self.tokens = part["token"].values if "token" in part else None

    def x(self, keys: np.ndarray) -> np.ndarray:
        return key_places(self.keys, keys)

    def traces(self, confidence: str) -> list[marks.Trace]:
        """The interval of the importances, and the importances on top of it."""
        at, edges, keys = self.at, self.edges, self.keys
        columns = [keys[at], self.part["observers"].values[at]]
        hover = "key %{customdata[0]:,d}" + ("" if self.tokens is None else " “%{text}”")
        if self.pooled:
            hover += ", the largest of %{customdata[2]:,d} to %{customdata[3]:,d}"
            columns += [keys[edges[:-1]], keys[edges[1:] - 1]]
        hover += "<br>importance %{y:.4g}"
        low, high = (self.part[f"importance_{end}"].values[at] for end in ("low", "high"))
        inside = np.isfinite(low) & np.isfinite(high)
        traces = []
        if inside.any():
            hover += (
                f" [%{{customdata[{len(columns)}]:.4g}}, %{{customdata[{len(columns) + 1}]:.4g}}]"
            )
            columns += [low, high]
            floor = FLOOR if is_logarithmic(keys) else -np.inf
            traces.append(
                marks.band(
                    self.x(keys[at][inside]),
                    np.maximum(low[inside], floor),
                    np.maximum(high[inside], floor),
                    name=f"{confidence} interval",
                    color=style.LINES[0],
                )
            )
        texts = {}
        if self.tokens is not None:
            texts["text"] = marks.hovered(self.tokens[at])
        curve = marks.curve(
            self.x(keys[at]),
            self.value,
            name="importance",
            color=style.LINES[0],
            hover=f"{hover}<br>seen by %{{customdata[1]:,d}} queries",
            # Markers show a single key with a high importance, such as the first one on the axis.
            mode="lines" if is_logarithmic(keys) else "lines+markers",
            marker={"size": 4, "color": style.LINES[0]},
            customdata=np.stack(columns, axis=-1).astype(np.float32),
            **texts,
        )
        return [*traces, curve]

    def uniform(self) -> marks.Trace:
        """Importance under uniform attention, at the first key of every bin and the last key."""
        at = np.unique(np.append(self.edges[:-1], len(self.keys) - 1))
        return marks.curve(
            self.x(self.keys[at]),
            self.part["uniform_importance"].values[at],
            name="uniform attention",
            color=style.INK,
            dash="dash",
            width=1.5,
            hover="key %{customdata:,d}<br>under uniform attention %{y:.4g}",
            customdata=marks.compact(self.keys[at]),
        )

    def ring(self, key: int, *, named: bool) -> marks.Trace:
        """A ring around the importance of one key, with a name in the legend or without."""
        return marks.ring(
            self.x(np.array([key])),
            self.part["importance"].sel(key=[key]).values,
            name=f"key {key:,}",
            color=_HEAD,
            size=11,
            width=2.5,
            showlegend=named,
        )

    def axes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        keys = self.keys
        along: dict[str, Any] = {"title": "key j [tokens]"}
        upward: dict[str, Any] = {"title": "importance [probability]"}
        if not is_logarithmic(keys):
            along["tickformat"] = ",d"
            if self.tokens is not None:
                along |= marks.token_ticks(keys, self.tokens, "key")
            return along, upward | {"rangemode": "tozero"}
        # Ticks at decades, and at 2 and 5 between them where there is room.
        steps = (1, 2, 5) if keys[-1] <= 20_000 else (1,)
        wanted = np.array([0, *(step * 10**decade for decade in range(10) for step in steps)])
        wanted = wanted[(wanted >= keys[0]) & (wanted <= keys[-1])]
        along |= {
            "title": "key j [tokens] (logarithmic in j + 1)",
            "type": "log",
            "tickvals": (wanted + 1).tolist(),
            "ticktext": [f"{key:,}" for key in wanted],
        }
        lowest = self.value[self.value > 0].min(initial=1.0)
        bottom = max(min(lowest / 2, 1e-2), FLOOR)
        return along, upward | {"type": "log", "dtick": 1, "range": [np.log10(bottom), 0.15]}


# --- by content range ---


def signal_panel(
    profile: xr.Dataset,
    layer: int,
    head: int | None,
    *,
    shape: tuple[int, int] = MAX_BINS,
    most: float | None = None,
) -> Panel:
    """The mass of the first key by content range: density of queries, bounds, and means.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with all its dimensions.
    layer, head : int
        Labels of the layer and head; without a head, all heads of the layer together.
    shape : tuple of int
        Largest numbers of bins of content range and of mass.
    most : float, optional
        Upper end of the scale of counts; default: the largest count.

    Returns
    -------
    Panel
        Its traces are "queries", "lowest possible", "highest possible", and the means "first
        key", "largest" and "last ..."; there are none if no query counts.
    """
    signal = _Signal(profile, layer, head, shape)
    caption = ["Grey: queries by content range w and by the mass of the first key."]
    caption += mass_caption(profile)
    traces = signal.bounds()
    if traces:
        caption.append(
            "Lowest and highest possible: the exact range of that mass, σ(logit π ∓ w), for the "
            "widest content range w of a bin and the least and largest prior mass π in it; the "
            "paper's looser form is π·exp(∓w)."
        )
    empty = not signal.count.any()
    if not empty:
        most = signal.count.max() if most is None else most
        traces = [signal.density(most), marks.count_bar(most, "queries"), *traces]
        traces += signal.means(profile.attrs)
    notice = [marks.notice("no query sees two keys, the first among them")] if empty else []
    return Panel(
        "Signal against sink",
        [] if empty else traces,
        {"title": "content range of the query [score]"},
        {"title": "weight [probability]", "range": [-0.02, 1.02]},
        note=signal.note,
        caption=caption,
        annotations=notice,
        height=360,
    )


class _Signal:
    """The signal of one head, or of all heads of a layer, pooled into bins of content range."""

    def __init__(
        self, profile: xr.Dataset, layer: int, head: int | None, shape: tuple[int, int]
    ) -> None:
        self.prefix = "layer_signal" if head is None else "signal"
        ends = ("count", "lower", "upper", "first_mass", "largest_mass", "recent_mass")
        fields = [f"{self.prefix}_{end}" for end in ends]
        if head is None:
            self.part = part_of(profile, layer, None, *fields)
            self.note = f"layer {layer}, all heads ({self.part['layer_name'].item()})"
        else:
            self.part = part_of(profile, layer, head, *fields, "margin_text")
            margin = self.part["margin_text"].item() if "margin_text" in self.part else ""
            self.note = "; ".join(filter(None, [head_note(self.part), margin]))
        counts = np.nan_to_num(self.part[f"{self.prefix}_count"].values.astype(np.float64))
        self.queries = counts.sum(axis=1)
        # Up to the last bin that holds a query.
        used = int(self.queries.nonzero()[0].max(initial=0)) + 1
        # A mean of a few queries is noise: eight a bin, on average.
        most = int(np.clip(self.queries.sum() // 8, 12, shape[0]))
        self.cuts = bins.step_edges(used, most)
        masses = bins.step_edges(counts.shape[1], shape[1])
        self.count = bins.bin_sum(bins.bin_sum(counts[:used], self.cuts, axis=0), masses)
        starts, stops = profile["range_bin"].values, profile["range_stop"].values
        self.edges = np.append(starts[self.cuts[:-1]], stops[used - 1])
        self.masses = np.append(
            profile["mass_bin"].values[masses[:-1]], profile["mass_stop"].values[-1]
        )

    def density(self, most: float) -> marks.Trace:
        return marks.count_map(
            self.edges,
            self.masses,
            self.count.T,
            most=most,
            name="queries",
            hover="content range about %{x:.3g}, the first key's mass about %{y:.3g}"
            "<br>{value} queries",
        )

    def bounds(self) -> list[marks.Trace]:
        """The least and largest possible mass of the first key, over all queries of a bin."""
        last = self.cuts[1:] - 1
        traces = []
        for name, end, dash in (
            ("lowest possible", "lower", "dash"),
            ("highest possible", "upper", "dashdot"),
        ):
            field = f"{self.prefix}_{end}"
            if field in self.part and np.isfinite(self.part[field].values).all():
                traces.append(
                    marks.curve(
                        self.edges,
                        self.part[field].values[np.append(last, last[-1])],
                        name=name,
                        color=style.LINES[4],
                        dash=dash,
                        hover=f"content range from %{{x:.3g}}<br>{name} %{{y:.4g}}",
                    )
                )
                traces[-1]["line"]["shape"] = "hv"
        return traces

    def means(self, attrs: Mapping[str, Any]) -> list[marks.Trace]:
        """Mean masses by content range."""
        curves = [
            ("first key (mean)", "first", SINK, "solid"),
            ("largest (mean)", "largest", style.LINES[0], "longdash"),
        ]
        if attrs["recent"] < attrs["length"]:
            name = f"last {attrs['recent']:,} (mean)"
            curves.append((name, "recent", style.LINES[2], "dot"))
        middle = (self.edges[:-1] + self.edges[1:]) / 2
        traces = []
        for name, field, color, dash in curves:
            values = self.part[f"{self.prefix}_{field}_mass"].values
            mean = bins.weighted_mean(values, self.queries, self.cuts)
            traces.append(
                marks.curve(
                    middle,
                    mean,
                    name=name,
                    color=color,
                    dash=dash,
                    width=2.5,
                    hover=f"content range %{{x:.3g}}<br>{name} %{{y:.4g}}",
                    # A bin without neighbours would be invisible as a line.
                    mode="lines+markers",
                    marker={"size": 4, "color": color},
                )
            )
        return traces


# --- hidden states ---


def hidden_panels(profile: xr.Dataset) -> list[Panel]:
    """What happens to the first token's hidden state, block by block, beside the sinks.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with norms, and with spectra for the last two panels.
    """
    blocks = profile["state"].values
    first = profile.sel(key=profile.attrs["first_key"])
    limit = np.float32(profile.attrs["threshold"])
    sinks = (first["importance"] > limit).where(profile["present"]).mean("head")
    axis = {"title": "after block [1]", "tickformat": marks.tick_format(blocks)}
    median = profile["hidden_median"].values
    curves = [
        ("Norm: first token / others", profile["norm_ratio"].values, "ratio [1]"),
        ("Its largest channel / median", first["hidden_largest"].values / median, "[1]"),
    ]
    # An input of one token has no others.
    panels = [
        Panel(title, [_by_block(blocks, values, at)], axis, {"title": unit, **_wide(values)})
        for at, (title, values, unit) in enumerate(curves)
        if np.isfinite(values).any()
    ]
    panels.append(
        Panel(
            "Heads whose first key is a sink",
            [_by_block(profile["layer"].values, sinks.values, 2)],
            {"title": "layer", "tickformat": marks.tick_format(profile["layer"].values)},
            {"title": "share of heads [1]", "range": [-0.04, 1.04]},
            note=f"importance above {profile.attrs['threshold']:g}",
            caption=mass_caption(profile),
        )
    )
    if "hidden_entropy" in profile:
        for at, name, title, unit in (
            (3, "hidden_entropy", "Matrix entropy of all states", "entropy [nats]"),
            (4, "hidden_anisotropy", "Anisotropy of all states", "largest share [1]"),
        ):
            trace = _by_block(blocks, profile[name].values, at)
            panels.append(Panel(title, [trace], axis, {"title": unit, "rangemode": "tozero"}))
    return panels


def _wide(values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis for values that span more than a decade and a half."""
    wide = np.nanmax(values) > 30 * np.nanmin(values) > 0
    return {"type": "log"} if wide else {"rangemode": "tozero"}


def _by_block(blocks: np.ndarray, values: np.ndarray, at: int) -> marks.Trace:
    return marks.curve(
        blocks,
        values,
        name="",
        color=style.LINES[at],
        hover="%{x}: %{y:.4g}",
        mode="lines+markers",
        showlegend=False,
    )
