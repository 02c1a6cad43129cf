"""Checkpoints: safetensors beside a JSON card that says where they come from.

Nothing here unpickles. The card carries the sha256 of the weights, and loading verifies it, so a
damaged, truncated or foreign file is an error and never a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from goatviz.files import check_shipped, shipped_file, shipped_names, whole_file
from goatviz.models import CausalLM, ModelConfig
from goatviz.tasks import CopyMixture, Task
from goatviz.training.evaluation import AnswerAccuracy
from goatviz.training.loop import TrainResult

CARD_FORMAT = "goatviz-checkpoint-1"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes
    ----------
    name : str
        File name without its ending.
    model : CausalLM
        In evaluation mode, on the CPU.
    card : dict
        Provenance: config, seed, command, data, device, steps, wall_time_s, losses, versions,
        sha256.
    """

    name: str
    model: CausalLM
    card: dict[str, Any]


def make_card(result: TrainResult, *, command: str, data: str) -> dict[str, Any]:
    """The provenance of a finished run, without the weights' sha256 (added on saving).

    Parameters
    ----------
    result : TrainResult
        From `train`.
    command : str
        The command line that repeats the run.
    data : str
        What it was trained on, in words.
    """
    config = result.config
    held_out = result.held_out
    return {
        "format": CARD_FORMAT,
        "command": command,
        "data": data,
        "seed": config.seed,
        "steps": config.steps,
        "device": device_name(next(result.model.parameters()).device),
        "execution": result.execution,
        "wall_time_s": round(result.wall_time, 1),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "losses": {
            "unit": "nats per predicted token",
            "train_final": result.history[-1]["loss"],
            "held_out": held_out.mean,
            "held_out_standard_error": held_out.standard_error,
            "held_out_sequences": held_out.sequences,
        }
        | _beside(config.task, result.answers),
        "history": result.history,
        "model": _plain(config.model_config()),
        "config": config.to_dict(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
        | {"python": platform.python_version()},
    }


def _beside(task: Task, answers: AnswerAccuracy | None) -> dict[str, Any]:
    """What a loss is to be compared with."""
    if isinstance(task, CopyMixture):
        return {"bayes_optimal": task.bayes_loss()}
    if answers is None:
        return {}
    return {
        "answers_strict": answers.strict,
        "answers_token": answers.token,
        "answers_examples": answers.examples,
        "chance_strict": task.strict_chance,
        "chance_token": task.chance,
    }


def device_name(device: torch.device) -> str:
    """The name of the processor a tensor lives on, for provenance."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"CPU: {model}, {threads} thread{'s' if threads > 1 else ''}"


def save_checkpoint(model: CausalLM, card: dict[str, Any], path: str | os.PathLike) -> Path:
    """Write `path`.safetensors and `path`.json, each whole or not at all; the card comes last.

    Parameters
    ----------
    model : CausalLM
        Whose weights to keep.
    card : dict
        From `make_card`; the sha256 is added.
    path : path-like
        Without an ending, in an existing folder.

    Returns
    -------
    Path
        The file of the weights.

    Examples
    --------
    >>> import tempfile
    >>> from goatviz.training.config import TrainConfig
    >>> from goatviz.training.loop import train
    >>> tiny = TrainConfig(embed_dim=32, steps=1, batch_size=2)
    >>> result = train(tiny, progress=False)
    >>> card = make_card(result, command="python", data="copy mixture")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(result.model, card, Path(folder) / "tiny").name
    'tiny.safetensors'
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise ValueError(f"path must not end in {path.suffix}: checkpoints are never pickled")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {path}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    weights = save_tensors(tensors, metadata={"format": "pt"})
    card = {**card, "sha256": hashlib.sha256(weights).hexdigest()}
    # Before anything is written: a card that is no JSON must not cost the checkpoint it replaces.
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"
    target = path.with_name(path.name + ".safetensors")
    with whole_file(target) as temporary:
        temporary.write_bytes(weights)
    with whole_file(path.with_name(path.name + ".json")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Load `path`.safetensors after verifying it against `path`.json.

    Parameters
    ----------
    path : path-like
        With or without one of the two endings.

    Raises
    ------
    FileNotFoundError
        If the weights or the card are missing.
    ValueError
        If the file is a pickle, its sha256 differs from the card's, it is no safetensors file,
        the card is damaged or of another format, or the weights do not fit the model it names.

    Examples
    --------
    >>> from goatviz.files import shipped_file
    >>> folder = shipped_file("")
    >>> load_checkpoint(folder / "copy-mixture-4-goat").card["steps"]
    2000
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise ValueError(
            f"path must name a safetensors checkpoint, got {path.name}: pickled files can run "
            "code when they are opened and are refused"
        )
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return _load(
        stem.name,
        lambda ending: stem.with_name(stem.name + ending).read_bytes(),
    )


def list_pretrained() -> list[str]:
    """Names of the checkpoints that come with goatviz.

    Examples
    --------
    >>> "copy-mixture-1-goat" in list_pretrained()
    True
    """
    return shipped_names(".safetensors")


def load_pretrained(name: str) -> Checkpoint:
    """Load a checkpoint that comes with goatviz, verified.

    Parameters
    ----------
    name : str
        One of `list_pretrained()`.

    Raises
    ------
    KeyError
        If there is none of that name; the message lists those there are.
    ValueError
        If the file was damaged since it was shipped.

    Examples
    --------
    >>> load_pretrained("copy-mixture-1-goat").model.config.positions
    'goat'
    """
    check_shipped(name, list_pretrained())
    return _load(name, lambda ending: shipped_file(f"{name}{ending}").read_bytes())


def _load(name: str, read: Callable[[str], bytes]) -> Checkpoint:
    card = _read_card(name, read(".json"))
    weights = read(".safetensors")
    digest = hashlib.sha256(weights).hexdigest()
    if digest != card["sha256"]:
        raise ValueError(
            f"{name}.safetensors is not the file its card describes: sha256 {digest[:12]}... "
            f"over {len(weights)} bytes, the card says {card['sha256'][:12]}..."
        )
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise ValueError(f"{name}.safetensors is not a safetensors file: {error}") from error
    try:
        model = CausalLM(ModelConfig(**card["model"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.json describes no model: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{name}.safetensors does not fit the model in its card: {error}"
        ) from error
    return Checkpoint(name=name, model=model.eval(), card=card)


def _read_card(name: str, content: bytes) -> dict[str, Any]:
    try:
        card = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}.json is not a readable card: {error}") from error
    if not isinstance(card, dict) or card.get("format") != CARD_FORMAT:
        kind = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise ValueError(f"{name}.json must have format {CARD_FORMAT!r}, got {kind!r}")
    missing = [key for key in ("sha256", "model", "config") if key not in card]
    if missing:
        raise ValueError(f"{name}.json lacks {', '.join(missing)}")
    if not isinstance(card["sha256"], str):
        raise ValueError(f"{name}.json must hold its sha256 as text, got {card['sha256']!r}")
    return card


def _plain(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
