"""One query's plan: its mass beside the prior's, and what moves one to the other.

Everything is drawn from a "plan_row" result.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.results import PLAN_ROW, check_result

#: Keys that still have room for their text.
MAX_TOKENS = 48


def draw_row(row: xr.Dataset) -> Figure:
    """Draw one query's plan and prior by key, above the scores and the log-prior behind them.

    Parameters
    ----------
    row : xarray.Dataset
        From `goatviz.analysis.PlanLevels.row`.

    Returns
    -------
    Figure
        Always four traces in this order: plan, prior, content score / temperature, log-prior.

    Raises
    ------
    TypeError
        If `row` is no plan row.
    """
    check_result(row, PLAN_ROW)
    figure = Figure(
        make_subplots(
            rows=2,
            cols=1,
            shared_xaxes=True,
            vertical_spacing=0.08,
            subplot_titles=("Mass", "What makes it"),
        )
    )
    start, stop = row["key"].values, row["key_stop"].values
    middle = (start + stop - 1) / 2
    names = np.array(
        [
            f"key {a:,}" if b - a == 1 else f"keys {a:,} to {b - 1:,}"
            for a, b in zip(start, stop, strict=True)
        ],
        dtype=object,
    )
    if "key_token" in row.variables:
        texts = [style.escape(token) for token in row["key_token"].values]
        names = np.array([f"{n} “{t}”" for n, t in zip(names, texts, strict=True)], dtype=object)
    scaled = row["scores"].values / row.attrs["temperature"]
    panels = (
        (1, "plan", row["weights"].values, style.LINES[0], "solid", "%{y:.4g}"),
        (1, "prior", row["prior"].values, style.LINES[1], "dash", "%{y:.4g}"),
        (2, "content score / temperature", scaled, style.LINES[2], "solid", "%{y:.4g} nats"),
        (2, "log-prior", row["log_prior"].values, style.LINES[3], "dash", "%{y:.4g} nats"),
    )
    for panel, name, values, colour, dash, form in panels:
        figure.add_trace(
            go.Scatter(
                x=middle,
                y=values,
                mode="lines+markers" if len(middle) <= MAX_TOKENS else "lines",
                name=name,
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 5},
                text=names,
                hovertemplate="%{text}<br>" + form + "<extra>" + name + "</extra>",
                connectgaps=False,
            ),
            row=panel,
            col=1,
        )
    figure.update_layout(
        template=style.TEMPLATE,
        title=row_title(row),
        height=520,
        margin={"t": 110, "b": 95},
        legend={"orientation": "h", "y": -0.17},
    )
    figure.update_yaxes(title_text="probability", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="nats", row=2, col=1)
    figure.update_xaxes(title_text="key [token]", row=2, col=1)
    figure.update_xaxes(**key_ticks(row))
    return figure


def row_title(row: xr.Dataset) -> dict[str, object]:
    """Title and subtitle, plotly's own layout."""
    said = row.attrs
    pooled = int((row["key_stop"] - row["key"]).max())
    return {
        "text": f"Query {said['query']:,}: plan and prior",
        "subtitle": {
            "text": f"temperature {said['temperature']:.3g}; entropy {said['entropy']:.3g} nats; "
            f"KL to the prior {said['kl_to_prior']:.3g} nats"
            + (f"; up to {pooled:,} keys a point, masses summed" if pooled > 1 else "")
        },
    }


def key_ticks(row: xr.Dataset) -> dict[str, object]:
    """Tokens as ticks where there are some and they have room; plotly's own layout."""
    if "key_token" not in row.variables or row.sizes["key"] > MAX_TOKENS:
        return {"tickmode": "auto", "tickvals": None, "ticktext": None}
    texts = [style.escape(str(token)[:12]) for token in row["key_token"].values]
    return {"tickmode": "array", "tickvals": row["key"].values, "ticktext": texts}


def row_summary(row: xr.Dataset) -> str:
    """The row in a sentence, for captions and screen readers."""
    said = row.attrs
    checked = "" if said["verdict"] == "not checked" else f"; POT: {said['verdict']}"
    return (
        f"Query {said['query']:,} at temperature {said['temperature']:.3g}: largest weight "
        f"{said['largest_weight']:.4g} on key {said['largest_key']:,}; entropy "
        f"{said['entropy']:.3g} nats, KL to the prior {said['kl_to_prior']:.3g} nats, potential "
        f"{said['potential']:.4g}, content range {said['content_range']:.3g}, prior's margin "
        f"{said['margin']:.3g} nats{checked}."
    )
