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
from typing import TYPE_CHECKING, Any, NamedTuple

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
from goatviz.analysis.perplexity import SAME, asked_pieces, joined_losses
from goatviz.models import CausalLM
from goatviz.results import (
    LENGTH_SWEEP,
    NEEDLE_GRID,
    PERPLEXITY_SWEEP,
    check_result,
    make_result,
)
from goatviz.tasks import DNA, Task, Text
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

    All models get the same questions. Learned positions of a sequence end at the training length:
    longer cells of such a model are missing (0 examples, NaN).

    Parameters
    ----------
    models : mapping of str to Transformer or sequence of Transformer
        Models by scheme, `CausalLM`s or, for images, `ImageClassifier`s; several models of a scheme
        are runs with different seeds.
    task : Task
        `Passkey`, `Needle` or `Images`; its own length does not matter, and images are those of
        its held-out part.
    lengths : sequence of int
        Context lengths in tokens, increasing; those of images are 1 + n x n patches.
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
    return _swept(data, list(models), lengths, _attrs(models, task, seed))


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
    coords = {"scheme": list(models), "depth": depths, "length": lengths}
    return make_result(
        NEEDLE_GRID, _pooled(counts), coords=coords, attrs=_attrs(models, task, seed)
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
    800
    """
    import xarray as xr

    check_result(grid, NEEDLE_GRID)
    data = _pooled({name: counts.sum(axis=1) for name, counts in _grid_counts(grid).items()})
    fields = {name: (("scheme", "length"), values) for name, values in data.items()}
    pooled = xr.Dataset(
        {name: (*field, grid[name].attrs) for name, field in fields.items()},
        coords={"scheme": grid["scheme"].values, "length": grid["length"].values},
        attrs=grid.attrs,
    )
    return check_result(pooled, NEEDLE_GRID)


def join_sweeps(*sweeps: xr.Dataset) -> xr.Dataset:
    """Sweeps of the same questions as one, such as those of seeds that were trained later.

    Parameters
    ----------
    *sweeps : xarray.Dataset
        All from `length_sweep`, from `needle_grid` or from `perplexity_sweep`: of one task, with
        the same schemes, lengths and training length, and the same questions or pieces.

    Returns
    -------
    xarray.Dataset
        Same schema. Runs stand in the order of the sweeps, numbered from 0; in a grid they are
        pooled. Means, shares and intervals are those of all runs together.

    Raises
    ------
    TypeError
        If there is no sweep, or one of another kind than the first.
    ValueError
        If they were not asked the same questions, or did not read the same pieces.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> sweep = load_shipped_result("needle-sweep")
    >>> join_sweeps(sweep.isel(run=[0]), sweep.isel(run=slice(1, None))).sizes == sweep.sizes
    True
    """
    if not sweeps:
        raise TypeError("sweeps must hold at least one, got none")
    first = sweeps[0]
    named = getattr(first, "attrs", {}).get("schema")
    schema = {each.name: each for each in (NEEDLE_GRID, PERPLEXITY_SWEEP)}.get(named, LENGTH_SWEEP)
    for sweep in sweeps:
        check_result(sweep, schema)
        _check_same_questions(first, sweep)
    joined = joined_losses(sweeps) if schema is PERPLEXITY_SWEEP else _joined_answers(sweeps)
    if commands := [sweep.attrs["command"] for sweep in sweeps if "command" in sweep.attrs]:
        joined.attrs["command"] = "; ".join(commands)
    return joined


def _joined_answers(sweeps: Sequence[xr.Dataset]) -> xr.Dataset:
    first = sweeps[0]
    attrs = {name: value for name, value in first.attrs.items() if name != "command"}
    schemes, lengths = list(first["scheme"].values), list(first["length"].values)
    if attrs["schema"] == NEEDLE_GRID.name:
        each = [_grid_counts(grid) for grid in sweeps]
        data = _pooled({name: sum(counts[name] for counts in each) for name in _COUNTS})
        coords = {"scheme": schemes, "depth": first["depth"].values, "length": lengths}
        return make_result(NEEDLE_GRID, data, coords=coords, attrs=attrs)
    names = (*_COUNTS, "log_probability")
    data = {name: np.concatenate([sweep[name].values for sweep in sweeps], 1) for name in names}
    return _swept(data, schemes, lengths, attrs)


def check_joinable(
    earlier: xr.Dataset,
    models: Models,
    task: Task,
    lengths: Sequence[int],
    depths: Sequence[float] = (),
    seed: int = HELD_OUT_STREAM,
) -> None:
    """Raise what `join_sweeps` would, before a sweep or, with `depths`, a grid is measured."""
    import xarray as xr

    models = check_models(models, task)
    coords = {"scheme": list(models), "length": check_lengths(lengths)}
    coords |= {"depth": list(depths)} if depths else {}
    asked = xr.Dataset(coords=coords, attrs=_attrs(models, task, seed))
    check_result(earlier, NEEDLE_GRID if depths else LENGTH_SWEEP)
    _check_same_questions(earlier, asked)


def check_losses_joinable(
    earlier: xr.Dataset, models: Models, task: Text | DNA, **asked: Any
) -> None:
    """Raise what `join_sweeps` would, before a `perplexity_sweep` is measured."""
    check_result(earlier, PERPLEXITY_SWEEP)
    _check_same_questions(earlier, asked_pieces(models, task, **asked))


def _check_same_questions(first: xr.Dataset, other: xr.Dataset) -> None:
    names = SAME if "piece" in first.dims else ("task", "task_options", "training_length", "seed")
    for name in names:
        if other.attrs[name] != first.attrs[name]:
            raise ValueError(
                f"sweeps must be of the same questions, got {name} {first.attrs[name]!r} and "
                f"{other.attrs[name]!r}"
            )
    for name in ("scheme", "depth", "length"):
        labels = [list(each[name].values) if name in each.dims else [] for each in (first, other)]
        if labels[0] != labels[1]:
            texts = [", ".join(map(str, each)) for each in labels]
            raise ValueError(f"sweeps must have the same {name}s, got {texts[0]} and {texts[1]}")


def _swept(
    data: dict[str, np.ndarray],
    schemes: list[str],
    lengths: list[int],
    attrs: Mapping[str, str | int | float],
) -> xr.Dataset:
    """The result of a sweep from its counts, shape (schemes, runs, lengths)."""
    for measure, (right, unit) in _MEASURES.items():
        data |= share_fields(measure, data[right], data[unit])
        data |= share_fields(f"mean_{measure}", data[right].sum(axis=1), data[unit].sum(axis=1))
    runs = np.arange(data["examples"].shape[1])
    coords = {"scheme": schemes, "run": runs, "length": lengths}
    return make_result(LENGTH_SWEEP, data, coords=coords, attrs=attrs)


def _pooled(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields of a grid from its counts."""
    data = {name: counts[name] for name in ("examples", "tokens")}
    for measure, (right, unit) in _MEASURES.items():
        data |= share_fields(measure, counts[right], counts[unit])
    return data


def _grid_counts(grid: xr.Dataset) -> dict[str, np.ndarray]:
    """The counts behind a grid's shares, shape (schemes, depths, lengths)."""
    counts = {name: grid[name].values for name in ("examples", "tokens")}
    for measure, (right, unit) in _MEASURES.items():
        # A share times its count is a whole number up to rounding.
        whole = (grid[measure].fillna(0.0) * grid[unit]).round()
        counts[right] = whole.transpose(*grid["examples"].dims).values.astype(int)
    return counts


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
            raise ValueError(f"task must have answers (passkey, needle, images), got {task.name}")
        by_length = isinstance(examples, Mapping)
        counts = [
            checks.positive_int(
                f"examples at length {length}", examples.get(length) if by_length else examples
            )
            for length in lengths
        ]
        tasks = [task.held_out().at_length(length) for length in lengths]
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
