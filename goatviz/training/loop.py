"""The training loop and held-out evaluation.

Data come from the task by seed, so that two position schemes with one seed see the same tokens in
the same order.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from goatviz.models import CausalLM
from goatviz.priors.base import Prior
from goatviz.tasks.copy_mixture import CopyMixture
from goatviz.training.config import TrainConfig

#: Added to a run's seed for held-out data: a stream no training run of that seed ever draws from.
HELD_OUT_STREAM = 1_000_003


class HeldOutLoss(NamedTuple):
    """Mean loss in nats per token, its standard error over sequences, and how many there were."""

    mean: float
    standard_error: float
    sequences: int


@dataclass
class TrainResult:
    """A finished run.

    Attributes
    ----------
    model : CausalLM
        In evaluation mode.
    config : TrainConfig
        What was run.
    history : list of dict
        step, loss (nats per token), learning_rate, at regular steps.
    held_out : HeldOutLoss
        On sequences never trained on.
    wall_time : float
        Seconds, evaluation included.
    """

    model: CausalLM
    config: TrainConfig
    history: list[dict[str, float]] = field(default_factory=list)
    held_out: HeldOutLoss | None = None
    wall_time: float = 0.0


def train(
    config: TrainConfig, *, progress: bool = True, device: str | torch.device = "cpu"
) -> TrainResult:
    """Train a model from scratch.

    Parameters
    ----------
    config : TrainConfig
        The whole recipe.
    progress : bool
        Show a bar with loss, tokens per second and time left.
    device : str or torch.device
        Where to train.

    Raises
    ------
    FloatingPointError
        If the loss stops being finite; it names the step.

    Examples
    --------
    >>> from goatviz.tasks import CopyMixture
    >>> tiny = TrainConfig(task=CopyMixture(length=8, vocab_size=4), embed_dim=32, steps=2)
    >>> len(train(tiny, progress=False).history)
    2
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = CausalLM(config.model_config()).to(device)
    data = torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, config.warmup, config.steps)
    )
    result = TrainResult(model=model, config=config)
    every = max(1, config.steps // 100)
    model.train()
    bar = tqdm(total=config.steps, disable=not progress, unit="step", desc=config.positions)
    with bar:
        for step in range(config.steps):
            ids = config.task.sample(config.batch_size, generator=data).to(device)
            loss = next_token_loss(model, ids).mean()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == config.steps - 1:
                result.history.append(
                    {"step": step + 1, "loss": loss.item(), "learning_rate": rate}
                )
                elapsed = time.perf_counter() - started
                speed = (step + 1) * config.batch_size * config.task.length / elapsed
                bar.set_postfix(loss=f"{loss.item():.3f}", tok_s=f"{speed:,.0f}", refresh=False)
            bar.update()
    result.held_out = evaluate(model, config.task, seed=config.seed + HELD_OUT_STREAM)
    result.wall_time = time.perf_counter() - started
    return result


@torch.no_grad()
def evaluate(
    model: CausalLM,
    task: CopyMixture,
    *,
    sequences: int = 4096,
    batch_size: int = 256,
    seed: int = HELD_OUT_STREAM,
) -> HeldOutLoss:
    """Loss on fresh sequences, nats per predicted token, with its standard error.

    Parameters
    ----------
    model : CausalLM
        Left in evaluation mode.
    task : CopyMixture
        Of any length.
    sequences, batch_size : int
        How many, and how many at a time.
    seed : int
        Of the sequences.
    """
    if sequences < 2:
        raise ValueError(f"sequences must be at least 2, got {sequences}")
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for start in range(0, sequences, batch_size):
        count = min(batch_size, sequences - start)
        ids = task.sample(count, generator=generator).to(device)
        losses.append(next_token_loss(model, ids).mean(dim=-1).double().cpu())
    each = torch.cat(losses)
    return HeldOutLoss(each.mean().item(), (each.std() / math.sqrt(len(each))).item(), len(each))


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token, nats, shape (batch, length - 1)."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    prior = {id(p) for m in model.modules() if isinstance(m, Prior) for p in m.parameters()}
    priors = [p for p in model.parameters() if id(p) in prior]
    others = [p for p in model.parameters() if id(p) not in prior]
    rate = config.learning_rate
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        {
            "params": priors,
            "weight_decay": 0.0,
            "lr": rate if config.prior_learning_rate is None else config.prior_learning_rate,
        },
    ]
    return [{"lr": rate, **group} for group in groups if group["params"]]


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))
