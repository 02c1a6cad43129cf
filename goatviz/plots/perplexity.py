"""Loss on documents against length, or against position in the longest window, with intervals.

Takes the results of `goatviz.analysis.perplexity`. A mean over a window mixes early tokens, which
have little context at any length, with late ones: the second kind takes them apart.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from goatviz.plots import marks, style
from goatviz.plots.figure import Figure
from goatviz.plots.length import beside, binary_axis, mark_trained, run_marks, scheme_line
from goatviz.results import PERPLEXITY_SWEEP, check_result

KINDS = ("length", "position")


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
    axis, measure, tokens = {
        "length": ("length", "mean_loss", "tokens"),
        "position": ("position", "mean_position_loss", "position_tokens"),
    }[kind]
    places = sweep[axis].values
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    pieces = sweep.sizes["piece"]
    count = sweep[tokens].sum("piece").values
    figure = Figure()
    for at, scheme in enumerate(schemes):
        one = sweep.isel(scheme=at)
        mean, low, high = (one[f"{measure}{end}"].values for end in ("", "_low", "_high"))
        x = np.log2(places) + beside(at, len(schemes))
        runs = int(np.isfinite(one["run_loss"].values).any(axis=1).sum())
        figure.add_trace(
            go.Scatter(
                x=x,
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
                customdata=np.stack([places, low, high, np.exp(mean), count], axis=-1),
                hovertemplate=f"{style.escape(scheme)}, {axis} "
                "%{customdata[0]:,}<br>%{y:.4f} nats (%{customdata[1]:.4f} to "
                "%{customdata[2]:.4f})<br>perplexity %{customdata[3]:.3f}<br>"
                "%{customdata[4]:,} tokens of " + f"{pieces} pieces, {runs} run(s)<extra></extra>",
            )
        )
        if runs > 1 and kind == "length":
            each = one["run_loss"].values
            figure.add_trace(
                go.Scatter(
                    x=np.tile(x, len(each)),
                    y=each.flatten(),
                    **run_marks(at, scheme),
                    customdata=np.repeat(one["run"].values, len(x)),
                    hovertemplate=f"{style.escape(scheme)}, run "
                    "%{customdata}<br>%{y:.4f} nats<extra></extra>",
                )
            )
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
    title = {
        "length": "length [tokens, binary scale]",
        "position": "position, upper end of its bin [tokens, binary scale]",
    }[kind]
    binary_axis(figure, places, trained, title)
    figure.update_yaxes(title_text="loss [nats/token]")
    missing = [s for s in schemes if bool(np.isnan(sweep[measure].sel(scheme=s)).any())]
    if missing:
        names = ", ".join(style.escape(name) for name in missing)
        figure.add_annotation(marks.caption(f"not measured everywhere: {names}", yshift=-95))
    return figure
