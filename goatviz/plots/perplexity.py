"""Loss on documents against length, or against position in the longest window, with intervals.

Takes the results of `goatviz.analysis.perplexity`. A mean over a window mixes early tokens, which
have little context at any length, with late ones: the second kind takes them apart.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.plots.schemes import (
    Focus,
    binary_axis,
    binary_places,
    interval_line,
    mark_trained,
    run_dots,
)
from goatviz.results import PERPLEXITY_SWEEP, check_result

KINDS = ("length", "position")
#: What is drawn of a loss, and its axis title.
MEASURES = {"loss": "loss [nats/token]", "perplexity": "perplexity [1]"}
AXES = {
    "length": "length [tokens, binary scale]",
    "position": "position, upper end of its bin [tokens, binary scale]",
}
_FIELDS = {
    "length": ("mean_loss", "tokens"),
    "position": ("mean_position_loss", "position_tokens"),
}


def draw_perplexity(sweep: xr.Dataset, *, kind: str = "length") -> Figure:
    """Draw the loss on documents of several schemes.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    kind : {"length", "position"}
        Against the length of the window, or against the position in the longest one.

    Returns
    -------
    Figure
        Lines are means over runs and pieces, whiskers 95 % bootstrap intervals over pieces, small
        marks single runs; the perplexity is said on hover.

    Raises
    ------
    TypeError
        If `sweep` is no perplexity sweep.
    ValueError
        If there is no such kind.
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    places, pieces = sweep[kind].values, sweep.sizes["piece"]
    figure = Figure(loss_lines(sweep, kind))
    trained = sweep.attrs["training_length"]
    mark_trained(figure, trained)
    what = {
        "length": "mean loss in windows of a length",
        "position": f"loss by position in windows of {int(sweep['length'][-1]):,}",
    }[kind]
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": f"Loss on documents: {style.escape(sweep.attrs['task'])}",
            "subtitle": {
                "text": f"{what}; {pieces} pieces; whiskers: 95 % (bootstrap over pieces)"
            },
        },
        height=500,
        margin={"t": 110, "b": 110},
        legend={"orientation": "h", "y": -0.24},
    )
    binary_axis(figure, places, trained, AXES[kind])
    figure.update_yaxes(title_text=MEASURES["loss"])
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    measured = sweep[_FIELDS[kind][0]]
    missing = [s for s in schemes if bool(np.isnan(measured.sel(scheme=s)).any())]
    if missing:
        names = ", ".join(style.escape(name) for name in missing)
        figure.add_annotation(marks.caption(f"not measured everywhere: {names}", yshift=-95))
    return figure


def loss_lines(
    sweep: xr.Dataset, kind: str, *, measure: str = "loss", focus: Focus | None = None
) -> list[go.Scatter]:
    """Loss against length or position for every scheme, and a small mark for each of several runs.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    kind : {"length", "position"}
        Runs are known by length alone.
    measure : {"loss", "perplexity"}
        Nats, or e to the power of them, interval ends too.
    focus : Focus, optional
        What is looked at.
    """
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    name, tokens = _FIELDS[kind]
    places, pieces = sweep[kind].values, sweep.sizes["piece"]
    count, traces = sweep[tokens].sum("piece").values, []
    nats = measure == "loss"
    shown = "%{y:.4f} nats (%{customdata[1]:.4f} to %{customdata[2]:.4f})"
    other = "perplexity %{customdata[3]:.3f}"
    if not nats:
        shown = "perplexity %{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})"
        other = "%{customdata[3]:.4f} nats"
    for at, scheme in enumerate(schemes):
        if focus is not None and not focus.shows(scheme):
            continue
        one, said = sweep.isel(scheme=at), style.escape(scheme)
        x = binary_places(places, at, len(schemes))
        ends = [one[f"{name}{end}"].values for end in ("", "_low", "_high")]
        values = ends
        if not nats and kind == "length":
            values = [one[f"perplexity{end}"].values for end in ("", "_low", "_high")]
        elif not nats:
            values = [np.exp(end) for end in ends]
        runs = int(np.isfinite(one["run_loss"].values).any(axis=1).sum())
        traces.append(
            interval_line(
                at,
                scheme,
                x,
                *values,
                detail=[places, np.exp(ends[0]) if nats else ends[0], count],
                hover=f"{said}, {kind} %{{customdata[0]:,}}<br>{shown}<br>{other}<br>"
                f"%{{customdata[4]:,}} tokens of {pieces} pieces, {runs} run(s)",
                focus=focus,
            )
        )
        if runs > 1 and kind == "length" and (focus is None or focus.runs):
            each = one["run_loss"].values
            traces.append(
                run_dots(
                    at,
                    scheme,
                    x,
                    each if nats else np.exp(each),
                    detail=np.repeat(one["run"].values, len(x)),
                    hover=f"{said}, run %{{customdata}}<br>"
                    + ("%{y:.4f} nats" if nats else "perplexity %{y:.3f}"),
                    focus=focus,
                )
            )
    return traces


def difference_lines(difference: xr.Dataset, focus: Focus | None = None) -> list[go.Scatter]:
    """Loss less that of a reference against length, for every scheme but the reference.

    Parameters
    ----------
    difference : xarray.Dataset
        From `goatviz.loss_difference`.
    focus : Focus, optional
        What is looked at.
    """
    schemes = [str(scheme) for scheme in difference["scheme"].values]
    reference, lengths = str(difference.attrs["reference"]), difference["length"].values
    traces = []
    for at, scheme in enumerate(schemes):
        if scheme == reference or (focus is not None and not focus.shows(scheme)):
            continue
        one = difference.isel(scheme=at)
        traces.append(
            interval_line(
                at,
                scheme,
                binary_places(lengths, at, len(schemes)),
                *(one[f"difference{end}"].values for end in ("", "_low", "_high")),
                detail=[lengths],
                hover=f"{style.escape(scheme)} less {style.escape(reference)}, length "
                "%{customdata[0]:,}<br>%{y:+.4f} nats (%{customdata[1]:+.4f} to "
                f"%{{customdata[2]:+.4f}})<br>{int(difference.attrs['pieces'])} pieces, paired",
                focus=focus,
            )
        )
    return traces
