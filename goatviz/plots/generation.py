"""Plots of what a model attends to while it writes: a head's rows step by step, and one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz import bins
from goatviz.plots import marks, style
from goatviz.plots.base import Panel
from goatviz.results import GENERATION, check_result

if TYPE_CHECKING:
    import xarray as xr

#: Number of keys whose tokens stand beside their weights.
TOP = 10
#: Largest number of keys along the map; more are pooled.
MAX_KEYS = 400
_MASS = {"title": "weight [1]", "rangemode": "tozero"}


def steps_panel(head: xr.Dataset, query: int) -> Panel:
    """The rows of one head, query by key, with a frame around the chosen one.

    More than 400 keys are pooled: their masses are summed.

    Parameters
    ----------
    head : xarray.Dataset
        One layer and head of a result of `goatviz.analysis.generation_steps`.
    query : int
        The chosen query.

    Raises
    ------
    TypeError
        If `head` is not such a result.
    """
    check_result(head, GENERATION)
    queries, edges = head["query"].values, bins.step_edges(head.sizes["key"], MAX_KEYS)
    width = int(np.diff(edges).max())
    # Evenly spaced centres of bins.
    keys = edges[:-1] + (width - 1) / 2 if width > 1 else edges[:-1]
    masses = bins.bin_sum(np.nan_to_num(head["weights"].values), edges)
    seen = edges[:-1] <= queries[:, None]
    hover = f"{marks.PAIR}<br>weight {{value}}"
    if width > 1:
        hover = f"query %{{y}}, {width} keys around %{{x:,.0f}}<br>mass {{value}}"
    traces = marks.probability_map(keys, queries, masses, seen, name="weights", hover=hover)
    chosen = np.broadcast_to((queries == query)[:, None], seen.shape)
    traces += marks.double_frame(keys, queries, chosen & seen, name="chosen step")
    unit = "tokens" if width == 1 else f"tokens, bins of {width}"
    x: dict[str, Any] = {"title": f"key [{unit}]", "tickformat": marks.tick_format(keys)}
    y: dict[str, Any] = {"title": "query [tokens]", "autorange": "reversed", "tickformat": ",d"}
    if "token" in head.variables:
        x |= marks.token_ticks(head["key"].values, head["token"].values, "key")
        y |= marks.token_ticks(queries, head["token"].values[queries], "query")
    return Panel("Steps: rows of the plan", traces, x, y, masked=True, height=400)


def step_panels(head: xr.Dataset, query: int) -> list[Panel]:
    """One row by key, and the keys with the largest weights.

    Parameters
    ----------
    head : xarray.Dataset
        One layer and head of a result of `goatviz.analysis.generation_steps`.
    query : int
        The chosen query.

    Raises
    ------
    TypeError
        If `head` is not such a result.
    """
    check_result(head, GENERATION)
    at = head["query"].values.tolist().index(query)
    step, names = head.isel(step=at), _names(head)
    keys, weights = head["key"].values, step["weights"].values
    row = marks.curve(
        keys,
        weights,
        name="row",
        color=style.LINES[0],
        hover="key %{text}<br>weight %{y:.4g}",
        text=names,
        showlegend=False,
    )
    chosen = str(step["next_token" if "next_token" in step else "next_id"].item())
    ticks = {"title": "key [tokens]", "tickformat": marks.tick_format(keys)}
    title = f"Step {at + 1}: row of query {query:,}"
    return [
        Panel(title, [row], ticks, _MASS, note=f"the token that follows: “{chosen}”", height=170),
        _largest(weights, names),
    ]


def _largest(weights: np.ndarray, names: np.ndarray) -> Panel:
    """Bars of the largest weights, from the top."""
    known = np.nan_to_num(weights)
    order = np.argsort(-known, kind="stable")[: min(TOP, int((known > 0).sum()))]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": weights[order],
        "y": np.arange(len(order)),
        "name": "largest weights",
        "marker": {"color": style.LINES[0]},
        "customdata": names[order],
        "hovertemplate": "key %{customdata}<br>weight %{x:.4g}<extra></extra>",
        "showlegend": False,
    }
    ticks = {"tickvals": list(range(len(order))), "ticktext": names[order].tolist()}
    keys = {"title": "key", "autorange": "reversed", **ticks}
    return Panel("Keys with the largest weights", [bars], _MASS, keys, height=220)


def _names(head: xr.Dataset) -> np.ndarray:
    """Keys by their numbers and, if they have any, their tokens; escaped."""
    keys = head["key"].values.tolist()
    if "token" not in head.variables:
        return np.array([f"{key:,}" for key in keys], object)
    pairs = zip(keys, head["token"].values, strict=True)
    return np.array([f"{key:,} {marks.shortened(str(token))}" for key, token in pairs], object)
