"""Sinks: the definition, the intervals, and what surrounds them, against dense attention."""

import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from goatviz.adapters.capture import capture
from goatviz.analysis import sink_profile, sink_table
from goatviz.attention import Attention, attention_plan
from goatviz.models import CausalLM, ModelConfig
from goatviz.priors import SinkPrior, UniformPrior
from goatviz.results import load_result, save_result
from goatviz.training import load_pretrained
from goatviz.transport import protected_length


def lm(positions="goat", heads=3, **options):
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=20,
            training_length=40,
            num_layers=2,
            num_heads=heads,
            embed_dim=16 * heads,
            positions=positions,
            **options,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bump"):
            nn.init.uniform_(parameter, 0.0, 6.0)
    return model


def ids(batch, length, seed=0):
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(seed))


def dense_plans(model, inputs):
    with capture(model, keep="projections") as record:
        with torch.no_grad():
            model(inputs)
    priors = [block.attention.prior for block in model.blocks]
    with torch.no_grad():
        return [
            attention_plan(c.call.q, c.call.k, prior=prior)
            for c, prior in zip(record.calls, priors, strict=True)
        ]


def sail_rate(weights, threshold, key=0):
    """The published definition, on weights of shape (samples, layers, heads, T, T)."""
    length = weights.shape[-1]
    importance = (weights / np.arange(length, 0, -1)).sum(-2)
    return (importance[..., key] > threshold).mean()


@pytest.mark.parametrize("positions", ["goat", "rope"])
def test_a_profile_is_what_dense_attention_says(positions):
    model, inputs = lm(positions), ids(5, 40)
    profile = sink_profile(model, inputs, min_observers=4, recent=8, maps=12)
    plans = dense_plans(model, inputs)
    index = torch.arange(40)
    near = (index[:, None] - index) < 8
    for layer, plan in enumerate(plans):
        one, weights = profile.sel(layer=layer), plan.weights
        importance = (weights.sum(-2) / torch.arange(40, 0, -1)).mean(0).numpy()
        np.testing.assert_allclose(one["importance"].values[:, :37], importance[:, :37], atol=1e-6)
        assert np.isnan(one["importance"].values[:, 37:]).all()
        for name, wanted in (
            ("first_mass", weights[..., 0]),
            ("largest_mass", weights.amax(-1)),
            ("recent_mass", (weights * near).sum(-1)),
            ("entropy", plan.entropy),
            ("content_range", plan.content_range),
        ):
            np.testing.assert_allclose(one[name].values, wanted.mean((0, 2)).numpy(), atol=1e-5)
        assert (one["sink_column_mass"].values == 0).all()
        prior = plan.log_prior.exp()[0, :, 1:, 0]
        np.testing.assert_allclose(one["prior_first_low"], prior.amin(-1), atol=1e-5)
        np.testing.assert_allclose(one["prior_first_high"], prior.amax(-1), atol=1e-5)
        log_prior = model.blocks[layer].attention.prior.log_prior([39], 40).detach()[:, 0]
        margin = (log_prior[:, 0] - log_prior[:, 1:].amax(-1)).double().expand(3).numpy()
        np.testing.assert_allclose(one["margin"], margin, atol=1e-5)
        np.testing.assert_allclose(one["protected_length"], protected_length(margin), rtol=1e-4)
        np.testing.assert_allclose(
            np.nan_to_num(one["map_probability"]), weights.mean(0)[:, :12, :12], atol=1e-6
        )
        raw = plan.scores + model.blocks[layer].attention.prior.log_prior(40, 40).detach()
        lower = np.tril(np.ones((12, 12), dtype=bool))
        np.testing.assert_allclose(
            one["map_logits"].values[:, lower],
            raw.mean(0)[:, :12, :12].numpy()[:, lower],
            atol=1e-5,
        )
        assert (one["map_allowed"].values == lower).all()
    stacked = np.stack([plan.weights.numpy() for plan in plans], axis=1)
    for threshold in (0.05, 0.1, 0.3, 0.8):
        found = float(profile["model_sink_rate"].sel(threshold=threshold))
        assert found == pytest.approx(sail_rate(stacked, threshold))


