"""Accuracy of answers at and beyond the training length, with counts and Wilson intervals.

A cell is one model at one length and depth, measured by
`goatviz.training.evaluation.evaluate_answers`; with a `cache` folder an interrupted sweep resumes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from goatviz import checks
from goatviz.analysis.cells import (
    Models,
    cached,
    check_cache,
    check_lengths,
    check_models,
    each_model,
    exceeds_positions,
    model_digest,
    trained_lengths,
)
from goatviz.analysis.intervals import share_fields
from goatviz.models import CausalLM
from goatviz.results import LENGTH_SWEEP, NEEDLE_GRID, check_result, make_result
from goatviz.tasks import Task
from goatviz.training.evaluation import CHUNK, HELD_OUT_STREAM, AnswerAccuracy, evaluate_answers

if TYPE_CHECKING:
    import xarray as xr

# Tokens of a batch: memory stays the same at every length.
_BATCH_TOKENS = 2**15
_COUNTS = ("examples", "right", "tokens", "right_tokens")
#: Counts of what is right, and of all, whose share is a measure.
_MEASURES = {"strict": ("right", "examples"), "token": ("right_tokens", "tokens")}
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

    All models get the same questions. Learned positions end at the training length: longer cells
    of such a model are missing (0 examples, NaN).

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        Models by scheme; several models of a scheme are runs with different seeds.
    task : Task
        `Passkey` or `Needle`; its own length does not matter.
    lengths : sequence of int
        Context lengths in tokens, increasing.
    examples : int or mapping of int to int
        Number of questions for each model and length, or the number by length.
    seed : int
        Seed of the questions.
    chunk : int
        Number of tokens that go through a model at a time.
    cache : path-like, optional
        Existing folder that keeps measured cells for later sweeps.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    xarray.Dataset
        Schema `length_sweep`: counts, and shares of whole answers ("strict") and of their tokens
        that are right, with 95 % Wilson intervals, for each run and over all runs of a scheme. The
        interval over all runs says how well the mean of these runs is known, not how much other
        seeds may differ.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or a length too short for the task.

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
    lengths = check_lengths(lengths)
    runs = max(len(run) for run in models.values())
    shape = (len(models), runs, len(lengths))
    data = {name: np.zeros(shape, dtype=int) for name in _COUNTS}
    data["log_probability"] = np.full(shape, np.nan)
    questions = _Questions.checked(task, lengths, (None,), examples, seed, chunk, cache)
    for (s, r, t, _), accuracy in _cells(models, questions, progress):
        for name, values in data.items():
            values[s, r, t] = getattr(accuracy, name)
    for measure, (right, unit) in _MEASURES.items():
        data |= share_fields(measure, data[right], data[unit])
        data |= share_fields(f"mean_{measure}", data[right].sum(axis=1), data[unit].sum(axis=1))
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
    """Accuracy of answers against length and depth, several runs of a scheme pooled.

    Parameters
    ----------
    models, task, lengths, examples, seed, chunk, cache, progress
        As in `length_sweep`.
    depths : sequence of float
        Places of the answer in the filler, increasing: 0 is its start, 1 just before the question.

    Returns
    -------
    xarray.Dataset
        Schema `needle_grid`: counts over all runs, and shares with 95 % Wilson intervals.

    Raises
    ------
    TypeError, ValueError
        As in `length_sweep`, and if a depth lies outside [0, 1].

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
    lengths = check_lengths(lengths)
    depths = [checks.number("depths", depth, low=0, high=1) for depth in depths]
    if not depths or sorted(set(depths)) != depths:
        raise ValueError(f"depths must be increasing numbers in [0, 1], got {depths}")
    shape = (len(models), len(depths), len(lengths))
    counts = {name: np.zeros(shape, dtype=int) for name in _COUNTS}
    questions = _Questions.checked(task, lengths, tuple(depths), examples, seed, chunk, cache)
    for (s, _, t, d), accuracy in _cells(models, questions, progress):
        for name, values in counts.items():
            values[s, d, t] += getattr(accuracy, name)
    data = {name: counts[name] for name in ("examples", "tokens")}
    for measure, (right, unit) in _MEASURES.items():
        data |= share_fields(measure, counts[right], counts[unit])
    return make_result(
        NEEDLE_GRID,
        data,
        coords={"scheme": list(models), "depth": depths, "length": lengths},
        attrs=_attrs(models, task, seed),
    )


