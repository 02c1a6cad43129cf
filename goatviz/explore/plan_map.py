"""A map of one head's plan: a canvas of 8-bit cells, at any zoom.

The page asks for the window that it shows and gets one byte for each cell; exact numbers are asked
for a pair at a time. What is drawn, and how the window moves, lives in front/map.js.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import traitlets

from goatviz import checks
from goatviz.analysis.compare import PlanDifference
from goatviz.analysis.levels import POOLS, PlanLevels, PlanView, colour_decades, colour_scale
from goatviz.explore.jobs import Job, Newest, running_loop
from goatviz.explore.page import Part
from goatviz.plots.base import Panel
from goatviz.plots.marks import tick_format, token_ticks
from goatviz.plots.plan import shares_panel
from goatviz.plots.style import colour_table, diverging_table

SCALES = ("auto", "linear", "log")
#: Decades below the largest weight that a logarithmic scale shows, if no view asks for more.
DECADES = 5
#: Cells a side of the first view, before a page has said how much room it has.
FIRST_VIEW = 256
#: The most cells a side that are sent, whatever a page asks for.
MOST_CELLS = 2048
#: Cells a side of an image.
IMAGE_CELLS = 400
#: Scales of colours in words, as in front/map.js.
COLOURS = {
    "linear": "linear colours",
    "log": "logarithmic colours",
    "signed": "colours by the root of the difference",
}
#: Views of more pairs than this are computed beside the kernel's own work.
INLINE_PAIRS = 4_000_000
#: An axis of more tokens than this is sent without their text.
MOST_TOKENS = 256


@dataclass(frozen=True)
class ShownPlan:
    """What a map shows.

    Parameters
    ----------
    levels : PlanLevels or PlanDifference
        The plan, or how two plans differ.
    title : str
        Title above the map, which screen readers say too.
    query_tokens, key_tokens : sequence of str, optional
        One for each query and key; shown as text where there is room.
    sink : int
        The key that is left out on demand: the first that is no padding.
    selection : tuple of int, optional
        The chosen query and key, or (). Default: as it is, or none in a plan of another size.

    Raises
    ------
    TypeError
        If `levels` is neither a PlanLevels nor a PlanDifference.
    ValueError
        If tokens do not fit the plan.
    """

    levels: PlanLevels | PlanDifference
    title: str = "Attention map"
    query_tokens: Sequence[str] | None = None
    key_tokens: Sequence[str] | None = None
    sink: int = 0
    selection: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checks.instance("levels", self.levels, (PlanLevels, PlanDifference), "PlanLevels")
        for name, tokens, count in (
            ("query_tokens", self.query_tokens, self.levels.queries),
            ("key_tokens", self.key_tokens, self.levels.keys),
        ):
            if tokens is not None and len(tokens) != count:
                raise ValueError(f"{name} must hold {count} texts, got {len(tokens)}")


class PlanMap(Part):
    """A map of attention weights: zoom, pan, select a pair by click or key, brush queries.

    Parameters
    ----------
    plan : ShownPlan
        The plan to show first.
    scale : {"auto", "linear", "log"}
        Scale of the colours: from 0, or over five decades below the largest weight seen; "auto"
        takes the one that `goatviz.analysis.colour_scale` names for the whole plan.
    pool : {"max", "mean"}
        What a cell of several keys shows: their largest weight, or their mean.

    Attributes
    ----------
    signed : bool
        Whether the map is of a difference: diverging colours, by its root on both sides of 0.
    linked : bool
        Whether its window moves with those of the other linked maps of the page.
    without : bool
        Whether the sink is left out and every row is normalised over the other keys.
    selection : list of int
        [query, key], or [] while nothing is selected.
    brush : list of int
        Half-open range of queries, or [].
    view, pixels
        The last view and its cells, one byte each: 0 where every pair is forbidden.
    error : str
        The last error, shown in the map; "" after the next success.
    progress : float
        Share of the view that is being computed; -1 while none is.

    Raises
    ------
    ValueError
        If there is no such scale or pool.
    """

    kind = "map"

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
    scale = traitlets.Enum(SCALES, default_value="auto").tag(sync=True)
    signed = traitlets.Bool(False).tag(sync=True)
    linked = traitlets.Bool(False).tag(sync=True)
    without = traitlets.Bool(False).tag(sync=True)
    pool = traitlets.Enum(POOLS, default_value="max").tag(sync=True)
    selection = traitlets.List(traitlets.Int(), maxlen=2).tag(sync=True)
    brush = traitlets.List(traitlets.Int(), maxlen=2).tag(sync=True)

    def __init__(self, plan: ShownPlan, *, scale: str = "auto", pool: str = "max") -> None:
        self._work = Newest(partial(setattr, self, "progress"))
        checks.one_of("scale", scale, SCALES)
        checks.one_of("pool", pool, POOLS)
        signed = isinstance(plan.levels, PlanDifference)
        palette = diverging_table() if signed else colour_table()
        palette = [list(rgb) for rgb in palette]
        super().__init__(palette=palette, signed=signed, scale=scale, pool=pool)
        self._shown: ShownPlan | None = None
        self._forget_colours()
        self.observe(self._forget_colours, ["scale", "pool", "without"])
        self.show(plan)

    def _forget_colours(self, _change: Any = None) -> None:
        """Begin a new scale of colours with the next view."""
        self._highest, self._colours = 0.0, None

    @property
    def levels(self) -> PlanLevels | PlanDifference:
        """The plan, or the difference, that is shown."""
        return self._shown.levels

    def show(self, content: ShownPlan) -> None:
        """Show the whole of another plan; one of another size clears the brush."""
        before, self._shown = self._shown, content
        levels = content.levels
        if before is not None and before.levels is levels and before.title == content.title:
            if content.selection is not None:
                self.selection = list(content.selection)
            return
        self._forget_colours()
        self._work.stop()
        size = [levels.queries, levels.keys]
        with self.together():
            if size != self.size:
                self.selection, self.brush = [], []
            if content.selection is not None:
                self.selection = list(content.selection)
            self.size = size
            self.title, self.has_tokens = content.title, _has_tokens(content)
            self.plan += 1
            # A quick view goes out in the same message, as large as the page asked for last.
            self._view(-self.plan, (0, size[0]), (0, size[1]), *self._room)

    def state_of(self, content: ShownPlan) -> dict[str, Any]:
        """The map's state for another plan, for a page without a kernel."""
        levels = content.levels
        window = ((0, levels.queries), (0, levels.keys))
        out = (content.sink,) if self.without else ()
        shown = levels.view(
            *window, rows=FIRST_VIEW, columns=FIRST_VIEW, pool=self.pool, without=out
        )
        scale = colour_range(*self._colours_of(shown), highest=_highest(shown))
        return {
            "title": content.title,
            "summary": _summary(shown, self.signed),
            "error": "",
            "progress": -1.0,
            "size": [levels.queries, levels.keys],
            "has_tokens": _has_tokens(content),
            "plan": 0,
            "view": _described(0, shown, scale, content),
            "pixels": to_codes(shown.weights, scale),
            "selection": list(content.selection or ()),
            "brush": [],
        }

    def panel(self) -> Panel:
        """The window that is shown, with its colours, as a panel of a figure."""
        plan, levels = self._shown, self.levels
        out = (plan.sink,) if self.without else ()
        window = (tuple(self.view[name]) for name in ("queries", "keys"))
        room = {"rows": IMAGE_CELLS, "columns": IMAGE_CELLS}
        shown = levels.view(*window, **room, pool=self.pool, without=out)
        colours = self._colours or self._colours_of(shown)
        scale = colour_range(*colours, highest=max(self._highest, _highest(shown)))
        places = {"query": shown.queries, "key": shown.key_edges[:-1]}
        axes = []
        for dim, tokens in (("key", plan.key_tokens), ("query", plan.query_tokens)):
            axis = {"title": f"{dim} [tokens]", "tickformat": tick_format(places[dim])}
            if tokens is not None and shown.exact:
                axis |= token_ticks(places[dim], [tokens[at] for at in places[dim]], dim)
            axes.append(axis)
        chosen = None
        if self.selection and shown.exact:
            query, key = self.selection
            chosen = np.outer(places["query"] == query, places["key"] == key)
        return shares_panel(
            plan.title,
            to_shares(shown.weights, scale),
            weight_texts(scale),
            x=places["key"],
            y=places["query"],
            axes=tuple(axes),
            signed=self.signed,
            note=f"{shown.rule}; {COLOURS[scale['kind']]}" + "; without the sink" * self.without,
            chosen=chosen,
        )

    def close(self) -> None:
        self._work.stop()
        self._shown = None

    def _show_view(self, number: int, shown: PlanView) -> None:
        """Put a view on the page, picture and description together."""
        # Colours keep their meaning while the window moves, until something larger is seen.
        self._highest = max(self._highest, _highest(shown))
        self._colours = self._colours or self._colours_of(shown)
        scale = colour_range(*self._colours, highest=self._highest)
        with self.together():
            self.pixels = to_codes(shown.weights, scale)
            self.view = _described(number, shown, scale, self._shown)
            self.summary = _summary(shown, self.signed)
            self.error = ""

    def _colours_of(self, shown: PlanView) -> tuple[str, int]:
        """The scale of colours of a view, and its decades if it is logarithmic."""
        if self.signed:
            return "signed", 0
        if self.scale != "auto":
            return self.scale, DECADES
        return colour_scale(shown.weights), colour_decades(shown.weights)

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
        levels, pool = self.levels, self.pool
        out = (self._shown.sink,) if self.without else ()

        def compute(job: Job) -> PlanView:
            room = {"rows": rows, "columns": columns}
            return levels.view(queries, keys, **room, pool=pool, without=out, progress=job)

        loop = running_loop()
        self._work.stop()
        pairs = levels.pairs(min(rows, queries[1] - queries[0]), keys[1] - keys[0])
        if loop is None or pairs <= INLINE_PAIRS:
            try:
                self._show_view(number, compute(Job()))
            except Exception as error:  # noqa: BLE001 - shown, since nobody sees a kernel's log
                self.error = f"{type(error).__name__}: {error}"
            answer()
            return

        def end(shown: PlanView | None, error: Exception | None) -> None:
            if shown is not None:
                self._show_view(number, shown)
            elif error is not None:
                self.error = f"{type(error).__name__}: {error}"
            answer()

        self._work.start(loop, compute, end)

    def received(self, message: Mapping[str, Any]) -> None:
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
                cell = self.levels.cell(query, key)
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


