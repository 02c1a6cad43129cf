"""Every task keeps what training and evaluation ask of it."""

import dataclasses

import numpy as np
import pytest
import torch

from goatviz.tasks import TASKS


@pytest.fixture
def corpora(tmp_path):
    (tmp_path / "a.txt").write_text("It rained all day. " * 20, encoding="utf-8")
    (tmp_path / "a.fa").write_text(">one\n" + "ACGTN" * 60, encoding="utf-8")
    arrays = {f"x_{part}": np.zeros((2, 8, 8), np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(2) for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays)
    return {
        "text": {"source": str(tmp_path / "a.txt"), "validation": str(tmp_path / "a.txt")},
        "dna": {"source": str(tmp_path / "a.fa"), "validation": str(tmp_path / "a.fa")},
        "images": {"source": str(tmp_path / "a.npz"), "patch": 1},
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_the_protocol_says(name, corpora):
    options = corpora.get(name, {})
    # Images have a side, and so 1 + 8 x 8 tokens of patches that are one pixel.
    length = 65 if name == "images" else 64
    task = TASKS[name](**options).at_length(length)
    assert dataclasses.is_dataclass(task) and TASKS[name].__dataclass_params__.frozen
    assert task.length == length and task.at_length(145).at_length(length) == task
    assert task.at_length(145).length == 145
    ids = task.sample(3, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (3, 65) and int(ids.min()) >= 0 and int(ids.max()) < task.vocab_size
    weights = task.target_weights()
    assert weights is None or (weights.shape == (task.predicted,) and float(weights.min()) >= 0)
    assert 0 <= task.answer_length <= task.predicted <= length
    assert type(task.held_out()) is TASKS[name] and task.held_out().length == length
    assert task.masked is None or 0 <= task.masked < task.vocab_size
