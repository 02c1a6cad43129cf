"""A plotly figure as a widget, without a copy of plotly.js for each.

plotly's own FigureWidget carries 5 MB of it every time, saved with the notebook, and walks matrices
number by number. Here one model holds the library for all figures of a kernel, and a figure is its
JSON, in which plotly packs arrays; what is drawn last is what a saved notebook shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets
from ipywidgets import widget_serialization
from plotly.offline import get_plotlyjs

from goatviz.explore.scripts import widget_file


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js of the installed plotly, once for all figures of a kernel."""

    _esm = "export default { render() {} };"

    source = traitlets.Unicode().tag(sync=True)


_library: PlotlyLibrary | None = None


def plotly_library() -> PlotlyLibrary:
    """The one library; another only after it was closed."""
    global _library
    if _library is None or _library.comm is None:
        _library = PlotlyLibrary(source=get_plotlyjs())
    return _library


class FigureView(anywidget.AnyWidget):
    """A figure in JupyterLab: drawn again when it changes, in the colours of the page.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure, optional
        As from any `draw_*`; it fills the width that there is and keeps its height.
    label : str
        What screen readers say of it.

    Attributes
    ----------
    figure : str
        What is drawn, as plotly's JSON.
    view_of : str
        What is drawn: as long as this stays, so does what a reader zoomed to.
    """

    _esm = widget_file("figure_view.js")
    _css = widget_file("figure_view.css")

    figure = traitlets.Unicode('{"data": [], "layout": {}}').tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    view_of = traitlets.Unicode().tag(sync=True)
    library = traitlets.Instance(PlotlyLibrary).tag(sync=True, **widget_serialization)

    def __init__(self, figure: go.Figure | None = None, *, label: str = "") -> None:
        super().__init__(library=plotly_library(), label=label, layout={"width": "100%"})
        self._on_click: list[Callable[[dict[str, Any]], None]] = []
        self.on_msg(self._received)
        if figure is not None:
            self.show_figure(figure, label=label)

    def show_figure(self, figure: go.Figure, *, label: str = "", view_of: str = "") -> None:
        """Draw another figure in this one's place.

        Raises
        ------
        TypeError
            If `figure` is no plotly Figure.
        """
        if not isinstance(figure, go.Figure):
            raise TypeError(f"figure must be a plotly Figure, got {type(figure).__name__}")
        text = figure.to_json(validate=False)
        with self.hold_sync():
            self.view_of = view_of
            self.label = label
            self.figure = text

    def on_click(self, act: Callable[[dict[str, Any]], None]) -> None:
        """Have `act` called with "trace", "x", "y" and "index" of every point that is clicked."""
        self._on_click.append(act)

    def _received(self, _widget: Any, message: dict[str, Any], _buffers: list[Any]) -> None:
        if message.get("kind") == "click":
            for act in self._on_click:
                act(message)
