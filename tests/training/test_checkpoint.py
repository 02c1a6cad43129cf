"""Checkpoints come back bit for bit, with their provenance, or not at all."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load, save

from goatviz.models import CausalLM, ModelConfig
from goatviz.tasks import CopyMixture
from goatviz.training import (
    TrainConfig,
    list_pretrained,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
    train,
)
from goatviz.training.checkpoint import make_card

TASK = CopyMixture(length=8, vocab_size=4)
CONFIG = TrainConfig(task=TASK, embed_dim=32, steps=2, batch_size=4, prior_rank=2, sink_rank=2)


@pytest.fixture(scope="module")
def result():
    return train(CONFIG, progress=False)


@pytest.fixture
def saved(result, tmp_path):
    card = make_card(result, command="goatviz train --steps 2", data="the copy mixture")
    path = tmp_path / "tiny"
    save_checkpoint(result.model, card, path)
    return path


def weights_of(path):
    return path.with_name(path.name + ".safetensors")


def card_of(path):
    return path.with_name(path.name + ".json")


def rewrite_card(path, **changes):
    """Change a card, which then is one of the former format, without a sum of itself."""
    former = {"format": "goatviz-checkpoint-1", "card_sha256": None}
    card = json.loads(card_of(path).read_text()) | former | changes
    card_of(path).write_text(json.dumps({k: v for k, v in card.items() if v is not None}))


def swear(path):
    """Make the card vouch for whatever the weights now are."""
    rewrite_card(path, sha256=hashlib.sha256(weights_of(path).read_bytes()).hexdigest())


def test_what_was_saved_comes_back(result, saved):
    for name in (saved, weights_of(saved), card_of(saved), str(saved)):
        loaded = load_checkpoint(name)
        assert loaded.name == "tiny"
        assert not loaded.model.training
        assert loaded.model.config == result.model.config
        state = loaded.model.state_dict()
        assert list(state) == list(result.model.state_dict())
        for key, value in result.model.state_dict().items():
            assert torch.equal(state[key], value), key
    ids = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), result.model.eval()(ids))


@pytest.mark.parametrize("positions", ["rope", "rope-interpolated", "bucket", "learned", "alibi"])
def test_every_scheme_comes_back(positions, result, tmp_path):
    config = ModelConfig(vocab_size=5, training_length=8, embed_dim=32, positions=positions)
    card = make_card(result, command="", data="") | {"model": vars(config)}
    model = CausalLM(config)
    save_checkpoint(model, card, tmp_path / "a.model")
    loaded = load_checkpoint(tmp_path / "a.model").model
    ids = torch.tensor([[0, 1, 4, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_a_slope_of_zero_survives(result, tmp_path):
    model = CausalLM(result.model.config)
    recency = model.blocks[0].attention.prior.components()["recency"]
    with torch.no_grad():
        recency.raw_slope.fill_(-torch.inf)
    save_checkpoint(model, make_card(result, command="", data=""), tmp_path / "flat")
    loaded = load_checkpoint(tmp_path / "flat").model
    assert loaded.blocks[0].attention.prior.components()["recency"].slope().tolist() == [0, 0]


def test_the_card_says_where_it_comes_from(result, saved):
    card = load_checkpoint(saved).card
    assert card["command"] == "goatviz train --steps 2"
    assert card["data"] == "the copy mixture"
    assert card["seed"] == CONFIG.seed
    assert card["steps"] == 2
    assert card["wall_time_s"] >= 0
    assert isinstance(card["device"], str) and card["device"]
    assert TrainConfig.from_dict(card["config"]) == CONFIG
    assert ModelConfig(**card["model"]) == result.model.config
    assert card["parameters"] == sum(p.numel() for p in result.model.parameters())
    losses = card["losses"]
    assert losses["unit"] == "nats per predicted token"
    assert losses["train_final"] == result.history[-1]["loss"]
    assert losses["held_out"] == result.held_out.mean
    assert losses["held_out_standard_error"] == result.held_out.standard_error
    assert losses["held_out_sequences"] == result.held_out.sequences
    assert losses["bayes_optimal"] == TASK.bayes_loss()
    assert card["versions"]["torch"] == torch.__version__
    assert set(card["versions"]) == {"torch", "numpy", "safetensors", "python"}
    assert card["sha256"] == hashlib.sha256(weights_of(saved).read_bytes()).hexdigest()


def test_a_card_says_so_when_it_was_changed(saved):
    rewrite_card(saved)
    assert "card_sha256" not in load_checkpoint(saved).card
    rewrite_card(saved, seed=7, card_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"tiny\.json was changed after it was saved"):
        load_checkpoint(saved)


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_checkpoint(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_damaged_byte_is_noticed(saved):
    whole = weights_of(saved).read_bytes()
    for at in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        weights_of(saved).write_bytes(damaged)
        with pytest.raises(ValueError, match="not the file its card describes: sha256"):
            load_checkpoint(saved)
    weights_of(saved).write_bytes(whole)
    load_checkpoint(saved)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_noticed_even_when_the_card_vouches_for_it(saved, keep):
    weights_of(saved).write_bytes(weights_of(saved).read_bytes()[:keep])
    with pytest.raises(ValueError, match="not the file its card describes"):
        load_checkpoint(saved)
    swear(saved)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(saved)


def test_foreign_bytes_are_no_model(saved):
    weights_of(saved).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match="not the file its card describes"):
        load_checkpoint(saved)
    swear(saved)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(3)},
        CausalLM(ModelConfig(vocab_size=4, training_length=8, embed_dim=48)).state_dict(),
        {},
    ],
    ids=["another kind", "another size", "nothing"],
)
def test_weights_of_another_model_are_refused(saved, tensors):
    weights_of(saved).write_bytes(save({k: v.clone() for k, v in tensors.items()}))
    swear(saved)
    with pytest.raises(ValueError, match="does not fit the model in its card"):
        load_checkpoint(saved)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["head.weight", "blocks.0.attention.prior.parts.0.frequencies"])
def test_numbers_must_be_finite(result, saved, key, number):
    tensors = load(weights_of(saved).read_bytes())
    tensors[key].view(-1)[1] = number
    weights_of(saved).write_bytes(save(tensors))
    swear(saved)
    words = rf"tiny\.safetensors must hold finite numbers, got others in {key}"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(saved)
    # Nor are they saved in the place of others.
    model, card = other_model(result)
    model.load_state_dict(tensors)
    with pytest.raises(ValueError, match=words):
        save_checkpoint(model, card, saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.double(), "head.weight must be torch.float32 .* got torch.float64"),
        (lambda t: t.mT.contiguous(), r"shape \(4, 32\), got torch.float32 of shape \(32, 4\)"),
        (lambda t: None, "must hold 31 tensors, got 30"),
    ],
    ids=["another type", "another shape", "left out"],
)
def test_weights_must_be_those_of_the_card(saved, change, words):
    tensors = load(weights_of(saved).read_bytes())
    tensors["head.weight"] = change(tensors["head.weight"])
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    weights_of(saved).write_bytes(save(tensors))
    swear(saved)
    with pytest.raises(ValueError, match=rf"tiny\.safetensors does not fit .*{words}"):
        load_checkpoint(saved)


#: Sizes that would take hours, or more memory than there is, were they built.
HUGE = [
    *(
        {size: value}
        for size in ("num_layers", "embed_dim", "vocab_size", "prior_rank", "sink_rank")
        for value in (10**7, 10**9, 10**12, 10**40)
    ),
    {"embed_dim": 2 * 10**9, "num_heads": 10**9},
    {"num_kv_heads": 10**9},
    {"content_dim": 10**12},
    {"mlp_ratio": 1e12},
    {"mlp_ratio": 1e300},
    {"base": 10**400},
    {"positions": "learned", "training_length": 10**12},
]
LOAD_ALL = """
import json, resource, signal, sys
from pathlib import Path
from goatviz.training import load_checkpoint

resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
card = Path(sys.argv[1])
whole = json.loads(card.read_text())
for changes in json.loads(sys.argv[2]):
    card.write_text(json.dumps(whole | {"model": whole["model"] | changes}))
    print("loading", changes, flush=True)
    signal.alarm(10)
    try:
        load_checkpoint(card)
    except ValueError as error:
        assert str(error).startswith(("tiny.json does not", "tiny.safetensors does not")), error
    else:
        raise AssertionError("loaded")
"""


def test_a_card_costs_no_more_than_its_weights(saved):
    rewrite_card(saved)
    # In a process that has ten seconds and few GiB for each of them.
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(card_of(saved)), json.dumps(HUGE)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + run.stderr.splitlines()[-1:]


def test_both_files_are_needed(saved):
    card = card_of(saved).read_bytes()
    card_of(saved).unlink()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(saved)
    card_of(saved).write_bytes(card)
    weights_of(saved).unlink()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a readable card"),
        (b'{"format": "goatviz-ch', "is not a readable card"),
        (b"\xff\xfe\x00", "is not a readable card"),
        (b"[" * 100_000, "tiny.json is not a readable card"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "tiny.json is not a readable card"),
        (b'{"seed": NaN}', "tiny.json is not a readable card: NaN is not a number"),
        (b"[1, 2]", "must have format 'goatviz-checkpoint-2', got 'list'"),
        (b"{}", "must have format 'goatviz-checkpoint-2', got None"),
        (b'{"format": ' + b"[" * 500 + b"]" * 500 + b"}", r"got \[+\.\.\.\]+$"),
        (b'{"format": "goatviz-checkpoint-9"}', "got 'goatviz-checkpoint-9'"),
        (b'{"format": "goatviz-checkpoint-1"}', "lacks sha256, model, config"),
        (b'{"format": "goatviz-checkpoint-2"}', "lacks sha256, card_sha256, model, config"),
    ],
)
def test_a_damaged_card_is_refused(saved, content, words):
    card_of(saved).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": None}, "lacks sha256"),
        ({"sha256": 5}, "must hold its sha256 as text, got 5"),
        ({"model": {"vocab_size": 4}}, "tiny.json does not describe a model"),
        (
            {"model": {"vocab_size": 4, "training_length": 8, "colour": 1}},
            "does not describe a model",
        ),
        (
            {"model": {"vocab_size": 0, "training_length": 8}},
            "does not describe a model.*vocab_size",
        ),
        ({"model": "small"}, "must hold model as an object, got .small."),
        ({"config": [1]}, "must hold config as an object"),
    ],
)
def test_a_card_with_a_damaged_entry_is_refused(saved, changes, words):
    rewrite_card(saved, **changes)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(saved)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"])
def test_pickles_are_never_opened(tmp_path, ending, result):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"model{ending}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="refused"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="never pickled"):
        save_checkpoint(result.model, make_card(result, command="", data=""), path)
    # Nor under a borrowed name.
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    card = make_card(result, command="", data="") | {"format": "goatviz-checkpoint-1"}
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


def other_model(result):
    torch.manual_seed(99)
    return CausalLM(result.model.config), make_card(result, command="again", data="")


def test_a_failed_write_leaves_the_old_checkpoint(result, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    model, card = other_model(result)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(model, card, saved)
        assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before
    load_checkpoint(saved)


def test_a_card_that_is_no_json_costs_nothing(result, saved):
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}
    model, card = other_model(result)
    for bad, error in (({"loss": float("nan")}, ValueError), ({"loss": object()}, TypeError)):
        with pytest.raises(error):
            save_checkpoint(model, card | bad, saved)
        assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before


def test_a_write_interrupted_between_the_two_files_is_noticed(result, saved, monkeypatch):
    replace = os.replace

    def second_fails(source, target):
        if str(target).endswith(".json"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(*other_model(result), saved)
    with pytest.raises(ValueError, match="not the file its card describes"):
        load_checkpoint(saved)


def test_a_reader_finds_the_two_files_of_one_writer(result, saved):
    models = {}
    for name in ("one", "two"):
        torch.manual_seed(len(models))
        models[name] = CausalLM(result.model.config)
    card = make_card(result, command="", data="")

    def write(name):
        for _ in range(12):
            save_checkpoint(models[name], card | {"command": name}, saved)

    save_checkpoint(models["one"], card | {"command": "one"}, saved)
    writers = [threading.Thread(target=write, args=(name,)) for name in models]
    for writer in writers:
        writer.start()
    found = set()
    while any(writer.is_alive() for writer in writers):
        loaded = load_checkpoint(saved)
        found.add(loaded.card["command"])
        wanted = models[loaded.card["command"]]
        assert torch.equal(loaded.model.head.weight, wanted.head.weight)
    assert found == set(models)


def test_saving_over_and_modes(result, saved):
    save_checkpoint(*other_model(result), saved)
    assert load_checkpoint(saved).card["command"] == "again"
    assert {p.name for p in saved.parent.iterdir()} == {"tiny.json", "tiny.safetensors"}
    assert weights_of(saved).stat().st_mode & 0o777 == 0o644


def test_the_folder_must_exist(result, tmp_path):
    with pytest.raises(ValueError, match="path must lie in an existing folder"):
        save_checkpoint(*other_model(result), tmp_path / "none" / "tiny")


@pytest.mark.parametrize("name", ["nope", "", "../copy-mixture-1-goat", "copy-mixture-1-goat.json"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(KeyError) as caught:
        load_pretrained(name)
    assert repr(name) in str(caught.value)
    assert list_pretrained()
    for known in list_pretrained():
        assert known in str(caught.value)
