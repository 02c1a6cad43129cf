"""Start-up in fresh interpreters: `import goatviz`, the first use of a name, `goatviz --help`.

Interleaved, medians. Targets are held against CPU time, which other work on the machine disturbs
least: importing is the work of one thread. Run: python benchmarks/imports.py
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from _report import Column, Report, arguments

CASES = {
    "bare interpreter": ["-c", "pass"],
    "import goatviz": ["-c", "import goatviz"],
    "goatviz.plot_prior": ["-c", "import goatviz; goatviz.plot_prior"],
    "goatviz.plots": ["-c", "import goatviz.plots"],
    "import torch": ["-c", "import torch"],
    "import xarray": ["-c", "import xarray"],
    "import plotly": ["-c", "import plotly.graph_objects"],
    "goatviz --help": ["-m", "goatviz.cli", "--help"],
    "goatviz train --help": ["-m", "goatviz.cli", "train", "--help"],
    "goatviz reproduce --help": ["-m", "goatviz.cli", "reproduce", "--help"],
}
#: Milliseconds of a case beyond those of another.
TARGETS = (
    ("import goatviz", "bare interpreter", 50.0),
    ("goatviz.plot_prior", "import torch", 500.0),
    ("goatviz --help", "nothing", 300.0),
)
HEAVY = ("torch", "plotly", "xarray", "pandas", "scipy", "numpy", "ot", "ipywidgets")


def environment() -> dict[str, str]:
    """This environment, but with cached bytecode, as an installed package has it."""
    return {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(command: Sequence[str]) -> str:
    """What one interpreter prints."""
    command = [sys.executable, *command]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return done.stdout


def milliseconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU time of one interpreter."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    run(command)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime
    return 1e3 * wall, 1e3 * cpu


def loaded(code: str) -> str:
    """Which heavy modules a piece of code brings along."""
    return run(["-c", f"{code}; import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = arguments(parser, argv, quick={"repeats": 1})
    report = Report("imports", f"Start-up: medians of {options.repeats} repeats", options)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for repeat in range(options.repeats + 1):
        for name, command in CASES.items():
            spent = milliseconds(command)
            if repeat:  # the first round fills the caches of files and of bytecode
                times[name].append(spent)
    columns = [Column("wall", "ms", ",.0f"), Column("CPU", "ms", ",.0f")]
    table = report.table("one interpreter", columns, lengths=False, ratio=False)
    cpu = {"nothing": 0.0}
    for name, each in times.items():
        wall, cpu[name] = map(statistics.median, zip(*each, strict=True))
        table.add(name, wall, cpu[name])
    for name, base, most in TARGETS:
        beyond = "" if base == "nothing" else f" beyond {base}"
        report.target(f"{name}{beyond}, ms of CPU", cpu[name] - cpu[base], most)
    for code in ("import goatviz", "import goatviz; goatviz.plot_prior"):
        report.note(f"heavy modules loaded by {code}: {loaded(code).strip() or 'none'}")
    report.finish()


if __name__ == "__main__":
    main()
