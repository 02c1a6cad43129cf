"""What every figure of the gallery holds, and where it says its numbers come from."""

from __future__ import annotations

from dataclasses import dataclass

from goatviz.plots.figure import Figure
from goatviz.training.checkpoint import Checkpoint, load_pretrained


@dataclass(frozen=True)
class Exhibit:
    """One figure of the gallery.

    Attributes
    ----------
    slug : str
        Its anchor in the page.
    title, caption : str
        Ours.
    summary : list of str
        The figure in words, computed from what it draws.
    figure : Figure
        What is drawn.
    provenance : list of str
        Where the numbers come from.
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
    """Data, sizes, budget, device and command, as the card has them."""
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
    """How the models of a task were trained, and the command that does it again."""
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