def colour_range(kind: str, decades: int = DECADES, *, highest: float) -> dict[str, Any]:
    """The weights of the first and last colour, as the page needs them."""
    high = highest if highest > 0 else 1.0
    low = {"linear": 0.0, "log": high * 10.0**-decades, "signed": -high}[kind]
    return {"kind": kind, "low": low, "high": high}


def _highest(view: PlanView) -> float:
    """The largest magnitude in view."""
    return float(np.nanmax(np.abs(view.weights), initial=0.0))


def to_shares(weights: np.ndarray, scale: dict[str, Any]) -> np.ndarray:
    """Where each weight lies between the first colour, 0, and the last, 1; NaN stays NaN."""
    low, high = scale["low"], scale["high"]
    values = np.clip(weights, low, high)
    if scale["kind"] == "log":
        return np.log(values / low) / np.log(high / low)
    if scale["kind"] == "signed":
        # Most differences are small, and the largest are few.
        return (1 + np.sign(values) * np.sqrt(np.abs(values) / high)) / 2
    return (values - low) / (high - low)


def to_codes(weights: np.ndarray, scale: dict[str, Any]) -> bytes:
    """One byte for each cell: 0 for NaN, 1 to 255 from the range's low to its high end."""
    known = ~np.isnan(weights)
    shares = to_shares(np.where(known, weights, scale["low"]), scale)
    codes = 1 + np.rint(254 * shares).astype(np.uint8)
    return np.where(known, codes, 0).astype(np.uint8).tobytes()


