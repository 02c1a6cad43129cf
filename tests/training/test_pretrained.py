"""The shipped checkpoints: whole, small, as good as they claim, and readable from their priors."""

import functools
import hashlib
import importlib.resources

import numpy as np
import pytest
import torch

from goatviz.analysis import prior_profile
from goatviz.training import TrainConfig, evaluate, list_pretrained, load_pretrained
from goatviz.training.evaluation import next_token_loss

FOLDER = importlib.resources.files("goatviz") / "checkpoints"
OFFSETS = (1, 4)
NAMES = [f"copy-mixture-{offset}-{kind}" for offset in OFFSETS for kind in ("goat", "uniform")]
load = functools.cache(load_pretrained)


@functools.cache
def held_out(name):
    """Loss on a stream of its own, neither trained on nor in the card."""
    checkpoint = load(name)
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    return evaluate(checkpoint.model, task, sequences=768, seed=31_337)


def test_what_is_shipped():
    assert set(NAMES) <= set(list_pretrained())
    files = {entry.name for entry in FOLDER.iterdir() if entry.name != "__pycache__"}
    pairs = {name + ending for name in list_pretrained() for ending in (".safetensors", ".json")}
    assert files - {"README.md"} == pairs


@pytest.mark.parametrize("name", list_pretrained())
def test_every_file_is_whole_small_and_accounted_for(name):
    checkpoint = load(name)
    weights = (FOLDER / f"{name}.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == checkpoint.card["sha256"]
    assert len(weights) < 1_000_000
    assert len((FOLDER / f"{name}.json").read_bytes()) < 1_000_000
    for field in ("command", "data", "device", "steps", "wall_time_s", "losses", "versions"):
        assert checkpoint.card[field], field
    config = TrainConfig.from_dict(checkpoint.card["config"])
    assert config.model_config() == checkpoint.model.config
    assert checkpoint.card["seed"] == config.seed
    assert checkpoint.card["losses"]["bayes_optimal"] == config.task.bayes_loss()


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_cards_and_not_below_the_optimum(name):
    measured, card = held_out(name), load(name).card["losses"]
    error = np.hypot(measured.standard_error, card["held_out_standard_error"])
    assert abs(measured.mean - card["held_out"]) <= 5 * error
    assert measured.mean >= card["bayes_optimal"] - 5 * measured.standard_error


@pytest.mark.parametrize("offset", OFFSETS)
def test_goat_beats_its_twin(offset):
    goat, uniform = f"copy-mixture-{offset}-goat", f"copy-mixture-{offset}-uniform"
    ours, theirs = (dict(load(name).card["config"]) for name in (goat, uniform))
    assert {key for key in ours if ours[key] != theirs[key]} == {"positions"}
    assert ours["task"]["offset"] == offset
    task = TrainConfig.from_dict(ours).task
    ids = task.sample(768, generator=torch.Generator().manual_seed(31_337))
    with torch.no_grad():
        a, b = (next_token_loss(load(name).model, ids).mean(-1) for name in (goat, uniform))
    # On the same sequences, so that what is hard about a sequence is hard for both.
    gain = b - a
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    assert held_out(goat).mean < held_out(uniform).mean


def test_the_first_token_is_read_back_as_a_sink():
    profile = prior_profile(load("copy-mixture-1-goat").model)
    last = profile.isel(query=-1)
    assert (last["margin_key"] == 0).any()
    # And it is the sink's doing: some u(0) stands clear of every other key.
    others = profile["sink"].sel(key=slice(1, None)).max("key")
    assert (profile["sink"].sel(key=0) - others).max() > 1


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_copied_lag_is_read_back_from_a_kernel(offset):
    profile = prior_profile(load(f"copy-mixture-{offset}-goat").model)
    peaks = profile["lag"].values[profile["kernel"].argmax("lag").values]
    assert (peaks == offset - 1).any()


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_uniform_twin_has_no_prior_to_read(offset):
    profile = prior_profile(load(f"copy-mixture-{offset}-uniform").model)
    assert profile["margin"].isel(query=-1).max() == 0
    assert profile["kernel"].max() == profile["sink"].max() == 0
