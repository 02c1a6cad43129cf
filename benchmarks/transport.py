"""Closed form against POT: agreement, time and memory of one causal head.

Run with ``python benchmarks/transport.py``. Repeats of the solvers are interleaved, so that a
busy machine slows all of them alike; times are medians. "Closed form" is ``solve_rows`` with its
validation, "softmax" the bare masked softmax, "POT" the solver's call alone on prepared arrays,
"ratio" POT over closed form. Peak memory is what NumPy and Python allocate inside one
``cross_check`` (tracemalloc); buffers of torch and of POT's C++ show only in the last line, the
resident peak of the whole process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Sequence

import torch
from _measure import resident_peak
from _report import Column, Report, Table, arguments

from goatviz.transport import TransportPlan, cross_check, solve_rows

SOLVERS = ("semi_relaxed", "balanced", "linear_programme")
COLUMNS = (
    Column("POT", "ms", ",.1f"),
    Column("softmax", "ms", ",.2f"),
    Column("closed form", "ms", ",.2f"),
    Column("difference", "", ".1e"),
    Column("verdict", "", "", "       verdict"),
)


def problem(n: int, temperature: float) -> dict:
    """Scores and arguments of a seeded causal head with a random prior, in float64."""
    generator = torch.Generator().manual_seed(n)
    return {
        "scores": 3 * torch.randn(n, n, generator=generator, dtype=torch.float64),
        "log_prior": 2 * torch.randn(n, n, generator=generator, dtype=torch.float64),
        "mask": torch.ones(n, n, dtype=torch.bool).tril(),
        "temperature": temperature,
    }


def solve(arguments: dict) -> TransportPlan:
    """Solve in closed form."""
    arguments = dict(arguments)
    return solve_rows(arguments.pop("scores"), **arguments)


def softmax(arguments: dict) -> torch.Tensor:
    """Compute the weights alone, without checks or certificates."""
    logits = arguments["scores"] / arguments["temperature"] + arguments["log_prior"]
    return torch.softmax(logits.masked_fill(~arguments["mask"], -torch.inf), dim=-1)


def measure(table: Table, n: int, temperature: float, repeats: int) -> None:
    """Add one line per solver for a problem of n queries and n keys."""
    arguments = problem(n, temperature)
    plan = solve(arguments)
    closed: list[float] = []
    bare: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in SOLVERS}
    reports = {}
    for _ in range(repeats):
        start = time.perf_counter()
        solve(arguments)
        closed.append(time.perf_counter() - start)
        start = time.perf_counter()
        softmax(arguments)
        bare.append(time.perf_counter() - start)
        for name in SOLVERS:
            reports[name] = cross_check(plan, solver=name)[name]
            times[name].append(reports[name].seconds)
    base = statistics.median(closed)
    for name in SOLVERS:
        tracemalloc.start()
        cross_check(plan, solver=name)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        seconds = statistics.median(times[name])
        table.add(
            f"{name}, tau = {temperature:g}",
            1e3 * seconds,
            1e3 * statistics.median(bare),
            1e3 * base,
            reports[name].largest_difference,
            reports[name].verdict,
            length=n,
            ratio=seconds / base,
            peak=peak,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Closed form against POT.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1e-6])
    parser.add_argument("--repeats", type=int, default=5)
    options = arguments(parser, argv, quick={"sizes": [16], "repeats": 1})
    report = Report(
        "transport",
        f"Closed form against POT: float64, causal, random prior; medians of {options.repeats} "
        "interleaved repeats",
        options,
        ("POT",),
    )
    table = report.table("solvers", COLUMNS, peak=True, width=30, length="n")
    for temperature in options.temperatures:
        for n in options.sizes:
            measure(table, n, temperature, options.repeats)
    report.note("balanced starts at the plan's potentials: a fixed-point check, not a cold solve")
    report.note(f"peak resident memory of the whole run: {resident_peak():.0f} MiB")
    report.finish()


if __name__ == "__main__":
    main()
