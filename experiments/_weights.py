"""Weights in half precision, in files small enough to be taken home, and back into a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from goatviz import checks
from goatviz.files import whole_file
from goatviz.models import CausalLM, ModelConfig
from goatviz.training import load_checkpoint, save_checkpoint

#: Most bytes of weights in a file; its header is far below a megabyte more.
SHARD_BYTES = 15_000_000
#: What a card says of weights that came this way.
ROUNDED = "rounded to float16 for transport"


def write_shards(
    checkpoint: Path, out: Path, size: int = SHARD_BYTES, *, chosen: Sequence[int] | None = None
) -> list[Path]:
    """Write NAME.1-of-3.safetensors, ...: the weights as float16, the card in every file.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint, without an ending.
    out : Path
        Folder; created if missing.
    size : int
        Most bytes of weights in a file, at least 2.
    chosen : sequence of int, optional
        Numbers of the files to write, from 1; default all.

    Raises
    ------
    ValueError
        If there is no file of a chosen number, or `size` is out of range.
    """
    checks.integer("size", size, low=2)
    loaded = load_checkpoint(checkpoint)
    shards = _shards(loaded.model.state_dict(), size)
    numbers = range(1, len(shards) + 1)
    chosen = list(numbers if chosen is None else chosen)
    if wrong := [number for number in chosen if number not in numbers]:
        raise ValueError(f"--shards must lie between 1 and {len(shards)}, got {wrong}")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in chosen:
        paths.append(out / f"{loaded.name}.{number}-of-{len(shards)}.safetensors")
        metadata = {"format": "pt", "card": json.dumps(loaded.card)}
        with whole_file(paths[-1]) as temporary:
            save_file(shards[number - 1], temporary, metadata=metadata)
    return paths


def join_shards(folder: Path, name: str, out: Path) -> Path:
    """Make a checkpoint of files from `write_shards`; its card says that its weights were rounded.

    Raises
    ------
    FileNotFoundError
        If a file is missing; the message names those that are.
    ValueError
        If the files are not of one run, or the checkpoint cannot be loaded.
    """
    paths = sorted(folder.glob(f"{name}.*-of-*.safetensors"))
    count = int(paths[0].stem.rsplit("-", 1)[1]) if paths else 1
    wanted = [folder / f"{name}.{number}-of-{count}.safetensors" for number in range(1, count + 1)]
    if missing := [path.name for path in wanted if path not in paths]:
        raise FileNotFoundError(f"{folder} must hold {', '.join(missing)}")
    parts: dict[str, list[Tensor]] = {}
    cards = set()
    for path in wanted:
        with safe_open(path, framework="pt") as file:
            cards.add(file.metadata()["card"])
            for key in file.keys():  # noqa: SIM118
                name_of, first = key.rsplit("@", 1)
                parts.setdefault(name_of, []).append((int(first), file.get_tensor(key)))
    if len(cards) != 1:
        raise ValueError(f"{folder} holds files of several runs by the name of {name}")
    card = json.loads(cards.pop())
    model = CausalLM(ModelConfig(**card["model"]))
    state = {
        key: torch.cat([part for _, part in sorted(parts[key], key=lambda each: each[0])])
        .view(wanted.shape)
        .float()
        for key, wanted in model.state_dict().items()
    }
    model.load_state_dict(state)
    out.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(model, card | {"weights": ROUNDED}, out / name)


def _shards(weights: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Weights, flat, as float16, by name and first number, in dicts of at most `size` bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    free = size
    for key, part in _parts(weights, size):
        if part.nbytes > free:
            shards.append({})
            free = size
        shards[-1][key] = part
        free -= part.nbytes
    return shards


def _parts(weights: dict[str, Tensor], size: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        first = 0
        for part in tensor.detach().half().flatten().split(size // 2):
            yield f"{name}@{first}", part.clone()
            first += len(part)
