"""A run that is killed goes on bit for bit, and a bad state is an error that loses nothing."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import goatviz.training.loop as loop
from goatviz.cli import main
from goatviz.tasks import CopyMixture, Needle
from goatviz.training import OutOfTime, TrainConfig, load_checkpoint, train
from goatviz.training.evaluation import evaluate, evaluate_answers
from goatviz.training.execution import Engine

CONFIG = TrainConfig(
    task=Needle(length=24, value_length=2),
    embed_dim=32,
    prior_rank=2,
    sink_rank=2,
    steps=9,
    batch_size=4,
    warmup=3,
    prior_learning_rate=0.01,
)


@pytest.fixture(autouse=True)
def _small_held_out(monkeypatch):
    monkeypatch.setattr(
        loop, "evaluate", lambda model, task, seed: evaluate(model, task, sequences=8, seed=seed)
    )
    monkeypatch.setattr(
        loop,
        "evaluate_answers",
        lambda model, task, seed: evaluate_answers(model, task, examples=8, seed=seed),
    )


def same(first, second):
    assert first.history == second.history
    assert first.held_out == second.held_out and first.answers == second.answers
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name


def stopped_at(step, path, monkeypatch, **options):
    """A run that ends with an exception just before a step."""
    original = Engine.take_step

    def stop(self, config, model, optimizer, data, at):
        if at == step:
            raise KeyboardInterrupt
        return original(self, config, model, optimizer, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, progress=False, state=path, **options)


@pytest.mark.parametrize("save_every", [1, 2, 4])
@pytest.mark.parametrize("step", [4, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, step, save_every):
    whole = train(CONFIG, progress=False)
    path = tmp_path / "run.safetensors"
    stopped_at(step, path, monkeypatch, save_every=save_every)
    resumed = train(CONFIG, progress=False, state=path, save_every=save_every, resume=True)
    same(resumed, whole)
    # After the last step too: only the evaluation is left.
    same(train(CONFIG, progress=False, state=path, resume=True), whole)


def test_a_run_out_of_time_is_saved_and_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    for step in (1, 2):
        with pytest.raises(OutOfTime, match=f"stopped at step {step} of {CONFIG.steps}, after"):
            train(CONFIG, progress=False, state=path, resume=step > 1, minutes=1e-9)
        assert step_of(path) == step
    resumed = train(CONFIG, progress=False, state=path, resume=True, minutes=60)
    same(resumed, train(CONFIG, progress=False))


def test_the_last_step_is_never_too_late(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1)
    late = train(config, progress=False, state=tmp_path / "run.safetensors", minutes=1e-9)
    same(late, train(config, progress=False))


def test_saving_changes_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    same(train(CONFIG, progress=False, state=path, save_every=1), train(CONFIG, progress=False))


def test_the_time_of_all_parts_counts(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    stopped_at(4, path, monkeypatch, save_every=1)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["progress"])
    assert said["step"] == 4 and said["seconds"] > 0
    assert train(CONFIG, progress=False, state=path, resume=True).wall_time > said["seconds"]


def arguments(folder, *options):
    task = ["train", "copy-mixture", "--out", str(folder), "--name", "run", "--device", "cpu"]
    sizes = ["--steps", "100", "--batch-size", "8", "--length", "64", "--embed-dim", "64"]
    return [*task, *sizes, *options]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    assert main(arguments(tmp_path / "whole")) == 0
    folder = tmp_path / "killed"
    state = folder / "run.state.safetensors"
    python = [sys.executable, "-m", "goatviz.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for reached, resume in ((3, []), (20, ["--resume"])):
        run = subprocess.Popen(python + arguments(folder, "--save-every", "1", *resume), **options)
        give_up = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < give_up:
            if state.exists() and step_of(state) >= reached:
                run.send_signal(signal.SIGKILL)
                run.wait()
                break
            time.sleep(0.002)
        assert run.returncode == -signal.SIGKILL
    assert main(arguments(folder, "--resume")) == 0
    killed, whole = load_checkpoint(folder / "run"), load_checkpoint(tmp_path / "whole" / "run")
    assert killed.card["sha256"] == whole.card["sha256"]
    assert killed.card["history"] == whole.card["history"]
    assert killed.card["losses"] == whole.card["losses"]
    assert not state.exists()


def step_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    stopped_at(4, path, monkeypatch, save_every=2)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="cannot be written|File too large"):
            train(CONFIG, progress=False, state=path, save_every=2, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    same(train(CONFIG, progress=False, state=path, resume=True), train(CONFIG, progress=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "another config: seed was 0 and is 4"),
        ({"positions": "rope"}, "positions was 'goat' and is 'rope'"),
        (
            {"task": CopyMixture(length=24)},
            "task.alphabet was 'abcd' and is None; .*task.name was 'needle' and is 'copy-mixture'",
        ),
    ],
)
def test_a_state_of_another_config_is_refused(tmp_path, monkeypatch, changes, words):
    path = tmp_path / "run.safetensors"
    stopped_at(4, path, monkeypatch, save_every=1)
    other = dataclasses.replace(CONFIG, **changes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        train(other, progress=False, state=path, resume=True)
    assert path.read_bytes() == before


def test_what_is_no_state_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FileNotFoundError, match="no training state at"):
        train(CONFIG, progress=False, state=path, resume=True)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must be a training state of format goatviz-.*, got None"):
        train(CONFIG, progress=False, state=path, resume=True)
    path.unlink()
    stopped_at(4, path, monkeypatch, save_every=1)
    with pytest.raises(FileExistsError, match="unfinished run: resume it or remove it"):
        train(CONFIG, progress=False, state=path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            train(CONFIG, progress=False, state=path, resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resume": True}, "resume needs the state file"),
        ({"state": "run.pt"}, "state must end in .safetensors, got 'run.pt'"),
        ({"state": "/nowhere/run.safetensors"}, "state must lie in an existing folder"),
        ({"save_every": 0}, "save_every must be an integer of at least 1, got 0"),
        ({"minutes": 0}, "minutes must be a finite number above 0, got 0"),
        ({"minutes": 1}, "minutes needs a file for the unfinished run, got state=None"),
    ],
)
def test_arguments_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        train(CONFIG, progress=False, **options)
