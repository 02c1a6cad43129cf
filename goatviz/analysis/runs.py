"""Folders of trained models, grouped by position scheme and seed for comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import NamedTuple

from goatviz import checks
from goatviz.models import POSITION_SCHEMES, Transformer, interpolate_positions
from goatviz.tasks import Task
from goatviz.training.checkpoint import Checkpoint, load_checkpoint
from goatviz.training.config import TrainConfig


class Runs(NamedTuple):
    """Trained models of one task.

    Attributes
    ----------
    task : Task
        Task that all were trained on.
    models : dict of str to list of Transformer
        Models by scheme, in the order of their seeds.
    """

    task: Task
    models: dict[str, list[Transformer]]


def load_runs(
    folder: str | os.PathLike, *, skipped: Callable[[Exception], None] | None = None
) -> Runs:
    """Load every checkpoint of a folder, grouped by position scheme and ordered by seed.

    If there are runs of "rope" and none of "rope-interpolated", the latter are added: the same
    weights with interpolated positions, since the two schemes train alike.

    Parameters
    ----------
    folder : path-like
        Folder of checkpoints of one task that differ only in scheme and seed.
    skipped : callable, optional
        Function called with the error of each checkpoint that does not load, which is then left
        out. Default: the first such error is raised.

    Raises
    ------
    FileNotFoundError
        If a card has no weights.
    ValueError
        If there is no checkpoint, one does not load, they differ in more than scheme and seed, or
        two have the same scheme and seed.

    Examples
    --------
    >>> load_runs("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: folder must be an existing folder, got nowhere
    """
    folder = checks.existing_folder("folder", folder)
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise ValueError(f"folder must hold checkpoints, got none in {folder}")
    runs: dict[str, dict[int, Checkpoint]] = {}
    recipes: dict[str, str] = {}
    for name in names:
        try:
            checkpoint = load_checkpoint(folder / name)
            recipe = _recipe(checkpoint)
        except (ValueError, OSError) as error:
            if skipped is None:
                raise
            skipped(error)
            continue
        config = recipe.to_dict()
        scheme, seed = config.pop("positions"), config.pop("seed")
        recipes[json.dumps(config, sort_keys=True)] = name
        seeds = runs.setdefault(scheme, {})
        if seed in seeds:
            raise ValueError(
                f"folder must hold each scheme and seed once, got {seeds[seed].name} and {name}"
            )
        seeds[seed] = checkpoint
    if not runs:
        raise ValueError(f"folder must hold checkpoints that load, got none in {folder}")
    if len(recipes) > 1:
        raise ValueError(
            "folder must hold runs that differ only in scheme and seed, got different recipes in "
            f"{', '.join(sorted(recipes.values()))}"
        )
    models = {
        scheme: [seeds[seed].model for seed in sorted(seeds)] for scheme, seeds in runs.items()
    }
    if "rope" in models and "rope-interpolated" not in models:
        models["rope-interpolated"] = [interpolate_positions(model) for model in models["rope"]]
    ordered = {scheme: models[scheme] for scheme in POSITION_SCHEMES if scheme in models}
    return Runs(recipe.task, ordered)


def _recipe(checkpoint: Checkpoint) -> TrainConfig:
    """The configuration that a checkpoint was trained with; ValueError if its card has none."""
    try:
        config = TrainConfig.from_dict(checkpoint.card["config"])
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{checkpoint.name}.json holds no config of a run: {error}") from error
    positions = checkpoint.model.config.positions
    if config.positions != positions:
        raise ValueError(
            f"{checkpoint.name}.json must hold the config of a run with positions {positions!r}, "
            f"got {config.positions!r}"
        )
    return config
