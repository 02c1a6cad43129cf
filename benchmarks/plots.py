"""plot_prior: seconds and payload at 1k, 16k and 1M tokens, for every kind.

A small model (1 layer, 2 heads, the shipped checkpoint) at all lengths and one with 12 x 12 heads.
Medians; the peak is the process's own high-water mark. Run: python benchmarks/plots.py
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import plotly
import torch

from goatviz import CausalLM, ModelConfig, load_pretrained, plot_prior
from goatviz.plots import PRIOR_KINDS

LIMIT_BYTES = 2_000_000


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
        "1 x 2 heads": load_pretrained("copy-mixture-4-goat").model,
        "12 x 12 heads": CausalLM(large),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 16_000, 1_000_000])
    parser.add_argument("--large-lengths", type=int, nargs="*", default=[1_000, 16_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, plotly {plotly.__version__}, "
        f"{os.cpu_count()} cores, medians of {options.repeats}"
    )
    print(
        f"{'model':<14}  {'length':>9}  {'kind':<14}  {'plot_prior':>10}  {'to_json':>8}  "
        f"{'payload':>9}"
    )
    heaviest = 0
    for name, model in models().items():
        lengths = options.lengths if name == "1 x 2 heads" else options.large_lengths
        for length in lengths:
            for kind in PRIOR_KINDS:
                drawn, written = [], []
                for _ in range(options.repeats):
                    start = time.perf_counter()
                    figure = plot_prior(model, kind=kind, length=length)
                    drawn.append(time.perf_counter() - start)
                    start = time.perf_counter()
                    payload = len(figure.to_json())
                    written.append(time.perf_counter() - start)
                heaviest = max(heaviest, payload)
                print(
                    f"{name:<14}  {length:>9,}  {kind:<14}  {statistics.median(drawn):>8.2f} s  "
                    f"{1e3 * statistics.median(written):>5.0f} ms  {payload / 1e6:>6.2f} MB",
                    flush=True,
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    verdict = "met" if heaviest < LIMIT_BYTES else "missed"
    print(f"payload below 2 MB: {verdict} (largest {heaviest / 1e6:.2f} MB); peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
