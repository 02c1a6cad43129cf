"""How much memory a run will take, and how much there is.

Autograd itself counts the bytes that the backward pass keeps, in forward passes of one sequence at
three short lengths. They are a quadratic polynomial of the length, so nothing of the run's own
size is ever formed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from goatviz.models import Transformer, build_model
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import next_token_loss

# Lengths at which saved tensors are counted; long enough that no constant part dominates.
_PROBES = (64, 128, 256)
# The same for images: a class token and squares of patches.
_IMAGE_PROBES = (65, 122, 257)
# At their peak there are three copies of the logits: float32, log-probabilities, and gradient.
_LOGIT_COPIES = 3


class MemoryEstimate(NamedTuple):
    """Peak memory of one process of a run in bytes, beyond that of torch itself.

    Attributes
    ----------
    parameters : float
        Bytes of weights, gradients and the two moments of AdamW.
    activations : float
        Bytes that a micro-batch keeps for its backward pass, logits included.
    """

    parameters: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes of both together."""
        return self.parameters + self.activations


def estimate_memory(
    config: TrainConfig,
    *,
    parts: int = 1,
    mixed_precision: str = "no",
    checkpoint_activations: bool = False,
) -> MemoryEstimate:
    """The memory of a run before it starts.

    Parameters
    ----------
    config : TrainConfig
        The recipe.
    parts : int
        Number of micro-batches over all processes: processes x accumulation.
    mixed_precision : {"no", "bf16"}
        Precision of the forward pass.
    checkpoint_activations : bool
        Whether the backward pass recomputes the blocks.

    Notes
    -----
    Peaks measured on a CPU (resident memory, 3 to 6 layers, with and without checkpointing, lanes
    and dense bias) were 0.9 to 1.6 times the estimate.

    Examples
    --------
    >>> from goatviz.training.presets import preset
    >>> tiny = estimate_memory(preset("passkey"))
    >>> halves = estimate_memory(preset("passkey"), parts=2)
    >>> halves.activations == tiny.activations / 2
    True
    """
    sizes = config.model_config()
    # One layer and two: all further layers are equal.
    kept = [_kept(config, layers, mixed_precision) for layers in (1, 2)]
    block = np.polyval(kept[1] - kept[0], config.task.length)
    ends = np.polyval(2 * kept[0] - kept[1], config.task.length)
    if checkpoint_activations:
        stream = 4 * sizes.embed_dim * config.task.length
        activations = ends + block + sizes.num_layers * stream
    else:
        activations = ends + sizes.num_layers * block
    # The gradients of one block exist beside what all blocks keep.
    activations += block
    activations += 4 * (_LOGIT_COPIES - 1) * config.task.predicted * sizes.vocab_size
    sequences = config.batch_size / parts
    return MemoryEstimate(16.0 * _parameters(config), float(activations * sequences))


def free_memory(device: torch.device) -> float:
    """Bytes that are still free for a process on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available)
    # A container may allow less than the machine has.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, float(most) - float(used.read_text()))
    return free


def check_memory(estimate: MemoryEstimate, free: float, config: TrainConfig) -> None:
    """Raise a MemoryError with the estimate for one process, unless it fits into `free` bytes."""
    if estimate.total <= free:
        return
    raise MemoryError(
        f"{config.task.name} with batch_size={config.batch_size}, length={config.task.length}, "
        f"embed_dim={config.embed_dim} and num_layers={config.num_layers} needs about "
        f"{in_gigabytes(estimate.total)} for each process ({in_gigabytes(estimate.parameters)} for "
        f"parameters, {in_gigabytes(estimate.activations)} for activations), and "
        f"{in_gigabytes(free)} are free: raise accumulation, use checkpoint_activations or "
        "mixed_precision=bf16, or make the run smaller"
    )


def in_gigabytes(count: float) -> str:
    """Bytes as text."""
    return f"{count / 1e9:.2f} GB"


def _small(config: TrainConfig, layers: int, length: int = 1) -> Transformer:
    sizes = config.model_config()
    # Positions must reach as far as they are probed.
    longest = max(sizes.training_length, length)
    sizes = replace(sizes, num_layers=layers, training_length=longest)
    with torch.random.fork_rng(devices=[]):
        return build_model(sizes)


def _parameters(config: TrainConfig) -> int:
    one, two = (sum(p.numel() for p in _small(config, n).parameters()) for n in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def _kept(config: TrainConfig, layers: int, mixed_precision: str) -> np.ndarray:
    """Bytes kept for the backward pass of one sequence: a polynomial of the length."""
    probes = _PROBES if config.task.patch is None else _IMAGE_PROBES
    model = _small(config, layers, max(probes))
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    bytes_kept = []
    for length in probes:
        seen: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor, seen: dict = seen, alive: list = alive) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                seen[storage.data_ptr()] = storage.nbytes()
                # Kept alive: the address of freed storage could be used, and counted, again.
                alive.append(tensor)
            return tensor

        ids = torch.zeros((1, model.config.count_ids(length) + 1), dtype=torch.long)
        low = mixed_precision == "bf16"
        with (
            torch.autocast("cpu", torch.bfloat16) if low else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            next_token_loss(model, ids).sum()
        bytes_kept.append(sum(seen.values()))
    return np.polyfit(probes, bytes_kept, 2)
