"""Accuracy against length, with intervals; and against length and depth, as small multiples.

Takes the results of `goatviz.analysis.length`. Lengths stand on a binary scale; training length
and chance are marked, and every number says on hover how many examples it rests on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import marks, style
from goatviz.plots.figure import Figure
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, Schema, check_result

MEASURES = {"strict": "whole answers right", "token": "answer tokens right"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
# Share of a doubling by which the whiskers of schemes stand beside each other.
_SPREAD = 0.28


def draw_extrapolation(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """Draw accuracy against length: lines over all runs, a dot for each run.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.length_sweep`.
    measure : {"strict", "token"}
        Whole answers, or their tokens.

    Returns
    -------
    Figure
        Whiskers are 95 % Wilson intervals over all runs; vertical lines mark training lengths, the
        dotted line chance.

    Raises
    ------
    TypeError
        If `sweep` is no length sweep.
    ValueError
        If there is no such measure, or nothing was measured.
    """
    _check(sweep, LENGTH_SWEEP, measure)
    lengths = sweep["length"].values
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    figure = Figure()
    for at, scheme in enumerate(schemes):
        shift = beside(at, len(schemes))
        for trace in _scheme_traces(sweep.isel(scheme=at), scheme, at, shift, measure):
            figure.add_trace(trace)
    chance = float(sweep.attrs[f"chance_{measure}"])
    low, high = _ends(lengths)
    figure.add_trace(
        go.Scatter(
            x=[low, high],
            y=[chance, chance],
            mode="lines",
            name=f"chance ({chance:.3g})",
            line={"color": style.INK, "width": 1.5, "dash": "dot"},
            hovertemplate=f"chance {chance:.3g}<extra></extra>",
        )
    )
    mark_trained(figure, sweep.attrs["training_length"])
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"Length extrapolation: {style.escape(sweep.attrs['task'])}",
            "subtitle": {"text": f"{MEASURES[measure]}; {_scale(sweep)}; whiskers: 95 % (Wilson)"},
        },
        height=500,
        margin={"t": 110, "b": 110},
        legend={"orientation": "h", "y": -0.24},
    )
    binary_axis(figure, lengths, sweep.attrs["training_length"])
    figure.update_yaxes(title_text=f"share of {MEASURES[measure]}", range=[-0.04, 1.04])
    missing = [s for s, count in zip(schemes, _missing(sweep), strict=True) if count]
    if missing:
        names = ", ".join(style.escape(name) for name in missing)
        figure.add_annotation(marks.caption(f"not measured at every length: {names}", yshift=-95))
    return figure


def draw_needle(grid: xr.Dataset, *, measure: str = "token") -> Figure:
    """Draw accuracy against length and depth: one map for each scheme, one scale for all.

    Parameters
    ----------
    grid : xarray.Dataset
        From `goatviz.needle_grid`.
    measure : {"token", "strict"}
        Tokens of answers, or whole answers.

    Returns
    -------
    Figure
        Depth runs downwards; the colour bar marks chance.

    Raises
    ------
    TypeError
        If `grid` is no needle grid.
    ValueError
        If there is no such measure, or nothing was measured.
    """
    _check(grid, NEEDLE_GRID, measure)
    schemes = [str(scheme) for scheme in grid["scheme"].values]
    columns = min(3, len(schemes))
    rows = -(-len(schemes) // columns)
    figure = Figure(
        make_subplots(
            rows=rows,
            cols=columns,
            subplot_titles=[style.escape(scheme) for scheme in schemes],
            shared_yaxes=True,
            horizontal_spacing=0.04,
            vertical_spacing=0.26 / rows,
        )
    )
    lengths, depths = grid["length"].values, 100 * grid["depth"].values
    for at in range(len(schemes)):
        row, column = at // columns + 1, at % columns + 1
        figure.add_trace(_map(grid.isel(scheme=at), measure), row=row, col=column)
        figure.update_xaxes(
            tickvals=list(range(len(lengths))),
            ticktext=[f"{int(length):,}" for length in lengths],
            showgrid=False,
            row=row,
            col=column,
        )
        if at >= len(schemes) - columns:
            figure.update_xaxes(title_text="length [tokens]", row=row, col=column)
    figure.update_yaxes(
        tickvals=list(range(len(depths))),
        ticktext=[f"{depth:g}" for depth in depths],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_yaxes(title_text="depth [%]", col=1)
    chance = float(grid.attrs[f"chance_{measure}"])
    ticks = [tick for tick in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(tick - chance) > 0.06]
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"Depth and length: {style.escape(grid.attrs['task'])}",
            "subtitle": {
                "text": f"{MEASURES[measure]}; {_scale(grid)}; trained at "
                f"{grid.attrs['training_length']} tokens"
            },
        },
        height=150 + 230 * rows,
        margin={"t": 120},
        coloraxis={
            "colorscale": style.SEQUENTIAL,
            "cmin": 0.0,
            "cmax": 1.0,
            "colorbar": {
                "title": {"text": f"share of {MEASURES[measure]}", "side": "right"},
                "tickvals": [*ticks, chance],
                "ticktext": [*(f"{tick:g}" for tick in ticks), f"{chance:.2g} chance"],
            },
        },
    )
    return figure


def mark_trained(figure: Figure, trained: str) -> None:
    """Vertical lines at training lengths, on a binary axis."""
    for length in _numbers(trained):
        place = float(np.log2(length))
        figure.add_vline(x=place, line={"color": style.INK, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=place,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            text=f"trained at {length:,}",
            showarrow=False,
            font={"size": 11},
        )


def binary_axis(
    figure: Figure,
    lengths: np.ndarray,
    trained: str,
    title: str = "length [tokens, binary scale]",
) -> None:
    """Lengths at their logarithms, named with what multiple of the training length they are."""
    numbers = _numbers(trained)
    figure.update_xaxes(
        title_text=title,
        tickvals=np.log2(lengths),
        ticktext=[_tick(int(length), numbers) for length in lengths],
        range=_ends(lengths),
    )


def scheme_line(at: int, scheme: str) -> dict[str, Any]:
    """How the line of a scheme looks: colour, dash and marker all tell it apart."""
    return {
        "name": style.escape(scheme),
        "legendgroup": scheme,
        "line": {
            "color": style.LINES[at % len(style.LINES)],
            "width": 2,
            "dash": _DASHES[at % len(_DASHES)],
        },
        "marker": {"symbol": _MARKERS[at % len(_MARKERS)], "size": 9},
    }


def run_marks(at: int, scheme: str) -> dict[str, Any]:
    """How the small marks of a scheme's single runs look."""
    return {
        "name": f"{style.escape(scheme)}, each run",
        "legendgroup": scheme,
        "showlegend": False,
        "mode": "markers",
        "marker": {
            "color": marks.translucent(style.LINES[at % len(style.LINES)], 0.55),
            "size": 5,
            "symbol": _MARKERS[at % len(_MARKERS)],
        },
    }


def beside(at: int, schemes: int) -> float:
    """By how much of a doubling a scheme is moved, so that whiskers stand beside each other."""
    return _SPREAD * ((at + 0.5) / schemes - 0.5)


def _ends(lengths: np.ndarray) -> list[float]:
    return [float(np.log2(lengths.min())) - 0.35, float(np.log2(lengths.max())) + 0.35]


def _check(result: xr.Dataset, schema: Schema, measure: str) -> None:
    check_result(result, schema)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if not int(result["examples"].sum()):
        raise ValueError(f"{schema.name} must hold at least one example, got none")


def _scheme_traces(
    one: xr.Dataset, scheme: str, at: int, shift: float, measure: str
) -> list[go.Scatter]:
    name = style.escape(scheme)
    places = np.log2(one["length"].values) + shift
    mean = one[f"mean_{measure}"].values
    unit = {"strict": "examples", "token": "tokens"}[measure]
    count = one[unit].values
    runs = int((one["examples"].values.sum(axis=1) > 0).sum())
    hover = (
        name + ", %{customdata[0]:,} tokens<br>%{y:.3f} (%{customdata[1]:.3f} to "
        "%{customdata[2]:.3f})<br>%{customdata[3]:,} " + unit + f", {runs} run(s)<extra></extra>"
    )
    low, high = one[f"mean_{measure}_low"].values, one[f"mean_{measure}_high"].values
    traces = [
        go.Scatter(
            x=places,
            y=mean,
            mode="lines+markers",
            **scheme_line(at, scheme),
            error_y={
                "type": "data",
                "symmetric": False,
                "array": high - mean,
                "arrayminus": mean - low,
                "width": 4,
                "thickness": 1.5,
            },
            customdata=np.stack([one["length"].values, low, high, count.sum(axis=0)], axis=-1),
            hovertemplate=hover,
        )
    ]
    if runs > 1:
        values = one[measure].values
        traces.append(
            go.Scatter(
                x=np.tile(places, len(values)),
                y=values.flatten(),
                **run_marks(at, scheme),
                customdata=np.stack(
                    [np.repeat(one["run"].values, len(places)), count.flatten()], axis=-1
                ),
                hovertemplate=name + ", run %{customdata[0]}<br>%{y:.3f}<br>"
                "%{customdata[1]:,} " + unit + "<extra></extra>",
            )
        )
    return traces


def _map(one: xr.Dataset, measure: str) -> go.Heatmap:
    unit = {"strict": "examples", "token": "tokens"}[measure]
    length, depth = np.meshgrid(one["length"].values, 100 * one["depth"].values)
    detail = [length, depth, one[f"{measure}_low"], one[f"{measure}_high"], one[unit]]
    values = marks.finite_or_empty(one[measure].values)
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        text=[["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values],
        texttemplate="%{text}",
        customdata=np.stack([np.asarray(values, dtype=float) for values in detail], axis=-1),
        hovertemplate="%{customdata[0]:,} tokens, depth %{customdata[1]:g} %<br>%{z:.3f} "
        "(%{customdata[2]:.3f} to %{customdata[3]:.3f})<br>%{customdata[4]:,} "
        + unit
        + "<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in str(text).split(",")]


def _tick(length: int, trained: list[int]) -> str:
    text = f"{length:,}"
    if len(trained) == 1 and length % trained[0] == 0 and length > trained[0]:
        text += f"<br>{length // trained[0]}x"
    return text


def _missing(sweep: xr.Dataset) -> np.ndarray:
    """Lengths at which no run of a scheme was measured."""
    return (sweep["examples"].sum("run") == 0).sum("length").values


def _scale(result: xr.Dataset) -> str:
    """How many examples a cell has: the smallest and the largest."""
    count = result["examples"]
    count = count.sum("run") if "run" in count.dims else count
    some = count.values[count.values > 0]
    low, high = int(some.min()), int(some.max())
    return f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"