def test_signal_counts_every_query_and_lies_within_the_bounds():
    model, inputs = lm(), ids(4, 40)
    profile = sink_profile(model, inputs)
    counts = profile["signal_count"]
    assert (counts.sum(["range_bin", "mass_bin"]) == 4 * 39).all()
    plan = dense_plans(model, inputs)[0]
    for head in range(3):
        one = profile.sel(layer=0, head=head)
        total = counts.sel(layer=0, head=head).sum("mass_bin").values
        for name, values in (
            ("first", plan.weights[:, head, 1:, 0]),
            ("largest", plan.weights[:, head, 1:].amax(-1)),
        ):
            mean = np.nansum(one[f"signal_{name}_mass"].values * total) / total.sum()
            assert mean == pytest.approx(float(values.mean()), abs=1e-6)
        width = plan.content_range[:, head, 1:]
        odds = torch.logit(plan.weights[:, head, 1:, 0])
        low, high = (
            math.log(float(one[f"prior_first_{end}"]) / (1 - float(one[f"prior_first_{end}"])))
            for end in ("low", "high")
        )
        assert bool((odds >= low - width - 1e-4).all() and (odds <= high + width + 1e-4).all())


@pytest.mark.parametrize(("length", "expected"), [(8, 0.34), (16, 0.21), (64, 0.074)])
def test_a_uniform_head_is_a_false_sink_when_short(length, expected):
    layer = Attention(8, 1, prior=UniformPrior())
    nn.init.zeros_(layer.q_proj.weight)
    nn.init.zeros_(layer.q_proj.bias)
    x = torch.randn(2, length, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        profile = sink_profile(layer, x, min_observers=1)
    assert float(profile["importance"][0, 0, 0]) == pytest.approx(expected, abs=0.005)
    told = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(told) == (length < 16)
    assert all("a uniform head has a false sink" in text for text in told)
    assert float(profile["sink_rate"].sel(threshold=0.3)[0, 0]) == (length == 8)


def test_a_head_that_looks_at_itself_is_no_sink():
    layer = Attention(16, 1, prior=UniformPrior(), content_dim=16)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.copy_(torch.eye(16))
            projection.bias.zero_()
    x = torch.nn.functional.normalize(torch.randn(1, 40, 16), dim=-1) * 40
    strict, loose = (sink_profile(layer, x, min_observers=n) for n in (16, 1))
    assert float(loose["importance"][0, 0, -1]) > 0.9
    assert np.isnan(strict["importance"].values[0, 0, 25:]).all()
    rates = [float(p["any_sink_rate"].sel(threshold=0.5)[0, 0]) for p in (strict, loose)]
    assert rates == [0.0, 1.0]
    assert (strict["observers"].values[0] == np.arange(40, 0, -1)).all()


def test_the_threshold_is_strict_and_rates_fall():
    model, inputs = lm(), ids(6, 40)
    profile = sink_profile(model, inputs)
    assert (profile["sink_rate"].diff("threshold") <= 0).all()
    assert (profile["any_sink_rate"] >= profile["sink_rate"]).all()
    assert (profile["model_sink_rate_low"] <= profile["model_sink_rate"]).all()
    assert (profile["model_sink_rate"] <= profile["model_sink_rate_high"]).all()
    assert float(profile["model_sink_rate"].isel(threshold=-1)) == 0.0

    layer = Attention(8, 1, prior=SinkPrior(1, rank=0, training_length=8))
    with torch.no_grad():
        layer.prior.bump.fill_(200.0)
    sure = sink_profile(layer, torch.randn(1, 20, 8))
    assert float(sure["importance"][0, 0, 0]) == 1.0
    assert sure["sink_rate"].values[0, 0].tolist() == [1.0] * 100 + [0.0]


def test_intervals():
    model = lm()
    few, many = (sink_profile(model, ids(n, 40), seed=3) for n in (4, 32))
    for profile in (few, many):
        seen = ~np.isnan(profile["importance"].values)
        for end, sign in (("low", 1), ("high", -1)):
            gap = sign * (profile["importance"] - profile[f"importance_{end}"]).values
            assert (gap[seen] >= -1e-6).all() and np.isnan(gap[~seen]).all()
    width = [float((p["importance_high"] - p["importance_low"]).mean()) for p in (few, many)]
    assert width[1] < width[0]
    again = sink_profile(model, ids(4, 40), seed=3)
    assert again.identical(few)
    single = sink_profile(model, ids(1, 40))
    assert single["importance_low"].isnull().all() and single["model_sink_rate_low"].isnull().all()


def test_padding_is_no_input():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPT2Model(config).eval()
    tokens = ids(3, 40)
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[1, :12] = 0
    right[1, 28:] = 0
    cut = [tokens[0], tokens[1, 12:], tokens[2]]
    alone = sink_profile(model, cut)
    padded = sink_profile(model, {"input_ids": tokens, "attention_mask": left})
    np.testing.assert_allclose(padded["importance"], alone["importance"], atol=1e-6)
    assert padded.attrs["length_min"] == 28 and padded.attrs["n_inputs"] == 3
    cut = sink_profile(model, [tokens[0], tokens[1, :28], tokens[2]])
    with capture(model) as record:
        model(input_ids=tokens, attention_mask=right)
    from_record = sink_profile(record)
    np.testing.assert_allclose(from_record["importance"], cut["importance"], atol=1e-6)
    np.testing.assert_allclose(from_record["first_mass"], cut["first_mass"], atol=1e-6)
    with capture(model) as record:
        model(input_ids=tokens, attention_mask=left)
    with pytest.raises(ValueError, match="padded on the left.*attention_mask"):
        sink_profile(record)


def test_norms_and_massive_activations():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPT2Model(config).eval()
    with torch.no_grad():
        model.wpe.weight[0, 5] = 1e5
    tokens = ids(2, 24)
    profile = sink_profile(model, tokens, norms=True)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    # The last hidden state is normalised once more; blocks are what is measured.
    for state in range(2):
        norm = states[state + 1].norm(dim=-1).mean(0)
        np.testing.assert_allclose(profile["hidden_norm"].values[state], norm, rtol=1e-5)
    assert (profile["massive"].values[:, 0] == 1).all()
    assert (profile["massive"].values[:, 1:] == 0).all()
    assert (profile["hidden_largest"].values[:, 0] > 9e4).all()
    with capture(model, statistics=["value_norm"]) as record:
        model(tokens)
    wanted = record.calls[1].value_norm.mean((0, 1))
    np.testing.assert_allclose(profile["value_norm"].values[1], wanted, rtol=1e-5)


def test_a_sink_column_takes_its_share():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = transformers.GptOssModel(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.layers[0].self_attn.sinks.copy_(torch.tensor([5.0, -50.0]))
    profile = sink_profile(model, ids(1, 24))
    column = profile["sink_column_mass"].values[0]
    assert column[0] > 0.8 and column[1] < 1e-6
    assert float(profile["importance"].sum("key")[0, 1]) <= 24


@pytest.mark.parametrize("source", ["checkpoint", "record"])
def test_other_sources(source):
    checkpoint = load_pretrained("copy-mixture-1-goat")
    data = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    profile = sink_profile(checkpoint, data)
    assert profile.attrs["source"] == "copy-mixture-1-goat" and profile.attrs["prior"] == "learned"
    if source == "record":
        with capture(checkpoint.model) as record:
            checkpoint.model(data)
        again = sink_profile(record)
        assert again.attrs.pop("source") == "record" and profile.attrs.pop("source")
        assert again.drop_vars("value_norm").identical(profile)
    assert float(profile["first_mass"].max()) > 0.99


HOSTILE = [
    "the",
    "the",
    "<s>",
    "</script>",
    "<b>",
    "Ã©",
    "café",
    "日本",
    "🙂",
    "Ġcaf",
    "é",
    "a",
] * 2


class Tokenizer:
    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[ord(c) % 20 for c in text]])}

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def test_tokens_survive(tmp_path):
    profile = sink_profile(lm(), ids(1, 24), tokens=HOSTILE, maps=8, norms=True)
    loaded = load_result(save_result(profile, tmp_path / "sinks.nc"))
    assert loaded.identical(profile) and loaded["token"].values.tolist() == HOSTILE
    text = "call me ishmael, some years ago"
    named = sink_profile(lm(), text, tokenizer=TokenizerOfIds())
    assert named["token"].values.tolist()[0] == f"<{ord('c') % 20}>"
    with pytest.raises(ValueError, match="tokens must hold 24 texts, one for each key, got 2"):
        sink_profile(lm(), ids(1, 24), tokens=["a", "b"])


