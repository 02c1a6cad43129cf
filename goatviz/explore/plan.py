"""A model's plans by layer, head, query and temperature: a map, and one row of it taken apart."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import torch
import traitlets
from torch import Tensor, nn

from goatviz.adapters.capture import Record, capture
from goatviz.analysis.inputs import forward_calls
from goatviz.analysis.levels import PlanLevels
from goatviz.explore.plan_map import PlanMap
from goatviz.plots.figure import CONFIG, Figure
from goatviz.plots.row import draw_row, key_ticks, row_summary, row_title
from goatviz.training.checkpoint import Checkpoint

#: Exponents of ten between which the temperature's slider moves.
TEMPERATURES = (-2.0, 2.0)
#: Longest row that is solved again through POT.
MAX_CHECKED_KEYS = 4096
#: Points of the row's curves.
POINTS = 512


def explore_plan(
    model: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    batch: int = 0,
) -> PlanExplorer:
    """Explore the plans of a model's own forward pass in JupyterLab.

    Parameters
    ----------
    model : nn.Module, Checkpoint or Record
        What `goatviz.capture` can watch; or a record captured with keep="projections".
    inputs : Tensor, mapping, str, or sequence of them
        What the model is called with, as in `goatviz.sink_profile`; the first call is shown. Not
        with a record.
    tokenizer : callable, optional
        For texts; its tokens are shown if it can name them.
    tokens : sequence of str, optional
        One text for each position.
    batch : int
        Which sequence of the first call.

    Returns
    -------
    PlanExplorer
        A widget; `draw(...)` makes the same pictures without a kernel.

    Raises
    ------
    TypeError
        If the model cannot be captured, or inputs are missing or of another kind.
    ValueError
        If a record holds no projections, or there is no such sequence.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (1, 64), generator=torch.Generator().manual_seed(0))
    >>> explorer = explore_plan(load_pretrained("copy-mixture-1-goat"), ids)
    >>> explorer.draw(head=1, query=40).layout.title.text
    'Query 40: plan and prior'
    """
    if isinstance(model, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        return PlanExplorer(model, tokens=tokens, batch=batch)
    model = model.model if isinstance(model, Checkpoint) else model
    call = next(iter(forward_calls(inputs, tokenizer)))
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(call) if isinstance(call, Tensor) else model(**call)
    if tokens is None and hasattr(tokenizer, "convert_ids_to_tokens"):
        ids = call if isinstance(call, Tensor) else call.get("input_ids")
        tokens = None if ids is None else tokenizer.convert_ids_to_tokens(ids[batch].tolist())
    return PlanExplorer(record, tokens=tokens, batch=batch)


def _shown(act: Callable) -> Callable:
    """An observer whose errors are seen in the widget: a kernel's log is read by nobody."""

    @functools.wraps(act)
    def wrapped(self: PlanExplorer, *arguments: Any) -> None:
        try:
            act(self, *arguments)
            self._problem.value = ""
        except Exception as error:  # noqa: BLE001
            said = html.escape(f"{type(error).__name__}: {error}")
            self._problem.value = f'<div role="alert" class="goatviz-error">{said}</div>'

    return wrapped


