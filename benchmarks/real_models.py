"""What watching a real model costs, in units of its own forward pass: time and peak memory.

Run with ``python benchmarks/real_models.py``: SmolLM2-135M (30 layers, 9 heads, 3 key-value heads)
reads the beginning of Alice's Adventures in Wonderland. Repeats are interleaved, so that a busy
machine slows all cases alike; times are medians. Peak memory is the growth of the resident peak
during one call, in a process of its own. Eager attention returns whole plans, layers x heads x
length x length numbers, and runs up to ``--eager`` tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from _measure import added_peak, interleaved
from _report import Column, Report, arguments

from goatviz import (
    Hide,
    capture,
    example_text,
    implied_prior,
    intervene,
    load_example,
    sink_profile,
)
from goatviz.transport import CHEAP_STATISTICS

CHEAP = CHEAP_STATISTICS[:6]
UNIT = "forward pass"


class Model:
    """The model, a text for it, and the cases at a length."""

    def __init__(self) -> None:
        self.model, tokenizer = load_example()
        self.ids = tokenizer(example_text(), return_tensors="pt")["input_ids"]

    def cases(self, length: int, eager: bool) -> dict[str, Callable[[], object]]:
        """Names and what they run; the first is the unit."""
        ids = self.ids[:, :length]
        if ids.shape[1] < length:
            raise ValueError(f"length must be at most {self.ids.shape[1]}, got {length}")

        def watched(**options: object) -> None:
            with capture(self.model, **options), torch.no_grad():
                self.model(ids)

        def changed(**options: object) -> None:
            with intervene(self.model, Hide([0]), **options), torch.no_grad():
                self.model(ids)

        def plans() -> None:
            self.model.set_attn_implementation("eager")
            try:
                with torch.no_grad():
                    self.model(ids, output_attentions=True)
            finally:
                self.model.set_attn_implementation("sdpa")

        def forward() -> None:
            with torch.no_grad():
                self.model(ids)

        cases = {
            UNIT: forward,
            "mass on the first key": lambda: watched(statistics=["key_mass"]),
            "mass on the first key, certified": lambda: watched(
                statistics=["key_mass"], certify=16
            ),
            "cheap set": lambda: watched(statistics=CHEAP),
            "all statistics": watched,
            "sink_profile": lambda: sink_profile(self.model, ids),
            "implied_prior": lambda: implied_prior(self.model, ids),
            "first key hidden, one layer": lambda: changed(layers=[18]),
            "first key hidden, all layers": changed,
        }
        return cases | ({"eager, with weights": plans} if eager else {})


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", type=int, default=2048, help="most tokens of eager attention")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", nargs=2, metavar=("LENGTH", "CASE"), help="peak of one case")
    options = arguments(parser, argv, quick={"lengths": [32], "repeats": 1, "memory": False})
    if options.alone:
        length, case = int(options.alone[0]), options.alone[1]
        print(added_peak(Model().cases(length, True)[case]))
        return
    report = Report(
        "real_models", "SmolLM2-135M, float32, one sequence", options, ("transformers",)
    )
    columns = [Column("seconds", "s", ".2f")]
    table = report.table("watching a forward pass", columns, peak=True, width=34)
    model = Model()
    for length in options.lengths:
        cases = model.cases(length, length <= options.eager)
        seconds = interleaved(cases, options.repeats)
        for case, taken in seconds.items():
            peak = alone(length, case) if options.memory else None
            table.add(case, taken, length=length, ratio=taken / seconds[UNIT], peak=peak)
    report.finish()


def alone(length: int, case: str) -> float:
    """MiB that a case adds to the peak of a process of its own."""
    command = [sys.executable, __file__, "--alone", str(length), case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
