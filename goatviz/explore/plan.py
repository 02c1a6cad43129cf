"""A model's plans by layer, head, query and temperature: a map, and one row of it taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record
from goatviz.analysis.compare import MOST_ROWS, PlanDifference, comparison_text
from goatviz.analysis.explain import explain
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
from goatviz.explore.plan_source import Against, PlanSource, against_of
from goatviz.explore.selection import Selection
from goatviz.plots.explanation import why_panel
from goatviz.plots.plan import row_panels
from goatviz.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import xarray as xr

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
#: Parts that a comparison adds.
COMPARED = ("against", "difference")
# Number of differences and of thumbnails that are kept.
_KEPT = 4


def explore_plan(
    model: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    tokenizer: Any = None,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    input: int = 0,
    against: Any = None,
    selection: Selection | None = None,
) -> PlanExplorer:
    """Explore the plans of a model in JupyterLab, by input, layer, head, query and temperature.

    Parameters
    ----------
    model : nn.Module, Checkpoint or Record
        A model that `goatviz.capture` can watch, or a record captured with keep="projections".
    inputs : Tensor, mapping, str, or sequence of them
        Inputs of the model, as in `goatviz.sink_profile`. A forward pass is made when one of its
        sequences is chosen first; the last two are kept. Not to be given with a record.
    tokenizer : callable, optional
        Tokenizer of texts, whose tokens are shown if it can name them.
    tokens : sequence of str, or sequence of them, optional
        One text for each position, of every sequence or of each.
    input : int
        Number of the sequence that is shown first, among all inputs.
    against : optional
        What is compared with the plan, in a second map and a map of the difference. Another model,
        which gets the same inputs; another record; changes as in `goatviz.intervene`, for the plans
        before and after; or a place such as {"layer": 3, "head": 1} or {"input": 1}: what it names
        stays, the rest follows the controls. Plans must be of as many queries and keys.
    selection : Selection, optional
        Selection to share with other explorers.

    Returns
    -------
    PlanExplorer
        A widget; `draw(...)` makes the pictures of the row without a kernel, `save_html(path)` a
        page.

    Raises
    ------
    TypeError
        If the model cannot be captured, inputs are missing or of another kind, or `against` is none
        of these.
    ValueError
        If a record holds no projections, there is no such sequence, `tokens` do not fit, or the
        plans that are compared have other sizes.

    Examples
    --------
    >>> import torch
    >>> from goatviz import Hide, load_pretrained
    >>> model = load_pretrained("copy-mixture-1-goat")
    >>> ids = torch.randint(32, (1, 64), generator=torch.Generator().manual_seed(0))
    >>> explorer = explore_plan(model, ids)
    >>> explorer.draw(head=1, query=40).layout.title.text
    'Plan and prior'
    >>> explorer = explore_plan(model, ids, against=Hide([0]))
    >>> list(explorer.parts)
    ['heads', 'map', 'against', 'difference', 'row', 'why']
    """
    return PlanExplorer(
        model,
        inputs,
        tokenizer=tokenizer,
        tokens=tokens,
        input=input,
        against=against,
        selection=selection,
    )


class PlanExplorer(Explorer):
    """Input, layer, head, query and temperature of a plan; see `explore_plan`.

    Attributes
    ----------
    input : int
        Number of the sequence.
    layer, head, query : int
        The row that is shown; a click or Enter in a map chooses query and key.
    key : int
        The key chosen in the map, shared through the selection.
    temperature : float
        tau of the row, from 0.01 (the largest score takes all) to 100 (close to the prior); the
        maps stay at the model's temperature.
    balanced : bool
        Whether the row of the doubly stochastic plan is drawn too (up to 512 tokens).
    queries : tuple of int
        Half-open range of queries brushed in the map, whose mean plan is drawn too; or ().
    key_range : tuple of int
        Half-open range of keys that map and row show; () for all.
    map : PlanMap
        The plan of this layer and head.
    """

    input = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    query = traitlets.Int(0).tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)
    temperature = traitlets.Float(1.0).tag(sync=True)
    balanced = traitlets.Bool(False).tag(sync=True)
    queries = traitlets.Tuple(()).tag(sync=True)
    key_range = traitlets.Tuple(()).tag(sync=True)

    shown = (
        "input",
        "layer",
        "head",
        "query",
        "temperature",
        "balanced",
        "queries",
        "key_range",
    )

    def __init__(
        self,
        model: nn.Module | Checkpoint | Record,
        inputs: Any = None,
        *,
        tokenizer: Any = None,
        tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
        input: int = 0,
        against: Any = None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__()
        given = {"tokenizer": tokenizer, "tokens": tokens}
        self._source = PlanSource(model, inputs, **given)
        self.input = checks.index("input", input, self._source.count)
        self._against: Against | None = None
        if against is not None:
            self._against = against_of(against, self._source, inputs, tokenizer, tokens)
        self._difference = lru_cache(_KEPT)(self._new_difference)
        self._thumbnails = lru_cache(_KEPT)(self._new_thumbnails)
        record = self._source.record(self.input)
        self._heads = self._source.heads(self.input)
        self.layer = next(iter(self._heads))
        thumbnails = self._thumbnails(self.input)
        if int(thumbnails["present"].sum()) > 1:
            with suppress(ValueError):
                # Single tokens have no structure to choose by.
                self.layer, self.head = structured_head(thumbnails, SINK)
        self.query = self._levels(self.values()).queries - 1
        self._check(self.values())
        self._set_up(
            self._make_controls(record),
            label="Plan and prior",
            places=self._make_places(),
            selection=selection,
        )
        for one in self._maps():
            one.observe(self._chosen, "selection")
        self.map.observe(self._brushed, "brush")
        self.map.observe(self._zoomed, "view")
        self.observe(self._show_marks, "key")

    def _make_controls(self, record: Record) -> list[Control]:
        count = self._source.count
        names = [(layer, f"{layer} ({record.layers[layer]})") for layer in self._heads]
        numbers = [(number, str(number)) for number in range(count)]
        controls = [
            Control("input", "Input", options=numbers),
            Control("layer", "Layer", options=names),
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
        return controls if count > 1 else controls[1:]

    def _make_places(self) -> dict[str, Place | int]:
        values = self.values()
        contents = self._contents(values)
        places: dict[str, Place | int] = {}
        if int(contents["heads"]["present"].sum()) > 1:
            view = HeadsView(contents["heads"], title="Plans of all heads", rule=RULE)
            places["heads"] = Place(view, wide=True)
        if contents["passage"] is not None:
            places["passage"] = Place(Passage(contents["passage"]), wide=True)
        maps = {name: PlanMap(contents[name]) for name in ("map", *COMPARED) if name in contents}
        self.map = maps["map"]
        for other in list(maps.values())[1:]:
            for trait in ("without", "pool", "brush"):
                traitlets.link((self.map, trait), (other, trait))
        for one in maps.values():
            one.linked = len(maps) > 1
        return (
            places
            | {name: Place(one, 380) for name, one in maps.items()}
            | {
                "row": 380,
                "why": 380,
            }
        )

    def _maps(self) -> list[PlanMap]:
        return [part for part in self.parts.values() if isinstance(part, PlanMap)]

    # --- what is shown ---

    def _check(self, values: Mapping[str, Any]) -> None:
        checks.index("input", values["input"], self._source.count)
        super()._check(values)
        *_, count, keys = self._source.record(values["input"]).of(values["layer"])[-1].shape
        if self._against is not None:
            self._against.check(values)
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
        levels = self._levels(values)
        if self._against is not None and 2 * levels.pairs(MOST_ROWS, levels.keys) > INLINE_PAIRS:
            return True
        return bool(values["queries"]) and levels.keys * np.ptp(values["queries"]) > INLINE_PAIRS

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        levels, tokens = self._levels(values), self._tokens_of(values)
        shown = {
            "temperature": values["temperature"],
            "points": POINTS,
            "keys": values["key_range"] or None,
        }
        row = levels.row(
            values["query"],
            **shown,
            tokens=tokens,
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
        panels = row_panels(row)
        if self._against is not None:
            other = self._against.levels(values).row(values["query"], **shown)
            panels = row_panels(row, other, self._against.title(values))
            difference = self._difference(*self._at(values))
            difference.distance(job)
            text = comparison_text(difference, values["query"])
            sentence += f" Against {self._against.title(values)}, at temperature 1: {text}"
        why = explain(
            levels.call,
            head=levels.head,
            query=values["query"],
            batch=levels.batch,
            top=TOP_KEYS,
            temperature=values["temperature"],
            tokens=tokens,
        )
        window = values["key_range"] or (0, levels.keys)
        return Picture({"row": panels, "why": why_panel(why)}, sentence, {"row": f"{window}"})

    def _at_once(self, values: Mapping[str, Any]) -> dict[str, Any]:
        contents = self._contents(values)
        if contents["passage"] is None:
            # Nothing to read: another input was shorter, or named its tokens.
            contents["passage"] = ShownPassage(self._levels(values), (), values["query"], 0)
        return {name: content for name, content in contents.items() if name in self.parts}

    def _contents(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Contents of the parts that are no figures; those that do not fit are left out."""
        levels = self._levels(values)
        title = f"Layer {values['layer']}, head {values['head']}"
        if self._source.count > 1:
            title = f"Input {values['input']}, {title.lower()}"
        contents = {
            "heads": self._thumbnails(values["input"]),
            "passage": self._passage(values),
            "map": self._shown_plan(values, levels, title),
        }
        if self._against is not None:
            other, levels = self._against.title(values), self._against.levels(values)
            name = f"{other[0].upper()}{other[1:]}"
            contents["against"] = self._shown_plan(values, levels, name)
            difference = self._difference(*self._at(values))
            title = f"Difference: {title[0].lower()}{title[1:]}, minus {other}"
            contents["difference"] = self._shown_plan(values, difference, title)
        return contents

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        levels = self._levels(values)
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
        levels, tokens = self._levels(values), self._tokens_of(values)
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
        if change["name"] in ("input", "layer", "head"):
            # The map shows the whole of another plan.
            with self._quietly():
                self.key_range = ()
        if change["name"] == "input" and 0 <= self.input < self._source.count:
            with self._quietly():
                self._heads = self._source.heads(self.input)
                self.query = min(self.query, self._levels(self.values()).queries - 1)
                self.queries = ()
        super()._trait_changed(change)

    @staticmethod
    def _at(values: Mapping[str, Any]) -> tuple[int, int, int]:
        return values["input"], values["layer"], values["head"]

    def _levels(self, values: Mapping[str, Any]) -> PlanLevels:
        return self._source.levels(*self._at(values))

    def _new_difference(self, input: int, layer: int, head: int) -> PlanDifference:
        values = {"input": input, "layer": layer, "head": head}
        return PlanDifference(self._levels(values), self._against.levels(values))

    def _new_thumbnails(self, input: int) -> xr.Dataset:
        return plan_thumbnails(self._source.record(input), batch=self._source.row(input))

    def _shown_plan(
        self, values: Mapping[str, Any], levels: PlanLevels | PlanDifference, title: str
    ) -> ShownPlan:
        query, key = values["query"], self.key
        tokens = self._source.tokens(values["input"])
        own = self._levels(values)
        query_tokens, key_tokens = (
            tokens if tokens is not None and len(tokens) == count else None
            for count in (levels.queries, levels.keys)
        )
        return ShownPlan(
            levels,
            title,
            query_tokens,
            key_tokens,
            own.first_key,
            (query, key) if query < levels.queries and key < levels.keys else (),
        )

    def _tokens_of(self, values: Mapping[str, Any]) -> list[str] | None:
        """Tokens of the keys, if there are so many: those of a cached or cross call differ."""
        tokens = self._source.tokens(values["input"])
        return tokens if tokens is not None and len(tokens) == self._levels(values).keys else None

    # --- without a kernel ---

    def _default_vary(self) -> dict[str, list[Any]]:
        """Queries, then heads of this layer, then temperatures, as far as the page has room."""
        count = self._levels(self.values()).queries
        heads = [head for head in self._heads[self.layer] if self._accepts("head", head)]
        # What another query adds, another head with its map, and a query of that head.
        elsewhere = {"query": self.query - 1 if self.query else count - 1}
        other = {"head": heads[heads.index(self.head) - 1]}
        first, query, head, both = sizes(self, [{}, elsewhere, other, elsewhere | other])

        def fits(heads: int, queries: int, temperatures: int = 1) -> bool:
            states, rows = heads * queries * temperatures, queries * temperatures - 1
            size = first + rows * query + (heads - 1) * (head + rows * both)
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
        self._source.forget()
        if self._against is not None:
            self._against.source.forget()
        self._difference.cache_clear()
        self._thumbnails.cache_clear()
        self.map = self._against = None
