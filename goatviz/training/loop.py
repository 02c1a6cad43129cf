"""The training loop.

Data are drawn from the task by seed, so two position schemes with the same seed see the same tokens
in the same order.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from goatviz import checks
from goatviz.models import Transformer, build_model
from goatviz.priors.base import Prior
from goatviz.tasks import Task
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import (
    HELD_OUT_STREAM,
    AnswerAccuracy,
    HeldOutLoss,
    evaluate,
    evaluate_answers,
)
from goatviz.training.execution import Engine, Execution, start
from goatviz.training.log import RunLog
from goatviz.training.memory import check_memory, estimate_memory, free_memory, in_gigabytes
from goatviz.training.state import Progress, load_state, save_state


class OutOfTime(Exception):
    """A run reached its limit of time; its state is saved, and `resume` continues it."""


@dataclass
class TrainResult:
    """A finished run.

    Attributes
    ----------
    model : Transformer
        The model in evaluation mode.
    config : TrainConfig
        The recipe of the run.
    history : list of dict
        Values of step, loss (nats per token) and learning_rate, at regular steps.
    held_out : HeldOutLoss
        Loss on sequences that were not trained on.
    answers : AnswerAccuracy or None
        Accuracy on sequences that were not trained on; None for tasks without answers.
    wall_time : float
        Seconds, evaluation included.
    execution : dict
        Values of processes, mixed_precision, accumulation, compile and checkpoint_activations.
    is_main : bool
        Whether this is the process that writes files; True if there is only one.
    """

    model: Transformer
    config: TrainConfig
    history: list[dict[str, float]] = field(default_factory=list)
    held_out: HeldOutLoss | None = None
    answers: AnswerAccuracy | None = None
    wall_time: float = 0.0
    execution: dict[str, Any] = field(default_factory=dict)
    is_main: bool = True


def train(
    config: TrainConfig,
    *,
    execution: Execution | None = None,
    progress: bool = True,
    state: str | os.PathLike | None = None,
    save_every: int = 100,
    resume: bool = False,
    log: str | os.PathLike | None = None,
    log_every: int = 10,
    tensorboard: bool | None = None,
    minutes: float | None = None,
) -> TrainResult:
    """Train a model from scratch, or continue a run that was stopped.

    Processes started by `accelerate launch` or `torchrun` train one model on the same batches.

    Parameters
    ----------
    config : TrainConfig
        The whole recipe.
    execution : Execution, optional
        Device, precision and memory; default: a GPU if there is one, everything else off.
    progress : bool
        Show a bar with loss, tokens per second and time left, and an estimate of the memory.
    state : path-like, optional
        File in an existing folder, ending in .safetensors, that keeps the unfinished run. Remove
        it when the result is safe.
    save_every : int
        Steps from one writing of `state` to the next; it is also written after the last step.
    resume : bool
        Continue from `state`: on one machine the result equals, bit for bit, that of a run that
        was never stopped.
    log : path-like, optional
        File in an existing folder, ending in .jsonl, for one JSON line every `log_every` steps:
        step, loss (nats per token), learning_rate, tokens_per_second, seconds. `resume` continues
        it.
    log_every : int
        Steps from one line of `log` to the next.
    tensorboard : bool or None
        Whether to write the same values to TensorBoard, in a folder named `log` without its ending;
        None: if it is installed.
    minutes : float, optional
        Minutes of training, counted in this call, after which the step at work is finished, `state`
        is written and the run stops. At least one step is done, and the evaluation at the end of
        the run does not count.

    Raises
    ------
    OutOfTime
        If `minutes` are over before the last step; the message names the step.
    FloatingPointError
        If the loss is no longer finite; the message names the step.
    MemoryError
        If the run will not fit into memory; the message gives the estimate.
    FileNotFoundError
        If there is no `state` to resume.
    FileExistsError
        If there is a `state` and `resume` is False.
    TypeError, ValueError
        If `state` is damaged or belongs to another config, an argument is out of range, or the
        task cannot read its data.
    OSError
        If `state` cannot be written; the one written before is still there.

    Examples
    --------
    >>> from goatviz.tasks import CopyMixture
    >>> tiny = TrainConfig(task=CopyMixture(length=8, vocab_size=4), embed_dim=32, steps=2)
    >>> len(train(tiny, progress=False).history)
    2
    """
    checks.instance("config", config, TrainConfig, "a TrainConfig")
    execution = Execution() if execution is None else execution
    checks.instance("execution", execution, Execution, "an Execution")
    checks.positive_int("save_every", save_every)
    checks.positive_int("log_every", log_every)
    state = _check_state(state, resume)
    if minutes is not None:
        checks.number("minutes", minutes, above=0)
        if state is None:
            raise ValueError("minutes needs a file for the unfinished run, got state=None")
    with start(execution) as engine:
        engine.check(config)
        _announce_memory(config, engine, progress and engine.is_main)
        held_out = config.task.held_out()
        return _run(
            config,
            engine,
            held_out,
            _Reports(progress, state, save_every, resume, log, log_every, tensorboard, minutes),
        )


class _Reports(NamedTuple):
    """What a run writes and shows; see `train`."""

    progress: bool
    state: Path | None
    save_every: int
    resume: bool
    log: str | os.PathLike | None
    log_every: int
    tensorboard: bool | None
    minutes: float | None


def _run(config: TrainConfig, engine: Engine, held_out: Task, reports: _Reports) -> TrainResult:
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_model(config.model_config()).to(engine.device)
    data = torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.98))
    parts = {"config": config, "model": model, "optimizer": optimizer, "data": data}
    result = TrainResult(
        model=model, config=config, execution=engine.describe(), is_main=engine.is_main
    )
    first, before = 0, 0.0
    if reports.resume:
        first, before, result.history = load_state(reports.state, **parts)
    # No process writes before all have read.
    engine.accelerator.wait_for_everyone()
    model.train()
    trained, stepper = engine.prepare(model, optimizer)
    every = max(1, config.steps // 100)
    tokens = config.batch_size * config.task.length
    speaks = engine.is_main
    logging = (
        RunLog(reports.log, first=first, tensorboard=reports.tensorboard)
        if reports.log is not None and speaks
        else nullcontext()
    )
    with (
        logging as log,
        tqdm(
            initial=first,
            total=config.steps,
            disable=not (reports.progress and speaks),
            unit="step",
            desc=config.positions,
        ) as bar,
    ):
        for step in range(first, config.steps):
            rate = _set_rates(optimizer, _warmup_cosine(step, config.warmup, config.steps))
            loss = engine.take_step(config, trained, stepper, data, step)
            last = step == config.steps - 1
            elapsed = time.perf_counter() - started
            speed = (step + 1 - first) * tokens / elapsed
            if step % every == 0 or last:
                result.history.append({"step": step + 1, "loss": loss, "learning_rate": rate})
                bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:,.0f}", refresh=False)
            if log is not None and (step % reports.log_every == 0 or last):
                log.write(
                    step + 1,
                    loss=loss,
                    learning_rate=rate,
                    tokens_per_second=speed,
                    seconds=before + elapsed,
                )
            bar.update()
            late = reports.minutes is not None and engine.any(elapsed > 60 * reports.minutes)
            due = (step + 1) % reports.save_every == 0 or last or late
            if reports.state is not None and speaks and due:
                save_state(
                    reports.state, Progress(step + 1, before + elapsed, result.history), **parts
                )
            if late and not last:
                raise OutOfTime(
                    f"stopped at step {step + 1:,} of {config.steps:,}, after {reports.minutes:g} "
                    f"minutes; its state is in {reports.state}"
                )
    engine.release(trained, model)
    stream = config.seed + HELD_OUT_STREAM
    result.held_out = evaluate(model, held_out, seed=stream)
    if held_out.answer_length:
        result.answers = evaluate_answers(model, held_out, seed=stream)
    result.wall_time = before + time.perf_counter() - started
    return result


def _announce_memory(config: TrainConfig, engine: Engine, aloud: bool) -> None:
    estimate = estimate_memory(
        config,
        parts=engine.processes * engine.execution.accumulation,
        mixed_precision=engine.accelerator.mixed_precision,
        checkpoint_activations=engine.execution.checkpoint_activations,
    )
    free = free_memory(engine.device)
    check_memory(estimate, free, config)
    if aloud:
        tqdm.write(
            f"about {in_gigabytes(estimate.total)} of memory will be used, "
            f"{in_gigabytes(free)} are free",
            file=sys.stderr,
        )


def _check_state(state: str | os.PathLike | None, resume: bool) -> Path | None:
    if state is None:
        if resume:
            raise ValueError("resume needs the state file of the run, got state=None")
        return None
    path = checks.output_file("state", state, ".safetensors")
    if path.exists() and not resume:
        raise FileExistsError(f"state {path} is of an unfinished run: resume it or remove it")
    return path


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale the peak rate of every group; return the rate of the first."""
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