def weight_texts(scale: dict[str, Any]) -> list[str]:
    """The weights of evenly spaced shares of a scale, first and last colour among them."""
    low, high = scale["low"], scale["high"]
    shares = np.linspace(0.0, 1.0, 5)
    if scale["kind"] == "log":
        weights = low * (high / low) ** shares
    elif scale["kind"] == "signed":
        weights = (2 * shares - 1) * np.abs(2 * shares - 1) * high
    else:
        weights = low + shares * (high - low)
    return [
        f"{weight:.3g}" if weight >= 0 else f"\N{MINUS SIGN}{-weight:.3g}" for weight in weights
    ]


def _described(
    number: int, shown: PlanView, scale: dict[str, Any], plan: ShownPlan
) -> dict[str, Any]:
    """A view in words and numbers, as the page needs it."""
    return {
        "id": number,
        "queries": list(shown.query_range),
        "keys": list(shown.key_range),
        "rows": shown.weights.shape[0],
        "columns": shown.weights.shape[1],
        "rule": shown.rule,
        "exact": shown.exact,
        "range": scale,
        "query_tokens": _texts(plan.query_tokens, shown.query_range),
        "key_tokens": _texts(plan.key_tokens, shown.key_range),
    }


def _has_tokens(plan: ShownPlan) -> bool:
    return plan.query_tokens is not None or plan.key_tokens is not None


def _texts(tokens: Sequence[str] | None, window: tuple[int, int]) -> dict[str, Any] | None:
    if tokens is None or window[1] - window[0] > MOST_TOKENS:
        return None
    return {"start": window[0], "texts": [str(token) for token in tokens[slice(*window)]]}


def _summary(view: PlanView, signed: bool) -> str:
    """The view in a sentence."""
    if not np.isfinite(view.weights).any():
        return "Every pair in view is forbidden."
    at = int(np.nanargmax(np.abs(view.weights)))
    row, column = np.unravel_index(at, view.weights.shape)
    first, last = int(view.key_edges[column]), int(view.key_edges[column + 1]) - 1
    keys = f"key {first:,}" if first == last else f"keys {first:,} to {last:,}"
    value = view.weights[row, column]
    what = f"difference in view: {value:+.3g}" if signed else f"in view: {value:.3g}"
    return f"Largest {what}, query {int(view.queries[row]):,}, {keys}."
