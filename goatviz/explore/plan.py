"""A model's plans by layer, head, query and temperature: a map, and one row of it taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import traitlets
import xarray as xr
from torch import Tensor, nn

from goatviz.adapters.capture import Record, capture
from goatviz.analysis.inputs import forward_calls
from goatviz.analysis.levels import MAX_BALANCED, PlanLevels, row_summary
from goatviz.explore.base import Explorer, Picture, ranged
from goatviz.explore.controls import Control
from goatviz.explore.plan_map import INLINE_PAIRS, PlanMap
from goatviz.explore.selection import Selection
from goatviz.explore.task import Task
from goatviz.plots.plan import row_panels
from goatviz.training.checkpoint import Checkpoint

#: Temperatures between which the slider moves.
TEMPERATURES = (0.01, 100.0)
#: Longest row that is solved again through POT.
MAX_CHECKED_KEYS = 4096
#: Points of the row's curves.
POINTS = 512
#: Plans that are kept, with the normalisers of the queries seen so far.
_KEPT = 4


def explore_plan(
    model: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    batch: int = 0,
    selection: Selection | None = None,
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
    selection : Selection, optional
        Shared with other explorers.

    Returns
    -------
    PlanExplorer
        A widget; `draw(...)` makes the row's picture without a kernel, `save_html(path)` a page.

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
    'Plan and prior'
    """
    if isinstance(model, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        return PlanExplorer(model, tokens=tokens, batch=batch, selection=selection)
    model = model.model if isinstance(model, Checkpoint) else model
    call = next(iter(forward_calls(inputs, tokenizer)))
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(call) if isinstance(call, Tensor) else model(**call)
    if tokens is None and hasattr(tokenizer, "convert_ids_to_tokens"):
        ids = call if isinstance(call, Tensor) else call.get("input_ids")
        tokens = None if ids is None else tokenizer.convert_ids_to_tokens(ids[batch].tolist())
    return PlanExplorer(record, tokens=tokens, batch=batch, selection=selection)


class PlanExplorer(Explorer):
    """Layer, head, query and temperature of a captured plan; see `explore_plan`.

    Attributes
    ----------
    layer, head, query : int
        What is shown; the map's click or Enter chooses query and key.
    key : int
        Chosen in the map, and told to the selection.
    temperature : float
        tau of the row, 0.01 (the largest score) to 100 (the prior); the map stays at the model's.
    balanced : bool
        Whether the doubly stochastic plan's row stands beside it (up to 512 tokens).
    queries : tuple of int
        Half-open range of queries brushed in the map, whose mean plan stands beside it; or ().
    map : PlanMap
        The plan of this layer and head.
    """

    layer = traitlets.Int(0)
    head = traitlets.Int(0)
    query = traitlets.Int(0)
    key = traitlets.Int(0)
    temperature = traitlets.Float(1.0)
    balanced = traitlets.Bool(False)
    queries = traitlets.Tuple(())

    shown = ("layer", "head", "query", "temperature", "balanced", "queries")
    panels = {"row": 380}

    def __init__(
        self,
        record: Record,
        *,
        tokens: Sequence[str] | None = None,
        batch: int = 0,
        selection: Selection | None = None,
    ) -> None:
        if not record.calls:
            raise ValueError(
                "record is empty: no attention call was seen. Run the model inside the with block"
            )
        super().__init__()
        self._record, self._batch = record, batch
        self._tokens = None if tokens is None else [str(token) for token in tokens]
        self._kept: dict[tuple[int, int], PlanLevels] = {}
        layers = sorted({call.layer for call in record.calls})
        self.layer = layers[0]
        levels = self._levels(self.layer, 0)
        self.query = levels.queries - 1
        self.map = PlanMap(levels, title=self._title(), **self._map_tokens(levels))
        controls = [
            Control("layer", "Layer", options=[(n, f"{n} ({record.layers[n]})") for n in layers]),
            Control("head", "Head", options=self._head_options()),
            Control("query", "Query", "number", high=levels.queries - 1, whole=True),
            Control(
                "temperature",
                "Temperature",
                "slider",
                low=TEMPERATURES[0],
                high=TEMPERATURES[1],
                step=0.05,
                log=True,
                hint="of the row: towards 0 the largest score takes all, towards infinity the "
                "prior is left; 1 is the model's",
            ),
            Control("reset", "Temperature 1", "button", hint="as in the model"),
            Control(
                "balanced",
                "Doubly stochastic",
                "toggle",
                hint="the plan with a uniform target, solved whole through POT",
                disabled=max(levels.queries, levels.keys) > MAX_BALANCED,
            ),
        ]
        self._shown_plan = (self.layer, self.head)
        self._set_up(controls, label="Plan and prior", selection=selection, above=[self.map])
        self._controls.on_press("reset", lambda: self.set(temperature=1.0))
        self.map.observe(self._chosen, "selection")
        self.map.observe(self._brushed, "brush")
        self.observe(self._mark, ["query", "key"])

    # --- what is shown ---

    def _check(self, values: Mapping[str, Any]) -> None:
        layers = {call.layer for call in self._record.calls}
        if values["layer"] not in layers:
            known = ", ".join(str(layer) for layer in sorted(layers))
            raise ValueError(f"layer must be one of {known}, got {values['layer']!r}")
        call = self._record.of(values["layer"])[-1]
        ranged("head", values["head"], call.shape[1])
        ranged("query", values["query"], call.shape[2])
        if (
            values["queries"]
            and not 0 <= values["queries"][0] < values["queries"][-1] <= call.shape[2]
        ):
            raise ValueError(
                f"queries must be a non-empty range within 0 .. {call.shape[2]}, or (), "
                f"got {values['queries']!r}"
            )

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        if values["balanced"]:
            return True
        keys = self._levels(values["layer"], values["head"]).keys
        return bool(values["queries"]) and keys * np.ptp(values["queries"]) > INLINE_PAIRS

    def _picture(self, values: Mapping[str, Any], task: Task) -> Picture:
        row = self._row(values, task)
        view = f"{row.sizes['key']}"
        return Picture({"row": row_panels(row)}, self._sentence(row), {"row": view})

    def _row(self, values: Mapping[str, Any], task: Task) -> xr.Dataset:
        levels = self._levels(values["layer"], values["head"])
        return levels.row(
            values["query"],
            temperature=values["temperature"],
            points=POINTS,
            tokens=self._map_tokens(levels)["key_tokens"],
            check=levels.keys <= MAX_CHECKED_KEYS,
            balanced=values["balanced"],
            mean_of=values["queries"] or None,
            progress=task,
        )

    def _sentence(self, row: xr.Dataset) -> str:
        sentence = row_summary(row)
        if "balanced" in row.variables and self._is_identity(row):
            sentence += (
                " The doubly stochastic plan is the identity: under the causal mask no other "
                "plan gives every key the same mass."
            )
        return sentence

    @staticmethod
    def _is_identity(row: xr.Dataset) -> bool:
        return float(row["balanced"].max()) > 1 - 1e-6

    def _lead(self, values: Mapping[str, Any]) -> None:
        at = (values["layer"], values["head"])
        if self._shown_plan == at:
            return
        self._shown_plan = at
        levels = self._levels(*at)
        self.map.show_plan(levels, title=self._title(), **self._map_tokens(levels))
        self._controls.change("query", high=levels.queries - 1)
        self._controls.change("balanced", disabled=max(levels.queries, levels.keys) > MAX_BALANCED)

    def _trait_changed(self, change: dict[str, Any]) -> None:
        if change["name"] == "layer":
            options = self._head_options()
            if options:
                self._controls.change("head", options=options)
                # Another layer may have fewer heads; as a change of its own it would be an error.
                self._quiet += 1
                try:
                    self.head = min(self.head, len(options) - 1)
                finally:
                    self._quiet -= 1
        super()._trait_changed(change)

    # --- the map ---

    def _chosen(self, change: dict[str, Any]) -> None:
        if change["new"]:
            query, key = change["new"]
            self.key = key
            self.query = query

    def _brushed(self, change: dict[str, Any]) -> None:
        self.queries = tuple(change["new"])

    def _mark(self, change: dict[str, Any]) -> None:
        """Show in the map what was chosen elsewhere."""
        queries, keys = self.map.size
        if self.map.selection != [self.query, self.key] and (
            0 <= self.query < queries and 0 <= self.key < keys
        ):
            self.map.selection = [self.query, self.key]

    def _accepts(self, name: str, value: int) -> bool:
        if name == "key":
            return 0 <= value < self._levels(self.layer, self.head).keys
        return super()._accepts(name, value)

    def _levels(self, layer: int, head: int) -> PlanLevels:
        """Plans seen lately are kept, with what they know already."""
        at = (layer, head)
        if at not in self._kept:
            levels = PlanLevels(self._record.of(layer)[-1], head=head, batch=self._batch)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[at] = levels
        return self._kept[at]

    def _head_options(self) -> list[tuple[int, str]]:
        try:
            count = self._record.of(self.layer)[-1].shape[1]
        except (KeyError, IndexError, ValueError):
            return []
        return [(head, str(head)) for head in range(count)]

    def _title(self) -> str:
        return f"Layer {self.layer}, head {self.head}"

    def _map_tokens(self, levels: PlanLevels) -> dict[str, Sequence[str] | None]:
        """Tokens where they fit; keys of a cached or cross-attention call have others."""
        return {
            f"{side}_tokens": self._tokens
            if self._tokens is not None and len(self._tokens) == count
            else None
            for side, count in (("query", levels.queries), ("key", levels.keys))
        }

    # --- without a kernel ---

    def _default_vary(self) -> dict[str, list[Any]]:
        heads = [head for head, _ in self._head_options()]
        last = self._levels(self.layer, self.head).queries - 1
        queries = sorted({round(last * share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
        return {"head": heads[:12], "query": queries, "temperature": [0.1, 0.5, 1.0, 2.0, 10.0]}

    def page_extras(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        merged = {**self.values(), **values}
        levels = self._levels(merged["layer"], merged["head"])
        title = f"Layer {merged['layer']}, head {merged['head']}"
        state = self.map.state_of(levels, title=title)
        return {"map": {**state, "selection": [merged["query"], self.key]}}

    def _forget(self) -> None:
        self._kept.clear()
        del self._record
        del self.map
