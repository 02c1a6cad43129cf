"""One widget for everything that is shown together: parts whose traits the page follows.

An explorer is a single anywidget with one front end (the ES modules in front/). Its parts, such as
a plotly figure or the map of a plan, are plain objects with traits; each of these that is tagged
`sync` is also a trait of the widget, under the part's name. Since nothing but anywidget's own
protocol is used, the same page works in JupyterLab, Notebook, Voila and marimo.
"""

from __future__ import annotations

import functools
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets
from ipywidgets import widget_serialization
from plotly.offline import get_plotlyjs

from goatviz.plots.base import Panel, as_json

#: Modules of the front end, each after those that it imports.
MODULES = ("dom", "controls", "figure", "map", "heads", "passage", "explorer")

Drawn = go.Figure | Panel | Sequence[Panel]


@functools.cache
def front_file(name: str) -> str:
    """The text of a file of the front end.

    anywidget would watch files that are given as paths, and its watcher would keep every widget
    ever made, closed or not.

    Examples
    --------
    >>> "goatviz-explorer" in front_file("explorer.css")
    True
    """
    return Path(__file__).with_name("front").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def front_script() -> str:
    """All modules of the front end as one ES module, as anywidget wants it."""
    imports = re.compile(r"^import .*;\n", re.M)
    return "".join(imports.sub("", front_file(f"{name}.js")) for name in MODULES)


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js of the installed plotly, once for all widgets of a kernel."""

    _esm = "export default { render() {} };"

    source = traitlets.Unicode().tag(sync=True)


_library: PlotlyLibrary | None = None


def plotly_library() -> PlotlyLibrary | None:
    """The one library; a new one only after that was closed.

    None in marimo, where a model ends with its cell and belongs to one of several readers whom the
    process serves: a page asks for plotly.js by message there.
    """
    global _library
    marimo = sys.modules.get("marimo")
    if marimo is not None and marimo.running_in_notebook():
        return None
    if _library is None or _library.comm is None:
        _library = PlotlyLibrary(source=get_plotlyjs())
    return _library


class Part(traitlets.HasTraits):
    """A part of a page: traits tagged `sync`, messages, and a content that it can show.

    A subclass says which module of the front end draws it (`kind`), what state stands for a content
    (`state_of`), and acts on messages of the page (`received`).
    """

    #: Name of what draws it in the front end.
    kind = ""

    _page: Page | None = None
    _name = ""

    def state_of(self, content: Any, **options: Any) -> dict[str, Any]:
        """The values of the traits that show a content; nothing changes."""
        raise NotImplementedError

    def show(self, content: Any, **options: Any) -> None:
        """Show a content: all its traits change together."""
        self.assign(self.state_of(content, **options))

    def assign(self, state: Mapping[str, Any]) -> None:
        """Set several traits, which reach the page in one message."""
        with self.together():
            for name, value in state.items():
                setattr(self, name, value)

    def panel(self) -> Panel | None:
        """What is shown, as a panel of a figure, if it can be one."""
        return None

    def received(self, message: Mapping[str, Any]) -> None:
        """Act on a message of the page."""

    def send(self, message: Mapping[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """Send a message to this part's place on the page, if it is on one."""
        if self._page is not None:
            self._page.send({"part": self._name, **message}, list(buffers))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes of traits reach the page in one message."""
        if self._page is None:
            yield
            return
        with self._page.hold_sync():
            yield

    def close(self) -> None:
        """Stop what is being computed, and let go of large objects."""


class FigureView(Part):
    """A plotly figure, drawn again when it changes, in the colours of the page.

    plotly's own FigureWidget carries 5 MB of plotly.js every time, saved with the notebook, and
    walks matrices number by number. Here one model holds the library for all figures of a kernel,
    and arrays travel as bytes.

    Attributes
    ----------
    figure : dict
        The figure as plotly's JSON, "text", and its arrays, "buffers"; empty before the first.
    label : str
        Name for screen readers.
    view_of : str
        The subject of the figure: as long as it stays the same, the reader's zoom is kept.
    height : int
        Height in pixels of the place that is kept free for a first figure.
    """

    kind = "figure"

    figure = traitlets.Dict().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    view_of = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int(320).tag(sync=True)

    def __init__(self, drawn: Drawn | None = None, *, label: str = "") -> None:
        super().__init__(label=label)
        self._shown: Drawn | None = None
        self._on_click: list[Callable[[Mapping[str, Any]], None]] = []
        if drawn is not None:
            self.show(drawn)

    def state_of(self, content: Drawn, *, view_of: str = "") -> dict[str, Any]:
        """The state that shows a figure, a panel, or panels one below the other.

        Raises
        ------
        TypeError
            If `content` is neither a plotly Figure nor panels.
        """
        buffers: list[bytes] = []
        text = as_json(content, buffers)
        return {"figure": {"text": text, "buffers": buffers}, "view_of": view_of}

    def show(self, content: Drawn, *, view_of: str = "") -> None:
        """Draw another figure in this one's place; see `state_of`."""
        # The same panel often comes again: a slider changes a few of many.
        if content is self._shown and self.figure:
            self.view_of = view_of
            return
        super().show(content, view_of=view_of)
        self._shown = None if isinstance(content, go.Figure) else content

    def on_click(self, act: Callable[[Mapping[str, Any]], None]) -> None:
        """Call `act` with "trace", "x", "y" and "index" of every point that is clicked."""
        self._on_click.append(act)

    def received(self, message: Mapping[str, Any]) -> None:
        if message.get("kind") == "click":
            for act in self._on_click:
                act(message)

    def close(self) -> None:
        self._on_click.clear()
        self._shown = None


