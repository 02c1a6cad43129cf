"""The command line: `goatviz reproduce`, `train`, `sweep`, `pretrained` and `info`.

Options are the fields of plain dataclasses, turned into flags by tyro; what a command does lives in
the modules it calls.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

import tyro

from goatviz import checks

if TYPE_CHECKING:
    import xarray as xr

    from goatviz.analysis.runs import Runs
    from goatviz.training.config import TrainConfig

#: Errors that are reported in one line.
_ERRORS = (ValueError, KeyError, OSError, ImportError, FloatingPointError, MemoryError)
#: Options of how a command is carried out this time, which a card or table leaves out.
_UNRECORDED = ("--resume", "--overwrite", "--minutes")
#: Fields that are not options: positional arguments, and groups of options.
_UNTYPED = ("folder", "task", "config", "execution")


@dataclass(frozen=True)
class Reproduce:
    """Judge the paper's claims by the checkpoints that goatviz ships, and draw its figures."""

    out: Path = Path("figures")
    """Folder for index.html and its figures; created if missing."""

    def run(self, command_line: str) -> None:
        from goatviz.paper import reproduce

        with checks.output_folder("--out", self.out) as out:
            print(reproduce(out, tell=print))


@dataclass(frozen=True)
class Train:
    """Train one model: `goatviz train TASK --preset SIZE --help` lists what can be changed."""

    task: Annotated[str, tyro.conf.Positional]
    """copy-mixture, passkey, needle, text, dna or images."""
    preset: str = "tiny"
    """The recipe to start from: tiny, small or paper."""

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
class Info:
    """Say what a report of a bug needs: versions, devices, checkpoints, attention backends."""

    json: bool = False
    """Print JSON."""

    def run(self, command_line: str) -> None:
        from goatviz.environment import info

        found = info()
        print(json.dumps(found.to_dict(), indent=2) if self.json else found)