class PlanExplorer(ipywidgets.VBox):
    """Layer, head, query and temperature of a captured plan; see `explore_plan`.

    Attributes
    ----------
    layer, head, query : int
        What is shown; the map's click or Enter chooses the query.
    temperature : float
        tau of the row, 0.01 (the largest score) to 100 (the prior); the map stays at the model's.
    map : PlanMap
        The plan of this layer and head.
    """

    layer = traitlets.Int(0)
    head = traitlets.Int(0)
    query = traitlets.Int(0)
    temperature = traitlets.Float(1.0)

    def __init__(
        self, record: Record, *, tokens: Sequence[str] | None = None, batch: int = 0
    ) -> None:
        if not record.calls:
            raise ValueError(
                "record is empty: no attention call was seen. Run the model inside the with block"
            )
        self._record, self._batch = record, batch
        self._tokens = None if tokens is None else [str(token) for token in tokens]
        layers = sorted({call.layer for call in record.calls})
        levels = self._levels_of(layers[0], 0)
        self.map = PlanMap(levels, title=self._title(layers[0], 0), **self._map_tokens(levels))
        row = self._row(levels, levels.queries - 1, 1.0)
        self._figure = go.FigureWidget(draw_row(row))
        self._figure._config = CONFIG
        # What the subtitle says stands in words below; redrawn, plotly.js puts it above the title.
        self._figure.update_layout(autosize=True, title=_title_of(row), margin={"t": 70})
        self._layer = ipywidgets.Dropdown(
            options=[(f"{n} ({record.layers[n]})", n) for n in layers], description="Layer"
        )
        self._head = ipywidgets.Dropdown(
            options=range(record.of(layers[0])[-1].shape[1]), description="Head"
        )
        self._query = ipywidgets.BoundedIntText(
            min=0, max=levels.queries - 1, value=levels.queries - 1, description="Query"
        )
        self._temperature = ipywidgets.FloatLogSlider(
            value=1.0,
            base=10,
            min=TEMPERATURES[0],
            max=TEMPERATURES[1],
            step=0.05,
            description="Temperature",
            readout_format=".3g",
            style={"description_width": "initial"},
            layout={"width": "340px"},
        )
        self._reset = ipywidgets.Button(description="1, as the model", tooltip="Temperature 1")
        self._summary = ipywidgets.HTML()
        self._problem = ipywidgets.HTML()
        controls = ipywidgets.HBox(
            [self._layer, self._head, self._query, self._temperature, self._reset],
            layout={"flex_flow": "row wrap"},
        )
        row_box = ipywidgets.VBox(
            [self._figure, self._summary], layout={"flex": "1 1 420px", "min_width": "320px"}
        )
        map_box = ipywidgets.VBox([self.map], layout={"flex": "1 1 420px", "min_width": "320px"})
        pictures = ipywidgets.HBox([map_box, row_box], layout={"flex_flow": "row wrap"})
        super().__init__([controls, self._problem, pictures])
        self.layer, self.query = layers[0], levels.queries - 1
        for trait, control in (
            ("layer", self._layer),
            ("head", self._head),
            ("query", self._query),
            ("temperature", self._temperature),
        ):
            traitlets.link((self, trait), (control, "value"))
        self._reset.on_click(lambda _button: setattr(self, "temperature", 1.0))
        self.observe(self._plan_changed, ["layer", "head"])
        self.observe(self._row_changed, ["query", "temperature"])
        self.map.observe(self._selected, "selection")
        self._say(row)

    def draw(
        self,
        *,
        layer: int | None = None,
        head: int | None = None,
        query: int | None = None,
        temperature: float | None = None,
    ) -> Figure:
        """The row's picture for these values, the widget's own by default; changes nothing.

        Raises
        ------
        ValueError
            If there is no such layer, head or query, or a temperature that is not positive.
        """
        levels = self._levels_of(
            self.layer if layer is None else layer, self.head if head is None else head
        )
        row = self._row(
            levels,
            self.query if query is None else query,
            self.temperature if temperature is None else temperature,
        )
        return draw_row(row)

    def _levels_of(self, layer: int, head: int) -> PlanLevels:
        return PlanLevels(self._record.of(layer)[-1], head=head, batch=self._batch)

    def _title(self, layer: int, head: int) -> str:
        return f"Layer {layer}, head {head}"

    def _map_tokens(self, levels: PlanLevels) -> dict[str, Sequence[str] | None]:
        """Tokens where they fit; keys of a cached or cross-attention call have others."""
        return {
            f"{side}_tokens": self._tokens
            if self._tokens is not None and len(self._tokens) == count
            else None
            for side, count in (("query", levels.queries), ("key", levels.keys))
        }

    def _row(self, levels: PlanLevels, query: int, temperature: float) -> Any:
        return levels.row(
            query,
            temperature=temperature,
            points=POINTS,
            tokens=self._map_tokens(levels)["key_tokens"],
            check=levels.keys <= MAX_CHECKED_KEYS,
        )

    @_shown
    def _plan_changed(self, change: dict[str, Any]) -> None:
        call = self._record.of(self.layer)[-1]
        if len(self._head.options) != call.shape[1]:
            head = min(self.head, call.shape[1] - 1)
            self._head.options = range(call.shape[1])
            if head != self.head:
                self.head = head
                return
        levels = self._levels_of(self.layer, self.head)
        self.map.show_plan(
            levels, title=self._title(self.layer, self.head), **self._map_tokens(levels)
        )
        self._query.max = levels.queries - 1
        self._show_row()

    @_shown
    def _row_changed(self, change: dict[str, Any]) -> None:
        self._show_row()

    @_shown
    def _selected(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self.query = change["new"][0]

    def _show_row(self) -> None:
        row = self._row(self.map.levels, self.query, self.temperature)
        drawn = draw_row(row)
        with self._figure.batch_update():
            for trace, new in zip(self._figure.data, drawn.data, strict=True):
                trace.x, trace.y, trace.text = new.x, new.y, new.text
                trace.mode = new.mode
            self._figure.layout.title = _title_of(row)
            self._figure.update_xaxes(**key_ticks(row))
        self._say(row)

    def _say(self, row: Any) -> None:
        said = html.escape(row_summary(row), quote=False)
        self._summary.value = f'<div aria-live="polite" class="goatviz-summary">{said}</div>'


def _title_of(row: Any) -> dict[str, Any]:
    return row_title(row) | {"subtitle": {"text": ""}}
