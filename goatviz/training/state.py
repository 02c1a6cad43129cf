"""An unfinished run on disk: everything that the next step depends on, in one safetensors file.

It is written whole or not at all, so a run that is killed at any moment finds its last complete
state and continues bit for bit. Finished models are the business of `checkpoint`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from goatviz.files import whole_file
from goatviz.training.config import TrainConfig

STATE_FORMAT = "goatviz-training-state-1"
_GENERATOR = "data.generator"


class Progress(NamedTuple):
    """How far a run has come: steps done, seconds spent, and history as in `TrainResult`."""

    step: int
    seconds: float
    history: list[dict[str, float]]


def save_state(
    path: str | os.PathLike,
    progress: Progress,
    *,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: torch.Generator,
) -> None:
    """Write the state of a run, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written; an earlier state is still there.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors[_GENERATOR] = data.get_state()
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        "format": STATE_FORMAT,
        "config": json.dumps(config.to_dict()),
        "progress": json.dumps(progress._asdict()),
    }
    with whole_file(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def load_state(
    path: str | os.PathLike,
    *,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: torch.Generator,
) -> Progress:
    """Load the state of a run into its model, optimizer and generator of data.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, not a training state, or of a run with another config.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no training state at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != STATE_FORMAT:
                raise ValueError(
                    f"{path} must be a training state of format {STATE_FORMAT}, "
                    f"got {metadata.get('format')!r}"
                )
            _check_config(path, json.loads(metadata["config"]), config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(metadata["progress"]))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    model.load_state_dict(_under("model.", tensors))
    state: dict[int, dict[str, Any]] = {}
    for name, value in _under("optimizer.", tensors).items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    data.set_state(tensors[_GENERATOR])
    return progress


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _check_config(path: Path, theirs: dict[str, Any], config: TrainConfig) -> None:
    ours = json.loads(json.dumps(config.to_dict()))
    theirs, ours = _flat(theirs), _flat(ours)
    changed = [
        f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name)
    ]
    if changed:
        raise ValueError(f"{path} is of a run with another config: {'; '.join(changed)}")


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    task = {f"task.{name}": value for name, value in config["task"].items()}
    return {**{name: value for name, value in config.items() if name != "task"}, **task}