@dataclass(frozen=True)
class Sweep:
    """Evaluate every checkpoint of a folder at every length: its answers (passkey, needle, images)
    or its loss on documents (text, dna, with --source). The result is netCDF. Checkpoints that do
    not load are named and left out, and the exit status is then 3."""

    folder: tyro.conf.Positional[Path]
    """Checkpoints of one recipe that differ only in scheme and seed."""
    out: Path = Path("sweep.nc")
    """File to write, .nc; its folder is created if missing."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Tokens of context, increasing; of images, 1 + n x n patches."""
    depths: tuple[float, ...] = ()
    """Answers: their positions, as fractions of the text; makes a grid of lengths and depths."""
    examples: int = 256
    """Answers: questions for each cell, the same for all models."""
    source: str | None = None
    """Documents: a file, folder, archive or streamed data set that no model was trained on."""
    documents: int | None = None
    """Documents: largest number of pieces of the longest length, spread over all documents."""
    per_document: int = 1
    """Documents: largest number of pieces from one document."""
    join: tuple[Path, ...] = ()
    """Tables of other runs with the same questions or pieces; their runs come first."""
    cache: Path | None = None
    """Folder of measured cells, created if missing, from which a stopped sweep resumes."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self, command_line: str) -> int:
        # Before hours of measuring, not after.
        if self.out.suffix != ".nc":
            raise ValueError(f"--out must end in .nc, got {self.out.name}")
        if self.out.is_dir():
            raise ValueError(f"--out must be a file, got the folder {self.out}")
        if self.out.exists() and not self.overwrite:
            raise ValueError(f"--out {self.out} is there already: pass --overwrite to replace it")
        kept = nullcontext() if self.cache is None else checks.output_folder("--cache", self.cache)
        folder = checks.output_folder("the folder of --out", self.out.parent)
        with folder, kept, _flushed_denormals():
            return self._sweep(command_line)

    def _sweep(self, command_line: str) -> int:
        from goatviz.analysis import load_runs
        from goatviz.results import save_result

        left_out = []
        runs = load_runs(self.folder, skipped=left_out.append)
        for error in left_out:
            print(f"goatviz: left out: {' '.join(str(error).split())}", file=sys.stderr)
        sweep = self._answers if runs.task.answer_length else self._documents
        result, measure = sweep(runs, command_line)
        save_result(result, self.out)
        for scheme, models in runs.models.items():
            values = ", ".join(
                f"{value:{measure.form}} at {length:,}"
                for length, value in zip(
                    self.lengths, measure.values.sel(scheme=scheme).values, strict=True
                )
            )
            runs_text = checks.count_text(len(models), "run")
            runs_text += " and those joined" if self.join else ""
            print(f"{scheme} ({runs_text}), {measure.name}: {values}")
        print(self.out)
        return 3 if left_out else 0

    def _answers(self, runs: Runs, command_line: str) -> tuple[xr.Dataset, _Headline]:
        from goatviz.analysis import join_sweeps, length_sweep, needle_grid
        from goatviz.analysis.length import check_joinable

        if self.source is not None or self.documents is not None or self.per_document != 1:
            raise ValueError(
                "--source, --documents and --per-document are for text and dna; "
                f"{self.folder} holds models of {runs.task.name}"
            )
        earlier = self._earlier(
            lambda table: check_joinable(table, runs.models, runs.task, self.lengths, self.depths)
        )
        asked = {"lengths": self.lengths, "examples": self.examples, **self._common()}
        if self.depths:
            sweep = needle_grid(runs.models, runs.task, depths=self.depths, **asked)
        else:
            sweep = length_sweep(runs.models, runs.task, **asked)
        sweep.attrs["command"] = command_line
        sweep = join_sweeps(*earlier, sweep)
        if self.depths:
            return sweep, _Headline("answer tokens right", ".1%", sweep["token"].mean("depth"))
        return sweep, _Headline("whole answers right", ".1%", sweep["mean_strict"])

    def _documents(self, runs: Runs, command_line: str) -> tuple[xr.Dataset, _Headline]:
        from goatviz.analysis import join_sweeps, perplexity_sweep
        from goatviz.analysis.length import check_losses_joinable

        if not hasattr(runs.task, "source"):
            raise ValueError(
                f"{self.folder} must hold models of passkey, needle, images, text or dna, "
                f"got {runs.task.name}"
            )
        if self.source is None:
            raise ValueError(
                f"{self.folder} holds models of {runs.task.name}: pass --source with documents "
                "that none of them was trained on"
            )
        if self.depths:
            raise ValueError("--depths are for passkey and needle: documents have no answers")
        if self.source == runs.task.source:
            raise ValueError(f"--source {self.source} is what these models were trained on")
        task = replace(runs.task, source=self.source)
        asked = {
            "lengths": self.lengths,
            "documents": self.documents,
            "per_document": self.per_document,
        }
        earlier = self._earlier(
            lambda table: check_losses_joinable(table, runs.models, task, **asked)
        )
        sweep = perplexity_sweep(runs.models, task, **asked, **self._common())
        sweep.attrs["command"] = command_line
        sweep = join_sweeps(*earlier, sweep)
        return sweep, _Headline("loss [nats/token]", ".4f", sweep["mean_loss"])

    def _earlier(self, check: Callable[[xr.Dataset], None]) -> list[xr.Dataset]:
        """The tables to join, each of which passes the check."""
        from goatviz.results import load_result

        tables = [load_result(path) for path in self.join]
        for path, table in zip(self.join, tables, strict=True):
            try:
                check(table)
            except (TypeError, ValueError) as error:
                raise ValueError(f"--join {path}: {error}") from error
        return tables

    def _common(self) -> dict[str, Any]:
        return {"cache": self.cache, "progress": True}


class _Headline(NamedTuple):
    """What a sweep prints: a measure by scheme and length."""

    name: str
    form: str
    values: xr.DataArray


# A union with `|` would make tyro import typeguard, and without a help it reads the source of
# `typing` in search of one: each takes as long as much of the rest.
_Command = Annotated[
    Union[Reproduce, Train, Sweep, Pretrained, Info],  # noqa: UP007
    tyro.conf.arg(help="Each has options of its own: goatviz COMMAND --help."),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    A bad argument prints one clear line and returns 2, Ctrl-C one line and 130; a sweep that left
    checkpoints out returns 3, and so does a run that `--minutes` stopped.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The command in a card or table starts from scratch and ends, whatever was there this time.
    kept = [
        word
        for before, word in pairwise(["", *given])
        if before != "--minutes" and word.split("=")[0] not in _UNRECORDED
    ]
    command_line = shlex.join(["goatviz", *kept])
    try:
        if len(given) > 1 and given[0] == "train" and not given[1].startswith("-"):
            return _train(given[1:], command_line)
        else:
            command = tyro.cli(_Command, args=given, prog="goatviz")
            with _naming_options(type(command)):
                return command.run(command_line) or 0
    except _ERRORS as error:
        print(f"goatviz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"goatviz: stopped{stop}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are zero in the block, and in threads that begin in it.

    A prior that falls with the lag makes weights that small, on which some processors take several
    times as long as on others (benchmarks/attention.py).
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _naming_options(kind: type) -> Iterator[None]:
    """Let errors in the block name fields of `kind` as command-line options."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(_with_options(str(error), _option_fields(kind))) from error


def _option_fields(kind: type) -> set[str]:
    names = set()
    for field in fields(kind):
        default = None if field.default is MISSING else field.default
        names |= _option_fields(type(default)) if is_dataclass(default) else {field.name}
    return names - set(_UNTYPED)


def _with_options(message: str, names: set[str]) -> str:
    """A message with "--learning-rate" for "learning_rate", where that can only be the field."""
    if not names:
        return message
    name = rf"(?<![\w/.'-])(?:{'|'.join(sorted(names))})(?![\w/.'-])"
    subject = re.match(rf"({name}(, | and | \+ )?)*", message).end()

    def option(found: re.Match) -> str:
        return "--" + found[0].replace("_", "-")

    rest = re.sub(rf"(?=\w+_){name}|{name}(?==)|(?<=needs ){name}", option, message[subject:])
    return re.sub(name, option, message[:subject]) + rest


