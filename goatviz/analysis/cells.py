"""What sweeps over models and lengths share: checks of their arguments, and a cache of cells.

A cell is the measurement of one model at one length. With a cache folder it is a small JSON file,
named by a digest of everything it depends on, so that an interrupted sweep resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from goatviz import checks
from goatviz.files import whole_file
from goatviz.models import CausalLM
from goatviz.tasks import Task

Models = Mapping[str, CausalLM | Sequence[CausalLM]]


def check_models(models: Models, task: Task) -> dict[str, list[CausalLM]]:
    """Lists of models by scheme, each with a vocabulary that holds the task's tokens."""
    wanted = "a mapping of scheme names to models, such as {'goat': model}"
    if not checks.instance("models", models, Mapping, wanted):
        raise ValueError(f"models must be {wanted}, got none")
    runs = {}
    for scheme, given in models.items():
        name = f"models[{scheme!r}]"
        if isinstance(given, CausalLM):
            given = [given]
        run = list(checks.instance(name, given, Iterable, "a CausalLM or a sequence of them"))
        if not run:
            raise ValueError(f"{name} must hold at least one model, got none")
        for model in run:
            checks.instance(name, model, CausalLM, "a CausalLM")
            if model.config.vocab_size < task.vocab_size:
                raise ValueError(
                    f"{name} must have a vocabulary of at least the task's {task.vocab_size} "
                    f"tokens, got {model.config.vocab_size}"
                )
        runs[str(scheme)] = run
    return runs


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Increasing positive integers."""
    wanted = "increasing positive integers"
    checks.instance("lengths", lengths, Iterable, wanted)
    numbers = [checks.positive_int("lengths", length) for length in lengths]
    if not numbers or sorted(set(numbers)) != numbers:
        raise ValueError(f"lengths must be {wanted}, got {numbers}")
    return numbers


def check_cache(cache: str | os.PathLike | None) -> Path | None:
    """An existing folder, or None."""
    if cache is None:
        return None
    folder = Path(cache)
    if not folder.is_dir():
        raise ValueError(f"cache must be an existing folder, got {folder}")
    return folder


def model_digest(model: CausalLM) -> str:
    """SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()


def trained_lengths(models: Mapping[str, Sequence[CausalLM]]) -> str:
    """The training lengths of all models, increasing, as an attribute of a result."""
    lengths = {model.config.training_length for run in models.values() for model in run}
    return ", ".join(map(str, sorted(lengths)))


def exceeds_positions(model: CausalLM, length: int) -> bool:
    """Whether the model learned its positions one by one and has none at this length."""
    return model.config.positions == "learned" and length > model.config.training_length


def cached(folder: Path | None, label: str, key: Any, measure: Callable[[], Any]) -> Any:
    """What `measure()` returns, or returned when the same cell was measured before.

    Parameters
    ----------
    folder : Path or None
        An existing folder of cells; None keeps nothing.
    label : str
        Beginning of the cell's file name, for people.
    key : JSON values
        Everything that the cell depends on.
    measure : callable
        Returns JSON values; called if there is no such cell.

    Raises
    ------
    ValueError
        If the cell's file is damaged.
    """
    if folder is None:
        return measure()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{label}-{name[:24]}.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cell {path} is damaged, remove it: {error}") from error
    value = measure()
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
    return value
