"""A log holds what cards and results hold, step by step."""

import math

import numpy as np
import pytest

from goatviz.analysis import training_log
from goatviz.results import load_result, save_result
from goatviz.tasks import CopyMixture
from goatviz.training import TrainConfig, TrainResult, load_pretrained, train


def a_result(steps, losses):
    history = [
        {"step": step, "loss": loss, "learning_rate": loss / 10}
        for step, loss in zip(steps, losses, strict=True)
    ]
    return TrainResult(model=None, config=TrainConfig(positions="rope"), history=history)


def test_a_checkpoints_log_is_its_card():
    checkpoint = load_pretrained("copy-mixture-1-goat")
    log = training_log(checkpoint)
    assert log["run"].values.tolist() == ["copy-mixture-1-goat"]
    history = checkpoint.card["history"]
    assert log["step"].values.tolist() == [entry["step"] for entry in history]
    assert log["loss"].values[0].tolist() == [entry["loss"] for entry in history]
    assert float(log["held_out"][0]) == checkpoint.card["losses"]["held_out"]


def test_a_fresh_result():
    config = TrainConfig(task=CopyMixture(length=8, vocab_size=4), embed_dim=32, steps=3)
    result = train(config, progress=False)
    log = training_log(result)
    assert log["run"].values.tolist() == ["goat"]
    assert log["step"].values.tolist() == [1, 2, 3]
    assert float(log["held_out_standard_error"][0]) == result.held_out.standard_error


def test_runs_keep_their_own_steps(tmp_path):
    log = training_log({"a": a_result([1, 5], [2.0, 1.0]), "b": a_result([1, 3], [4.0, 3.0])})
    assert log["step"].values.tolist() == [1, 3, 5]
    np.testing.assert_array_equal(log["loss"], [[2.0, math.nan, 1.0], [4.0, 3.0, math.nan]])
    np.testing.assert_allclose(log["learning_rate"], log["loss"] / 10)
    assert log["held_out"].isnull().all()
    assert load_result(save_result(log, tmp_path / "log.nc")).identical(log)


def test_errors():
    with pytest.raises(ValueError, match="runs must be a checkpoint, .* got an empty mapping"):
        training_log({})
    with pytest.raises(TypeError, match="runs must be a checkpoint, .* got str"):
        training_log("run")
    with pytest.raises(TypeError, match=r"runs\['a'\] must be a checkpoint .* got int"):
        training_log({"a": 3})
    with pytest.raises(ValueError, match=r"runs\['a'\] must have a history, got none"):
        training_log({"a": a_result([], [])})
