"""What the attention that must give an answer rests on, against length, beside what came out right.

Takes the results of `goatviz.analysis.mass`. Heads are chosen once, at the training length, and
then followed: what moves is the model's behaviour, not the choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.schemes import (
    Focus,
    binary_axis,
    binary_ends,
    binary_places,
    chance_line,
    interval_line,
    run_dots,
    scheme_line,
    trained_numbers,
)
from goatviz.results import MASS_SWEEP, check_result

GROUPS = {
    "answer": "Mass on the answer",
    "recent": "Mass on the last {recent} keys",
    "first": "Mass on the first key (sink)",
}


def draw_mass(sweep: xr.Dataset) -> Figure:
    """Draw accuracy, and the mass on answer, recent keys and first key, against length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.

    Returns
    -------
    Figure
        Four panels. Each mass is that of one head of each run: the one with most of it at the
        training length, or at the shortest length where that was not measured. Open marks on
        dotted lines are the same head's prior alone.

    Raises
    ------
    TypeError
        If `sweep` is no mass sweep.
    ValueError
        If nothing was measured.
    """
    check_result(sweep, MASS_SWEEP)
    if not int(sweep["tokens"].sum()):
        raise ValueError("mass_sweep must hold at least one measured cell, got none")
    recent = int(sweep.attrs["recent"])
    figure = Figure(
        make_subplots(
            rows=2,
            cols=2,
            shared_xaxes="all",
            shared_yaxes="all",
            subplot_titles=[
                "Answer tokens right",
                *(title.format(recent=recent) for title in GROUPS.values()),
            ],
            horizontal_spacing=0.05,
            vertical_spacing=0.14,
        )
    )
    lengths = sweep["length"].values
    reference = reference_length(sweep)
    places = [(1, 1), (1, 2), (2, 1), (2, 2)]
    for (row, column), of in zip(places, ("accuracy", *GROUPS), strict=True):
        lines = token_lines(sweep) if of == "accuracy" else mass_lines(sweep, of)
        for trace in lines:
            trace.showlegend = of == "accuracy"
            figure.add_trace(trace, row=row, col=column)
    chance = float(sweep.attrs["chance_token"])
    figure.add_trace(chance_line(chance, *binary_ends(lengths)), row=1, col=1)
    trained = sweep.attrs["training_length"]
    for length in trained_numbers(trained):
        figure.add_vline(
            x=float(np.log2(length)), line={"color": style.INK, "width": 1.5, "dash": "dash"}
        )
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"What the answer rests on: {style.escape(sweep.attrs['task'])}",
            "subtitle": {
                "text": f"n = {sweep.attrs['examples']} a run; each head chosen at "
                f"{reference:,} tokens; open marks: its prior alone; dashed: trained at {trained}"
            },
        },
        height=680,
        margin={"t": 120, "b": 120},
        legend={"orientation": "h", "y": -0.17},
    )
    binary_axis(figure, lengths, trained)
    figure.update_xaxes(title_text="", row=1)
    figure.update_yaxes(range=[-0.04, 1.04])
    figure.update_yaxes(title_text="share of tokens", row=1, col=1)
    figure.update_yaxes(title_text="mass", row=2, col=1)
    return figure


def reference_length(sweep: xr.Dataset) -> int:
    """The length at which heads are chosen: the training length, or else the shortest."""
    lengths = sweep["length"].values.tolist()
    trained = str(sweep.attrs["training_length"])
    return int(trained) if trained.isdigit() and int(trained) in lengths else lengths[0]


def leading_head(one: xr.Dataset, group: str, reference: int) -> tuple[int, int] | None:
    """Layer and head with most of a group's mass at a length; None where nothing was measured.

    Parameters
    ----------
    one : xarray.Dataset
        One scheme and run of a mass sweep.
    group : str
        "answer", "recent" or "first".
    reference : int
        One of its lengths.
    """
    values = one[f"{group}_mass"].sel(length=reference).transpose("layer", "head")
    if bool(np.isnan(values).all()):
        return None
    layer, head = np.unravel_index(int(np.nanargmax(values.values)), values.shape)
    return int(one["layer"].values[layer]), int(one["head"].values[head])


def token_share(one: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answer tokens right by length, one scheme: mean over runs, and the ends of all intervals."""
    return _over_runs(*(one[f"token{end}"].values for end in ("", "_low", "_high")))


