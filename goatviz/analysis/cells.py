"""What every sweep over models and lengths shares: its arguments, and cells measured once.

A cell is what one model says at one length. With a cache folder it is one small JSON file, named
by everything that it depends on, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from goatviz.files import whole_file
from goatviz.models import CausalLM
from goatviz.tasks import Task

Models = Mapping[str, CausalLM | Sequence[CausalLM]]


def check_models(models: Models, task: Task) -> dict[str, list[CausalLM]]:
    """Models by scheme as lists, that know the task's tokens."""
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            "models must map scheme names to models, such as {'goat': model}, "
            f"got {type(models).__name__}"
        )
    found = {}
    for scheme, given in models.items():
        each = [given] if isinstance(given, CausalLM) else list(given)
        if not each:
            raise ValueError(f"models[{scheme!r}] must hold at least one model, got none")
        for model in each:
            if not isinstance(model, CausalLM):
                raise TypeError(f"models[{scheme!r}] must be CausalLM, got {type(model).__name__}")
            if model.config.vocab_size < task.vocab_size:
                raise ValueError(
                    f"models[{scheme!r}] must know the task's {task.vocab_size} tokens, "
                    f"got a vocabulary of {model.config.vocab_size}"
                )
        found[str(scheme)] = each
    return found


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Increasing positive integers."""
    found = list(lengths)
    whole = all(not isinstance(n, bool) and int(n) == n and n > 0 for n in found)
    if not found or not whole or sorted(set(found)) != found:
        raise ValueError(f"lengths must be increasing positive integers, got {found}")
    return [int(n) for n in found]


def check_cache(cache: str | os.PathLike | None) -> Path | None:
    """A folder that is there."""
    if cache is None:
        return None
    folder = Path(cache)
    if not folder.is_dir():
        raise ValueError(f"cache must be an existing folder, got {folder}")
    return folder


def model_digest(model: CausalLM) -> str:
    """Names a model by its configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()


def trained_lengths(models: Mapping[str, Sequence[CausalLM]]) -> str:
    """Training lengths of all models, increasing, as an attribute of a result."""
    found = {model.config.training_length for each in models.values() for model in each}
    return ", ".join(map(str, sorted(found)))


def cached(folder: Path | None, label: str, asked: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` says, or said before; plain values, for JSON.

    Parameters
    ----------
    folder : Path or None
        An existing folder of cells; None: nothing is kept.
    label : str
        How the cell's file begins, for people.
    asked : plain values
        Everything the cell depends on.
    measure : callable
        Called if there is no such cell.

    Raises
    ------
    ValueError
        If the cell's file was damaged.
    """
    if folder is None:
        return measure()
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = folder / f"{label}-{name[:24]}.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cell {path} is damaged, remove it: {error}") from error
    found = measure()
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return found
