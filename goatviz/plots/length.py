"""Accuracy of answers against length, with intervals; and against length and depth, as maps.

Panels of the "length_sweep" and "needle_grid" results. Lengths stand on a binary scale; training
length and chance are marked, and hovering says how many examples a number rests on.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from goatviz import checks
from goatviz.plots import marks, style
from goatviz.plots.base import Panel, Words, single
from goatviz.plots.base import grid as panel_grid
from goatviz.plots.figure import Figure
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import (
    ALL_ALIKE,
    Focus,
    chance_line,
    chosen,
    ends_of,
    interval_line,
    length_axis,
    run_dots,
    spread,
    trained_marks,
    trained_note,
)
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, Schema, check_result

MEASURES = {"strict": "whole answers right", "token": "answer tokens right"}
UNITS = {"strict": "examples", "token": "tokens"}
#: Lengths of a map whose cells still have room for their number.
MAX_WRITTEN = 8


def draw_length(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """Draw accuracy against length: lines over all runs, a small mark for each run.

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
        If `sweep` is not a length sweep.
    ValueError
        If there is no such measure, or nothing was measured.
    """
    _check(sweep, LENGTH_SWEEP, measure)
    panel = accuracy_panel(sweep, measure=measure)
    return single(replace(panel, title=f"Length extrapolation: {sweep.attrs['task']}"))


def draw_extrapolation(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """The old name of `draw_length`, for one release.

    .. deprecated:: 0.2
    """
    warnings.warn(
        "draw_extrapolation is now draw_length and will be removed in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return draw_length(sweep, measure=measure)


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
        If `grid` is not a needle grid.
    ValueError
        If there is no such measure, or nothing was measured.
    """
    _check(grid, NEEDLE_GRID, measure)
    schemes = [str(scheme) for scheme in grid["scheme"].values]
    columns = min(2, len(schemes))
    panels = [
        map_panel(grid, scheme, measure=measure, bar=at == columns - 1)
        for at, scheme in enumerate(schemes)
    ]
    subtitle = (
        f"{MEASURES[measure]}; {scale_of(grid)} examples a cell; trained at "
        f"{grid.attrs['training_length']} tokens"
    )
    words = Words(f"Depth and length: {grid.attrs['task']}", subtitle)
    panels = [replace(panel, note="") for panel in panels]
    return panel_grid(panels, words, columns=columns, linked="xy")


def _check(result: xr.Dataset, schema: Schema, measure: str) -> None:
    check_result(result, schema)
    checks.one_of("measure", measure, MEASURES)
    if not int(result["examples"].sum()):
        raise ValueError(f"{schema.name} must hold at least one example, got none")


# --- lines ---


def accuracy_panel(
    result: xr.Dataset, focus: Focus = ALL_ALIKE, *, measure: str = "strict"
) -> Panel:
    """Accuracy against length for every scheme, and a small mark for each of several runs.

    Parameters
    ----------
    result : xarray.Dataset
        A length sweep; or a needle grid at one depth, or over all of them.
    focus : Focus
        What is looked at.
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    """
    lengths, places = result["length"].values, np.log2(result["length"].values)
    schemes = [str(scheme) for scheme in result["scheme"].values]
    traces: list[Trace] = []
    for at, scheme in enumerate(schemes):
        if focus.shows(scheme):
            x = spread(places, at, len(schemes))
            traces += _accuracy(result.isel(scheme=at), scheme, x, measure, focus)
    traces.append(chance_line(float(result.attrs[f"chance_{measure}"]), ends_of(places)))
    where = ""
    if result.attrs["schema"] == NEEDLE_GRID.name:
        where = "all depths; "
        if "depth" in result.coords:
            where = f"depth {100 * float(result['depth']):g} %; "
    trained = result.attrs["training_length"]
    panel = Panel(
        "Accuracy by length",
        traces,
        length_axis(lengths, trained),
        {"title": f"share of {MEASURES[measure]} [1]", "range": [-0.04, 1.06]},
        note=f"{where}{scale_of(result)} examples; 95 % (Wilson); {trained_note(trained)}",
        caption=_missing(result),
        shapes=trained_marks(trained),
        height=300,
    )
    return chosen(panel, places, focus.length and float(np.log2(focus.length)), focus)


