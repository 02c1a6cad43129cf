"""A model's plans by layer, head, query and temperature: a map, and one row of it taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import traitlets
from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record, capture
from goatviz.analysis.explain import explain
from goatviz.analysis.inputs import forward_calls, run_model, token_texts
from goatviz.analysis.levels import MAX_BALANCED, PlanLevels, row_summary
from goatviz.analysis.thumbnails import plan_thumbnails, structured_head
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.export import sizes
from goatviz.explore.heads import HeadsView
from goatviz.explore.jobs import Job
from goatviz.explore.page import Place
from goatviz.explore.passage import MOST_TOKENS, Passage, ShownPassage
from goatviz.explore.plan_map import INLINE_PAIRS, PlanMap, ShownPlan
from goatviz.explore.selection import Selection
from goatviz.plots.explanation import why_panel
from goatviz.plots.plan import row_panels
from goatviz.training.checkpoint import Checkpoint

#: Mean weight of the first key from which a head counts as a sink, when the first one is chosen.
SINK = 0.3
#: Which head is opened first, in words.
RULE = (
    "Opened first: the head of least entropy relative to uniform attention among those with less "
    f"than {SINK:g} of their mass on the first key."
)
#: Temperatures between which the slider moves.
TEMPERATURES = (0.01, 100.0)
#: The longest row that POT solves again.
MAX_CHECKED_KEYS = 4096
#: Number of points of the row's curves.
POINTS = 512
#: Keys whose logits are taken apart.
TOP_KEYS = 8
#: Queries of an exported page, evenly spaced, if it has room for them.
MOST_QUERIES = 24
#: Temperatures of an exported page that has room for them.
VARIED = ((0.1, 0.5, 1.0, 2.0, 10.0), (0.5, 1.0, 2.0))
# Most states and bytes of an exported page whose values nobody named.
_MOST_STATES, _MOST_BYTES = 240, 5_000_000
#: Number of plans that are kept, with the normalisers of the queries seen so far.
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
    """Explore the plans of one forward pass of a model in JupyterLab.

    Parameters
    ----------
    model : nn.Module, Checkpoint or Record
        A model that `goatviz.capture` can watch, or a record captured with keep="projections".
    inputs : Tensor, mapping, str, or sequence of them
        Inputs of the model, as in `goatviz.sink_profile`; the first call is shown. Not to be given
        with a record.
    tokenizer : callable, optional
        Tokenizer of texts, whose tokens are shown if it can name them.
    tokens : sequence of str, optional
        One text for each position.
    batch : int
        Number of the sequence in the first call.
    selection : Selection, optional
        Selection to share with other explorers.

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
        checks.not_given("a Record", inputs=inputs)
        return PlanExplorer(model, tokens=tokens, batch=batch, selection=selection)
    model = model.model if isinstance(model, Checkpoint) else model
    call = next(iter(forward_calls(inputs, tokenizer)))
    with capture(model, statistics=(), keep="projections") as record:
        run_model(model, call)
    if tokens is None:
        tokens = token_texts(tokenizer, call, batch)
    return PlanExplorer(record, tokens=tokens, batch=batch, selection=selection)


