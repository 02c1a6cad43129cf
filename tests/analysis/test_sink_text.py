"""A sink profile in words: every number in a sentence is the profile's."""

import numpy as np
import pytest

from goatviz.analysis.sink_text import above_text, at_threshold, margin_texts, sink_sentence
from tests.factories import sink_result

PLACES = [(0, 0), (1, 2), (2, 3)]


def test_the_rate_is_that_of_the_model():
    profile = sink_result()
    row = profile.sel(threshold=0.3)
    low, rate, high = (100 * float(row[f"model_sink_rate{end}"]) for end in ("_low", "", "_high"))
    text = profile.attrs["rate_text"]
    assert text.startswith(f"sink rate {rate:.1f} % [{low:.1f}, {high:.1f}] at ε = 0.3 ")
    assert "11 heads, 5 inputs" in text
    # A selection keeps the rate of all heads, and says so.
    assert at_threshold(profile.sel(layer=1, head=2), 0.3).attrs["rate_text"] == text


def test_a_threshold_off_the_grid_is_counted_without_an_interval():
    profile = sink_result().isel(head=[0, 2])
    values = profile["first_importance"].values
    rate = 100 * np.mean(values[np.isfinite(values)] > 0.3141)
    text = at_threshold(profile, 0.3141).attrs["rate_text"]
    assert text.startswith(f"sink rate {rate:.1f} % at ε = 0.3141 ") and "6 heads" in text


def test_one_input_has_no_interval():
    text = sink_result("one input").attrs["rate_text"]
    assert "[" not in text and "1 input)" in text


@pytest.mark.parametrize(("layer", "head"), PLACES)
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_the_sentence_says_rate_head_margin_and_key(layer, head, threshold):
    profile = at_threshold(sink_result(), threshold)
    part = profile.sel(layer=layer, head=head)
    sentence = sink_sentence(profile, layer, head, 5)
    first = part["first_importance"].values
    side = "above" if first.mean() > threshold else "not above"
    assert sentence.startswith(f"Sink rate {profile.attrs['rate_text'][10:]}. Layer {layer}, ")
    assert f"importance of the first key {first.mean():.4g}, {side} ε = {threshold:g}" in sentence
    assert f"a sink in {np.count_nonzero(first > threshold)} of 5 inputs" in sentence
    assert f"Margin δ = {part['margin'].item():.3g} nats".replace("-", "−") in sentence
    assert f"Key 5: importance {part['importance'].sel(key=5).item():.4g} [" in sentence


def test_without_a_prior_there_is_no_margin():
    profile = sink_result("gpt2")
    assert set(profile["margin_text"].values.ravel()) == {""}
    assert "argin" not in sink_sentence(profile, 0, 0, 0)


def test_notes_and_shortness_follow():
    assert sink_sentence(sink_result("gpt-oss"), 0, 0, 0).count("Note: ") == 1
    assert "the shortest input has 2 tokens" in sink_sentence(sink_result("two keys"), 0, 0, 0)


def test_unknown_importances_are_no_sinks():
    profile = sink_result("no maps")
    # The last keys are seen by too few queries.
    assert "Key 29: no importance" in sink_sentence(profile, 0, 0, 29)
    assert above_text(profile, 29).startswith("0 of 11 heads")
    profile["first_importance"][:, 0, 0] = np.nan
    assert "its first key has no importance in any input" in sink_sentence(profile, 0, 0, 0)


@pytest.mark.parametrize("key", [0, 7])
def test_the_heads_above_the_threshold_are_counted(key):
    profile = at_threshold(sink_result(), 0.12)
    above = int((profile["importance"].sel(key=key) > np.float32(0.12)).sum())
    assert above_text(profile, key) == f"{above} of 11 heads above ε = 0.12"


def test_margins_in_words():
    texts = margin_texts(np.array([-2.5, np.inf, 9.0]), np.array([np.nan, np.inf, 12345.6]))
    assert texts.tolist() == [
        "margin δ = −2.5 nats",
        "margin δ = ∞ nats protects about ∞ tokens (margin law)",
        "margin δ = 9 nats protects about 12,346 tokens (margin law)",
    ]