def trait_name(part: str, trait: str) -> str:
    """Name of a part's trait as one of the page.

    Examples
    --------
    >>> trait_name("last query", "figure")
    'last_query_figure'
    """
    return f"{part.replace(' ', '_')}_{trait}"


@dataclass(frozen=True)
class Place:
    """Where a part stands on the page.

    Parameters
    ----------
    part : Part
        The part.
    least : int
        Least width in pixels below which it moves to a line of its own.
    wide : bool
        Whether it takes a line of its own in any case.
    """

    part: Part
    least: int = 340
    wide: bool = False

    def spec(self, name: str) -> dict[str, Any]:
        """The place as the page needs it."""
        return {"name": name, "kind": self.part.kind, "least": self.least, "wide": self.wide}


class Page(anywidget.AnyWidget):
    """Parts side by side, a line for progress and errors above them, a sentence below.

    Parameters
    ----------
    places : mapping of str to Place, optional
        The parts in order, by their names. Without them, the page opens after a subclass has
        called `_adopt` and `open`.
    label : str
        Name of the whole, for screen readers.

    Attributes
    ----------
    parts : mapping of str to Part
        The parts by their names.
    progress : float
        Share of the work that is done; -1 while nothing is being done.
    doing, error, summary : str
        Name of the work that is being done, the last error, and all that is shown in words.
    own_id : str
        The id of the widget's model, by which the page finds the model behind anywidget's.
    """

    _esm = front_script()
    _css = front_file("explorer.css")

    label = traitlets.Unicode().tag(sync=True)
    control_specs = traitlets.List().tag(sync=True)
    place_specs = traitlets.List().tag(sync=True)
    progress = traitlets.Float(-1.0).tag(sync=True)
    doing = traitlets.Unicode().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    summary = traitlets.Unicode().tag(sync=True)
    library = traitlets.Instance(PlotlyLibrary, allow_none=True).tag(
        sync=True, **widget_serialization
    )
    own_id = traitlets.Unicode().tag(sync=True)

    _adopted = False

    def __init__(self, places: Mapping[str, Place] | None = None, *, label: str = "") -> None:
        self.parts: dict[str, Part] = {}
        own_id = uuid.uuid4().hex
        super().__init__(library=plotly_library(), label=label, own_id=own_id, model_id=own_id)
        self.layout.width = "100%"
        self.on_msg(self._received)
        if places is not None:
            self._adopt(places)
            self.open()

    def open(self) -> None:
        """Open the page with all that it shows first, once its parts are known.

        Whatever is set later travels by messages, which a browser takes only after it has imported
        the front end.
        """
        if self._adopted:
            super().open()

    def _adopt(self, places: Mapping[str, Place]) -> None:
        """Put parts on the page: their traits become traits of the widget."""
        self.parts = {name: place.part for name, place in places.items()}
        synced = [
            (part, trait, trait_name(name, trait))
            for name, part in self.parts.items()
            for trait in part.traits(sync=True)
        ]
        self.add_traits(**{own: traitlets.Any().tag(sync=True) for *_, own in synced})
        for part, trait, own in synced:
            traitlets.link((part, trait), (self, own))
        for name, part in self.parts.items():
            part._page, part._name = self, name
        self.place_specs = [place.spec(name) for name, place in places.items()]
        self._adopted = True

    def _received(self, _widget: Any, message: dict[str, Any], _buffers: list[Any]) -> None:
        try:
            self._act_on(message)
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self.say_error(error)

    def _act_on(self, message: Mapping[str, Any]) -> None:
        """Act on a message of the page."""
        if message.get("part") in self.parts:
            self.parts[message["part"]].received(message)
        elif message.get("kind") == "plotly":
            # Where a page cannot reach another model, it asks for the library.
            self.send({"kind": "plotly", "source": get_plotlyjs()})

    def report_progress(self, doing: str, share: float) -> None:
        """Show which share of some work is done; -1 says that nothing is being done."""
        with self.hold_sync():
            self.doing, self.progress = doing, share

    def say_error(self, error: Exception) -> None:
        """Show an error where the reader looks."""
        with self.hold_sync():
            self.progress = -1.0
            self.error = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Take the widget off the page and free the memory of its parts."""
        for part in self.parts.values():
            part.close()
            part._page = None
        self.parts = {}
        if self.comm is not None:
            layout = self.layout
            super().close()
            layout.close()
