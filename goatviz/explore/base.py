"""What every explorer is: traits, a pure picture of them, controls, and widgets that show it.

A change of traits asks for one picture; the newest wins, errors are shown where the reader looks,
and work that takes long runs beside the kernel's own and can be cancelled.
"""

from __future__ import annotations

import asyncio
import gc
import html
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ipywidgets

from goatviz.explore.controls import Control, ControlPanel
from goatviz.explore.export import write_page
from goatviz.explore.figure_view import FigureView
from goatviz.explore.selection import NAMES, Selection
from goatviz.explore.task import Task, run_beside, running_loop
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure

#: The least width of a map beside the panels.
LEAST_PX = 380


@dataclass
class Picture:
    """What an explorer shows for some values: a figure by panel, and all of it in words.

    Attributes
    ----------
    figures : dict of str to Panel, or to panels below each other
        One for each panel, with one pair of axes each.
    summary : str
        Plain text, for screen readers and below the panels.
    views : dict of str to str
        By panel: as long as this text stays, so does what a reader zoomed to.
    """

    figures: dict[str, Panel | Sequence[Panel]]
    summary: str
    views: dict[str, str] = field(default_factory=dict)


class Explorer(ipywidgets.VBox):
    """Controls above, panels side by side, a sentence below; subclasses say what is shown.

    A subclass names the traits that its picture depends on in `shown`, each of which has a
    control, and implements `_picture`. It calls `_set_up` when what it needs is there.

    Attributes
    ----------
    selection : Selection
        Layer, head, query and key, shared with whoever was given the same.
    """

    #: Traits that the picture depends on.
    shown: tuple[str, ...] = ()

    #: Panels, in order, with their least width in pixels.
    panels: Mapping[str, int] = {}

    selection: Selection | None = None
    _task: Task | None = None

    def _picture(self, values: Mapping[str, Any], task: Task) -> Picture:
        """The picture of these values: pure, and `task(share)` is called now and then."""
        raise NotImplementedError

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        """Whether the picture takes so long that the kernel should stay free."""
        return False

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for values that have no picture."""

    def _lead(self, values: Mapping[str, Any]) -> None:
        """Show what need not wait for the picture, such as a map beside it."""

    def _set_up(
        self,
        controls: Sequence[Control],
        *,
        label: str,
        selection: Selection | None = None,
        above: Sequence[ipywidgets.DOMWidget] = (),
    ) -> None:
        """Build the widgets, show the first picture, and listen from now on."""
        self.selection = Selection() if selection is None else selection
        self._label = label
        self._quiet = 0
        self._adopt_selection()
        self._controls = ControlPanel(controls, self._values_of(controls), label=label)
        self._summary = ipywidgets.HTML()
        self._views = {name: FigureView(label=f"{label}: {name}") for name in self.panels}
        boxes = [_wrapped(widget, LEAST_PX) for widget in above]
        boxes += [_wrapped(self._views[name], least) for name, least in self.panels.items()]
        pictures = ipywidgets.HBox(boxes, layout={"flex_flow": "row wrap", "overflow": "visible"})
        self.children = [self._controls, pictures, self._summary]
        self.add_class("goatviz-explorer")
        for name in self.shown:
            self.observe(self._trait_changed, name)
        self._controls.observe(self._controls_changed, "values")
        self._controls.on_cancel(self.cancel)
        for name in NAMES:
            if self.has_trait(name):
                self.observe(self._tell_selection, name)
        self.selection.observe(self._selection_changed, list(NAMES))
        self._request()

    # --- values ---

    def values(self) -> dict[str, Any]:
        """What the picture depends on, by name."""
        return {name: getattr(self, name) for name in self.shown}

    def _values_of(self, controls: Sequence[Control]) -> dict[str, Any]:
        return {c.name: getattr(self, c.name) for c in controls if c.kind != "button"}

    @contextmanager
    def _together(self):
        """Several traits change and one picture follows."""
        before = self.values()
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1
            if not self._quiet and self.values() != before:
                self._request()

    def set(self, **values: Any) -> None:
        """Change several traits at once; one picture follows.

        Raises
        ------
        ValueError
            If one of them is no value of this explorer.
        """
        unknown = [name for name in values if name not in self.shown]
        if unknown:
            raise ValueError(f"values must be among {', '.join(self.shown)}, got {unknown[0]!r}")
        with self._together():
            for name, value in values.items():
                setattr(self, name, value)

    def _trait_changed(self, change: dict[str, Any]) -> None:
        panel = self._controls
        if change["name"] in panel.values and panel.values[change["name"]] != change["new"]:
            panel.values = {**panel.values, change["name"]: change["new"]}
        if not self._quiet:
            self._request()

    def _controls_changed(self, change: dict[str, Any]) -> None:
        try:
            with self._together():
                for name, value in change["new"].items():
                    if value != getattr(self, name):
                        setattr(self, name, value)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self._say_error(error)

    # --- one selection for several ---

    def _adopt_selection(self) -> None:
        for name in NAMES:
            value = getattr(self.selection, name)
            if self.has_trait(name) and value is not None and self._accepts(name, value):
                setattr(self, name, value)

    def _accepts(self, name: str, value: int) -> bool:
        """Whether a value that somebody else chose is one of this explorer's."""
        try:
            self._check({**self.values(), name: value})
        except (TypeError, ValueError):
            return False
        return True

    def _selection_changed(self, change: dict[str, Any]) -> None:
        name, value = change["name"], change["new"]
        if value is None or not self.has_trait(name) or getattr(self, name) == value:
            return
        if self._accepts(name, value):
            setattr(self, name, value)

    def _tell_selection(self, change: dict[str, Any]) -> None:
        if self._accepts(change["name"], change["new"]):
            setattr(self.selection, change["name"], change["new"])

    # --- pictures ---

    def draw(self, **values: Any) -> Figure:
        """The same picture as one plotly figure, for these values and else the widget's own.

        Nothing changes in the widget, and no kernel or page is needed.

        Raises
        ------
        ValueError
            If there is no such value.
        """
        drawn = list(self.picture(values).figures.values())
        panels = [[one] if isinstance(one, Panel) else one for one in drawn]
        return grid([panel for part in panels for panel in part], Words(self._label))

    def picture(self, values: Mapping[str, Any]) -> Picture:
        """Figures by panel and their summary for these values, and else the widget's own.

        Raises
        ------
        ValueError
            If there is no such value.
        """
        unknown = [name for name in values if name not in self.shown]
        if unknown:
            raise ValueError(f"values must be among {', '.join(self.shown)}, got {unknown[0]!r}")
        merged = {**self.values(), **values}
        self._check(merged)
        return self._picture(merged, Task())

    def _request(self) -> None:
        """Show the picture of the values as they are now; an older one that is on its way ends."""
        if self._task is not None:
            self._task.stop()
        values = self.values()
        try:
            self._check(values)
            self._lead(values)
            loop = running_loop()
            if loop is None or not self._is_long(values):
                self._task = None
                self._show(self._picture(values, Task()))
            else:
                self._begin(values, loop)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self._task = None
            self._say_error(error)

    def _begin(self, values: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        """Compute in a thread, and show the picture when it is there."""

        def report(share: float) -> None:
            if self._task is task:
                self._controls.progress = share

        def end(picture: Picture | None, error: Exception | None) -> None:
            if self._task is not task:
                return
            self._task = None
            self._controls.progress = -1.0
            if picture is not None:
                self._show(picture)
            elif error is not None:
                self._say_error(error)

        self._task = task = Task()
        self.report_progress("Computing", 0.0)
        run_beside(loop, task, lambda task: self._picture(values, task), report, end)

    def cancel(self) -> None:
        """Stop what is being computed; what was shown before stays."""
        if self._task is not None:
            self._task.stop()
            self._task = None
            self._controls.progress = -1.0

    def _show(self, picture: Picture) -> None:
        for name, figure in picture.figures.items():
            self._views[name].show_figure(
                figure,
                label=self._views[name].label,
                view_of=picture.views.get(name, name),
            )
        text = html.escape(picture.summary, quote=False)
        self._summary.value = f'<div aria-live="polite" class="goatviz-summary">{text}</div>'
        self._controls.error = ""

    def _say_error(self, error: Exception) -> None:
        self._controls.progress = -1.0
        self._controls.error = f"{type(error).__name__}: {error}"

    # --- without a kernel, and the end ---

    def save_html(
        self, path: str | os.PathLike, *, vary: Mapping[str, Sequence[Any]] | None = None
    ) -> Path:
        """Write one offline file whose controls still work, for the values that are in it.

        Parameters
        ----------
        path : path-like
            Ends in .html, in an existing folder.
        vary : mapping of str to sequence
            Which controls move, and through which values; every combination is computed now.
            Default: what the explorer thinks a reader wants to move. The others stay as they are.

        Returns
        -------
        Path
            Of the file: plotly.js (4.8 MB) and below 6 MB of pictures.

        Raises
        ------
        ValueError
            If `path` is no .html in a folder that exists, a value has no picture, or all of them
            together exceed 6 MB (the message says how many there are).
        """
        chosen = dict(self._default_vary() if vary is None else vary)
        movable = [name for name in self.shown if name in self.controls]
        for name, options in chosen.items():
            if name not in movable:
                raise ValueError(f"vary must name {', '.join(movable)}, got {name!r}")
            if not len(options):
                raise ValueError(f"vary[{name!r}] must hold at least one value, got none")
        return write_page(self, Path(path), chosen)

    @property
    def label(self) -> str:
        """What is explored, in a few words."""
        return self._label

    @property
    def controls(self) -> dict[str, Control]:
        """The controls by the names of their traits."""
        return dict(self._controls.items())

    def report_progress(self, doing: str, share: float) -> None:
        """Show how far some work is; a share of -1 says that there is none."""
        self._controls.doing, self._controls.progress = doing, share

    def page_extras(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """States of maps beside the panels, for an exported page."""
        return {}

    def _default_vary(self) -> dict[str, list[Any]]:
        """What an exported page lets a reader move."""
        return {}

    def close(self) -> None:
        """Take the widget and all its parts off the page and let go of their memory."""
        if self.comm is None:
            return
        if self.selection is None:
            # Bad input: it was never set up.
            super().close()
            return
        self.cancel()
        self.selection.unobserve(self._selection_changed, list(NAMES))
        for widget in _below(self):
            widget.close()
        super().close()
        self.unobserve_all()
        self._forget()
        gc.collect()

    def _forget(self) -> None:
        """Drop what is large."""


def _wrapped(widget: ipywidgets.DOMWidget, least: int) -> ipywidgets.VBox:
    """The widget in a box that grows, and goes to the next line rather than below `least` px."""
    layout = {"flex": f"1 1 {least}px", "min_width": f"min({least}px, 100%)"}
    return ipywidgets.VBox([widget], layout=layout)


def _below(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """All widgets inside, and their layouts."""
    below: list[ipywidgets.Widget] = []
    for child in getattr(widget, "children", ()):
        below += [*_below(child), child]
        if isinstance(child, ipywidgets.DOMWidget) and child.trait_has_value("layout"):
            below.append(child.layout)
    return below


def ranged(name: str, value: Any, count: int) -> None:
    """Raise ValueError unless the value is one of 0 .. count - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value!r}")
