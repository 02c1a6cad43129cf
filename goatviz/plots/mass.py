"""What the attention that must give an answer rests on, against length, beside what came out right.

Panels of the "mass_sweep" result: its means follow one head of each run, chosen once.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from goatviz.plots import style
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure
from goatviz.plots.marks import Trace
from goatviz.plots.schemes import (
    ALL_ALIKE,
    Focus,
    chance_line,
    chosen,
    ends_of,
    interval_line,
    length_axis,
    run_dots,
    scheme_look,
    spread,
    trained_marks,
    trained_note,
)
from goatviz.results import MASS_SWEEP, check_result

#: What a mass sweep's panels show.
GROUPS = {
    "answer": "Mass on the answer",
    "recent": "Mass on the last {recent} keys",
    "first": "Mass on the first key (sink)",
}


def draw_mass(sweep: xr.Dataset) -> Figure:
    """Draw accuracy, and the mass on answer, recent keys and first key, against length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.

    Returns
    -------
    Figure
        Four panels. Each mass is that of one head of each run: the one with most of it at the
        training length, or at the shortest length where that was not measured. Open marks on
        dotted lines are the same head's prior alone.

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
    """Answer tokens right, or the mass on a group of keys, against length.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.
    focus : Focus
        What is looked at.
    of : {"accuracy", "answer", "recent", "first"}
        Which of them.
    """
    places = np.log2(sweep["length"].values)
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    lines = _accuracy if of == "accuracy" else _masses
    traces: list[Trace] = []
    for at, scheme in enumerate(schemes):
        if focus.shows(scheme):
            x = spread(places, at, len(schemes))
            traces += lines(sweep.isel(scheme=at), scheme, x, of, focus)
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
    trained = sweep.attrs["training_length"]
    panel = Panel(
        title,
        traces,
        length_axis(sweep["length"].values, trained),
        {"title": axis, "range": [-0.04, 1.06]},
        note=note,
        caption=caption,
        shapes=trained_marks(trained),
        height=220,
    )
    return chosen(panel, places, focus.length and float(np.log2(focus.length)), focus)


def _accuracy(one: xr.Dataset, scheme: str, x: np.ndarray, of: str, focus: Focus) -> list[Trace]:
    """A scheme's share of answer tokens that are right."""
    name, tokens = style.escape(scheme), one["tokens"].values
    runs = int((tokens.sum(axis=1) > 0).sum())
    traces = [
        interval_line(
            scheme,
            x,
            [one[f"mean_token{end}"].values for end in ("", "_low", "_high")],
            focus,
            hover=f"{name}, %{{customdata[0]:,}} tokens<br>%{{y:.3f}} (%{{customdata[1]:.3f}} to "
            f"%{{customdata[2]:.3f}})<br>%{{customdata[3]:,}} tokens of answers, {runs} run(s)",
            detail=[one["length"].values, tokens.sum(axis=0)],
        )
    ]
    if focus.runs and runs > 1:
        detail = np.stack([np.repeat(one["run"].values, len(x)), tokens.ravel()], axis=-1)
        hover = f"{name}, run %{{customdata[0]}}<br>%{{y:.3f}}<br>%{{customdata[1]:,}} tokens"
        dots = one["token"].values
        traces.append(run_dots(scheme, x, dots, focus, hover=hover, detail=detail))
    return traces


def _masses(one: xr.Dataset, scheme: str, x: np.ndarray, of: str, focus: Focus) -> list[Trace]:
    """A scheme's mass on a group of keys, and its prior's, in the leading head of each run."""
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
            [one[f"mean_{plan}{of}_mass{end}"].values for end in ("", "_low", "_high")],
            focus,
            hover=f"{name}, {what}<br>%{{customdata[0]:,}} tokens<br>%{{y:.4f}} "
            f"(%{{customdata[1]:.4f}} to %{{customdata[2]:.4f}})<br>{len(heads)} run(s)",
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
