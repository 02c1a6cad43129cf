"""Capture: what is seen is what was computed, and nothing stays behind."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from goatviz.adapters.capture import CAPTURE_STATISTICS, capture, find_attention
from goatviz.attention import Attention, RotaryEmbedding, attention_plan
from goatviz.models import POSITION_SCHEMES, CausalLM, ModelConfig, goat_prior
from goatviz.priors import SpectralPrior
from goatviz.transport import ROW_STATISTICS


def model(positions="goat", **options):
    torch.manual_seed(0)
    return CausalLM(
        ModelConfig(
            vocab_size=20,
            training_length=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=64,
            positions=positions,
            **options,
        )
    )


IDS = torch.randint(20, (2, 16), generator=torch.manual_seed(0))


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_plans_are_those_of_the_layer(positions):
    lm = model(positions)
    with torch.no_grad():
        plain = lm(IDS)
        with capture(lm, keep="projections") as record:
            watched = lm(IDS)
    assert torch.equal(plain, watched)
    assert record.layers == ("blocks.0.attention", "blocks.1.attention")
    for layer in range(2):
        one = record.calls[layer].call
        plan = attention_plan(one.q, one.k, prior=lm.blocks[layer].attention.prior)
        window = record.plan(layer=layer, head=3, batch=1, queries=slice(4, 9), keys=slice(0, 5))
        torch.testing.assert_close(window.weights, plan.weights[1, 3, 4:9, :5], atol=1e-6, rtol=0)
        rows = record.calls[layer].rows
        torch.testing.assert_close(rows.entropy, plan.entropy.float(), atol=1e-5, rtol=1e-5)
        mass = record.calls[layer].incoming.mass
        torch.testing.assert_close(mass, plan.weights.sum(-2).float(), atol=1e-5, rtol=1e-5)
    assert all(block.attention.observer is None for block in lm.blocks)


def test_decoding_with_a_cache_is_the_last_row():
    lm = model()
    with torch.no_grad():
        with capture(lm, keep="projections") as whole:
            lm(IDS)
        cache = lm.new_cache()
        with capture(lm, keep="projections") as steps:
            lm(IDS[:, :-1], cache=cache)
            lm(IDS[:, -1:], cache=cache)
    assert [call.shape for call in steps.of(0)] == [(2, 4, 15, 15), (2, 4, 1, 16)]
    torch.testing.assert_close(
        steps.plan(layer=1, head=2).weights,
        whole.plan(layer=1, head=2).weights[-1:],
        atol=1e-5,
        rtol=0,
    )
    first = steps.plan(layer=1, head=2, call=0).weights
    torch.testing.assert_close(
        first, whole.plan(layer=1, head=2).weights[:-1, :-1], atol=1e-5, rtol=0
    )


def test_padding_reaches_the_record():
    lm = model()
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 10:] = False
    with capture(lm) as record:
        lm(IDS, padding_mask=keep)
    call = record.calls[0]
    assert torch.equal(call.call.query_mask, keep)
    assert call.incoming.mass[1, :, 10:].abs().max() == 0
    torch.testing.assert_close(call.incoming.mass[1].sum(-1), torch.full((4,), 10.0))


def test_bidirectional_rotary_layers():
    layer = Attention(
        32,
        2,
        causal=False,
        prior=SpectralPrior(2, rank=2),
        rotary=RotaryEmbedding(12),
        content_dim=12,
    )
    with capture(layer, keep="projections") as record:
        layer(torch.randn(1, 5, 32))
    assert record.layers == ("",) and not record.calls[0].call.causal
    assert bool(record.plan().allowed.all())


def test_statistics_are_chosen_and_projections_dropped():
    lm = model()
    with capture(lm, statistics=["entropy"], layers=["blocks.1.attention"]) as record:
        lm(IDS)
    (call,) = record.calls
    assert list(call.rows.asked()) == ["entropy"]
    assert call.incoming is None and call.value_norm is None and call.call.q is None
    with capture(lm, statistics=["incoming_mass", "value_norm"], layers=0) as record:
        lm(IDS)
    assert record.calls[0].rows is None and record.calls[0].value_norm.shape == (2, 2, 16)
    with capture(lm, keys=[0, 3, 99]) as record:
        lm(IDS)
    assert record.calls[0].rows.keys == (0, 3)
    assert set(record.calls[0].rows.asked()) == set(ROW_STATISTICS)


def test_families_together_are_numbered_in_the_order_of_the_tree():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(16, 2, batch_first=True)
            self.second = transformers.GPT2Model(config)
            self.third = Attention(
                16, 2, prior=goat_prior(2, rank=1, sink_rank=1, training_length=8)
            )

        def forward(self, x):
            x = self.third(x)
            x = self.second(inputs_embeds=x).last_hidden_state
            return self.first(x, x, x)[0]

    mixed = Mixed().eval()
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        plain = mixed(x)
        with capture(mixed) as record:
            watched = mixed(x)
    assert torch.equal(plain, watched)
    assert list(find_attention(mixed)) == ["first", "second.h.0.attn", "third"]
    assert [call.layer for call in record.calls] == [2, 1, 0]


def test_an_empty_record_says_so():
    lm = model()
    with capture(lm) as record:
        pass
    for use in (record.plan, lambda: record.of(0)):
        with pytest.raises(
            ValueError, match="record must hold an attention call.*run the model inside the"
        ):
            use()


def test_bad_places_are_named():
    lm = model()
    with capture(lm) as light:
        lm(IDS)
    with pytest.raises(ValueError, match="projections, got statistics only.*keep='projections'"):
        light.plan()
    with capture(lm, layers=1, keep="projections") as record:
        lm(IDS)
    for place, message in (
        ({"layer": 0}, "layer must be one of 1; got 0"),
        ({"layer": 1, "head": 4}, "head must be an integer in 0 .. 3, got 4"),
        ({"layer": 1, "batch": 2}, "batch must be an integer in 0 .. 1, got 2"),
        ({"layer": 1, "call": 1}, "call must be an integer in -1 .. 0, got 1"),
        ({"layer": 1, "queries": slice(20, 30)}, "non-empty window"),
    ):
        with pytest.raises(ValueError, match=message):
            record.plan(**place)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": "all"}, ValueError, "keep must be one of statistics, projections; got 'all'"),
        ({"layers": 2}, ValueError, r"layers must be numbers in 0 .. 1 or paths.*got 2"),
        ({"layers": "head"}, ValueError, "got 'head'"),
        ({"layers": []}, ValueError, "layers must name at least one layer"),
        ({"statistics": "entropy"}, TypeError, "statistics must be a list of names"),
        ({"statistics": 3}, TypeError, "statistics must be a list of names, got 3"),
        ({"layers": 1.5}, TypeError, "layers must be numbers or paths, got 1.5"),
        ({"layers": True}, ValueError, "layers must be numbers .*got True"),
        ({"layers": -1}, ValueError, "layers must be numbers .*got -1"),
        ({"keys": 0}, TypeError, "keys must be a list of integers, got 0"),
        ({"keys": [0, -1]}, ValueError, "keys must be an integer of at least 0, got -1"),
        ({"recent": 0}, ValueError, "recent must be an integer of at least 1, got 0"),
        ({"impl": "fast"}, ValueError, "impl must be one of .*got 'fast'"),
        ({"statistics": ["rank"]}, ValueError, f"statistics must be among {CAPTURE_STATISTICS[0]}"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        with capture(model(), **options):
            pass


def test_models_without_attention_are_told_what_can():
    with pytest.raises(TypeError, match="Linear has attention that cannot.*MultiheadAttention"):
        with capture(nn.Linear(2, 2)):
            pass
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        with capture("gpt2"):
            pass
    with pytest.raises(ValueError, match="meta device"):
        with capture(model().to("meta")):
            pass


def test_a_forward_that_raises_leaves_the_model_as_it_was():
    lm = model()
    with pytest.raises(ValueError, match="ids must lie"):
        with capture(lm):
            lm(IDS + 100)
    assert all(block.attention.observer is None for block in lm.blocks)
    with torch.no_grad():
        lm.blocks[1].attention.k_proj.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"layer blocks\.1\.attention: k must be finite, got \d+ NaN"
    ):
        with capture(lm):
            lm(IDS)
    assert all(block.attention.observer is None for block in lm.blocks)


def test_float16_that_overflows_is_an_error():
    layer = Attention(8, 1).half()
    with torch.no_grad():
        layer.q_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"q must be finite.*float16 overflows above 65,504"):
        with capture(layer):
            layer(torch.ones(1, 3, 8, dtype=torch.float16))


def test_two_captures_at_once_are_refused():
    lm = model()
    with capture(lm):
        with pytest.raises(ValueError, match="captured already"):
            with capture(lm):
                pass
    assert all(block.attention.observer is None for block in lm.blocks)


def test_records_say_what_they_hold():
    lm = model()
    with capture(lm, layers=1) as record:
        lm(IDS)
    assert repr(record) == "Record(1 calls of 1 of 2 layers)"
    wanted = (
        "CapturedCall(layer 1 (blocks.1.attention): batch 2, 4 heads, 16 queries, 16 keys, "
        "causal, no rotation)"
    )
    assert repr(record.calls[0]) == wanted


def test_what_can_be_watched_beside_what_cannot_must_be_named():
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    mixed = nn.ModuleList([transformers.MegatronBertModel(config), Attention(16, 2)])
    with pytest.raises(
        TypeError, match="MegatronBertSelfAttention cannot.*name layers= to capture the others"
    ):
        with capture(mixed):
            pass
    with capture(mixed, layers="1") as record:
        mixed[1](torch.randn(1, 4, 16))
    assert len(record) == 1


def test_generation_is_seen_step_by_step():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    lm = transformers.GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = lm.generate(IDS[:1, :6], **options)
    with capture(lm) as record:
        watched = lm.generate(IDS[:1, :6], **options)
    assert torch.equal(plain, watched)
    assert [call.shape[2:] for call in record.of(1)][:3] == [(6, 6), (1, 7), (1, 8)]


def test_half_precision_models_are_measured_in_float32():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    lm = transformers.LlamaForCausalLM(config).eval().bfloat16()
    with capture(lm, keep="projections") as record:
        lm(IDS)
    call = record.calls[0]
    assert call.call.q.dtype == torch.bfloat16 and call.rows.entropy.dtype == torch.float32
    plan = attention_plan(call.call.q, call.call.k)
    torch.testing.assert_close(call.rows.entropy, plan.entropy.float(), atol=1e-5, rtol=1e-5)


def test_nothing_is_retained_but_what_was_asked_for():
    layer = Attention(32, 2)
    with capture(layer) as light, torch.no_grad():
        layer(torch.randn(1, 64, 32))
    call = light.calls[0]
    assert call.call.q is None
    held = [call.value_norm, *call.rows.asked().values(), call.incoming.mass, call.rows.visible]
    # Nothing of length x head size, let alone of length x length.
    assert all(tensor.numel() <= 2 * 64 for tensor in held)
    assert call.call.visibility.dense is None and call.rows.asked().keys() == set(ROW_STATISTICS)
    with capture(layer, keep="projections") as full:
        layer(torch.randn(1, 64, 32))
    kept = full.calls[0].call
    assert not (kept.q.requires_grad or kept.k.requires_grad or kept.v.requires_grad)


@pytest.mark.parametrize("positions", ["goat", "alibi", "bucket", "rope"])
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_the_dense_plan(positions, padded):
    lm = model(positions)
    keep = torch.ones(2, 16, dtype=torch.bool)
    if padded:
        keep[0, 2:5] = False
        keep[1, 11:] = False
    with torch.no_grad(), capture(lm, keep="projections", keys=[0, 5], recent=4) as record:
        lm(IDS, padding_mask=keep)
    call = record.of(1)[0]
    lag = torch.arange(16)[:, None] - torch.arange(16)
    mass = torch.zeros(16, dtype=torch.float64)
    for i in keep[0].nonzero().flatten().tolist():
        p = record.plan(layer=1, head=3, queries=slice(i, i + 1)).weights[0]
        mean = float((p * lag[i]).sum())
        wanted = {
            "entropy": -float(torch.special.xlogy(p, p).sum()),
            "largest_weight": float(p.max()),
            "recent_mass": float(p[lag[i].abs() < 4].sum()),
            "lag_mean": mean,
            "lag_std": float((p * (lag[i] - mean) ** 2).sum().sqrt()),
            "sink_mass": 0.0,
        }
        for name, value in wanted.items():
            found = float(call.rows.asked()[name][0, 3, i])
            assert found == pytest.approx(value, abs=2e-5), name
        assert call.rows.key_mass[0, 3, i].tolist() == pytest.approx(p[[0, 5]].tolist(), abs=1e-6)
        mass += p
    torch.testing.assert_close(call.incoming.mass[0, 3], mass.float(), atol=1e-5, rtol=1e-5)


def test_statistics_under_autocast_are_not_of_its_precision():
    lm = model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = lm(IDS)
        with capture(lm, keep="projections") as record:
            watched = lm(IDS)
    assert torch.equal(plain, watched)
    call = record.calls[0]
    assert call.call.q.dtype == torch.bfloat16
    plan = attention_plan(call.call.q, call.call.k, prior=call.call.prior)
    torch.testing.assert_close(call.rows.entropy, plan.entropy.float(), atol=1e-5, rtol=1e-5)
    wanted = plan.weights.sum(-2).float()
    torch.testing.assert_close(call.incoming.mass, wanted, atol=1e-5, rtol=1e-5)


def test_inference_mode():
    lm = model()
    with torch.inference_mode():
        plain = lm(IDS)
        with capture(lm, keep="projections") as record:
            watched = lm(IDS)
    assert torch.equal(plain, watched)
    assert record.plan(layer=1).weights.sum(-1).tolist() == pytest.approx([1.0] * 16)


def test_gradients_pass_as_before():
    lm = model()
    gradients = []
    for watch in (nullcontext(), capture(lm)):
        lm.zero_grad()
        with watch:
            lm(IDS).square().mean().backward()
        gradients.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_layer_alone_has_no_name_in_errors():
    layer = Attention(8, 1)
    with pytest.raises(ValueError, match="^model: q must be finite"):
        with capture(layer):
            layer(torch.full((1, 3, 8), torch.nan))
    assert layer.observer is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_a_backward_pass_is_no_call(reentrant):
    layers = nn.ModuleList([Attention(16, 2), nn.MultiheadAttention(16, 2, batch_first=True)])
    x = torch.randn(1, 5, 16, requires_grad=True)
    with capture(layers) as record:
        y = checkpoint(layers[0], x, use_reentrant=reentrant)
        y, _ = checkpoint(layers[1], y, y, y, use_reentrant=reentrant)
        y.square().sum().backward()
        layers[0](x)
    assert [call.layer for call in record.calls] == [0, 1, 0]


@pytest.mark.parametrize("training", [False, True])
def test_calls_of_several_threads_are_all_counted(training):
    torch.manual_seed(0)
    options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **options), 2).train(training)
    x = torch.randn(1, 8, 16)

    def run(_):
        with torch.no_grad():
            for _ in range(30):
                encoder(x)

    interval = sys.getswitchinterval()
    with capture(encoder, statistics=["entropy"]) as record, ThreadPoolExecutor(4) as pool:
        sys.setswitchinterval(1e-5)
        try:
            list(pool.map(run, range(4)))
        finally:
            sys.setswitchinterval(interval)
    assert [len(record.of(layer)) for layer in range(2)] == [120, 120]