def _accuracy(
    one: xr.Dataset, scheme: str, x: np.ndarray, measure: str, focus: Focus
) -> list[Trace]:
    """A scheme's line, and the marks of its runs."""
    name, unit = style.escape(scheme), UNITS[measure]
    several = "run" in one.dims
    pooled = f"mean_{measure}" if several else measure
    count = one[unit].values
    runs = int((one["examples"].values.sum(axis=1) > 0).sum()) if several else 0
    traces = [
        interval_line(
            scheme,
            x,
            [one[f"{pooled}{end}"].values for end in ("", "_low", "_high")],
            focus,
            hover=f"{name}, %{{customdata[0]:,}} tokens<br>%{{y:.3f}} (%{{customdata[1]:.3f}} to "
            f"%{{customdata[2]:.3f}})<br>%{{customdata[3]:,}} {unit}, "
            + (f"{runs} run(s)" if several else "all runs"),
            detail=[one["length"].values, count.sum(axis=0) if several else count],
        )
    ]
    if runs > 1 and focus.runs:
        detail = np.stack([np.repeat(one["run"].values, len(x)), count.ravel()], axis=-1)
        hover = f"{name}, run %{{customdata[0]}}<br>%{{y:.3f}}<br>%{{customdata[1]:,}} {unit}"
        values = one[measure].values
        traces.append(run_dots(scheme, x, values, focus, hover=hover, detail=detail))
    return traces


def depth_panel(result: xr.Dataset, focus: Focus, *, measure: str = "strict") -> Panel:
    """Accuracy against depth at the chosen length, for every scheme.

    Parameters
    ----------
    result : xarray.Dataset
        From `goatviz.needle_grid`.
    focus : Focus
        What is looked at; its length is the one that is drawn.
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    """
    depths = 100 * result["depth"].values
    schemes = [str(scheme) for scheme in result["scheme"].values]
    at_length = result.isel(length=result["length"].values == focus.length)
    traces: list[Trace] = []
    for at, scheme in enumerate(schemes if at_length.sizes["length"] else []):
        if not focus.shows(scheme):
            continue
        one = at_length.isel(scheme=at, length=0)
        traces.append(
            interval_line(
                scheme,
                spread(depths, at, len(schemes)),
                [one[f"{measure}{end}"].values for end in ("", "_low", "_high")],
                focus,
                hover=f"{style.escape(scheme)}, depth %{{customdata[0]:g}} %<br>%{{y:.3f}} "
                "(%{customdata[1]:.3f} to %{customdata[2]:.3f})<br>%{customdata[3]:,} "
                + UNITS[measure],
                detail=[depths, one[UNITS[measure]].values],
            )
        )
    ends = ends_of(depths)
    traces.append(chance_line(float(result.attrs[f"chance_{measure}"]), ends))
    empty = not int(at_length["examples"].sum())
    panel = Panel(
        f"Accuracy by depth at {focus.length:,} tokens",
        traces,
        {"title": "depth [%]", "tickvals": depths.tolist(), "range": ends,
         "ticktext": [f"{depth:g}" for depth in depths]},
        {"title": f"share of {MEASURES[measure]} [1]", "range": [-0.04, 1.06]},
        note=f"{scale_of(at_length)} examples; 95 % (Wilson)",
        annotations=[marks.notice("not measured by depth at this length")] if empty else [],
        height=300,
    )  # fmt: skip
    return chosen(panel, depths, None if focus.depth is None else 100 * focus.depth, focus)


# --- maps ---


