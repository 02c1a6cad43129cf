"""Checkpoints: safetensors beside a JSON card that says where they come from.

Nothing is ever unpickled. The card holds the sha256 of the weights and of itself (cards of the
former format only of the weights), and loading verifies both: a damaged, truncated or foreign file
is an error, never a model. The card's model is compared with the weights before it is built.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import reprlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from goatviz.files import check_shipped, locked, shipped_file, shipped_names, whole_files
from goatviz.models import ModelConfig, Transformer, build_model
from goatviz.tasks import CopyMixture, Task
from goatviz.training.evaluation import AnswerAccuracy
from goatviz.training.loop import TrainResult

CARD_FORMAT = "goatviz-checkpoint-2"
#: Format of cards without their own sum.
_FORMER_FORMAT = "goatviz-checkpoint-1"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes
    ----------
    name : str
        File name without its ending.
    model : Transformer
        The model in evaluation mode, on the CPU.
    card : dict
        Provenance: config, seed, command, data, device, steps, wall_time_s, losses, versions,
        sha256.
    """

    name: str
    model: Transformer
    card: dict[str, Any]


def model_of(source: Any) -> Any:
    """The model of a checkpoint; anything else as it is."""
    return source.model if isinstance(source, Checkpoint) else source


def make_card(result: TrainResult, *, command: str, data: str) -> dict[str, Any]:
    """The provenance of a finished run, without the weights' sha256 (added on saving).

    Parameters
    ----------
    result : TrainResult
        Result of `train`.
    command : str
        Command line that repeats the run.
    data : str
        Description of the training data.
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
        "model": asdict(config.model_config()),
        "config": config.to_dict(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
        | {"python": platform.python_version()},
    }


def _beside(task: Task, answers: AnswerAccuracy | None) -> dict[str, Any]:
    """Numbers to compare the loss with."""
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
    """The name of a processor, for provenance."""
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


def save_checkpoint(model: Transformer, card: dict[str, Any], path: str | os.PathLike) -> Path:
    """Write `path`.safetensors and `path`.json, whole or not at all; the card comes last.

    Several writers take turns, so that a reader always finds two files of the same writer.

    Parameters
    ----------
    model : Transformer
        Model whose weights are saved.
    card : dict
        Card from `make_card`; sha256 and card_sha256 are added.
    path : path-like
        Path without an ending, in an existing folder.

    Returns
    -------
    Path
        Path of the weights.

    Raises
    ------
    ValueError
        If the files could not be loaded again: weights that are not finite, not float32, or not
        those of the model in the card; a card that is not JSON.

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
    # Before anything is written: weights that cannot be loaded must not replace a checkpoint.
    _model(path.name, card["model"], tensors)
    weights = save_tensors(tensors, metadata={"format": "pt"})
    card = {**card, "format": CARD_FORMAT, "sha256": hashlib.sha256(weights).hexdigest()}
    card = json.loads(json.dumps(card, allow_nan=False))
    card["card_sha256"] = _card_sum(card)
    target = path.with_name(path.name + ".safetensors")
    with whole_files(target, path.with_name(path.name + ".json")) as (first, second):
        first.write_bytes(weights)
        second.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return target


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Load `path`.safetensors after verifying it against `path`.json.

    Parameters
    ----------
    path : path-like
        Path with or without one of the two endings.

    Raises
    ------
    FileNotFoundError
        If the weights or the card are missing.
    ValueError
        If the file is a pickle or not a safetensors file, its sha256 differs from the card's, the
        card is damaged or of another format, or the weights are not finite or do not fit its
        model.

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

    def read(ending: str) -> bytes:
        return stem.with_name(stem.name + ending).read_bytes()

    with suppress(_OtherWeights):
        return _load(stem.name, read)
    # Damaged, or replaced between the two reads: under the lock nobody can write.
    with locked(stem.parent):
        return _load(stem.name, read)


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
        If there is no checkpoint of that name; the message lists those that exist.
    ValueError
        If the file was damaged after it was shipped.

    Examples
    --------
    >>> load_pretrained("copy-mixture-1-goat").model.config.positions
    'goat'
    """
    check_shipped(name, list_pretrained())
    return _load(name, lambda ending: shipped_file(f"{name}{ending}").read_bytes())


class _OtherWeights(ValueError):
    """The weights are not those of the card."""


def _load(name: str, read: Callable[[str], bytes]) -> Checkpoint:
    card = _read_card(name, read(".json"))
    weights = read(".safetensors")
    digest = hashlib.sha256(weights).hexdigest()
    if digest != card["sha256"]:
        raise _OtherWeights(
            f"{name}.safetensors is not the file its card describes: sha256 {digest[:12]}... "
            f"over {len(weights)} bytes, the card says {card['sha256'][:12]}..."
        )
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}.safetensors is not a safetensors file: {error}") from error
    model = _model(name, card["model"], tensors)
    model.load_state_dict(tensors, assign=True)
    return Checkpoint(name=name, model=model.eval(), card=card)


def _model(name: str, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Transformer:
    """The model of a card on the meta device, after a check that `tensors` fit it.

    The cost is bounded by the size of the tensors, whatever sizes the card gives.
    """
    try:
        config = ModelConfig(**values)
        wrong = _misfit(config, tensors)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{name}.json does not describe a model: {error}") from error
    if wrong:
        raise ValueError(f"{name}.safetensors does not fit the model in its card: {wrong}")
    for key, tensor in tensors.items():
        # A recency slope of 0 is stored as softplus^-1(0).
        if not (tensor.isfinite() | (tensor.isneginf() & key.endswith("raw_slope"))).all():
            raise ValueError(f"{name}.safetensors must hold finite numbers, got others in {key}")
    with torch.device("meta"):
        return build_model(config).float()


def _misfit(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> str:
    """What is wrong with `tensors` as weights of a model; "" if they fit."""
    heads = max(config.num_heads, config.num_kv_heads or 1)
    held = sum(tensor.numel() for tensor in tensors.values())
    # On the meta device sizes cost nothing, but many layers and heads take time even there.
    if heads > held:
        return f"must hold numbers for {heads} heads, got {held} in all"
    with torch.device("meta"):
        single = build_model(replace(config, num_layers=1)).float().state_dict()
    first = "blocks.0."
    layer = {key.removeprefix(first): t for key, t in single.items() if key.startswith(first)}
    count = len(single) + (config.num_layers - 1) * len(layer)
    if len(tensors) != count:
        return f"must hold {count} tensors, got {len(tensors)}"
    wanted = single | {
        f"blocks.{at}.{key}": tensor
        for at in range(config.num_layers)
        for key, tensor in layer.items()
    }
    for key, tensor in wanted.items():
        if key not in tensors:
            return f"must hold {key}, got none"
        ours, theirs = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (tensor, tensors[key]))
        if ours != theirs:
            return f"{key} must be {ours}, got {theirs}"
    return ""


def _read_card(name: str, content: bytes) -> dict[str, Any]:
    try:
        card = json.loads(content, parse_constant=_no_number)
        digest = _card_sum(card) if isinstance(card, dict) else ""
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}.json is not a readable card: {error}") from error
    if not isinstance(card, dict) or card.get("format") not in (CARD_FORMAT, _FORMER_FORMAT):
        kind = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise ValueError(f"{name}.json must have format {CARD_FORMAT!r}, got {reprlib.repr(kind)}")
    sums = ("sha256", "card_sha256") if card["format"] == CARD_FORMAT else ("sha256",)
    missing = [key for key in (*sums, "model", "config") if key not in card]
    if missing:
        raise ValueError(f"{name}.json lacks {', '.join(missing)}")
    if not isinstance(card["sha256"], str):
        raise ValueError(
            f"{name}.json must hold its sha256 as text, got {reprlib.repr(card['sha256'])}"
        )
    for key in ("model", "config"):
        if not isinstance(card[key], dict):
            got = reprlib.repr(card[key])
            raise ValueError(f"{name}.json must hold {key} as an object, got {got}")
    if card.get("card_sha256", digest) != digest:
        raise ValueError(
            f"{name}.json was changed after it was saved: its card_sha256 is of another card"
        )
    return card


def _card_sum(card: dict[str, Any]) -> str:
    """The sha256 of a card's content, independent of the layout of its text."""
    content = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")
