"""Files that were damaged or made to do harm: they load as they were, or are named in an error.

A slice of seconds; `make fuzz MINUTES=10` tries them for ten minutes.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goatviz.models import CausalLM, ModelConfig
from goatviz.results import PLAN_ROW, load_result, make_result, save_result
from goatviz.training import load_checkpoint, save_checkpoint
from tests.fuzz.minutes import fuzzed

#: What happens to a file: (what, where, how much), one after the other.
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "zero", "insert", "drop", "cut"]),
        st.integers(0, 2**24),
        st.integers(0, 63),
    ),
    min_size=1,
    max_size=4,
)
NUMBERS = st.integers(-(10**40), 10**40) | st.floats() | st.sampled_from([0, 2**31, 2**63, 10**9])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def damaged(content, damages):
    """Bytes after damages."""
    content = bytearray(content)
    for what, at, size in damages:
        at %= max(len(content), 1)
        if what == "flip":
            content[at : at + 1] = bytes(byte ^ 1 << size % 8 for byte in content[at : at + 1])
        elif what == "zero":
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif what == "insert":
            content[at:at] = bytes(size)
        else:
            del content[at : at + size if what == "drop" else None]
    return bytes(content)


class Files:
    """Files of one thing, which can be damaged and put back, and what loads from them."""

    def __init__(self, load, *paths):
        self.load, self.paths, self.loaded = load, paths, load(paths[0])
        self.contents = [path.read_bytes() for path in paths]

    def write(self, *contents):
        """Other contents; None: as it was."""
        for path, old, new in zip(self.paths, self.contents, contents, strict=True):
            path.write_bytes(old if new is None else new)

    def load_or_tell(self, *beginnings):
        """What loads now, or None if an error says in one of these ways that nothing does."""
        try:
            return self.load(self.paths[0])
        except ValueError as error:
            assert str(error).startswith(beginnings)
            return None


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    data = {
        name: np.linspace(0, 1, 8)
        for name, field in PLAN_ROW.fields.items()
        if field.units != "1" and name not in PLAN_ROW.optional
    }
    data |= {"allowed": np.arange(8) < 5, "key_token": list("abcdefgé")}
    made = make_result(PLAN_ROW, data, coords={"key": np.arange(8)}, attrs={"source": "é"})
    folder = tmp_path_factory.mktemp("result")
    return Files(load_result, save_result(made, folder / "result.nc"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Card and weights."""
    config = ModelConfig(vocab_size=5, training_length=8, embed_dim=32)
    card = {"model": vars(config), "config": {}, "seed": 3}
    folder = tmp_path_factory.mktemp("checkpoint")
    weights = save_checkpoint(CausalLM(config), card, folder / "tiny")
    return Files(load_checkpoint, weights.with_suffix(".json"), weights)


def former_card(checkpoint):
    """The checkpoint's card in the former format, without a sum of itself."""
    card = json.loads(checkpoint.contents[0]) | {"format": "goatviz-checkpoint-1"}
    del card["card_sha256"]
    return card


def assert_same(found, wanted):
    assert found.card == wanted.card and found.model.config == wanted.model.config
    theirs = found.model.state_dict()
    assert all(torch.equal(theirs[key], t) for key, t in wanted.model.state_dict().items())


@fuzzed(150)
@given(damages=DAMAGES)
def test_a_damaged_result(result, damages):
    result.write(damaged(result.contents[0], damages))
    found = result.load_or_tell("result.nc ")
    assert found is None or found.identical(result.loaded)


@fuzzed(100)
@given(damages=DAMAGES, which=st.sampled_from([0, 1]))
def test_a_damaged_checkpoint(checkpoint, damages, which):
    contents = [None, None]
    contents[which] = damaged(checkpoint.contents[which], damages)
    checkpoint.write(*contents)
    found = checkpoint.load_or_tell("tiny.json ", "tiny.safetensors is not the file its card")
    if found is not None:
        assert_same(found, checkpoint.loaded)


@fuzzed(60)
@given(damages=DAMAGES)
def test_damaged_weights_that_their_card_vouches_for(checkpoint, damages):
    weights = damaged(checkpoint.contents[1], damages)
    card = former_card(checkpoint) | {"sha256": hashlib.sha256(weights).hexdigest()}
    checkpoint.write(json.dumps(card).encode(), weights)
    found = checkpoint.load_or_tell("tiny.safetensors ")
    if found is not None:
        assert found.model.config == checkpoint.loaded.model.config
        assert not any(p.isnan().any() for p in found.model.parameters())


@fuzzed(100)
@given(data=st.data())
def test_a_hostile_card(checkpoint, data):
    card = former_card(checkpoint)
    within = data.draw(st.sampled_from([card, card["model"]]))
    within[data.draw(st.sampled_from(sorted(within)))] = data.draw(JSON)
    checkpoint.write(json.dumps(card).encode(), None)
    found = checkpoint.load_or_tell("tiny.json ", "tiny.safetensors ")
    if found is not None:
        theirs = found.model.state_dict()
        for key, tensor in checkpoint.loaded.model.state_dict().items():
            assert torch.equal(theirs[key], tensor)