def map_panel(
    result: xr.Dataset,
    scheme: str,
    focus: Focus | None = None,
    *,
    measure: str = "strict",
    bar: bool = True,
) -> Panel:
    """Accuracy of one scheme over depth and length, the chosen cell framed.

    Parameters
    ----------
    result : xarray.Dataset
        From `goatviz.needle_grid`.
    scheme : str
        Scheme that is drawn.
    focus : Focus, optional
        What is looked at: its cell is framed; without a depth, the column of its length.
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    bar : bool
        Whether the colour bar is shown.

    Returns
    -------
    Panel
        Cells are counted from 0, as in a click: lengths to the right, depths downwards. Those that
        were not measured are grey.
    """
    one = result.sel(scheme=scheme)
    lengths, depths = one["length"].values, one["depth"].values
    columns, rows = np.arange(len(lengths)), np.arange(len(depths))
    values = one[measure].values.astype(float)
    missing = np.isnan(values)
    traces = [_cells(one, measure, bar, float(result.attrs[f"chance_{measure}"]))]
    if missing.any():
        grey = {"name": "not measured", "color": style.MASKED, "hover": "not measured"}
        traces.append(marks.flat_cells(columns, rows, missing, **grey, xgap=1, ygap=1))
    if focus is not None:
        framed = np.zeros(missing.shape, dtype=bool)
        framed[slice(None) if focus.depth is None else depths == focus.depth] = (
            lengths == focus.length
        )
        traces += _frame(framed)
    return Panel(
        scheme,
        traces,
        {"title": "length [tokens]", "tickvals": columns.tolist(),
         "ticktext": [f"{int(length):,}" for length in lengths],
         "range": [-0.5, len(lengths) - 0.5]},
        {"title": "depth [%]", "tickvals": rows.tolist(),
         "ticktext": [f"{100 * depth:g}" for depth in depths],
         "range": [len(depths) - 0.5, -0.5]},
        note=f"{MEASURES[measure]}; {scale_of(one)} examples a cell; trained at "
        f"{result.attrs['training_length']} tokens",
        height=max(160, 40 * len(depths)),
    )  # fmt: skip


def _cells(one: xr.Dataset, measure: str, bar: bool, chance: float) -> Trace:
    """The cells of a map, their shares written in where there is room."""
    unit, values = UNITS[measure], one[measure].values.astype(float)
    length, depth = np.meshgrid(one["length"].values, 100 * one["depth"].values)
    detail = [length, depth, one[f"{measure}_low"], one[f"{measure}_high"], one[unit]]
    written: dict[str, Any] = {}
    if values.shape[1] <= MAX_WRITTEN:
        texts = [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values]
        written = {"text": texts, "texttemplate": "%{text}"}
    ticks = [tick for tick in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(tick - chance) > 0.06]
    return marks.heatmap(
        np.arange(values.shape[1]),
        np.arange(values.shape[0]),
        values,
        name="share",
        hover="%{customdata[0]:,} tokens, depth %{customdata[1]:g} %<br>%{z:.3f} "
        "(%{customdata[2]:.3f} to %{customdata[3]:.3f})<br>%{customdata[4]:,} " + unit,
        customdata=np.stack([np.asarray(part, dtype=float) for part in detail], axis=-1),
        colorscale=style.SEQUENTIAL,
        zmin=0.0,
        zmax=1.0,
        xgap=1,
        ygap=1,
        showscale=bar,
        colorbar={
            "tickvals": [*ticks, chance],
            "ticktext": [*(f"{tick:g}" for tick in ticks), "chance"],
            "title": {"text": "share"},
        },
        **written,
    )


def _frame(framed: np.ndarray) -> list[Trace]:
    """The outline of a block of cells, in two colours: one of them is seen on every cell."""
    rows, columns = np.nonzero(framed)
    if not rows.size:
        return []
    left, right = columns.min() - 0.46, columns.max() + 0.46
    top, bottom = rows.min() - 0.46, rows.max() + 0.46
    return [
        {
            "type": "scatter",
            "x": [left, right, right, left, left],
            "y": [top, top, bottom, bottom, top],
            "mode": "lines",
            "name": "chosen",
            "line": {"color": color, "width": width},
            "showlegend": False,
            "hoverinfo": "skip",
        }
        for color, width in (("#000000", 5), ("#ffffff", 2))
    ]


# --- words ---


def _missing(result: xr.Dataset) -> list[str]:
    """A caption that names the schemes which were not measured at every length."""
    count = result["examples"]
    count = count.sum("run") if "run" in count.dims else count
    gaps = (count == 0).any("length")
    names = [str(scheme) for scheme in result["scheme"].values[gaps.values]]
    return [f"Not measured at every length: {', '.join(names)}."] if names else []


def scale_of(result: xr.Dataset) -> str:
    """How many examples a cell has, all runs: the smallest and the largest number."""
    count = result["examples"]
    count = count.sum("run") if "run" in count.dims else count
    some = count.values[count.values > 0]
    if not some.size:
        return "n = 0"
    low, high = int(some.min()), int(some.max())
    return f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"
