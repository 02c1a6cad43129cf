"""Training repeats itself bit for bit, compares schemes on the same data, learns, fails loud."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from goatviz.models import IMAGE_SCHEMES, POSITION_SCHEMES, CausalLM
from goatviz.tasks import CopyMixture, Images, Needle, Passkey
from goatviz.training import TrainConfig, evaluate, evaluate_answers, train

TINY = TrainConfig(
    task=CopyMixture(length=8, vocab_size=4),
    embed_dim=32,
    prior_rank=2,
    sink_rank=2,
    steps=4,
    batch_size=8,
    warmup=2,
)


def run(config=TINY, **changes):
    return train(dataclasses.replace(config, **changes), progress=False)


@pytest.fixture(autouse=True)
def _small_held_out(monkeypatch):
    # The held-out set that the loop itself draws is larger than these models deserve.
    import goatviz.training.loop as loop

    def small(model, task, *, seed):
        return evaluate(model, task, sequences=64, batch_size=64, seed=seed)

    def few(model, task, *, seed):
        return evaluate_answers(model, task, examples=32, batch_size=32, seed=seed)

    monkeypatch.setattr(loop, "evaluate", small)
    monkeypatch.setattr(loop, "evaluate_answers", few)


def seen_by(config, monkeypatch):
    """Losses, and every batch that the run trained on."""
    batches = []
    original = CopyMixture.sample

    def record(self, count, *, generator):
        ids = original(self, count, generator=generator)
        batches.append(ids)
        return ids

    monkeypatch.setattr(CopyMixture, "sample", record)
    result = run(config)
    monkeypatch.setattr(CopyMixture, "sample", original)
    return [entry["loss"] for entry in result.history], batches


@pytest.mark.parametrize("positions", ["goat", "rope", "bucket"])
def test_one_seed_is_one_run(positions):
    first, second = run(positions=positions), run(positions=positions)
    assert first.history == second.history
    assert first.held_out == second.held_out
    for (name, a), b in zip(
        first.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert run(positions=positions, seed=1).history != first.history


def test_the_callers_random_state_is_left_alone_and_ignored():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run().history == first.history


def test_two_schemes_see_the_same_data(monkeypatch):
    ours, our_data = seen_by(TINY, monkeypatch)
    theirs, their_data = seen_by(dataclasses.replace(TINY, positions="none"), monkeypatch)
    assert ours != theirs
    assert len(our_data) == len(their_data) > TINY.steps
    assert all(torch.equal(a, b) for a, b in zip(our_data, their_data, strict=True))
    _, other = seen_by(dataclasses.replace(TINY, seed=1), monkeypatch)
    assert not torch.equal(our_data[0], other[0])


def test_held_out_data_are_not_training_data(monkeypatch):
    _, batches = seen_by(dataclasses.replace(TINY, steps=20), monkeypatch)
    # Identical sequences of 9 tokens may meet by chance; whole batches do not.
    training, held_out = torch.cat(batches[:20]), batches[20]
    assert not torch.equal(training[: len(held_out)], held_out)


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_every_scheme_trains(positions):
    result = run(positions=positions)
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4]
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    assert result.wall_time > 0
    assert result.held_out.sequences == 64
    assert not result.model.training


def test_the_loss_falls_towards_the_optimum():
    task = CopyMixture(length=8, vocab_size=4, first=0.0, previous=1.0)
    result = run(task=task, steps=150, batch_size=32, warmup=10, learning_rate=1e-2, mlp_ratio=0.0)
    assert result.history[0]["loss"] == pytest.approx(math.log(4), abs=0.1)
    assert task.bayes_loss() - 1e-9 <= result.held_out.mean < 0.1


def test_a_needle_is_learned_from_the_answer_alone():
    # One value of one letter, asked for at once: the last token but one holds the answer.
    task = Needle(length=6, value_length=1)
    result = run(task=task, steps=200, batch_size=32, warmup=10, learning_rate=1e-2)
    assert result.answers.examples == 32
    assert result.answers.token > 0.9 > 3 * task.chance
    # What the loss does not look at is not learned.
    assert result.held_out.mean > 2 * result.history[-1]["loss"]


def test_tasks_without_answers_have_no_accuracy():
    assert run().answers is None
    assert run(task=Passkey(length=32), steps=1).answers.examples == 32


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    history = run(steps=50, warmup=10, learning_rate=1e-3).history
    rates = [entry["learning_rate"] for entry in history]
    assert rates[:10] == pytest.approx([1e-4 * (k + 1) for k in range(10)])
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.02)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_prior_can_have_a_rate_of_its_own():
    frozen = run(prior_learning_rate=1e-30, warmup=0)
    with torch.random.fork_rng():
        torch.manual_seed(TINY.seed)
        start = CausalLM(TINY.model_config())
    for (name, before), after in zip(
        start.named_parameters(), frozen.model.parameters(), strict=True
    ):
        moved = (before - after).abs().max().item()
        assert (moved < 1e-12) if ".prior." in name else True, name
    assert not torch.equal(start.head.weight, frozen.model.head.weight)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step [12]$"):
        run(learning_rate=1e30, warmup=0)


def test_errors():
    with pytest.raises(TypeError, match="config must be a TrainConfig, got dict"):
        train({})


@pytest.mark.parametrize("positions", IMAGE_SCHEMES)
def test_a_classifier_learns_where_things_are_only_with_positions(positions, tmp_path):
    # A bright patch in one of four corners: what is where cannot be told without positions.
    classes = np.arange(400) % 4
    images = np.zeros((400, 16, 16), np.uint8)
    for image, corner in zip(images, classes, strict=True):
        row, column = 12 * (corner // 2), 12 * (corner % 2)
        image[row : row + 4, column : column + 4] = 255
    held = {f"x_{part}": images for part in ("train", "test")}
    held |= {f"y_{part}": classes for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **held)
    task = Images(str(tmp_path / "a.npz"), side=16, classes=4)
    result = run(
        task=task, positions=positions, steps=250, batch_size=32, num_layers=2, prior_rank=4,
        content_dim=16, learning_rate=3e-3, prior_learning_rate=3e-2,
    )  # fmt: skip
    right = result.answers.strict
    assert right < 0.6 if positions == "none" else right > 0.95
