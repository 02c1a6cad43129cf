"""Panels of a prior whose components are scaled: one pair of axes each, the learned one beside.

Everything is drawn from a "prior_mix" result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.results import PRIOR_MIX, check_result

#: Pixels of every panel.
HEIGHT = 380
#: The smallest probability that the last query's axis reaches.
LEAST = 1e-8
_DECADES = np.arange(-8, 1)
_LEARNED = "#8c9299"


def draw_prior_panel(mix: xr.Dataset, panel: str) -> Figure:
    """Draw one panel of a prior whose components are scaled.

    Parameters
    ----------
    mix : xarray.Dataset
        From `goatviz.analysis.prior_mix.PriorMixer.mix`.
    panel : {"sink", "kernel", "plan", "last query", "margin", "spectrum"}
        The key-only term; relative and recency by lag; the induced plan; its last row with what
        content can make of it; the top key's lead by query; amplitudes by period.

    Returns
    -------
    Figure
        With the same traces in the same order whatever the numbers are.

    Raises
    ------
    TypeError
        If `mix` is not such a result.
    ValueError
        If there is no such panel.
    """
    check_result(mix, PRIOR_MIX)
    if panel not in PRIOR_PANELS:
        raise ValueError(f"panel must be one of {', '.join(PRIOR_PANELS)}, got {panel!r}")
    return PRIOR_PANELS[panel](mix)


def _draw_sink(mix: xr.Dataset) -> Figure:
    x, hover, extra = _points(mix, "key", "key_stop", "key")
    return _figure(
        "Sink u(j)",
        [
            *_spread(mix, x, "sink", style.LINES[0], extra),
            _learned(x, mix["learned_sink"].values, f"{hover}<br>learned u = %{{y:.4g}} nats"),
            marks.curve(
                x,
                mix["sink"].values,
                name="u(j)",
                color=style.LINES[0],
                hover=f"{hover}<br>u = %{{y:.4g}} nats",
                **extra,
            ),
        ],
        x=_tokens("key j", mix, "key", "key_stop"),
        y=_nats("u(j) [nats]"),
    )


def _draw_kernel(mix: xr.Dataset) -> Figure:
    x, hover, extra = _points(mix, "lag", "lag_stop", "lag")
    return _figure(
        "Kernel κ(lag)",
        [
            *_spread(mix, x, "kernel", style.LINES[1], extra),
            _learned(x, mix["learned_kernel"].values, f"{hover}<br>learned κ = %{{y:.4g}} nats"),
            marks.curve(
                x,
                mix["kernel"].values,
                name="κ(lag)",
                color=style.LINES[1],
                hover=f"{hover}<br>κ = %{{y:.4g}} nats",
                **extra,
            ),
        ],
        x=_tokens("lag = query − key", mix, "lag", "lag_stop"),
        y=_nats("κ [nats]"),
    )


def _draw_plan(mix: xr.Dataset) -> Figure:
    start, stop = mix["key_bin"].values, mix["bin_stop"].values
    width = int((stop - start).max())
    middle = (start + stop - 1) / 2
    queries = mix["query"].values
    cell = "key %{x}" if width == 1 else f"{width:,} keys around %{{x:,.0f}}"
    every = len(queries) == mix.attrs["length"]
    return _figure(
        "Induced plan π",
        [
            marks.probability_bar(thickness=12, title="π"),
            marks.probability_map(
                middle,
                queries,
                mix["probability"].values,
                hover=f"query %{{y:,}}, {cell}<br>π = {{value}}",
                name="plan",
            ),
        ],
        x={
            "title": {"text": "key j [token]" if width == 1 else f"key j [token, {width:,} a bin]"},
            "showgrid": False,
            "tickformat": _ticks(mix),
        },
        y={
            "title": {
                "text": "query i [token]" if every else f"query i [token, {len(queries)} shown]"
            },
            "autorange": "reversed",
            "showgrid": False,
            "tickformat": _ticks(mix),
        },
        legend=0,
        # Cells without a value are those that the query may not see.
        plot_bgcolor=style.MASKED,
    )


def _draw_last(mix: xr.Dataset) -> Figure:
    start, stop = mix["last_key"].values, mix["last_stop"].values
    last, learned = mix["last"].values, mix["learned_last"].values
    low, high = mix["last_low"].values, mix["last_high"].values
    least = max(float(min(last.min(), learned.min(), low.min())), LEAST)
    widths = stop - start
    pooled = np.flatnonzero(widths > 1)
    # Bins lie as far apart as single keys: at a million keys both ends can still be read.
    x = np.arange(len(start)) if len(pooled) else start
    axis = {"title": {"text": "key j [token]"}, "tickformat": ",d"}
    shapes = []
    if len(pooled):
        first, end = pooled[0], pooled[-1] + 1
        places = np.array([0, first, (first + end) // 2, end, len(start) - 1])
        axis = {
            "title": {"text": f"key j [token, to {widths.max():,} a point]"},
            "tickvals": places,
            "ticktext": [f"{key:,}" for key in start[places]],
        }
        shapes = [_upright(at) for at in (first - 0.5, end - 0.5)]
    keys = np.stack([start, stop - 1], axis=-1).astype(np.int32)
    hover = "key %{x:,}" if not len(pooled) else "keys %{customdata[0]:,} to %{customdata[1]:,}"
    return _figure(
        "Last query: π, and what content leaves",
        [
            marks.band(
                x,
                np.maximum(low, LEAST),
                np.maximum(high, LEAST),
                name="reach of content",
                color=style.LINES[2],
            ),
            marks.curve(
                x,
                learned,
                name="learned",
                color=_LEARNED,
                dash="dash",
                width=1.5,
                hover=f"{hover}<br>learned π = %{{y:.4g}}",
                customdata=keys,
            ),
            marks.curve(
                x,
                last,
                name="π",
                color=style.LINES[2],
                hover=f"{hover}<br>π = %{{y:.4g}}{' a key' if len(pooled) else ''}",
                customdata=keys,
            ),
        ],
        x=axis,
        y={
            "title": {"text": "probability of a key"},
            "type": "log",
            "range": [float(np.floor(np.log10(least))) - 0.1, 0.1],
            "tickvals": 10.0**_DECADES,
            "ticktext": [_decade(exponent) for exponent in _DECADES],
        },
        shapes=shapes,
    )


def _draw_margin(mix: xr.Dataset) -> Figure:
    queries, seen = mix["query"].values, mix["seen"].values
    keys = mix["margin_key"].values.astype(np.int32)
    ends = queries[[0, -1]]
    needed = np.where(seen > 1, np.log(np.maximum(seen - 1.0, 1.0)), np.nan)
    margin, learned = (marks.finite_or_empty(mix[n].values) for n in ("margin", "learned_margin"))
    return _figure(
        "Margin of the top key",
        [
            _learned(queries, learned, "query %{x:,}<br>learned margin %{y:.4g} nats"),
            marks.curve(
                queries,
                margin,
                name="margin",
                color=style.LINES[3],
                hover="query %{x:,}, top key %{customdata:,}<br>margin %{y:.4g} nats",
                customdata=keys,
            ),
            marks.curve(
                queries,
                needed,
                name="enough for half the mass",
                color=style.LINES[6],
                dash="dot",
                width=1.5,
                hover="query %{x:,}<br>ln(keys − 1) = %{y:.4g} nats keep half the mass",
            ),
            marks.curve(
                ends,
                np.full(len(ends), mix.attrs["reach"]),
                name="reach of content",
                color=style.LINES[2],
                dash="dashdot",
                width=1.5,
                hover="content can overcome w/τ = %{y:.4g} nats",
            ),
        ],
        x=_tokens("query i", mix),
        y=_nats("margin [nats]") | {"rangemode": "tozero"},
        legend=3,
    )


def _draw_spectrum(mix: xr.Dataset) -> Figure:
    period = 2 * np.pi / mix["frequency"].values
    length = mix.attrs["length"]
    hover = "period %{x:.4g} tokens (%{customdata:.4g} radian/token)<br>"
    # An axis needs something to span where there is no Fourier term.
    low, high = (period.min(), period.max()) if len(period) else (2.0, 2.0 * length)
    # Slower waves than the text is long are slopes to it.
    notes = [
        {"x": float(np.log10(length)), "y": 1, "xref": "x", "yref": "paper", "text": "length"},
        *([] if len(period) else [{"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}]),
    ]
    notes[0] |= {"yanchor": "bottom"}
    notes[-1].setdefault("text", "no Fourier term")
    return _figure(
        "Spectrum of the relative term",
        [
            go.Scatter(
                x=period,
                y=np.asarray(mix["learned_amplitude"].values, dtype=np.float32),
                name="learned",
                mode="markers",
                marker={"symbol": "circle-open", "size": 13, "color": _LEARNED},
                customdata=mix["frequency"].values,
                hovertemplate=hover + "learned amplitude %{y:.4g} nats<extra></extra>",
            ),
            marks.stems(
                period,
                mix["amplitude"].values,
                name="amplitude",
                color=style.LINES[4],
                hover=hover + "amplitude %{y:.4g} nats",
                customdata=mix["frequency"].values,
            ),
        ],
        x={
            "title": {"text": "period 2π/ω [token]"},
            "type": "log",
            "dtick": 1,
            "tickformat": "~s",
            "range": [float(np.log10(low)) - 0.3, float(np.log10(max(high, length))) + 0.3],
        },
        y=_nats("amplitude [nats]")
        | {"rangemode": "tozero"}
        | ({} if len(period) else {"range": [0, 1]}),
        shapes=[_upright(length)],
        annotations=[note | {"showarrow": False} for note in notes],
    )


#: What can be drawn, in order.
PRIOR_PANELS: dict[str, Callable[[xr.Dataset], Figure]] = {
    "sink": _draw_sink,
    "kernel": _draw_kernel,
    "plan": _draw_plan,
    "last query": _draw_last,
    "margin": _draw_margin,
    "spectrum": _draw_spectrum,
}


def mix_summary(mix: xr.Dataset) -> str:
    """What is switched, what the last query sees, and what content can do, in words.

    Parameters
    ----------
    mix : xarray.Dataset
        From `goatviz.analysis.prior_mix.PriorMixer.mix`.

    Returns
    -------
    str
        For captions and screen readers.
    """
    check_result(mix, PRIOR_MIX)
    said = mix.attrs
    scales = {name: said[f"{name}_scale"] for name in said["components"].split()}
    changed = [
        f"{name} off" if scale == 0 else f"{name} × {scale:.3g}"
        for name, scale in scales.items()
        if scale != 1
    ]
    last = mix.isel(query=-1)
    count, margin = int(last["seen"]), float(last["margin"])
    key, mass, entropy = (float(last[n]) for n in ("margin_key", "top_mass", "prior_entropy"))
    sentences = [
        f"Layer {said['layer']}, head {said['head']}, {said['length']:,} tokens: "
        + (", ".join(changed) or "as learned")
        + "."
    ]
    if count == 1:
        sentences.append("The last query sees one key.")
    else:
        if margin > 0:
            protected = said["protected_length"]
            sentences.append(
                f"At the last query key {int(key):,} leads by a margin of {margin:.3g} nats with "
                f"{_percent(mass)} of the prior; the margin keeps half the mass on it up to "
                f"{_count(protected)} tokens (1 + e^margin)."
            )
        else:
            sentences.append("At the last query no key leads: its margin is 0 nats.")
        sentences.append(
            f"Entropy {entropy:.3g} of at most {np.log(count):.3g} nats ({count:,} keys)."
        )
        if said["content_range"] > 0:
            held = f"leaves it {_percent(said['top_low'])} to {_percent(said['top_high'])}"
            sentences.append(
                f"Content of range {said['content_range']:.3g} at temperature "
                f"{said['temperature']:.3g} moves log-odds by at most {said['reach']:.3g} nats"
                + (
                    f": it {held} and can{'not' if margin > said['reach'] else ''} unseat it."
                    if margin > 0
                    else "."
                )
            )
    if len(mix["query"]) < said["length"] or (mix["bin_stop"] - mix["key_bin"]).max() > 1:
        sentences.append(
            f"Plan: {len(mix['query'])} queries, evenly spaced; mass summed in "
            f"{len(mix['key_bin'])} equal bins of keys."
        )
    if said["training_length"]:
        sentences.append(f"Trained at {said['training_length']:,} tokens.")
    if said["notes"]:
        sentences.append(f"⚠ {said['notes']}.")
    return " ".join(sentences)


def _count(number: float) -> str:
    if number < 1e9:
        return f"{int(number):,}"
    return f"{number:.2g}" if np.isfinite(number) else "any number of"


def _percent(share: float) -> str:
    """A share whose distance to 0 or 1 is not rounded away."""
    if share > 0.5 and 1 - share < 5e-4:
        return "all but " + _percent(1 - share) if share < 1 else "100%"
    return f"{share:.3%}" if share < 1e-3 and share >= 1e-5 else f"{share:.1%}" if share else "0%"


def _figure(
    title: str,
    traces: list[go.Trace],
    *,
    x: dict,
    y: dict,
    legend: int = 1,
    **layout: Any,
) -> Figure:
    layout |= {
        "template": style.TEMPLATE,
        "title": {"text": title, "font": {"size": 14}},
        "height": HEIGHT,
        "margin": {"l": 60, "r": 16, "t": 40, "b": 56 + 20 * legend},
        "xaxis": x,
        "yaxis": y,
        "showlegend": legend > 0,
    }
    if legend:
        # At the bottom of the figure, and not of the axes, which a long legend would push up.
        layout["legend"] = {
            "orientation": "h",
            "x": 0,
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
        }
    # Traces were checked when they were made; a second time would cost a slider half its speed.
    return Figure(data=traces, layout=layout, _validate=False)


def _tokens(what: str, mix: xr.Dataset, start: str = "", stop: str = "") -> dict:
    pooled = start and int((mix[stop].values - mix[start].values).max()) > 1
    title = f"{what} [token{', means in bins' if pooled else ''}]"
    return {"title": {"text": title}, "tickformat": _ticks(mix)}


def _ticks(mix: xr.Dataset) -> str:
    """Positions as they are, or in thousands and millions where those would not fit."""
    return "~s" if mix.attrs["length"] > 10_000 else ",d"


def _upright(x: float) -> dict:
    """A dotted line from the bottom to the top of the axes."""
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": _LEARNED, "width": 1, "dash": "dot"},
    }


def _decade(exponent: int) -> str:
    """A power of ten in the size of the other ticks, which plotly's own is not."""
    if exponent > -4:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _nats(title: str) -> dict:
    return {"title": {"text": title}, "exponentformat": "none", "separatethousands": True}


