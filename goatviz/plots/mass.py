"""Attention mass behind an answer by length, beside the accuracy of the answer.

Panels of the "mass_sweep" result, whose means follow one head of each run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from goatviz import checks
from goatviz.plots import style
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure
from goatviz.plots.length import accuracy_lines
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import (
    ALL_ALIKE,
    Focus,
    chance_line,
    drawn_schemes,
    ends_of,
    interval_line,
    interval_text,
    over_lengths,
    run_dots,
    scheme_look,
    trained_note,
)
from goatviz.results import MASS_SWEEP, check_result

if TYPE_CHECKING:
    import xarray as xr

#: Titles of the panels of a mass sweep, by group of keys.
GROUPS = {
    "answer": "Mass on the answer",
    "recent": "Mass on the last {recent} keys",
    "first": "Mass on the first key (sink)",
}


def draw_mass(sweep: xr.Dataset) -> Figure:
    """Draw accuracy, and the mass on answer, recent keys and first key, by length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.

    Returns
    -------
    Figure
        Four panels. Each mass is that of one head of each run: the head with most of it at the
        training length, or at the shortest length if that was not measured. Open marks on dotted
        lines are the prior alone of the same head.

    Raises
    ------
    TypeError
        If `sweep` is not a mass sweep.
    ValueError
        If nothing was measured.
    """
    check_result(sweep, MASS_SWEEP)
    if not int(sweep["tokens"].sum()):
        raise ValueError("mass_sweep must hold at least one measured cell, got none")
    words = Words(
        f"What the answer rests on: {sweep.attrs['task']}",
        f"n = {sweep.attrs['examples']} examples a run; "
        f"{trained_note(sweep.attrs['training_length'])}",
    )
    panels = [mass_panel(sweep, of=of) for of in ("accuracy", *GROUPS)]
    return grid(panels, words, linked="xy")


def mass_panel(sweep: xr.Dataset, focus: Focus = ALL_ALIKE, *, of: str = "accuracy") -> Panel:
    """The share of answer tokens that are right, or the mass on a group of keys, by length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.
    focus : Focus
        What is chosen.
    of : {"accuracy", "answer", "recent", "first"}
        Quantity that is drawn.
    """
    lengths, places = sweep["length"].values, np.log2(sweep["length"].values)
    traces = [
        trace
        for scheme, one, x in drawn_schemes(sweep, places, focus)
        for trace in (
            accuracy_lines(one, scheme, x, "token", focus)
            if of == "accuracy"
            else _masses(one, scheme, x, of, focus)
        )
    ]
    if of == "accuracy":
        traces.append(chance_line(float(sweep.attrs["chance_token"]), ends_of(places)))
        title, note, axis = "Answer tokens right", "95 % (Wilson)", "share of tokens [1]"
        caption = ["Whiskers span the intervals of all runs."]
    else:
        title = GROUPS[of].format(recent=int(sweep.attrs["recent"]))
        note, axis = "95 % (bootstrap)", "mass [probability]"
        caption = [
            "Whiskers span the intervals of all runs.",
            "Masses are those of one head of each run: the one with most of it at "
            f"{int(sweep['reference_length']):,} tokens. Open marks: its prior alone.",
        ]
    y = {"title": axis, "range": [-0.04, 1.06]}
    panel = Panel(title, traces, y=y, note=note, caption=caption, height=220)
    return over_lengths(panel, lengths, sweep.attrs["training_length"], focus)


def _masses(one: xr.Dataset, scheme: str, x: np.ndarray, of: str, focus: Focus) -> list[Trace]:
    """The mass on a group of keys in the leading head of each run, and that of its prior."""
    pairs = zip(one[f"{of}_layer"].values, one[f"{of}_head"].values, strict=True)
    heads = [f"{layer}.{head}" for layer, head in pairs if layer >= 0]
    name = f"{style.escape(scheme)}, layer.head {', '.join(heads)}"
    look = scheme_look(scheme)
    prior_look = {
        "line": {"color": look.color, "width": 1, "dash": "dot"},
        "marker": {"color": look.color, "symbol": f"{look.symbol}-open", "size": 7},
        "showlegend": False,
    }
    traces = []
    for plan, what, settings in (("", "attention", {}), ("prior_", "prior", prior_look)):
        line = interval_line(
            scheme,
            x,
            one,
            f"mean_{plan}{of}_mass",
            focus,
            hover=f"{name}, {what}<br>%{{customdata[0]:,}} tokens<br>%{{y:.4f}} "
            f"{interval_text('.4f')}<br>{checks.count_text(len(heads), 'run')}",
            detail=[one["length"].values],
            **settings,
        )
        traces.append(line)
    del traces[1]["error_y"]
    if focus.runs and len(heads) > 1:
        detail = np.repeat(one["run"].values, len(x))
        hover = f"{style.escape(scheme)}, run %{{customdata}}<br>%{{y:.4f}}"
        dots = one[f"run_{of}_mass"].values
        traces.append(run_dots(scheme, x, dots, focus, hover=hover, detail=detail))
    return traces if heads else []
