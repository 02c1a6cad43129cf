"""How well answers are found beyond the training length, with counts and intervals.

Each cell (model, length, depth) is measured once: with a `cache` folder a sweep that was stopped
goes on where it was. What a cell measures is `goatviz.training.evaluation.evaluate_answers`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from goatviz.analysis.cells import (
    Models,
    cached,
    check_cache,
    check_lengths,
    check_models,
    model_digest,
    trained_lengths,
)
from goatviz.analysis.intervals import wilson_interval
from goatviz.models import CausalLM
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, check_result, make_result
from goatviz.tasks import Task
from goatviz.training.evaluation import CHUNK, HELD_OUT_STREAM, AnswerAccuracy, evaluate_answers

# Tokens of a batch: memory stays the same at every length.
_BATCH_TOKENS = 2**15
_UNKNOWN = AnswerAccuracy(0, 0, 0, 0, math.nan)


def length_sweep(
    models: Models,
    task: Task,
    *,
    lengths: Sequence[int],
    examples: int | Mapping[int, int] = 256,
    seed: int = HELD_OUT_STREAM,
    chunk: int = CHUNK,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Accuracy of answers against length, for several schemes and training seeds.

    All models are asked the same questions. Positions learned one by one end at the training
    length: longer cells are missing (0 examples, NaN).

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        By scheme; several models of a scheme are runs with different seeds.
    task : Task
        `Passkey` or `Needle`; its own length does not matter.
    lengths : sequence of int
        Tokens of context, increasing.
    examples : int or mapping
        For each model and length; by length if a mapping.
    seed : int
        Of the questions.
    chunk : int
        Tokens that go through a model at a time.
    cache : path-like, optional
        Existing folder in which cells are kept and found again.
    progress : bool
        Show a bar.

    Returns
    -------
    xarray.Dataset
        Schema `length_sweep`: counts, shares of whole answers ("strict") and of their tokens with
        Wilson intervals, for each run and over all runs of a scheme. The interval over all runs
        says how well the mean of these runs is known, not how far other seeds may lie.

    Raises
    ------
    ValueError
        If models, lengths or examples do not fit, or a length is too short for the task.
    TypeError
        If a model is not a CausalLM.

    Notes
    -----
    Teacher-forced accuracy over lengths is the passkey experiment of Litman and Guo 2026.

    Examples
    --------
    >>> from goatviz import ModelConfig, Needle
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> sweep = length_sweep({"goat": model}, Needle(), lengths=[32, 64], examples=2)
    >>> sweep["tokens"].values.tolist()
    [[[24, 24]]]
    """
    models = check_models(models, task)
    _check_answers(task)
    lengths = check_lengths(lengths)
    runs = max(len(each) for each in models.values())
    cells = np.full((len(models), runs, len(lengths)), None, dtype=object)
    asked = _Asked(task, lengths, (None,), examples, seed, chunk, cache, progress)
    for (s, r, t, _), found in _cells(models, asked):
        cells[s, r, t] = found
    counts = _counts(cells)
    data = {
        name: counts[name]
        for name in ("examples", "right", "tokens", "right_tokens", "log_probability")
    }
    data |= _shares("strict", counts["right"], counts["examples"])
    data |= _shares("token", counts["right_tokens"], counts["tokens"])
    pooled = {name: counts[name].sum(axis=1) for name in ("examples", "right", "tokens")}
    data |= _shares("mean_strict", pooled["right"], pooled["examples"])
    data |= _shares("mean_token", counts["right_tokens"].sum(axis=1), pooled["tokens"])
    return make_result(
        LENGTH_SWEEP,
        data,
        coords={"scheme": list(models), "run": np.arange(runs), "length": lengths},
        attrs=_attrs(models, task, seed),
    )