class TokenizerOfIds(Tokenizer):
    """goatviz models take `ids`, not `input_ids`."""

    def __call__(self, text, return_tensors):
        return {"ids": super().__call__(text, return_tensors)["input_ids"]}


def test_the_table_ranks_the_queries():
    profile = sink_profile(lm("rope"), ids(8, 40))
    table = sink_table(profile)
    assert set(table) == {
        "first_mass",
        "largest_mass",
        "recent_mass",
        "content_range",
        "sink_rate",
        "rank_correlation",
    }
    counts = profile["signal_count"].values[1, 2]
    x, y = (
        np.repeat(axis, counts.ravel()) for axis in (a.ravel() for a in np.indices(counts.shape))
    )

    def ranks(values):
        order = np.sort(values)
        return (np.searchsorted(order, values) + np.searchsorted(order, values, side="right")) / 2

    wanted = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert float(table["rank_correlation"][1, 2]) == pytest.approx(wanted)
    assert table.to_dataframe().shape == (6, 6)


def test_bad_arguments_are_named():
    model, inputs = lm(), ids(1, 20)
    for options, error, message in (
        ({"threshold": 1.0}, ValueError, r"threshold must be in \[0, 1\), got 1.0"),
        ({"min_observers": 0}, ValueError, "min_observers must be a positive integer, got 0"),
        ({"resamples": True}, ValueError, "resamples must be a positive integer, got True"),
        ({"maps": -1}, ValueError, "maps must be a positive number of tokens, got -1"),
        ({"layers": 5}, ValueError, "layers must be numbers in 0 .. 1"),
    ):
        with pytest.raises(error, match=message):
            sink_profile(model, inputs, **options)
    with pytest.raises(
        TypeError, match="source must be a model, a Checkpoint or a Record, got str"
    ):
        sink_profile("gpt2", inputs)
    with pytest.raises(TypeError, match="inputs must be given with a model"):
        sink_profile(model)
    with pytest.raises(TypeError, match="pass tokenizer="):
        sink_profile(model, "text")
    with pytest.raises(TypeError, match="attention that cannot be captured"):
        sink_profile(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="norms needs blocks in a ModuleList"):
        sink_profile(Attention(8, 1), torch.randn(1, 20, 8), norms=True)


def test_bad_records_are_named():
    model, inputs = lm(), ids(1, 20)
    with capture(model) as empty:
        pass
    with capture(model, statistics=["entropy"]) as poor:
        model(inputs)
    with capture(model, statistics=["entropy", "incoming_mass"]) as poorer:
        model(inputs)
    with capture(model, keys=[3]) as other:
        model(inputs)
    cache = model.new_cache()
    model(inputs, cache=cache)
    with capture(model) as decoding:
        model(inputs[:, :1], cache=cache)
    with capture(model) as full:
        model(inputs)
    for record, message in (
        (empty, "record is empty"),
        (poor, "record must hold log_normaliser"),
        (poorer, "record lacks log_normaliser"),
        (other, r"mass of key 0 first, got \(3,\)"),
        (decoding, "1 queries over 21 keys; sinks need whole sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            sink_profile(record)
    with pytest.raises(TypeError, match="inputs must not be given with a Record"):
        sink_profile(full, inputs)
    with pytest.raises(ValueError, match="maps needs a record captured with keep='projections'"):
        sink_profile(full, maps=True)
    with pytest.raises(ValueError, match="norms needs the model and inputs"):
        sink_profile(full, norms=True)
