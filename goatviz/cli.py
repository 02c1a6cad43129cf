"""The command line: `goatviz reproduce`, `goatviz train`, `goatviz pretrained`.

Options are the fields of plain dataclasses, turned into flags by tyro; what a command does lives in
the modules it calls.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Reproduce:
    """Draw the figures of the paper that goatviz has, from the checkpoints it ships."""

    out: Path = Path("figures")
    """Folder for index.html and its figures; made if it is not there."""

    def run(self, command_line: str) -> None:
        from goatviz.paper import reproduce

        print(reproduce(self.out))


@dataclass(frozen=True)
class Train:
    """Train one model on the copy mixture and write it with its card."""

    out: Path
    """Folder for the checkpoint; made if it is not there."""
    offset: int = 1
    """How far back the second source lies, in tokens."""
    positions: str = "goat"
    """Position scheme: goat, none, rope, rope-interpolated, alibi, bucket, sinusoidal, learned."""
    name: str | None = None
    """File name; default copy-mixture-OFFSET-POSITIONS."""
    length: int = 64
    """Tokens of context."""
    vocab_size: int = 32
    """Symbols."""
    first: float = 0.3
    """Share of tokens that copy the first one."""
    previous: float = 0.4
    """Share of tokens that copy the one OFFSET places before."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences a step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    prior_learning_rate: float = 3e-2
    """Peak learning rate of the prior."""
    content_dim: int = 4
    """Content size of queries and keys; so narrow that tokens do not find themselves by content."""
    skip: bool = False
    """Add the stream to what attention brings; without it only the plan carries tokens."""
    seed: int = 0
    """Of weights and data."""
    device: str = "cpu"
    """Where to train."""
    overwrite: bool = False
    """Replace a checkpoint of that name."""

    def run(self, command_line: str) -> None:
        from goatviz.tasks import CopyMixture
        from goatviz.training import TrainConfig, save_checkpoint, train
        from goatviz.training.checkpoint import make_card

        name = self.name or f"copy-mixture-{self.offset}-{self.positions}"
        target = self.out / name
        if target.with_name(name + ".json").exists() and not self.overwrite:
            raise ValueError(f"--out already holds {name}: pass --overwrite to replace it")
        config = TrainConfig(
            task=CopyMixture(
                length=self.length,
                vocab_size=self.vocab_size,
                offset=self.offset,
                first=self.first,
                previous=self.previous,
            ),
            positions=self.positions,
            content_dim=self.content_dim,
            skip=self.skip,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            prior_learning_rate=self.prior_learning_rate,
            seed=self.seed,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        result = train(config, device=self.device)
        words = (
            f"copy mixture drawn by seed: {self.length} tokens of {self.vocab_size} symbols, "
            f"{self.first:g} copy the first token, {self.previous:g} the one {self.offset} before"
        )
        card = make_card(result, command=command_line, data=words)
        path = save_checkpoint(result.model, card, target)
        losses = card["losses"]
        print(
            f"{path}: held-out loss {losses['held_out']:.4f} "
            f"± {losses['held_out_standard_error']:.4f}, Bayes {losses['bayes_optimal']:.4f} "
            "nats/token"
        )


@dataclass(frozen=True)
class Pretrained:
    """List the checkpoints that come with goatviz."""

    def run(self, command_line: str) -> None:
        from goatviz.training import list_pretrained, load_pretrained

        for name in list_pretrained():
            losses = load_pretrained(name).card["losses"]
            print(
                f"{name}: held-out {losses['held_out']:.4f}, "
                f"Bayes {losses['bayes_optimal']:.4f} nats/token"
            )


Command = (
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Pretrained, tyro.conf.subcommand("pretrained")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a bad argument is one clear line and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = tyro.cli(Command, args=given, prog="goatviz")
    try:
        command.run(shlex.join(["goatviz", *given]))
    except (ValueError, KeyError, OSError) as error:
        print(f"goatviz: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
