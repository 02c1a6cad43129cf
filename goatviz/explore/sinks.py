"""A model's attention sinks at a glance, and from there one head: its keys, its signal, its plan.

The numbers are those of `sink_profile`, computed once; moving a control draws them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record
from goatviz.analysis.sink_text import above_text, at_threshold, sink_sentence
from goatviz.analysis.sinks import sink_profile_steps
from goatviz.analysis.thumbnails import plan_thumbnails
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.heads import HeadsView
from goatviz.explore.jobs import Job, Steps, running_loop
from goatviz.explore.page import Place
from goatviz.explore.plan_map import PlanMap, ShownPlan
from goatviz.explore.plan_source import PlanSource, while_unchanged
from goatviz.explore.selection import Selection
from goatviz.plots.base import as_figure
from goatviz.plots.sink_curves import importance_panel, key_places, rate_panel, signal_panel
from goatviz.plots.sink_maps import heads_panel, places
from goatviz.results import SINK_PROFILE, check_result, is_dataset, with_all_dimensions
from goatviz.training.checkpoint import Checkpoint, model_of

if TYPE_CHECKING:
    import xarray as xr

#: Which head is opened first, in words.
RULE = "Opened first: the head with the largest mean weight on the first key."
#: Step and end of the threshold's slider, which are those of its curve.
STEP, HIGHEST = 0.01, 0.99
#: Points of a curve and bins of a density that a panel of 340 pixels has room for.
POINTS, BINS = 120, (32, 40)
#: Most states and bytes of an exported page whose values nobody named.
_MOST_STATES, _MOST_BYTES = 64, 4_000_000
#: Options of `sink_profile` that change what is shown here.
_OPTIONS = ("layers", "min_observers", "recent", "resamples", "seed")


def explore_sinks(
    source: nn.Module | Checkpoint | Record | xr.Dataset,
    inputs: Any = None,
    *,
    threshold: float | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    selection: Selection | None = None,
    **profile: Any,
) -> SinkExplorer:
    """Explore in JupyterLab where a model's attention sinks are, and what makes them.

    All heads are shown at a glance; a click on one shows the importance of its keys, its sink mass
    against the content range, and its plan of an input. The widget appears at once; the
    forward passes run one by one while the kernel stays free, and can be stopped.

    Parameters
    ----------
    source : nn.Module, Checkpoint, Record or xarray.Dataset
        A model that `goatviz.capture` can watch, with `inputs`; a record of its forward passes;
        or a finished `sink_profile`. Plans are shown for a model, and for a record captured with
        keep="projections".
    inputs : Tensor, mapping, str, or sequence of them, optional
        As in `goatviz.sink_profile`; with a model only.
    threshold : float, optional
        epsilon to start with, in [0, 1); default 0.3, or that of a finished profile.
    tokenizer, tokens
        As in `goatviz.sink_profile`; tokens also label the plan, where they fit.
    selection : Selection, optional
        Selection to share with other explorers: layer, head and key.
    **profile
        Passed to `goatviz.sink_profile`: layers, min_observers, recent, resamples, seed.

    Returns
    -------
    SinkExplorer
        A widget; `draw(...)` makes the same pictures without a kernel.

    Raises
    ------
    TypeError
        If the model cannot be captured, inputs are missing or of another kind, or an argument is
        given that a record or a finished profile has already fixed.
    ValueError
        If an argument is out of range, or a record or a profile is empty.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> explorer = explore_sinks(load_pretrained("copy-mixture-1-goat"), ids)
    >>> explorer.set(head=1, threshold=0.5)
    >>> explorer.picture({}).summary.split(" (")[0]
    'Sink rate 50.0 % [50.0, 50.0] at ε = 0.5'
    """
    return SinkExplorer(
        source,
        inputs,
        threshold=threshold,
        tokenizer=tokenizer,
        tokens=tokens,
        selection=selection,
        **profile,
    )


class SinkExplorer(Explorer):
    """Threshold, layer, head and key of a sink profile; see `explore_sinks`.

    Attributes
    ----------
    threshold : float
        epsilon: a first key whose importance is strictly above it is a sink. A click on the sink
        rate chooses it.
    layer, head : int
        The head shown in detail; a click on the overview chooses both.
    key : int
        The key that is marked among the importances and spoken of, by default the first; a click
        on the importances or on the plan chooses it.
    follow : bool
        Whether the overview compares the importance of that key between heads, and not that of the
        first key.
    input : int
        The sequence, counted over all inputs, whose plans are shown; it runs when it is first
        chosen.
    map : PlanMap or None
        The plan of this head for this input, if queries and keys are known.
    """

    threshold = traitlets.Float(0.3).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)
    follow = traitlets.Bool(False).tag(sync=True)
    input = traitlets.Int(0).tag(sync=True)

    shown = ("threshold", "layer", "head", "key", "follow")
    map: PlanMap | None = None

    def __init__(
        self,
        source: nn.Module | Checkpoint | Record | xr.Dataset,
        inputs: Any = None,
        *,
        threshold: float | None = None,
        tokenizer: Any = None,
        tokens: Sequence[str] | None = None,
        selection: Selection | None = None,
        **profile: Any,
    ) -> None:
        super().__init__()
        unknown = [name for name in profile if name not in _OPTIONS]
        if unknown:
            raise TypeError(f"profile takes {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        if threshold is not None:
            threshold = checks.number("threshold", threshold, low=0, below=1)
        self._plans: PlanSource | None = None
        self._profile: xr.Dataset | None = None
        self._tokens = tokens
        # The loop that runs cells: messages of a page may be answered in another thread.
        self._loop = running_loop()
        given = {"inputs": inputs, "tokenizer": tokenizer, "tokens": tokens}
        given = [name for name, value in given.items() if value is not None] + list(profile)
        if is_dataset(source):
            if given:
                raise TypeError(
                    f"{', '.join(given)} cannot be changed in a finished profile; pass the model"
                )
            names = self._adopt_profile(source)
        else:
            names = self._adopt_model(source, inputs, tokenizer, threshold, profile)
        if threshold is not None:
            self.threshold = threshold
        self._thumbnails = lru_cache(2)(self._new_thumbnails)
        if self._plans is not None and self._plans.count > 1:
            self.shown = (*self.shown, "input")
        self.layer, self.head = self._strongest()
        places: dict[str, Place | int] = {}
        if self._plans is not None and sum(map(len, self._heads.values())) > 1:
            view = HeadsView(self._thumbnails(0), title="Plans of all heads", rule=RULE)
            places["thumbnails"] = Place(view, wide=True)
        places["heads"] = 340
        if self._plans is not None:
            self.map = PlanMap(self._shown_plan(self.values()))
            self.map.observe(self._pair_chosen, "selection")
            places["map"] = Place(self.map)
        places |= {"sink rate": 340, "importance": 340, "signal": 340}
        self._set_up(
            self._make_controls(names), label="Attention sinks", places=places, selection=selection
        )

    def _strongest(self) -> tuple[int, int]:
        """The head with the largest weight on the first key; the first head where none is known."""
        if self._plans is not None:
            result = self._thumbnails(0)
            weight = result["first_mass"].values
        elif self._profile is not None:
            result = self._whole
            weight = result["first_importance"].mean("input").values
        else:
            result, weight = None, np.full(1, np.nan)
        if np.isnan(weight).all():
            layer = next(iter(self._heads))
            return layer, self._heads[layer][0]
        at = np.unravel_index(np.nanargmax(weight), weight.shape)
        layer, head = (
            int(result[dim].values[n]) for dim, n in zip(("layer", "head"), at, strict=True)
        )
        return layer, head

    def _make_controls(self, names: Mapping[int, str]) -> list[Control]:
        count = 1 if self._plans is None else self._plans.count
        inputs = Control(
            "input",
            "Plans of input",
            options=[(n, str(n)) for n in range(count)],
            hint="the sequence whose plans are shown; all count in the profile",
        )
        return [
            Control(
                "threshold",
                "Threshold ε",
                "slider",
                low=0.0,
                high=HIGHEST,
                step=STEP,
                hint="a first key whose importance exceeds it is a sink",
            ),
            Control("layer", "Layer", options=[(n, f"{n} ({name})") for n, name in names.items()]),
            Control("head", "Head"),
            Control(
                "key",
                "Key",
                "number",
                low=self._key_range()[0],
                high=self._key_range()[1],
                whole=True,
                hint="the key that is marked among the importances; 0 is the first",
            ),
            Control(
                "follow",
                "Overview of this key",
                "toggle",
                hint="compare the importance of this key between heads, not that of the first",
            ),
            *([inputs] if count > 1 else []),
        ]

    # --- sources ---

    def _adopt_profile(self, profile: xr.Dataset) -> dict[int, str]:
        """Take a finished profile; returns the layers' names."""
        check_result(profile, SINK_PROFILE)
        self.threshold = float(profile.attrs["threshold"])
        self._profile, self._whole = profile, with_all_dimensions(profile, SINK_PROFILE)
        self._steps: Steps[xr.Dataset] | None = None
        layers, heads = (self._whole[name].values for name in ("layer", "head"))
        present = self._whole["present"].values.astype(bool)
        self._heads = {
            int(layer): tuple(heads[row].tolist())
            for layer, row in zip(layers, present, strict=True)
            if row.any()
        }
        if not self._heads:
            raise ValueError("profile holds no head that is present")
        keys = self._whole["key"].values
        first = profile.attrs["first_key"]
        self.key = int(first if first in keys else keys[0])
        names = self._whole["layer_name"].values
        return {
            int(n): str(name) for n, name in zip(layers, names, strict=True) if n in self._heads
        }

    def _adopt_model(
        self,
        source: nn.Module | Checkpoint | Record,
        inputs: Any,
        tokenizer: Any,
        threshold: float | None,
        options: Mapping[str, Any],
    ) -> dict[int, str]:
        """Run the first input, and leave the profile for later; returns the layers' names."""
        options = {**options, "tokenizer": tokenizer, "tokens": self._tokens}
        if threshold is not None:
            options["threshold"] = threshold
        records = []
        steps = sink_profile_steps(source, inputs, first=records.append, **options)
        # This step checks the arguments: their errors are raised here, not shown in the widget.
        next(steps)
        if not isinstance(source, Record):
            model = model_of(source)
            steps = while_unchanged(model, steps)
            next(steps)
        record = records[0] if records else source
        layers = sorted({call.layer for call in record.check_calls()})
        self._steps = Steps(steps)
        calls = {layer: record.of(layer)[0] for layer in layers}
        self._heads = {layer: tuple(range(call.shape[1])) for layer, call in calls.items()}
        if all(call.call.q is not None for call in calls.values()):
            first = Record(record.layers, list(calls.values()))
            if isinstance(source, Record):
                self._plans = PlanSource(first, tokens=self._tokens)
            else:
                self._plans = PlanSource(
                    source,
                    inputs,
                    tokenizer=tokenizer,
                    tokens=self._tokens,
                    layers=options.get("layers"),
                    first=first,
                )
        self._first_keys = max(call.shape[3] for call in calls.values())
        return {layer: record.layers[layer] for layer in layers}

    def profile(self) -> xr.Dataset:
        """The numbers that are shown, as from `sink_profile`; computes those still missing."""
        if self._profile is None:
            profile = self._steps.finish()
            self._whole = with_all_dimensions(profile, SINK_PROFILE)
            self._profile = profile
        return self._profile

    def _key_range(self) -> tuple[int, int]:
        """The first and the last key known so far."""
        if self._profile is None:
            return 0, self._first_keys - 1
        first, last = self._whole["key"].values[[0, -1]].tolist()
        return first, last

    # --- what is shown ---

    def _check(self, values: Mapping[str, Any]) -> None:
        if not 0 <= values["threshold"] < 1:
            raise ValueError(f"threshold must be in [0, 1), got {values['threshold']!r}")
        super()._check(values)
        if "input" in values:
            checks.index("input", values["input"], self._plans.count)
        key = values["key"]
        if self._profile is None:
            if key < 0:
                raise ValueError(f"key must be at least 0, got {key!r}")
        elif key not in self._whole["key"].values:
            first, last = self._key_range()
            raise ValueError(f"key must be in {first} .. {last}, got {key!r}")

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        self.profile()
        # Only now are the keys known.
        self._check(values)
        profile = at_threshold(self._whole, float(values["threshold"]))
        layer, head, key = values["layer"], values["head"], values["key"]
        first = profile.attrs["first_key"]
        if first not in profile["key"].values:
            first = int(profile["key"][0])
        compared = key if values["follow"] else first
        panels = {
            "heads": heads_panel(
                profile,
                f"Importance of {'the first key' if compared == first else f'key {compared:,}'}",
                profile["importance"].sel(key=compared).values,
                note=above_text(profile, compared),
                chosen=(layer, head),
            ),
            "sink rate": rate_panel(profile, (layer, head)),
            "importance": importance_panel(profile, layer, head, points=POINTS, key=key),
            "signal": signal_panel(profile, layer, head, shape=BINS),
        }
        sentence = sink_sentence(profile, layer, head, key)
        if self._plans is None:
            sentence += (
                " No plan is shown, since queries and keys are missing: explore the model with its "
                'inputs, or a record captured with keep="projections".'
            )
        return Picture(panels, sentence)

    def _at_once(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self._plans is None:
            return {}
        contents = {
            "map": self._shown_plan(values),
            "thumbnails": self._thumbnails(values.get("input", 0)),
        }
        return {name: content for name, content in contents.items() if name in self.parts}

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        # Before the profile, the longest input is not known.
        return {"key": {"high": self._key_range()[1]}}

    def _begin(self, values: Mapping[str, Any]) -> None:
        if self._profile is not None or self._loop is None:
            super()._begin(values)
        elif not self._steps.running:
            # The picture follows when the profile is done, with the values of that moment.
            self._report(self._steps.share)
            self._steps.start(self._loop, self._report, self._profiled)

    def _report(self, share: float) -> None:
        self.report_progress("Profiling", share)

    def _profiled(self, error: Exception | None) -> None:
        """The profile is there, or never will be."""
        self.progress = -1.0
        if error is not None:
            self.say_error(error)
            return
        self.profile()
        self._request()

    def cancel(self) -> None:
        """Stop what is being computed; moving a control resumes it."""
        super().cancel()
        if self._steps is not None and self._steps.running:
            self._steps.stop()
            self.progress = -1.0
            self.summary = f"Stopped at {100 * self._steps.share:.0f} %: moving a control resumes."

    # --- clicks ---

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        choose = {
            "heads": self._choose_head,
            "importance": self._choose_key,
            "sink rate": self._choose_threshold,
        }
        if self._profile is not None and panel in choose:
            choose[panel](message)

    def _choose_head(self, message: Mapping[str, Any]) -> None:
        """Take the head of a cell of the overview, by its place."""
        y, x = (
            dict(zip(places(ids).tolist(), ids.tolist(), strict=True))
            for ids in (self._whole["layer"].values, self._whole["head"].values)
        )
        layer, head = y.get(_place(message.get("y"))), x.get(_place(message.get("x")))
        if head in self._heads.get(layer, ()):
            self.set(layer=layer, head=head)

    def _choose_key(self, message: Mapping[str, Any]) -> None:
        """Take the key at a place on the importances' axis; a logarithmic one begins at 1."""
        at = _place(message.get("x"))
        if at is None:
            return
        key = at - int(key_places(self._whole["key"].values, np.zeros(1, np.int64))[0])
        if self._accepts("key", key):
            self.key = key

    def _choose_threshold(self, message: Mapping[str, Any]) -> None:
        """Take a threshold from the sink rate's axis, rounded to the slider's steps."""
        at = message.get("x")
        if isinstance(at, int | float) and 0 <= at <= 1:
            self.threshold = min(round(round(at / STEP) * STEP, 2), HIGHEST)

    def _pair_chosen(self, change: dict[str, Any]) -> None:
        """Take the key of a pair chosen in the map; its query is for other explorers."""
        if change["new"]:
            query, key = change["new"]
            self.selection.query = query
            if self._accepts("key", key):
                self.key = key

    # --- the map ---

    def _new_thumbnails(self, number: int) -> xr.Dataset:
        return plan_thumbnails(self._plans.record(number), batch=self._plans.row(number))

    def _shown_plan(self, values: Mapping[str, Any]) -> ShownPlan:
        number = values.get("input", 0)
        levels = self._plans.levels(number, values["layer"], values["head"])
        tokens = self._plans.tokens(number)
        tokens = tokens if tokens and len(tokens) == levels.queries == levels.keys else None
        which = "first input" if number == 0 else f"input {number}"
        title = f"Plan of layer {levels.call.layer}, head {levels.head}, {which}"
        return ShownPlan(levels, title, tokens, tokens, levels.first_key)

    # --- without a kernel, and the end ---

    def _default_vary(self) -> dict[str, list[Any]]:
        """All heads if they fit, else those of this layer: every combination must be a head."""
        layers = list(self._heads)
        common = self._heads[layers[0]]
        panels = self.picture({}).figures
        # Panels that do not depend on the head are written once.
        figures = [as_figure(panels[name]) for name in ("importance", "signal")]
        size = sum(len(figure.to_json(validate=False)) for figure in figures)
        size += 0 if self.map is None else len(self.map.pixels) * 4 // 3
        most = max(1, min(_MOST_STATES, _MOST_BYTES // size))
        same = all(heads == common for heads in self._heads.values())
        if same and len(layers) * len(common) <= most:
            return {"layer": layers, "head": list(common)}
        heads = list(self._heads[self.layer])
        first = max(0, min(heads.index(self.head), len(heads) - most))
        return {"head": heads[first : first + most]}

    def _forget(self) -> None:
        self._thumbnails.cache_clear()
        if self._plans is not None:
            self._plans.forget()
        self._profile = self._whole = self._steps = self._plans = self.map = None


def _place(value: Any) -> int | None:
    """A place along an axis as an integer, from what a page sends; None for anything else."""
    return round(value) if isinstance(value, int | float) and np.isfinite(value) else None