class PlanExplorer(Explorer):
    """Layer, head, query and temperature of a captured plan; see `explore_plan`.

    Attributes
    ----------
    layer, head, query : int
        The row that is shown; a click or Enter in the map chooses query and key.
    key : int
        The key chosen in the map, shared through the selection.
    temperature : float
        tau of the row, from 0.01 (the largest score takes all) to 100 (close to the prior); the
        map stays at the model's temperature.
    balanced : bool
        Whether the row of the doubly stochastic plan is drawn too (up to 512 tokens).
    queries : tuple of int
        Half-open range of queries brushed in the map, whose mean plan is drawn too; or ().
    key_range : tuple of int
        Half-open range of keys that map and row show; () for all.
    map : PlanMap
        The plan of this layer and head.
    """

    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    query = traitlets.Int(0).tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)
    temperature = traitlets.Float(1.0).tag(sync=True)
    balanced = traitlets.Bool(False).tag(sync=True)
    queries = traitlets.Tuple(()).tag(sync=True)
    key_range = traitlets.Tuple(()).tag(sync=True)

    shown = ("layer", "head", "query", "temperature", "balanced", "queries", "key_range")

    def __init__(
        self,
        record: Record,
        *,
        tokens: Sequence[str] | None = None,
        batch: int = 0,
        selection: Selection | None = None,
    ) -> None:
        layers = sorted({call.layer for call in record.check_calls()})
        super().__init__()
        self._record, self._batch = record, batch
        self._tokens = None if tokens is None else [str(token) for token in tokens]
        # The last few plans are kept with their normalisers.
        self._levels = lru_cache(_KEPT)(self._new_levels)
        self._heads = {layer: range(record.of(layer)[-1].shape[1]) for layer in layers}
        self.layer = layers[0]
        thumbnails = plan_thumbnails(record, batch=batch)
        if int(thumbnails["present"].sum()) > 1:
            with suppress(ValueError):
                # Single tokens have no structure to choose by.
                self.layer, self.head = structured_head(thumbnails, SINK)
        self.query = self._levels(self.layer, self.head).queries - 1
        self.map = PlanMap(self._shown_plan(self.values()))
        controls = [
            Control("layer", "Layer", options=[(n, f"{n} ({record.layers[n]})") for n in layers]),
            Control("head", "Head"),
            Control("query", "Query", "number", high=self.query, whole=True),
            Control(
                "temperature",
                "Temperature",
                "slider",
                low=TEMPERATURES[0],
                high=TEMPERATURES[1],
                step=0.05,
                log=True,
                hint="temperature of the row: towards 0 the largest score takes all, towards "
                "infinity only the prior is left; 1 is the model's",
            ),
            Control("reset", "Temperature 1", "button", hint="as in the model"),
            Control(
                "balanced",
                "Doubly stochastic",
                "toggle",
                hint="the plan whose keys all receive the same mass, solved whole by POT",
            ),
        ]
        places: dict[str, Place | int] = {}
        if int(thumbnails["present"].sum()) > 1:
            places["heads"] = Place(
                HeadsView(thumbnails, title="Plans of all heads", rule=RULE), wide=True
            )
        if passage := self._passage(self.values()):
            places["passage"] = Place(Passage(passage), wide=True)
        places |= {"map": Place(self.map, 380), "row": 380, "why": 380}
        self._set_up(controls, label="Plan and prior", places=places, selection=selection)
        self.map.observe(self._chosen, "selection")
        self.map.observe(self._brushed, "brush")
        self.map.observe(self._zoomed, "view")
        self.observe(self._show_marks, "key")

    # --- what is shown ---

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        *_, count, keys = self._record.of(values["layer"])[-1].shape
        checks.index("query", values["query"], count)
        if "key" in values:
            checks.index("key", values["key"], keys)
        for name, most in (("queries", count), ("key_range", keys)):
            window = values[name]
            if window and not 0 <= window[0] < window[-1] <= most:
                raise ValueError(
                    f"{name} must be a non-empty range within 0 .. {most}, or (), got {window!r}"
                )

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        if values["balanced"]:
            return True
        keys = self._levels(values["layer"], values["head"]).keys
        return bool(values["queries"]) and keys * np.ptp(values["queries"]) > INLINE_PAIRS

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        levels = self._levels(values["layer"], values["head"])
        row = levels.row(
            values["query"],
            temperature=values["temperature"],
            points=POINTS,
            keys=values["key_range"] or None,
            tokens=self._tokens_of(levels.keys),
            check=levels.keys <= MAX_CHECKED_KEYS,
            balanced=values["balanced"],
            mean_of=values["queries"] or None,
            progress=job,
        )
        sentence = row_summary(row)
        if "balanced" in row and float(row["balanced"].max()) > 1 - 1e-6:
            sentence += (
                " The doubly stochastic plan is the identity: under the causal mask no other "
                "plan gives every key the same mass."
            )
        window = values["key_range"] or (0, levels.keys)
        why = explain(
            levels.call,
            head=levels.head,
            query=values["query"],
            batch=levels.batch,
            top=TOP_KEYS,
            temperature=values["temperature"],
            tokens=self._tokens_of(levels.keys),
        )
        figures = {"row": row_panels(row), "why": why_panel(why)}
        return Picture(figures, sentence, {"row": f"{window}"})

    def _at_once(self, values: Mapping[str, Any]) -> dict[str, Any]:
        contents = {"map": self._shown_plan(values), "passage": self._passage(values)}
        return {name: content for name, content in contents.items() if name in self.parts}

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        levels = self._levels(values["layer"], values["head"])
        too_many = max(levels.queries, levels.keys) > MAX_BALANCED
        return {"query": {"high": levels.queries - 1}, "balanced": {"disabled": too_many}}

    def _pressed(self, button: str) -> None:
        if button == "reset":
            self.temperature = 1.0

    # --- the map and the passage ---

    def _show_marks(self, _change: dict[str, Any]) -> None:
        for name, content in self._at_once(self.values()).items():
            self.parts[name].show(content)

    def _passage(self, values: Mapping[str, Any]) -> ShownPassage | None:
        """The tokens with the row of the chosen query; None if it has no tokens, or too many."""
        levels = self._levels(values["layer"], values["head"])
        tokens = self._tokens_of(levels.queries)
        if tokens is None or levels.keys != levels.queries or levels.keys > MOST_TOKENS:
            return None
        key = self.key if self.key < levels.keys else 0
        return ShownPassage(levels, tokens, values["query"], key, levels.first_key)

    def _chosen(self, change: dict[str, Any]) -> None:
        if change["new"]:
            query, key = change["new"]
            self.key = key
            self.query = query

    def _brushed(self, change: dict[str, Any]) -> None:
        self.queries = tuple(change["new"])

    def _zoomed(self, change: dict[str, Any]) -> None:
        """The row shows the keys that the map shows."""
        keys = tuple(change["new"]["keys"])
        self.key_range = () if keys == (0, self.map.levels.keys) else keys

    def _trait_changed(self, change: dict[str, Any]) -> None:
        if change["name"] in ("layer", "head"):
            # The map shows the whole of another plan.
            with self._quietly():
                self.key_range = ()
        super()._trait_changed(change)

    def _new_levels(self, layer: int, head: int) -> PlanLevels:
        return PlanLevels(self._record.of(layer)[-1], head=head, batch=self._batch)

    def _shown_plan(self, values: Mapping[str, Any]) -> ShownPlan:
        levels = self._levels(values["layer"], values["head"])
        query, key = values["query"], self.key
        return ShownPlan(
            levels,
            f"Layer {levels.call.layer}, head {levels.head}",
            self._tokens_of(levels.queries),
            self._tokens_of(levels.keys),
            levels.first_key,
            (query, key) if query < levels.queries and key < levels.keys else (),
        )

    def _tokens_of(self, count: int) -> list[str] | None:
        """The tokens, if there are so many: the keys of a cached or cross-attention call differ."""
        return self._tokens if self._tokens is not None and len(self._tokens) == count else None

    # --- without a kernel ---

    def _default_vary(self) -> dict[str, list[Any]]:
        """Queries, then heads of this layer, then temperatures, as far as the page has room."""
        count, heads = self._levels(self.layer, self.head).queries, list(self._heads[self.layer])
        # What another query adds, and another head with its map.
        states = [{}, {"query": self.query - 1 if self.query else count - 1}]
        states.append({"head": heads[heads.index(self.head) - 1]})
        first, query, head = sizes(self, states)

        def fits(heads: int, queries: int, temperatures: int = 1) -> bool:
            states = heads * queries * temperatures
            size = first + (heads - 1) * head + (states - heads) * query
            return states <= _MOST_STATES and size <= _MOST_BYTES

        wanted = range(1, min(MOST_QUERIES, count) + 1)
        few = max((n for n in wanted if fits(1, n + 1)), default=1)
        places = np.linspace(count - 1, 0, few).round().astype(int).tolist()
        queries = sorted({*places, self.query})
        most = max((n for n in range(1, len(heads) + 1) if fits(n, len(queries))), default=1)
        start = max(0, min(heads.index(self.head), len(heads) - most))
        vary = {"head": heads[start : start + most], "query": queries}
        for temperatures in VARIED:
            chosen = sorted({*temperatures, self.temperature})
            if fits(most, len(queries), len(chosen)):
                return vary | {"temperature": chosen}
        return vary

    def _forget(self) -> None:
        self._levels.cache_clear()
        self._record = self.map = None
