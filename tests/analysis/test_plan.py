"""plan_slice against the dense plan, from plans, models and goat-attention modules."""

import numpy as np
import pytest
import torch
from goat import GoatAttention
from torch import nn

from goatviz.adapters import capture
from goatviz.analysis import plan_slice
from goatviz.analysis.levels import PlanLevels
from goatviz.attention import attention_plan
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots import draw_plan
from goatviz.transport import TransportPlan, solve_rows
from tests.factories import ids, tiny_huggingface


def random_plan(*batch, n=12, m=15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*batch, n, m, generator=generator, dtype=torch.float64)
    log_prior = torch.randn(m, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, m, generator=generator) < 0.8
    mask[:, 0] = True
    return solve_rows(
        scores, log_prior=log_prior.expand_as(scores), mask=mask.expand_as(scores), temperature=0.7
    )


def test_fields_are_those_of_the_plan():
    plan = random_plan()
    result = plan_slice(plan)
    allowed = plan.allowed.numpy()
    for name, wanted in (
        ("weights", plan.weights),
        ("prior", plan.log_prior.exp()),
        ("scores", plan.scores),
        ("potential", plan.potential),
        ("transport_cost", plan.transport_cost),
        ("entropy", plan.entropy),
        ("kl_to_prior", plan.kl_to_prior),
        ("kkt_residual", plan.kkt_residual),
        ("duality_gap", plan.duality_gap),
        ("content_range", plan.content_range),
        ("margin", plan.margin),
        ("incoming_mass", plan.incoming_mass),
    ):
        np.testing.assert_array_equal(result[name].values, wanted.numpy(), err_msg=name)
    np.testing.assert_array_equal(np.isnan(result["logits"].values), ~allowed)
    logits = np.where(allowed, result["logits"].values, -np.inf)
    softmax = torch.as_tensor(logits).softmax(-1).numpy()
    np.testing.assert_allclose(result["weights"].values, softmax, atol=1e-14)
    assert result.attrs["verdict"] == "agrees" and "POT" in result.attrs["check"]
    assert result.attrs["largest_difference"] < 1e-10


def test_a_window_is_a_selection():
    plan = random_plan()
    whole = plan_slice(plan, check=False)
    part = plan_slice(plan, queries=slice(3, 6), keys=slice(-4, None), check=False)
    for name in part.data_vars:
        dims = whole[name].dims
        place = {"query": slice(3, 6), "key": slice(11, 15)}
        wanted = whole[name].isel({dim: place[dim] for dim in dims})
        np.testing.assert_array_equal(part[name], wanted, err_msg=name)
    assert part.attrs["verdict"] == "not checked"


def test_batches_are_indexed_by_sequence_and_head():
    plan = random_plan(2, 3)
    result = plan_slice(plan, batch=1, head=2, check=False)
    np.testing.assert_array_equal(result["weights"], plan.weights[1, 2].numpy())
    one = random_plan(3)
    result = plan_slice(one, head=1, check=False)
    np.testing.assert_array_equal(result["weights"], one.weights[1].numpy())
    with pytest.raises(ValueError, match="batch must be an integer in 0 .. 0, got 1"):
        plan_slice(one, batch=1)
    for name in ("batch", "head"):
        with pytest.raises(ValueError, match=f"{name} must be an integer in 0 .. 0, got 1"):
            plan_slice(random_plan(), **{name: 1})


def test_a_wrong_plan_is_told():
    plan = random_plan()
    uniform = plan.allowed.double() / plan.allowed.sum(-1, keepdim=True)
    wrong = TransportPlan.from_weights(
        0.9 * plan.weights + 0.1 * uniform,
        plan.scores,
        log_prior=plan.log_prior,
        temperature=0.7,
        mask=plan.allowed,
    )
    assert plan_slice(wrong).attrs["verdict"] == "disagrees"


@pytest.mark.parametrize("positions", ["goat", "rope", "bucket", "none"])
def test_a_models_plan_makes_its_output(positions):
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=9,
            training_length=32,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=64,
            num_layers=2,
            positions=positions,
        )
    ).eval()
    ids = torch.randint(9, (2, 20))
    layer = model.blocks[1].attention
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        handle.remove()
        q, k, v, points = layer.project(seen[0])
        plan = attention_plan(q, k, prior=layer.prior)
    result = plan_slice(model, ids, layer=1, head=3, batch=1)
    np.testing.assert_allclose(result["weights"], plan.weights[1, 3].numpy(), atol=1e-12)
    made = result["weights"].values @ v[1, 1].double().numpy()
    head_dim = layer.head_dim
    carried = seen[1][1, :, 3 * head_dim : 4 * head_dim].numpy()
    np.testing.assert_allclose(made, carried, atol=2e-5)
    assert result.attrs["verdict"] == "agrees"
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("causal", [True, False])
def test_goat_attention_modules_are_read(causal):
    torch.manual_seed(0)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = GoatAttention(32, 2, batch_first=True, pos_rank=2, training_seq_len=16)

        def forward(self, x):
            return self.inner(x, x, x, is_causal=causal, average_attn_weights=False)

    model = Wrapped().eval()
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        theirs = model(x)[1]
    result = plan_slice(model, x, head=1, batch=1)
    np.testing.assert_allclose(result["weights"], theirs[1, 1].numpy(), atol=1e-5)


