"""What it takes to take a prior apart: all heads, or one head whose components are scaled.

Run with ``python benchmarks/priors.py``. "profile" is `prior_profile` of all heads, "mixer"
evaluates one head and mixes it as learned, "mix" is another scale of its sink, as a slider asks for
it. Repeats are interleaved; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from _measure import interleaved
from _report import Column, Report, arguments

from goatviz.analysis import prior_profile, prior_sources
from goatviz.analysis.prior_mix import PriorMixer
from goatviz.models import goat_prior

HEADS = 8
RANK = 4
TRAINING_LENGTH = 1024
COLUMNS = tuple(
    Column(metric, "ms", ",.0f") for metric in ("profile", "profile of a head", "mixer", "mix")
)


def measure(heads: int, length: int, repeats: int) -> list[float]:
    """Milliseconds of every column, for a random prior of some heads."""
    torch.manual_seed(0)
    prior = goat_prior(heads, rank=RANK, sink_rank=RANK, training_length=TRAINING_LENGTH)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    (source,) = prior_sources(prior)
    mixer = PriorMixer(source, length=length)
    mixer.mix()
    scales = itertools.cycle([0.5, 1.5])
    seconds = interleaved(
        {
            "profile": lambda: prior_profile(prior, length=length),
            "mixer": lambda: PriorMixer(source, length=length).mix(),
            "mix": lambda: mixer.mix(sink=next(scales)),
        },
        repeats,
    )
    cells = [seconds["profile"], seconds["profile"] / heads, seconds["mixer"], seconds["mix"]]
    return [1e3 * cell for cell in cells]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 32_768, 1_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    options = arguments(parser, argv, quick={"lengths": [64], "repeats": 1})
    report = Report(
        "priors",
        f"Taking a prior apart: R = M = {RANK}; medians of {options.repeats} interleaved repeats",
        options,
    )
    table = report.table("prior_profile and PriorMixer", COLUMNS, ratio=False, width=8)
    for length in options.lengths:
        for heads in (1, HEADS):
            case = f"{heads} head{'s' if heads > 1 else ''}"
            table.add(case, *measure(heads, length, options.repeats), length=length)
    report.finish()


if __name__ == "__main__":
    main()
