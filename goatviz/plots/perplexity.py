"""Loss on documents against length, or against position in the longest windows, with intervals.

Panels of the "perplexity_sweep" and "loss_difference" results. A mean over a window mixes early
tokens, which have little context at any length, with late ones; positions take them apart.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from goatviz import checks
from goatviz.plots import style
from goatviz.plots.base import Panel, single
from goatviz.plots.figure import Figure
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import (
    ALL_ALIKE,
    Focus,
    chosen,
    ends_of,
    interval_line,
    length_axis,
    reference_line,
    run_dots,
    spread,
    trained_marks,
    trained_note,
)
from goatviz.results import PERPLEXITY_SWEEP, check_result

KINDS = ("length", "position")
#: What is drawn of a loss, and its axis title.
MEASURES = {"loss": "loss [nats/token]", "perplexity": "perplexity [1]"}
# Fields by kind and measure, and what counts their tokens.
_FIELDS = {
    ("length", "loss"): "mean_loss",
    ("length", "perplexity"): "perplexity",
    ("position", "loss"): "mean_position_loss",
    ("position", "perplexity"): "position_perplexity",
}
_TOKENS = {"length": "tokens", "position": "position_tokens"}


def draw_perplexity(sweep: xr.Dataset, *, kind: str = "length") -> Figure:
    """Draw the loss on documents of several schemes.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    kind : {"length", "position"}
        Against the length of the window, or against the position in the longest one.

    Returns
    -------
    Figure
        Lines are means over runs and pieces, whiskers 95 % bootstrap intervals over pieces, small
        marks single runs; hovering says the perplexity.

    Raises
    ------
    TypeError
        If `sweep` is not a perplexity sweep.
    ValueError
        If there is no such kind.
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    checks.one_of("kind", kind, KINDS)
    panel = loss_panel(sweep, kind=kind)
    return single(replace(panel, title=f"Loss on documents: {sweep.attrs['task']}"))


def loss_panel(
    sweep: xr.Dataset, focus: Focus = ALL_ALIKE, *, kind: str = "length", measure: str = "loss"
) -> Panel:
    """The loss on documents against length, or by position in the longest windows.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    focus : Focus
        What is looked at.
    kind : {"length", "position"}
        What the loss is drawn against; runs are known by length alone.
    measure : {"loss", "perplexity"}
        Nats, or e to the power of them.
    """
    ends = sweep[kind].values
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    traces: list[Trace] = []
    for at, scheme in enumerate(schemes):
        if focus.shows(scheme):
            x = spread(np.log2(ends), at, len(schemes))
            traces += _losses(sweep, scheme, x, kind, measure, focus)
    trained = sweep.attrs["training_length"]
    what = {
        "length": "mean loss in windows of a length",
        "position": f"loss by position in windows of {int(sweep['length'][-1]):,} tokens",
    }[kind]
    gaps = np.isnan(sweep[_FIELDS[kind, measure]]).any(kind)
    missing = [str(scheme) for scheme in sweep["scheme"].values[gaps.values]]
    panel = Panel(
        f"{measure.capitalize()} by {kind}",
        traces,
        length_axis(ends, trained, {"length": "length", "position": "end of position bin"}[kind]),
        {"title": MEASURES[measure]},
        note=f"{what}; {sweep.sizes['piece']} pieces; 95 % (bootstrap over pieces); "
        + trained_note(trained),
        caption=[f"Not measured everywhere: {', '.join(missing)}."] if missing else [],
        shapes=trained_marks(trained),
        height=300,
    )
    at_length = focus.length if kind == "length" else None
    return chosen(panel, np.log2(ends), at_length and float(np.log2(at_length)), focus)


def _losses(
    sweep: xr.Dataset, scheme: str, x: np.ndarray, kind: str, measure: str, focus: Focus
) -> list[Trace]:
    """A scheme's line, and the marks of its runs."""
    one, name = sweep.sel(scheme=scheme), style.escape(scheme)
    nats, perplexity = "%{{{}:.4f}} nats", "perplexity %{{{}:.3f}}"
    shown, other = (nats, perplexity) if measure == "loss" else (perplexity, nats)
    digits = ".4f" if measure == "loss" else ".3f"
    runs = int(np.isfinite(one["run_loss"].values).any(axis=1).sum())
    opposite = "perplexity" if measure == "loss" else "loss"
    traces = [
        interval_line(
            scheme,
            x,
            [one[f"{_FIELDS[kind, measure]}{end}"].values for end in ("", "_low", "_high")],
            focus,
            hover=f"{name}, {kind} %{{customdata[0]:,}}<br>{shown.format('y')} "
            f"(%{{customdata[1]:{digits}}} to %{{customdata[2]:{digits}}})<br>"
            f"{other.format('customdata[3]')}<br>%{{customdata[4]:,}} tokens of "
            f"{sweep.sizes['piece']} pieces, {runs} run(s)",
            detail=[
                one[kind].values,
                one[_FIELDS[kind, opposite]].values,
                one[_TOKENS[kind]].sum("piece").values,
            ],
        )
    ]
    if runs > 1 and kind == "length" and focus.runs:
        detail = np.repeat(one["run"].values, len(x))
        hover = f"{name}, run %{{customdata}}<br>{shown.format('y')}"
        dots = one[f"run_{measure}"].values
        traces.append(run_dots(scheme, x, dots, focus, hover=hover, detail=detail))
    return traces


def difference_panel(difference: xr.Dataset, focus: Focus = ALL_ALIKE) -> Panel:
    """Loss less that of a reference against length, for every scheme but the reference.

    Parameters
    ----------
    difference : xarray.Dataset
        From `goatviz.loss_difference`.
    focus : Focus
        What is looked at.
    """
    lengths, attrs = difference["length"].values, difference.attrs
    schemes = [str(scheme) for scheme in difference["scheme"].values]
    reference, places = style.escape(attrs["reference"]), np.log2(lengths)
    traces: list[Trace] = []
    for at, scheme in enumerate(schemes):
        if scheme == attrs["reference"] or not focus.shows(scheme):
            continue
        one = difference.isel(scheme=at)
        traces.append(
            interval_line(
                scheme,
                spread(places, at, len(schemes)),
                [one[f"difference{end}"].values for end in ("", "_low", "_high")],
                focus,
                hover=f"{style.escape(scheme)} less {reference}, length %{{customdata[0]:,}}<br>"
                "%{y:+.4f} nats (%{customdata[1]:+.4f} to %{customdata[2]:+.4f})<br>"
                f"{attrs['pieces']} pieces, paired",
                detail=[lengths],
            )
        )
    hover = f"{reference}, the reference"
    name = f"{reference} (reference)"
    traces.append(reference_line(0.0, ends_of(places), name=name, hover=hover))
    panel = Panel(
        f"Loss less that of {attrs['reference']}",
        traces,
        length_axis(lengths, attrs["training_length"]),
        {"title": "loss difference [nats/token]"},
        note=f"paired over {attrs['pieces']} pieces; below 0 is better; 95 % (bootstrap); "
        + trained_note(attrs["training_length"]),
        shapes=trained_marks(attrs["training_length"]),
        height=300,
    )
    return chosen(panel, places, focus.length and float(np.log2(focus.length)), focus)
