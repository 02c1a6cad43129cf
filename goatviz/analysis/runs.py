"""Folders of trained models, sorted by position scheme and seed, ready to be compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from goatviz.models import POSITION_SCHEMES, CausalLM, interpolate_positions
from goatviz.tasks import Task
from goatviz.training.checkpoint import Checkpoint, load_checkpoint
from goatviz.training.config import TrainConfig


class Runs(NamedTuple):
    """Trained models of one task.

    Attributes
    ----------
    task : Task
        What all were trained on.
    models : dict of str to list of CausalLM
        By scheme, seeds in order.
    """

    task: Task
    models: dict[str, list[CausalLM]]


def load_runs(folder: str | os.PathLike) -> Runs:
    """Load every checkpoint of a folder, grouped by position scheme, seeds in order.

    Where there are runs of "rope" and none of "rope-interpolated", the latter are the same weights
    with squeezed positions: training either gives the other.

    Parameters
    ----------
    folder : path-like
        Checkpoints of one task, that differ in scheme and seed alone.

    Raises
    ------
    ValueError
        If there are none, or they were trained on different tasks or by different recipes, or a
        scheme has a seed twice.

    Examples
    --------
    >>> load_runs("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: folder must be an existing folder, got nowhere
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder, got {folder}")
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise ValueError(f"folder must hold checkpoints, got none in {folder}")
    found: dict[str, dict[int, Checkpoint]] = {}
    recipes: dict[str, str] = {}
    for name in names:
        checkpoint = load_checkpoint(folder / name)
        config = dict(checkpoint.card["config"])
        scheme, seed = config.pop("positions"), config.pop("seed")
        recipes[json.dumps(config, sort_keys=True)] = name
        seeds = found.setdefault(scheme, {})
        if seed in seeds:
            raise ValueError(
                f"folder must hold a scheme and seed once, got {seeds[seed].name} and {name}"
            )
        seeds[seed] = checkpoint
    if len(recipes) > 1:
        raise ValueError(
            "folder must hold runs of one recipe, that differ in scheme and seed alone; these do "
            f"not agree: {', '.join(sorted(recipes.values()))}"
        )
    models = {
        scheme: [found[scheme][seed].model for seed in sorted(found[scheme])]
        for scheme in POSITION_SCHEMES
        if scheme in found
    }
    if "rope" in models and "rope-interpolated" not in models:
        squeezed = [interpolate_positions(model) for model in models["rope"]]
        order = [scheme for scheme in POSITION_SCHEMES if scheme in {*models, "rope-interpolated"}]
        models = {scheme: models.get(scheme, squeezed) for scheme in order}
    return Runs(TrainConfig.from_dict(checkpoint.card["config"]).task, models)
