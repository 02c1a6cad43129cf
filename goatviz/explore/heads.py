"""All heads of a model at a glance: thumbnails of their plans or priors, opened by a click."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from goatviz.explore.page import Part
from goatviz.explore.plan_map import colour_range, to_codes, to_shares, weight_texts
from goatviz.plots.base import Panel
from goatviz.plots.plan import shares_panel
from goatviz.plots.style import colour_table
from goatviz.results import PLAN_THUMBNAILS, check_result, with_all_dimensions

if TYPE_CHECKING:
    import xarray as xr

#: Numbers of a head that are said beside its picture.
_MEASURES = {
    "relative_entropy": "entropy relative to uniform attention",
    "first_mass": "mean weight of the first key",
    "margin": "margin of the last query in nats",
}


class HeadsView(Part):
    """Thumbnails of all heads; the page sets the explorer's layer and head.

    Parameters
    ----------
    thumbnails : xarray.Dataset
        Schema "plan_thumbnails", as from `goatviz.analysis.plan_thumbnails`.

    Attributes
    ----------
    layers, heads : list of int
        Their numbers, in order.
    present : list of list of bool
        Whether a layer has a head.
    cells : list of int
        Rows and columns of a picture.
    pixels : bytes
        One byte for each cell, picture after picture, as in a `PlanMap`: logarithmic, 1e-5 to 1.
    measures : list of dict
        "name" and "values" by layer and head of what is said of each head; null where unknown.
    title, rule : str
        What the pictures show, and which head was opened first.
    """

    kind = "heads"

    title = traitlets.Unicode().tag(sync=True)
    rule = traitlets.Unicode().tag(sync=True)
    layers = traitlets.List().tag(sync=True)
    heads = traitlets.List().tag(sync=True)
    present = traitlets.List().tag(sync=True)
    cells = traitlets.List().tag(sync=True)
    pixels = traitlets.Bytes(b"").tag(sync=True)
    palette = traitlets.List().tag(sync=True)
    measures = traitlets.List().tag(sync=True)

    def __init__(
        self, thumbnails: xr.Dataset | None = None, *, title: str = "", rule: str = ""
    ) -> None:
        palette = [list(rgb) for rgb in colour_table()]
        super().__init__(palette=palette, title=title, rule=rule)
        self._latest: tuple[xr.Dataset, dict[str, Any]] | None = None
        if thumbnails is not None:
            self.show(thumbnails)

    def state_of(self, content: xr.Dataset) -> dict[str, Any]:
        """The traits that show these thumbnails; those of the latest are kept."""
        if self._latest is None or self._latest[0] is not content:
            self._latest = content, self._state_of(content)
        return self._latest[1]

    def panel(self) -> Panel | None:
        """All pictures side by side, layers from left to right, heads downwards."""
        if self._latest is None:
            return None
        content = with_all_dimensions(self._latest[0], PLAN_THUMBNAILS)
        scale = colour_range("log", highest=1.0)
        # One empty cell parts a picture from the next.
        shares = np.pad(
            to_shares(content["weights"].values, scale),
            ((0, 0), (0, 0), (0, 1), (0, 1)),
            constant_values=np.nan,
        )
        layers, heads, rows, columns = shares.shape
        atlas = shares.transpose(1, 2, 0, 3).reshape(heads * rows, layers * columns)
        axes = tuple(
            {
                "title": dim,
                "tickvals": ((np.arange(count) + 0.5) * size - 1).tolist(),
                "ticktext": [str(number) for number in content[dim].values],
            }
            for dim, count, size in (("layer", layers, columns), ("head", heads, rows))
        )
        drawn = shares_panel(
            self.title,
            atlas,
            weight_texts(scale),
            x=np.arange(atlas.shape[1]),
            y=np.arange(atlas.shape[0]),
            axes=axes,
            note=f"Logarithmic colours. {self.rule}",
        )
        return replace(drawn, height=int(np.clip(24 * heads, 120, 600)))

    def close(self) -> None:
        self._latest = None

    def _state_of(self, content: xr.Dataset) -> dict[str, Any]:
        check_result(content, PLAN_THUMBNAILS)
        content = with_all_dimensions(content, PLAN_THUMBNAILS)
        weights = content["weights"].values
        measures = [
            {"name": name, "values": _listed(content[measure].values)}
            for measure, name in _MEASURES.items()
            if measure in content
        ]
        return {
            "layers": content["layer"].values.tolist(),
            "heads": content["head"].values.tolist(),
            "present": content["present"].values.tolist(),
            "cells": list(weights.shape[2:]),
            "pixels": to_codes(weights, colour_range("log", highest=1.0)),
            "measures": measures,
        }


def _listed(values: np.ndarray) -> list[list[float | None]]:
    """Numbers as JSON knows them."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]