def test_tokens_travel_along():
    tokens = ["the", "the", "<s>", "</script>", "日本"]
    plan = solve_rows(torch.zeros(5, 5))
    result = plan_slice(plan, tokens=tokens, keys=slice(1, 4), check=False)
    assert result["key_token"].values.tolist() == tokens[1:4]
    assert result["query_token"].values.tolist() == tokens
    with pytest.raises(ValueError, match="tokens must hold 5 texts.*got 2"):
        plan_slice(plan, tokens=["a", "b"])


@pytest.mark.parametrize("mask", ["key_padding_mask", "attn_mask"])
def test_masks_of_a_module_are_seen_whatever_their_name(mask):
    torch.manual_seed(0)
    module = GoatAttention(32, 2, batch_first=True, pos_rank=2, training_seq_len=16).eval()
    x = torch.randn(2, 10, 32)
    hidden = torch.zeros(2, 10, dtype=torch.bool)
    hidden[:, 7:] = True
    pairs = torch.ones(10, 10, dtype=torch.bool).triu(1)
    masks = {"key_padding_mask": hidden} if mask == "key_padding_mask" else {"attn_mask": pairs}
    call = {"query": x, "key": x, "value": x, **masks}
    with torch.no_grad():
        theirs = module(**call, average_attn_weights=False)[1]
    weights = plan_slice(module, call, head=1, batch=1)["weights"].values
    np.testing.assert_allclose(weights, theirs[1, 1].numpy(), atol=1e-5)
    forbidden = hidden[1].expand(10, 10) if mask == "key_padding_mask" else pairs
    assert weights[forbidden.numpy()].max() == 0.0


def test_every_source_of_one_plan_says_the_same():
    model, tokens = tiny_huggingface("gpt2", attn_implementation="eager"), ids(2, 24)
    with torch.no_grad():
        eager = model(tokens, output_attentions=True).attentions[1]
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(tokens)
    at = {"head": 1, "batch": 1}
    whole = plan_slice(model, tokens, layer=1, **at)
    np.testing.assert_allclose(whole["weights"], eager[1, 1].numpy(), atol=1e-6)
    np.testing.assert_allclose(
        whole["incoming_mass"], whole["weights"].sum("query") / 24, rtol=1e-5
    )
    assert whole.attrs["verdict"] == "agrees"
    one_by_one = plan_slice(model, [tokens[:1], tokens[1:]], layer=1, **at)
    np.testing.assert_allclose(one_by_one["weights"], whole["weights"], atol=1e-6)
    for other in (
        plan_slice(record, layer=1, **at),
        plan_slice(record.of(1)[0], **at),
    ):
        for name in whole.data_vars:
            np.testing.assert_array_equal(other[name], whole[name], err_msg=name)
    for weights in (eager, eager.numpy(), eager[1], eager[1, 1].double().numpy()):
        alone = plan_slice(weights, head=1 if weights.ndim > 2 else 0, batch=int(weights.ndim == 4))
        np.testing.assert_allclose(alone["weights"], whole["weights"], atol=1e-6)
        np.testing.assert_allclose(alone["entropy"], whole["entropy"], atol=1e-5)
        np.testing.assert_allclose(alone["incoming_mass"], whole["incoming_mass"], atol=1e-6)
        np.testing.assert_array_equal(alone["allowed"], whole["allowed"])
        assert np.isnan(alone["scores"]).all() and np.isnan(alone["kl_to_prior"]).all()
        assert alone.attrs["scores_known"] == 0 and alone.attrs["verdict"] == "not checked"


def test_a_padded_batch_is_read_without_its_padding():
    model, tokens = tiny_huggingface("gpt2"), ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 14:] = 0
    padded = plan_slice(model, {"input_ids": tokens, "attention_mask": mask}, layer=1, batch=1)
    alone = plan_slice(model, tokens[1:, :14], layer=1)
    np.testing.assert_allclose(padded["weights"], alone["weights"], atol=1e-6)


def test_texts_are_read_and_their_tokens_named():
    class Letters:
        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[ord(letter) - 97 for letter in text]])}

        def convert_ids_to_tokens(self, ids):
            return [chr(97 + number) for number in ids]

    result = plan_slice(tiny_huggingface("gpt2"), "abcd", tokenizer=Letters())
    assert result["key_token"].values.tolist() == list("abcd")
    with pytest.raises(TypeError, match="pass tokenizer="):
        plan_slice(tiny_huggingface("gpt2"), "abcd")


