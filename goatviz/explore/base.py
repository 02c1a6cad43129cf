"""What every explorer is: traits, a pure picture of them, controls, and widgets that show it.

A change of traits asks for one picture; the newest wins, errors are shown where the reader looks,
and work that takes long runs beside the kernel's own and can be cancelled.
"""

from __future__ import annotations

import gc
import html
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets

from goatviz import checks
from goatviz.analysis.levels import PlanLevels
from goatviz.explore.controls import Control, ControlPanel
from goatviz.explore.export import write_page
from goatviz.explore.figure_view import FigureView
from goatviz.explore.plan_map import PlanMap
from goatviz.explore.selection import NAMES, Selection
from goatviz.explore.task import Newest, Task, running_loop
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure


@dataclass
class Picture:
    """What an explorer shows for some values: a figure by panel, and all of it in words.

    Attributes
    ----------
    figures : dict of str to Panel or sequence of Panel
        What each panel of the explorer shows; a sequence is drawn one below the other.
    summary : str
        Plain text, for screen readers and below the panels.
    views : dict of str to str
        For each panel, a text: as long as it stays the same, the reader's zoom is kept.
    """

    figures: dict[str, Panel | Sequence[Panel]]
    summary: str
    views: dict[str, str] = field(default_factory=dict)


