"""The shipped checkpoints: whole, small, as good as they claim, and readable from their priors."""

import functools
import hashlib
import importlib.resources

import numpy as np
import pytest
import torch

from goatviz.analysis import prior_profile
from goatviz.results import list_results, load_shipped_result
from goatviz.tasks import CopyMixture
from goatviz.training import (
    TrainConfig,
    evaluate,
    evaluate_answers,
    list_pretrained,
    load_pretrained,
)
from goatviz.training.evaluation import next_token_loss

FOLDER = importlib.resources.files("goatviz") / "checkpoints"
OFFSETS = (1, 4)
NAMES = [f"copy-mixture-{offset}-{kind}" for offset in OFFSETS for kind in ("goat", "uniform")]
RETRIEVAL = [
    f"{task}-{positions}"
    for task in ("passkey", "needle")
    for positions in ("goat", "rope", "alibi", "sinusoidal")
]
TEXTS = [f"text-{positions}" for positions in ("goat", "rope", "alibi", "none")]
load = functools.cache(load_pretrained)


@functools.cache
def held_out(name):
    """Loss on a stream of its own, neither trained on nor in the card."""
    checkpoint = load(name)
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    return evaluate(checkpoint.model, task, sequences=768, seed=31_337)


def test_what_is_shipped():
    assert set(NAMES) | set(RETRIEVAL) | set(TEXTS) <= set(list_pretrained())
    files = {entry.name for entry in FOLDER.iterdir() if entry.name != "__pycache__"}
    pairs = {name + ending for name in list_pretrained() for ending in (".safetensors", ".json")}
    assert files - {"README.md"} == pairs | {f"{name}.nc" for name in list_results()}


@pytest.mark.parametrize("name", list_pretrained())
def test_every_file_is_whole_small_and_accounted_for(name):
    checkpoint = load(name)
    weights = (FOLDER / f"{name}.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == checkpoint.card["sha256"]
    assert len(weights) < 3_000_000
    assert len((FOLDER / f"{name}.json").read_bytes()) < 1_000_000
    for field in ("command", "data", "device", "steps", "wall_time_s", "losses", "versions"):
        assert checkpoint.card[field], field
    config = TrainConfig.from_dict(checkpoint.card["config"])
    assert config.model_config() == checkpoint.model.config
    assert checkpoint.card["seed"] == config.seed
    if isinstance(config.task, CopyMixture):
        assert checkpoint.card["losses"]["bayes_optimal"] == config.task.bayes_loss()
    assert checkpoint.card["command"].startswith(f"goatviz train {config.task.name} ")


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


@pytest.mark.parametrize("name", RETRIEVAL)
def test_answers_are_found_at_the_training_length(name):
    checkpoint = load(name)
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    assert evaluate_answers(checkpoint.model, task, examples=64, seed=31_337).strict >= 0.98
    assert checkpoint.card["losses"]["answers_strict"] >= 0.99


@pytest.mark.parametrize("task", ["passkey", "needle", "text"])
def test_schemes_differ_in_positions_alone(task):
    cards = [load(name).card for name in RETRIEVAL + TEXTS if name.startswith(task)]
    assert len(cards) == 4
    counts = [card["parameters"] for card in cards]
    assert max(counts) / min(counts) < 1.02
    recipes = [{k: v for k, v in card["config"].items() if k != "positions"} for card in cards]
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize(("task", "runs"), [("passkey", 5), ("needle", 5)])
def test_shipped_sweeps_are_of_the_shipped_models(task, runs):
    sweep = load_shipped_result(f"{task}-sweep")
    schemes = ["goat", "rope", "rope-interpolated", "alibi", "sinusoidal"]
    assert sweep["scheme"].values.tolist() == schemes and sweep.sizes["run"] == runs
    assert sweep["length"].values.tolist() == [64, 128, 256, 512, 1024]
    assert int(sweep["examples"].min()) == 256
    assert sweep.attrs["command"].startswith(f"goatviz sweep runs/{task} --lengths 64 128 ")
    for scheme in ("goat", "rope"):
        checkpoint = load(f"{task}-{scheme}")
        config = TrainConfig.from_dict(checkpoint.card["config"])
        # The very questions of the sweep: whole answers, the same count but for rounding.
        found = evaluate_answers(
            checkpoint.model,
            config.task.at_length(128),
            examples=256,
            batch_size=64,
            seed=int(sweep.attrs["seed"]),
        )
        cell = sweep.sel(scheme=scheme, run=0, length=128)
        assert abs(found.right - int(cell["right"])) <= 2


def test_results_by_name():
    assert {"passkey-sweep", "needle-sweep", "needle-grid"} <= set(list_results())
    assert load_shipped_result("needle-grid").sizes["depth"] == 5
    with pytest.raises(KeyError, match="name must be one of .*needle-grid"):
        load_shipped_result("haystack")


PROSE = (
    "The old man put down his lamp and looked at the door. For a long time he had heard nothing "
    "but the wind in the trees and the slow water under the bridge, and now somebody had called "
    "his name. He thought of his daughter, who had gone to the city in the spring and had not "
    "written since, and he rose from his chair with some difficulty and went to the window. There "
    "was no one in the road. The moon stood over the hill, as it had stood when he was a boy, and "
    "the dog, which was too old to be afraid, did not even lift its head."
)


def test_text_models_have_learned_english():
    # Written for this test: no model was trained on it.
    ids = torch.tensor([list(PROSE[start : start + 257].encode()) for start in range(0, 250, 50)])
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = {name: float(next_token_loss(load(name).model, ids).mean()) for name in TEXTS}
        shuffled = float(next_token_loss(load("text-goat").model, ids[:, order]).mean())
    assert max(loss[f"text-{positions}"] for positions in ("goat", "rope", "alibi")) < 1.9
    # Without positions order is lost, and with it most of what bytes say of the next one.
    assert 2.0 < loss["text-none"] < 2.7
    assert shuffled > loss["text-goat"] + 1.5