def test_a_window_of_a_long_input_is_a_window_of_its_plan(monkeypatch):
    model, tokens = tiny_huggingface("gpt2"), ids(1, 60)
    whole = plan_slice(model, tokens, layer=1, check=False)
    monkeypatch.setattr("goatviz.analysis.plan.MAX_PAIRS", 30 * 60)
    with pytest.raises(ValueError, match="queries must be .* 30 rows over 60 keys"):
        plan_slice(model, tokens, layer=1)
    part = plan_slice(model, tokens, layer=1, queries=slice(40, 60), keys=slice(0, 10), check=False)
    for name in ("weights", "incoming_mass", "entropy"):
        place = {"query": slice(40, 60), "key": slice(0, 10)}
        wanted = whole[name].isel({dim: place[dim] for dim in whole[name].dims})
        np.testing.assert_allclose(part[name], wanted, rtol=1e-6, err_msg=name)


def test_weights_that_lost_a_sinks_column_say_so():
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.5]])
    result = plan_slice(weights, check=False)
    assert result["sink_weight"].values.tolist() == [0.5, 0.25]
    np.testing.assert_allclose(result["weights"], weights)
    with pytest.raises(ValueError, match="rows sum to at most 1, got rows that sum to 1.5"):
        plan_slice(torch.full((2, 2), 0.75))


def test_bad_input():
    model = CausalLM(ModelConfig(vocab_size=8, training_length=16))
    ids = torch.zeros(1, 4, dtype=torch.long)
    for call, error, match in (
        (lambda: plan_slice(model), TypeError, "inputs must be given"),
        (lambda: plan_slice(random_plan(), ids), TypeError, "inputs must not be given"),
        (lambda: plan_slice("model"), TypeError, "source must .*got str"),
        (lambda: plan_slice(nn.Linear(2, 2), ids), TypeError, "cannot be captured"),
        (
            lambda: plan_slice(model, ids, layer=1),
            ValueError,
            r"layer must .* 0 .. 0, got 1",
        ),
        (
            lambda: plan_slice(model, ids, head=2),
            ValueError,
            r"head must .* 0 .. 1, got 2",
        ),
        (
            lambda: plan_slice(model, ids, batch=1),
            ValueError,
            r"batch must .* 0 .. 0, got 1",
        ),
        (
            lambda: plan_slice(random_plan(2), head=5),
            ValueError,
            r"head must .* 0 .. 1, got 5",
        ),
        (lambda: plan_slice(random_plan(2, 2, 2)), ValueError, "at most two batch dimensions"),
        (lambda: plan_slice(random_plan(), queries=slice(20, 30)), ValueError, "queries"),
        (lambda: plan_slice(random_plan(), keys=3), TypeError, "keys must be a slice"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_a_layer_that_is_never_called_is_told():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = CausalLM(ModelConfig(vocab_size=8, training_length=16))

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="never called"):
        plan_slice(Idle(), torch.zeros(1, 3))


def test_keys_of_a_sliding_windows_cache_count_from_the_start_of_the_text():
    model = tiny_huggingface("mistral", sliding_window=4)
    with torch.no_grad(), capture(model, keep="projections") as record:
        cache = model(ids(1, 9), use_cache=True).past_key_values
        model(ids(1, 1), past_key_values=cache)
    plan = plan_slice(record, check=False)
    assert plan["key"].values.tolist() == [6, 7, 8, 9]
    wanted = record.plan(keys=slice(6, 10)).weights
    np.testing.assert_allclose(plan["weights"], wanted)
    part = plan_slice(record, keys=slice(2, 8), check=False)
    assert part["key"].values.tolist() == [6, 7]
    with pytest.raises(ValueError, match="keys must be a non-empty window of"):
        plan_slice(record, keys=slice(0, 6), check=False)
    with pytest.raises(ValueError, match="every key of its text, got .*after 6 that have left"):
        PlanLevels(record.calls[-1])


def test_a_models_own_kernel_certifies_its_plan():
    text = ids(1, 20, vocab=50)
    plan = plan_slice(tiny_huggingface("llama"), text)
    assert 0 < plan.attrs["residual"] < 1e-6
    caption = " ".join(note.text for note in draw_plan(plan).layout.annotations)
    assert "kernel" in caption and "differs from the plan times the values" in caption
    # Behind the output projection of torch's own layers nobody sees a kernel's output.
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    assert "residual" not in plan_slice(model, torch.randn(1, 8, 32)).attrs


def test_the_caption_says_what_an_extra_column_takes():
    plan = plan_slice(tiny_huggingface("gpt-oss"), ids(1, 20, vocab=50))
    caption = " ".join(note.text for note in draw_plan(plan).layout.annotations)
    assert f"takes {float(plan['sink_weight'].mean()):.3f} of the mass" in caption
