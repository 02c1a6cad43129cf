"""What every explorer is: values, a pure picture of them, and a page that shows it.

A change of values asks for one picture; the newest wins, errors are shown where the reader looks,
and work that takes long runs beside the kernel's own and can be cancelled.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from goatviz import checks
from goatviz.explore.controls import Control
from goatviz.explore.export import write_page
from goatviz.explore.jobs import Job, Newest, running_loop
from goatviz.explore.page import FigureView, Page, Place, trait_name
from goatviz.explore.selection import NAMES, Selection
from goatviz.plots.base import Panel, Words, as_figure, grid, single
from goatviz.plots.figure import Figure


@dataclass
class Picture:
    """What an explorer shows for some values: figures by panel, and all of it in words.

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


class Explorer(Page):
    """Controls, and parts that show what belongs to their values; subclasses say what that is.

    A subclass names the traits that its picture depends on in `shown`; each is tagged `sync` and
    has a control. It implements `_picture`, and its constructor ends with `_set_up`.

    Attributes
    ----------
    selection : Selection
        Layer, head, query and key, shared with every explorer that was given the same one.
    """

    #: Traits that the picture depends on.
    shown: tuple[str, ...] = ()

    #: Panels, in order, with their least width in pixels.
    panels: Mapping[str, int] = {}

    selection: Selection | None = None

    #: Heads of every layer, where there are layers to choose from.
    _heads: Mapping[int, Sequence[int]] = {}
    #: Above 0 while changes wait for others, and no picture is asked for.
    _quiet = 0

    # --- what a subclass says ---

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        """Draw these values: a pure function, which calls `job(share)` now and then."""
        raise NotImplementedError

    def _at_once(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Contents of parts that need not wait for the picture, such as the map beside it."""
        return {}

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        """Whether the picture takes so long that it is computed beside the kernel's own work."""
        return False

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for values that have no picture."""
        if "layer" in values:
            layer = checks.one_of("layer", checks.integer("layer", values["layer"]), self._heads)
            checks.one_of("head", checks.integer("head", values["head"]), self._heads[layer])

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Fields of controls that depend on the values, by the controls' names."""
        return {}

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        """Act on a click on a point of a panel; see `FigureView.on_click`."""

    def _pressed(self, button: str) -> None:
        """Act on a button."""

    def _default_vary(self) -> dict[str, list[Any]]:
        """The controls that a reader of an exported page can move, and their values."""
        return {}

    def _forget(self) -> None:
        """Drop the large objects that this explorer holds."""

    def _set_up(
        self,
        controls: Sequence[Control],
        *,
        label: str,
        places: Mapping[str, Place | int] | None = None,
        selection: Selection | None = None,
    ) -> None:
        """Build the page, show the first picture, and listen from now on.

        `places` are the parts in order; a number is the least width of a panel. Default: `panels`.
        """
        self._work = Newest(partial(self.report_progress, "Computing"))
        self.selection = Selection() if selection is None else selection
        self.label = label
        self._controls = {control.name: control for control in controls}
        placed = {
            name: place
            if isinstance(place, Place)
            else Place(FigureView(label=f"{label}: {name}"), place)
            for name, place in (self.panels if places is None else places).items()
        }
        self._adopt(placed)
        for name, part in self.parts.items():
            if isinstance(part, FigureView):
                part.on_click(partial(self._clicked, name))
        with self._quietly():
            self._follow_layer()
            for name in NAMES:
                self._selection_changed({"name": name, "new": getattr(self.selection, name)})
        self._show_controls()
        for name in self.shown:
            self.observe(self._trait_changed, name)
        for name in NAMES:
            if self.has_trait(name):
                self.observe(self._tell_selection, name)
        self.selection.observe(self._selection_changed, list(NAMES))
        self._request()
        self.open()

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
    def _quietly(self) -> Iterator[None]:
        """Traits change and no picture is asked for."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextmanager
    def _together(self) -> Iterator[None]:
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

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take values of the page, as ipywidgets does; one picture follows."""
        try:
            with self._together():
                super().set_state(sync_data)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self.say_error(error)

    def _trait_changed(self, change: dict[str, Any]) -> None:
        if change["name"] == "layer":
            self._follow_layer()
        if not self._quiet:
            self._request()

    def _follow_layer(self) -> None:
        """Move to the head of the chosen layer that is nearest to the chosen head."""
        heads = self._heads.get(self.layer) if self.has_trait("layer") else None
        if heads:
            # As a change of its own, a head that this layer lacks would be an error.
            with self._quietly():
                self.head = min(heads, key=lambda head: abs(head - self.head))

    def _show_controls(self) -> None:
        """Show the controls as they are for the present values."""
        values = self.values()
        changes = {}
        if self._heads.get(values.get("layer")):
            heads = self._heads[values["layer"]]
            changes["head"] = {"options": [(head, str(head)) for head in heads]}
        for name, changed in (changes | self._changed_controls(values)).items():
            self._controls[name] = replace(self._controls[name], **changed)
        self.control_specs = [control.spec() for control in self._controls.values()]

    @property
    def controls(self) -> dict[str, Control]:
        """The controls by the names of their traits."""
        return dict(self._controls)

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
        return grid([panel for part in panels for panel in part], Words(self.label))

    def picture(self, values: Mapping[str, Any]) -> Picture:
        """Figures by panel and their summary; values not given are the widget's own.

        Raises
        ------
        ValueError
            If there is no such value.
        """
        return self._picture(self._merged(values), Job())

    def state_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Traits of the page that depend on the values, as they are for these; nothing changes.

        Raises
        ------
        ValueError
            If there is no such value.
        """
        merged = self._merged(values)
        states = {
            name: self.parts[name].state_of(content)
            for name, content in self._at_once(merged).items()
        }
        picture = self._picture(merged, Job())
        for name, figure in picture.figures.items():
            view_of = picture.views.get(name, name)
            states[name] = self.parts[name].state_of(figure, view_of=view_of)
        parts = {trait_name(n, t): v for n, state in states.items() for t, v in state.items()}
        return {**parts, "summary": picture.summary}

    def _request(self) -> None:
        """Show the picture of the present values; one that is still being computed is stopped."""
        self._work.stop()
        values = self.values()
        try:
            self._check(values)
            self._show_controls()
            for name, content in self._at_once(values).items():
                self.parts[name].show(content)
            self._begin(values)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self.say_error(error)

    def _begin(self, values: Mapping[str, Any]) -> None:
        """Compute the picture and show it, now or, if it takes long, beside the kernel's work."""
        loop = running_loop()
        if loop is None or not self._is_long(values):
            self._show(self._picture(values, Job()))
        else:
            self._work.start(loop, partial(self._picture, values), self._end)

    def _end(self, picture: Picture | None, error: Exception | None) -> None:
        """What was computed beside the kernel's own work is there, or never will be."""
        if picture is not None:
            self._show(picture)
        elif error is not None:
            self.say_error(error)

    def cancel(self) -> None:
        """Stop what is being computed; what was shown before stays."""
        self._work.stop()

    def _show(self, picture: Picture) -> None:
        with self.hold_sync():
            # What the picture needed may have told more about the range of a control.
            self._show_controls()
            for name, figure in picture.figures.items():
                self.parts[name].show(figure, view_of=picture.views.get(name, name))
            self.summary, self.error = picture.summary, ""

    def _act_on(self, message: Mapping[str, Any]) -> None:
        if message.get("kind") == "cancel":
            self.cancel()
        elif message.get("kind") == "press":
            self._pressed(str(message.get("name")))
        else:
            super()._act_on(message)

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
        movable = [name for name in self.shown if name in self._controls]
        for name, options in chosen.items():
            if name not in movable:
                raise ValueError(f"vary must name {', '.join(movable)}, got {name!r}")
            if not len(options):
                raise ValueError(f"vary[{name!r}] must hold at least one value, got none")
        return write_page(self, Path(path), chosen)

    def save_image(
        self, path: str | os.PathLike, *, panel: str | None = None, **options: Any
    ) -> Path:
        """Write maps and panels as one image, as they are now; needs kaleido and a Chromium.

        Parameters
        ----------
        path : path-like
            Path in an existing folder that ends in .png, .svg, .pdf, .jpg, .jpeg or .webp.
        panel : str, optional
            One part alone, such as "row", "map", or "heads" for the thumbnails. Default: all but
            thumbnails and passages; a passage is text, and in no image.
        **options
            Options of `Figure.write_image`: theme, width, height, scale.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ValueError
            If there is no such panel, or the path does not fit.
        ImportError, RuntimeError
            If kaleido or a Chromium is missing; the message says how to get it.
        """
        figures = self.picture({}).figures
        drawn = {name: figures.get(name) or part.panel() for name, part in self.parts.items()}
        drawn = {name: one for name, one in drawn.items() if one is not None}
        if panel is None:
            shown = [one for name, one in drawn.items() if self.parts[name].kind != "heads"]
            each = [panel for one in shown for panel in ([one] if isinstance(one, Panel) else one)]
            figure = grid(each, Words(self.label))
        else:
            chosen = drawn[checks.one_of("panel", panel, drawn)]
            if self.parts[panel].kind == "map":
                # About square, as wide as an image is by default.
                chosen = replace(chosen, height=530)
            figure = as_figure(chosen) if panel in figures else single(chosen)
        figure.write_image(path, **options)
        return Path(path)

    def close(self) -> None:
        """Take the widget and all its parts off the page and free their memory."""
        if self.comm is None:
            return
        if self.selection is not None:
            self.cancel()
            self.selection.unobserve(self._selection_changed, list(NAMES))
        super().close()
        self.unobserve_all()
        self._forget()
        gc.collect()
