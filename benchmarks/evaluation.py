"""What the loss of a long sequence costs: in one pass, and through the key-value cache by chunks.

Run with ``python benchmarks/evaluation.py`` (add ``--device cuda`` on a GPU). The model is that of
the tiny presets (3 layers, d = 128, 4 heads). Repeats are interleaved, so that a busy machine slows
all cases alike; times are medians. Peak memory is the growth of the resident peak over one call,
in a process of its own after a small warm-up; on a GPU, the allocator's peak. What a training step
costs is in `attention.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from _measure import added_peak, interleaved
from _report import Column, Report, arguments
from torch import Tensor

from goatviz.models import CausalLM
from goatviz.tasks import Passkey
from goatviz.training.evaluation import next_token_loss, sequence_loss
from goatviz.training.presets import preset

UNIT = "one pass"


def evaluations(length: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Losses of one sequence, in one pass and through the cache."""
    config = replace(preset("passkey"), task=Passkey(length=length, value_length=4))
    torch.manual_seed(0)
    model = CausalLM(config.model_config()).to(device).eval()
    ids = config.task.sample(1, generator=torch.Generator().manual_seed(0)).to(device)

    def in_one_pass() -> Tensor:
        with torch.no_grad():
            return next_token_loss(model, ids)

    return {
        UNIT: in_one_pass,
        "chunks of 1,024": lambda: sequence_loss(model, ids),
        "chunks of 256": lambda: sequence_loss(model, ids, chunk=256),
    }


def own_peak(case: str, length: int, device: str) -> float:
    """MiB that one run of a case adds to this process's peak."""
    evaluations(64, device)[case]()
    return added_peak(evaluations(length, device)[case], device)


def peak_of(case: str, length: int, device: str) -> float:
    """`own_peak` in a process of its own."""
    command = [sys.executable, __file__, "--alone", case, str(length), "--device", device]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def measure(length: int, options: argparse.Namespace, report: Report) -> None:
    """Fill the table; say how far the losses are apart."""
    runs = evaluations(length, options.device)
    peaks = {
        case: peak_of(case, length, options.device) if options.memory else None for case in runs
    }
    table = report.table(
        "loss of one sequence, float32", [Column("evaluation", "s", ".2f", "time")], peak=True
    )
    seconds = interleaved(runs, options.repeats, options.device)
    for case, taken in seconds.items():
        ratio = taken / seconds[UNIT]
        table.add(case, taken, length=length, ratio=ratio, peak=peaks[case])
    reference = runs[UNIT]()
    apart = max(float((run() - reference).abs().max()) for run in runs.values())
    report.target("largest difference of the losses, nats", apart, 1e-4)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    quick = {"length": 64, "repeats": 1, "memory": False}
    options = arguments(parser, argv, quick=quick, devices=("cpu", "cuda"))
    if options.alone:
        case, length = options.alone
        print(own_peak(case, int(length), options.device))
        return
    about = f"Evaluation by chunks: medians of {options.repeats} interleaved repeats"
    report = Report("evaluation", about, options)
    measure(options.length, options, report)
    report.finish()


if __name__ == "__main__":
    main()
