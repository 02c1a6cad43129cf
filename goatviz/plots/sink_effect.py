"""What changed plans cost a language model: its loss, all layers changed at once or one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from goatviz.plots import marks, style
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import ALL_ALIKE, ends_of, interval_line, scheme_look, spread
from goatviz.results import SINK_EFFECT, check_result

if TYPE_CHECKING:
    import xarray as xr

_AXIS = "loss increase [nats/token]"
_ENDS = ("", "_low", "_high")
#: Longest name of a change on an axis.
_CHARACTERS = 36


def draw_sink_effect(effect: xr.Dataset) -> Figure:
    """Draw how much worse a model predicts with changed plans.

    Parameters
    ----------
    effect : xarray.Dataset
        From `goatviz.sink_effect`.

    Returns
    -------
    Figure
        Each change in all layers at once; and, if they were measured, in one layer at a time.

    Raises
    ------
    TypeError
        If `effect` is not a result of `sink_effect`.
    """
    check_result(effect, SINK_EFFECT)
    attrs = effect.attrs
    loss, inputs = float(effect["mean_loss"]), effect.sizes["input"]
    left = f", {attrs['left_out']} left out" if attrs["left_out"] else ""
    subtitle = f"{attrs['source']}, loss {loss:.3f} nats/token; {inputs} inputs{left}"
    panels = [effect_panel(effect)]
    if "layer_mean_increase" in effect:
        panels.append(layers_panel(effect))
    return grid(panels, Words("What sinks do for this model", subtitle), columns=1)


def effect_panel(effect: xr.Dataset) -> Panel:
    """Increase of the loss under each change of all chosen layers."""
    names = [str(name) for name in effect["change"].values]
    traces: list[Trace] = []
    for at, name in enumerate(names):
        one = effect.isel(change=at)
        mean, low, high = (float(one[f"mean_increase{end}"]) for end in _ENDS)
        look = scheme_look(name)
        traces.append(
            marks.points(
                np.array([mean]),
                np.array([len(names) - 1 - at]),
                name=style.escape(name),
                color=look.color,
                symbol=look.symbol,
                size=10,
                hover=f"{style.escape(name)}<br>%{{x:+.4f}} nats ({low:+.4f} to {high:+.4f})",
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": np.array([high - mean]),
                    "arrayminus": np.array([mean - low]),
                    "width": 4,
                    "thickness": 1.5,
                },
                showlegend=False,
            )
        )
    places = np.arange(len(names))[::-1]
    return Panel(
        "All layers at once",
        traces,
        {"title": _AXIS},
        {
            "title": "change",
            "tickvals": places.tolist(),
            "ticktext": [style.escape(marks.shortened(name, _CHARACTERS)) for name in names],
            "range": [-0.6, len(names) - 0.4],
        },
        note="right of 0 the model predicts worse; 95 % (bootstrap over inputs, paired)",
        shapes=[marks.upright(0.0)],
        height=40 + 26 * len(names),
    )


def layers_panel(effect: xr.Dataset) -> Panel:
    """Increase of the loss under each change of one layer alone."""
    layers = effect["layer"].values
    measured = effect["layer_mean_increase"].notnull().any("layer").values
    names = [str(name) for name in effect["change"].values[measured]]
    traces = []
    for at, name in enumerate(names):
        traces.append(
            interval_line(
                name,
                spread(layers.astype(float), at, len(names)),
                effect.sel(change=name),
                "layer_mean_increase",
                ALL_ALIKE,
                hover=f"{style.escape(name)}, layer %{{customdata[0]}}<br>%{{y:+.4f}} nats "
                "(%{customdata[1]:+.4f} to %{customdata[2]:+.4f})",
                detail=[layers],
            )
        )
    return Panel(
        "One layer at a time",
        traces,
        {"title": "layer", "range": ends_of(layers.astype(float))},
        {"title": _AXIS},
        note="95 % (bootstrap over inputs, paired)",
        shapes=[marks.level(0.0)],
        height=260,
    )
