"""Maps of a "sink_profile": a value in [0, 1] of every head, and mean weights by query and key."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz import bins
from goatviz.plots import marks, style
from goatviz.plots.base import Panel

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of cells along a side of a map of queries and keys; longer maps are pooled.
MAX_SIDE = 160
#: Largest number of layers and heads at which cells have room for a number.
MAX_NUMBERS = 12
#: Largest number of layers and heads at which cells are framed; a smaller cell has a dot.
MAX_FRAMES = 24
#: Colour of sinks.
SINK = style.LINES[1]

#: Maps by kind: field, title, trace, hover text.
MAPS = {
    "logits": ("map_logits", "Mean attention logits", "logit", "logit {value} nats"),
    "probabilities": (
        "map_probability",
        "Mean attention probabilities",
        "probability",
        "weight {value}",
    ),
}


def mass_caption(profile: xr.Dataset) -> list[str]:
    """A line of the caption, where rows of a profile have mass below 1; else none."""
    column = profile["sink_column_mass"].values
    column = column[np.isfinite(column)]
    if not column.any():
        return []
    return [
        "Weights of real keys, not renormalised: rows sum to less than 1, and a column without a "
        f"key or a gate takes {column.mean():.3f} on average ({column.min():.3f} to "
        f"{column.max():.3f} by head)."
    ]


# --- layers x heads ---


def heads_panel(
    profile: xr.Dataset,
    title: str,
    values: np.ndarray,
    *,
    what: str = "importance",
    note: str = "",
    chosen: tuple[int, int] | None = None,
    marked: bool = True,
    bar: bool = True,
) -> Panel:
    """A map of a value of every head, with marks on those above the threshold.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with all its dimensions.
    title, what, note : str
        Title of the panel, name of the values on hovering, and note.
    values : ndarray, shape (layers, heads)
        Probabilities.
    chosen : tuple of int, optional
        Labels of the layer and head to be framed.
    marked : bool
        Whether values above the threshold are marked as sinks.
    bar : bool
        Whether the colour bar is shown.

    Returns
    -------
    Panel
        Its traces are `what`, "NaN", "numbers", "importance above ε = ..." and "chosen head".
    """
    present = profile["present"].values.astype(bool)
    y, x = (places(profile[dim].values) for dim in ("layer", "head"))
    where, look = _cells(profile, x, y)
    traces = [
        marks.heatmap(
            x,
            y,
            np.where(present, values, np.nan),
            name=what,
            hover=f"{where}<br>{what} {{value}}",
            colorscale=style.SEQUENTIAL,
            zmin=0.0,
            zmax=1.0,
            **look,
        )
    ]
    if bar:
        traces[0] |= {"showscale": True, "colorbar": {"title": {"text": "prob."}}}
    traces += marks.special_cells(x, y, values, present, where=where, **look)
    if max(present.shape) <= MAX_NUMBERS:
        traces.append(marks.cell_numbers(x, y, np.where(present, values, np.nan)))
    if marked:
        threshold = profile.attrs["threshold"]
        above = present & (values.astype(np.float32) > np.float32(threshold))
        mark = marks.frames if max(present.shape) <= MAX_FRAMES else marks.dots
        name = f"importance above ε = {threshold:g}"
        traces.append(mark(x, y, above, name=name, color=SINK))
    if chosen is not None:
        layer, head = chosen
        rows, columns = profile["layer"].values == layer, profile["head"].values == head
        traces += marks.double_frame(x, y, np.outer(rows, columns), name="chosen head")
    heads = {"title": "head", "range": [x[0] - 0.5, x[-1] + 0.5]}
    layers = {"title": "layer", "range": [y[-1] + 0.5, y[0] - 0.5]}
    return Panel(
        title,
        traces,
        heads | _id_ticks(x, profile["head"].values),
        layers | _id_ticks(y, profile["layer"].values),
        note=note,
        caption=mass_caption(profile),
        # Rows are lower where there are many, so that thirty layers fit beside other panels.
        height=int(np.clip(min(24 * len(y), 240 + 8 * len(y)), 130, 760)),
        masked=not present.all(),
    )


def places(ids: np.ndarray) -> np.ndarray:
    """Places of cells: the ids themselves if they are consecutive, else their order."""
    return ids if np.all(np.diff(ids) == 1) else np.arange(len(ids))


def _cells(profile: xr.Dataset, x: np.ndarray, y: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The name of a cell on hovering, and the settings that all cells share."""
    layers, heads = profile["layer"].values, profile["head"].values
    gap = 1 if max(len(x), len(y)) <= MAX_FRAMES else 0
    look: dict[str, Any] = {"xgap": gap, "ygap": gap}
    if np.array_equal(x, heads) and np.array_equal(y, layers):
        return "layer %{y}, head %{x}", look
    pairs = np.stack(np.meshgrid(layers, heads, indexing="ij"), axis=-1).astype(np.int32)
    return "layer %{customdata[0]}, head %{customdata[1]}", {"customdata": pairs, **look}


