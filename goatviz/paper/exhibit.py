"""The parts of an exhibit in the gallery, and sentences that exhibits share."""

from __future__ import annotations

from dataclasses import dataclass

import xarray as xr

from goatviz.plots.figure import Figure
from goatviz.tasks import Task
from goatviz.training.checkpoint import Checkpoint, load_pretrained
from goatviz.training.config import TrainConfig


@dataclass(frozen=True)
class Exhibit:
    """One figure of the gallery.

    Attributes
    ----------
    slug : str
        Anchor in the page.
    title, caption : str
        Title and caption of the figure.
    summary : list of str
        The figure in words, computed from the numbers that it draws.
    figure : Figure
        The figure.
    provenance : list of str
        Origin of the numbers.
    claim : str
        What the paper shows or states, and at which scale.
    """

    slug: str
    title: str
    caption: str
    summary: list[str]
    figure: Figure
    provenance: list[str]
    claim: str


def card_provenance(checkpoint: Checkpoint) -> list[str]:
    """Data, sizes, budget, device and command from the card of a checkpoint."""
    card = checkpoint.card
    model = card["model"]
    return [
        f"{checkpoint.name}: {card['data']}",
        f"{model['num_layers']} layer{'s' if model['num_layers'] > 1 else ''}, "
        f"{model['num_heads']} heads, d = {model['embed_dim']}, "
        f"{'with' if model['skip'] else 'without'} skip connection, "
        f"{card['parameters']:,} parameters; {card['steps']:,} steps, seed {card['seed']}, "
        f"{card['wall_time_s']:.0f} s on {card['device']}",
        f"{card['command']} (torch {card['versions']['torch']}; weights sha256 "
        f"{card['sha256'][:12]}…)",
    ]


def recipe_provenance(task: str) -> list[str]:
    """How the models of a task were trained, and the command that trains them again."""
    card = load_pretrained(f"{task}-goat").card
    model = card["model"]
    again = card["command"].replace("--positions goat --seed 0", "--positions SCHEME --seed SEED")
    return [
        f"{card['data']}; {model['num_layers']} layers, {model['num_heads']} heads, "
        f"d = {model['embed_dim']}, R = {model['prior_rank']}, M = {model['sink_rank']}, "
        f"{card['parameters']:,} parameters (all schemes within 0.1 %); {card['steps']:,} steps, "
        f"about {card['wall_time_s'] / 60:.0f} minutes a run on {card['device']}",
        f"Train: {again.replace(f'{task}-goat-0', f'{task}-SCHEME-SEED')}",
    ]


def task_of(checkpoint: Checkpoint) -> Task:
    """The task that a checkpoint was trained on."""
    return TrainConfig.from_dict(checkpoint.card["config"]).task


def by_length(result: xr.Dataset, field: str, digits: str) -> str:
    """Values of a field with their intervals, such as `0.512 [0.430, 0.590] at 64, ...`."""
    values = (result[f"{field}{end}"].values for end in ("", "_low", "_high"))
    return ", ".join(
        f"{value:{digits}} [{low:{digits}}, {high:{digits}}] at {length:,}"
        for length, value, low, high in zip(result["length"].values, *values, strict=True)
    )
