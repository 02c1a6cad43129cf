"""The JavaScript and style sheets of the widgets, as text.

anywidget would watch files that are given as paths, and its watcher would keep every widget ever
made, closed or not.
"""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def widget_file(name: str) -> str:
    """The text of a file beside this module.

    Examples
    --------
    >>> "export default" in widget_file("controls.js")
    True
    """
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def widget_script(name: str) -> str:
    """The script of a widget, after the functions that all scripts share."""
    return widget_file("dom.js") + widget_file(f"{name}.js")
