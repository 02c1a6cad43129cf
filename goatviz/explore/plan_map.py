"""A map of one head's plan as a widget: a canvas of 8-bit cells, at any zoom.

The page asks for the window that it shows and gets one byte for each cell; exact numbers are asked
for a pair at a time. What is drawn, and how the window moves, lives in plan_map.js.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anywidget
import numpy as np
import traitlets

from goatviz import checks
from goatviz.analysis.levels import POOLS, PlanLevels, PlanView
from goatviz.explore.scripts import widget_file, widget_script
from goatviz.explore.task import Newest, Task, running_loop
from goatviz.plots.style import colour_table

SCALES = ("linear", "log")
#: Decades below the largest weight that the logarithmic scale shows.
DECADES = 5
#: Cells a side of the first view, before a page has said how much room it has.
FIRST_VIEW = 256
#: The most cells a side that are sent, whatever a page asks for.
MOST_CELLS = 2048
#: Views of more pairs than this are computed beside the kernel's own work.
INLINE_PAIRS = 4_000_000
#: An axis of more tokens than this is sent without their text.
MOST_TOKENS = 256


class PlanMap(anywidget.AnyWidget):
    """A map of attention weights: zoom, pan, select a pair by click or key, brush queries.

    Parameters
    ----------
    levels : PlanLevels
        The plan to show.
    title : str
        Title above the map, which screen readers say too.
    query_tokens, key_tokens : sequence of str, optional
        One for each query and key; shown as text where there is room.
    scale : {"linear", "log"}
        Scale of the colours: from 0, or over five decades below the largest weight seen.
    pool : {"max", "mean"}
        What a cell of several keys shows: their largest weight, or their mean.

    Attributes
    ----------
    selection : list of int
        [query, key], or [] while nothing is selected.
    brush : list of int
        Half-open range of queries, or [].
    view, pixels
        The last view and its cells, one byte each: 0 where every pair is forbidden.
    error : str
        The last error, shown in the widget; "" after the next success.
    progress : float
        Share of the view that is being computed; -1 while none is.

    Raises
    ------
    TypeError
        If `levels` is not a PlanLevels.
    ValueError
        If tokens do not fit the plan, or there is no such scale or pool.
    """

    _esm = widget_script("plan_map")
    _css = widget_file("plan_map.css")

    _room = (FIRST_VIEW, FIRST_VIEW)

    title = traitlets.Unicode().tag(sync=True)
    summary = traitlets.Unicode().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    progress = traitlets.Float(-1.0).tag(sync=True)
    size = traitlets.List(traitlets.Int()).tag(sync=True)
    has_tokens = traitlets.Bool(False).tag(sync=True)
    plan = traitlets.Int(0).tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    pixels = traitlets.Bytes(b"").tag(sync=True)
    palette = traitlets.List().tag(sync=True)
    scale = traitlets.Enum(SCALES, default_value="linear").tag(sync=True)
    pool = traitlets.Enum(POOLS, default_value="max").tag(sync=True)
    selection = traitlets.List(traitlets.Int(), maxlen=2).tag(sync=True)
    brush = traitlets.List(traitlets.Int(), maxlen=2).tag(sync=True)

    def __init__(
        self,
        levels: PlanLevels,
        *,
        title: str = "Attention map",
        query_tokens: Sequence[str] | None = None,
        key_tokens: Sequence[str] | None = None,
        scale: str = "linear",
        pool: str = "max",
    ) -> None:
        self._work = Newest(partial(setattr, self, "progress"))
        checks.one_of("scale", scale, SCALES)
        checks.one_of("pool", pool, POOLS)
        super().__init__(palette=[list(rgb) for rgb in colour_table()], scale=scale, pool=pool)
        self.on_msg(self._received)
        self.show_plan(levels, title=title, query_tokens=query_tokens, key_tokens=key_tokens)

    def show_plan(
        self,
        levels: PlanLevels,
        *,
        title: str | None = None,
        query_tokens: Sequence[str] | None = None,
        key_tokens: Sequence[str] | None = None,
    ) -> None:
        """Show the whole of another plan; one of another size clears selection and brush."""
        checks.instance("levels", levels, PlanLevels, "PlanLevels")
        for name, tokens, count in (
            ("query_tokens", query_tokens, levels.queries),
            ("key_tokens", key_tokens, levels.keys),
        ):
            if tokens is not None and len(tokens) != count:
                raise ValueError(f"{name} must hold {count} texts, got {len(tokens)}")
        self._levels = levels
        self._tokens = (query_tokens, key_tokens)
        self._highest = 0.0
        size = [levels.queries, levels.keys]
        self._work.stop()
        with self.hold_sync():
            if size != self.size:
                self.selection, self.brush = [], []
            self.size = size
            self.title = self.title if title is None else title
            self.has_tokens = query_tokens is not None or key_tokens is not None
            self.plan += 1
            # A quick view goes out in the same message, as large as the page asked for last.
            self._view(-self.plan, (0, size[0]), (0, size[1]), *self._room)

    @property
    def levels(self) -> PlanLevels:
        """The plan that is shown."""
        return self._levels

    def state_of(self, levels: PlanLevels, *, title: str) -> dict[str, Any]:
        """The map's state for another plan of the same tokens, for a page without a kernel."""
        window = ((0, levels.queries), (0, levels.keys))
        shown = levels.view(*window, rows=FIRST_VIEW, columns=FIRST_VIEW, pool=self.pool)
        scale = colour_range(self.scale, float(np.nanmax(shown.weights, initial=0.0)))
        return {
            "title": title,
            "summary": _summary(shown),
            "error": "",
            "progress": -1.0,
            "size": [levels.queries, levels.keys],
            "has_tokens": self.has_tokens,
            "plan": 0,
            "view": self._described(0, shown, scale),
            "pixels": to_codes(shown.weights, scale),
            "scale": self.scale,
            "pool": self.pool,
            "selection": [],
            "brush": [],
        }

    def close(self) -> None:
        """Close the widget, stop what is being computed, and let go of the plan."""
        self._work.stop()
        super().close()
        self.__dict__.pop("_levels", None)

    def _described(self, number: int, shown: PlanView, scale: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": number,
            "queries": list(shown.query_range),
            "keys": list(shown.key_range),
            "rows": shown.weights.shape[0],
            "columns": shown.weights.shape[1],
            "rule": shown.rule,
            "exact": shown.exact,
            "range": scale,
            "query_tokens": _texts(self._tokens[0], shown.query_range),
            "key_tokens": _texts(self._tokens[1], shown.key_range),
        }

    def _show(self, number: int, shown: PlanView) -> None:
        """Put a view on the page, picture and description together."""
        # Colours keep their meaning while the window moves, until something larger is seen.
        self._highest = max(self._highest, float(np.nanmax(shown.weights, initial=0.0)))
        scale = colour_range(self.scale, self._highest)
        with self.hold_sync():
            self.pixels = to_codes(shown.weights, scale)
            self.view = self._described(number, shown, scale)
            self.summary = _summary(shown)
            self.error = ""

    def _view(
        self,
        number: int,
        queries: tuple[int, int],
        keys: tuple[int, int],
        rows: int,
        columns: int,
        answer: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute a view and show it; `answer` is called at the end, even after an error.

        A view of many pairs is computed beside the kernel's own work, if there is a kernel.
        """
        rows, columns = (max(1, min(int(count), MOST_CELLS)) for count in (rows, columns))
        levels, pool = self._levels, self.pool

        def compute(task: Task) -> PlanView:
            return levels.view(queries, keys, rows=rows, columns=columns, pool=pool, progress=task)

        loop = running_loop()
        self._work.stop()
        pairs = levels.pairs(min(rows, queries[1] - queries[0]), keys[1] - keys[0])
        if loop is None or pairs <= INLINE_PAIRS:
            try:
                self._show(number, compute(Task()))
            except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
                self.error = f"{type(error).__name__}: {error}"
            answer()
            return

        def end(shown: PlanView | None, error: Exception | None) -> None:
            if shown is not None:
                self._show(number, shown)
            elif error is not None:
                self.error = f"{type(error).__name__}: {error}"
            answer()

        self._work.start(loop, compute, end)

    def _received(self, _widget: Any, message: dict[str, Any], _buffers: list[Any]) -> None:
        """Answer a question of the page, whatever happens: the page waits for it."""
        kind = message.get("kind")
        if kind == "stop":
            self._work.stop()
            return
        try:
            if kind == "view":
                self._room = (message["rows"], message["columns"])
                self._view(
                    int(message["id"]),
                    tuple(message["queries"]),
                    tuple(message["keys"]),
                    message["rows"],
                    message["columns"],
                    lambda: self.send({"kind": "viewed"}),
                )
                return
            if kind == "cell":
                query, key = int(message["query"]), int(message["key"])
                cell = self._levels.cell(query, key)
                values = {
                    # JSON knows no infinity; a forbidden pair has nothing else to say.
                    name: value if np.isfinite(value) else None
                    for name, value in cell._asdict().items()
                }
                self.send({"kind": "celled", "cell": {"query": query, "key": key, **values}})
                return
        except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
            self.error = f"{type(error).__name__}: {error}"
        self.send({"kind": "viewed" if kind == "view" else "celled"})


def colour_range(kind: str, highest: float) -> dict[str, Any]:
    """The weights of the first and last colour, as the page needs them."""
    high = highest if highest > 0 else 1.0
    return {"kind": kind, "low": 0.0 if kind == "linear" else high * 10.0**-DECADES, "high": high}


def to_codes(weights: np.ndarray, scale: dict[str, Any]) -> bytes:
    """One byte for each cell: 0 for NaN, 1 to 255 from the range's low to its high end."""
    low, high = scale["low"], scale["high"]
    known = ~np.isnan(weights)
    values = np.clip(np.where(known, weights, low), low, high)
    if scale["kind"] == "log":
        share = np.log(values / low) / np.log(high / low)
    else:
        share = (values - low) / (high - low)
    codes = 1 + np.rint(254 * share).astype(np.uint8)
    return np.where(known, codes, 0).astype(np.uint8).tobytes()


def _texts(tokens: Sequence[str] | None, window: tuple[int, int]) -> dict[str, Any] | None:
    if tokens is None or window[1] - window[0] > MOST_TOKENS:
        return None
    return {"start": window[0], "texts": [str(token) for token in tokens[slice(*window)]]}


def _summary(view: PlanView) -> str:
    """The view in a sentence."""
    if not np.isfinite(view.weights).any():
        return "Every pair in view is forbidden."
    row, column = np.unravel_index(int(np.nanargmax(view.weights)), view.weights.shape)
    first, last = int(view.key_edges[column]), int(view.key_edges[column + 1]) - 1
    keys = f"key {first:,}" if first == last else f"keys {first:,} to {last:,}"
    return (
        f"Largest in view: {view.weights[row, column]:.3g}, query {int(view.queries[row]):,}, "
        f"{keys}."
    )
