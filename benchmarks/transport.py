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
import os
import resource
import statistics
import time
import tracemalloc

import ot
import torch

from goatviz.transport import TransportPlan, cross_check, solve_rows

SOLVERS = ("semi_relaxed", "balanced", "linear_programme")
HEADER = (
    f"{'n':>5} {'tau':>7} {'softmax':>10} {'closed form':>12} {'solver':>17} "
    f"{'verdict':>15} {'difference':>11} {'POT':>10} {'ratio':>8} {'peak':>9}"
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


def measure(n: int, temperature: float, repeats: int) -> None:
    """Print one line per solver for a problem of n queries and n keys."""
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
        print(
            f"{n:>5} {temperature:>7g} {1e3 * statistics.median(bare):>7.2f} ms "
            f"{1e3 * base:>9.2f} ms {name:>17} "
            f"{reports[name].verdict:>15} {reports[name].largest_difference:>11.1e} "
            f"{1e3 * seconds:>7.1f} ms {seconds / base:>7.1f}x {peak:>5.0f} MiB",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Closed form against POT.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1e-6])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        f"POT {ot.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"{os.cpu_count()} cores; float64, causal, random prior; medians of {options.repeats} "
        "interleaved repeats"
    )
    print("balanced starts at the plan's potentials: it is a fixed-point check, not a cold solve")
    print(HEADER)
    for temperature in options.temperatures:
        for n in options.sizes:
            measure(n, temperature, options.repeats)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak resident memory of the whole run: {resident:.0f} MiB")


if __name__ == "__main__":
    main()