def needle_grid(
    models: Models,
    task: Task,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    examples: int | Mapping[int, int] = 64,
    seed: int = HELD_OUT_STREAM,
    chunk: int = CHUNK,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Accuracy of answers against length and depth; several runs of a scheme are pooled.

    Parameters
    ----------
    models, task, lengths, examples, seed, chunk, cache, progress
        As in `length_sweep`.
    depths : sequence of float
        Where the pair stands in the filler, 0 = first, 1 = just before the question.

    Returns
    -------
    xarray.Dataset
        Schema `needle_grid`.

    Raises
    ------
    ValueError, TypeError
        As in `length_sweep`; and if a depth lies outside [0, 1].

    Notes
    -----
    The needle experiment of Litman and Guo 2026 scores tokens: chance is 1 in 4, not 0.

    Examples
    --------
    >>> from goatviz import ModelConfig, Needle
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> grid = needle_grid({"goat": model}, Needle(), lengths=[32], depths=[0.5], examples=2)
    >>> grid["tokens"].values.tolist()
    [[[24]]]
    """
    models = check_models(models, task)
    _check_answers(task)
    lengths = check_lengths(lengths)
    depths = [float(depth) for depth in depths]
    if not depths or any(not 0 <= d <= 1 for d in depths) or sorted(set(depths)) != depths:
        raise ValueError(f"depths must be increasing numbers in [0, 1], got {depths}")
    shape = (len(models), len(depths), len(lengths))
    counts = {name: np.zeros(shape, dtype=int) for name in AnswerAccuracy._fields[:4]}
    asked = _Asked(task, lengths, tuple(depths), examples, seed, chunk, cache, progress)
    for (s, _, t, d), found in _cells(models, asked):
        for name, values in counts.items():
            values[s, d, t] += getattr(found, name)
    data = {name: counts[name] for name in ("examples", "tokens")}
    data |= _shares("token", counts["right_tokens"], counts["tokens"])
    data |= _shares("strict", counts["right"], counts["examples"])
    return make_result(
        NEEDLE_GRID,
        data,
        coords={"scheme": list(models), "depth": depths, "length": lengths},
        attrs=_attrs(models, task, seed),
    )


def over_depths(grid: xr.Dataset) -> xr.Dataset:
    """A needle grid with its depths pooled: right answers and questions are summed over them.

    Parameters
    ----------
    grid : xarray.Dataset
        From `needle_grid`.

    Returns
    -------
    xarray.Dataset
        Schema `needle_grid` without the dimension depth, as a selection of one depth has none;
        Wilson intervals of the pooled counts.

    Raises
    ------
    TypeError
        If `grid` is no needle grid.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> grid = load_shipped_result("needle-grid")
    >>> pooled = over_depths(grid)
    >>> int(pooled["examples"].sel(scheme="goat", length=64))
    480
    """
    check_result(grid, NEEDLE_GRID)
    data = {name: grid[name].sum("depth").values for name in ("examples", "tokens")}
    for name, unit in (("token", "tokens"), ("strict", "examples")):
        # A share times its count is a whole number up to rounding.
        right = (grid[name].fillna(0.0) * grid[unit]).round().sum("depth").values
        data |= _shares(name, right, data[unit])
    fields = {name: (("scheme", "length"), values) for name, values in data.items()}
    pooled = xr.Dataset(
        {name: (*field, grid[name].attrs) for name, field in fields.items()},
        coords={"scheme": grid["scheme"].values, "length": grid["length"].values},
        attrs=grid.attrs,
    )
    return check_result(pooled, NEEDLE_GRID)


class _Asked(NamedTuple):
    """The questions of a sweep or grid; a depth of None is the task's own."""

    task: Task
    lengths: list[int]
    depths: tuple[float | None, ...]
    examples: int | Mapping[int, int]
    seed: int
    chunk: int
    cache: str | os.PathLike | None
    progress: bool


def _cells(
    models: dict[str, list[CausalLM]], asked: _Asked
) -> Iterator[tuple[tuple[int, int, int, int], AnswerAccuracy]]:
    """Every cell with its place: scheme, run, length, depth."""
    tasks = [asked.task.at_length(length) for length in asked.lengths]
    wanted = [_examples(asked.examples, length) for length in asked.lengths]
    folder = check_cache(asked.cache)
    total = sum(len(each) for each in models.values()) * len(tasks) * len(asked.depths)
    with tqdm(total=total, disable=not asked.progress, unit="cell") as bar:
        for s, (scheme, each) in enumerate(models.items()):
            for r, model in enumerate(each):
                digest = None if folder is None else model_digest(model)
                for t, (task, count) in enumerate(zip(tasks, wanted, strict=True)):
                    for d, depth in enumerate(asked.depths):
                        bar.set_postfix_str(f"{scheme} {task.length}", refresh=False)
                        found = _cell(
                            model, digest, task, count, asked.seed, depth, asked.chunk, folder
                        )
                        yield (s, r, t, d), found
                        bar.update()


def _check_answers(task: Task) -> None:
    if not task.answer_length:
        raise ValueError(f"task must have answers (passkey, needle), got {task.name}")


def _examples(examples: int | Mapping[int, int], length: int) -> int:
    count = examples.get(length) if isinstance(examples, Mapping) else examples
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"examples must be at least 1 at length {length}, got {count!r}")
    return count


def _cell(
    model: CausalLM,
    digest: str | None,
    task: Task,
    examples: int,
    seed: int,
    depth: float | None,
    chunk: int,
    folder: Path | None,
) -> AnswerAccuracy:
    if model.config.positions == "learned" and task.length > model.config.training_length:
        return _UNKNOWN
    # Part of what is drawn, so part of a cell's name too.
    batch = max(1, min(64, _BATCH_TOKENS // task.length))
    asked = [digest, task.name, asdict(task), examples, batch, seed, depth]
    found = cached(
        folder,
        f"{task.name}-{task.length}",
        asked,
        lambda: evaluate_answers(
            model, task, examples=examples, batch_size=batch, seed=seed, depth=depth, chunk=chunk
        )._asdict(),
    )
    return AnswerAccuracy(**found)


def _counts(cells: np.ndarray) -> dict[str, np.ndarray]:
    filled = [_UNKNOWN if cell is None else cell for cell in cells.flat]
    return {
        name: np.array([getattr(cell, name) for cell in filled]).reshape(cells.shape)
        for name in AnswerAccuracy._fields
    }


def _shares(name: str, right: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore"):
        share = right / count
    low, high = wilson_interval(right, count)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def _attrs(
    models: dict[str, list[CausalLM]], task: Task, seed: int
) -> dict[str, str | int | float]:
    return {
        "task": task.name,
        "task_options": json.dumps(asdict(task), sort_keys=True),
        "training_length": trained_lengths(models),
        "chance_token": task.chance,
        "chance_strict": task.strict_chance,
        "seed": seed,
    }
