"""The effect of changed plans: losses against plain cross-entropies, intervals, budget, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from goatviz.adapters import intervene
from goatviz.analysis import sink_effect
from goatviz.figures import plot_sink_effect
from goatviz.results import load_result, save_result
from goatviz.transport import Hide, SinkColumn, Temper
from tests.factories import TextTokenizer, ids, tiny_huggingface, tiny_lm

TEXT = ids(5, 24, vocab=50)
CHANGES = {"hidden": Hide([0]), "hot": [Temper(2.0), SinkColumn(0.0)]}


def losses(model, text):
    with torch.no_grad():
        logits = model(text)
    logits = getattr(logits, "logits", logits).double()
    return F.cross_entropy(logits[:, :-1].mT, text[:, 1:], reduction="none").mean(-1).numpy()


@pytest.mark.parametrize("name", ["llama", "goat"])
def test_losses(name):
    model, text = (tiny_lm(), TEXT % 20) if name == "goat" else (tiny_huggingface(name), TEXT)
    effect = sink_effect(model, text, changes=CHANGES)
    plain = losses(model, text)
    np.testing.assert_allclose(effect["loss"], plain, rtol=1e-5)
    for change, value in CHANGES.items():
        one = effect.sel(change=change)
        for layer, name in (
            (None, "increase"),
            *((layer, "layer_increase") for layer in (0, 1)),
        ):
            with intervene(model, value, layers=layer):
                wanted = losses(model, text) - plain
            got = one[name] if layer is None else one[name].sel(layer=layer)
            np.testing.assert_allclose(got, wanted, atol=2e-5)
            assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(one["mean_increase"], one["increase"].mean())
        assert one["mean_increase_low"] <= one["mean_increase"] <= one["mean_increase_high"]


def test_tokens_are_weights():
    model = tiny_huggingface("llama")
    long, short = TEXT[:1], TEXT[1:2, :7]
    effect = sink_effect(model, [long, short], changes=CHANGES, per_layer=False)
    assert effect["tokens"].values.tolist() == [23, 6] and "layer" not in effect.dims
    np.testing.assert_allclose(
        effect["mean_increase"], (effect["increase"] * [23, 6]).sum("input") / 29
    )
    np.testing.assert_allclose(effect["mean_loss"], (effect["loss"] * [23, 6]).sum() / 29)


def test_changes_by_layer():
    model = tiny_huggingface("llama")
    effect = sink_effect(model, TEXT, changes={"a": {1: Hide([0])}, "b": Temper(2.0)}, layers=[0])
    assert effect["layer"].values.tolist() == [0, 1]
    assert effect["layer_name"].values[1] == "model.layers.1.self_attn"
    missing = np.isnan(effect["layer_mean_increase"].values)
    assert missing.tolist() == [[True, False], [False, True]]
    np.testing.assert_array_equal(effect["increase"][0], effect["layer_increase"][0, 1])
    plot_sink_effect(effect)


def test_budget_leaves_inputs_out():
    model = tiny_huggingface("llama")
    whole = sink_effect(model, list(TEXT), changes=CHANGES)
    # One pass as it is, and three for each of two changes.
    part = sink_effect(model, list(TEXT), changes=CHANGES, budget=20)
    assert part.sizes["input"] == 2 and part.attrs["left_out"] == 3
    np.testing.assert_allclose(part["increase"], whole["increase"][:, :2])
    with pytest.raises(ValueError, match="budget must be an integer of at least 7, got 6"):
        sink_effect(model, list(TEXT), changes=CHANGES, budget=6)


def test_result_is_saved(tmp_path):
    effect = sink_effect(tiny_lm(), ids(2, 24))
    save_result(effect, tmp_path / "effect.nc")
    assert load_result(tmp_path / "effect.nc").identical(effect)
    with pytest.raises(TypeError, match="finished result"):
        plot_sink_effect(effect, ids(2, 24))


def test_one_input_has_no_interval():
    effect = sink_effect(tiny_lm(), "a text of letters", tokenizer=TextTokenizer())
    assert effect["mean_increase"].notnull().all() and effect["mean_increase_low"].isnull().all()


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "message"),
    [
        (3, TEXT, {}, TypeError, "model must be an nn.Module or a Checkpoint, got int"),
        (nn.Linear(2, 2), TEXT, {}, TypeError, "attention that cannot be captured"),
        ("bert", TEXT, {}, TypeError, "model must be a language model"),
        ("llama", TEXT[:, :1], {}, ValueError, "inputs must hold at least two tokens"),
        ("llama", TEXT.float(), {}, TypeError, "token ids of shape"),
        ("llama", TEXT, {"changes": Hide([0])}, TypeError, "changes must be a mapping of names"),
        ("llama", TEXT, {"changes": {}}, TypeError, "changes must be a mapping of names"),
        ("llama", TEXT, {"changes": {"a": 3}}, TypeError, "changes must be a Change"),
        ("llama", ids(1, 65), {}, ValueError, "at most 64 tokens"),
        ("llama", TEXT + 30, {}, ValueError, "is the tokenizer the model's own"),
        ("llama", TEXT, {"layers": [7]}, ValueError, "layers must be numbers in 0 .. 1"),
        ("llama", TEXT, {"resamples": 0}, ValueError, "resamples must be"),
    ],
)
def test_bad_arguments(model, inputs, options, error, message):
    model = tiny_huggingface(model) if isinstance(model, str) else model
    with pytest.raises(error, match=message):
        sink_effect(model, inputs, **options)


def test_a_model_that_drops_activations_is_refused():
    model = tiny_huggingface("gpt2").train()
    with pytest.raises(ValueError, match="got training mode; call model.eval"):
        sink_effect(model, TEXT)
