"""A plotly figure as a widget, without a copy of plotly.js for each.

plotly's own FigureWidget carries 5 MB of it every time, saved with the notebook, and walks matrices
number by number. Here one model holds the library for all figures of a kernel, and a figure is its
JSON, in which plotly packs arrays; a saved notebook shows the figure that was drawn last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets
from ipywidgets import widget_serialization
from plotly.offline import get_plotlyjs

from goatviz.explore.scripts import widget_file, widget_script
from goatviz.plots.base import Panel, as_json

Drawn = go.Figure | Panel | Sequence[Panel]


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js of the installed plotly, once for all figures of a kernel."""

    _esm = "export default { render() {} };"

    source = traitlets.Unicode().tag(sync=True)


_library: PlotlyLibrary | None = None


def plotly_library() -> PlotlyLibrary:
    """The one library; a new one only after that was closed."""
    global _library
    if _library is None or _library.comm is None:
        _library = PlotlyLibrary(source=get_plotlyjs())
    return _library


class FigureView(anywidget.AnyWidget):
    """A figure in JupyterLab: drawn again when it changes, in the colours of the page.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure, Panel or sequence of Panel, optional
        From any `draw_*`, or panels one below the other. It fills the width of its place and
        keeps its height.
    label : str
        Its name for screen readers.

    Attributes
    ----------
    figure : str
        The figure as plotly's JSON.
    view_of : str
        The subject of the figure: as long as it stays the same, the reader's zoom is kept.
    """

    _esm = widget_script("figure_view")
    _css = widget_file("figure_view.css")

    figure = traitlets.Unicode('{"data": [], "layout": {}}').tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    view_of = traitlets.Unicode().tag(sync=True)
    library = traitlets.Instance(PlotlyLibrary).tag(sync=True, **widget_serialization)

    def __init__(self, figure: Drawn | None = None, *, label: str = "") -> None:
        super().__init__(library=plotly_library(), label=label, layout={"width": "100%"})
        self._shown: Panel | Sequence[Panel] | None = None
        self._on_click: list[Callable[[dict[str, Any]], None]] = []
        self.on_msg(self._received)
        if figure is not None:
            self.show_figure(figure)

    def show_figure(self, figure: Drawn, *, view_of: str = "") -> None:
        """Draw another figure in this one's place.

        Raises
        ------
        TypeError
            If `figure` is neither a plotly Figure nor panels.
        """
        # The same panel often comes again: a slider changes a few of many.
        text = self.figure if figure is self._shown else as_json(figure)
        self._shown = None if isinstance(figure, go.Figure) else figure
        with self.hold_sync():
            self.view_of = view_of
            self.figure = text

    def on_click(self, act: Callable[[dict[str, Any]], None]) -> None:
        """Call `act` with "trace", "x", "y" and "index" of every point that is clicked."""
        self._on_click.append(act)

    def _received(self, _widget: Any, message: dict[str, Any], _buffers: list[Any]) -> None:
        if message.get("kind") == "click":
            for act in self._on_click:
                act(message)
