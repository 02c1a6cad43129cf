"""A run's log holds every line once, however often the run was stopped."""

import json

import accelerate.utils
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import goatviz.training.loop as loop
from goatviz.tasks import CopyMixture
from goatviz.training import TrainConfig, train
from goatviz.training.evaluation import evaluate
from goatviz.training.execution import Engine, Execution, start
from goatviz.training.log import RunLog

CONFIG = TrainConfig(task=CopyMixture(length=8, vocab_size=4), embed_dim=32, steps=9, batch_size=4)


@pytest.fixture(autouse=True)
def _small_held_out(monkeypatch):
    monkeypatch.setattr(
        loop, "evaluate", lambda model, task, seed: evaluate(model, task, sequences=8, seed=seed)
    )


@pytest.fixture
def _running():
    """Within a run: accelerate knows which process this is."""
    with start(Execution(device="cpu")):
        yield


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_every_so_many_steps_and_the_last(tmp_path):
    path = tmp_path / "run.jsonl"
    result = train(CONFIG, progress=False, log=path, log_every=4, tensorboard=False)
    entries = lines(path)
    assert [entry["step"] for entry in entries] == [1, 5, 9]
    by_step = {entry["step"]: entry for entry in result.history}
    for entry in entries:
        assert entry["loss"] == by_step[entry["step"]]["loss"]
        assert entry["learning_rate"] == by_step[entry["step"]]["learning_rate"]
        assert entry["tokens_per_second"] > 0
    assert entries[0]["seconds"] < entries[-1]["seconds"] < result.wall_time
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_run_logs_every_step_once(tmp_path, monkeypatch):
    path, state = tmp_path / "run.jsonl", tmp_path / "run.safetensors"
    options = {"progress": False, "log": path, "log_every": 1, "state": state, "save_every": 3}
    original = Engine.take_step

    def stop(self, config, model, optimizer, data, step):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, config, model, optimizer, data, step)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, tensorboard=False, **options)
    assert [entry["step"] for entry in lines(path)] == [1, 2, 3, 4, 5]
    # As a kill in the middle of a line leaves it.
    path.write_text(path.read_text()[:-7])
    train(CONFIG, tensorboard=False, resume=True, **options)
    entries = lines(path)
    assert [entry["step"] for entry in entries] == list(range(1, 10))
    assert all(a["seconds"] < b["seconds"] for a, b in zip(entries[3:], entries[4:], strict=False))


def test_a_new_run_begins_a_new_log(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("something else\n")
    with RunLog(path, tensorboard=False) as log:
        log.write(1, loss=2.0)
    assert lines(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.usefixtures("_running")
def test_tensorboard_holds_the_same(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunLog(path) as log:
        for step in (1, 2, 3):
            log.write(step, loss=1.0 / step)
    # A run that goes on from step 2 logs step 3 again.
    with RunLog(path, first=2) as log:
        log.write(3, loss=7.0)
    assert [entry["loss"] for entry in lines(path)] == [1.0, 0.5, 7.0]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 0.5), (3, 7.0)]


@pytest.mark.usefixtures("_running")
def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'goatviz\[train\]'"):
        RunLog(tmp_path / "run.jsonl", tensorboard=True)
    assert list(tmp_path.iterdir()) == []
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write(1, loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"log must end in .jsonl, got 'run.txt'"):
        RunLog(tmp_path / "run.txt")
    with pytest.raises(ValueError, match="log must lie in an existing folder"):
        RunLog(tmp_path / "nowhere" / "run.jsonl")
    with pytest.raises(ValueError, match="log_every must be an integer of at least 1, got 0"):
        train(CONFIG, progress=False, log=tmp_path / "run.jsonl", log_every=0)
