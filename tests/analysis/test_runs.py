"""Folders of runs are sorted by scheme and seed, and refused where they do not belong together."""

import dataclasses
import json

import pytest
import torch

from goatviz.analysis import load_runs
from goatviz.models import CausalLM
from goatviz.tasks import Needle
from goatviz.training import TrainConfig, TrainResult, save_checkpoint
from goatviz.training.checkpoint import make_card
from goatviz.training.evaluation import HeldOutLoss

TINY = TrainConfig(task=Needle(length=32), embed_dim=32, steps=1, batch_size=1)


def save(folder, name, **changes):
    config = dataclasses.replace(TINY, **changes)
    torch.manual_seed(config.seed)
    model = CausalLM(config.model_config())
    result = TrainResult(
        model,
        config,
        history=[{"step": 1, "loss": 1.0, "learning_rate": 1e-3}],
        held_out=HeldOutLoss(1.0, 0.1, 2),
    )
    save_checkpoint(model, make_card(result, command="goatviz", data="needles"), folder / name)
    return model


def test_runs_are_sorted_by_scheme_and_seed(tmp_path):
    # Names sort otherwise than seeds do.
    saved = {
        (scheme, seed): save(tmp_path, f"{scheme}-{9 - seed}", positions=scheme, seed=seed)
        for scheme in ("rope", "alibi", "goat")
        for seed in (2, 0)
    }
    runs = load_runs(tmp_path)
    assert runs.task == TINY.task
    assert list(runs.models) == ["goat", "rope", "rope-interpolated", "alibi"]
    ids = torch.randint(128, (1, 20))
    for scheme in ("goat", "rope", "rope-interpolated", "alibi"):
        for model, seed in zip(runs.models[scheme], (0, 2), strict=True):
            wanted = saved[scheme.removesuffix("-interpolated"), seed].eval()
            assert model.config.positions == scheme
            torch.testing.assert_close(model(ids), wanted(ids))


def test_interpolated_runs_of_ones_own_are_taken(tmp_path):
    save(tmp_path, "a", positions="rope", seed=0)
    own = save(tmp_path, "b", positions="rope-interpolated", seed=5)
    (model,) = load_runs(tmp_path).models["rope-interpolated"]
    assert torch.equal(model.head.weight, own.head.weight)


def test_what_does_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="folder must be an existing folder, got"):
        load_runs(tmp_path / "none")
    with pytest.raises(ValueError, match="folder must hold checkpoints, got none in"):
        load_runs(tmp_path)
    save(tmp_path, "one", seed=1)
    save(tmp_path, "two", seed=1)
    with pytest.raises(ValueError, match="each scheme and seed once, got one and two"):
        load_runs(tmp_path)
    save(tmp_path, "two", seed=2, learning_rate=0.1)
    with pytest.raises(ValueError, match="differ only in scheme and seed, got .* one, two"):
        load_runs(tmp_path)


def test_what_does_not_load_is_named(tmp_path):
    save(tmp_path, "good", positions="alibi")
    for name, change in (
        ("task", {"task": {"name": "chess"}}),
        ("steps", {"steps": "many"}),
        ("scheme", {"positions": "rope"}),
    ):
        save(tmp_path, name)
        card = json.loads((tmp_path / f"{name}.json").read_text())
        card["config"] |= change
        card["format"] = "goatviz-checkpoint-1"
        del card["card_sha256"]
        (tmp_path / f"{name}.json").write_text(json.dumps(card))
    save(tmp_path, "weights")
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"scheme\.json must hold the config of a run with"):
        load_runs(tmp_path)
    errors = []
    assert list(load_runs(tmp_path, skipped=errors.append).models) == ["alibi"]
    told = sorted(map(str, errors))
    assert len(told) == 4 and "weights.safetensors" in told[0]
    assert told[1].startswith("scheme.json must hold the config of a run with positions 'goat'")
    assert told[2].startswith("steps.json holds no config of a run: steps must be an integer")
    assert told[3].startswith("task.json holds no config of a run: task must be one of")
    (tmp_path / "good.json").unlink()
    with pytest.raises(ValueError, match="folder must hold checkpoints that load, got none in"):
        load_runs(tmp_path, skipped=errors.append)
