"""The forward passes of a sink profile: measured one by one, cached, and put together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import Record
from goatviz.analysis.cells import ARRAYS, cached, inputs_digest, model_digest
from goatviz.analysis.inputs import Pass
from goatviz.analysis.sink_passes import Gathered, SinkSequence, gather_model
from goatviz.training.execution import Engine, Execution, start

#: Version of a cell's content; cells of another version are not read.
_VERSION = 2
_FIELDS = tuple(field.name for field in dataclasses.fields(SinkSequence))
#: What JSON holds as it is, and of it what goes by layers.
_PLAIN = ("map_size", "notes", "recent", "shortest")
_BY_LAYER = ("causal", "longest", "residuals")


@dataclasses.dataclass
class SinkRun:
    """How the forward passes of one model are measured.

    Attributes
    ----------
    model : nn.Module
        The model.
    layers, recent
        As in `goatviz.sink_profile`.
    hidden : tuple of str
        What is gathered of hidden states, out of `goatviz.analysis.sink_passes.HIDDEN`.
    map_size : int
        Number of tokens of average maps; 0 for none.
    certify : int, optional
        Number of queries of every call at which the kernel's output is compared with the plan.
    cache : Path, optional
        Folder of cells, one for each forward pass.
    """

    model: nn.Module
    layers: Sequence[int | str] | int | None
    recent: int
    hidden: tuple[str, ...]
    map_size: int
    certify: int | None
    cache: Path | None

    def __post_init__(self) -> None:
        self._key = None if self.cache is None else self._options()

    def measure(self, arguments: dict[str, Any] | Tensor) -> Gathered:
        """Numbers of one forward pass, read from the cache if it was measured before."""
        if self.cache is None:
            return self.run(arguments)[0]
        key = {**self._key, "inputs": inputs_digest(arguments)}

        def arrays() -> dict[str, np.ndarray]:
            return as_arrays(self.run(arguments)[0])

        return from_arrays(cached(self.cache, "sinks", key, arrays, form=ARRAYS))

    def run(
        self, arguments: dict[str, Any] | Tensor, keep: str = "statistics"
    ) -> tuple[Gathered, Record]:
        """Run the model without the cache; also returns the record of the pass."""
        gathered = Gathered(map_size=self.map_size)
        keep = "projections" if self.map_size else keep
        options = (self.layers, self.recent, self.hidden, keep, self.certify)
        return gathered, gather_model(gathered, self.model, arguments, *options)

    def _options(self) -> dict[str, Any]:
        """Everything that a cell depends on, other than its inputs."""
        config, layers = getattr(self.model, "config", None), self.layers
        layers = layers if isinstance(layers, int | str | None) else list(layers)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {
            "kind": "sink_profile",
            "version": _VERSION,
            "torch": torch.__version__,
            "model": model_digest(self.model),
            "attention": str(getattr(config, "_attn_implementation", None)),
            "devices": sorted({tensor.device.type for tensor in tensors}),
            "training": [path for path, each in self.model.named_modules() if each.training],
            "layers": repr(layers),
            "recent": self.recent,
            "hidden": list(self.hidden),
            "maps": self.map_size,
            **({} if self.certify is None else {"certify": self.certify}),
        }


@contextmanager
def processes(execution: Execution | None, model: nn.Module) -> Iterator[Engine | None]:
    """The engine of a process that shares a profile with others; None for one that runs alone.

    Raises
    ------
    TypeError, ValueError
        If `execution` is not an Execution, has options that only training has, or the model is on
        another device.
    """
    if execution is None:
        yield None
        return
    checks.instance("execution", execution, Execution, "an Execution")
    if dataclasses.replace(execution, device=None) != Execution():
        raise ValueError(
            f"execution must leave everything but device at its default here, got {execution}"
        )
    with start(execution) as engine:
        places = {tensor.device.type for tensor in model.parameters()}
        if places - {engine.device.type}:
            raise ValueError(
                f"model must be on its process's device, {engine.device}, got "
                f"{', '.join(sorted(places))}: move it there, and its inputs"
            )
        yield engine


def from_all(parts: dict[int, Gathered], error: Exception | None, engine: Engine) -> list[Gathered]:
    """The numbers of all processes' passes, in order; every process gets them all.

    Raises
    ------
    Exception
        This process's own error, or a RuntimeError with the error of another one.
    """
    from accelerate.utils import gather_object

    # A process that failed takes part too, since the others wait for it.
    message = None if error is None else f"{type(error).__name__}: {error}"
    everyone = gather_object([({} if error else parts, message)])
    if error is not None:
        raise error
    if failed := [text for _, text in everyone if text is not None]:
        raise RuntimeError(f"another process failed: {failed[0]}")
    found = {number: part for own, _ in everyone for number, part in own.items()}
    return [found[number] for number in sorted(found)]


def as_arrays(gathered: Gathered) -> dict[str, np.ndarray]:
    """Numbers of forward passes as arrays by name, and one JSON text for the rest."""
    arrays = {}
    for layer, sequences in gathered.sequences.items():
        for number, one in enumerate(sequences):
            for name in _FIELDS:
                if (value := getattr(one, name)) is not None:
                    arrays[f"{layer}/{number}/{name}"] = value
        for number, parts in enumerate(gathered.maps.get(layer, [])):
            for place, part in enumerate(parts):
                arrays[f"{layer}/{number}/map{place}"] = part
        arrays[f"{layer}/margins"] = gathered.margins[layer]
        arrays[f"{layer}/uniform"] = gathered.uniform[layer]
    for number, states in enumerate(gathered.hidden):
        for state, values in enumerate(states):
            for name, value in values.items():
                arrays[f"hidden/{number}/{state}/{name}"] = value
    rest = {name: getattr(gathered, name) for name in (*_PLAIN, *_BY_LAYER)}
    rest["priors"] = sorted(gathered.priors)
    rest["counts"] = {layer: len(found) for layer, found in gathered.sequences.items()}
    rest["hidden"] = [len(states) for states in gathered.hidden]
    return {"rest": np.array(json.dumps(rest)), **arrays}


def from_arrays(arrays: dict[str, np.ndarray]) -> Gathered:
    """The inverse of `as_arrays`."""
    rest = json.loads(str(arrays["rest"]))
    gathered = Gathered(**{name: rest[name] for name in _PLAIN})
    gathered.priors = set(rest["priors"])
    for name in _BY_LAYER:
        # Cells of earlier versions lack residuals, for which they were not asked.
        by_layer = rest.get(name, {})
        setattr(gathered, name, {int(layer): value for layer, value in by_layer.items()})
    for layer, count in rest["counts"].items():
        at = int(layer)
        gathered.sequences[at] = [
            SinkSequence(**{name: arrays.get(f"{layer}/{number}/{name}") for name in _FIELDS})
            for number in range(count)
        ]
        if gathered.map_size:
            gathered.maps[at] = [
                tuple(arrays[f"{layer}/{number}/map{place}"] for place in range(3))
                for number in range(count)
            ]
        gathered.margins[at] = arrays[f"{layer}/margins"]
        gathered.uniform[at] = arrays[f"{layer}/uniform"]
    for number, states in enumerate(rest["hidden"]):
        found: list[dict[str, np.ndarray]] = [{} for _ in range(states)]
        for state, values in enumerate(found):
            head = f"hidden/{number}/{state}/"
            values.update(
                {k.removeprefix(head): v for k, v in arrays.items() if k.startswith(head)}
            )
        gathered.hidden.append(found)
    return gathered


def together(parts: Sequence[Gathered], passes: Sequence[Pass]) -> Gathered:
    """Numbers of several forward passes in one, sequences in the order of the inputs."""
    out = Gathered(map_size=parts[0].map_size)
    placed: dict[int, list[tuple[int, SinkSequence, Any]]] = {}
    for part, one in zip(parts, passes, strict=True):
        for layer, sequences in part.sequences.items():
            maps = part.maps.get(layer, [None] * len(sequences))
            for number, (sequence, drawn) in enumerate(zip(sequences, maps, strict=True)):
                place = one.places[number % len(one.places)]
                placed.setdefault(layer, []).append((place, sequence, drawn))
            out.causal[layer] = part.causal[layer] or out.causal.get(layer, False)
            if part.longest[layer] > out.longest.get(layer, 0):
                for name in ("longest", "margins", "uniform"):
                    getattr(out, name)[layer] = getattr(part, name)[layer]
        for layer, residual in part.residuals.items():
            out.residuals[layer] = max(out.residuals.get(layer, 0.0), residual)
        out.priors |= part.priors
        out.hidden += part.hidden
        for note in part.notes:
            out.note(note)
        out.recent = part.recent
        out.shortest = min(out.shortest, part.shortest)
    for layer, found in placed.items():
        found.sort(key=lambda each: each[0])
        out.sequences[layer] = [sequence for _, sequence, _ in found]
        if out.map_size:
            out.maps[layer] = [drawn for _, _, drawn in found]
    return out
