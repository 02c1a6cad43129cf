"""plot_prior: seconds and payload at 1k, 16k and 1M tokens, for every kind.

A small model (1 layer, 2 heads, the shipped checkpoint) at all lengths and one with 12 x 12 heads.
Medians; the peak is the process's own high-water mark. Run: python benchmarks/plots.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from _measure import resident_peak
from _report import Column, Report, arguments

from goatviz import CausalLM, ModelConfig, load_pretrained, plot_prior
from goatviz.plots import PRIOR_KINDS

LIMIT_BYTES = 2_000_000
SMALL = "1 x 2 heads"
COLUMNS = (
    Column("plot_prior", "s", ".2f"),
    Column("to_json", "ms", ",.0f"),
    Column("payload", "MB", ".2f"),
)


def models() -> dict[str, torch.nn.Module]:
    """What is drawn."""
    torch.manual_seed(0)
    large = ModelConfig(
        vocab_size=4,
        training_length=2048,
        num_layers=12,
        num_heads=12,
        embed_dim=12 * 16,
        mlp_ratio=0.0,
        content_dim=4,
    )
    return {
        SMALL: load_pretrained("copy-mixture-4-goat").model,
        "12 x 12 heads": CausalLM(large),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 16_000, 1_000_000])
    parser.add_argument("--large-lengths", type=int, nargs="*", default=[1_000, 16_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = arguments(parser, argv, quick={"lengths": [50], "large_lengths": [], "repeats": 1})
    about = f"plot_prior: medians of {options.repeats}"
    report = Report("plots", about, options, ("plotly",))
    table = report.table("figures", COLUMNS, ratio=False, width=30)
    heaviest = 0.0
    for name, model in models().items():
        lengths = options.lengths if name == SMALL else options.large_lengths
        for length in lengths:
            for kind in PRIOR_KINDS:
                drawn, written, payload = measure(model, kind, length, options.repeats)
                heaviest = max(heaviest, payload)
                table.add(f"{name}, {kind}", drawn, 1e3 * written, payload / 1e6, length=length)
    report.target("largest payload, MB", heaviest / 1e6, LIMIT_BYTES / 1e6)
    report.note(f"peak of the process: {resident_peak():.0f} MiB")
    report.finish()


def measure(
    model: torch.nn.Module, kind: str, length: int, repeats: int
) -> tuple[float, float, int]:
    """Median seconds of drawing and of writing, and bytes of the figure's JSON."""
    drawn, written = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        figure = plot_prior(model, kind=kind, length=length)
        drawn.append(time.perf_counter() - start)
        start = time.perf_counter()
        payload = len(figure.to_json())
        written.append(time.perf_counter() - start)
    return statistics.median(drawn), statistics.median(written), payload


if __name__ == "__main__":
    main()