def _id_ticks(at: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """Ticks at every id, or at every second, fourth, …, so that there are at most twelve."""
    step = 1
    while len(ids) > 12 * step:
        step *= 2
    return {"tickvals": at[::step].tolist(), "ticktext": [str(i) for i in ids[::step]]}


# --- queries x keys ---


def map_panel(profile: xr.Dataset, kind: str, layer: int, head: int, side: int) -> Panel:
    """A map of the mean logits or weights of the first tokens in one head.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile with all its dimensions, and with maps.
    kind : {"logits", "probabilities"}
        Quantity that is drawn.
    layer, head : int
        Labels of the layer and head.
    side : int
        Largest number of cells along a side. A longer map is pooled to means over allowed pairs.
    """
    field, title, name, what = MAPS[kind]
    part = part_of(profile, layer, head, field, "map_allowed")
    values = part[field].values.astype(np.float64)
    allowed = np.isfinite(values)
    if "map_allowed" in part:
        allowed = part["map_allowed"].values.astype(bool)
    queries, keys = (profile[dim].values for dim in ("map_query", "map_key"))
    step = -(-len(keys) // side)
    caption = [] if kind == "logits" else mass_caption(profile)
    cell = "query %{y}, key %{x}"
    if step > 1:
        edges = [bins.step_edges(len(at), side) for at in (queries, keys)]
        values, allowed = bins.cell_mean(values, allowed, *edges)
        queries, keys = queries[::step], keys[::step]
        cell += " (first of its bin)"
        caption.append(
            f"Pooled to squares of {step} × {step}: the mean over the allowed pairs; fewer heads "
            "(layers=, heads=) are drawn finer."
        )
    x = {"title": "key j [tokens]", "tickformat": ",d"}
    y = {"title": "query i [tokens]", "tickformat": ",d", "autorange": "reversed"}
    names = {}
    if step == 1 and "token" in profile and max(len(queries), len(keys)) <= marks.MAX_TOKENS:
        known = dict(zip(profile["key"].values, profile["token"].values, strict=True))
        tokens = [[known.get(one, "") for one in at] for at in (queries, keys)]
        y |= marks.token_ticks(queries, tokens[0], "query")
        x |= marks.token_ticks(keys, tokens[1], "key")
        # Hovering shows the text of a tick, which is cut; a format makes it show the number.
        cell = "query %{y:,d} “%{customdata[0]}”, key %{x:,d} “%{customdata[1]}”"
        pairs = np.meshgrid(*map(marks.hovered, tokens), indexing="ij")
        names["customdata"] = np.stack(pairs, axis=-1).tolist()
    hover = f"{cell}<br>{what}"
    draw = partial(marks.signed_map, unit="nats") if kind == "logits" else marks.probability_map
    return Panel(
        title,
        draw(keys, queries, values, allowed, name=name, hover=hover, where=cell, **names),
        x,
        y,
        note=head_note(part),
        caption=caption,
        height=480,
        masked=not allowed.all(),
    )


def part_of(profile: xr.Dataset, layer: int, head: int | None, *names: str) -> xr.Dataset:
    """Those of some fields that the profile has, of one head or of a layer."""
    known = ["layer_name", *(name for name in names if name in profile)]
    chosen = {"layer": layer} if head is None else {"layer": layer, "head": head}
    return profile[known].sel(chosen)


def head_note(part: xr.Dataset) -> str:
    """The name of a profile's only head, such as `layer 2, head 3 (blocks.2.attention)`."""
    layer, head = int(part["layer"]), int(part["head"])
    return f"layer {layer}, head {head} ({part['layer_name'].item()})"
