"""A slice of an experiment: train for some minutes, go on where the last slice stopped, measure.

A folder of work keeps what is large (states, checkpoints, measured cells), and `--out` gets what is
worth taking home. Training is `goatviz.training.train`, measures are those of `goatviz.analysis`.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file

from goatviz.analysis import length_sweep, load_runs, perplexity_sweep, prior_profile
from goatviz.files import whole_file
from goatviz.models import CausalLM, Transformer
from goatviz.results import save_result
from goatviz.tasks import Task
from goatviz.training import (
    Execution,
    OutOfTime,
    TrainConfig,
    save_checkpoint,
    train,
)
from goatviz.training.checkpoint import make_card

#: Exit statuses: all done; something failed; out of time, the same command goes on.
DONE, FAILED, UNFINISHED = 0, 1, 3
#: Options that say how and where, not what.
_UNRECORDED = ("--minutes", "--out", "--work")
#: What results are written with, asked for before the work and not after it.
_NEEDED = ("xarray", "h5netcdf", "h5py")
_HEADLINES = ("mean_strict", "mean_loss")


class Trained(NamedTuple):
    """What is measured.

    Attributes
    ----------
    task : Task
        Task that all models were trained on.
    models : dict of str to list of Transformer
        Models by scheme, in the order of their seeds, on the device of the slice.
    cells : Path
        Folder of measured cells, from which a stopped measurement goes on.
    """

    task: Task
    models: dict[str, list[Transformer]]
    cells: Path


#: Results by the end of their file's name; each that comes replaces the one before. A measure that
#: writes its file itself gives none.
Measures = Mapping[str, Callable[[], Iterable[xr.Dataset]]]


@dataclass(frozen=True)
class Experiment:
    """Recipes to train, and what is measured of the models.

    Attributes
    ----------
    name : str
        Name of the command, of the folder of work, and beginning of every file's name.
    about : str
        One line of help.
    schemes : tuple of str
        Position schemes; rope-interpolated is measured with rope, and trained with it.
    recipe : callable
        The recipe that the options ask for, of any scheme and seed.
    measures : callable
        Measures of trained models, in the order in which they are taken.
    add_options : callable
        Function that adds options of its own to a parser.
    """

    name: str
    about: str
    schemes: tuple[str, ...]
    recipe: Callable[[Namespace], TrainConfig]
    measures: Callable[[Trained, Namespace], Measures]
    add_options: Callable[[ArgumentParser], None] = lambda parser: None

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options of all experiments, then those of this one."""
        parser.set_defaults(experiment=self)
        add = parser.add_argument
        add("--schemes", nargs="+", default=list(self.schemes), choices=self.schemes)
        add("--seeds", type=int, nargs="+", default=[0])
        add("--minutes", type=float, help="of this slice (default: until all is done)")
        add("--out", type=Path, help="folder for what is worth taking home (default: in --work)")
        add("--work", type=Path, default=Path("build/experiments"), help="where slices go on")
        add("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
        add("--compile", action="store_true", help="torch.compile the training step")
        add("--accumulation", type=int, default=1, help="parts of a batch, to save memory")
        add("--lengths", type=int, nargs="+", help="tokens of context to measure at")
        add("--tiny", action="store_true", help="a rehearsal: tiny models, a few steps")
        self.add_options(parser)

    def runs(self, options: Namespace) -> dict[str, TrainConfig]:
        """Recipes of all runs by name: one seed of every scheme, then the next seed."""
        recipe = self.recipe(options)
        recipe = tiny(recipe) if options.tiny else recipe
        return {
            f"{self.name}-{scheme}-{seed}": replace(recipe, positions=scheme, seed=seed)
            for seed in options.seeds
            for scheme in options.schemes
        }


def tiny(recipe: TrainConfig) -> TrainConfig:
    """A recipe of seconds on one core, for a rehearsal."""
    task = recipe.task
    return replace(
        recipe,
        task=task.at_length(64 if task.patch is None else 1 + 7 * 7),
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        content_dim=16,
        prior_rank=2,
        sink_rank=2,
        steps=6,
        batch_size=4,
        warmup=2,
    )


def doubled(first: int, last: int) -> list[int]:
    """Lengths from the first to the last, each twice the one before."""
    return [first * 2**power for power in range(int(math.log2(last / first)) + 1)]


def growing(sweep: Callable[..., xr.Dataset], lengths: Sequence[int]) -> Iterator[xr.Dataset]:
    """A sweep to the first length, to the second, ...: time that runs out leaves the shorter."""
    for count in range(1, len(lengths) + 1):
        yield sweep(lengths=lengths[:count])


def answers(
    trained: Trained, lengths: Sequence[int], examples: int | Mapping[int, int]
) -> Iterator[xr.Dataset]:
    """Answers that are right, at one length more each time."""
    sweep = partial(
        length_sweep,
        trained.models,
        trained.task,
        examples=examples,
        cache=trained.cells,
        progress=sys.stderr.isatty(),
    )
    return growing(sweep, lengths)


def add_document_options(parser: ArgumentParser) -> None:
    """Add the options of experiments on documents."""
    add = parser.add_argument
    add("--source", required=True, help="documents to train on")
    add("--validation", required=True, help="documents of the held-out loss, none of --source")
    add("--unseen", help="documents to measure on, as one source (default: --validation)")
    add("--documents", type=int, default=16, help="most pieces of the longest length")
    add("--per-document", type=int, default=1, help="most pieces from one document")


def unseen(trained: Trained, options: Namespace) -> Task:
    """The task on documents that were not trained on."""
    task = trained.task.held_out()
    return task if options.unseen is None else replace(task, source=options.unseen)


def losses(trained: Trained, options: Namespace) -> Iterator[xr.Dataset]:
    """Loss on documents that were not trained on, of one scheme more each time."""
    task = unseen(trained, options)
    last = 256 if options.tiny else 32_768
    models: dict[str, list[CausalLM]] = {}
    for scheme, runs in trained.models.items():
        models[scheme] = runs
        yield perplexity_sweep(
            models,
            task,
            lengths=options.lengths or doubled(task.length, last),
            documents=options.documents,
            per_document=options.per_document,
            cache=trained.cells,
            progress=sys.stderr.isatty(),
        )


def run(experiment: Experiment, options: Namespace, arguments: Sequence[str]) -> int:
    """One slice: train what is not trained yet, then measure, until time is over.

    Returns
    -------
    int
        `DONE`; `FAILED` if a run or a measure failed, after the others; or `UNFINISHED`.

    Raises
    ------
    ImportError
        If results could not be written.
    ValueError
        If the folder of work holds runs of another recipe.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ImportError(f"results need {', '.join(missing)}, which are not installed")
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.work / (f"{experiment.name}-tiny" if options.tiny else experiment.name)
    if options.out is None:
        options.out = folder / "out"
    for each in (folder / "cells", options.out):
        each.mkdir(parents=True, exist_ok=True)
    command = _command(experiment, arguments)
    status, runs = DONE, experiment.runs(options)
    left = [name for name, config in runs.items() if not _is_trained(folder / name, config)]
    try:
        for name in left:
            if not _attempted(
                name, partial(_train, folder / name, runs[name], options, end, command)
            ):
                status = FAILED
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on", flush=True)
        status = UNFINISHED
    _keep_records(experiment.name, folder, list(runs), options.out)
    if status != UNFINISHED and any(_is_trained(folder / name, runs[name]) for name in runs):
        try:
            with _limited(end):
                measured = _measure(experiment, folder, options, command)
            status = status if measured else FAILED
        except _Alarm:
            print("out of time while measuring; the same command goes on", flush=True)
            status = UNFINISHED
    for path in sorted(options.out.glob(f"{experiment.name}-*")):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    return status


def _command(experiment: Experiment, arguments: Sequence[str]) -> str:
    """The command that makes the same again, without where and how long."""
    kept = [
        word
        for before, word in pairwise(["", *arguments])
        if before not in _UNRECORDED and word.split("=")[0] not in _UNRECORDED
    ]
    return shlex.join(["python", "-m", "experiments", experiment.name, *kept])


def _attempted(name: str, work: Callable[[], object]) -> bool:
    """Whether some work succeeded; why it did not is printed, and the rest goes on."""
    try:
        work()
    except OutOfTime:
        raise
    except Exception:
        print(f"{name} FAILED:\n{traceback.format_exc()}", flush=True)
        return False
    return True


def _is_trained(target: Path, config: TrainConfig) -> bool:
    """Whether there is a checkpoint; it must be of this recipe."""
    card = target.with_name(f"{target.name}.json")
    if not card.exists():
        return False
    theirs = json.loads(card.read_text(encoding="utf-8"))["config"]
    if theirs != json.loads(json.dumps(config.to_dict())):
        raise ValueError(f"--work holds {card}, which is of another recipe: give another folder")
    return True


def _train(
    target: Path, config: TrainConfig, options: Namespace, end: float | None, command: str
) -> None:
    """Train a run, or go on with it."""
    state = target.with_name(f"{target.name}.state.safetensors")
    result = train(
        config,
        execution=Execution(
            device=options.device,
            mixed_precision="bf16" if options.device == "cuda" else "no",
            compile=options.compile,
            accumulation=options.accumulation,
        ),
        progress=sys.stderr.isatty(),
        state=state,
        save_every=200,
        resume=state.exists(),
        log=target.with_name(f"{target.name}.jsonl"),
        tensorboard=False,
        # At least one step: no slice is for nothing.
        minutes=None if end is None else max(1e-6, (end - time.monotonic()) / 60),
    )
    card = make_card(result, command=command, data=f"{config.task}, drawn by seed")
    save_checkpoint(result.model, card, target)
    state.unlink()
    print(f"{target.name}: {card['wall_time_s']:,.0f} s, {json.dumps(card['losses'])}", flush=True)


class _Alarm(BaseException):
    """Time is over. Nothing on the way catches it, and cells are written whole or not at all."""


@contextmanager
def _limited(end: float | None) -> Iterator[None]:
    """Raise an `_Alarm` in the block when the clock reaches `end`."""

    def stop(*_: object) -> None:
        raise _Alarm

    if end is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, end - time.monotonic()))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _keep_records(name: str, folder: Path, runs: Sequence[str], out: Path) -> None:
    """Write logs, cards, and the priors' parameters of every layer, of all runs so far."""
    log, cards, priors = [], {}, {}
    for run in runs:
        lines = folder / f"{run}.jsonl"
        if lines.exists():
            for line in lines.read_text(encoding="utf-8").splitlines():
                log.append(json.dumps({"run": run} | json.loads(line)) + "\n")
        card = folder / f"{run}.json"
        if card.exists():
            cards[run] = json.loads(card.read_text(encoding="utf-8"))
            with safe_open(folder / f"{run}.safetensors", framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if ".prior." in key:
                        priors[f"{run}.{key}"] = file.get_tensor(key)
    (out / f"{name}-log.jsonl").write_text("".join(log), encoding="utf-8")
    if cards:
        text = json.dumps(cards, indent=1) + "\n"
        (out / f"{name}-cards.json").write_text(text, encoding="utf-8")
    if priors:
        with whole_file(out / f"{name}-priors.safetensors") as temporary:
            save_file(priors, temporary)


def _measure(experiment: Experiment, folder: Path, options: Namespace, command: str) -> bool:
    """Take all measures and write their results; whether every one succeeded."""
    loaded = load_runs(folder)
    for models in loaded.models.values():
        for model in models:
            model.to(options.device)
    trained = Trained(loaded.task, loaded.models, folder / "cells")
    measures: dict[str, Callable[[], Iterable[xr.Dataset]]] = {}
    # A prior on a grid has no profile; its parameters are among the records.
    if "goat" in trained.models and trained.task.patch is None:
        measures["prior"] = lambda: [prior_profile(trained.models["goat"][0], resolution=64)]
    measures |= experiment.measures(trained, options)

    def write(end: str, measure: Callable[[], Iterable[xr.Dataset]]) -> None:
        for result in measure():
            result.attrs["command"] = command
            save_result(result, options.out / f"{experiment.name}-{end}.nc")
            for field in _HEADLINES:
                if field in result and result[field].ndim == 2:
                    print(f"{field}\n{result[field].to_pandas().round(4).to_string()}", flush=True)

    taken = [_attempted(end, partial(write, end, measure)) for end, measure in measures.items()]
    return all(taken)
