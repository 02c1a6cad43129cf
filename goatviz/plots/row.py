"""One query's plan: its mass beside the prior's, and what moves one to the other.

Everything is drawn from a "plan_row" result.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.results import PLAN_ROW, check_result

#: Keys that still have room for their text.
MAX_TOKENS = 32
#: Points of POT's solution that are drawn as rings.
MAX_RINGS = 128


def draw_row(row: xr.Dataset) -> Figure:
    """Draw one query's plan and prior by key, above the scores and the log-prior behind them.

    Parameters
    ----------
    row : xarray.Dataset
        From `goatviz.analysis.PlanLevels.row`.

    Returns
    -------
    Figure
        Traces where the row has it "POT" (its own solution), "plan", "prior", where the row has
        them "doubly stochastic" and the mean of several queries, then "score / τ", "log-prior"
        and the level "−potential / τ" that their sum has where the plan would be 1.

    Raises
    ------
    TypeError
        If `row` is no plan row.
    """
    check_result(row, PLAN_ROW)
    start, stop = row["key"].values, row["key_stop"].values
    middle = (start + stop - 1) / 2
    names = _names(row)
    # Every point by its number where that says it; texts are most of what a slider would send.
    told = {"hover": "key %{x:,}"}
    if names is not None:
        told = {"hover": "%{text}", "text": names}
    elif (stop - start).max() > 1:
        ends = np.stack([start, stop - 1], axis=-1)
        told = {
            "hover": "keys %{customdata[0]:,} to %{customdata[1]:,}",
            "customdata": ends.astype(np.int32),
        }
    hover = told.pop("hover")
    traces = [
        {
            "type": "scatter",
            "x": middle,
            "y": values,
            "name": name,
            **told,
            "hovertemplate": f"{hover}<br>%{{y:.4g}}{unit}<extra>{name}</extra>",
            "connectgaps": False,
            "xaxis": "x" if panel == 1 else "x2",
            "yaxis": "y" if panel == 1 else "y2",
            **look,
        }
        for panel, name, values, look, unit in _curves(row)
    ]
    # One dict in place of make_subplots and updates: a slider redraws this, and those take longer
    # than all that is computed.
    ticks = key_ticks(row)
    upper, lower = [0.55, 1.0], [0.0, 0.45]
    layout = {
        "template": style.TEMPLATE,
        "title": row_title(row),
        "height": 600,
        "margin": {"t": 110, "b": 120},
        "legend": {
            "orientation": "h",
            "y": -0.17,
            "entrywidth": 0.5,
            "entrywidthmode": "fraction",
        },
        "xaxis": {"anchor": "y", "matches": "x2", "showticklabels": False, **ticks},
        "yaxis": {
            "anchor": "x",
            "domain": upper,
            "title": {"text": "probability"},
            "rangemode": "tozero",
        },
        "xaxis2": {"anchor": "y2", "title": {"text": "key [token]"}, **ticks},
        "yaxis2": {"anchor": "x2", "domain": lower, "title": {"text": "nats"}},
        "annotations": [
            {
                "text": text,
                "x": 0.5,
                "y": domain[1],
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 14},
            }
            for text, domain in (("Mass", upper), ("What makes it", lower))
        ],
    }
    # What plotly would check here takes three times as long as all else, and a test checks it.
    return Figure(data=traces, layout=layout, _validate=False)


def _names(row: xr.Dataset) -> np.ndarray | None:
    """What hover says of each point's key where it has a token; else the numbers say it."""
    if "key_token" not in row.variables:
        return None
    texts = [style.escape(token) for token in row["key_token"].values]
    pairs = zip(row["key"].values, texts, strict=True)
    return np.array([f"key {key:,} “{text}”" for key, text in pairs], dtype=object)


def _curves(row: xr.Dataset) -> list[tuple[int, str, np.ndarray, dict[str, object], str]]:
    """Panel, name, values, look and unit of every curve."""
    few = row.sizes["key"] <= MAX_TOKENS

    def line(number: int, dash: str, width: float = 2) -> dict[str, object]:
        return {
            "mode": "lines+markers" if few else "lines",
            "line": {"color": style.LINES[number], "dash": dash, "width": width},
            "marker": {"size": 5},
        }

    found = [
        (1, "plan", row["weights"].values, line(0, "solid"), ""),
        (1, "prior", row["prior"].values, line(1, "dash"), ""),
    ]
    if "solver" in row.variables:
        rings = {
            "mode": "markers",
            "marker": {"symbol": "circle-open", "size": 9, "color": style.INK},
        }
        # Hundreds of rings take the page longer than all else: then a broad band below the plan.
        band = {"mode": "lines", "line": {"color": "rgba(128,128,128,0.35)", "width": 9}}
        few_rings = row.sizes["key"] <= MAX_RINGS
        found.insert(0, (1, "POT", row["solver"].values, rings if few_rings else band, ""))
    if "balanced" in row.variables:
        found.append((1, "doubly stochastic", row["balanced"].values, line(5, "dot"), ""))
    if "mean" in row.variables:
        name = f"queries {row.attrs['mean_start']:,}–{row.attrs['mean_stop'] - 1:,}, mean"
        found.append((1, name, row["mean"].values, line(4, "longdash"), ""))
    temperature = row.attrs["temperature"]
    level = np.where(row["allowed"].values, -row.attrs["potential"] / temperature, np.nan)
    return [
        *found,
        (
            2,
            "score / τ",
            row["scores"].values / temperature,
            line(2, "solid"),
            " nats",
        ),
        (2, "log-prior", row["log_prior"].values, line(3, "dash"), " nats"),
        (
            2,
            "−potential / τ",
            level,
            {"mode": "lines", "line": {"color": style.INK, "dash": "dot", "width": 1.5}},
            " nats",
        ),
    ]


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
    checked = ""
    if said["verdict"] != "not checked":
        checked = f"; POT ({said['solver']}): {said['verdict']}"
        if np.isfinite(said["solver_difference"]):
            checked += f", largest difference {said['solver_difference']:.1e}"
    return (
        f"Query {said['query']:,} at temperature {said['temperature']:.3g}: largest weight "
        f"{said['largest_weight']:.4g} on key {said['largest_key']:,}; entropy "
        f"{said['entropy']:.3g} nats, KL to the prior {said['kl_to_prior']:.3g} nats, potential "
        f"{said['potential']:.4g}, content range {said['content_range']:.3g}, prior's margin "
        f"{said['margin']:.3g} nats{checked}."
    )
