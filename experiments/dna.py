"""DNA at the size of the public code: loss on unseen bases, throughput and peak memory."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import xarray as xr

from benchmarks._measure import added_peak, interleaved
from experiments._slices import (
    Experiment,
    Measures,
    Trained,
    add_document_options,
    growing,
    losses,
)
from goatviz.models import CausalLM
from goatviz.results import TRAINING_COST, make_result
from goatviz.tasks import DNA
from goatviz.training import Execution, TrainConfig
from goatviz.training.checkpoint import device_name
from goatviz.training.execution import Engine, start
from goatviz.training.presets import preset

#: Bases at which speed and memory are measured.
SPEED_LENGTHS = (1024, 2048, 4096, 6000)
REPEATS, PEAKS = 5, 3


def add_options(parser: ArgumentParser) -> None:
    """Add the options of DNA."""
    add_document_options(parser)
    parser.add_argument("--length", type=int, default=1024, help="bases of context in training")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)


def recipe(options: Namespace) -> TrainConfig:
    """The public code's: 8 layers and 8 heads of d = 512, R = 2, M = 8."""
    return replace(
        preset("dna", "paper"),
        task=DNA(source=options.source, validation=options.validation, length=options.length),
        num_layers=8,
        steps=options.steps,
        batch_size=options.batch_size,
    )


def measures(trained: Trained, options: Namespace) -> Measures:
    """Loss against length, then what a training step and a layer's attention cost."""
    return {"sweep": lambda: losses(trained, options), "speed": lambda: speed(options)}


def speed(options: Namespace) -> Iterator[xr.Dataset]:
    """What training costs every scheme, at one length more each time."""
    base, *_ = EXPERIMENT.runs(options).values()
    recipes = {scheme: replace(base, positions=scheme) for scheme in options.schemes}
    lengths = (64, 96) if options.tiny else SPEED_LENGTHS
    return growing(partial(training_cost, recipes, device=options.device), lengths)


def training_cost(
    recipes: Mapping[str, TrainConfig], *, lengths: Sequence[int], device: str = "cpu"
) -> xr.Dataset:
    """Throughput and peak memory of training steps, and throughput of a layer's attention.

    Parameters
    ----------
    recipes : mapping of str to TrainConfig
        One for each scheme; steps are taken on its documents.
    lengths : sequence of int
        Tokens of context; every step takes a batch of as many sequences as the recipe has.
    device : {"cpu", "cuda"}
        On a GPU, steps run in bfloat16.

    Returns
    -------
    xarray.Dataset
        Schema "training_cost": medians of 5 repeats, those of all schemes interleaved; the median,
        smallest and largest of 3 peaks, which on a CPU differ by some 5 %.
    """
    shape = len(recipes), len(lengths)
    trained, attended = np.empty(shape), np.empty(shape)
    peaks = np.empty((*shape, PEAKS))
    half = device == "cuda"
    execution = Execution(device=device, mixed_precision="bf16" if half else "no")
    with start(execution) as engine:
        for column, length in enumerate(lengths):
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            for scheme, recipe in recipes.items():
                config = replace(recipe, task=recipe.task.at_length(length))
                step, attend = contestants(engine, config)
                calls |= {(scheme, "training"): step, (scheme, "attention"): attend}
            seconds = interleaved(calls, REPEATS, device)
            for row, (scheme, recipe) in enumerate(recipes.items()):
                tokens = recipe.batch_size * length
                trained[row, column] = tokens / seconds[scheme, "training"]
                attended[row, column] = tokens / seconds[scheme, "attention"]
                step = calls[scheme, "training"]
                peaks[row, column] = [added_peak(step, device) for _ in range(PEAKS)]
    first, *_ = recipes.values()
    return make_result(
        TRAINING_COST,
        {
            "tokens_per_second": trained,
            "attention_tokens_per_second": attended,
            "peak_memory": np.median(peaks, axis=-1),
            "peak_memory_low": peaks.min(axis=-1),
            "peak_memory_high": peaks.max(axis=-1),
        },
        coords={"scheme": list(recipes), "length": list(lengths)},
        attrs={
            "task": first.task.name,
            "batch_size": first.batch_size,
            "repeats": REPEATS,
            "peaks": PEAKS,
            "training_length": first.task.length,
            "machine": device_name(torch.device(device)),
            "threads": torch.get_num_threads(),
            "precision": "bfloat16" if half else "float32",
        },
    )


def contestants(
    engine: Engine, config: TrainConfig
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A function that takes a training step, and one that runs a layer's attention both ways."""
    torch.manual_seed(config.seed)
    model = CausalLM(config.model_config()).to(engine.device)
    layer = model.blocks[0].attention
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    prepared, stepper = engine.prepare(model, optimizer)
    data = torch.Generator().manual_seed(config.seed)
    shape = config.batch_size, config.task.length, config.embed_dim
    x = torch.randn(shape, device=engine.device, requires_grad=True)
    wanted = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]

    def attend() -> None:
        half = engine.accelerator.mixed_precision == "bf16"
        with torch.autocast(engine.device.type, torch.bfloat16) if half else nullcontext():
            out = layer(x)
        torch.autograd.grad(out.float().sum(), wanted)

    return lambda: engine.take_step(config, prepared, stepper, data, 0), attend


EXPERIMENT = Experiment(
    name="dna",
    about="language models of bases: loss on unseen bases, throughput and peak memory",
    schemes=("goat", "rope"),
    recipe=recipe,
    measures=measures,
    add_options=add_options,
)
