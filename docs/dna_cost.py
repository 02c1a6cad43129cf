"""What training costs the shipped DNA models: throughput and peak memory.

Run with ``python docs/dna_cost.py SOURCE`` on a quiet machine, where SOURCE holds the bases that
they were trained on (goatviz/checkpoints/README.md); it writes goatviz/checkpoints/dna-cost.nc. One
thread, as in training; a few minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import goatviz
from experiments.dna import training_cost
from goatviz.training import TrainConfig

FOLDER = Path(goatviz.__file__).parent / "checkpoints"
SCHEMES = ("goat", "rope")
#: Tokens of context: that of training, and up to four times as much.
LENGTHS = (512, 1024, 2048)


def main(source: str) -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipes = {}
    for scheme in SCHEMES:
        config = TrainConfig.from_dict(goatviz.load_pretrained(f"dna-{scheme}").card["config"])
        recipes[scheme] = replace(config, task=replace(config.task, source=source))
    cost = training_cost(recipes, lengths=LENGTHS)
    cost.attrs["command"] = "python docs/dna_cost.py SOURCE"
    goatviz.save_result(cost, FOLDER / "dna-cost.nc")
    print(cost.to_dataframe().round(0).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
