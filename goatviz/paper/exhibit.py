"""The parts of an exhibit in the gallery, and sentences and tables that exhibits share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from goatviz.plots.figure import Figure
from goatviz.tasks import Task
from goatviz.training.checkpoint import Checkpoint, load_pretrained
from goatviz.training.config import TrainConfig

if TYPE_CHECKING:
    import xarray as xr

#: Scales of the paper's experiments, as far as they are known here.
PAPER_SCALES = {
    "copy": "a small causal language model; its size is not known here",
    "c4": "125 M parameters, 4 B tokens of C4 at 2,048 tokens, R = M = 4; seeds not disclosed",
    "passkey": "12 layers, d = 512, eight digits, 1,024 tokens, 2,000 steps of 32, R = M = 8",
    "needle": "12 letters of a four-letter alphabet, 256 tokens, read at 512 to 16,384",
    "dna": "8 layers, d = 512, 6,000 bases (1,024 tokens), 1,000 steps of 8, R = 2, M = 8",
    "vision": "ViT-S/16 on ImageNet-1k, 300 epochs, R = 16, M = 2; 224, 384 and 512 pixels",
    "theory": "a theorem",
    "none": "not a claim of the paper, as far as it is known here",
    "blagpt": "a third party's ledger of ablations (github.com/erogol/BlaGPT)",
}


@dataclass(frozen=True)
class Table:
    """Numbers of an exhibit, as text.

    Attributes
    ----------
    header : sequence of str
        Names of the columns.
    rows : sequence of sequence of str
        Cells, each row as long as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibit:
    """One figure of the gallery.

    Attributes
    ----------
    slug : str
        Anchor in the page.
    title, caption : str
        Title and caption of the figure.
    figure : Figure
        The figure.
    scale : str
        Scale of our models.
    paper_scale : str
        Key of `PAPER_SCALES`.
    provenance : list of str
        Origin of the numbers.
    claim : str
        What the paper shows or states.
    summary : sequence of str
        The figure in words, computed from the numbers that it draws.
    table : Table, optional
        The numbers themselves; there is a summary or a table, or both.
    """

    slug: str
    title: str
    caption: str
    figure: Figure
    scale: str
    paper_scale: str
    provenance: list[str]
    claim: str
    summary: Sequence[str] = ()
    table: Table | None = None


def scale_text(checkpoint: Checkpoint) -> str:
    """The scale of a checkpoint from its card: parameters, length, steps, device."""
    card = checkpoint.card
    return (
        f"{card['parameters'] / 1e6:.2f} M parameters, {card['model']['training_length']} tokens, "
        f"{card['steps']:,} steps of {card['config']['batch_size']}, {card['device']}"
    )


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


def length_table(result: xr.Dataset, field: str, digits: str, *, what: str) -> Table:
    """Values of a field with their intervals, schemes by length.

    Parameters
    ----------
    result : xarray.Dataset
        A result over (scheme, length), with the fields' intervals.
    field, digits : str
        Name of the field, and the format of its numbers.
    what : str
        What the numbers are, with their unit.
    """
    header = [f"{what} at", *(f"{length:,}" for length in result["length"].values)]
    return Table(header, [[str(s), *interval_cells(result.sel(scheme=s), field, digits)]
                          for s in result["scheme"].values])  # fmt: skip


def interval_cells(result: xr.Dataset, field: str, digits: str) -> list[str]:
    """Values of a field with their intervals, such as `0.512 [0.430, 0.590]`."""
    values = (result[f"{field}{end}"].values.ravel() for end in ("", "_low", "_high"))
    return [
        f"{value:{digits}} [{low:{digits}}, {high:{digits}}]"
        for value, low, high in zip(*values, strict=True)
    ]
