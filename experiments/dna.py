"""DNA at the size of the public code: loss on unseen bases, throughput and peak memory."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
import xarray as xr

from benchmarks._measure import added_peak, interleaved
from benchmarks._report import Column, Report
from experiments._slices import (
    Experiment,
    Measures,
    Trained,
    add_document_options,
    losses,
)
from goatviz.models import CausalLM
from goatviz.tasks import DNA
from goatviz.training import Execution, TrainConfig
from goatviz.training.execution import Engine, start
from goatviz.training.presets import preset

#: Bases at which speed and memory are measured.
SPEED_LENGTHS = (1024, 2048, 4096, 6000)
REPEATS = 5


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


def speed(options: Namespace) -> Iterable[xr.Dataset]:
    """Time training steps of every scheme, interleaved, and write dna-speed.json."""
    base, *_ = EXPERIMENT.runs(options).values()
    lengths = (64, 96) if options.tiny else SPEED_LENGTHS
    half = options.device == "cuda"
    asked = Namespace(device=options.device, lengths=list(lengths), schemes=options.schemes)
    report = Report(
        "dna-speed",
        f"DNA: {base.num_layers} layers, d = {base.embed_dim}, batch {base.batch_size}, "
        f"{'bfloat16' if half else 'float32'}; medians of {REPEATS} interleaved repeats; "
        "attention: one layer with its projections, forward and backward",
        Namespace(**vars(asked), out=options.out),
    )
    columns = [
        Column("training", "tokens/s", ",.0f"),
        Column("attention", "tokens/s", ",.0f"),
    ]
    table = report.table("DNA: training steps", columns, peak=True)
    precision = "bf16" if half else "no"
    with start(Execution(device=options.device, mixed_precision=precision)) as engine:
        for length in lengths:
            config = replace(base, task=base.task.at_length(length))
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            for scheme in options.schemes:
                step, attend = contestants(engine, replace(config, positions=scheme))
                calls |= {(scheme, "training"): step, (scheme, "attention"): attend}
            seconds = interleaved(calls, REPEATS, options.device)
            tokens = config.batch_size * length
            unit = "rope" if "rope" in options.schemes else options.schemes[0]
            for scheme in options.schemes:
                table.add(
                    scheme,
                    tokens / seconds[scheme, "training"],
                    tokens / seconds[scheme, "attention"],
                    length=length,
                    ratio=seconds[scheme, "training"] / seconds[unit, "training"],
                    peak=added_peak(calls[scheme, "training"], options.device),
                )
    report.finish()
    return ()


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
