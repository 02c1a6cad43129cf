"""Checkpoints at the paper's scale: ``python -m experiments NAME --minutes 8 --out FOLDER``.

Each experiment works in slices: the same command goes on where it was, and its exit status is 3
until all is done. ``weights`` cuts a checkpoint into small files, and ``join`` puts them together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import dna, language, needle, passkey, vision
from experiments._slices import DONE, run
from experiments._weights import SHARD_BYTES, join_shards, write_shards

EXPERIMENTS = tuple(each.EXPERIMENT for each in (passkey, needle, language, dna, vision))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is done, 1 if something failed, 2 for wrong arguments, 3 if time was over."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for experiment in EXPERIMENTS:
        # Options are recorded as they are written: no abbreviations.
        of_one = commands.add_parser(experiment.name, help=experiment.about, allow_abbrev=False)
        experiment.add_arguments(of_one)
    weights = commands.add_parser("weights", help="a checkpoint as float16, in files below 16 MB")
    weights.add_argument("checkpoint", type=Path, help="in the folder of work, without an ending")
    weights.add_argument("--out", type=Path, required=True)
    weights.add_argument("--shards", type=int, nargs="+", help="numbers of files (default: all)")
    weights.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="most in a file")
    join = commands.add_parser("join", help="such files into a checkpoint")
    join.add_argument("folder", type=Path)
    join.add_argument("name", help="of the run")
    join.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        if hasattr(options, "experiment"):
            return run(options.experiment, options, arguments[1:])
        if hasattr(options, "checkpoint"):
            size, chosen = options.shard_bytes, options.shards
            print(*write_shards(options.checkpoint, options.out, size, chosen=chosen), sep="\n")
        else:
            print(join_shards(options.folder, options.name, options.out))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
