"""Passkey and needle: the answer stands in the text once, where it was asked for."""

import re
import string
from dataclasses import replace

import pytest
import torch

from goatviz.tasks import TASKS, Needle, Passkey

VARIANTS = {
    "passkey": Passkey(length=100),
    "needle": Needle(length=100),
    "short as can be": Needle(length=Needle(length=99).shortest),
    "many keys": Passkey(length=150, distractors=4, value_length=4),
    "a text": Passkey(length=120, value_length=5, haystack="it rains. it pours. "),
    "a text and many keys": Needle(length=150, distractors=2, haystack="so far, so good; "),
}


def drawn(task, count=64, seed=0, **options):
    ids = task.sample(count, generator=torch.Generator().manual_seed(seed), **options)
    assert ids.shape == (count, task.length + 1) and ids.dtype == torch.int64
    assert 0 <= int(ids.min()) and int(ids.max()) < task.vocab_size
    return task.decode(ids)


@pytest.mark.parametrize("task", VARIANTS.values(), ids=VARIANTS)
def test_the_answer_is_the_value_of_the_pair_that_is_asked_for(task):
    for text in drawn(task):
        body, name, answer = re.fullmatch(r"(.*)#([A-Z]*)=([^#=]*)", text).groups()
        assert len(answer) == task.answer_length and set(answer) <= set(task.alphabet)
        width = task.value_length
        pairs = re.findall(rf"#([A-Z]*)=(.{{{width}}})\.", body)
        assert len(pairs) == task.distractors + 1
        assert len({found for found, _ in pairs}) == len(pairs)
        assert dict(pairs)[name] == answer
        assert len(name) == (2 if task.distractors else 0)
        filler = re.sub(rf"#[A-Z]*=.{{{width}}}\.", "", body)
        if task.haystack is None:
            assert set(filler) <= set(string.ascii_lowercase)
        else:
            assert filler in task.haystack * 20


def test_one_seed_is_one_set_of_sequences_and_another_is_another():
    task = VARIANTS["many keys"]
    assert drawn(task, seed=3) == drawn(task, seed=3) != drawn(task, seed=4)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depth_is_where_the_pair_stands_in_the_filler(depth):
    task = Passkey(length=220)
    filler = task.length - task.shortest
    assert {text.index("#") for text in drawn(task, depth=depth)} == {round(depth * filler)}


def test_depths_are_uniform_within_their_bounds():
    task = Passkey(length=520, depths=(0.2, 0.8))
    places = torch.tensor([text.index("#") for text in drawn(task, 2000)]) / (
        task.length - task.shortest
    )
    assert 0.198 <= float(places.min()) < 0.21 and 0.79 < float(places.max()) <= 0.802
    quarters = torch.histc(places, 4, 0.2, 0.8)
    assert float((quarters - 500).abs().max()) < 100


def test_values_are_uniform_over_the_alphabet():
    task = Needle(length=64)
    letters = "".join(text[-12:] for text in drawn(task, 1000))
    for letter in "abcd":
        assert abs(letters.count(letter) - 3000) < 250


def test_chance_is_that_of_a_guess():
    assert Passkey().chance == 0.1 and Passkey().strict_chance == pytest.approx(1e-8)
    assert Needle().chance == 0.25 and Needle().strict_chance == 0.25**12


@pytest.mark.parametrize("task", [Passkey(length=64), Needle(length=64)])
def test_the_loss_looks_where_the_protocol_says(task):
    weights = task.target_weights()
    span = task.answer_length
    assert weights.shape == (64,)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    everywhere = float(weights[0])
    assert everywhere == pytest.approx({"passkey": 1 / 11 / 64, "needle": 0.0}[task.name])
    share = float((weights[-span:] - everywhere).sum())
    assert share == pytest.approx({"passkey": 10 / 11, "needle": 1.0}[task.name], abs=1e-6)


def test_at_length_changes_nothing_else():
    task = VARIANTS["many keys"]
    longer = task.at_length(400)
    assert type(longer) is Passkey and longer.length == 400
    assert longer.at_length(task.length) == task


def test_names_lead_to_tasks():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 19}, "length must be at least 20 tokens"),
        ({"length": 40, "distractors": 3}, "to hold 4 pairs, the question .* got 40"),
        ({"value_length": 0}, "value_length must be an integer of at least 1, got 0"),
        ({"distractors": -1}, "distractors must be an integer of at least 0, got -1"),
        ({"distractors": 676}, "distractors must leave names"),
        ({"alphabet": "aa"}, "alphabet must hold distinct ASCII characters, got 'aa'"),
        ({"alphabet": "é1"}, "alphabet must hold distinct ASCII"),
        ({"alphabet": "1#"}, "alphabet must be ASCII text without '#' and '='"),
        ({"haystack": ""}, "haystack must be ASCII text"),
        ({"haystack": "a = b"}, "haystack must be ASCII text"),
        ({"depths": (0.5, 0.2)}, "depths must be two numbers"),
        ({"depths": (0.0, 1.5)}, "depths must be two numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Passkey(**options)


def test_sampling_names_what_does_not_fit():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        Passkey().sample(0, generator=generator)
    with pytest.raises(ValueError, match=r"depth must lie in \[0, 1\], got 1.5"):
        Passkey().sample(1, generator=generator, depth=1.5)


@pytest.mark.parametrize("task", [Passkey(length=60, value_length=4), Needle(length=90)])
@pytest.mark.parametrize("distractors", [0, 3])
def test_answer_keys_point_at_the_answer(task, distractors):
    task = replace(task, distractors=distractors)
    ids = task.sample(32, generator=torch.Generator().manual_seed(1))
    found = ids.gather(1, task.answer_keys(ids))
    assert torch.equal(found, ids[:, -task.value_length :])
    assert int(task.answer_keys(ids).max()) < task.length - task.value_length


def test_answer_keys_need_sequences_of_the_task():
    task = Needle(length=40, value_length=4)
    with pytest.raises(ValueError, match=r"ids must have shape \(count, 41\), got \(2, 40\)"):
        task.answer_keys(torch.zeros(2, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="ids must hold the needle that they ask for"):
        task.answer_keys(torch.zeros(2, 41, dtype=torch.long) + torch.arange(41))
