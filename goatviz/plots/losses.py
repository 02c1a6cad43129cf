"""Held-out losses of several runs beside the exact optimum of their task."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from goatviz.plots import style
from goatviz.plots.figure import Figure


def draw_losses(rows: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """Draw losses as points with intervals, in groups, each with the optimum of its task.

    Parameters
    ----------
    rows : sequence of (group, name, loss, standard error, optimum)
        Nats per token.

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
    groups = list(dict.fromkeys(row[0] for row in rows))
    names = list(dict.fromkeys(row[1] for row in rows))
    figure = Figure()
    optimum = {row[0]: row[4] for row in rows}
    edges, levels = [], []
    for at, group in enumerate(groups):
        edges += [at - 0.35, at + 0.35, None]
        levels += [optimum[group], optimum[group], None]
    figure.add_trace(
        go.Scatter(
            x=edges,
            y=levels,
            mode="lines",
            name="optimum (entropy of the task)",
            line={"width": 3, "color": style.LINES[2]},
            hovertemplate="optimum %{y:.5f} nats/token<extra></extra>",
        )
    )
    for place, name in enumerate(names):
        mine = [row for row in rows if row[1] == name]
        shift = 0.4 * ((place + 0.5) / len(names) - 0.5)
        figure.add_trace(
            go.Scatter(
                x=[groups.index(row[0]) + shift for row in mine],
                y=[row[2] for row in mine],
                error_y={"type": "data", "array": [2 * row[3] for row in mine], "width": 7},
                mode="markers+text",
                name=name,
                marker={"color": style.LINES[place], "size": 11},
                text=[f"  {row[2]:.4f}" for row in mine],
                textposition="middle right",
                hovertemplate=name + "<br>held-out loss %{y:.5f} nats/token<extra></extra>",
            )
        )
    figure.update_layout(
        template=style.TEMPLATE,
        title={"text": "Held-out loss", "subtitle": {"text": "mean ± two standard errors"}},
        height=480,
        legend={"orientation": "h", "y": -0.24},
        margin={"b": 100},
    )
    figure.update_xaxes(
        title_text="task",
        tickvals=list(range(len(groups))),
        ticktext=[style.escape(group) for group in groups],
        range=[-0.5, len(groups) - 0.5],
        showgrid=False,
    )
    figure.update_yaxes(title_text="loss [nats/token]")
    return figure