def over_depths(grid: xr.Dataset) -> xr.Dataset:
    """A needle grid pooled over its depths: sums of right answers over sums of questions.

    Parameters
    ----------
    grid : xarray.Dataset
        From `needle_grid`.

    Returns
    -------
    xarray.Dataset
        Schema `needle_grid` without the dimension depth, like a selection of one depth; intervals
        are Wilson's of the pooled counts.

    Raises
    ------
    TypeError
        If `grid` is not a needle grid.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> grid = load_shipped_result("needle-grid")
    >>> pooled = over_depths(grid)
    >>> int(pooled["examples"].sel(scheme="goat", length=64))
    480
    """
    import xarray as xr

    check_result(grid, NEEDLE_GRID)
    data = {name: grid[name].sum("depth").values for name in ("examples", "tokens")}
    for measure, (_, unit) in _MEASURES.items():
        # A share times its count is a whole number up to rounding.
        right = (grid[measure].fillna(0.0) * grid[unit]).round().sum("depth").values
        data |= share_fields(measure, right, data[unit])
    fields = {name: (("scheme", "length"), values) for name, values in data.items()}
    pooled = xr.Dataset(
        {name: (*field, grid[name].attrs) for name, field in fields.items()},
        coords={"scheme": grid["scheme"].values, "length": grid["length"].values},
        attrs=grid.attrs,
    )
    return check_result(pooled, NEEDLE_GRID)


class _Questions(NamedTuple):
    """The questions of a sweep or grid, with a number of examples for each length.

    A depth of None leaves the depth to the task.
    """

    tasks: list[Task]
    examples: list[int]
    depths: tuple[float | None, ...]
    seed: int
    chunk: int
    cache: Path | None

    @classmethod
    def checked(
        cls,
        task: Task,
        lengths: Sequence[int],
        depths: tuple[float | None, ...],
        examples: int | Mapping[int, int],
        seed: int,
        chunk: int,
        cache: str | os.PathLike | None,
    ) -> _Questions:
        if not task.answer_length:
            raise ValueError(f"task must have answers (passkey, needle), got {task.name}")
        by_length = isinstance(examples, Mapping)
        counts = [
            checks.positive_int(
                f"examples at length {length}", examples.get(length) if by_length else examples
            )
            for length in lengths
        ]
        tasks = [task.at_length(length) for length in lengths]
        return cls(tasks, counts, depths, seed, chunk, check_cache(cache))


def farthest_scheme(values: xr.DataArray) -> str:
    r"""The scheme that differs most from the others at the longest length.

    .. math:: \arg\max_s |v_s - \operatorname{mean}_{s' \ne s} v_{s'}|

    Parameters
    ----------
    values : xarray.DataArray
        A number for each scheme and length, NaN where nothing was measured.

    Returns
    -------
    str
        Its name, at the longest length of which at least two schemes have a number; the first of
        equals, and the first of all if there is no such length.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> farthest_scheme(load_shipped_result("text-eltec")["mean_loss"])
    'rope-interpolated'
    """
    numbers = values.transpose("length", "scheme").values
    known = np.isfinite(numbers)
    several = np.flatnonzero(known.sum(-1) > 1)
    if not len(several):
        return str(values["scheme"].values[0])
    last = several[np.argmax(values["length"].values[several])]
    row, count = numbers[last], known[last].sum()
    others = (np.nansum(row) - row) / (count - 1)
    return str(values["scheme"].values[np.nanargmax(np.abs(row - others))])


def _cells(
    models: dict[str, list[CausalLM]], questions: _Questions, progress: bool
) -> Iterator[tuple[tuple[int, int, int, int], AnswerAccuracy]]:
    """The accuracy of every cell, with its numbers of scheme, run, length and depth."""
    tasks, depths = questions.tasks, questions.depths
    total = sum(map(len, models.values())) * len(tasks) * len(depths)
    with tqdm(total=total, disable=not progress, unit="cell") as bar:
        for s, r, scheme, model in each_model(models):
            digest = None if questions.cache is None else model_digest(model)
            for t, task in enumerate(tasks):
                bar.set_postfix_str(f"{scheme} {task.length}", refresh=False)
                for d, depth in enumerate(depths):
                    count = questions.examples[t]
                    yield (s, r, t, d), _cell(model, digest, task, count, depth, questions)
                    bar.update()


def _cell(
    model: CausalLM,
    digest: str | None,
    task: Task,
    examples: int,
    depth: float | None,
    questions: _Questions,
) -> AnswerAccuracy:
    if exceeds_positions(model, task.length):
        return _UNKNOWN
    seed = questions.seed
    # The questions drawn depend on the batch size, so it is part of the cell's name.
    batch = max(1, min(64, _BATCH_TOKENS // task.length))

    def measure() -> dict[str, int | float]:
        return evaluate_answers(
            model,
            task,
            examples=examples,
            batch_size=batch,
            seed=seed,
            depth=depth,
            chunk=questions.chunk,
        )._asdict()

    key = [digest, task.name, asdict(task), examples, batch, seed, depth]
    return AnswerAccuracy(**cached(questions.cache, f"{task.name}-{task.length}", key, measure))


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
