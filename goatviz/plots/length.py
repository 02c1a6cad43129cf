"""Accuracy of answers by length, with intervals, and by length and depth, as maps.

Panels of the "length_sweep" and "needle_grid" results. The scale of lengths is binary; training
length and chance are marked, and hovering shows the number of examples behind a value.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

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
    drawn_schemes,
    ends_of,
    interval_line,
    interval_text,
    over_lengths,
    run_dots,
    trained_note,
)
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, Schema, check_result

if TYPE_CHECKING:
    import xarray as xr

MEASURES = {"strict": "whole answers right", "token": "answer tokens right"}
UNITS = {"strict": "examples", "token": "tokens"}
#: Largest number of lengths at which the cells of a map have room for their number.
MAX_WRITTEN = 8


def draw_length(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """Draw accuracy by length: a line over all runs, and a small mark for each run.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.length_sweep`.
    measure : {"strict", "token"}
        Whether whole answers are counted, or their tokens.

    Returns
    -------
    Figure
        Whiskers are 95 % Wilson intervals over all runs. Vertical lines mark training lengths, and
        the dotted line is chance.

    Raises
    ------
    TypeError
        If `sweep` is not a length sweep.
    ValueError
        If `measure` is unknown, or nothing was measured.
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
    """Draw accuracy by length and depth: a map for each scheme, all on one scale.

    Parameters
    ----------
    grid : xarray.Dataset
        From `goatviz.needle_grid`.
    measure : {"token", "strict"}
        Whether tokens of answers are counted, or whole answers.

    Returns
    -------
    Figure
        Depth increases downwards; chance is marked in the colour bar.

    Raises
    ------
    TypeError
        If `grid` is not a needle grid.
    ValueError
        If `measure` is unknown, or nothing was measured.
    """
    _check(grid, NEEDLE_GRID, measure)
    schemes = [str(scheme) for scheme in grid["scheme"].values]
    columns = min(2, len(schemes))
    panels = [
        replace(map_panel(grid, scheme, measure=measure, bar=at == columns - 1), note="")
        for at, scheme in enumerate(schemes)
    ]
    subtitle = (
        f"{MEASURES[measure]}; {scale_of(grid)} examples a cell; trained at "
        f"{grid.attrs['training_length']} tokens"
    )
    words = Words(f"Depth and length: {grid.attrs['task']}", subtitle)
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
    """Accuracy by length for every scheme, and a small mark for each of several runs.

    Parameters
    ----------
    result : xarray.Dataset
        A length sweep, or a needle grid at one depth or over all depths.
    focus : Focus
        What is chosen.
    measure : {"strict", "token"}
        Whether whole answers are counted, or their tokens.
    """
    lengths, places = result["length"].values, np.log2(result["length"].values)
    traces = [
        trace
        for scheme, one, x in drawn_schemes(result, places, focus)
        for trace in accuracy_lines(one, scheme, x, measure, focus)
    ]
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
        y={"title": f"share of {MEASURES[measure]} [1]", "range": [-0.04, 1.06]},
        note=f"{where}{scale_of(result)} examples; 95 % (Wilson); {trained_note(trained)}",
        caption=_missing(result),
        height=300,
    )
    return over_lengths(panel, lengths, trained, focus)


def accuracy_lines(
    one: xr.Dataset, scheme: str, x: np.ndarray, measure: str, focus: Focus
) -> list[Trace]:
    """The line of a scheme, and the marks of its runs."""
    name, unit = style.escape(scheme), UNITS[measure]
    several = "run" in one.dims
    count = one[unit].values
    runs = int((count.sum(axis=1) > 0).sum()) if several else 0
    traces = [
        interval_line(
            scheme,
            x,
            one,
            f"mean_{measure}" if several else measure,
            focus,
            hover=f"{name}, %{{customdata[0]:,}} tokens<br>%{{y:.3f}} {interval_text('.3f')}<br>"
            f"%{{customdata[3]:,}} {unit}, "
            + (checks.count_text(runs, "run") if several else "all runs"),
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
    """Accuracy of a needle grid by depth, for every scheme at the length that is chosen."""
    depths = 100 * result["depth"].values
    at_length = result.isel(length=result["length"].values == focus.length)
    known = at_length.sizes["length"] > 0
    traces = [
        interval_line(
            scheme,
            x,
            one,
            measure,
            focus,
            hover=f"{style.escape(scheme)}, depth %{{customdata[0]:g}} %<br>%{{y:.3f}} "
            f"{interval_text('.3f')}<br>%{{customdata[3]:,}} {UNITS[measure]}",
            detail=[depths, one[UNITS[measure]].values],
        )
        for scheme, one, x in (
            drawn_schemes(at_length.isel(length=0), depths, focus) if known else ()
        )
    ]
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
    """Accuracy of one scheme by length and depth.

    Parameters
    ----------
    result : xarray.Dataset
        From `goatviz.needle_grid`.
    scheme : str
        Scheme that is drawn.
    focus : Focus, optional
        Length and depth whose cell is framed; without a depth, the column of the length is.
    measure : {"strict", "token"}
        Whether whole answers are counted, or their tokens.
    bar : bool
        Whether the colour bar is shown.

    Returns
    -------
    Panel
        The axes count lengths (to the right) and depths (downwards) from 0. Cells that were not
        measured are grey.
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
        traces += marks.double_frame(columns, rows, framed, name="chosen")
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
    """The cells of a map, with their values written in where there is room."""
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


# --- words ---


def _examples(result: xr.Dataset) -> xr.DataArray:
    """Number of examples in each cell, all runs together."""
    return result["examples"].sum("run" if "run" in result["examples"].dims else ())


def _missing(result: xr.Dataset) -> list[str]:
    """A caption that names the schemes that were not measured at every length."""
    gaps = (_examples(result) == 0).any("length")
    names = [str(scheme) for scheme in result["scheme"].values[gaps.values]]
    return [f"Not measured at every length: {', '.join(names)}."] if names else []


def scale_of(result: xr.Dataset) -> str:
    """The smallest and the largest number of examples in a cell, all runs together."""
    count = _examples(result).values
    some = count[count > 0]
    if not some.size:
        return "n = 0"
    low, high = int(some.min()), int(some.max())
    return f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"