class Explorer(ipywidgets.VBox):
    """Controls above, panels side by side, a sentence below; subclasses say what is shown.

    A subclass names the traits that its picture depends on in `shown`, each of which has a
    control, and implements `_picture`. Its constructor ends with `_set_up`. One that has a map of
    plans implements `_levels` and `_map_options`, and calls `_show_map` before that.

    Attributes
    ----------
    selection : Selection
        Layer, head, query and key, shared with every explorer that was given the same one.
    map : PlanMap or None
        The plan of the chosen head, beside the panels.
    """

    #: Traits that the picture depends on.
    shown: tuple[str, ...] = ()

    #: Panels, in order, with their least width in pixels.
    panels: Mapping[str, int] = {}

    #: The map's place among the panels, and its least width in pixels.
    map_place: tuple[int, int] = (0, 380)

    selection: Selection | None = None
    map: PlanMap | None = None

    #: Heads of every layer, where there are layers to choose from.
    _heads: Mapping[int, Sequence[int]] = {}
    #: Above 0 while changes wait for others, and no picture is asked for.
    _quiet = 0

    def _picture(self, values: Mapping[str, Any], task: Task) -> Picture:
        """Draw these values: a pure function, which calls `task(share)` now and then."""
        raise NotImplementedError

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        """Whether the picture takes so long that it is computed beside the kernel's own work."""
        return False

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for values that have no picture."""
        if "layer" in values:
            layer = checks.one_of("layer", checks.integer("layer", values["layer"]), self._heads)
            checks.one_of("head", checks.integer("head", values["head"]), self._heads[layer])

    def _lead(self, values: Mapping[str, Any]) -> None:
        """Show what need not wait for the picture, such as the map beside it."""
        if self.map is not None:
            self._show_map(values["layer"], values["head"])

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        """Act on a click on a point of a panel; see `FigureView.on_click`."""

    def _levels(self, layer: int, head: int) -> PlanLevels:
        """The plan that the map shows of a head."""
        raise NotImplementedError

    def _map_options(self, levels: PlanLevels) -> dict[str, Any]:
        """Title and tokens of a plan in the map."""
        raise NotImplementedError

    def _set_up(
        self,
        controls: Sequence[Control],
        *,
        label: str,
        selection: Selection | None = None,
    ) -> None:
        """Build the widgets, show the first picture, and listen from now on."""
        self._work = Newest(lambda share: self.report_progress("Computing", share))
        self.selection = Selection() if selection is None else selection
        self._label = label
        values = {each.name: getattr(self, each.name) for each in controls if each.kind != "button"}
        self._controls = ControlPanel(controls, values, label=label)
        self._summary = ipywidgets.HTML()
        self._views = {name: FigureView(label=f"{label}: {name}") for name in self.panels}
        boxes = [_wrapped(self._views[name], least) for name, least in self.panels.items()]
        if self.map is not None:
            place, least = self.map_place
            boxes.insert(place, _wrapped(self.map, least))
        pictures = ipywidgets.HBox(boxes, layout={"flex_flow": "row wrap", "overflow": "visible"})
        self.children = [self._controls, pictures, self._summary]
        self.add_class("goatviz-explorer")
        for name in self.shown:
            self.observe(self._trait_changed, name)
        self._controls.observe(self._controls_changed, "values")
        self._controls.on_cancel(self.cancel)
        for name, view in self._views.items():
            view.on_click(partial(self._click_received, name))
        with self._quietly():
            self._follow_layer()
            for name in NAMES:
                self._selection_changed({"name": name, "new": getattr(self.selection, name)})
        for name in NAMES:
            if self.has_trait(name):
                self.observe(self._tell_selection, name)
        self.selection.observe(self._selection_changed, list(NAMES))
        self._request()

    # --- values ---

    def values(self) -> dict[str, Any]:
        """The values that the picture depends on, by name."""
        return {name: getattr(self, name) for name in self.shown}

    def _require_known(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for a name that is none of `shown`."""
        for name in values:
            if name not in self.shown:
                raise ValueError(f"values must be among {', '.join(self.shown)}, got {name!r}")

    def _merged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """These values, and the widget's own for the others; checked."""
        self._require_known(values)
        merged = {**self.values(), **values}
        self._check(merged)
        return merged

    @contextmanager
    def _quietly(self):
        """Traits change and no picture is asked for."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextmanager
    def _together(self):
        """Several traits change and one picture follows."""
        before = self.values()
        try:
            with self._quietly():
                yield
        finally:
            if not self._quiet and self.values() != before:
                self._request()

    def set(self, **values: Any) -> None:
        """Change several traits at once; one picture follows.

        Raises
        ------
        ValueError
            If this explorer has no value of that name.
        """
        self._require_known(values)
        with self._together():
            for name, value in values.items():
                setattr(self, name, value)

    def _trait_changed(self, change: dict[str, Any]) -> None:
        if change["name"] == "layer":
            self._follow_layer()
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

    def _follow_layer(self) -> None:
        """Offer the heads of the chosen layer, and move to the one nearest to the chosen head."""
        heads = self._heads.get(self.layer) if self.has_trait("layer") else None
        if heads:
            self._controls.change("head", options=[(head, str(head)) for head in heads])
            # As a change of its own, a head that this layer lacks would be an error.
            with self._quietly():
                self.head = min(heads, key=lambda head: abs(head - self.head))

    # --- one selection for several ---

    def _accepts(self, name: str, value: int) -> bool:
        """Whether this explorer can show a value that was chosen elsewhere."""
        if name == "layer":
            # Its head may be another one; it follows.
            return value in self._heads
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
        """The same picture as one plotly figure; values not given are the widget's own.

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
        """Figures by panel and their summary; values not given are the widget's own.

        Raises
        ------
        ValueError
            If there is no such value.
        """
        return self._picture(self._merged(values), Task())

    def _request(self) -> None:
        """Show the picture of the present values; one that is still being computed is stopped."""
        self._work.stop()
        values = self.values()
        try:
            self._check(values)
            self._lead(values)
            loop = running_loop()
            if loop is None or not self._is_long(values):
                self._show(self._picture(values, Task()))
            else:
                self._work.start(loop, partial(self._picture, values), self._end)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self._say_error(error)

    def _end(self, picture: Picture | None, error: Exception | None) -> None:
        """What was computed beside the kernel's own work is there, or never will be."""
        if picture is not None:
            self._show(picture)
        elif error is not None:
            self._say_error(error)

    def cancel(self) -> None:
        """Stop what is being computed; what was shown before stays."""
        self._work.stop()

    def _show(self, picture: Picture) -> None:
        for name, figure in picture.figures.items():
            self._views[name].show_figure(figure, view_of=picture.views.get(name, name))
        self._say(picture.summary)
        self._controls.error = ""

    def _say(self, summary: str) -> None:
        text = html.escape(summary, quote=False)
        self._summary.value = f'<div aria-live="polite" class="goatviz-summary">{text}</div>'

    def _show_map(self, layer: int, head: int) -> None:
        """Show the plan of a head in the map, unless it is there already."""
        shown = None if self.map is None else self.map.levels
        if shown is not None and (shown.call.layer, shown.head) == (layer, head):
            return
        levels = self._levels(layer, head)
        options = self._map_options(levels)
        if self.map is None:
            self.map = PlanMap(levels, **options)
        else:
            self.map.show_plan(levels, **options)

    def _click_received(self, panel: str, message: Mapping[str, Any]) -> None:
        try:
            self._clicked(panel, message)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self._say_error(error)

    def _say_error(self, error: Exception) -> None:
        self._controls.progress = -1.0
        self._controls.error = f"{type(error).__name__}: {error}"

    # --- without a kernel, and the end ---

    def save_html(
        self, path: str | os.PathLike, *, vary: Mapping[str, Sequence[Any]] | None = None
    ) -> Path:
        """Write one offline page whose controls still work, for values computed beforehand.

        Parameters
        ----------
        path : path-like
            Path of the page, which ends in .html, in an existing folder.
        vary : mapping of str to sequence
            Controls that move, and the values of each; every combination is computed now.
            Default: a choice of the explorer's own. Other controls stay as they are.

        Returns
        -------
        Path
            The file, which holds plotly.js (4.8 MB) and at most 6 MB of pictures.

        Raises
        ------
        ValueError
            If `path` is not an .html file in an existing folder, a value has no picture, or the
            pictures together exceed 6 MB (the message says how many there are).
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
        """The explorer's name, in a few words."""
        return self._label

    @property
    def controls(self) -> dict[str, Control]:
        """The controls by the names of their traits."""
        return dict(self._controls.items())

    def report_progress(self, doing: str, share: float) -> None:
        """Show which share of some work is done; -1 says that nothing is being done."""
        self._controls.doing, self._controls.progress = doing, share

    def page_extras(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """State of the map beside the panels, for an exported page."""
        if self.map is None:
            return {}
        merged = self._merged(values)
        levels = self._levels(merged["layer"], merged["head"])
        return {"map": self.map.state_of(levels, title=self._map_options(levels)["title"])}

    def _default_vary(self) -> dict[str, list[Any]]:
        """The controls that a reader of an exported page can move, and their values."""
        return {}

    def close(self) -> None:
        """Take the widget and all its parts off the page and free their memory."""
        if self.comm is None:
            return
        if self.selection is None:
            # Its constructor failed before it was set up.
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
        """Drop the large objects that this explorer holds."""
        self.map = None


def _wrapped(widget: ipywidgets.DOMWidget, least: int) -> ipywidgets.VBox:
    """The widget in a box that grows, and wraps to the next line below `least` pixels."""
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
