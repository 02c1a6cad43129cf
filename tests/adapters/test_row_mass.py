"""Mass that rows lose to a column without a key: one record, whatever the model's convention."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.granite_swa import modeling_granite_swa
from transformers.models.granitemoe_swa import modeling_granitemoe_swa

from goatviz.adapters import capture, huggingface, intervene, kernel_call
from goatviz.analysis import PlanLevels, sink_profile
from goatviz.plots import draw_sinks
from goatviz.transport import AttentionCall, Hide
from goatviz.transport.statistics import ROW_STATISTICS, statistics_of
from tests.factories import build_huggingface, ids, lively

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
#: The second layer chooses blocks of 4 keys.
INDEXED = SIZES | {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "dense"],
    "dense_intermediate_size": 32,
    "rotary_dim": 8,
    "index_block_size": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk_blocks": 2,
}
CONVENTIONS = {
    "gpt_oss": ("GptOssModel", "GptOssConfig", SIZES | EXPERTS, modeling_gpt_oss),
    "granite_swa": ("GraniteSWAModel", "GraniteSWAConfig", SIZES, modeling_granite_swa),
    "granitemoe_swa": (
        "GraniteMoeSWAModel",
        "GraniteMoeSWAConfig",
        SIZES | EXPERTS,
        modeling_granitemoe_swa,
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_models_of_both_conventions_are_certified(name):
    model = build_huggingface(*CONVENTIONS[name][:3])
    for module in huggingface.find_huggingface_attention(model).values():
        lively(module, 0.7)
    model.set_attn_implementation("eager")
    given = {"input_ids": ids(2, 12, vocab=50), "attention_mask": torch.ones(2, 12).long()}
    given["attention_mask"][1, 9:] = 0
    with torch.no_grad(), capture(model, certify=12) as record:
        model(**given)
    assert max(record.residuals().values()) < 2e-6
    for call in record.calls:
        lost = call.rows.sink_mass[0]
        assert float(lost.min()) > 1e-4 and float(lost.max()) < 1
        received = call.incoming.mass[0].sum(-1)
        torch.testing.assert_close(received, (1 - lost).sum(-1), atol=1e-4, rtol=1e-5)


def test_both_conventions_on_the_same_call_are_one_record():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    sink, mask = torch.randn(4), torch.full((7, 7), -torch.inf).triu(1)[None, None]
    statistics, totals = [], []
    for model, config, sizes, scope in CONVENTIONS.values():
        module = next(
            iter(
                huggingface.find_huggingface_attention(
                    build_huggingface(model, config, sizes)
                ).values()
            )
        )
        module.sinks = nn.Parameter(sink)
        options = {"scaling": 0.4, "s_aux": module.sinks}
        given = kernel_call.KernelCall("attn", module, q, k, mask, "eager", options)
        read = given.options_of_call(kernel_call.Masks())
        call = AttentionCall.from_tensors(q, k, v=v, **read)
        with torch.no_grad():
            out, weights = scope.eager_attention_forward(module, q, k, v, mask, **options)
        assert call.residual(out.transpose(1, 2)) < 1e-6
        statistics.append(statistics_of(call, impl="reference").asked())
        totals.append(float(weights.sum(-1).max()))
    assert totals[0] < 1 == pytest.approx(totals[1]) == pytest.approx(totals[2])
    assert set(statistics[0]) == set(ROW_STATISTICS)
    for name, value in statistics[0].items():
        same = [torch.allclose(value, one[name], 0, 0, equal_nan=True) for one in statistics[1:]]
        assert all(same), name


def test_a_column_of_each_query_is_that_of_its_head_where_they_are_equal():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    sink = torch.randn(2, 4, 6)
    each = AttentionCall.from_tensors(q, k, v=v, sink=sink)
    assert each.sink.dtype == torch.float64 and each.sink.shape == (2, 4, 6)
    for b, h, i in ((0, 1, 5), (1, 3, 2)):
        head = AttentionCall.from_tensors(q, k, v=v, sink=sink[b, :, i])
        plans = [call.plan(b, h, slice(i, i + 1)) for call in (each, head)]
        plans.append(each.of_head(b, h).plan(0, 0, slice(i, i + 1)))
        assert all(torch.equal(plans[0].weights, plan.weights) for plan in plans[1:])
        assert all(torch.equal(plans[0].sink_weight, plan.sink_weight) for plan in plans[1:])
    shared = AttentionCall.from_tensors(q, k, sink=sink[:1])
    assert torch.equal(shared.sink_logits(0), shared.sink_logits(1))
    with pytest.raises(ValueError, match="call must have a sink, got none"):
        AttentionCall.from_tensors(q, k).sink_logits(0)


@pytest.mark.parametrize(
    "sink", [torch.zeros(2, 3), torch.zeros(3, 4, 6), torch.full((1, 4, 6), torch.nan)]
)
def test_sinks_of_other_shapes_are_refused(sink):
    q = torch.zeros(2, 4, 6, 8)
    with pytest.raises(ValueError, match=r"sink must hold finite logits of shape \(4,\) .* or \("):
        AttentionCall.from_tensors(q, q, sink=sink)


INKLING = {
    "vocab_size": 50,
    "unpadded_vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 5,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}


def test_sinks_of_each_query_are_those_of_the_model():
    model = build_huggingface("Inkling2TextModel", "Inkling2TextConfig", INKLING)
    model.set_attn_implementation("eager")
    given = {"input_ids": ids(2, 16, vocab=50), "use_cache": False}
    with torch.no_grad():
        plain = model(**given, output_attentions=True)
        with capture(model, keep="projections", certify=16) as record:
            watched = model(**given)
    assert torch.equal(plain.last_hidden_state, watched.last_hidden_state)
    assert max(record.residuals().values()) < 2e-6
    for call, weights in zip(record.calls, plain.attentions, strict=True):
        assert call.call.sink.shape == (2, 4, 16)
        lost = 1 - weights.sum(-1)
        torch.testing.assert_close(call.rows.sink_mass, lost, atol=2e-6, rtol=0)
        assert float(lost.std(-1).min()) > 0
        window = record.plan(layer=call.layer, head=2, batch=1)
        torch.testing.assert_close(window.weights, weights[1, 2].double(), atol=2e-6, rtol=0)
        view = PlanLevels(call, head=2, batch=1).view((0, 16), (0, 16))
        np.testing.assert_allclose(np.nan_to_num(view.weights), weights[1, 2], atol=2e-6)
    profile = sink_profile(model, given, maps=6, resamples=20)
    mapped = np.nan_to_num(profile["map_probability"].values[0, 2])
    np.testing.assert_allclose(mapped, plain.attentions[0][:, 2, :6, :6].mean(0), atol=2e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keys_chosen_by_an_indexer_are_those_of_the_mask(implementation):
    model = build_huggingface("MiniMaxM3VLTextModel", "MiniMaxM3VLTextConfig", INDEXED)
    model.set_attn_implementation(implementation)
    given = {"input_ids": ids(2, 24, vocab=50), "use_cache": False}
    with torch.no_grad(), capture(model, keep="projections", certify=24) as record:
        model(**given)
    assert max(record.residuals().values()) < 2e-6
    assert int(record.calls[-1].rows.visible.max()) < 24
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :3] = mask[1, 20:] = 0
    with torch.no_grad(), capture(model, certify=24) as record:
        model(**given, attention_mask=mask)
    assert max(record.residuals().values()) < 2e-6
    for call in record.calls:
        assert torch.equal(call.call.query_mask, mask.bool())


@pytest.mark.parametrize("bias", [False, True])
def test_a_key_of_zeros_is_a_column_of_logit_zero(bias):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(
        16, 4, add_zero_attn=True, add_bias_kv=bias, batch_first=True
    ).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad(), capture(module, keep="projections") as record:
        _, weights = module(x, x, x, average_attn_weights=False)
    (call,) = record.calls
    assert call.shape == (2, 4, 6, 7 if bias else 6) and call.call.sink.tolist() == [0.0] * 4
    torch.testing.assert_close(call.rows.sink_mass, weights[..., -1], atol=1e-6, rtol=0)
    window = record.plan(head=1, batch=1)
    torch.testing.assert_close(window.weights, weights[1, 1, :, :-1].double(), atol=1e-6, rtol=0)
    received = call.incoming.mass.sum(-1)
    torch.testing.assert_close(received, (1 - call.rows.sink_mass).sum(-1), atol=1e-5, rtol=0)


_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "mlp_layer_types": ["dense", "dense"],
}
_TWO = {"layer_types": ["full_attention", "sliding_attention"]}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Models whose heads are gated: output times sigmoid(g_proj(hidden states)).
GATED = {
    "step3p7": (
        "Step3p7TextModel",
        "Step3p7TextConfig",
        SIZES | _TWO | _EXPERTS | {"query_pre_attn_scalar": 8, "share_expert_dim": 16},
    ),
    "lfm3": ("Lfm3Model", "Lfm3Config", SIZES | _TWO),
    "bailing_hybrid": (
        "BailingHybridModel",
        "BailingHybridConfig",
        SIZES
        | _LATENT
        | {"layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16}
        | {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts": 8, "num_expert_group": 1},
    ),
    "dots3_note": (
        "Dots3NoteTextModel",
        "Dots3NoteTextConfig",
        SIZES
        | _LATENT
        | _EXPERTS
        | {"layer_types": ["indexed_attention", "sliding_attention"], "q_lora_rank": 8}
        | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
        | {"shared_experts_intermediate_size": 16},
    ),
}


def gated_outputs(model):
    """What goes into the output projections while the model runs: a list that fills."""
    inputs = []
    for layer in huggingface.find_huggingface_attention(model).values():
        layer.o_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    return inputs


@pytest.mark.parametrize("name", GATED)
def test_the_gate_of_a_head_is_the_mass_of_its_rows(name):
    model = build_huggingface(*GATED[name][:2], GATED[name][2] | _TOKENS)
    model.set_attn_implementation("eager")
    given = {"input_ids": ids(2, 12, vocab=50), "use_cache": False}
    with torch.no_grad():
        plain = model(**given)[0]
        outputs = gated_outputs(model)
        with capture(model, keep="projections", certify=12) as record:
            assert torch.equal(model(**given)[0], plain)
    assert max(record.residuals().values()) < 1e-6
    for captured, output in zip(record.calls, outputs, strict=True):
        call = captured.call
        assert "gated heads" in captured.kind
        mass = captured.gate.sigmoid()
        assert float(mass.std(-1).min()) > 1e-3
        torch.testing.assert_close(1 - captured.rows.sink_mass, mass, atol=2e-6, rtol=0)
        torch.testing.assert_close(captured.incoming.mass.sum(-1), mass.sum(-1))
        output = output.unflatten(-1, (call.shape[1], -1)).transpose(1, 2).double()
        for batch in range(2):
            for head in range(call.shape[1]):
                values = call.v[batch, head // (call.shape[1] // call.kv_heads)].double()
                mixed = call.plan(batch, head).weights @ values
                torch.testing.assert_close(mixed, output[batch, head], atol=2e-6, rtol=1e-5)


def test_figures_of_gated_heads_say_what_the_gate_takes():
    model = build_huggingface(*GATED["step3p7"])
    given = ids(2, 40, vocab=50)
    with torch.no_grad(), capture(model) as record:
        model(given, use_cache=False)
    kept = float(torch.stack([call.gate.sigmoid().mean() for call in record.calls]).mean())
    figure = draw_sinks(sink_profile(model, given, resamples=20), kind="overview")
    assert f"a gate takes {1 - kept:.3f} on average" in figure.layout.annotations[-1].text.replace(
        "<br>", " "
    )


def test_a_key_that_an_indexer_never_chooses_is_no_padding():
    model = build_huggingface(*GATED["dots3_note"][:2], GATED["dots3_note"][2] | _TOKENS)
    with torch.no_grad(), capture(model, layers=0) as record:
        model(ids(2, 12, vocab=50), use_cache=False)
    (captured,) = record.calls
    assert bool((captured.call.visibility.observers() == 0).any())
    assert bool(captured.call.query_mask.all())


def test_a_changed_plan_keeps_the_gate():
    model = build_huggingface(*GATED["step3p7"])
    with torch.no_grad(), capture(model, layers=0, keep="projections") as record:
        model(ids(1, 12, vocab=50), use_cache=False)
    outputs = gated_outputs(model)
    with torch.no_grad(), intervene(model, Hide([0])):
        model(ids(1, 12, vocab=50), use_cache=False)
    (captured,) = record.calls
    plan = record.plan(head=1).weights[1:, 1:]
    plan = captured.gate.sigmoid()[0, 1, 1:, None] * plan / plan.sum(-1, keepdim=True)
    changed = outputs[0].unflatten(-1, (4, 8))[0, 1:, 1]
    torch.testing.assert_close(changed, (plan @ captured.call.v[0, 0, 1:].double()).float())


def test_a_gate_of_each_channel_is_no_part_of_the_plan():
    model = build_huggingface("AfmoeModel", "AfmoeConfig", SIZES | _FEW)
    with torch.no_grad(), capture(model) as record:
        model(ids(1, 12, vocab=50), use_cache=False)
    assert all(call.gate is None and call.call.sink is None for call in record.calls)
    assert float(record.calls[0].rows.sink_mass.max()) == 0