def _points(mix: xr.Dataset, start: str, stop: str, what: str) -> tuple[np.ndarray, str, dict]:
    """Where a curve's points lie, what hovering says of them, and the bins if there are any."""
    first, end = mix[start].values, mix[stop].values
    if np.all(end - first == 1):
        return first, f"{what} %{{x:,}}", {}
    bins = np.stack([first, end - 1], axis=-1).astype(np.int32)
    hover = f"{what} %{{customdata[0]:,}} to %{{customdata[1]:,}} (mean)"
    return (first + end - 1) / 2, hover, {"customdata": bins}


def _spread(mix: xr.Dataset, x: np.ndarray, name: str, color: str, extra: dict) -> list[go.Scatter]:
    """Least to largest in each bin, where there are bins."""
    if not extra:
        return []
    low, high = mix[f"{name}_low"].values, mix[f"{name}_high"].values
    return [marks.band(x, low, high, name="range in bin", color=color, showlegend=False)]


def _learned(x: np.ndarray, y: np.ndarray, hover: str) -> go.Scatter:
    # What hovering says names the bins of the curve beside it.
    hover = hover.replace("%{customdata[0]:,} to %{customdata[1]:,}", "%{x:,.0f}")
    return marks.curve(x, y, name="learned", color=_LEARNED, dash="dash", width=1.5, hover=hover)
