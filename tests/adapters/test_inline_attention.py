"""Hugging Face attention that makes its own products: the same bits, certified, ALiBi a prior."""

import pytest
import torch
import transformers

from goatviz.adapters import capture, inline_attention, intervene
from goatviz.adapters.capture import find_attention
from goatviz.adapters.huggingface import unwatchable_huggingface
from goatviz.priors import ALiBiPrior, alibi_slopes
from goatviz.transport import Hide, Temper
from tests.factories import build_huggingface, ids

SIZES = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
ROTARY = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
ROTARY["n_positions"] = 64
FALCON = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "bloom": ("Bloom", SIZES),
    "bloom of six heads": ("Bloom", SIZES | {"hidden_size": 48, "n_head": 6}),
    "codegen": ("CodeGen", ROTARY),
    "falcon": ("Falcon", FALCON),
    "falcon, grouped": ("Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon, alibi": ("Falcon", FALCON | {"alibi": True}),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gptj": ("GPTJ", ROTARY),
    "gpt_neox_japanese": (
        "GPTNeoXJapanese",
        {**FALCON, "intermediate_multiple_size": 2},
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
}
ALIBI = {name for name in MODELS if name.startswith(("bloom", "mpt")) or name.endswith("alibi")}
PADDINGS = {"none": None, "left": [0] * 3 + [1] * 9, "right": [1] * 8 + [0] * 4}
TEXT = ids(2, 12, vocab=50)


def made(name):
    stem, sizes = MODELS[name]
    return build_huggingface(f"{stem}Model", f"{stem}Config", sizes)


def padded(padding):
    if PADDINGS[padding] is None:
        return {}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0] = torch.tensor(PADDINGS[padding])
    return {"attention_mask": mask}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_models_own_and_outputs_keep_every_bit(name, padding):
    model, given = made(name), padded(padding)
    assert unwatchable_huggingface(model, find_attention(model)) == ({}, {})
    options = {"output_attentions": True, "use_cache": False}
    with torch.no_grad():
        plain = model(TEXT, **given)[0]
        with capture(model, keep="projections", certify=12) as record:
            watched = model(TEXT, **given)[0]
        with capture(model, keep="projections", certify=12) as shown:
            attentions = model(TEXT, **given, **options).attentions
    assert torch.equal(plain, watched)
    assert all("forward" not in vars(module) for module in model.modules())
    assert max(record.residuals().values()) < 1e-6 > max(shown.residuals().values())
    real = given.get("attention_mask", torch.ones_like(TEXT)).bool()
    for call, theirs in zip(shown.calls, attentions, strict=True):
        for b in range(2):
            window = shown.plan(layer=call.layer, head=2, batch=b).weights[real[b]]
            torch.testing.assert_close(window, theirs[b, 2][real[b]].double(), atol=1e-6, rtol=0)
    call = record.calls[-1].call
    assert isinstance(call.prior, ALiBiPrior) == (name in ALIBI) and not call.biased
    assert (call.visibility.dense is None) and (
        PADDINGS[padding] is None or torch.equal(call.query_mask, real)
    )


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_are_certified(name):
    model, given = made(name), padded("left")
    with torch.no_grad(), capture(model, certify=4) as record:
        first = {key: value[:, :8] for key, value in given.items()}
        cache = model(TEXT[:, :8], **first, use_cache=True).past_key_values
        for at in (slice(8, 9), slice(9, 12)):
            last = {key: value[:, : at.stop] for key, value in given.items()}
            model(TEXT[:, at], past_key_values=cache, **last)
    assert max(record.residuals().values()) < 1e-6
    places = [call.call.query_pos.flatten().tolist() for call in record.of(1)]
    assert places == [list(range(8)), [8], [9, 10, 11]]
    if name in ALIBI:
        slopes = [call.call.prior.slopes for call in record.of(1)]
        assert all(torch.allclose(one, slopes[0], rtol=1e-5) for one in slopes[1:])


def test_slopes_are_those_of_the_model():
    for name, heads in (("bloom", 4), ("bloom of six heads", 6), ("mpt", 4)):
        model = made(name)
        with capture(model) as record:
            model(TEXT)
        wanted = torch.tensor(alibi_slopes(heads))
        torch.testing.assert_close(record.calls[0].call.prior.slopes, wanted)


def test_falcon_counts_alibi_twice_where_it_returns_weights():
    # Its mask holds ALiBi, and its eager branch adds it once more: transformers, not the reading.
    model = made("falcon, alibi")
    slopes = []
    for options in ({}, {"output_attentions": True}):
        with torch.no_grad(), capture(model, certify=12) as record:
            model(TEXT, **options)
        assert max(record.residuals().values()) < 1e-6
        slopes.append(record.calls[0].call.prior.slopes)
    torch.testing.assert_close(slopes[1], 2 * slopes[0])


def test_a_bias_that_is_not_linear_stays_a_bias():
    # bfloat16 rounds ALiBi beyond 256 tokens.
    model = made("bloom").bfloat16()
    text = ids(1, 300, vocab=50)
    with torch.no_grad(), capture(model, statistics=["entropy"], certify=8) as record:
        model(text)
    assert record.calls[0].call.prior is None and record.calls[0].call.biased
    assert max(record.residuals().values()) < 2e-2


def test_everything_is_restored_after_an_exception(monkeypatch):
    model = made("mpt")
    monkeypatch.setattr(model.blocks[1].ffn, "forward", None)
    with pytest.raises(TypeError):
        with capture(model):
            model(TEXT)
    assert all("forward" not in vars(block.attn) for block in model.blocks)
    with pytest.raises(ValueError, match="has a forward of its own already"):
        with capture(model), capture(model):
            pass
    assert all("forward" not in vars(block.attn) for block in model.blocks)


def test_what_cannot_be_read_is_refused(monkeypatch):
    model = made("gptj").train()
    model.h[0].attn.attn_dropout.p = 0.1
    with pytest.raises(ValueError, match=r"training mode with attention dropout p=0.1"):
        with capture(model):
            model(TEXT)
    model = made("mpt")
    monkeypatch.setattr(inline_attention, "_PRODUCTS", ())
    with pytest.raises(ValueError, match=r"blocks.0.attn cannot be captured: no product"):
        with capture(model):
            model(TEXT)


HYBRID = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "vocab_size": 50,
}


def test_layers_without_a_plan_are_skipped_and_named():
    model = build_huggingface("BambaModel", "BambaConfig", HYBRID)
    with torch.no_grad(), capture(model, certify=12) as record:
        model(TEXT)
    assert record.layers == ("layers.1.self_attn",) and record.skipped == ("layers.0.mamba",)
    assert max(record.residuals().values()) < 1e-6
    assert repr(record) == (
        "Record(1 calls of 1 of 1 layers; skipped 1 without a plan: layers.0.mamba)"
    )


def test_a_model_of_nothing_else_is_refused_by_the_name_of_its_layers():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(TypeError, match=r"\(MambaMixer has no plan whose"):
        with capture(transformers.MambaModel(config)):
            pass


@pytest.mark.parametrize("name", MODELS)
def test_plans_can_be_changed(name):
    model = made(name)
    with torch.no_grad():
        plain = model(TEXT)[0]
        with intervene(model, Temper(1.0)):
            torch.testing.assert_close(model(TEXT)[0], plain, atol=2e-5, rtol=1e-4)
        with intervene(model, Hide([0])):
            changed = model(TEXT)[0]
        assert torch.equal(model(TEXT)[0], plain)
    # The first query has no other key.
    torch.testing.assert_close(changed[:, 0], plain[:, 0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(changed[:, 1:], plain[:, 1:], atol=1e-3)
