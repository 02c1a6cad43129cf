"""Menus inside a figure: of several heads one is drawn, and a reader chooses which.

Every choice has traces of its own; the menu shows one choice's and hides the others', by plotly
alone, so it works in a saved page too. Which choices there are, is the drawing's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import plotly.graph_objects as go

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure

#: A menu of more entries than this is no longer a menu, and the page no longer light.
MAX_CHOICES = 48


class Choice(Protocol):
    """What a menu reads of an entry: its text, and the name that the subtitle adds."""

    @property
    def label(self) -> str: ...

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Choice)
#: A trace, alone or with the row and column of its subplot.
Placed = go.Trace | tuple[go.Trace, int, int]


def add_choices(
    figure: Figure,
    choices: Sequence[C],
    traces: Callable[[C], Iterable[Placed]],
    title: str,
    *,
    pad: int,
    note: Callable[[C], str] | None = None,
) -> None:
    """Add every choice's traces, the first's visible, and a menu that switches between them.

    Cells that are not allowed are alike for most heads, so equal marks in one subplot are added
    once. A single choice needs no menu.

    Parameters
    ----------
    figure : Figure
        What it holds already is always visible. The title becomes `title`, the subtitle that of
        the choice; special cells get a legend entry.
    choices : sequence of Choice
        At least one.
    traces : callable
        traces(choice): what is drawn of it, each with row and column in a figure of subplots.
    title : str
        Of the figure.
    pad : int
        Pixels between the menu and the plot.
    note : callable, optional
        note(choice): text of the figure's first annotation.
    """
    always = set(range(len(figure.data)))
    shared: dict[tuple, int] = {}
    owned: list[set[int]] = []
    for choice in choices:
        mine = set()
        for placed in traces(choice):
            trace, row, col = placed if isinstance(placed, tuple) else (placed, None, None)
            masked = trace.name == "not allowed"
            key = (row, col, np.asarray(trace.z).tobytes()) if masked else None
            at = shared.get(key, len(figure.data))
            if at == len(figure.data):
                trace.visible = not owned
                figure.add_trace(trace, row=row, col=col)
                if masked:
                    shared[key] = at
            mine.add(at)
        owned.append(mine)
    drawn = {trace.name for trace in figure.data if isinstance(trace, go.Heatmap)}
    for name, color in marks.SPECIAL.items():
        if name in drawn:
            always.add(len(figure.data))
            figure.add_trace(marks.legend_square(name, color))
    figure.update_layout(title={"text": title, "subtitle": {"text": _subtitle(choices[0])}})
    if note is not None:
        figure.layout.annotations[0].text = note(choices[0])
    if len(choices) == 1:
        return
    buttons = []
    for choice, mine in zip(choices, owned, strict=True):
        layout = {"title.subtitle.text": _subtitle(choice)}
        if note is not None:
            layout["annotations[0].text"] = note(choice)
        visible = [at in always or at in mine for at in range(len(figure.data))]
        buttons.append(
            {"label": choice.label, "method": "update", "args": [{"visible": visible}, layout]}
        )
    figure.update_layout(
        updatemenus=[
            {
                "buttons": buttons,
                "x": 1.0,
                "xanchor": "right",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": pad},
                "bgcolor": "rgba(128,128,128,0.12)",
                "bordercolor": style.GRID,
            }
        ]
    )


def _subtitle(choice: Choice) -> str:
    return f"{choice.label} ({style.escape(choice.name)})"
