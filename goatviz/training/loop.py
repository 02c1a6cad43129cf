"""The training loop.

Data come from the task by seed, so that two position schemes with one seed see the same tokens in
the same order.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from goatviz.models import CausalLM
from goatviz.priors.base import Prior
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import (
    HELD_OUT_STREAM,
    AnswerAccuracy,
    HeldOutLoss,
    evaluate,
    evaluate_answers,
    task_loss,
)


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
    answers : AnswerAccuracy or None
        On sequences never trained on; None for tasks without answers.
    wall_time : float
        Seconds, evaluation included.
    """

    model: CausalLM
    config: TrainConfig
    history: list[dict[str, float]] = field(default_factory=list)
    held_out: HeldOutLoss | None = None
    answers: AnswerAccuracy | None = None
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
            loss = task_loss(model, ids, config.task)
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
    held_out = config.seed + HELD_OUT_STREAM
    result.held_out = evaluate(model, config.task, seed=held_out)
    if config.task.answer_length:
        result.answers = evaluate_answers(model, config.task, seed=held_out)
    result.wall_time = time.perf_counter() - started
    return result


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
