"""Rotary frequencies against what the model does: each channel of a constant text is a sinusoid."""

import pytest
import torch

from goatviz.adapters import capture
from tests.factories import build_huggingface, ids, tiny_huggingface, tiny_lm

_BASE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MIXED = {**_BASE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_LATENT = {
    **_BASE,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "first_k_dense_replace": 2,
}
#: Halves, neighbours, some channels only, those behind others, and layers that do not turn: model
#: class, configuration, and how many channels of each layer stand still.
LAYOUTS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _BASE, [0, 0]),
    "cohere": ("CohereForCausalLM", "CohereConfig", _BASE, [0, 0]),
    "glm": ("GlmForCausalLM", "GlmConfig", _BASE, [8, 8]),
    "phi": ("PhiForCausalLM", "PhiConfig", _BASE, [8, 8]),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT, [8, 8]),
    "halves": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LATENT, "rope_interleave": False},
        [8, 8],
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {**_BASE, "no_rope_layers": [1, 0]},
        [0, 16],
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", _MIXED, [0, 16]),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", _MIXED, [0, 16]),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _MIXED, [0, 0]),
    "million": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        [0, 0],
    ),
}


def captured(model, text=None, **options):
    text = torch.full((1, 24), 7) if text is None else text
    with capture(model, statistics=[], keep="projections") as record, torch.no_grad():
        model(text, **options)
    return [call.call for call in record.calls]


@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_turn_as_fast_as_said(name):
    *model, still = LAYOUTS[name]
    # Equal tokens without positions are equal in every layer, but for rotations.
    for call, count in zip(captured(build_huggingface(*model)), still, strict=True):
        speeds = call.rotary
        assert speeds.shape == (call.q.shape[-1],) and int((speeds == 0).sum()) == count
        for x in (call.q[0].double(), call.k[0].double()):
            # x_{i+1} + x_{i-1} = 2 cos(w) x_i holds for a sinusoid of frequency w, and no other.
            left, right = x[:, 2:] + x[:, :-2], 2 * speeds.cos() * x[:, 1:-1]
            size = float(x.abs().max())
            torch.testing.assert_close(left, right, atol=1e-5 * size, rtol=1e-5)


def test_our_layers():
    call = captured(tiny_lm("rope"), ids(1, 24))[0]
    half = call.q.shape[-1] // 2
    expected = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    torch.testing.assert_close(call.rotary, torch.cat([expected, expected]), rtol=1e-6, atol=0)
    assert not captured(tiny_lm("goat"), ids(1, 24))[0].rotary.any()


def test_padding_on_the_left():
    model = tiny_huggingface("llama")
    plain = captured(model)[0].rotary
    mask = torch.arange(24)[None] >= 4
    position = (torch.arange(24)[None] - 4).clamp(min=1)
    padded = captured(model, attention_mask=mask.long(), position_ids=position)[0].rotary
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-6)


def test_slow_channels_are_exact():
    call = captured(build_huggingface(*LAYOUTS["million"][:3]))[0]
    expected = 1e6 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(call.rotary[:8], expected, rtol=1e-6, atol=0)


def test_frequencies_that_change_with_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    options = {**_BASE, "max_position_embeddings": 16, "rope_parameters": rope}
    model = build_huggingface("LlamaForCausalLM", "LlamaConfig", options)
    with capture(model, statistics=[], keep="projections") as record, torch.no_grad():
        for length in (12, 48):
            model(torch.full((1, length), 7))
    short, long = (call.call for call in record.of(0))
    assert not torch.allclose(short.rotary, long.rotary)
    for call in (short, long):
        x = call.q[0].double()
        left, right = x[:, 2:] + x[:, :-2], 2 * call.rotary.cos() * x[:, 1:-1]
        torch.testing.assert_close(left, right, atol=1e-5 * float(x.abs().max()), rtol=1e-5)


def test_what_is_not_known():
    assert captured(tiny_huggingface("gpt2"))[0].rotary is None


def test_layers_are_labelled():
    cohere = build_huggingface(*LAYOUTS["cohere2"][:3])
    with capture(cohere, statistics=[]) as record, torch.no_grad():
        cohere(torch.full((1, 24), 7))
    assert [call.kind for call in record.calls] == [
        "window of 8 tokens, rotary",
        "causal, no rotation",
    ]
    assert "window of 8 tokens, rotary" in repr(record.calls[0])
    llama, mask = tiny_huggingface("llama"), torch.ones(1, 12, dtype=torch.long)
    mask[:, 9:] = 0
    with capture(llama, statistics=[]) as record, torch.no_grad():
        llama(ids(1, 12, vocab=50), attention_mask=mask)
    assert record.calls[0].kind == "causal, rotary"
    bert = tiny_huggingface("bert")
    with capture(bert, statistics=[]) as record, torch.no_grad():
        bert(ids(1, 12, vocab=50))
    assert record.calls[0].kind == "bidirectional"
