"""The plotly Figure that goatviz returns, and its export to one offline HTML file.

It differs from plotly's in its configuration only: no cloud button, no logo, no request to any
network. What is in a figure is the business of the other modules.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from goatviz.files import whole_file

#: plotly.js options of every goatviz figure; plotly's "Share chart" button uploads the data.
CONFIG = {"showSendToCloud": False, "displaylogo": False, "responsive": True}


class Figure(go.Figure):
    """A plotly Figure that stays on this machine wherever it is shown or written."""

    def show(self, *args: Any, **kwargs: Any) -> None:
        """As plotly's, without the cloud button."""
        pio.show(self, *args, **{"config": CONFIG, **kwargs})

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As plotly's, without the cloud button and without MathJax from a CDN."""
        return pio.to_html(self, *args, **{"config": CONFIG, "include_mathjax": False, **kwargs})

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """As plotly's, without the cloud button and without MathJax from a CDN."""
        pio.write_html(self, *args, **{"config": CONFIG, "include_mathjax": False, **kwargs})

    def _ipython_display_(self) -> None:
        if pio.renderers.render_on_display and pio.renderers.default:
            self.show()
        else:
            print(repr(self))

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(*args, **{"config": CONFIG, **kwargs})

    def _repr_html_(self) -> str:
        return self.to_html(full_html=False, include_plotlyjs=True)


def save_html(figure: go.Figure, path: str | os.PathLike) -> Path:
    """Write a figure as one HTML file that opens offline, whole or not at all.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        From any `plot_*` or `draw_*`.
    path : path-like
        Ends in .html, in an existing folder.

    Returns
    -------
    Path
        Of the file (about 5 MB: plotly.js is inside).

    Raises
    ------
    TypeError
        If `figure` is no plotly Figure.
    ValueError
        If `path` does not end in .html or its folder does not exist.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_html(Figure(), Path(folder) / "empty.html").name
    'empty.html'
    """
    if not isinstance(figure, go.Figure):
        raise TypeError(f"figure must be a plotly Figure, got {type(figure).__name__}")
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"path must end in .html, got {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {path}")
    text = pio.to_html(figure, config=CONFIG, include_mathjax=False, include_plotlyjs=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
