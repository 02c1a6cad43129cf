"""Figures of a learned prior: the decomposition of Figure 1, all heads, the kernel, the matrix.

Everything is drawn from a "prior_profile" result. Layer and head are chosen inside the figure, by
plotly's own menu, so the choice works in a saved page too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.menus import MAX_CHOICES, add_choices
from goatviz.results import PRIOR_PROFILE, check_result

#: Pixels between the menu and the plots, whose titles lie there.
_PAD = 46


@dataclass(frozen=True)
class _Pair:
    """One head of one layer."""

    layer: int
    head: int
    name: str
    causal: bool
    data: xr.Dataset

    @property
    def label(self) -> str:
        return f"layer {self.layer}, head {self.head}"


def draw_prior(profile: xr.Dataset, *, kind: str = "decomposition") -> Figure:
    """Draw a prior profile.

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.prior_profile`, or a selection of its layers and heads.
    kind : {"decomposition", "heads", "kernel", "matrix"}
        The four panels of the paper's Figure 1; all layers and heads at a glance; the kernel
        against the lag with its spectrum; the log-prior and the induced plan, large.

    Returns
    -------
    Figure
        A plotly Figure; nothing is shown, saved or computed.

    Raises
    ------
    TypeError
        If `profile` is not a prior profile.
    ValueError
        If `kind` is unknown, or more heads are to be chosen from than a menu can hold.
    """
    check_result(profile, PRIOR_PROFILE)
    if kind not in PRIOR_KINDS:
        raise ValueError(f"kind must be one of {', '.join(PRIOR_KINDS)}, got {kind!r}")
    for dim in ("layer", "head"):
        if dim not in profile.dims:
            profile = profile.expand_dims(dim)
    pairs = [
        _Pair(
            int(layer),
            int(head),
            str(profile["layer_name"].sel(layer=layer).item()),
            bool(profile["causal"].sel(layer=layer).item()),
            profile.sel(layer=layer, head=head),
        )
        for layer in profile["layer"].values
        for head in profile["head"].values
        if bool(profile["present"].sel(layer=layer, head=head))
    ]
    if not pairs:
        raise ValueError("profile holds no head that is present")
    if kind != "heads" and len(pairs) > MAX_CHOICES:
        raise ValueError(
            f"profile holds {len(pairs)} heads, more than the {MAX_CHOICES} a menu can offer: "
            "select some with layers= and heads=, or use kind='heads'"
        )
    return PRIOR_KINDS[kind](profile, pairs)


def _draw_decomposition(profile: xr.Dataset, pairs: list[_Pair]) -> Figure:
    figure = Figure(
        make_subplots(
            rows=2,
            cols=2,
            horizontal_spacing=0.2,
            vertical_spacing=0.16,
            row_heights=[0.4, 0.6],
            subplot_titles=(
                "Sink u(j)",
                "Kernel κ(lag), recency relative to the diagonal",
                "Log-prior K, centred in each row",
                "Induced prior, softmax of K" + (" (causal)" if pairs[0].causal else ""),
            ),
        )
    )

    place = {"y": 0.0, "yanchor": "bottom", "len": 0.48, "thickness": 12}

    def traces(pair: _Pair) -> list[tuple[go.Trace, int, int]]:
        bar = {"title": "nats", "x": 0.41, **place}
        return [
            *((mark, 1, 1) for mark in _sink_marks(pair)),
            *((mark, 1, 2) for mark in _kernel_marks(pair)),
            (_signed_matrix(pair, bar), 2, 1),
            (_probability_matrix(pair), 2, 2),
            *((mark, 2, 1) for mark in _special(pair, "row_centred")),
            *((mark, 2, 2) for mark in _special(pair, "probability")),
        ]

    figure.add_trace(marks.probability_bar(x=1.01, **place), row=2, col=2)
    add_choices(figure, pairs, traces, profile.attrs.get("title", "Learned prior"), pad=_PAD)
    figure.update_xaxes(title_text="key j [tokens]", tickformat=",d", row=1, col=1)
    figure.update_yaxes(title_text="u(j) [nats]", row=1, col=1)
    figure.update_xaxes(title_text="lag = query − key [tokens]", tickformat=",d", row=1, col=2)
    figure.update_yaxes(title_text="κ [nats]", row=1, col=2)
    for col in (1, 2):
        _matrix_axes(figure, profile, pairs[0], row=2, col=col)
    figure.update_layout(
        template=style.TEMPLATE,
        height=860,
        margin={"t": 120, "b": 110, "l": 70, "r": 80},
        legend={"orientation": "h", "x": 1.0, "xanchor": "right", "y": 0.575, "yanchor": "top"},
    )
    _captions(figure, profile)
    return figure


def _draw_kernel(profile: xr.Dataset, pairs: list[_Pair]) -> Figure:
    figure = Figure(
        make_subplots(
            rows=1,
            cols=2,
            column_widths=[0.64, 0.36],
            horizontal_spacing=0.12,
            subplot_titles=("Kernel κ(lag)", "Spectrum of the relative term"),
        )
    )

    def traces(pair: _Pair) -> list[tuple[go.Trace, int, int]]:
        spectrum = [(mark, 1, 2) for mark in _spectrum_marks(pair)]
        return [*((mark, 1, 1) for mark in _kernel_marks(pair)), *spectrum]

    add_choices(figure, pairs, traces, "Relative kernel", pad=_PAD)
    figure.update_xaxes(title_text="lag = query − key [tokens]", tickformat=",d", row=1, col=1)
    figure.update_yaxes(title_text="κ [nats]", row=1, col=1)
    figure.update_xaxes(title_text="frequency [radian/token]", type="log", row=1, col=2)
    figure.update_yaxes(title_text="amplitude [nats]", rangemode="tozero", row=1, col=2)
    figure.update_layout(
        template=style.TEMPLATE,
        height=520,
        margin={"t": 120, "b": 150, "l": 70, "r": 40},
        legend={"orientation": "h", "x": 0.0, "y": -0.24, "yanchor": "top"},
    )
    if not any(_has_spectrum(pair) for pair in pairs):
        figure.add_annotation(
            text="no Fourier term",
            x=0.5,
            y=0.5,
            xref="x2 domain",
            yref="y2 domain",
            showarrow=False,
        )
        figure.update_xaxes(range=[-4, 0], row=1, col=2)
        figure.update_yaxes(range=[0, 1], row=1, col=2)
    _captions(figure, profile, matrix=False, yshift=-92)
    return figure


def _draw_matrix(profile: xr.Dataset, pairs: list[_Pair]) -> Figure:
    figure = Figure(
        make_subplots(
            rows=1,
            cols=2,
            horizontal_spacing=0.2,
            subplot_titles=("Log-prior K, centred in each row", "Induced prior"),
        )
    )

    def traces(pair: _Pair) -> list[tuple[go.Trace, int, int]]:
        return [
            (_signed_matrix(pair, {"title": "nats", "x": 0.41, "thickness": 12}), 1, 1),
            (_probability_matrix(pair), 1, 2),
            *((mark, 1, 1) for mark in _special(pair, "row_centred")),
            *((mark, 1, 2) for mark in _special(pair, "probability")),
        ]

    figure.add_trace(marks.probability_bar(x=1.01, thickness=12), row=1, col=2)
    add_choices(figure, pairs, traces, "Log-prior and induced plan", pad=_PAD)
    for col in (1, 2):
        _matrix_axes(figure, profile, pairs[0], row=1, col=col)
    figure.update_layout(
        template=style.TEMPLATE,
        height=650,
        margin={"t": 120, "b": 140, "l": 70, "r": 80},
        legend={"orientation": "h", "x": 1.0, "xanchor": "right", "y": -0.14, "yanchor": "top"},
    )
    _captions(figure, profile, yshift=-84)
    return figure


def _draw_heads(profile: xr.Dataset, pairs: list[_Pair]) -> Figure:
    layers, heads = profile["layer"].values, profile["head"].values
    last = profile.isel(query=-1)
    span = profile["relative"].max("lag") - profile["relative"].min("lag")
    query = int(last["query"])
    top_key = last["margin_key"].values
    lag = query - top_key
    where = np.where(top_key <= lag, "key ", "lag ")
    nearest = np.minimum(top_key, lag)
    panels = (
        ("Margin of the top key", "nats", last["margin"].values, "margin %{z:.3g} nats"),
        ("Prior mass on the top key", "prob.", last["top_mass"].values, "mass %{z:.3g}"),
        (
            "Recency slope m",
            "nats/token",
            profile["recency_slope"].values,
            "slope %{z:.3g} nats/token",
        ),
        ("Range of the relative term", "nats", span.values, "range %{z:.3g} nats"),
    )
    figure = Figure(
        make_subplots(
            rows=2,
            cols=2,
            horizontal_spacing=0.2,
            vertical_spacing=0.24,
            subplot_titles=[panel[0] for panel in panels],
        )
    )
    small = len(layers) * len(heads) <= 64
    for at, (_, unit, values, hover) in enumerate(panels):
        row, col = divmod(at, 2)
        z = marks.finite_or_empty(values)
        text = None
        if small:
            text = np.vectorize(lambda v: "" if np.isnan(v) else f"{v:.3g}")(z).astype(object)
            if at < 2:
                for place in np.ndindex(text.shape):
                    if text[place]:
                        text[place] += f"<br>{where[place]}{int(nearest[place])}"
        finite = z[np.isfinite(z)]
        figure.add_trace(
            go.Heatmap(
                x=marks.compact(heads),
                y=marks.compact(layers),
                z=z,
                text=None if text is None else text.tolist(),
                texttemplate="%{text}" if small else None,
                colorscale=style.SEQUENTIAL,
                zmin=0.0,
                zmax=float(finite.max()) if finite.size and finite.max() > 0 else 1.0,
                colorbar={
                    "title": unit,
                    "thickness": 12,
                    "x": 0.41 if col == 0 else 1.01,
                    "y": 1.0 if row == 0 else 0.0,
                    "yanchor": "top" if row == 0 else "bottom",
                    "len": 0.4,
                },
                hovertemplate="layer %{y}, head %{x}<br>" + hover + "<extra></extra>",
                hoverongaps=False,
                xgap=2,
                ygap=2,
            ),
            row=row + 1,
            col=col + 1,
        )
    figure.update_xaxes(title_text="head", dtick=max(1, len(heads) // 16), showgrid=False)
    figure.update_yaxes(
        title_text="layer", dtick=max(1, len(layers) // 16), autorange="reversed", showgrid=False
    )
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": "All heads at a glance",
            "subtitle": {"text": (f"at the last query of {profile.attrs['length']:,} tokens")},
        },
        height=min(1500, 520 + 2 * max(60, 26 * len(layers))),
        margin={"t": 110, "b": 110, "l": 70, "r": 90},
    )
    _captions(figure, profile, curves=False, matrix=False)
    return figure


PRIOR_KINDS: dict[str, Callable[[xr.Dataset, list[_Pair]], Figure]] = {
    "decomposition": _draw_decomposition,
    "heads": _draw_heads,
    "kernel": _draw_kernel,
    "matrix": _draw_matrix,
}


def _sink_marks(pair: _Pair) -> list[go.Trace]:
    data = pair.data
    start, stop = data["key"].values, data["key_stop"].values
    x, hover, extra = _points(start, stop, "key")
    drawn: list[go.Trace] = []
    if extra:
        drawn.append(
            marks.band(
                x,
                data["sink_low"].values,
                data["sink_high"].values,
                name="range in bin",
                color=style.LINES[0],
                showlegend=False,
            )
        )
    drawn.append(
        marks.curve(
            x,
            data["sink"].values,
            name="sink",
            color=style.LINES[0],
            hover=f"{pair.label}<br>{hover}<br>u = %{{y:.4g}} nats",
            showlegend=False,
            **extra,
        )
    )
    return drawn


def _kernel_marks(pair: _Pair) -> list[go.Trace]:
    data = pair.data
    keep = np.isfinite(data["kernel"].values)
    start, stop = data["lag"].values[keep], data["lag_stop"].values[keep]
    x, hover, extra = _points(start, stop, "lag")
    drawn: list[go.Trace] = []
    if extra:
        drawn.append(
            marks.band(
                x,
                data["kernel_low"].values[keep],
                data["kernel_high"].values[keep],
                name="range in bin",
                color=style.LINES[1],
                showlegend=False,
            )
        )
    recency = data["recency"].values[keep]
    has_recency = bool(np.any(recency != 0))
    lines = [("kernel", "kernel κ", style.LINES[1], "solid", 2.5)]
    if has_recency:
        lines += [
            ("relative", "relative", style.LINES[2], "dot", 1.5),
            ("recency", "recency −m·lag", style.LINES[3], "dash", 1.5),
        ]
    for name, label, color, dash, width in lines:
        drawn.append(
            marks.curve(
                x,
                data[name].values[keep],
                name=label,
                color=color,
                dash=dash,
                width=width,
                hover=f"{pair.label}<br>{hover}<br>{label}: %{{y:.4g}} nats",
                showlegend=has_recency,
                legendgroup=label,
                **extra,
            )
        )
    return drawn


def _spectrum_marks(pair: _Pair) -> list[go.Trace]:
    if not _has_spectrum(pair):
        return []
    data = pair.data
    keep = np.isfinite(data["amplitude"].values) & np.isfinite(data["frequency"].values)
    frequency = data["frequency"].values[keep]
    return [
        marks.stems(
            frequency,
            data["amplitude"].values[keep],
            name="amplitude",
            color=style.LINES[2],
            hover=(
                f"{pair.label}<br>%{{x:.4g}} radian/token (period %{{customdata:.4g}} tokens)"
                "<br>amplitude %{y:.4g} nats"
            ),
            customdata=2 * np.pi / frequency,
            showlegend=False,
        )
    ]


def _has_spectrum(pair: _Pair) -> bool:
    return bool(np.isfinite(pair.data["amplitude"].values).any())


def _signed_matrix(pair: _Pair, bar: dict) -> go.Heatmap:
    data = pair.data
    values = np.where(data["allowed"].values, data["row_centred"].values, np.nan)
    return marks.signed_map(
        data["key_bin"].values,
        data["query"].values,
        values,
        hover=f"{pair.label}<br>{_cell_hover(data)}<br>K − row mean = {{value}} nats",
        bar=bar,
        name="row-centred",
    )


def _probability_matrix(pair: _Pair) -> go.Heatmap:
    data = pair.data
    values = np.where(data["allowed"].values, data["probability"].values, np.nan)
    return marks.probability_map(
        data["key_bin"].values,
        data["query"].values,
        values,
        hover=f"{pair.label}<br>{_cell_hover(data)}<br>prior mass = {{value}}",
        name="probability",
    )


def _special(pair: _Pair, name: str) -> list[go.Heatmap]:
    data = pair.data
    return marks.special_cells(
        data["key_bin"].values, data["query"].values, data[name].values, data["allowed"].values
    )


def _cell_hover(data: xr.Dataset) -> str:
    width = _bin_width(data)
    keys = "key %{x}" if width == 1 else f"{width:,} keys from %{{x}}"
    return f"query %{{y}}, {keys}"


def _bin_width(data: xr.Dataset) -> int:
    return int(np.max(data["bin_stop"].values - data["key_bin"].values))


def _points(
    start: np.ndarray, stop: np.ndarray, what: str
) -> tuple[np.ndarray, str, dict[str, np.ndarray]]:
    """Where a curve's points lie, what hovering says of them, and the bins if there are any."""
    if np.all(stop - start == 1):
        return start, f"{what} %{{x}}", {}
    bins = np.stack([start, stop - 1], axis=-1).astype(np.int32)
    hover = f"{what} %{{customdata[0]}} to %{{customdata[1]}} (mean)"
    return (start + stop - 1) / 2, hover, {"customdata": bins}


def _matrix_axes(figure: Figure, profile: xr.Dataset, pair: _Pair, *, row: int, col: int) -> None:
    width = _bin_width(pair.data)
    keys = "key j [tokens]" if width == 1 else f"key j [tokens, bins of {width:,}]"
    figure.update_xaxes(title_text=keys, tickformat=",d", showgrid=False, row=row, col=col)
    figure.update_yaxes(
        title_text="query i [tokens]",
        tickformat=",d",
        autorange="reversed",
        showgrid=False,
        row=row,
        col=col,
    )


def _captions(
    figure: Figure,
    profile: xr.Dataset,
    *,
    curves: bool = True,
    matrix: bool = True,
    yshift: int = -62,
) -> None:
    attrs = profile.attrs
    parts = [f"{attrs['length']:,} tokens"]
    if attrs.get("training_length"):
        parts.append(f"trained at {attrs['training_length']:,}")
    shown = len(set(profile["layer"].values.tolist()))
    if shown < attrs.get("num_layers", shown):
        parts.append(f"{shown} of {attrs['num_layers']} layers shown (choose with layers=)")
    lines = [" · ".join(parts)]
    if curves and np.any(profile["key_stop"].values - profile["key"].values > 1):
        lines.append("curves beyond the exact part: mean, and range as a band, in equal bins")
    bin_width = np.max(profile["bin_stop"].values - profile["key_bin"].values)
    if matrix and (bin_width > 1 or not attrs["rows"].startswith("every")):
        note = f"matrix: {attrs['rows']}"
        if bin_width > 1:
            note += "; in each key bin K is averaged and mass is summed"
        lines.append(note)
    if "explained_variance" in profile.variables:
        share = profile["explained_variance"].values
        share = share[np.isfinite(share)]
        if share.size:
            lines.append(
                "of the logits' variance in each row this explains "
                f"{share.min():.1%} to {share.max():.1%}, head by head"
            )
        lines.append(style.escape(attrs["notes"]))
    elif attrs.get("notes"):
        lines.append(f"⚠ {style.escape(attrs['notes'])}")
    figure.add_annotation(marks.caption("<br>".join(lines), yshift=yshift))
