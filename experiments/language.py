"""Language models of 25 to 125 million parameters, on documents of yours: loss and sinks.

The exhibits of the small ones, `goatviz.paper.language_sinks`, are drawn from the same results.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from experiments._slices import (
    Experiment,
    Measures,
    Trained,
    add_document_options,
    losses,
    unseen,
)
from goatviz.analysis import implied_prior, sink_effect, sink_profile
from goatviz.analysis.signal import signal_correlation
from goatviz.models import CausalLM
from goatviz.tasks import Text
from goatviz.training import TrainConfig
from goatviz.training.presets import preset

HEAD_DIM = 64
#: Pieces of the training length that sinks are measured on, and their batch: 8 batches.
PIECES, BATCH = 32, 4


def add_options(parser: ArgumentParser) -> None:
    """Add the options of text."""
    add_document_options(parser)
    add = parser.add_argument
    add("--tokenizer", help="a tokenizer.json (default: bytes)")
    add("--length", type=int, default=1024, help="tokens of context in training")
    add("--width", type=int, default=512, help=f"512: 38 M in blocks, 768: 85 M; {HEAD_DIM} a head")
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=64)


def recipe(options: Namespace) -> TrainConfig:
    """The paper's recipe at the size that was asked for."""
    return replace(
        preset("text", "paper"),
        task=Text(
            source=options.source,
            validation=options.validation,
            tokenizer=options.tokenizer,
            length=options.length,
            packed=True,
        ),
        embed_dim=options.width,
        num_heads=options.width // HEAD_DIM,
        steps=options.steps,
        batch_size=options.batch_size,
        warmup=options.steps // 10,
    )


def measures(trained: Trained, options: Namespace) -> Measures:
    """Loss against length, then the last layer of each scheme's first run."""
    task = unseen(trained, options)
    pieces, _ = task.pieces(task.length, per_document=PIECES)
    spread = pieces[:: max(1, len(pieces) // PIECES)][:PIECES, :-1]
    found = {"sweep": lambda: losses(trained, options)}
    for scheme, models in trained.models.items():
        if scheme != "rope-interpolated":
            found |= last_layer(scheme, models[0], spread)
    return found


def last_layer(scheme: str, model: CausalLM, pieces: Tensor) -> dict[str, Callable]:
    """Signal against sink, u(j), and what hidden sinks cost, of one model."""
    ids = pieces.to(next(model.parameters()).device)
    last = [model.config.num_layers - 1]
    found = {
        f"{scheme}-sinks": lambda: [sink_profile(model, ids, layers=last, batch_size=BATCH)],
        f"{scheme}-signal": lambda: [signal_correlation(model, ids)],
        f"{scheme}-sink-effect": lambda: [sink_effect(model, ids.split(BATCH), per_layer=False)],
    }
    if scheme != "goat":
        found[f"{scheme}-implied"] = lambda: [
            implied_prior(model, ids.split(BATCH), layers=last, resolution=2)
        ]
    return found


EXPERIMENT = Experiment(
    name="language",
    about="language models on documents of yours: loss to 32,768 tokens, sinks of the last layer",
    schemes=("goat", "rope", "alibi"),
    recipe=recipe,
    measures=measures,
    add_options=add_options,
)
