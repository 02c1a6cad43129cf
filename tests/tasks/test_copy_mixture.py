"""The copy mixture: its optimum in closed form against samples, and its samples against shares."""

import math

import pytest
import torch

from goatviz.tasks import CopyMixture

TASKS = {
    "offset 1": CopyMixture(length=24, vocab_size=8, offset=1),
    "offset 4": CopyMixture(length=24, vocab_size=8, offset=4),
    "uneven": CopyMixture(length=12, vocab_size=3, offset=2, first=0.2, previous=0.7),
    "mostly noise": CopyMixture(length=12, vocab_size=5, offset=3, first=0.05, previous=0.1),
    "first or previous": CopyMixture(length=9, vocab_size=4, offset=1, first=0.5, previous=0.5),
    "offset = length": CopyMixture(length=6, vocab_size=4, offset=6),
    "previous only": CopyMixture(length=9, vocab_size=4, offset=3, first=0.0, previous=0.8),
}


def sample(task, count=20_000, seed=0):
    return task.sample(count, generator=torch.Generator().manual_seed(seed))


def losses(task, ids, probabilities):
    """Cross-entropy of each sequence, nats per predicted token."""
    picked = probabilities.gather(2, ids[:, 1:, None]).squeeze(-1)
    return -picked.log().mean(-1)


def rule(task, history):
    """P(x_t | x_<t) from the definition, for one history."""
    t = len(history)
    noise = 1 - task.first - task.previous + (task.previous if t < task.offset else 0)
    p = [noise / task.vocab_size] * task.vocab_size
    p[history[0]] += task.first
    if t >= task.offset:
        p[history[t - task.offset]] += task.previous
    return p


@pytest.mark.parametrize("name", TASKS)
def test_optimal_probabilities_are_the_definition(name):
    task = TASKS[name]
    ids = sample(task, 5)
    got = task.optimal_probabilities(ids)
    assert got.shape == (5, task.length, task.vocab_size)
    torch.testing.assert_close(got.sum(-1), torch.ones(5, task.length, dtype=torch.float64))
    for row, sequence in zip(got.tolist(), ids.tolist(), strict=True):
        for t in range(1, task.length + 1):
            assert row[t - 1] == pytest.approx(rule(task, sequence[:t]), abs=1e-14)


@pytest.mark.parametrize("name", TASKS)
def test_bayes_loss_is_what_the_optimal_predictor_reaches(name):
    task = TASKS[name]
    ids = sample(task)
    each = losses(task, ids, task.optimal_probabilities(ids))
    error = each.std().item() / math.sqrt(len(each))
    assert abs(each.mean().item() - task.bayes_loss()) <= 5 * error


def test_bayes_loss_by_enumeration():
    # Every history of a task small enough: the expected entropy of the next token, exactly.
    task = CopyMixture(length=5, vocab_size=3, offset=2, first=0.3, previous=0.45)
    mass = {(c,): 1 / 3 for c in range(3)}
    total = 0.0
    for _ in range(task.length):
        grown = {}
        for history, weight in mass.items():
            for c, p in enumerate(rule(task, list(history))):
                total -= weight * p * math.log(p)
                grown[*history, c] = weight * p
        mass = grown
    assert task.bayes_loss() == pytest.approx(total / task.length, rel=1e-12)


@pytest.mark.parametrize("offset", [1, 4])
def test_edges(offset):
    noise = CopyMixture(length=9, vocab_size=7, offset=offset, first=0.0, previous=0.0)
    assert noise.bayes_loss() == pytest.approx(math.log(7))
    first = CopyMixture(length=9, vocab_size=7, offset=offset, first=1.0, previous=0.0)
    assert first.bayes_loss() == 0
    assert (sample(first, 50) == sample(first, 50)[:, :1]).all()
    previous = CopyMixture(length=9, vocab_size=7, offset=offset, first=0.0, previous=1.0)
    # Until there is something to copy, its share is noise.
    assert previous.bayes_loss() == pytest.approx((offset - 1) / 9 * math.log(7))
    ids = sample(previous, 50)
    assert (ids[:, offset:] == ids[:, :-offset]).all()


@pytest.mark.parametrize("name", ["offset 1", "offset 4", "uneven"])
def test_no_other_predictor_does_better(name):
    task = TASKS[name]
    ids = sample(task)
    optimal = task.optimal_probabilities(ids)
    best = losses(task, ids, optimal)
    generator = torch.Generator().manual_seed(1)
    uniform = torch.full_like(optimal, 1 / task.vocab_size)
    tilt = torch.randn(task.vocab_size, generator=generator, dtype=torch.float64) * 0.3
    others = {
        "flatter": 0.9 * optimal + 0.1 * uniform,
        "sharper": optimal**1.2 / (optimal**1.2).sum(-1, keepdim=True),
        "tilted": (optimal.log() + tilt).softmax(-1),
        "wrong offset": CopyMixture(
            task.length, task.vocab_size, task.offset + 1, task.first, task.previous
        ).optimal_probabilities(ids),
        "swapped": CopyMixture(
            task.length, task.vocab_size, task.offset, task.previous, task.first
        ).optimal_probabilities(ids),
    }
    if task.first == task.previous:
        del others["swapped"]
    for other, probabilities in others.items():
        worse = losses(task, ids, probabilities) - best
        assert worse.mean() > 5 * worse.std() / math.sqrt(len(worse)), other


def test_shares_are_met():
    task = CopyMixture(length=30, vocab_size=50, offset=3, first=0.3, previous=0.5)
    ids = sample(task, 4000)
    late = ids[:, task.offset :]
    first, back = late == ids[:, :1], late == ids[:, : -task.offset]
    # Where the two sources differ, each is copied its share plus the noise that hits it.
    apart = ids[:, :1] != ids[:, : -task.offset]
    for hit, share in ((first, 0.3), (back, 0.5)):
        rate = hit[apart].double().mean().item()
        wanted = share + 0.2 / 50
        assert abs(rate - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / apart.sum().item())
    counts = torch.bincount(ids[:, 0], minlength=50).double() / 4000
    assert (counts - 1 / 50).abs().max() <= 5 * math.sqrt(1 / 50 / 4000)


def test_seeding():
    task = TASKS["offset 1"]
    assert torch.equal(sample(task, 8, seed=3), sample(task, 8, seed=3))
    assert not torch.equal(sample(task, 8, seed=3), sample(task, 8, seed=4))
    before = torch.get_rng_state()
    sample(task, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(task, 8).shape == (8, 25)
    assert 0 <= sample(task, 8).min() and sample(task, 8).max() < 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"vocab_size": 1}, "vocab_size must be an integer of at least 2, got 1"),
        ({"offset": 0}, "offset must be an integer of at least 1, got 0"),
        ({"offset": 9}, "offset must not exceed length=8, got 9"),
        ({"first": -0.1}, r"first must lie in \[0, 1\], got -0.1"),
        ({"previous": 1.1}, r"previous must lie in \[0, 1\], got 1.1"),
        ({"first": math.nan}, "first must lie"),
        ({"first": 0.6, "previous": 0.5}, r"first \+ previous must not exceed 1, got 0.6 \+ 0.5"),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        CopyMixture(**({"length": 8} | changes))


def test_sampling_nothing_is_an_error():
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        sample(TASKS["offset 1"], 0)
