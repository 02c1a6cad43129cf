"""Presets are recipes that fit their tasks."""

import dataclasses

import pytest
import torch

from goatviz.models import IMAGE_SCHEMES, build_model
from goatviz.tasks import TASKS
from goatviz.training.presets import PRESETS, preset


def test_every_task_has_a_tiny_preset():
    assert set(PRESETS) == set(TASKS)
    for task, sizes in PRESETS.items():
        assert "tiny" in sizes
        for size in sizes:
            assert preset(task, size).task.name == task


def test_tiny_models_are_below_three_megabytes():
    for task in PRESETS:
        model = build_model(preset(task).model_config())
        assert sum(p.numel() for p in model.parameters()) * 4 < 3e6


@pytest.mark.parametrize("task", ["passkey", "needle", "text", "dna", "images"])
@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_schemes_have_equal_parameter_counts(task, size):
    def count(positions):
        config = dataclasses.replace(preset(task, size), positions=positions)
        with torch.device("meta"):
            model = build_model(config.model_config())
        return sum(p.numel() for p in model.parameters())

    texts = ("goat", "rope", "rope-interpolated", "alibi", "none", "sinusoidal")
    counts = {s: count(s) for s in (IMAGE_SCHEMES if task == "images" else texts)}
    assert max(counts.values()) / min(counts.values()) < 1.02, counts


def test_the_papers_setting():
    config = preset("passkey", "paper")
    sizes = (config.embed_dim, config.num_layers, config.num_heads)
    assert sizes == (512, 12, 8)
    assert (config.prior_rank, config.sink_rank) == (8, 8)
    assert (config.steps, config.batch_size, config.learning_rate) == (2000, 32, 3e-4)
    assert (config.task.length, config.task.value_length) == (1024, 8)
    assert preset("needle", "paper").task.length == 256
    text = preset("text", "paper")
    assert (text.task.length, text.embed_dim, text.num_layers) == (2048, 768, 12)
    assert (text.prior_rank, text.sink_rank) == (4, 4)
    assert text.steps * text.batch_size * text.task.length == pytest.approx(4e9, rel=0.01)
    dna = preset("dna", "paper")
    assert (dna.prior_rank, dna.sink_rank, dna.prior_init) == (2, 8, "uniform")


def test_errors():
    with pytest.raises(ValueError, match="task must be one of copy-mixture, passkey"):
        preset("sorting")
    with pytest.raises(ValueError, match="preset of copy-mixture must be one of tiny, got 'paper'"):
        preset("copy-mixture", "paper")
