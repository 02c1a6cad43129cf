"""Every task keeps what training and evaluation ask of it."""

import dataclasses

import pytest
import torch

from goatviz.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_the_protocol_says(name):
    task = TASKS[name](length=64)
    assert dataclasses.is_dataclass(task) and TASKS[name].__dataclass_params__.frozen
    assert task.at_length(96) == TASKS[name](length=96)
    ids = task.sample(3, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (3, 65) and int(ids.min()) >= 0 and int(ids.max()) < task.vocab_size
    weights = task.target_weights()
    assert weights is None or (weights.shape == (64,) and float(weights.min()) >= 0)
    assert 0 <= task.answer_length <= 64
