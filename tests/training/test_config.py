"""A training config is plain data, and says what it refuses."""

import dataclasses
import json
import math

import pytest

from goatviz.models import ModelConfig
from goatviz.tasks import CopyMixture, Needle, Passkey
from goatviz.training import TrainConfig


def test_round_trip_through_json():
    config = TrainConfig(
        task=CopyMixture(length=9, vocab_size=5, offset=2, first=0.3, previous=0.2),
        positions="rope",
        embed_dim=32,
        skip=False,
        prior_learning_rate=0.01,
        steps=7,
        seed=3,
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict(TrainConfig().to_dict()) == TrainConfig()


@pytest.mark.parametrize("task", [Passkey(length=99, distractors=2), Needle(depths=(0.1, 0.2))])
def test_the_task_keeps_its_kind(task):
    config = TrainConfig(task=task)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["task"]["name"] == task.name
    assert TrainConfig.from_dict(values) == config
    assert config.model_config().vocab_size == 128


def test_cards_from_before_there_were_other_tasks_mean_the_copy_mixture():
    values = TrainConfig().to_dict()
    del values["task"]["name"]
    assert TrainConfig.from_dict(values) == TrainConfig()


def test_unknown_tasks_are_refused():
    values = TrainConfig().to_dict()
    values["task"]["name"] = "sorting"
    with pytest.raises(ValueError, match="task must be one of copy-mixture, .*, got 'sorting'"):
        TrainConfig.from_dict(values)
    with pytest.raises(TypeError, match="task must be one of CopyMixture, .*, got dict"):
        TrainConfig(task={})


def test_the_model_is_the_one_described():
    config = TrainConfig(
        task=CopyMixture(length=9, vocab_size=5), positions="alibi", embed_dim=32, num_layers=3
    )
    assert config.model_config() == ModelConfig(
        vocab_size=5, training_length=9, positions="alibi", embed_dim=32, num_layers=3
    )
    shared = {f.name for f in dataclasses.fields(TrainConfig)} & {
        f.name for f in dataclasses.fields(ModelConfig)
    }
    # Every size that both know must reach the model.
    changed = {
        "positions": "goat",
        "embed_dim": 48,
        "num_layers": 2,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "skip": False,
        "content_dim": 5,
        "prior_rank": 1,
        "sink_rank": 2,
        "prior_init": "uniform",
    }
    assert set(changed) == shared
    got = TrainConfig(**changed).model_config()
    assert {name: getattr(got, name) for name in changed} == changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"prior_learning_rate": 0.0}, "prior_learning_rate must be positive or None"),
        ({"weight_decay": -0.1}, "weight_decay and warmup must be at least 0"),
        ({"warmup": -1}, "weight_decay and warmup must be at least 0"),
        ({"positions": "nope"}, "positions must be one of"),
        ({"embed_dim": 63}, "multiple of num_heads"),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3
