"""Needle in a haystack at the paper's scale: trained at 256 tokens, asked at 16,384, by depth."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial

from experiments._slices import Experiment, Measures, Trained, answers, doubled, growing
from experiments.passkey import add_options, questions
from goatviz.analysis import needle_grid
from goatviz.training.presets import preset

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measures(trained: Trained, options: Namespace) -> Measures:
    """Letters right, against length and against length and depth."""
    length = trained.task.length
    lengths = options.lengths or doubled(length, 16 * length if options.tiny else 16_384)
    most = 8 if options.tiny else options.examples
    examples = questions(lengths, most)
    # Five depths together have the tokens of a cell of the sweep.
    each = {length: max(1, count // len(DEPTHS)) for length, count in examples.items()}
    grid = partial(
        needle_grid,
        trained.models,
        trained.task,
        depths=DEPTHS,
        examples=each,
        cache=trained.cells,
        progress=sys.stderr.isatty(),
    )
    return {
        "grid": lambda: growing(grid, lengths),
        "sweep": lambda: answers(trained, lengths, examples),
    }


EXPERIMENT = Experiment(
    name="needle",
    about="needle of twelve letters, letters right by depth at 256 to 16,384 tokens",
    schemes=("goat", "rope", "alibi", "sinusoidal"),
    recipe=lambda options: preset("needle", "paper"),
    measures=measures,
    add_options=add_options,
)
