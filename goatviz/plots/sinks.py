"""Figures of attention sinks: which heads have one, on which key, how often, with what signal.

Each is made from panels of a "sink_profile" result, with menus of its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from goatviz import bins, checks
from goatviz.plots.base import Entry, Panel, Words, grid, menu, single
from goatviz.plots.figure import Figure
from goatviz.plots.plan import residual_sentence
from goatviz.plots.sink_curves import (
    MAX_BINS,
    MAX_POINTS,
    hidden_panels,
    importance_panel,
    rate_panel,
    signal_panel,
)
from goatviz.plots.sink_maps import MAPS, MAX_NUMBERS, MAX_SIDE, heads_panel, map_panel
from goatviz.results import SINK_PROFILE, check_result, with_all_dimensions

if TYPE_CHECKING:
    import xarray as xr

SINK_KINDS = ("overview", "profile", "rate", "signal", "logits", "probabilities", "hidden")

#: Largest number of entries of a menu, and bytes of JSON for the numbers that differ among them.
MAX_ENTRIES, MENU_BYTES = 400, 800_000
_BASE64 = 4 / 3


def draw_sinks(
    profile: xr.Dataset,
    *,
    kind: str = "overview",
    threshold: float | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | int | None = None,
) -> Figure:
    """Draw a sink profile.

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.sink_profile`, or a selection from it.
    kind : {"overview", "profile", "rate", "signal", "logits", "probabilities", "hidden"}
        All heads at a glance; the importance of every key; the sink rate by threshold; the mass of
        the first key by content range, within the bounds of the prior; the mean logits or the mean
        weights, as maps of query and key; the hidden states block by block, from a profile with
        norms=True or spectra=True. A menu of heads opens on the strongest sink.
    threshold : float, optional
        Importance above which (strictly) a key is a sink; default: that of the profile. With
        another threshold the sentence with the rate is left out; `goatviz.plot_sinks` has it for
        any.
    layers, heads : int or sequence of int, optional
        Layers and heads to draw; default all. Rates of the model are always those of the whole
        profile.

    Returns
    -------
    Figure
        A plotly Figure below 2 MB; nothing is shown, saved or computed.

    Raises
    ------
    TypeError
        If `profile` is not a sink profile, or an argument has the wrong type.
    ValueError
        If `kind` is unknown, `threshold` is outside [0, 1), the profile lacks a layer or head or
        has none, or has no maps when `kind` needs them.
    """
    check_result(profile, SINK_PROFILE)
    checks.one_of("kind", kind, SINK_KINDS)
    if threshold is not None:
        threshold = checks.number("threshold", threshold, low=0, below=1)
        if threshold != profile.attrs["threshold"]:
            profile = profile.assign_attrs(threshold=threshold, rate_text="")
    profile = with_all_dimensions(profile, SINK_PROFILE)
    for dim, chosen in (("layer", layers), ("head", heads)):
        if chosen is not None:
            profile = profile.sel({dim: _labels(f"{dim}s", chosen, profile[dim].values)})
    if heads is not None:
        # These fields are of all heads of a layer together.
        profile = profile.drop_vars([n for n in profile.data_vars if n.startswith("layer_signal")])
    if not profile["present"].values.any():
        raise ValueError("profile must hold a head that is present, got none")
    return _DRAWINGS[kind](profile)


def _labels(name: str, chosen: Sequence[int] | int, known: np.ndarray) -> list[int]:
    """The chosen layers or heads of a profile, in its order."""
    if isinstance(chosen, str) or not isinstance(chosen, Sequence | np.ndarray | range):
        chosen = [chosen]
    wanted = {checks.integer(name, one) for one in chosen}
    if not wanted or not wanted <= set(known.tolist()):
        raise ValueError(f"{name} must be among {_listed(known)}, got {chosen!r}")
    return [one for one in known.tolist() if one in wanted]


def _listed(values: np.ndarray) -> str:
    """Numbers as text for a sentence: `3`, `0 to 11`, `0, 4, 5`."""
    if len(values) > 2 and np.all(np.diff(values) == 1):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


# --- figures ---


def _overview(profile: xr.Dataset) -> Figure:
    attrs, present = profile.attrs, profile["present"].values.astype(bool)
    first = profile["importance"].sel(key=attrs["first_key"]).values
    maps = [
        ("Importance of the first key", first),
        ("Largest weight", profile["largest_mass"].values),
    ]
    if attrs["recent"] < attrs["length"]:
        maps.append((f"Last {attrs['recent']:,} keys", profile["recent_mass"].values))
    column = profile["sink_column_mass"].values
    if np.any(column[present & np.isfinite(column)] != 0):
        maps.append(("Extra sink column", column))
    # Numbers in the cells of many heads have room only in two columns.
    narrow = 8 if max(present.shape) <= MAX_NUMBERS else 16
    columns = 3 if len(maps) == 3 and profile.sizes["head"] <= narrow else 2
    panels = [
        heads_panel(
            profile,
            title,
            values,
            what="mean weight" if at else "importance",
            marked=at == 0,
            bar=at == min(columns, len(maps)) - 1,
        )
        for at, (title, values) in enumerate(maps)
    ]
    caption = [*_about(profile), "Means over the inputs, all on one scale."]
    if not present.all():
        caption.append("Grey: no such head.")
    words = Words("Attention sinks", attrs.get("rate_text", ""), caption)
    return grid(panels, words, columns=columns)


def _importances(profile: xr.Dataset) -> Figure:
    heads, caption = _menu_heads(profile)
    # Bytes of a point: mostly its interval and the numbers of its hover text.
    points = _share(len(heads), 60, MAX_POINTS)
    return _head_menu(profile, heads, partial(importance_panel, profile, points=points), caption)


def _signals(profile: xr.Dataset) -> Figure:
    heads, caption = _menu_heads(profile)
    ranges, masses = MAX_BINS[0], min(MAX_BINS[1], profile.sizes["mass_bin"])
    ranges = _share(len(heads), 4 * (masses + 8) * _BASE64, ranges)
    if ranges < masses // 2:
        ranges, masses = 2 * ranges, masses // 2
    layers = []
    if "layer_signal_count" in profile:
        several = profile["present"].values.sum(axis=1) > 1
        layers = profile["layer"].values[several].tolist()
    # One scale of counts for all entries, so that the menu need not hold a scale for each.
    counts = profile["layer_signal_count" if layers else "signal_count"].values
    for axis, size in ((-2, ranges), (-1, masses)):
        counts = bins.bin_sum(counts, bins.step_edges(counts.shape[axis], size), axis)
    shape, most = (ranges, masses), float(np.nanmax(counts))
    draw = partial(signal_panel, profile, shape=shape, most=most)
    if layers:
        text = "All heads: counts are summed, means weighted by them, bounds the widest."
        caption = [*caption, text]
    return _head_menu(profile, heads, draw, caption, {layer: draw(layer, None) for layer in layers})


def _maps(kind: str, profile: xr.Dataset) -> Figure:
    if MAPS[kind][0] not in profile:
        raise ValueError(
            f"profile must hold {MAPS[kind][0]}, got none: pass maps=True to sink_profile"
        )
    heads, caption = _menu_heads(profile)
    side = int(_share(len(heads), 4 * _BASE64, MAX_SIDE**2) ** 0.5)
    return _head_menu(profile, heads, partial(map_panel, profile, kind, side=side), caption)


def _rates(profile: xr.Dataset) -> Figure:
    panel = rate_panel(profile)
    caption = [*_about(profile), *panel.caption]
    return single(replace(panel, caption=caption, height=340))


def _hidden(profile: xr.Dataset) -> Figure:
    if "norm_ratio" not in profile:
        raise ValueError(
            "profile must hold norm_ratio, got none: pass norms=True or spectra=True to "
            "sink_profile"
        )
    words = Words("Hidden states and attention sinks", caption=_about(profile))
    return grid(hidden_panels(profile), words)


_DRAWINGS: dict[str, Callable[[xr.Dataset], Figure]] = {
    "overview": _overview,
    "profile": _importances,
    "rate": _rates,
    "signal": _signals,
    "logits": lambda profile: _maps("logits", profile),
    "probabilities": lambda profile: _maps("probabilities", profile),
    "hidden": _hidden,
}


# --- menus of heads ---


def _menu_heads(profile: xr.Dataset) -> tuple[list[tuple[int, int]], list[str]]:
    """Labels of the heads in a menu, and lines of the caption about it."""
    present = np.argwhere(profile["present"].values)
    caption = []
    if "sink_rank" in profile and len(present) > 1:
        caption.append("The menu opens on the strongest sink: the most important first key.")
    if len(present) > MAX_ENTRIES:
        rank = _rank(profile)[tuple(present.T)]
        present = present[np.sort(np.argsort(rank, kind="stable")[:MAX_ENTRIES])]
        which = "strongest sinks" if "sink_rank" in profile else "first"
        caption.append(
            f"In the menu: the {MAX_ENTRIES} {which} of {len(rank):,} heads; layers= and heads= "
            "select others."
        )
    layers, heads = profile["layer"].values, profile["head"].values
    return [(int(layers[a]), int(heads[b])) for a, b in present], caption


def _rank(profile: xr.Dataset) -> np.ndarray:
    if "sink_rank" in profile:
        return profile["sink_rank"].values
    return np.zeros(profile["present"].shape, dtype=int)


def _share(entries: int, bytes_each: float, most: int) -> int:
    """The number of points of so many bytes that every entry of a menu can have."""
    return int(np.clip(MENU_BYTES / entries / bytes_each, 1, most))


def _head_menu(
    profile: xr.Dataset,
    heads: Sequence[tuple[int, int]],
    panel_of: Callable[[int, int], Panel],
    caption: Sequence[str],
    whole: dict[int, Panel] | None = None,
) -> Figure:
    """A figure with a panel for every head and, if given, one for all heads of a layer."""
    ranks = dict(zip(profile["layer"].values.tolist(), _rank(profile), strict=True))
    places = {head: at for at, head in enumerate(profile["head"].values.tolist())}
    entries = []
    for layer in dict.fromkeys(layer for layer, _ in heads):
        for head in (head for one, head in heads if one == layer):
            rank = -float(ranks[layer][places[head]])
            entries.append(_entry(f"head {head}", layer, panel_of(layer, head), rank))
        if whole and layer in whole:
            entries.append(_entry("all heads", layer, whole[layer], -np.inf))
    title = panel_of(*heads[0]).title
    return menu(entries, Words(title, caption=[*_about(profile), *caption]), columns=1)


def _entry(label: str, layer: int, panel: Panel, rank: float) -> Entry:
    panels = [replace(panel, title="", note="")]
    return Entry(label, panels, f"layer {layer}", panel.note, rank)


def _about(profile: xr.Dataset) -> list[str]:
    """The source of the profile, and notes on it."""
    attrs = profile.attrs
    shortest, longest, count = attrs["length_min"], attrs["length"], attrs["n_inputs"]
    lengths = checks.count_text(longest, "token")
    if shortest != longest:
        lengths = f"{shortest:,} to {lengths}"
    about = [
        attrs["source"],
        f"{checks.count_text(count, 'input')} of {lengths}",
        "causal" if attrs["causal"] else "not causal",
        "no explicit prior" if attrs["prior"] == "none" else f"prior: {attrs['prior']}",
    ]
    notes = [f"⚠ {note}" for note in attrs["notes"].split(" | ") if note.strip()]
    return [" · ".join(about), *residual_sentence(profile), *notes]
