"""Where an explorer's plans come from: a record, or a model that runs its inputs on demand."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record, capture
from goatviz.adapters.intervene import Changes, capture_changed
from goatviz.analysis.inputs import forward_calls, run_model, sequences, token_texts
from goatviz.analysis.levels import PlanLevels
from goatviz.training.checkpoint import Checkpoint, model_of
from goatviz.transport.changes import Change, changed_call

if TYPE_CHECKING:
    import xarray as xr

#: The largest plan of a changed head, which is held dense, in pairs.
MAX_PAIRS = 4096**2
# Numbers of records, and of plans with the normalisers of the queries seen so far, that are kept.
_RECORDS, _PLANS = 2, 4


class PlanSource:
    """The plans of some sequences.

    Parameters
    ----------
    source : nn.Module, Checkpoint or Record
        A model, or a record of one call with keep="projections".
    inputs, tokenizer
        Of the model, as in `goatviz.sink_profile`.
    tokens : sequence of str, or sequence of them, optional
        One text for each position, of all sequences or of each.
    changes : Change, sequence of Change, or mapping, optional
        Changes that the model runs with, as in `goatviz.intervene`.
    layers : int, str or sequence of them, optional
        Layers that are captured, as in `goatviz.capture`; default all.
    first : Record, optional
        The record of the first forward pass, which need not be run again.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.explore_plan`.
    """

    def __init__(
        self,
        source: nn.Module | Checkpoint | Record,
        inputs: Any = None,
        *,
        tokenizer: Any = None,
        tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
        changes: Changes | None = None,
        layers: Any = None,
        first: Record | None = None,
    ) -> None:
        self.model = model_of(source)
        self._tokenizer, self._changes = tokenizer, changes
        self._layers, self._first = layers, first
        if isinstance(source, Record):
            checks.not_given("a Record", inputs=inputs, changes=changes)
            self._passes: list[Any] = [None]
            counts = [min(call.shape[0] for call in source.check_calls())]
        else:
            self._passes = list(forward_calls(inputs, tokenizer))
            counts = [sequences(one) for one in self._passes]
        #: The forward pass of each sequence, and its row there.
        self._places = [(n, row) for n, count in enumerate(counts) for row in range(count)]
        self._tokens = _by_sequence(tokens, self.count)
        self._captured = lru_cache(_RECORDS)(self._capture)
        self.levels = lru_cache(_PLANS)(self._new_levels)
        self.tokens = lru_cache(_RECORDS)(self._new_tokens)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self._places)

    def record(self, number: int) -> Record:
        """The record that holds a sequence; the last two are kept."""
        return self._captured(self._places[number][0])[0]

    def row(self, number: int) -> int:
        """The sequence's row in its record."""
        return self._places[number][1]

    def heads(self, number: int) -> dict[int, range]:
        """The heads of each layer."""
        calls = self.record(number).check_calls()
        return {call.layer: range(call.shape[1]) for call in sorted(calls, key=lambda c: c.layer)}

    def _capture(self, number: int) -> tuple[Record, dict[int, tuple[Change, ...]]]:
        if isinstance(self.model, Record):
            return self.model, {}
        if number == 0 and self._first is not None:
            return self._first, {}
        if self._changes is not None:
            with capture_changed(self.model, self._changes) as (record, changes):
                run_model(self.model, self._passes[number])
            return record, changes
        options = {"layers": self._layers, "statistics": (), "keep": "projections"}
        with capture(self.model, **options) as record:
            run_model(self.model, self._passes[number])
        return record, {}

    def _new_levels(self, number: int, layer: int, head: int) -> PlanLevels:
        place, row = self._places[number]
        record, changes = self._captured(place)
        call = record.of(layer)[-1]
        if layer not in changes:
            return PlanLevels(call, head=head, batch=row)
        if call.shape[2] * call.shape[3] > MAX_PAIRS:
            raise ValueError(
                f"changes must be of plans of at most {MAX_PAIRS:,} pairs, got "
                f"{call.shape[2]:,} x {call.shape[3]:,}"
            )
        changed = changed_call(call.projections, row, head, changes[layer])
        return PlanLevels(replace(call, call=changed))

    def _new_tokens(self, number: int) -> list[str] | None:
        if self._tokens is not None:
            return self._tokens[number]
        place, row = self._places[number]
        arguments = self._passes[place]
        return None if arguments is None else token_texts(self._tokenizer, arguments, row)

    def forget(self) -> None:
        """Drop the model, its inputs and all that was captured."""
        for cached in (self._captured, self.levels, self.tokens):
            cached.cache_clear()
        self.model, self._passes, self._changes, self._first = None, [], None, None


def _by_sequence(
    tokens: Sequence[str] | Sequence[Sequence[str]] | None, count: int
) -> list[list[str]] | None:
    """Texts of each sequence; those of a single one are everyone's."""
    if tokens is None:
        return None
    tokens = list(tokens)
    if not tokens or isinstance(tokens[0], str):
        tokens = [tokens] * count
    if len(tokens) != count:
        raise ValueError(
            f"tokens must be texts of one sequence, or of each of {count}, got {len(tokens)}"
        )
    return [[str(text) for text in each] for each in tokens]


@dataclass(frozen=True)
class Against:
    """What a plan is compared with.

    Parameters
    ----------
    source : PlanSource
        Where its plans come from.
    suffix : str
        What parts it from the plan of the same layer and head, such as " after Hide".
    fixed : mapping of str to int
        Values of "input", "layer" and "head" that stay as they are; others follow the explorer.
    """

    source: PlanSource
    suffix: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise a ValueError for values for which it has no plan."""
        at = {**values, **self.fixed}
        checks.index("input of against", at["input"], self.source.count)
        heads = self.source.heads(at["input"])
        checks.one_of("layer of against", at["layer"], heads)
        checks.one_of("head of against", at["head"], heads[at["layer"]])

    def levels(self, values: Mapping[str, Any]) -> PlanLevels:
        """Its plan for these values."""
        at = {**values, **self.fixed}
        return self.source.levels(at["input"], at["layer"], at["head"])

    def title(self, values: Mapping[str, Any]) -> str:
        """Its plan in words."""
        at = {**values, **self.fixed}
        where = f"layer {at['layer']}, head {at['head']}{self.suffix}"
        return f"input {at['input']}, {where}" if "input" in self.fixed else where


def against_of(
    against: Any,
    source: PlanSource,
    inputs: Any,
    tokenizer: Any,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None,
) -> Against:
    """What was asked for: a model, a record, another place of the same source, or changes.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.explore_plan`.
    """
    if isinstance(against, Mapping) and all(isinstance(value, int) for value in against.values()):
        checks.some_of("against", tuple(against), ("layer", "head", "input"))
        fixed = {name: checks.integer(f"against[{name!r}]", at) for name, at in against.items()}
        return Against(source, fixed=fixed)
    if isinstance(against, Record):
        return Against(PlanSource(against, tokens=tokens), " of the other record")
    if isinstance(against, nn.Module | Checkpoint):
        other = PlanSource(against, inputs, tokenizer=tokenizer, tokens=tokens)
        return Against(other, " of the other model")
    if not isinstance(against, Change | Sequence | Mapping) or isinstance(against, str):
        raise TypeError(
            "against must be a model, a record, a place such as {'layer': 3, 'head': 1}, or "
            f"changes such as goatviz.Hide([0]), got {type(against).__name__}"
        )
    if isinstance(source.model, Record):
        raise TypeError("against must not be changes beside a Record: they need the model")
    other = PlanSource(source.model, inputs, tokenizer=tokenizer, tokens=tokens, changes=against)
    return Against(other, f" after {_named(against)}")


def _named(changes: Changes) -> str:
    """Changes by their kinds."""
    each = changes.values() if isinstance(changes, Mapping) else [changes]
    flat = [one for value in each for one in ([value] if isinstance(value, Change) else value)]
    return ", ".join(dict.fromkeys(type(one).__name__ for one in flat))


def while_unchanged(
    model: nn.Module, steps: Generator[float, None, xr.Dataset]
) -> Generator[float, None, xr.Dataset]:
    """The same steps, and an error if a cell that runs between them changes the model."""
    before = _fingerprint(model)
    while True:
        if _fingerprint(model) != before:
            raise RuntimeError(
                "the model was changed while it was being profiled: explore_sinks(...) again"
            )
        try:
            share = next(steps)
        except StopIteration as end:
            return end.value
        yield share


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """A cheap fingerprint of a model: its mode, and identities and versions of its weights."""
    return (
        model.training,
        *((id(p), 0 if p.is_inference() else p._version) for p in model.parameters()),
    )
