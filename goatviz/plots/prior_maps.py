"""Maps of a prior: the induced plan, the log-prior, and one number for every head.

Panels of one head of a "prior_profile" result or of a "prior_mix" result, and the pooling of a
profile to the number of cells and points that can be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz import bins
from goatviz.plots import marks, style
from goatviz.plots.base import Panel

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of heads at which the cells of a map have room for numbers.
MAX_NUMBERS = 64


def plan(head: xr.Dataset) -> Panel:
    """The induced prior of one head by query and key, on a logarithmic colour scale."""
    hover = f"{_cell_hover(head)}<br>π = {{value}}"
    cells = _cells(head, "probability")
    traces = marks.probability_map(*cells, name="plan", hover=hover, unit="π")
    return _map(head, "Induced prior π", traces)


def log_prior(head: xr.Dataset) -> Panel:
    """The log-prior of one head less its mean over each row."""
    hover = f"{_cell_hover(head)}<br>K − row mean = {{value}} nats"
    cells = _cells(head, "row_centred")
    traces = marks.signed_map(*cells, name="log-prior", hover=hover, unit="nats")
    return _map(head, "Log-prior K, centred in each row", traces)


def _map(head: xr.Dataset, title: str, traces: Sequence[marks.Trace]) -> Panel:
    queries, allowed = head["query"].values, head["allowed"].values
    width, every = _bin_width(head), len(queries) == head.attrs["length"]
    return Panel(
        title,
        traces,
        {
            "title": "key j [tokens]" if width == 1 else f"key j [tokens, bins of {width:,}]",
            "tickformat": marks.tick_format(head["key_bin"].values),
        },
        {
            "title": "query i [tokens]" if every else f"query i [tokens, {len(queries)} shown]",
            "autorange": "reversed",
            "tickformat": marks.tick_format(queries),
        },
        masked=not allowed.all(),
    )


def _cells(head: xr.Dataset, field: str) -> tuple[np.ndarray, ...]:
    """Keys, queries, values, and which of them are allowed.

    Keys are evenly spaced centres of bins: plotly.js draws such maps several times as fast.
    """
    start, width = head["key_bin"].values, _bin_width(head)
    keys = start if width == 1 else start + (width - 1) / 2
    return keys, head["query"].values, head[field].values, head["allowed"].values


def _bin_width(head: xr.Dataset) -> int:
    return int(np.max(head["bin_stop"].values - head["key_bin"].values))


def _cell_hover(head: xr.Dataset) -> str:
    width = _bin_width(head)
    return "query %{y:,}, " + ("key %{x:,}" if width == 1 else f"{width:,} keys around %{{x:,.0f}}")


# --- all heads ---


def head_panels(profile: xr.Dataset) -> list[Panel]:
    """Maps by layer and head: the top key of the last query, slope, range, explained variance.

    A quantity that is 0 for every head, or that the profile lacks, has no map.
    """
    last = profile.isel(query=-1)
    top = last["margin_key"].values
    lag = int(last["query"]) - top
    near = np.where(top <= lag, "<br>key ", "<br>lag ").astype(object)
    nearest = np.nan_to_num(np.minimum(top, lag)).astype(int).astype(str).astype(object)
    where = near + nearest
    margin, mass = last["margin"].values, last["top_mass"].values
    panels = [_head_map(profile, "Prior mass on the top key", mass, "mass {}", "prob.", where)]
    if np.isfinite(margin).any():
        title, hover = "Margin of the top key", "margin {} nats"
        panels.insert(0, _head_map(profile, title, margin, hover, "nats", where))
    slope, span = profile["recency_slope"].values, _relative_range(profile)
    if np.any(np.nan_to_num(slope)):
        title, hover = "Recency slope m", "slope {} nats/token"
        panels.append(_head_map(profile, title, slope, hover, "nats/token"))
    if np.any(np.nan_to_num(span)):
        title, hover = "Range of the relative term", "range {} nats"
        panels.append(_head_map(profile, title, span, hover, "nats"))
    if "explained_variance" in profile.variables:
        title, share = "Explained variance of the logits", profile["explained_variance"].values
        panels.append(_head_map(profile, title, share, "share {}", "share", most=1.0))
    if "held_out" in profile.variables and np.isfinite(profile["held_out"].values).any():
        title, share = "Variance of unseen inputs", profile["held_out"].clip(0.0).values
        panels.append(_head_map(profile, title, share, "share {}", "share", most=1.0))
    return panels


def _relative_range(profile: xr.Dataset) -> np.ndarray:
    if "relative_range" in profile.variables:
        return profile["relative_range"].values
    return (profile["relative"].max("lag") - profile["relative"].min("lag")).values


def _head_map(
    profile: xr.Dataset,
    title: str,
    values: np.ndarray,
    hover: str,
    unit: str,
    below: np.ndarray | str = "",
    most: float = 0.0,
) -> Panel:
    layers, heads = profile["layer"].values, profile["head"].values
    z = marks.finite_or_empty(values)
    names = [[f"layer {layer}, head {head}" for head in heads] for layer in layers]
    largest = max(most, float(np.nanmax(z, initial=0.0))) or 1.0
    places = np.arange(len(heads)), np.arange(len(layers))
    traces = [
        marks.heatmap(
            *places,
            z,
            name=title,
            hover="%{customdata}<br>" + hover.replace("{}", "%{z:.3g}"),
            customdata=names,
            colorscale=style.SEQUENTIAL,
            zmin=0.0,
            zmax=largest,
            showscale=True,
            colorbar={"title": {"text": unit}},
            xgap=1,
            ygap=1,
        )
    ]
    numbered = z.size <= MAX_NUMBERS
    if numbered:
        texts = np.array([[f"{value:.3g}" for value in row] for row in z], dtype=object)
        traces += marks.cell_texts(*places, z, texts + below, most=largest)
    x, y = _numbered("head", heads), _numbered("layer", layers)
    height = int(np.clip((36 if numbered else 22) * len(layers), 110, 420))
    return Panel(title, traces, x, {**y, "autorange": "reversed"}, height=height)


def _numbered(what: str, numbers: np.ndarray) -> dict[str, Any]:
    """An axis of the layers or heads of a result, in its order."""
    texts = [str(number) for number in numbers]
    return {"title": what, "tickvals": list(range(len(texts))), "ticktext": texts}


# --- pooling for the page ---


def coarser(profile: xr.Dataset, cells: int, points: int) -> xr.Dataset:
    """The profile with no more than so many rows, key bins and points of a curve.

    Rows are skipped, except the last. Curves keep means, smallest and largest values. In maps mass
    is summed, and the log-prior is averaged over the keys that a query may see.
    """
    sizes = profile.sizes
    if max(sizes["query"], sizes["key_bin"]) > cells:
        profile = _coarser_maps(profile, cells)
    for dim in ("key", "lag"):
        if sizes[dim] > points:
            profile = _coarser_curves(profile, dim, points)
    return profile


def _coarser_maps(profile: xr.Dataset, cells: int) -> xr.Dataset:
    count = profile.sizes["query"]
    step = -(-count // cells)
    profile = profile.isel(query=np.arange((count - 1) % step, count, step))
    count = profile.sizes["key_bin"]
    edges = np.append(np.arange(0, count, -(-count // cells)), count)
    start, stop = profile["key_bin"].values, profile["bin_stop"].values
    allowed = profile["allowed"].values
    ends = np.where(
        profile["causal"].values[:, None, None],
        np.minimum(stop, profile["query"].values[:, None] + 1),
        stop,
    )
    keys = np.where(allowed, np.clip(ends - start, 1, None)[:, None], 0)
    seen = bins.bin_sum(keys, edges)
    mass = bins.bin_sum(np.where(allowed, profile["probability"].values, 0.0), edges)
    maps = {
        "allowed": seen > 0,
        "probability": np.where(seen > 0, mass.astype(np.float32), np.nan),
    }
    for field in ("log_prior", "row_centred"):
        weighted = np.where(allowed, keys * profile[field].values, 0.0)
        with np.errstate(invalid="ignore"):
            maps[field] = (bins.bin_sum(weighted, edges) / seen).astype(np.float32)
    dims = ("layer", "head", "query", "key_bin")
    replaced = {name: (dims, values) for name, values in maps.items()}
    replaced["bin_stop"] = (("key_bin",), stop[edges[1:] - 1])
    return _replaced(profile, "key_bin", start[edges[:-1]], replaced)


def _coarser_curves(profile: xr.Dataset, dim: str, points: int) -> xr.Dataset:
    start, stop = profile[dim].values, profile[f"{dim}_stop"].values
    # Bins near key 0 and lag 0 stay exact, unless lag 0 is in the middle, between both directions.
    one_sided = start[0] >= 0
    edges = (
        bins.curve_edges(0, len(start), points)
        if one_sided
        else bins.even_edges(len(start), points)
    )
    width = stop - start
    means = ("sink",) if dim == "key" else ("kernel", "relative", "recency")
    replaced = {}
    # An interval of a mean is no wider than the mean of intervals.
    for field in (*means, f"{means[0]}_error", f"{dim}_inputs"):
        if field in profile.variables:
            total = bins.bin_sum(profile[field].values * width, edges)
            replaced[field] = (profile[field].dims, total / bins.bin_sum(width, edges))
    dims = ("layer", "head", dim)
    for end, at in (("low", 0), ("high", 1)):
        field = f"{means[0]}_{end}"
        replaced[field] = (dims, bins.bin_range(profile[field].values, edges)[at])
    replaced[f"{dim}_stop"] = ((dim,), stop[edges[1:] - 1])
    return _replaced(profile, dim, start[edges[:-1]], replaced)


def _replaced(
    profile: xr.Dataset, dim: str, places: np.ndarray, variables: Mapping[str, Any]
) -> xr.Dataset:
    """The profile with another coordinate along a dimension, and its variables replaced."""
    kept = profile.drop_dims(dim)
    return kept.assign_coords({dim: places}).assign(variables)