def _train(given: list[str], command_line: str) -> int:
    """Train with a preset's config, each of whose fields is a flag; return the exit status."""
    from goatviz.training.presets import preset

    with _naming_options(Train):
        chosen, rest = tyro.cli(Train, args=given, add_help=False, return_unknown_args=True)
        start = preset(chosen.task, chosen.preset)
    options = _train_options(start)
    with _naming_options(options):
        run = tyro.cli(
            options,
            args=rest,
            prog=f"goatviz train {chosen.task}",
            description=f"Train on {chosen.task}, from the preset {chosen.preset} on "
            "(--preset changes it).",
            # The task's fields are flags of their own: within the config it is fixed.
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
        )
        target = _train_target(chosen.task, run)
        with checks.output_folder("--out", run.out), _flushed_denormals():
            return _run_training(run, target, command_line)


def _train_options(start: TrainConfig) -> type:
    """The options of a training run, as a class made at run time: they depend on the task."""
    from goatviz.training.config import TrainConfig
    from goatviz.training.execution import Execution

    def option(kind: Any, words: str) -> Any:
        return Annotated[kind, tyro.conf.arg(help=words)]

    return make_dataclass(
        "Options",
        [
            ("out", option(Path, "Folder for the checkpoint; created if missing.")),
            ("task", Annotated[type(start.task), tyro.conf.arg(name="")], start.task),
            ("config", Annotated[TrainConfig, tyro.conf.arg(name="")], start),
            ("name", option(str | None, "File name; default TASK-POSITIONS."), None),
            ("execution", Annotated[Execution, tyro.conf.arg(name="")], Execution()),
            ("tensorboard", option(bool | None, "Log to TensorBoard; None: if installed."), None),
            ("save_every", option(int, "Steps between saves of the unfinished run."), 100),
            ("minutes", option(float | None, "Minutes until it is saved and stops."), None),
            ("resume", option(bool, "Resume the unfinished run of that name."), False),
            ("overwrite", option(bool, "Replace a checkpoint or run of that name."), False),
        ],
    )


def _train_target(task: str, run: Any) -> Path:
    """Path of the checkpoint without its ending; nothing is replaced or resumed unasked."""
    offset = [str(run.task.offset)] if task == "copy-mixture" else []
    name = "-".join([task, *offset, run.config.positions]) if run.name is None else run.name
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"--name must be a file name, got {name!r}")
    target = run.out / name
    if run.resume and run.overwrite:
        raise ValueError("--resume and --overwrite contradict each other: pass one of them")
    # An unfinished run that replaces a checkpoint was allowed to when it began.
    if target.with_name(name + ".json").exists() and not (run.overwrite or run.resume):
        raise ValueError(f"--out already holds {name}: pass --overwrite to replace it")
    if _state(target).exists() and not (run.resume or run.overwrite):
        raise ValueError(
            f"--out holds an unfinished run {name}: pass --resume to go on, or --overwrite"
        )
    if run.resume and not _state(target).exists():
        raise ValueError(f"--resume found no training state at {_state(target)}")
    return target


def _state(target: Path) -> Path:
    return target.with_name(target.name + ".state.safetensors")


def _run_training(run: Any, target: Path, command_line: str) -> int:
    from goatviz.training import OutOfTime, save_checkpoint, train
    from goatviz.training.checkpoint import make_card

    config = replace(run.config, task=run.task)
    state, log = _state(target), target.with_name(target.name + ".jsonl")
    with _set_aside(state, log) if run.overwrite else nullcontext():
        try:
            result = train(
                config,
                execution=run.execution,
                state=state,
                save_every=run.save_every,
                resume=run.resume,
                log=log,
                tensorboard=run.tensorboard,
                minutes=run.minutes,
            )
            if not result.is_main:
                return 0
            card = make_card(result, command=command_line, data=f"{config.task}, drawn by seed")
            path = save_checkpoint(result.model, card, target)
        except OutOfTime as stop:
            print(f"goatviz: {stop}: pass --resume to go on", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                ": pass --resume to go on" if state.exists() else " before the run was first saved"
            ) from None
    state.unlink()
    print(f"{path}: {summarise_losses(card['losses'])}")
    return 0


@contextmanager
def _set_aside(state: Path, log: Path) -> Iterator[None]:
    """Set an old run aside; it is restored if the block fails before any state is saved."""
    aside = {path: path.with_name(path.name + ".old") for path in (state, log) if path.exists()}
    for path, old in aside.items():
        path.replace(old)
    try:
        yield
    except BaseException:
        if not state.exists():
            for path, old in aside.items():
                old.replace(path)
        raise
    finally:
        for old in aside.values():
            old.unlink(missing_ok=True)


def summarise_losses(losses: dict[str, float]) -> str:
    """A card's losses in one line."""
    summary = f"held-out loss {losses['held_out']:.4f} ± {losses['held_out_standard_error']:.4f}"
    if "bayes_optimal" in losses:
        summary += f", Bayes {losses['bayes_optimal']:.4f}"
    summary += " nats/token"
    if "answers_strict" in losses:
        summary += (
            f", answers right {losses['answers_strict']:.1%}, their tokens "
            f"{losses['answers_token']:.1%} (chance {losses['chance_token']:.0%})"
        )
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
