"""Panels of the explorer of lengths: one pair of axes each, what was chosen marked in all of them.

The lines are those of `length`, `mass` and `perplexity`; here they get titles short enough to stand
side by side, and marks for the chosen scheme, length and depth.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.length import (
    MEASURES,
    UNITS,
    accuracy_lines,
    depth_map,
    scale_of,
    share_scale,
)
from goatviz.plots.mass import GROUPS, mass_lines, token_lines
from goatviz.plots.perplexity import MEASURES as LOSSES
from goatviz.plots.perplexity import difference_lines, loss_lines
from goatviz.plots.schemes import (
    Focus,
    as_panel,
    beside,
    binary_axis,
    binary_ends,
    chance_line,
    chosen_point,
    interval_line,
    mark_chosen,
    mark_trained,
)
from goatviz.results import (
    LENGTH_SWEEP,
    LOSS_DIFFERENCE,
    MASS_SWEEP,
    NEEDLE_GRID,
    PERPLEXITY_SWEEP,
    check_result,
)

#: Positions that are named below an axis.
MAX_TICKS = 7
#: Lengths of a map whose cells still have room for their number.
MAX_WRITTEN = 8
# Half the width of the band at what was chosen, as a share of a step of the axis.
_BAND = 0.24


def accuracy_panel(result: xr.Dataset, focus: Focus, *, measure: str = "strict") -> Figure:
    """Draw accuracy against length.

    Parameters
    ----------
    result : xarray.Dataset
        From `goatviz.length_sweep`; or a needle grid at one depth, or over all of them.
    focus : Focus
        What is looked at.
    measure : {"strict", "token"}
        Whole answers, or their tokens.

    Raises
    ------
    TypeError
        If `result` is neither.
    """
    schema = result.attrs.get("schema") if isinstance(result, xr.Dataset) else None
    check_result(result, NEEDLE_GRID if schema == NEEDLE_GRID.name else LENGTH_SWEEP)
    where = ""
    if schema == NEEDLE_GRID.name:
        where = "all depths; "
        if "depth" in result.coords:
            where = f"depth {100 * float(result['depth']):g} %; "
    figure = Figure(accuracy_lines(result, measure, focus))
    figure.add_trace(
        chance_line(float(result.attrs[f"chance_{measure}"]), *binary_ends(result["length"].values))
    )
    as_panel(
        figure,
        "Accuracy by length",
        f"{where}{scale_of(result)} examples; 95 % (Wilson)",
    )
    _by_length(figure, result, focus)
    figure.update_yaxes(title_text=f"share of {MEASURES[measure]}", range=[-0.04, 1.06])
    return figure


def map_panel(
    grid: xr.Dataset,
    focus: Focus,
    *,
    measure: str = "strict",
    depth: float | None = None,
) -> Figure:
    """Draw accuracy of the chosen scheme over depth and length, the chosen cell framed.

    Parameters
    ----------
    grid : xarray.Dataset
        From `goatviz.needle_grid`.
    focus : Focus
        What is looked at.
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    depth : float, optional
        The chosen row; without one, the whole column is framed.

    Returns
    -------
    Figure
        Cells are counted from 0, as in a click: lengths to the right, depths downwards. Those that
        were not measured are grey.
    """
    check_result(grid, NEEDLE_GRID)
    one = grid.sel(scheme=focus.scheme)
    lengths, depths = one["length"].values, one["depth"].values
    cells = depth_map(one, measure)
    if len(lengths) > MAX_WRITTEN:
        cells.text = None
    missing = np.isnan(one[measure].values)
    figure = Figure(cells)
    if missing.any():
        figure.add_trace(
            go.Heatmap(
                z=np.where(missing, 1.0, np.nan),
                colorscale=[[0, style.MASKED], [1, style.MASKED]],
                showscale=False,
                name="not measured",
                hovertemplate="not measured<extra></extra>",
                hoverongaps=False,
                xgap=1,
                ygap=1,
            )
        )
    chosen = np.zeros(missing.shape, dtype=bool)
    rows = slice(None) if depth is None else depths == depth
    chosen[rows] = lengths == focus.length
    # Two colours: one of them is seen on every cell.
    for color, width in (("#000000", 5), ("#ffffff", 2)):
        frame = _outline(chosen)
        figure.add_trace(
            go.Scatter(
                x=frame[:, 0],
                y=frame[:, 1],
                mode="lines",
                name="chosen",
                line={"color": color, "width": width},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    as_panel(
        figure,
        f"Depth and length: {style.escape(focus.scheme)}",
        f"{MEASURES[measure]}; {scale_of(one)} examples; click to choose",
    )
    figure.update_layout(
        margin={"b": 76},
        coloraxis=share_scale(
            float(grid.attrs[f"chance_{measure}"]), thickness=12, outlinewidth=0, xpad=6
        ),
    )
    figure.update_xaxes(
        title_text=f"length [tokens], trained at {grid.attrs['training_length']}",
        tickvals=list(range(len(lengths))),
        ticktext=[f"{int(length):,}" for length in lengths],
        range=[-0.5, len(lengths) - 0.5],
        showgrid=False,
    )
    figure.update_yaxes(
        title_text="depth [%]",
        tickvals=list(range(len(depths))),
        ticktext=[f"{100 * each:g}" for each in depths],
        range=[len(depths) - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def depth_panel(
    grid: xr.Dataset,
    focus: Focus,
    *,
    measure: str = "strict",
    depth: float | None = None,
) -> Figure:
    """Draw accuracy against depth at the chosen length, for every scheme.

    Parameters
    ----------
    grid, focus, measure, depth
        As in `map_panel`.
    """
    check_result(grid, NEEDLE_GRID)
    depths = 100 * grid["depth"].values
    step = float(np.diff(depths).min()) if len(depths) > 1 else 20.0
    schemes = [str(scheme) for scheme in grid["scheme"].values]
    unit, figure = UNITS[measure], Figure()
    at_length = grid.isel(length=grid["length"].values == focus.length)
    for at, scheme in enumerate(schemes if at_length.sizes["length"] else []):
        if not focus.shows(scheme):
            continue
        one = at_length.isel(scheme=at, length=0)
        figure.add_trace(
            interval_line(
                at,
                scheme,
                depths + step * beside(at, len(schemes)),
                *(one[f"{measure}{end}"].values for end in ("", "_low", "_high")),
                detail=[depths, one[unit].values],
                hover=style.escape(scheme) + ", depth %{customdata[0]:g} %<br>%{y:.3f} "
                "(%{customdata[1]:.3f} to %{customdata[2]:.3f})<br>%{customdata[3]:,} " + unit,
                focus=focus,
            )
        )
    if not int(at_length["examples"].sum()):
        figure.add_annotation(
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            text="not measured by depth at this length",
            showarrow=False,
        )
    ends = [float(depths.min()) - step / 2, float(depths.max()) + step / 2]
    figure.add_trace(chance_line(float(grid.attrs[f"chance_{measure}"]), *ends))
    if depth is not None:
        mark_chosen(figure, 100 * depth - step * _BAND, 100 * depth + step * _BAND)
    _ring(figure, focus, 100 * depth if depth is not None else None, step)
    as_panel(
        figure,
        f"Accuracy by depth at {focus.length:,} tokens",
        f"{scale_of(at_length)} examples; 95 % (Wilson)",
    )
    figure.update_xaxes(title_text="depth [%]", tickvals=depths, range=ends)
    figure.update_yaxes(title_text=f"share of {MEASURES[measure]}", range=[-0.04, 1.06])
    return figure


def loss_panel(
    sweep: xr.Dataset, focus: Focus, *, kind: str = "length", measure: str = "loss"
) -> Figure:
    """Draw the loss on documents against length, or by position in the longest windows.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    focus : Focus
        What is looked at.
    kind : {"length", "position"}
        Against what.
    measure : {"loss", "perplexity"}
        Nats, or e to the power of them.
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    figure = Figure(loss_lines(sweep, kind, measure=measure, focus=focus))
    title = f"{measure.capitalize()} by {kind}"
    pieces = f"{sweep.sizes['piece']} pieces; 95 % (bootstrap)"
    if kind == "length":
        as_panel(figure, title, f"in windows of a length; {pieces}")
        _by_length(figure, sweep, focus)
    else:
        as_panel(figure, title, f"in windows of {int(sweep['length'][-1]):,}; {pieces}")
        binary_axis(figure, sweep[kind].values, sweep.attrs["training_length"])
        mark_trained(figure, sweep.attrs["training_length"])
        step = -(-sweep.sizes[kind] // MAX_TICKS)
        named = sweep[kind].values[::-step][::-1]
        figure.update_xaxes(
            title_text="position, upper end [tokens, binary scale]",
            tickvals=np.log2(named),
            ticktext=[f"{int(place):,}" for place in named],
        )
    figure.update_yaxes(title_text=LOSSES[measure])
    return figure


def difference_panel(difference: xr.Dataset, focus: Focus, trained: str) -> Figure:
    """Draw the loss less that of a reference against length, paired over pieces.

    Parameters
    ----------
    difference : xarray.Dataset
        From `goatviz.loss_difference`.
    focus : Focus
        What is looked at.
    trained : str
        Training lengths, as the sweep's attribute names them.
    """
    check_result(difference, LOSS_DIFFERENCE)
    reference = style.escape(difference.attrs["reference"])
    figure = Figure(difference_lines(difference, focus))
    figure.add_trace(
        go.Scatter(
            x=binary_ends(difference["length"].values),
            y=[0.0, 0.0],
            mode="lines",
            name=f"{reference} (reference)",
            line={"color": style.INK, "width": 1.5, "dash": "dot"},
            hovertemplate=f"{reference}, the reference<extra></extra>",
        )
    )
    as_panel(
        figure,
        f"Loss less that of {reference}",
        f"paired over {int(difference.attrs['pieces'])} pieces; below 0 is better; 95 %",
    )
    _by_length(figure, difference, focus, trained)
    figure.update_yaxes(title_text="loss difference [nats/token]")
    return figure


def mass_panel(sweep: xr.Dataset, focus: Focus, *, of: str = "accuracy") -> Figure:
    """Draw answer tokens right, or the mass on a group of keys, against length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.
    focus : Focus
        What is looked at.
    of : {"accuracy", "answer", "recent", "first"}
        Which of them.
    """
    check_result(sweep, MASS_SWEEP)
    if of == "accuracy":
        figure = Figure(token_lines(sweep, focus))
        ends = binary_ends(sweep["length"].values)
        figure.add_trace(chance_line(float(sweep.attrs["chance_token"]), *ends))
        title, said, axis = "Answer tokens right", "95 % (Wilson)", "share of tokens"
    else:
        figure = Figure(mass_lines(sweep, of, focus))
        title = GROUPS[of].format(recent=int(sweep.attrs["recent"]))
        said = "95 % (bootstrap); open marks: the prior alone"
        axis = "mass [probability]"
    as_panel(figure, title, f"n = {sweep.attrs['examples']} a run; {said}")
    _by_length(figure, sweep, focus)
    figure.update_yaxes(title_text=axis, range=[-0.04, 1.06])
    return figure


def _by_length(
    figure: Figure, result: xr.Dataset, focus: Focus, trained: str | None = None
) -> None:
    """The axis of lengths, with the training length and the chosen one marked."""
    trained = result.attrs["training_length"] if trained is None else trained
    lengths = result["length"].values
    binary_axis(figure, lengths, trained)
    step = -(-len(lengths) // MAX_TICKS)
    figure.update_xaxes(
        tickvals=figure.layout.xaxis.tickvals[::-step][::-1],
        ticktext=figure.layout.xaxis.ticktext[::-step][::-1],
    )
    mark_trained(figure, trained)
    place = None if focus.length is None else float(np.log2(focus.length))
    if place is not None:
        mark_chosen(figure, place - _BAND, place + _BAND)
    _ring(figure, focus, place, 1.0)


def _ring(figure: Figure, focus: Focus, place: float | None, step: float) -> None:
    """A ring around the chosen scheme's point, where there is one."""
    if place is None:
        return
    for trace in figure.data:
        if trace.legendgroup != focus.scheme or trace.mode != "lines+markers":
            continue
        x, y = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
        near = np.flatnonzero(np.abs(x - place) < step * _BAND)
        if near.size and np.isfinite(y[near[0]]):
            figure.add_trace(chosen_point(x[near[0]], y[near[0]]))
        return


def _outline(chosen: np.ndarray) -> np.ndarray:
    """Corners of the frame around a block of chosen cells; none where nothing was."""
    rows, columns = np.nonzero(chosen)
    if not rows.size:
        return np.empty((0, 2))
    left, right = columns.min() - 0.46, columns.max() + 0.46
    top, bottom = rows.min() - 0.46, rows.max() + 0.46
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom], [left, top]])
