"""How much memory a run takes, said before it starts, and how much there is.

What the backward pass keeps is counted by autograd itself on three tiny forward passes, and is a
quadratic polynomial of the length; nothing of the run's own size is formed to find out.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from goatviz.models import CausalLM
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import next_token_loss

# Lengths at which saved tensors are counted; longer than any prior's own constants.
_PROBES = (64, 128, 256)
# Logits live three times at their peak: in float32, as log-probabilities and as their gradient.
_LOGIT_COPIES = 3


class MemoryEstimate(NamedTuple):
    """Bytes that one process of a run takes at its peak, beyond torch itself.

    Attributes
    ----------
    parameters : float
        Weights, gradients and the two moments of AdamW.
    activations : float
        What a micro-batch keeps for its backward pass, logits included.
    """

    parameters: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes."""
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
        Micro-batches over all processes: processes x accumulation.
    mixed_precision : {"no", "bf16"}
        Precision of the forward pass.
    checkpoint_activations : bool
        Whether blocks are computed again.

    Notes
    -----
    Peaks measured on a CPU (resident memory, 3 to 6 layers, with and without checkpointing, lanes
    and dense bias) lay between 0.9 and 1.6 times the estimate.

    Examples
    --------
    >>> from goatviz.training.presets import preset
    >>> tiny = estimate_memory(preset("passkey"))
    >>> halves = estimate_memory(preset("passkey"), parts=2)
    >>> halves.activations == tiny.activations / 2
    True
    """
    sizes = config.model_config()
    # One layer and two: the rest are alike.
    kept = [_kept(config, layers, mixed_precision) for layers in (1, 2)]
    block = np.polyval(kept[1] - kept[0], config.task.length)
    ends = np.polyval(2 * kept[0] - kept[1], config.task.length)
    if checkpoint_activations:
        stream = 4 * sizes.embed_dim * config.task.length
        activations = ends + block + sizes.num_layers * stream
    else:
        activations = ends + sizes.num_layers * block
    # The gradients of one block live beside what all of them keep.
    activations += block
    activations += 4 * (_LOGIT_COPIES - 1) * config.task.length * sizes.vocab_size
    sequences = config.batch_size / parts
    return MemoryEstimate(16.0 * _parameters(config), float(activations * sequences))


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available)
    # Inside a container the machine's memory is not ours.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, float(most) - float(used.read_text()))
    return free


def check_memory(estimate: MemoryEstimate, free: float, config: TrainConfig) -> None:
    """Raise a MemoryError that says the estimate, unless it fits.

    Parameters
    ----------
    estimate : MemoryEstimate
        The estimate for one process.
    free : float
        Bytes.
    config : TrainConfig
        What to name in the message.
    """
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


def _small(config: TrainConfig, layers: int, length: int = 1) -> CausalLM:
    sizes = config.model_config()
    # Positions must reach as far as they are probed.
    longest = max(sizes.training_length, length)
    sizes = replace(sizes, num_layers=layers, training_length=longest)
    with torch.random.fork_rng(devices=[]):
        return CausalLM(sizes)


def _parameters(config: TrainConfig) -> int:
    one, two = (sum(p.numel() for p in _small(config, n).parameters()) for n in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def _kept(config: TrainConfig, layers: int, mixed_precision: str) -> np.ndarray:
    """Bytes kept for the backward pass of one sequence: a polynomial of the length."""
    model = _small(config, layers, max(_PROBES))
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    bytes_kept = []
    for length in _PROBES:
        seen: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor, seen: dict = seen, alive: list = alive) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                seen[storage.data_ptr()] = storage.nbytes()
                # Freed storage would be counted again under the same address.
                alive.append(tensor)
            return tensor

        ids = torch.zeros((1, length + 1), dtype=torch.long)
        low = mixed_precision == "bf16"
        with (
            torch.autocast("cpu", torch.bfloat16) if low else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            next_token_loss(model, ids).sum()
        bytes_kept.append(sum(seen.values()))
    return np.polyfit(_PROBES, bytes_kept, 2)
