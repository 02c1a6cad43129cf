"""Passkey at the paper's scale: 12 layers of d = 512, trained at 1,024 tokens, asked at 32,768."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from experiments._slices import Experiment, Measures, Trained, answers, doubled
from goatviz.training.presets import preset

#: Tokens of all questions of a cell, as far as they are no more than `--examples`.
CELL_TOKENS = 2**20


def add_options(parser: ArgumentParser) -> None:
    """Add the options of retrieval."""
    parser.add_argument("--examples", type=int, default=256, help="most questions of a cell")


def questions(lengths: list[int], most: int) -> dict[int, int]:
    """Number of questions at each length: fewer where a question is long."""
    return {length: max(1, min(most, CELL_TOKENS // length)) for length in lengths}


def measures(trained: Trained, options: Namespace) -> Measures:
    """Whole answers right, against length."""
    length = trained.task.length
    lengths = options.lengths or doubled(length, 16 * length if options.tiny else 32_768)
    examples = questions(lengths, 8 if options.tiny else options.examples)
    return {"sweep": lambda: answers(trained, lengths, examples)}


EXPERIMENT = Experiment(
    name="passkey",
    about="passkey of eight digits, whole answers right at 1,024 to 32,768 tokens",
    schemes=("goat", "rope", "alibi", "sinusoidal"),
    recipe=lambda options: preset("passkey", "paper"),
    measures=measures,
    add_options=add_options,
)
