"""A model that writes, token by token: what every head attends to when it chooses the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from torch import nn

from goatviz import checks
from goatviz.analysis.generation import generation_steps, generation_thumbnails, step_summary
from goatviz.analysis.thumbnails import even_queries, structured_head
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.heads import HeadsView
from goatviz.explore.jobs import Job
from goatviz.explore.page import Place
from goatviz.explore.passage import MOST_TOKENS, Passage
from goatviz.explore.plan import RULE, SINK
from goatviz.explore.selection import Selection
from goatviz.plots.generation import MAX_KEYS, step_panels, steps_panel
from goatviz.results import GENERATION, check_result, is_dataset, with_all_dimensions
from goatviz.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import xarray as xr

#: New tokens of a text whose number nobody named.
NEW_TOKENS = 16
#: Most states and bytes of an exported page whose values nobody named.
_STATES, _BYTES = 160, 4_000_000
#: Bytes of a state without its row.
_FIXED = 8_000


def explore_generation(
    model: nn.Module | Checkpoint | xr.Dataset,
    prompt: Any = None,
    *,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    layers: Sequence[int | str] | int | None = None,
    selection: Selection | None = None,
) -> GenerationExplorer:
    """Explore in JupyterLab what a model attends to while it goes on with a text.

    The model writes greedily, through its cache, once; then layer, head and query only choose
    among the rows that were seen.

    Parameters
    ----------
    model : nn.Module, Checkpoint or xarray.Dataset
        A goatviz CausalLM, or a model of transformers with `generate`; or a result of
        `goatviz.analysis.generation_steps`, then without the other arguments.
    prompt : str, Tensor of int64 or mapping
        One text (then `tokenizer` is needed), its token ids, shape (1, length), or what the
        tokenizer makes of it.
    tokenizer : callable, optional
        tokenizer(text, return_tensors="pt"), which names the tokens if it can.
    max_new_tokens : int, optional
        Largest number of new tokens; default 16.
    layers : int, str or sequence of them, optional
        Attention layers, as in `goatviz.capture`; default all.
    selection : Selection, optional
        Selection to share with other explorers.

    Returns
    -------
    GenerationExplorer
        A widget; `draw(...)` makes the same picture without a kernel, `save_html(path)` a page.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.analysis.generation_steps`; or if arguments are given with a result.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> prompt = torch.arange(20)[None]
    >>> explorer = explore_generation(load_pretrained("passkey-goat"), prompt, max_new_tokens=4)
    >>> explorer.set(query=21)
    >>> explorer.summary[:36]
    'Step 3 of 4: query 21 chooses token '
    """
    if is_dataset(model):
        given = {"prompt": prompt, "tokenizer": tokenizer, "layers": layers}
        checks.not_given("a finished generation", **given, max_new_tokens=max_new_tokens)
        return GenerationExplorer(model, selection=selection)
    steps = generation_steps(
        model,
        prompt,
        tokenizer=tokenizer,
        max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        layers=layers,
    )
    return GenerationExplorer(steps, selection=selection)


@dataclass(frozen=True)
class WrittenPassage:
    """A text with the rows of one head that are known, as a passage shows it.

    Parameters
    ----------
    head : xarray.Dataset
        One layer and head of a generation.
    query, key : int
        The chosen query and the chosen key.
    """

    head: xr.Dataset
    query: int
    key: int
    sink: int = 0

    @property
    def tokens(self) -> list[str]:
        return self.head["token"].values.tolist()

    def weights(self, direction: str, at: int) -> np.ndarray:
        queries, rows = self.head["query"].values, self.head["weights"].values
        weights = np.full(self.head.sizes["key"], np.nan, np.float32)
        if direction == "receives":
            weights[queries] = rows[:, at]
        elif at in queries:
            weights = rows[queries.tolist().index(at)]
        return weights


class GenerationExplorer(Explorer):
    """Layer, head and step of a text that a model wrote; see `explore_generation`.

    Parameters
    ----------
    steps : xarray.Dataset
        From `goatviz.analysis.generation_steps`.
    selection : Selection, optional
        Selection to share with other explorers.

    Attributes
    ----------
    layer, head : int
        The head that is shown.
    query : int
        The step that is shown, as the place of its query: the last token of the text so far, which
        chooses the next one. A click in the text or on a row chooses another.
    key : int
        The key chosen in the text or the map, shared through the selection.
    """

    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    query = traitlets.Int(0).tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)

    shown = ("layer", "head", "query")

    def __init__(self, steps: xr.Dataset, *, selection: Selection | None = None) -> None:
        check_result(steps, GENERATION)
        steps = with_all_dimensions(steps, GENERATION)
        super().__init__()
        self._steps = steps
        self._queries = steps["query"].values.tolist()
        numbers, names = steps["head"].values, steps["layer_name"].values
        layers = steps["layer"].values.tolist()
        self._heads = {
            layer: numbers[present].tolist()
            for layer, present in zip(layers, steps["present"].values, strict=True)
        }
        self.layer, self.query = layers[0], self._queries[0]
        places: dict[str, Place | int] = {}
        if int(steps["present"].sum()) > 1:
            thumbnails = generation_thumbnails(steps)
            with suppress(ValueError):
                # Single tokens have no structure to choose by.
                self.layer, self.head = structured_head(thumbnails, SINK)
            view = HeadsView(thumbnails, title="Rows of all heads, step by step", rule=RULE)
            places["heads"] = Place(view, wide=True)
        if "token" in steps and steps.sizes["key"] <= MOST_TOKENS:
            places["passage"] = Place(Passage(self._passage(self.values())), wide=True)
        places |= {"steps": 380, "row": 380}
        options = [(layer, f"{layer} ({name})") for layer, name in zip(layers, names, strict=True)]
        controls = [
            Control("layer", "Layer", options=options),
            Control("head", "Head"),
            Control(
                "query",
                "Query",
                "slider",
                low=self._queries[0],
                high=self._queries[-1],
                whole=True,
                hint="place of the last token of the text so far, which chooses the next one",
            ),
        ]
        self._set_up(controls, label="Generation", places=places, selection=selection)
        self.observe(self._show_key, "key")

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        first, last = self._queries[0], self._queries[-1]
        checks.integer("query", values["query"], low=first, high=last)
        if "key" in values:
            checks.index("key", values["key"], self._steps.sizes["key"])

    def _head_of(self, values: Mapping[str, Any]) -> xr.Dataset:
        return self._steps.sel(layer=values["layer"], head=values["head"])

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        head, query = self._head_of(values), values["query"]
        figures = {"steps": steps_panel(head, query), "row": step_panels(head, query)}
        return Picture(figures, step_summary(self._steps, **values))

    def _at_once(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"passage": self._passage(values)} if "passage" in self.parts else {}

    def _passage(self, values: Mapping[str, Any]) -> WrittenPassage:
        return WrittenPassage(self._head_of(values), values["query"], self.key)

    def _show_key(self, _change: dict[str, Any]) -> None:
        for name, content in self._at_once(self.values()).items():
            self.parts[name].show(content)

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        """Choose the query and the key of a cell."""
        if panel == "steps":
            self.key = round(float(message["x"]))
            self.query = round(float(message["y"]))

    def _default_vary(self) -> dict[str, list[Any]]:
        """Every step, or some of many, and as many heads of the layer as a page can hold."""
        # A row of float32 stands in the panel and in the text; a head has a map.
        state, steps = _FIXED + 12 * self._steps.sizes["key"], self._steps.sizes["step"]
        of_head = 6 * steps * min(MAX_KEYS, self._steps.sizes["key"])
        most = max(1, min(_STATES, (_BYTES - of_head) // state))
        queries = [self._queries[at] for at in even_queries(steps, most)]
        of_head += state * len(queries)
        count = max(1, min(_STATES // len(queries), _BYTES // of_head))
        heads = self._heads[self.layer]
        # Those around the chosen one.
        near = sum(head < self.head for head in heads)
        start = max(0, min(near - count // 2, len(heads) - count))
        return {"head": heads[start : start + count], "query": queries}

    def _forget(self) -> None:
        self._steps = None
