"""Plots of a prior, head by head: key-only term, kernel, spectrum, plan and margin.

A panel takes one head of a "prior_profile" result, or a "prior_mix" result, which holds the learned
or fitted prior beside the scaled one. `draw_prior` draws a profile with menus of its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz import checks
from goatviz.plots import marks, style
from goatviz.plots.base import LIMIT_BYTES, Entry, Panel, Words, grid, menu
from goatviz.plots.figure import Figure
from goatviz.plots.prior_maps import coarser, head_panels, log_prior, plan
from goatviz.results import PRIOR_PROFILE, check_result

if TYPE_CHECKING:
    import xarray as xr

PanelOf = Callable[["xr.Dataset"], Panel]

#: Smallest probability on the axis of the last query.
LEAST = 1e-8
_DECADES = np.arange(-8, 1)
_LEARNED = "#8c9299"
#: Numbers of cells along a side of a map and of points of a curve, from fine to coarse.
_DETAILS = ((128, 1024), (96, 512), (64, 384), (48, 256), (32, 160), (24, 96), (16, 32))


def draw_prior(profile: xr.Dataset, *, kind: str = "decomposition") -> Figure:
    """Draw a prior profile.

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.prior_profile`, or a selection of its layers and heads.
    kind : {"decomposition", "heads", "kernel", "matrix"}
        The four panels of the paper's Figure 1; all layers and heads at a glance; the kernel by
        lag with its spectrum; or large maps of the log-prior and of the induced plan.

    Returns
    -------
    Figure
        Menus choose the layer and head. If there are more heads than a figure can hold, the menus
        have those with the largest margin at the last query (for kind="kernel", the largest range
        of the kernel), and the caption gives their number.

    Raises
    ------
    TypeError
        If `profile` is not a prior profile.
    ValueError
        If `kind` is unknown, or no head is present.
    """
    check_result(profile, PRIOR_PROFILE)
    checks.one_of("kind", kind, PRIOR_KINDS)
    for dim in ("layer", "head"):
        if dim not in profile.dims:
            profile = profile.expand_dims(dim)
    heads = np.argwhere(profile["present"].values)
    if not len(heads):
        raise ValueError("profile must hold a head that is present, got none")
    if kind == "heads":
        caption = [*_beside(profile), f"At the last query of {profile.attrs['length']:,} tokens."]
        title = f"{_title(profile)}: all heads at a glance"
        return grid(head_panels(profile), Words(title, _lengths(profile), caption))
    return _draw_heads(profile, kind, heads)


def prior_detail(kind: str, heads: int, layers: int) -> tuple[int, int]:
    """The numbers of cells along a side of a map and of points of a curve that fit a figure.

    Parameters
    ----------
    kind : str
        As in `draw_prior`.
    heads : int
        Number of heads in all layers together.
    layers : int
        Number of layers; their menu holds one more copy of a head for each.
    """
    fit = [d for d in _DETAILS if (heads + layers) * _bytes(kind, *d) < LIMIT_BYTES]
    return fit[0] if fit else _DETAILS[-1]


def _bytes(kind: str, cells: int, points: int) -> float:
    """Upper bound for the bytes of a head in a figure: float32 in base64, escaped, and settings."""
    maps = 2 * (log_prior in PRIOR_KINDS[kind])
    curves = 5 * (kernel in PRIOR_KINDS[kind]) + 3 * (sink in PRIOR_KINDS[kind])
    return 6.5 * (maps * cells**2 + curves * points) + 1500


def _draw_heads(profile: xr.Dataset, kind: str, heads: np.ndarray) -> Figure:
    rank, rule = _rank(profile, kind)
    order = sorted(map(tuple, heads), key=lambda at: -np.nan_to_num(rank[at], nan=-np.inf))
    layers = len(np.unique(heads[:, 0]))
    profile = coarser(profile, *prior_detail(kind, len(heads), layers))
    size = _bytes(kind, profile.sizes["query"], max(profile.sizes["key"], profile.sizes["lag"]))
    shown = sorted(order[: max(1, int(LIMIT_BYTES / size) - layers)])
    entries = []
    for layer, head in shown:
        one = profile.isel(layer=layer, head=head)
        where = f"layer {int(one['layer'])}, head {int(one['head'])} ({one['layer_name'].item()})"
        if explained := explained_text(one):
            where += f": {explained}"
        panels = [draw(one) for draw in PRIOR_KINDS[kind]]
        if kind == "matrix":
            panels = [replace(panel, height=340) for panel in panels]
        group = f"layer {int(one['layer'])}"
        entries.append(Entry(f"head {int(one['head'])}", panels, group, where, rank[layer, head]))
    if kind == "kernel" and not (profile["frequency"].values > 0).any():
        entries = [replace(entry, panels=entry.panels[:1]) for entry in entries]
    caption = _beside(profile)
    if len(heads) > 1:
        caption.append(f"Menus open on {rule}.")
    if len(shown) < len(heads):
        caption.append(
            f"In the menus: the {len(shown):,} leading heads of {len(heads):,}, by the same rule; "
            "layers= and heads= choose others, and kind='heads' shows all."
        )
    title = _title(profile) + {"kernel": ": kernel", "matrix": ": log-prior and plan"}.get(kind, "")
    return menu(entries, Words(title, _lengths(profile), caption + _pooling(profile, kind)))


def explained_text(head: xr.Dataset) -> str:
    """How well an implied prior explains the logits; "" for a learned one.

    Parameters
    ----------
    head : xarray.Dataset
        One head of a prior profile.
    """
    if "explained_variance" not in head.variables or not np.isfinite(head["explained_variance"]):
        return ""
    text = f"explains {float(head['explained_variance']):.1%} of the logits' variance within rows"
    if "held_out" in head.variables and np.isfinite(head["held_out"]):
        text += f", {float(head['held_out']):.1%} of unseen inputs': {head['verdict'].item()}"
    if "rotary_share" in head.variables and np.isfinite(head["rotary_share"]):
        text += f"; rotary waves explain {float(head['rotary_share']):.1%} of the kernel"
    return text


def _rank(profile: xr.Dataset, kind: str) -> tuple[np.ndarray, str]:
    """The rank of each layer and head in the menus, and its rule in words."""
    if kind == "kernel":
        low, high = profile["kernel_low"].min("lag"), profile["kernel_high"].max("lag")
        return (high - low).values, "the head whose kernel has the largest range"
    margin = profile["margin"].isel(query=-1).values
    return margin, "the head whose top key has the largest margin at the last query"


def _title(profile: xr.Dataset) -> str:
    return str(profile.attrs.get("title", "Learned prior"))


def _lengths(profile: xr.Dataset) -> str:
    trained = profile.attrs.get("training_length")
    return f"{profile.attrs['length']:,} tokens" + (f", trained at {trained:,}" if trained else "")


def _beside(profile: xr.Dataset) -> list[str]:
    """Caption lines for every kind: layers left out, and notes."""
    attrs, layers = profile.attrs, profile.sizes["layer"]
    lines = []
    if layers < attrs.get("num_layers", layers):
        lines.append(f"{layers} of {attrs['num_layers']} layers are shown: layers= chooses others.")
    if attrs.get("notes"):
        sign = "" if "explained_variance" in profile.variables else "⚠ "
        lines.append(f"{sign}{attrs['notes'][:1].upper()}{attrs['notes'][1:]}.")
    return lines


def _pooling(profile: xr.Dataset, kind: str) -> list[str]:
    lines = []
    curves = {"key", "lag"} if kind == "decomposition" else {"lag"} if kind == "kernel" else set()
    if any(np.any(profile[f"{dim}_stop"].values - profile[dim].values > 1) for dim in curves):
        lines.append("Curves: means in bins beyond the exact part, and ranges in them as bands.")
    width = int(np.max(profile["bin_stop"].values - profile["key_bin"].values))
    rows = profile.sizes["query"]
    if kind != "kernel" and (width > 1 or rows < profile.attrs["length"]):
        pooled = "; in each bin of keys K is averaged and mass is summed" if width > 1 else ""
        lines.append(f"Maps: {rows} of {profile.attrs['length']:,} queries{pooled}.")
    return lines


# --- panels of curves ---


def sink(head: xr.Dataset) -> Panel:
    """The key-only term u(j) of one head."""
    x, hover, extra = _points(head, "key")
    color = style.LINES[0]
    hover += "<br>u = %{y:.4g} nats"
    u = marks.curve(x, head["sink"].values, name="u(j)", color=color, hover=hover, **extra)
    beside = [*_spread(head, x, "sink", color, extra), *_interval(head, x, "sink", color)]
    return Panel(
        "Sink u(j)",
        [*beside, *_learned(head, x, "sink", "key"), u, *_few(head, x, "sink", "key")],
        _positions(head, "key j", "key"),
        _nats("u(j)"),
    )


def kernel(head: xr.Dataset) -> Panel:
    """The kernel κ(i − j), with its relative and recency parts if it has both."""
    if not np.isfinite(head["kernel"].values).all():
        # A causal layer in a profile that has negative lags for other layers.
        head = head.isel(lag=np.isfinite(head["kernel"].values))
    x, hover, extra = _points(head, "lag")
    color = style.LINES[1]

    def line(field: str, name: str, color: str, dash: str, width: float) -> marks.Trace:
        text = f"{hover}<br>{name} = %{{y:.4g}} nats"
        y = head[field].values
        return marks.curve(
            x, y, name=name, color=color, hover=text, dash=dash, width=width, **extra
        )

    traces = [*_spread(head, x, "kernel", color, extra), *_interval(head, x, "kernel", color)]
    traces += _learned(head, x, "kernel", "lag")
    traces.append(line("kernel", "κ(lag)", color, "solid", 2.5))
    traces += [*_few(head, x, "kernel", "lag")]
    traces += _rotary_periods(head, float(np.nanmin(head["kernel_low"].values)))
    note = ""
    if "recency" in head.variables and np.any(head["recency"].values):
        traces.append(line("relative", "relative", style.LINES[2], "dot", 1.5))
        traces.append(line("recency", "recency −m·lag", style.LINES[3], "dash", 1.5))
        note = "recency is 0 at the diagonal"
    y = _nats("κ")
    return Panel("Kernel κ(lag)", traces, _positions(head, "lag i − j", "lag"), y, note)


def spectrum(head: xr.Dataset) -> Panel:
    """Amplitudes of the relative term by period; a dotted line marks the length."""
    frequency = head["frequency"].values
    # A frequency of 0 gives a constant, which changes no weight.
    known = np.isfinite(frequency) & (frequency > 0)
    frequency = frequency[known]
    period, length = 2 * np.pi / frequency, head.attrs["length"]
    hover = "period %{x:.4g} tokens (%{customdata:.4g} radian/token)<br>"
    traces = []
    if "learned_amplitude" in head.variables:
        y, origin = head["learned_amplitude"].values[known], _origin(head)
        text = f"{hover}{origin} amplitude %{{y:.4g}} nats"
        rings = {"symbol": "circle-open", "size": 13, "customdata": frequency}
        traces.append(marks.points(period, y, name=origin, color=_LEARNED, hover=text, **rings))
    y, text = head["amplitude"].values[known], hover + "amplitude %{y:.4g} nats"
    extra = {"customdata": frequency, "showlegend": bool(traces)}
    traces.append(
        marks.stems(period, y, name="amplitude", color=style.LINES[4], hover=text, **extra)
    )
    waves = "origin" in head.attrs and "rotary_frequency" in head.variables
    traces += _rotary_periods(head, 0.0) if waves else []
    # Without a Fourier term the axis still needs a range.
    low, high = (period.min(), period.max()) if len(period) else (2.0, 2.0 * length)
    x = {
        "title": "period 2π/ω [tokens]",
        "type": "log",
        "dtick": 1,
        "tickformat": "~s",
        "range": [
            float(np.log10(min(low, length))) - 0.3,
            float(np.log10(max(high, length))) + 0.3,
        ],
    }
    y = _nats("amplitude") | {"rangemode": "tozero"} | ({} if len(period) else {"range": [0, 1]})
    # A wave with a period beyond the length is only a slope within it.
    label = {"text": "length", "x": float(np.log10(length)), "xanchor": "right"}
    label |= {"y": 1, "yref": "y domain", "yanchor": "top"}
    return Panel(
        "Spectrum of the relative term",
        traces,
        x,
        y,
        "Fourier transform of κ at lags of 0 and more, less its line" if waves else "",
        shapes=[marks.upright(length, dash="dot", color=_LEARNED)],
        annotations=[label] if len(period) else [label, marks.notice("no Fourier term")],
    )


def margin(head: xr.Dataset) -> Panel:
    """The margin of the top key of each query and, in a mix, the reach of content."""
    queries = head["query"].values
    traces = _learned(head, queries, "margin", "query")
    keys = head["margin_key"].values.astype(np.int32)
    lead = marks.finite_or_empty(head["margin"].values)
    hover = "query %{x:,}, top key %{customdata:,}<br>margin %{y:.4g} nats"
    look = {"name": "margin", "color": style.LINES[3], "customdata": keys}
    traces.append(marks.curve(queries, lead, hover=hover, **look))
    if "seen" in head.variables:
        seen = head["seen"].values
        needed = np.where(seen > 1, np.log(np.maximum(seen - 1.0, 1.0)), np.nan)
        hover = "query %{x:,}<br>ln(keys − 1) = %{y:.4g} nats keep half the mass"
        look = {"name": "enough for half the mass", "color": style.LINES[6], "dash": "dot"}
        traces.append(marks.curve(queries, needed, hover=hover, width=1.5, **look))
    if "reach" in head.attrs:
        ends = queries[[0, -1]]
        reach = np.full(len(ends), head.attrs["reach"])
        hover = "content can overcome w/τ = %{y:.4g} nats"
        look = {"name": "reach of content", "color": style.LINES[2], "dash": "dashdot"}
        traces.append(marks.curve(ends, reach, hover=hover, width=1.5, **look))
    x = {"title": "query i [tokens]", "tickformat": marks.tick_format(queries)}
    return Panel("Margin of the top key", traces, x, _nats("margin") | {"rangemode": "tozero"})


def last_query(mix: xr.Dataset) -> Panel:
    """The last row of a prior mix, as it is and scaled, and the range that content allows."""
    start, stop = mix["last_key"].values, mix["last_stop"].values
    last, learned = mix["last"].values, mix["learned_last"].values
    low, high = mix["last_low"].values, mix["last_high"].values
    least = max(float(min(last.min(), learned.min(), low.min())), LEAST)
    pooled = np.flatnonzero(stop - start > 1)
    # Bins are as wide as single keys, so that both ends are legible even at a million keys.
    x = np.arange(len(start)) if len(pooled) else start
    axis: dict[str, Any] = {"title": "key j [tokens]", "tickformat": ",d"}
    shapes, hover = [], "key %{x:,}"
    if len(pooled):
        first, end = pooled[0], pooled[-1] + 1
        places = np.array([0, first, (first + end) // 2, end, len(start) - 1])
        axis["title"] = f"key j [tokens, to {(stop - start).max():,} a point]"
        axis |= {"tickvals": places.tolist(), "ticktext": [f"{key:,}" for key in start[places]]}
        shapes = [marks.upright(at, dash="dot", color=_LEARNED) for at in (first - 0.5, end - 0.5)]
        hover = "keys %{customdata[0]:,} to %{customdata[1]:,}"
    extra = {"customdata": np.stack([start, stop - 1], axis=-1).astype(np.int32)}
    below, above = np.maximum(low, LEAST), np.maximum(high, LEAST)
    color = style.LINES[2]
    origin = _origin(mix)
    as_learned = {"name": origin, "color": _LEARNED, "dash": "dash", "width": 1.5}
    text = hover + "<br>π = %{y:.4g}" + (" a key" if len(pooled) else "")
    traces = [
        marks.band(x, below, above, name="reach of content", color=color),
        marks.curve(x, learned, hover=f"{hover}<br>{origin} π = %{{y:.4g}}", **as_learned, **extra),
        marks.curve(x, last, name="π", color=color, hover=text, **extra),
    ]
    return Panel(
        "Last query: π, and what content leaves",
        traces,
        axis,
        {
            "title": "probability of a key",
            "type": "log",
            "range": [float(np.floor(np.log10(least))) - 0.1, 0.1],
            "tickvals": (10.0**_DECADES).tolist(),
            "ticktext": [_decade(exponent) for exponent in _DECADES],
        },
        shapes=shapes,
    )


#: The panels of `goatviz.plots.draw_prior` by kind.
PRIOR_KINDS: dict[str, Sequence[PanelOf]] = {
    "decomposition": (sink, kernel, log_prior, plan),
    "heads": (),
    "kernel": (kernel, spectrum),
    "matrix": (log_prior, plan),
}

#: The panels of a prior mix, in order.
MIX_PANELS: dict[str, PanelOf] = {
    "sink": sink,
    "kernel": kernel,
    "plan": plan,
    "last query": last_query,
    "margin": margin,
    "spectrum": spectrum,
}


# --- parts of panels ---


def _points(head: xr.Dataset, dim: str) -> tuple[np.ndarray, str, dict[str, Any]]:
    """The places of a curve's points, the start of their hover text, and further settings.

    A single curve has no legend; a curve of bins has their ends as customdata.
    """
    start, stop = head[dim].values, head[f"{dim}_stop"].values
    several = f"learned_{'sink' if dim == 'key' else 'kernel'}" in head.variables
    several |= dim == "lag" and "recency" in head.variables and bool(np.any(head["recency"].values))
    if np.all(stop - start == 1):
        return start, f"{dim} %{{x:,}}", {"showlegend": several}
    ends = np.stack([start, stop - 1], axis=-1).astype(np.int32)
    hover = f"{dim} %{{customdata[0]:,}} to %{{customdata[1]:,}} (mean)"
    return (start + stop - 1) / 2, hover, {"customdata": ends, "showlegend": several}


def _spread(
    head: xr.Dataset, x: np.ndarray, field: str, color: str, extra: dict[str, Any]
) -> list[marks.Trace]:
    """The range from smallest to largest value in each bin, if there are bins."""
    if "customdata" not in extra:
        return []
    low, high = head[f"{field}_low"].values, head[f"{field}_high"].values
    return [marks.band(x, low, high, name="range in bin", color=color, showlegend=False)]


def _interval(head: xr.Dataset, x: np.ndarray, field: str, color: str) -> list[marks.Trace]:
    """95 % intervals of a curve that was fitted, where it has any."""
    half = head.get(f"{field}_error")
    if half is None or not np.isfinite(half.values).any():
        return []
    known = np.isfinite(half.values)
    middle, half = head[field].values[known], half.values[known]
    name = "95 % (jackknife)"
    return [marks.band(x[known], middle - half, middle + half, name=name, color=color)]


def _few(head: xr.Dataset, x: np.ndarray, field: str, dim: str) -> list[marks.Trace]:
    """The part of a curve that one input alone has seen, in grey, if several were fitted."""
    inputs = head.get(f"{dim}_inputs")
    if inputs is None or inputs.values.max(initial=0) < 2 or not (inputs.values < 1.5).any():
        return []
    y = np.where(inputs.values < 1.5, head[field].values, np.nan)
    look = {"color": _LEARNED, "width": 2.5, "hover": "", "name": "seen by one input"}
    return [marks.curve(x, y, **look, hoverinfo="skip")]


def _rotary_periods(head: xr.Dataset, height: float) -> list[marks.Trace]:
    """Ticks at the periods of rotary pairs that are shorter than the lags are long."""
    speeds = head.get("rotary_frequency")
    if speeds is None:
        return []
    speeds = speeds.values[np.isfinite(speeds.values)]
    periods = 2 * np.pi / speeds[speeds > 0]
    periods = np.sort(periods[periods <= head["lag_stop"].values[-1]])
    if not len(periods):
        return []
    return [
        marks.points(
            periods,
            np.full(len(periods), height),
            name="rotary periods",
            color=style.INK,
            symbol="line-ns-open",
            size=12,
            hover="rotary period %{x:.4g} tokens",
        )
    ]


def _learned(head: xr.Dataset, x: np.ndarray, field: str, dim: str) -> list[marks.Trace]:
    """The learned curve, if the result has it."""
    if f"learned_{field}" not in head.variables:
        return []
    y = marks.finite_or_empty(head[f"learned_{field}"].values)
    origin = _origin(head)
    hover = f"{dim} %{{x:,.0f}}<br>{origin} {field} %{{y:.4g}} nats"
    return [marks.curve(x, y, name=origin, color=_LEARNED, hover=hover, dash="dash", width=1.5)]


def _origin(mix: xr.Dataset) -> str:
    """The name of the prior before it was scaled: "learned" or "fitted"."""
    return str(mix.attrs["origin"])


def _positions(head: xr.Dataset, what: str, dim: str) -> dict[str, Any]:
    start, stop = head[dim].values, head[f"{dim}_stop"].values
    pooled = ", means in bins" if np.any(stop - start > 1) else ""
    return {"title": f"{what} [tokens{pooled}]", "tickformat": marks.tick_format(start)}


def _nats(what: str) -> dict[str, Any]:
    return {"title": f"{what} [nats]", "exponentformat": "none", "separatethousands": True}


def _decade(exponent: int) -> str:
    """A power of ten at the size of other ticks; plotly's own are larger."""
    if exponent > -4:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
