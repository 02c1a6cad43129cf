"""What the attention that must give an answer rests on, against length, beside what came out right.

Takes the results of `goatviz.analysis.mass`. Heads are chosen once, at the training length, and
then followed: what moves is the model's behaviour, not the choice.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.length import beside, binary_axis, scheme_line
from goatviz.results import MASS_SWEEP, check_result

_PANELS = {
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
                *(title.format(recent=recent) for title in _PANELS.values()),
            ],
            horizontal_spacing=0.05,
            vertical_spacing=0.14,
        )
    )
    lengths = sweep["length"].values
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    reference = reference_length(sweep)
    for at, scheme in enumerate(schemes):
        x = np.log2(lengths) + beside(at, len(schemes))
        one = sweep.isel(scheme=at)
        figure.add_trace(_accuracy(one, scheme, at, x), row=1, col=1)
        for place, group in enumerate(_PANELS, start=1):
            row, column = place // 2 + 1, place % 2 + 1
            for trace in _masses(one, scheme, at, x, group, reference):
                figure.add_trace(trace, row=row, col=column)
    chance = float(sweep.attrs["chance_token"])
    low, high = float(np.log2(lengths.min())) - 0.35, float(np.log2(lengths.max())) + 0.35
    figure.add_trace(
        go.Scatter(
            x=[low, high],
            y=[chance, chance],
            mode="lines",
            name=f"chance ({chance:.3g})",
            line={"color": style.INK, "width": 1.5, "dash": "dot"},
            hovertemplate=f"chance {chance:.3g}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    trained = sweep.attrs["training_length"]
    for length in (int(part) for part in str(trained).split(",")):
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


def _accuracy(one: xr.Dataset, scheme: str, at: int, x: np.ndarray) -> go.Scatter:
    share = _over_runs(one["token"].values)
    low, high = np.nanmin(one["token_low"].values, 0), np.nanmax(one["token_high"].values, 0)
    return go.Scatter(
        x=x,
        y=share,
        mode="lines+markers",
        **scheme_line(at, scheme),
        error_y=_whiskers(share, low, high),
        customdata=np.stack([one["length"].values, low, high], axis=-1),
        hovertemplate=f"{style.escape(scheme)}, "
        "%{customdata[0]:,} tokens<br>%{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})"
        "<extra></extra>",
    )


def _masses(
    one: xr.Dataset, scheme: str, at: int, x: np.ndarray, group: str, reference: int
) -> list[go.Scatter]:
    """The attention's mass, and the prior's, over runs, each with its own leading head."""
    chosen, heads = [], []
    for run in range(one.sizes["run"]):
        found = leading_head(one.isel(run=run), group, reference)
        if found is not None:
            chosen.append(one.isel(run=run).sel(layer=found[0], head=found[1]))
            heads.append(f"{found[0]}.{found[1]}")
    if not chosen:
        return []
    said = f"{style.escape(scheme)}, layer.head {', '.join(heads)}"
    traces = []
    for plan, what in (("", "attention"), ("prior_", "prior")):
        values, low, high = (
            np.stack([run[f"{plan}{group}_mass{end}"].values for run in chosen])
            for end in ("", "_low", "_high")
        )
        mean, low, high = _over_runs(values), np.nanmin(low, axis=0), np.nanmax(high, axis=0)
        line = scheme_line(at, scheme)
        if plan:
            line["line"] |= {"width": 1, "dash": "dot"}
            line["marker"] |= {"symbol": f"{line['marker']['symbol']}-open", "size": 7}
        traces.append(
            go.Scatter(
                x=x,
                y=mean,
                mode="lines+markers",
                **line,
                showlegend=False,
                error_y=None if plan else _whiskers(mean, low, high),
                customdata=np.stack([one["length"].values, low, high], axis=-1),
                hovertemplate=f"{said}, {what}<br>"
                "%{customdata[0]:,} tokens<br>%{y:.4f} (%{customdata[1]:.4f} to "
                "%{customdata[2]:.4f})<extra></extra>",
            )
        )
    return traces


def _over_runs(values: np.ndarray) -> np.ndarray:
    """Mean over the runs that were measured, NaN where none was."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _whiskers(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, object]:
    """From the lowest end of all runs' intervals to the highest."""
    return {
        "type": "data",
        "symmetric": False,
        "array": high - mean,
        "arrayminus": mean - low,
        "width": 4,
        "thickness": 1.5,
    }
