"""Import times in fresh interpreters: `import goatviz` beside a bare interpreter and its parts.

Interleaved, medians; the bare interpreter is subtracted. Run: python benchmarks/imports.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

CASES = {
    "bare interpreter": "pass",
    "import goatviz": "import goatviz",
    "goatviz.plot_prior": "import goatviz; goatviz.plot_prior",
    "goatviz.plots": "import goatviz.plots",
    "import torch": "import torch",
    "import plotly": "import plotly.graph_objects",
}
TARGET_MS = 50.0
HEAVY = ("torch", "plotly", "xarray", "numpy", "ot", "ipywidgets")


def seconds(code: str) -> float:
    """Wall time of one interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def loaded_by_goatviz() -> list[str]:
    """Which heavy modules `import goatviz` brings along."""
    code = f"import goatviz, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.split()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for repeat in range(options.repeats + 1):
        for name, code in CASES.items():
            spent = seconds(code)
            if repeat:  # the first round fills the file cache
                times[name].append(spent)
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    bare = median["bare interpreter"]
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {options.repeats} repeats")
    print(f"{'case':<20}  {'median':>10}  {'above bare':>11}")
    for name, value in median.items():
        print(f"{name:<20}  {value:>7.0f} ms  {value - bare:>8.1f} ms")
    spent = median["import goatviz"] - bare
    verdict = "met" if spent <= TARGET_MS else "missed"
    print(f"target: import goatviz within {TARGET_MS:.0f} ms: {verdict} ({spent:.1f} ms)")
    print(f"heavy modules loaded by import goatviz: {' '.join(loaded_by_goatviz()) or 'none'}")


if __name__ == "__main__":
    main()