def group_mass(
    one: xr.Dataset, group: str, reference: int, *, prior: bool = False
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, list[str]] | None:
    """A group's mass by length in the leading heads of one scheme; None where nothing was measured.

    Parameters
    ----------
    one : xarray.Dataset
        One scheme of a mass sweep.
    group : str
        "answer", "recent" or "first".
    reference : int
        The length at which heads are chosen.
    prior : bool
        The mass under the same heads' prior alone.

    Returns
    -------
    over_runs : tuple of array
        Mean over runs, lowest and highest end of their intervals.
    each : array
        By run and length.
    heads : list of str
        "layer.head" of each of these runs.
    """
    chosen, heads = [], []
    for run in range(one.sizes["run"]):
        found = leading_head(one.isel(run=run), group, reference)
        if found is not None:
            chosen.append(one.isel(run=run).sel(layer=found[0], head=found[1]))
            heads.append(f"{found[0]}.{found[1]}")
    if not chosen:
        return None
    name = f"{'prior_' if prior else ''}{group}_mass"
    each, low, high = (
        np.stack([run[f"{name}{end}"].values for run in chosen]) for end in ("", "_low", "_high")
    )
    return _over_runs(each, low, high), each, heads


def token_lines(sweep: xr.Dataset, focus: Focus | None = None) -> list[go.Scatter]:
    """Answer tokens right against length, for every scheme."""
    traces = []
    for at, scheme, one, x in _schemes(sweep, focus):
        name = style.escape(scheme)
        runs = int((one["tokens"].values.sum(axis=1) > 0).sum())
        traces.append(
            interval_line(
                at,
                scheme,
                x,
                *token_share(one),
                detail=[one["length"].values, one["tokens"].values.sum(axis=0)],
                hover=name + ", %{customdata[0]:,} tokens<br>%{y:.3f} (%{customdata[1]:.3f} to "
                f"%{{customdata[2]:.3f}})<br>%{{customdata[3]:,}} tokens of answers, {runs} run(s)",
                focus=focus,
            )
        )
        if focus is not None and focus.runs and runs > 1:
            traces.append(
                run_dots(
                    at,
                    scheme,
                    x,
                    one["token"].values,
                    detail=np.stack(
                        [np.repeat(one["run"].values, len(x)), one["tokens"].values.flatten()], -1
                    ),
                    hover=name
                    + ", run %{customdata[0]}<br>%{y:.3f}<br>%{customdata[1]:,} tokens of answers",
                    focus=focus,
                )
            )
    return traces


def mass_lines(sweep: xr.Dataset, group: str, focus: Focus | None = None) -> list[go.Scatter]:
    """A group's mass against length for every scheme, and its prior's: each run's leading head."""
    reference, traces = reference_length(sweep), []
    for at, scheme, one, x in _schemes(sweep, focus):
        for prior in (False, True):
            found = group_mass(one, group, reference, prior=prior)
            if found is None:
                continue
            (mean, low, high), each, heads = found
            said = f"{style.escape(scheme)}, layer.head {', '.join(heads)}"
            line = interval_line(
                at,
                scheme,
                x,
                mean,
                low,
                high,
                detail=[one["length"].values],
                hover=f"{said}, {'prior' if prior else 'attention'}<br>"
                "%{customdata[0]:,} tokens<br>%{y:.4f} (%{customdata[1]:.4f} to "
                f"%{{customdata[2]:.4f}})<br>{sweep.attrs['examples']} examples a run, "
                f"{len(heads)} run(s)",
                focus=focus,
            )
            if prior:
                symbol = scheme_line(at, scheme)["marker"]["symbol"]
                line.update(
                    line={"width": 1, "dash": "dot"},
                    marker={"symbol": f"{symbol}-open", "size": 7},
                    error_y=None,
                    showlegend=False,
                )
            traces.append(line)
            if not prior and focus is not None and focus.runs and len(heads) > 1:
                hover = f"{style.escape(scheme)}, run %{{customdata}}<br>%{{y:.4f}}"
                runs = np.repeat(np.arange(len(each)), len(x))
                traces.append(run_dots(at, scheme, x, each, detail=runs, hover=hover, focus=focus))
    return traces


def _schemes(
    sweep: xr.Dataset, focus: Focus | None
) -> Iterator[tuple[int, str, xr.Dataset, np.ndarray]]:
    """Number, name, numbers and places of every scheme that is drawn."""
    names = [str(scheme) for scheme in sweep["scheme"].values]
    for at, scheme in enumerate(names):
        if focus is None or focus.shows(scheme):
            x = binary_places(sweep["length"].values, at, len(names))
            yield at, scheme, sweep.isel(scheme=at), x


def _over_runs(
    values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the runs that were measured, and the ends of all intervals; NaN where none was."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)
    missing = np.isnan(mean)
    lowest = np.where(missing, np.nan, np.where(np.isnan(low), np.inf, low).min(axis=0))
    highest = np.where(missing, np.nan, np.where(np.isnan(high), -np.inf, high).max(axis=0))
    return mean, lowest, highest
