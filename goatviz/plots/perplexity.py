"""Loss on documents by length, or by position in the longest windows, with intervals.

Panels of the "perplexity_sweep" and "loss_difference" results. The mean over a window mixes early
tokens, which have little context at any length, with late ones; the loss by position does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from goatviz import checks
from goatviz.plots import style
from goatviz.plots.base import Panel, single
from goatviz.plots.figure import Figure
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import (
    ALL_ALIKE,
    Focus,
    drawn_schemes,
    ends_of,
    interval_line,
    interval_text,
    over_lengths,
    reference_line,
    run_dots,
    trained_note,
)
from goatviz.results import PERPLEXITY_SWEEP, check_result

if TYPE_CHECKING:
    import xarray as xr

KINDS = ("length", "position")
#: Titles of the axis by measure of the loss.
MEASURES = {"loss": "loss [nats/token]", "perplexity": "perplexity [1]"}
# Fields by kind and measure, and the fields with their numbers of tokens.
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
        Whether the loss is drawn by length of the window, or by position in the longest windows.

    Returns
    -------
    Figure
        Lines are means over runs and pieces, whiskers are 95 % bootstrap intervals over pieces,
        and small marks are single runs. Hovering shows the perplexity.

    Raises
    ------
    TypeError
        If `sweep` is not a perplexity sweep.
    ValueError
        If `kind` is unknown.
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    checks.one_of("kind", kind, KINDS)
    panel = loss_panel(sweep, kind=kind)
    return single(replace(panel, title=f"Loss on documents: {sweep.attrs['task']}"))


def loss_panel(
    sweep: xr.Dataset, focus: Focus = ALL_ALIKE, *, kind: str = "length", measure: str = "loss"
) -> Panel:
    """The loss on documents by length, or by position in the longest windows.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    focus : Focus
        What is chosen.
    kind : {"length", "position"}
        Horizontal axis; single runs are drawn by length only.
    measure : {"loss", "perplexity"}
        Nats, or e to that power.
    """
    ends = sweep[kind].values
    traces = [
        trace
        for scheme, one, x in drawn_schemes(sweep, np.log2(ends), focus)
        for trace in _losses(one, scheme, x, kind, measure, focus)
    ]
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
        y={"title": MEASURES[measure]},
        note=f"{what}; {sweep.sizes['piece']} pieces; 95 % (bootstrap over pieces); "
        + trained_note(trained),
        caption=[f"Not measured everywhere: {', '.join(missing)}."] if missing else [],
        height=300,
    )
    if kind == "position":
        return over_lengths(panel, ends, trained, ALL_ALIKE, "end of position bin")
    return over_lengths(panel, ends, trained, focus)


def _losses(
    one: xr.Dataset, scheme: str, x: np.ndarray, kind: str, measure: str, focus: Focus
) -> list[Trace]:
    """The line of a scheme, and the marks of its runs."""
    name = style.escape(scheme)
    nats, perplexity = "%{{{}:.4f}} nats", "perplexity %{{{}:.3f}}"
    shown, other = (nats, perplexity) if measure == "loss" else (perplexity, nats)
    digits = ".4f" if measure == "loss" else ".3f"
    runs = int(np.isfinite(one["run_loss"].values).any(axis=1).sum())
    opposite = "perplexity" if measure == "loss" else "loss"
    traces = [
        interval_line(
            scheme,
            x,
            one,
            _FIELDS[kind, measure],
            focus,
            hover=f"{name}, {kind} %{{customdata[0]:,}}<br>{shown.format('y')} "
            f"{interval_text(digits)}<br>{other.format('customdata[3]')}<br>"
            f"%{{customdata[4]:,}} tokens of {one.sizes['piece']} pieces, "
            f"{checks.count_text(runs, 'run')}",
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
    """The loss by length less that of a reference, for every other scheme."""
    lengths, attrs = difference["length"].values, difference.attrs
    reference, places = style.escape(attrs["reference"]), np.log2(lengths)
    traces = [
        interval_line(
            scheme,
            x,
            one,
            "difference",
            focus,
            hover=f"{style.escape(scheme)} less {reference}, length %{{customdata[0]:,}}<br>"
            f"%{{y:+.4f}} nats {interval_text('+.4f')}<br>{attrs['pieces']} pieces, paired",
            detail=[lengths],
        )
        for scheme, one, x in drawn_schemes(difference, places, focus)
        if scheme != attrs["reference"]
    ]
    hover = f"{reference}, the reference"
    name = f"{reference} (reference)"
    traces.append(reference_line(0.0, ends_of(places), name=name, hover=hover))
    panel = Panel(
        f"Loss less that of {attrs['reference']}",
        traces,
        y={"title": "loss difference [nats/token]"},
        note=f"paired over {attrs['pieces']} pieces; below 0 is better; 95 % (bootstrap); "
        + trained_note(attrs["training_length"]),
        height=300,
    )
    return over_lengths(panel, lengths, attrs["training_length"], focus)
