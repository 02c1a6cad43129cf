"""A cell is measured once, and what it depends on names it."""

import json

import numpy as np
import pytest

from goatviz import CausalLM, ModelConfig, Needle
from goatviz.analysis.cells import (
    cached,
    check_cache,
    check_lengths,
    check_models,
    model_digest,
    trained_lengths,
)


def model(**changes):
    return CausalLM(ModelConfig(**{"vocab_size": 128, "training_length": 16, **changes}))


def test_a_cell_is_measured_once(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return [len(calls), None]

    assert cached(tmp_path, "a-8", {"x": 1}, measure) == [1, None]
    assert cached(tmp_path, "a-8", {"x": 1}, measure) == [1, None]
    assert cached(tmp_path, "a-8", {"x": 2}, measure) == [2, None]
    assert cached(None, "a-8", {"x": 1}, measure) == [3, None]
    found = sorted(tmp_path.iterdir())
    assert len(found) == 2 and all(path.name.startswith("a-8-") for path in found)
    assert sorted(json.loads(path.read_text()) for path in found) == [[1, None], [2, None]]


def test_a_failed_measurement_leaves_no_cell(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "a", 1, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cell_is_said_to_be(tmp_path):
    cached(tmp_path, "a", 1, lambda: 1)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(ValueError, match="a-.*json is damaged, remove it"):
        cached(tmp_path, "a", 1, lambda: 1)


def test_a_models_digest_is_that_of_its_weights_and_config():
    first = model()
    second = model()
    assert model_digest(first) == model_digest(first) != model_digest(second)
    second.load_state_dict(first.state_dict())
    assert model_digest(second) == model_digest(first)
    other = model(training_length=32)
    other.load_state_dict(first.state_dict())
    assert model_digest(other) != model_digest(first)


def test_models_by_scheme():
    one = model()
    assert check_models({"a": one, "b": [one, one]}, Needle()) == {"a": [one], "b": [one, one]}
    assert trained_lengths({"a": [one], "b": [model(training_length=8), one]}) == "8, 16"
    with pytest.raises(TypeError, match="a mapping of scheme names to models.*got list"):
        check_models([one], Needle())
    with pytest.raises(ValueError, match="must hold at least one model, got none"):
        check_models({"a": []}, Needle())
    with pytest.raises(TypeError, match="must be a CausalLM, got int"):
        check_models({"a": [3]}, Needle())
    with pytest.raises(ValueError, match="at least the task.s 128 tokens, got 8"):
        check_models({"a": model(vocab_size=8)}, Needle())


def test_lengths_and_cache(tmp_path):
    assert check_lengths((8, np.int64(16))) == [8, 16]
    for bad in ([], [8, 8], [16, 8]):
        with pytest.raises(ValueError, match="lengths must be increasing positive integers"):
            check_lengths(bad)
    for bad, error in ((64, TypeError), ([1.5], TypeError), ([True], TypeError), ([0], ValueError)):
        with pytest.raises(error, match="lengths must be"):
            check_lengths(bad)
    assert check_cache(None) is None and check_cache(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="cache must be an existing folder, got"):
        check_cache(tmp_path / "nowhere")
