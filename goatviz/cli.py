"""The command line: `goatviz reproduce`, `goatviz train`, `goatviz sweep`, `goatviz pretrained`.

Options are the fields of plain dataclasses, turned into flags by tyro; what a command does lives in
the modules it calls.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

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
    """Train one model: `goatviz train TASK --preset SIZE --help` lists what can be changed."""

    task: Annotated[str, tyro.conf.Positional]
    """copy-mixture, passkey, needle, text or dna."""
    preset: str = "tiny"
    """The recipe to start from: tiny, small or paper."""
    options: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Options of that recipe."""

    def run(self, command_line: str) -> None:
        raise ValueError(f"TASK comes first: goatviz train {self.task} --preset {self.preset} ...")


@dataclass(frozen=True)
class Pretrained:
    """List the checkpoints that come with goatviz."""

    def run(self, command_line: str) -> None:
        from goatviz.training import list_pretrained, load_pretrained

        for name in list_pretrained():
            print(f"{name}: {summarise_losses(load_pretrained(name).card['losses'])}")


@dataclass(frozen=True)
class Sweep:
    """Ask every checkpoint of a folder for answers, at every length; the result is netCDF."""

    folder: tyro.conf.Positional[Path]
    """Checkpoints of one passkey or needle recipe, that differ in scheme and seed alone."""
    out: Path = Path("sweep.nc")
    """File to write, .nc; its folder is made if it is not there."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Tokens of context, increasing."""
    depths: tuple[float, ...] = ()
    """Where the answer stands, shares of the text; given, a grid of lengths and depths is made."""
    examples: int = 256
    """Questions for each cell, the same for all models."""
    cache: Path | None = None
    """Folder of measured cells, made if it is not there: a stopped sweep goes on."""
    overwrite: bool = False
    """Replace the file."""

    def run(self, command_line: str) -> None:
        from goatviz.analysis import length_sweep, load_runs, needle_grid
        from goatviz.results import save_result

        # Before hours of measuring, not after.
        if self.out.suffix != ".nc":
            raise ValueError(f"--out must end in .nc, got {self.out.name}")
        if self.out.exists() and not self.overwrite:
            raise ValueError(f"--out {self.out} is there already: pass --overwrite to replace it")
        runs = load_runs(self.folder)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
        measured = {
            "lengths": self.lengths,
            "examples": self.examples,
            "cache": self.cache,
            "progress": True,
        }
        if self.depths:
            result = needle_grid(runs.models, runs.task, depths=self.depths, **measured)
        else:
            result = length_sweep(runs.models, runs.task, **measured)
        result.attrs["command"] = command_line
        save_result(result, self.out)
        for scheme, models in runs.models.items():
            shares = result["token" if self.depths else "mean_strict"].sel(scheme=scheme)
            shares = shares.mean("depth") if self.depths else shares
            said = ", ".join(
                f"{share:.1%} at {length:,}"
                for length, share in zip(self.lengths, shares.values, strict=True)
            )
            print(f"{scheme} ({len(models)} run(s)): {said}")
        print(self.out)


Command = (
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Pretrained, tyro.conf.subcommand("pretrained")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a bad argument is one clear line and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A card's or table's command makes it from nothing, whatever this last part found there.
    kept = [word for word in given if word not in ("--resume", "--overwrite")]
    command_line = shlex.join(["goatviz", *kept])
    try:
        if len(given) > 1 and given[0] == "train" and not given[1].startswith("-"):
            _train(given[1], given[2:], command_line)
        else:
            tyro.cli(Command, args=given, prog="goatviz").run(command_line)
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        print(f"goatviz: {error}", file=sys.stderr)
        return 2
    return 0


def _train(task: str, given: list[str], command_line: str) -> None:
    """Train with a preset's config, each of whose fields is a flag."""
    from goatviz.training import save_checkpoint, train
    from goatviz.training.checkpoint import make_card
    from goatviz.training.config import TrainConfig
    from goatviz.training.presets import preset

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    chosen, rest = first.parse_known_args(given)
    start = preset(task, chosen.preset)

    def option(kind: Any, words: str) -> Any:
        return Annotated[kind, tyro.conf.arg(help=words)]

    # Not written as a class, since the config's type is known only here.
    options = make_dataclass(
        "Options",
        [
            ("out", option(Path, "Folder for the checkpoint; made if it is not there.")),
            ("task", Annotated[type(start.task), tyro.conf.arg(name="")], start.task),
            ("config", Annotated[TrainConfig, tyro.conf.arg(name="")], start),
            ("name", option(str | None, "File name; default TASK-POSITIONS."), None),
            ("device", option(str, "Where to train."), "cpu"),
            ("save_every", option(int, "Steps between two savings of the unfinished run."), 100),
            ("resume", option(bool, "Go on with the unfinished run of that name."), False),
            ("overwrite", option(bool, "Replace a checkpoint or run of that name."), False),
        ],
    )
    run = tyro.cli(
        options,
        args=rest,
        prog=f"goatviz train {task}",
        description=f"Train on {task}, from the preset {chosen.preset} on (--preset changes it).",
        # The task's fields are flags of their own: within the config it is fixed.
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
    )
    config = replace(run.config, task=run.task)
    parts = [task, *([str(config.task.offset)] if task == "copy-mixture" else [])]
    name = run.name or "-".join([*parts, config.positions])
    target = run.out / name
    state = target.with_name(name + ".state.safetensors")
    if run.resume and run.overwrite:
        raise ValueError("--resume and --overwrite contradict each other: pass one of them")
    # An unfinished run that replaces a checkpoint was allowed to when it began.
    if target.with_name(name + ".json").exists() and not (run.overwrite or run.resume):
        raise ValueError(f"--out already holds {name}: pass --overwrite to replace it")
    if state.exists() and not (run.resume or run.overwrite):
        raise ValueError(
            f"--out holds an unfinished run {name}: pass --resume to go on, or --overwrite"
        )
    run.out.mkdir(parents=True, exist_ok=True)
    if run.overwrite:
        state.unlink(missing_ok=True)
    result = train(
        config, device=run.device, state=state, save_every=run.save_every, resume=run.resume
    )
    card = make_card(result, command=command_line, data=f"{config.task}, drawn by seed")
    path = save_checkpoint(result.model, card, target)
    state.unlink()
    print(f"{path}: {summarise_losses(card['losses'])}")


def summarise_losses(losses: dict[str, float]) -> str:
    """A card's losses in one line."""
    said = f"held-out loss {losses['held_out']:.4f} ± {losses['held_out_standard_error']:.4f}"
    if "bayes_optimal" in losses:
        said += f", Bayes {losses['bayes_optimal']:.4f}"
    said += " nats/token"
    if "answers_strict" in losses:
        said += (
            f", answers right {losses['answers_strict']:.1%}, their tokens "
            f"{losses['answers_token']:.1%} (chance {losses['chance_token']:.0%})"
        )
    return said


if __name__ == "__main__":
    raise SystemExit(main())
