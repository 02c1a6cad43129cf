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

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.schemes import (
    Focus,
    binary_axis,
    binary_ends,
    binary_places,
    chance_line,
    interval_line,
    mark_trained,
    run_dots,
)
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, Schema, check_result

MEASURES = {"strict": "whole answers right", "token": "answer tokens right"}
UNITS = {"strict": "examples", "token": "tokens"}


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
    figure.add_traces(accuracy_lines(sweep, measure))
    figure.add_trace(chance_line(float(sweep.attrs[f"chance_{measure}"]), *binary_ends(lengths)))
    mark_trained(figure, sweep.attrs["training_length"])
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"Length extrapolation: {style.escape(sweep.attrs['task'])}",
            "subtitle": {
                "text": f"{MEASURES[measure]}; {scale_of(sweep)}; whiskers: 95 % (Wilson)"
            },
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
        figure.add_trace(depth_map(grid.isel(scheme=at), measure), row=row, col=column)
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
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"Depth and length: {style.escape(grid.attrs['task'])}",
            "subtitle": {
                "text": f"{MEASURES[measure]}; {scale_of(grid)}; trained at "
                f"{grid.attrs['training_length']} tokens"
            },
        },
        height=150 + 230 * rows,
        margin={"t": 120},
        coloraxis=share_scale(
            float(grid.attrs[f"chance_{measure}"]),
            title={"text": f"share of {MEASURES[measure]}", "side": "right"},
        ),
    )
    return figure


def _check(result: xr.Dataset, schema: Schema, measure: str) -> None:
    check_result(result, schema)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if not int(result["examples"].sum()):
        raise ValueError(f"{schema.name} must hold at least one example, got none")


def accuracy_lines(
    result: xr.Dataset, measure: str, focus: Focus | None = None
) -> list[go.Scatter]:
    """Accuracy against length for every scheme, and a small mark for each of several runs.

    Parameters
    ----------
    result : xarray.Dataset
        A length sweep, or a needle grid at one depth.
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    focus : Focus, optional
        What is looked at.
    """
    schemes = [str(scheme) for scheme in result["scheme"].values]
    unit, traces = UNITS[measure], []
    for at, scheme in enumerate(schemes):
        if focus is not None and not focus.shows(scheme):
            continue
        one, name = result.isel(scheme=at), style.escape(scheme)
        x = binary_places(result["length"].values, at, len(schemes))
        several = "run" in one.dims
        pooled = f"mean_{measure}" if several else measure
        count = one[unit].values
        runs = int((one["examples"].values.sum(axis=1) > 0).sum()) if several else 0
        traces.append(
            interval_line(
                at,
                scheme,
                x,
                *(one[f"{pooled}{end}"].values for end in ("", "_low", "_high")),
                detail=[one["length"].values, count.sum(axis=0) if several else count],
                hover=name + ", %{customdata[0]:,} tokens<br>%{y:.3f} (%{customdata[1]:.3f} to "
                "%{customdata[2]:.3f})<br>%{customdata[3]:,} "
                + unit
                + (f", {runs} run(s)" if several else ", all runs"),
                focus=focus,
            )
        )
        if runs > 1 and (focus is None or focus.runs):
            values = one[measure].values
            traces.append(
                run_dots(
                    at,
                    scheme,
                    x,
                    values,
                    detail=np.stack(
                        [np.repeat(one["run"].values, len(x)), count.flatten()], axis=-1
                    ),
                    hover=name + ", run %{customdata[0]}<br>%{y:.3f}<br>%{customdata[1]:,} " + unit,
                    focus=focus,
                )
            )
    return traces


def share_scale(chance: float, **bar: Any) -> dict[str, Any]:
    """Colours from 0 to 1, with chance marked in their bar."""
    ticks = [tick for tick in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(tick - chance) > 0.06]
    return {
        "colorscale": style.SEQUENTIAL,
        "cmin": 0.0,
        "cmax": 1.0,
        "colorbar": {
            "tickvals": [*ticks, chance],
            "ticktext": [*(f"{tick:g}" for tick in ticks), f"{chance:.2g} chance"],
            **bar,
        },
    }


def depth_map(one: xr.Dataset, measure: str) -> go.Heatmap:
    """Accuracy of one scheme of a needle grid, cells counted from 0; empty where not measured."""
    unit = UNITS[measure]
    length, depth = np.meshgrid(one["length"].values, 100 * one["depth"].values)
    detail = [length, depth, one[f"{measure}_low"], one[f"{measure}_high"], one[unit]]
    values = one[measure].values.astype(float)
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


def _missing(sweep: xr.Dataset) -> np.ndarray:
    """Lengths at which no run of a scheme was measured."""
    return (sweep["examples"].sum("run") == 0).sum("length").values


def scale_of(result: xr.Dataset) -> str:
    """How many examples a cell has, all runs: the smallest and the largest number."""
    count = result["examples"]
    count = count.sum("run") if "run" in count.dims else count
    some = count.values[count.values > 0]
    if not some.size:
        return "n = 0"
    low, high = int(some.min()), int(some.max())
    return f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"
