"""A vision transformer, read at other resolutions than the one it was trained at."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from experiments._slices import Experiment, Measures, Trained, answers
from goatviz.tasks import Images
from goatviz.training import TrainConfig
from goatviz.training.presets import preset

#: Resolutions of the paper, 384 and 512, over that of its training, 224.
FINER = (1.0, 384 / 224, 512 / 224)


def add_options(parser: ArgumentParser) -> None:
    """Add the options of images."""
    add = parser.add_argument
    add("--source", required=True, help=".npz file of images and classes, see goatviz.tasks.Images")
    add("--side", type=int, default=64, help="pixels along a side in training")
    add("--patch", type=int, default=8, help="pixels along a side of a patch")
    add("--channels", type=int, default=3, choices=(1, 3), help="1: grey, 3: colours")
    add("--classes", type=int, default=10)
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=128)
    add("--examples", type=int, default=2000, help="images of a cell, drawn with replacement")


def recipe(options: Namespace) -> TrainConfig:
    """ViT-S with R = 16 and M = 2, without the paper's augmentation."""
    task = Images(
        source=options.source,
        side=options.side,
        patch=options.patch,
        channels=options.channels,
        classes=options.classes,
    )
    paper = preset("images", "paper")
    return replace(paper, task=task, steps=options.steps, batch_size=options.batch_size)


def resolutions(task: Images) -> list[int]:
    """Tokens at the training resolution and at the paper's finer ones, to whole patches."""
    sides = [task.patch * round(finer * task.side / task.patch) for finer in FINER]
    return [replace(task, side=side).length for side in sides]


def measures(trained: Trained, options: Namespace) -> Measures:
    """Images classified right, against resolution."""
    lengths = options.lengths or resolutions(trained.task)
    return {"sweep": lambda: answers(trained, lengths, 8 if options.tiny else options.examples)}


EXPERIMENT = Experiment(
    name="vision",
    about="vision transformers: images classified right at the training resolution and finer ones",
    schemes=("goat", "learned", "none"),
    recipe=recipe,
    measures=measures,
    add_options=add_options,
)
