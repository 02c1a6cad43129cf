"""Training losses by step, and held-out losses beside the exact optimum of their task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from goatviz.plots import marks, style
from goatviz.plots.base import Panel, Words, grid, single
from goatviz.plots.figure import Figure
from goatviz.plots.schemes import scheme_look, spread
from goatviz.results import TRAINING_LOG, check_result

if TYPE_CHECKING:
    import xarray as xr


def draw_training(log: xr.Dataset) -> Figure:
    """Draw the losses and learning rates of a training log.

    Parameters
    ----------
    log : xarray.Dataset
        From `goatviz.training_log`.

    Returns
    -------
    Figure
        Loss and learning rate by step. The training loss is that of single batches, with the
        weights of the task; the held-out loss, in the legend, is the mean over all tokens.

    Raises
    ------
    TypeError
        If `log` is not a training log.
    """
    check_result(log, TRAINING_LOG)
    words = Words("Training", "loss of single batches; held out: mean ± standard error")
    return grid(training_panels(log), words, columns=1, linked="x")


def training_panels(log: xr.Dataset) -> list[Panel]:
    """Loss and learning rate by step; a run named after a position scheme has its look."""
    panels = []
    for field, title, axis, height in (
        ("loss", "Training loss", {"title": "loss [nats/token]"}, 280),
        (
            "learning_rate",
            "Learning rate",
            {"title": "rate [1]", "rangemode": "tozero", "tickformat": ".0e"},
            100,
        ),
    ):
        curves = []
        for run in log["run"].values:
            one, name, look = log.sel(run=run), style.escape(run), scheme_look(str(run))
            logged = ~np.isnan(one[field].values)
            curves.append(
                marks.curve(
                    log["step"].values[logged],
                    one[field].values[logged],
                    name=name + (_held_out(one) if field == "loss" else ""),
                    color=look.color,
                    dash=look.dash,
                    width=look.width,
                    zorder=2 if run == "goat" else 1,
                    hover=f"{name}<br>step %{{x:,}}<br>%{{y:.4g}}",
                    legendgroup=str(run),
                    showlegend=field == "loss",
                )
            )
        panels.append(Panel(title, curves, {"title": "step [1]"}, axis, height=height))
    return panels


def _held_out(one: xr.Dataset) -> str:
    loss, error = float(one["held_out"]), float(one["held_out_standard_error"])
    if np.isnan(loss):
        return ""
    return f" (held out {loss:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}") + ")"


def draw_losses(rows: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """Draw losses as points with intervals, in groups, each with the optimum of its task.

    Parameters
    ----------
    rows : sequence of (group, name, loss, standard error, optimum)
        Values in nats per token. A point named after a position scheme has its look.

    Returns
    -------
    Figure
        Whiskers are two standard errors.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one run, got none")
    return single(losses_panel(rows))


def losses_panel(rows: Sequence[tuple[str, str, float, float, float]]) -> Panel:
    """The panel of `draw_losses`."""
    groups = list(dict.fromkeys(row[0] for row in rows))
    names = list(dict.fromkeys(row[1] for row in rows))
    places = np.arange(len(groups), dtype=float)
    optimum = {row[0]: row[4] for row in rows}
    traces = [
        {
            "type": "scatter",
            "x": [place + side for place in places for side in (-0.35, 0.35, np.nan)],
            "y": [optimum[group] for group in groups for _ in range(3)],
            "mode": "lines",
            "name": "optimum (entropy of the task)",
            "line": {"color": style.INK, "width": 2, "dash": "dash"},
            "hovertemplate": "optimum %{y:.5f} nats/token<extra></extra>",
        }
    ]
    for at, name in enumerate(names):
        chosen, look = [row for row in rows if row[1] == name], scheme_look(name)
        x = spread(places, at, len(names))[[groups.index(row[0]) for row in chosen]]
        traces.append(
            marks.points(
                x,
                np.array([row[2] for row in chosen]),
                name=style.escape(name),
                color=look.color,
                symbol=look.symbol,
                size=11,
                hover=f"{style.escape(name)}<br>held-out loss %{{y:.5f}} nats/token",
                error_y={"type": "data", "array": [2 * row[3] for row in chosen], "width": 7},
                text=[f"  {row[2]:.4f}" for row in chosen],
                textposition="middle right",
                mode="markers+text",
                legendgroup=name,
            )
        )
    return Panel(
        "Held-out loss",
        traces,
        {"title": "task", "tickvals": places.tolist(), "ticktext": [*map(style.escape, groups)],
         "range": [-0.5, len(groups) - 0.5], "showgrid": False},
        {"title": "loss [nats/token]"},
        note="mean ± two standard errors",
        height=300,
    )  # fmt: skip
