"""Losses and answers are counted right, and the cache changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from goatviz.models import POSITION_SCHEMES, CausalLM, ImageClassifier, ModelConfig
from goatviz.tasks import DNA, CopyMixture, Images, Needle, Passkey
from goatviz.training import evaluate, evaluate_answers, prefill
from goatviz.training.evaluation import (
    loss_weights,
    next_token_loss,
    sequence_loss,
    task_loss,
)

TASK = CopyMixture(length=8, vocab_size=4)


def small_model(positions="goat", vocab_size=128, length=96):
    torch.manual_seed(0)
    return CausalLM(
        ModelConfig(
            vocab_size=vocab_size,
            training_length=length,
            embed_dim=64,
            num_layers=2,
            num_heads=2,
            positions=positions,
        )
    )


class Oracle(torch.nn.Module):
    """Reads the answer off the text; misses the last token where the first letter is 'a'."""

    def __init__(self, task):
        super().__init__()
        self.task = task
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def new_cache(self):
        self.seen = []
        return self

    def forward(self, ids, cache=None):
        self.seen.append(ids)
        text = torch.cat(self.seen, dim=1)
        logits = torch.zeros(*ids.shape, self.task.vocab_size)
        for row, line in enumerate(self.task.decode(text)):
            if "=" not in line:
                continue
            value = line.split("=")[1][: self.task.value_length]
            wanted = line + value[len(line.rsplit("=", 1)[1]) :]
            for at in range(ids.shape[1]):
                place = text.shape[1] - ids.shape[1] + at + 1
                letter = ord(wanted[place]) if place < len(wanted) else 0
                if place == self.task.length and line[0] == "a":
                    letter = 0
                logits[row, at, letter] = 5.0
        return logits


@pytest.mark.parametrize("chunk", [1024, 7, 64])
def test_answers_are_counted_as_they_are(chunk):
    task = Needle(length=64)
    found = evaluate_answers(Oracle(task), task, examples=200, batch_size=48, seed=3, chunk=chunk)
    generator = torch.Generator().manual_seed(3)
    texts = [
        line
        for count in (48, 48, 48, 48, 8)
        for line in task.decode(task.sample(count, generator=generator))
    ]
    missed = sum(line[0] == "a" for line in texts)
    assert 0 < missed < 30
    assert found[:4] == (200, 200 - missed, 2400, 2400 - missed)
    assert found.strict == (200 - missed) / 200 and found.token == (2400 - missed) / 2400
    hit = 5.0 - math.log(math.exp(5.0) + 127)
    expected = hit - 5.0 * missed / 2400
    assert found.log_probability == pytest.approx(expected, abs=1e-9)


def test_an_untrained_model_guesses():
    task = Passkey(length=64)
    found = evaluate_answers(small_model(), task, examples=64)
    assert found.right == 0 and found.token < 0.2


def test_depth_reaches_the_task(monkeypatch):
    task, seen = Needle(length=64), []
    original = Needle.sample

    def record(self, count, *, generator, depth=None):
        seen.append(depth)
        return original(self, count, generator=generator, depth=depth)

    monkeypatch.setattr(Needle, "sample", record)
    evaluate_answers(small_model(), task, examples=4, depth=0.3)
    assert seen == [0.3]


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
@pytest.mark.parametrize("chunk", [1, 17, 96, 500])
@torch.no_grad()
def test_the_cache_gives_the_full_pass(positions, chunk):
    model = small_model(positions)
    ids = torch.randint(128, (2, 96), generator=torch.Generator().manual_seed(1))
    full = model(ids)
    torch.testing.assert_close(prefill(model, ids, chunk=chunk), full, rtol=1e-4, atol=1e-4)
    for last in (1, 20, 96):
        found = prefill(model, ids, chunk=chunk, last=last)
        torch.testing.assert_close(found, full[:, -last:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", [Passkey(length=40), Needle(length=40), TASK])
@torch.no_grad()
def test_the_loss_is_the_protocols(task):
    model = small_model(vocab_size=task.vocab_size)
    ids = task.sample(6, generator=torch.Generator().manual_seed(0))
    each = F.cross_entropy(model(ids[:, :-1]).double().mT, ids[:, 1:], reduction="none")
    language = each.mean()
    wanted = language
    if task.answer_length:
        answer = each[:, -task.answer_length :].mean()
        wanted = answer if task.name == "needle" else (language + 10 * answer) / 11
    assert float(task_loss(model, ids, task)) == pytest.approx(float(wanted), rel=1e-5)
    assert next_token_loss(model, ids).shape == (6, task.length)


def test_evaluate_is_the_mean_cross_entropy():
    model = small_model(vocab_size=4).train()
    got = evaluate(model, TASK, sequences=50, batch_size=16, seed=7)
    assert not model.training
    generator = torch.Generator().manual_seed(7)
    # The stream is drawn batch by batch.
    ids = torch.cat([TASK.sample(n, generator=generator) for n in (16, 16, 16, 2)])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).double().log_softmax(-1)
    each = -log_p.gather(2, ids[:, 1:, None]).squeeze(-1).mean(-1)
    assert got.mean == pytest.approx(each.mean().item(), rel=1e-6)
    assert got.standard_error == pytest.approx(each.std().item() / math.sqrt(50), rel=1e-5)
    assert got.sequences == 50
    longer = dataclasses.replace(TASK, length=30)
    assert math.isfinite(evaluate(model, longer, sequences=4).mean)


def test_errors():
    model = small_model()
    with pytest.raises(ValueError, match="sequences must be an integer of at least 2, got 1"):
        evaluate(model, TASK, sequences=1)
    with pytest.raises(ValueError, match="task must have answers .*, got copy-mixture"):
        evaluate_answers(model, TASK)
    with pytest.raises(ValueError, match="examples must be an integer of at least 1, got 0"):
        evaluate_answers(model, Needle(), examples=0)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        prefill(model, ids, chunk=0)
    with pytest.raises(ValueError, match="last must lie between 1 and the length 5, got 6"):
        prefill(model, ids, last=6)


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_losses_in_chunks_are_those_of_the_full_pass(positions):
    model = small_model(positions, vocab_size=16)
    ids = torch.randint(16, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = next_token_loss(model, ids)
    for chunk in (7, 89, 200):
        torch.testing.assert_close(sequence_loss(model, ids, chunk=chunk), whole, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        sequence_loss(model, ids, chunk=0)


def test_masked_targets_count_for_nothing(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text(">one\n" + "ACGTNNACGGTTA" * 20 + "\n>gap\n" + "N" * 400)
    task = DNA(source=str(path), validation=str(path), length=12)
    model = small_model(vocab_size=5)
    ids = task.sample(40, generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:] != task.masked
    assert (targets.sum(-1) == 0).any() and (targets.sum(-1) > 0).any()
    each = next_token_loss(model, ids)
    torch.testing.assert_close(task_loss(model, ids, task), each[targets].mean())
    weights = loss_weights(ids, task)
    assert float(weights.sum()) == pytest.approx(1) and not weights[~targets].any()
    parts = [
        task_loss(model, ids[part], task, weights=weights[part])
        for part in (slice(0, 13), slice(13, 40))
    ]
    torch.testing.assert_close(sum(parts), task_loss(model, ids, task))
    found = evaluate(model, task, sequences=40, batch_size=16, seed=0)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.cat([task.sample(n, generator=drawn) for n in (16, 16, 8)])
    counted = (ids[:, 1:] != task.masked).sum(-1)
    loss = (next_token_loss(model, ids) * (ids[:, 1:] != task.masked)).sum(-1)
    means = (loss / counted)[counted > 0]
    assert found.sequences == len(means) < 40
    assert found.mean == pytest.approx(means.mean().item(), rel=1e-5)
    nothing = DNA(source=str(tmp_path / "gap.fa"), length=12)
    (tmp_path / "gap.fa").write_text(">gap\n" + "N" * 100)
    with pytest.raises(ValueError, match="task must have targets in two sequences"):
        evaluate(model, nothing, sequences=4)


@pytest.mark.parametrize("task", [Passkey(length=40), Needle(length=40), TASK])
def test_weights_of_a_batch_add_up_to_the_tasks_own(task):
    ids = task.sample(6, generator=torch.Generator().manual_seed(0))
    weights = loss_weights(ids, task)
    assert weights.shape == (6, task.length) and float(weights.sum()) == pytest.approx(1)
    own = task.target_weights()
    if own is not None:
        torch.testing.assert_close(weights[2] * 6, own)


def test_interpolated_positions_reach_the_whole_length_in_every_chunk():
    model = small_model("rope-interpolated", vocab_size=16, length=32)
    rotaries = [block.attention.rotary for block in model.blocks]
    ids = torch.randint(16, (2, 91), generator=torch.Generator().manual_seed(1))
    for rotary in rotaries:
        rotary.target_length = 90
    with torch.no_grad():
        whole = model(ids[:, :-1])
        losses = next_token_loss(model, ids)
    for rotary in rotaries:
        rotary.target_length = 32
    for chunk in (7, 90):
        torch.testing.assert_close(
            prefill(model, ids[:, :-1], chunk=chunk), whole, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            sequence_loss(model, ids, chunk=chunk), losses, atol=1e-4, rtol=0
        )
    assert [rotary.target_length for rotary in rotaries] == [32, 32]
    with pytest.raises(TypeError):
        prefill(model, ids.float())
    assert [rotary.target_length for rotary in rotaries] == [32, 32]
    found = evaluate_answers(
        small_model("rope-interpolated", length=32), Needle(length=80), examples=2
    )
    assert found.tokens == 24


def test_of_an_image_its_class_alone_is_predicted(tmp_path):
    generator = np.random.default_rng(0)
    held = {}
    for part in ("train", "test"):
        held[f"x_{part}"] = generator.integers(256, size=(20, 8, 8), dtype=np.uint8)
        held[f"y_{part}"] = generator.integers(10, size=20)
    np.savez(tmp_path / "a.npz", **held)
    task = Images(str(tmp_path / "a.npz"), side=8)
    torch.manual_seed(0)
    config = ModelConfig(256, task.length, embed_dim=32, patch=4)
    model = ImageClassifier(config).eval()
    ids = task.sample(40, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(ids[:, :-1])[:, 0]
        each = F.cross_entropy(logits, ids[:, -1], reduction="none")
        losses = next_token_loss(model, ids)
        torch.testing.assert_close(losses, each[:, None])
        torch.testing.assert_close(task_loss(model, ids, task), each.mean())
    found = evaluate(model, task, sequences=40, batch_size=40, seed=3)
    assert found.mean == pytest.approx(each.mean().item(), rel=1e-6)
    assert found.standard_error == pytest.approx(each.std().item() / math.sqrt(40), rel=1e-5)
    answers = evaluate_answers(model, task, examples=40, batch_size=40, seed=3)
    right = int((logits.argmax(-1) == ids[:, -1]).sum())
    assert answers[:4] == (40, right, 40, right)
    assert answers.log_probability == pytest.approx(-each.mean().item(), rel=1e-5)
