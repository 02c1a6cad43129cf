"""The JavaScript and style sheets of the widgets, as text.

Handed to anywidget as paths they would be watched for changes, and the watcher would keep every
widget that was ever made, closed or not.
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
