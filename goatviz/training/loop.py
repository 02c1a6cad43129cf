"""The training loop.

Data come from the task by seed, so that two position schemes with one seed see the same tokens in
the same order.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

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
from goatviz.training.state import Progress, load_state, save_state


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
    config: TrainConfig,
    *,
    progress: bool = True,
    device: str | torch.device = "cpu",
    state: str | os.PathLike | None = None,
    save_every: int = 100,
    resume: bool = False,
) -> TrainResult:
    """Train a model from scratch, or go on with a run that was stopped.

    Parameters
    ----------
    config : TrainConfig
        The whole recipe.
    progress : bool
        Show a bar with loss, tokens per second and time left.
    device : str or torch.device
        Where to train.
    state : path-like, optional
        File, in an existing folder, that keeps the unfinished run; it ends in .safetensors. Remove
        it when the result is safe.
    save_every : int
        Steps between two writings of `state`; it is also written after the last step.
    resume : bool
        Go on from `state`: the result is that of a run never stopped, bit for bit on one machine.

    Raises
    ------
    FloatingPointError
        If the loss stops being finite; it names the step.
    FileNotFoundError
        If there is no `state` to resume.
    FileExistsError
        If there is a `state` and `resume` was not asked for.
    ValueError
        If `state` is damaged or belongs to another config, an argument does not fit, or the task's
        data are not what they should be.
    OSError
        If `state` cannot be written; the one written before is still there.

    Examples
    --------
    >>> from goatviz.tasks import CopyMixture
    >>> tiny = TrainConfig(task=CopyMixture(length=8, vocab_size=4), embed_dim=32, steps=2)
    >>> len(train(tiny, progress=False).history)
    2
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    state = _check_state(state, save_every, resume)
    held_out = config.task.held_out()
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = CausalLM(config.model_config()).to(device)
    data = torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.98))
    parts = {"config": config, "model": model, "optimizer": optimizer, "data": data}
    result = TrainResult(model=model, config=config)
    first, before = 0, 0.0
    if resume:
        first, before, result.history = load_state(state, **parts)
    every = max(1, config.steps // 100)
    model.train()
    with tqdm(
        initial=first,
        total=config.steps,
        disable=not progress,
        unit="step",
        desc=config.positions,
    ) as bar:
        for step in range(first, config.steps):
            rate = _set_rates(optimizer, _warmup_cosine(step, config.warmup, config.steps))
            loss = _take_step(config, model, optimizer, data, step)
            if step % every == 0 or step == config.steps - 1:
                result.history.append({"step": step + 1, "loss": loss, "learning_rate": rate})
                elapsed = time.perf_counter() - started
                speed = (step + 1 - first) * config.batch_size * config.task.length / elapsed
                bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:,.0f}", refresh=False)
            bar.update()
            if state is not None and ((step + 1) % save_every == 0 or step == config.steps - 1):
                seconds = before + time.perf_counter() - started
                save_state(state, Progress(step + 1, seconds, result.history), **parts)
    stream = config.seed + HELD_OUT_STREAM
    result.held_out = evaluate(model, held_out, seed=stream)
    if held_out.answer_length:
        result.answers = evaluate_answers(model, held_out, seed=stream)
    result.wall_time = before + time.perf_counter() - started
    return result


def _check_state(state: str | os.PathLike | None, save_every: int, resume: bool) -> Path | None:
    if isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1:
        raise ValueError(f"save_every must be an integer of at least 1, got {save_every!r}")
    if state is None:
        if resume:
            raise ValueError("resume needs the state file of the run, got state=None")
        return None
    path = Path(state)
    if path.suffix != ".safetensors":
        raise ValueError(f"state must end in .safetensors, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"state must lie in an existing folder, got {path}")
    if path.exists() and not resume:
        raise FileExistsError(f"state {path} is of an unfinished run: resume it or remove it")
    return path


def _take_step(
    config: TrainConfig,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    data: torch.Generator,
    step: int,
) -> float:
    """One optimiser step on the next batch; its loss in nats."""
    device = next(model.parameters()).device
    ids = config.task.sample(config.batch_size, generator=data).to(device)
    loss = task_loss(model, ids, config.task)
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return loss.item()


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's peak rate; the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]


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
    groups = [{"lr": rate, **group} for group in groups if group["params"]]
    return [{**group, "peak": group["lr"]} for group in groups]


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))
