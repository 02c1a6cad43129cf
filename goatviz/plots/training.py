"""Training losses by step, with the held-out loss at the end and the learning rate below."""

from __future__ import annotations

import numpy as np
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.results import TRAINING_LOG, check_result


def draw_training(log: xr.Dataset) -> Figure:
    """Draw the losses and learning rates of a training log.

    Parameters
    ----------
    log : xarray.Dataset
        From `goatviz.training_log`.

    Returns
    -------
    Figure
        Loss and learning rate over the steps. A run's training loss is that of single batches and
        weighted as its task says; the held-out loss, in the legend, is the mean over all tokens.

    Raises
    ------
    TypeError
        If `log` is no training log.
    """
    check_result(log, TRAINING_LOG)
    figure = Figure(
        make_subplots(
            rows=2, cols=1, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.06
        )
    )
    steps = log["step"].values
    for at, run in enumerate(log["run"].values):
        color = style.LINES[at % len(style.LINES)]
        one = log.isel(run=at)
        name = style.escape(run)
        for row, key, unit in ((1, "loss", " nats"), (2, "learning_rate", "")):
            logged = ~np.isnan(one[key].values)
            figure.add_trace(
                marks.curve(
                    steps[logged],
                    one[key].values[logged],
                    name=name + _held_out(one) if row == 1 else name,
                    color=color,
                    hover=f"{name}<br>step %{{x:,}}<br>%{{y:.4g}}{unit}",
                    legendgroup=str(at),
                    showlegend=row == 1,
                ),
                row=row,
                col=1,
            )
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": "Training",
            "subtitle": {"text": "loss of single batches; held out: mean ± standard error"},
        },
        height=560,
        legend={"orientation": "h", "y": -0.16},
        margin={"b": 100},
    )
    figure.update_xaxes(title_text="step", row=2, col=1)
    figure.update_yaxes(title_text="loss [nats]", row=1, col=1)
    figure.update_yaxes(title_text="rate", rangemode="tozero", exponentformat="power", row=2, col=1)
    return figure


def _held_out(one: xr.Dataset) -> str:
    loss, error = float(one["held_out"]), float(one["held_out_standard_error"])
    if np.isnan(loss):
        return ""
    return f" (held out {loss:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}") + ")"
