"""Sink profiles against dense float64 attention, and what is said where nothing can be."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from goatviz.adapters.capture import capture
from goatviz.analysis import heads_table, sink_profile
from goatviz.analysis.inputs import piece_text
from goatviz.analysis.sink_fields import rates
from goatviz.analysis.sink_passes import MASSIVE, SINK_STATISTICS
from goatviz.attention import Attention, LayerCache, attention_plan
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.plots import SINK_KINDS, draw_sinks
from goatviz.priors import ALiBiPrior, KeyTablePrior, SinkPrior
from goatviz.results import load_result, save_result
from goatviz.training import load_pretrained
from goatviz.transport import AttentionCall, protected_length
from tests.factories import ids, tiny_huggingface

FLOATS = (
    "importance",
    "first_importance",
    "sink_rate",
    "any_sink_rate",
    "model_sink_rate",
    "first_mass",
    "largest_mass",
    "recent_mass",
    "sink_column_mass",
    "entropy",
    "content_range",
    "margin",
    "protected_length",
    "prior_first_low",
    "prior_first_high",
)
HOSTILE = [
    "Ġcaf\u00c3\u00a9",
    "</script>",
    "",
    "日本",
    "🙂",
    "\n",
    "the",
    "the",
    "<|endoftext|>",
    "%{x}",
]


def lm(positions="goat", **options):
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, **options}
    if positions == "goat":
        config = {"prior_rank": 2, "sink_rank": 2, **config}
    model = CausalLM(
        ModelConfig(vocab_size=20, training_length=32, positions=positions, **config)
    ).eval()
    for name, parameter in model.named_parameters():
        if ".prior." in name and "raw_slope" not in name:
            nn.init.normal_(parameter, std=0.7)
        elif "q_proj.weight" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def dense(model, inputs, **arguments):
    """The plan of every goatviz layer, float64, from what the layer itself was given."""
    seen = []
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    handles = [m.register_forward_pre_hook(lambda m, a: seen.append((m, a[0]))) for m in layers]
    with torch.no_grad():
        model(inputs, **arguments)
        plans = []
        for layer, x in seen:
            q, k, _, points = layer.project(x)
            plan = attention_plan(q, k, prior=layer.prior, query_pos=points, causal=layer.causal)
            plans.append(plan)
    for handle in handles:
        handle.remove()
    return plans


def importance(weights, allowed, min_observers=1):
    """The definition: mean over the queries that see the key; arrays (..., queries, keys)."""
    observers = allowed.sum(-2)
    mean = weights.sum(-2) / observers
    return np.where(observers >= min_observers, mean, np.nan)


def uniform_head(length, *, causal=True, prior=None):
    layer = Attention(8, 1, causal=causal, prior=prior, content_dim=4)
    nn.init.zeros_(layer.q_proj.weight)
    nn.init.zeros_(layer.q_proj.bias)
    return layer, torch.randn(1, length, 8)


def identity_head(length):
    layer = Attention(length, 1)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.copy_(100 * torch.eye(length))
            projection.bias.zero_()
    return layer, torch.eye(length).unsqueeze(0)


def assert_same(a, b, names=FLOATS, atol=1e-5):
    for name in names:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=1e-4, err_msg=name)


# --- importance ---


@pytest.mark.parametrize("min_observers", [1, 5, 16])
def test_importance_is_the_mean_over_the_queries_that_see_the_key(min_observers):
    model, x = lm(), ids(3, 40)
    profile = sink_profile(model, x, min_observers=min_observers)
    for layer, plan in enumerate(dense(model, x)):
        wanted = importance(plan.weights.numpy(), plan.allowed.numpy(), min_observers)
        np.testing.assert_allclose(profile["importance"][layer], wanted.mean(0), atol=1e-6)
        np.testing.assert_allclose(profile["first_importance"][:, layer], wanted[..., 0], atol=1e-6)
    np.testing.assert_array_equal(profile["observers"], [3 * np.arange(40, 0, -1)] * 2)
    assert np.isnan(profile["importance"][..., 41 - min_observers :]).all()
    assert profile.attrs["n_queries"] == 120 and profile.attrs["n_inputs"] == 3


@pytest.mark.parametrize("length", [8, 16, 64])
def test_a_uniform_causal_head_has_harmonic_importance(length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if length < 16 else "error")
        profile = sink_profile(*uniform_head(length), min_observers=1)
    harmonic = (1 / np.arange(1, length + 1)).sum() / length
    assert harmonic == pytest.approx({8: 0.34, 16: 0.21, 64: 0.074}[length], abs=0.002)
    first = profile["first_importance"].item()
    assert first == pytest.approx(harmonic, abs=1e-6)
    # Nothing but the length makes this head a sink.
    assert profile["sink_rate"].sel(threshold=0.3).item() == (length == 8)


def test_an_identity_head_is_no_sink_once_its_last_keys_need_observers():
    layer, x = identity_head(40)
    bare = sink_profile(layer, x, min_observers=1)
    assert bare["importance"][0, 0, -1].item() == pytest.approx(1.0)
    assert bare["any_sink_rate"].sel(threshold=0.3).item() == 1
    assert bare["sink_rate"].sel(threshold=0.3).item() == 0
    guarded = sink_profile(layer, x)
    assert guarded["any_sink_rate"].sel(threshold=0.3).item() == 0
    assert float(guarded["importance"].max()) == pytest.approx(1 / 16)
    assert np.isnan(guarded["importance"].values[..., -15:]).all()


# --- rates ---


def sail_sg(attentions, epsilon):
    """Sink rate of the first key as in Gu et al.'s code; attentions (layers, heads, T, T)."""
    length = attentions.shape[-1]
    alpha = attentions.sum(axis=-2) / np.arange(length, 0, -1)
    sinks = alpha[:, :, 0] > epsilon
    return sinks.sum() / sinks.size


def test_rates_are_those_of_gu_et_al():
    model, x = lm(), ids(5, 24)
    profile = sink_profile(model, x, min_observers=1)
    weights = np.stack([plan.weights.numpy() for plan in dense(model, x)], axis=1)
    thresholds = profile["threshold"].values
    alpha = weights.sum(-2) / np.arange(24, 0, -1)
    # No importance lies so near a threshold that rounding decides.
    near = np.abs(alpha[..., None] - thresholds[1:-1]).min() > 1e-6
    assert near
    wanted = [np.mean([sail_sg(one, epsilon) for one in weights]) for epsilon in thresholds]
    np.testing.assert_allclose(profile["model_sink_rate"][1:], wanted[1:], atol=1e-12)
    above = alpha[..., None] > thresholds
    np.testing.assert_allclose(
        profile["sink_rate"][..., 1:], above[:, :, :, 0, 1:].mean(0), atol=1e-12
    )
    np.testing.assert_allclose(
        profile["any_sink_rate"][..., 1:], above.any(3)[..., 1:].mean(0), atol=1e-12
    )
    assert 0 < profile["model_sink_rate"].sel(threshold=0.3) < 1


def test_rates_fall_with_the_threshold_and_any_key_contains_the_first():
    profile = sink_profile(lm(), [ids(2, 20), ids(3, 33, seed=1)])
    for name in ("sink_rate", "any_sink_rate", "model_sink_rate"):
        assert (np.diff(profile[name]) <= 0).all()
    assert (profile["any_sink_rate"] >= profile["sink_rate"]).all()
    np.testing.assert_allclose(
        profile["model_sink_rate"], profile["sink_rate"].mean(("layer", "head")), atol=1e-12
    )
    assert float(profile["model_sink_rate"].sel(threshold=1.0)) == 0
    layer = Attention(8, 1, prior=SinkPrior(1, rank=0, training_length=8))
    with torch.no_grad():
        layer.prior.bump.fill_(200.0)
    sure = sink_profile(layer, torch.randn(1, 20, 8))
    assert sure["importance"][0, 0, 0].item() == 1.0
    assert sure["sink_rate"][0, 0].values.tolist() == [1.0] * 100 + [0.0]


@pytest.mark.parametrize("shared", [2, 4])
def test_an_importance_at_the_threshold_is_no_sink(shared):
    table = torch.full((1, 20), -200.0)
    table[:, :shared] = 0.0
    layer, x = uniform_head(20, causal=False, prior=KeyTablePrior(table))
    epsilon = 1 / shared
    profile = sink_profile(layer, x, threshold=epsilon)
    assert profile["first_importance"].item() == epsilon
    for name in ("sink_rate", "any_sink_rate"):
        assert profile[name].sel(threshold=epsilon).item() == 0
        assert profile[name].sel(threshold=epsilon - 0.01, method="nearest").item() == 1
    assert heads_table(profile)["sink_rate"].item() == 0
    # 0.1 in float32 lies above 0.1 in float64.
    tenth = np.full((1, 1, 1), 0.1, np.float32)
    rate = rates(tenth, tenth, np.ones((1, 1)))["model_sink_rate"]
    assert rate.tolist() == [1.0] * 10 + [0.0] * 91


def test_inputs_too_short_for_min_observers_count_nowhere():
    model = lm()
    long, short = ids(2, 40), ids(1, 18, seed=1)
    mixed = sink_profile(model, [long, short], min_observers=20)
    alone = sink_profile(model, long, min_observers=20)
    for name in ("sink_rate", "any_sink_rate", "model_sink_rate", "importance"):
        np.testing.assert_allclose(mixed[name], alone[name], atol=1e-12, err_msg=name)
    assert np.isnan(mixed["first_importance"][2]).all()
    nothing = sink_profile(model, short, min_observers=20)
    for name in ("sink_rate", "any_sink_rate", "model_sink_rate", "importance"):
        assert np.isnan(nothing[name]).all(), name
    assert np.isfinite(nothing["first_mass"]).all()
    for kind in SINK_KINDS[:4]:
        draw_sinks(nothing, kind=kind)
    assert heads_table(nothing)["sink_rate"].isna().all()


# --- intervals ---


def test_intervals_contain_the_mean_shrink_and_repeat():
    model = lm()
    few, many = (sink_profile(model, ids(n, 24), resamples=200) for n in (4, 64))
    for profile in (few, many):
        low, mean, high = (profile[f"importance{end}"].values for end in ("_low", "", "_high"))
        known = np.isfinite(mean)
        assert np.array_equal(known, np.isfinite(low)) and np.array_equal(known, np.isfinite(high))
        assert (low[known] <= mean[known] + 1e-7).all()
        assert (mean[known] <= high[known] + 1e-7).all()
        rate = profile["model_sink_rate"].values
        assert (profile["model_sink_rate_low"].values <= rate + 1e-12).all()
        assert (rate <= profile["model_sink_rate_high"].values + 1e-12).all()
    width = [float((p["importance_high"] - p["importance_low"]).mean()) for p in (few, many)]
    assert 0 < width[1] < width[0] / 2
    again, other = (sink_profile(model, ids(4, 24), resamples=200, seed=s) for s in (0, 1))
    assert again.identical(few)
    assert not np.array_equal(other["importance_low"], few["importance_low"], equal_nan=True)
    assert other["importance"].identical(few["importance"])


def test_the_interval_is_the_percentile_bootstrap():
    profile = sink_profile(lm(), ids(6, 24), resamples=2000)
    first = profile["first_importance"].values.astype(float)
    draws = np.random.default_rng(1).integers(6, size=(4000, 6))
    low, high = np.quantile(first[draws].mean(1), [0.025, 0.975], axis=0)
    width = high - low
    assert (np.abs(profile["importance_low"][..., 0] - low) < 0.1 * width).all()
    assert (np.abs(profile["importance_high"][..., 0] - high) < 0.1 * width).all()


def test_one_input_has_no_interval_nor_has_a_key_that_one_input_alone_has():
    model = lm()
    alone = sink_profile(model, ids(1, 24))
    for name in ("importance_low", "importance_high", "model_sink_rate_low"):
        assert np.isnan(alone[name]).all(), name
    mixed = sink_profile(model, [ids(2, 24), ids(1, 48, seed=1)])
    low = mixed["importance_low"].values
    assert np.isfinite(low[..., :9]).all() and np.isnan(low[..., 9:]).all()
    assert np.isfinite(mixed["importance"].values[..., :33]).all()


# --- means over queries, the prior, the signal ---


@pytest.mark.parametrize(
    ("positions", "recent"), [("goat", 1), ("goat", 7), ("goat", 128), ("rope", 7)]
)
def test_means_are_the_dense_ones(positions, recent):
    model, x = lm(positions), ids(3, 33)
    profile = sink_profile(model, x, recent=recent)
    lag = np.subtract.outer(np.arange(33), np.arange(33))
    for layer, plan in enumerate(dense(model, x)):
        weights = plan.weights.numpy()
        for name, wanted in (
            ("first_mass", weights[..., 0]),
            ("largest_mass", weights.max(-1)),
            ("recent_mass", (weights * (lag < recent)).sum(-1)),
            ("entropy", plan.entropy.numpy()),
            ("content_range", plan.content_range.numpy()),
        ):
            np.testing.assert_allclose(
                profile[name][layer], wanted.mean((0, 2)), atol=1e-5, err_msg=name
            )
    assert (profile["sink_column_mass"] == 0).all() and profile.attrs["recent"] == recent


@pytest.mark.parametrize("positions", ["goat", "alibi", "bucket", "none"])
def test_the_prior_of_the_first_key_is_the_dense_prior(positions):
    model, x = lm(positions), ids(2, 30)
    profile = sink_profile(model, x)
    for layer, plan in enumerate(dense(model, x)):
        prior = plan.log_prior.exp().numpy()[0, :, 1:, 0]
        for end, wanted in (("low", prior.min(-1)), ("high", prior.max(-1))):
            np.testing.assert_allclose(profile[f"prior_first_{end}"][layer], wanted, atol=1e-5)
        raw = model.blocks[layer].attention.prior.log_prior([29], 30).detach()[:, 0].double()
        margin = (raw[:, 0] - raw[:, 1:].amax(-1)).expand(2).repeat_interleave(2)
        np.testing.assert_allclose(profile["margin"][layer], margin, atol=1e-12)
        np.testing.assert_allclose(
            profile["protected_length"][layer], protected_length(margin), rtol=1e-9
        )
    kinds = {"none": "uniform", "alibi": "fixed"}
    assert profile.attrs["prior"] == kinds.get(positions, "learned")


def test_the_margin_is_the_longest_inputs():
    model = lm()
    wanted = sink_profile(model, ids(1, 40))["margin"]
    for lengths in ([20, 40], [40, 20]):
        found = sink_profile(model, [ids(1, n) for n in lengths])
        np.testing.assert_allclose(found["margin"], wanted, atol=1e-12)
        assert found.attrs["length"] == 40 and found.attrs["length_min"] == 20


def test_every_query_lies_inside_the_collapse_bounds():
    model, x = lm(), ids(4, 40)
    profile = sink_profile(model, x)
    for layer, plan in enumerate(dense(model, x)):
        mass, width = plan.weights[..., 1:, 0], plan.content_range[..., 1:]
        for sign, end in ((-1, "low"), (1, "high")):
            pi = torch.as_tensor(profile[f"prior_first_{end}"][layer].values)[:, None]
            bound = torch.sigmoid(torch.logit(pi) + sign * width)
            assert bool((sign * (bound - mass) >= -1e-6).all())


def test_the_density_counts_every_query_that_has_a_choice():
    model, x = lm(), ids(3, 25)
    profile = sink_profile(model, x)
    counts = profile["signal_count"].values
    assert (counts.sum((-2, -1)) == 3 * 24).all()
    edges = np.append(profile["range_bin"].values, profile["range_stop"].values[-1])
    mass_edges = np.append(profile["mass_bin"].values, 1.0)
    lag = np.subtract.outer(np.arange(25), np.arange(25))
    for layer, plan in enumerate(dense(model, x)):
        width = plan.content_range.numpy()[..., 1:]
        weights = plan.weights.numpy()[..., 1:, :]
        for head in range(4):
            across = width[:, head].ravel()
            hist, _, _ = np.histogram2d(
                across, weights[:, head, :, 0].ravel(), bins=[edges, mass_edges]
            )
            # Rounding may move a query by one bin.
            assert np.abs(np.cumsum(hist.sum(1) - counts[layer, head].sum(1))).max() <= 1
            assert np.abs(np.cumsum(hist.sum(0) - counts[layer, head].sum(0))).max() <= 1
            for name, values in (
                ("first", weights[..., 0]),
                ("largest", weights.max(-1)),
                ("recent", (weights * (lag[1:] < 128)).sum(-1)),
            ):
                binned = profile[f"signal_{name}_mass"][layer, head].values
                total = np.nansum(binned * counts[layer, head].sum(1))
                assert total == pytest.approx(values[:, head].sum(), abs=1e-4)
                assert np.array_equal(np.isnan(binned), counts[layer, head].sum(1) == 0)


# --- padding, records, other models ---


def reader(name, **changes):
    """A tiny Hugging Face model, without its head."""
    return tiny_huggingface(name, std=0.3, **changes).base_model


def eager(model, given):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [a.double().numpy() for a in model(given, output_attentions=True).attentions]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_their_sequences_one_by_one(side):
    model, lengths = reader("gpt2"), (30, 22, 17)
    rows = [ids(1, n, seed=n, vocab=50) for n in lengths]
    padded, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for row, own in enumerate(rows):
        at = slice(0, own.shape[1]) if side == "right" else slice(30 - own.shape[1], 30)
        padded[row, at], mask[row, at] = own[0], 1
    together = sink_profile(
        model, {"input_ids": padded, "attention_mask": mask}, maps=8, norms=True
    )
    assert together.identical(sink_profile(model, rows, maps=8, norms=True))
    assert together.attrs["length_min"] == 17 and together.attrs["n_queries"] == sum(lengths)


def right_padded(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids(len(lengths), max(lengths)), mask


@pytest.mark.parametrize("lengths", [(30, 22, 17), (17, 30, 22), (20, 20)])
def test_a_record_of_a_batch_padded_on_the_right_is_its_sequences(lengths):
    model = lm()
    x, mask = right_padded(lengths)
    with capture(model, keep="projections", recent=5) as record:
        model(x, padding_mask=mask)
    found = sink_profile(record, maps=20)
    rows = [x[row : row + 1, :length] for row, length in enumerate(lengths)]
    wanted = sink_profile(model, rows, maps=20, recent=5)
    assert_same(found, wanted, (*FLOATS, "map_logits", "map_probability", "map_allowed"))
    for name in ("signal_count", "observers"):
        assert (found[name].sum() == wanted[name].sum()).all()
    attrs = {**wanted.attrs, "source": "record"}
    assert found.attrs == attrs and attrs["recent"] == 5


def test_every_call_of_a_record_is_one_more_forward_pass():
    model = lm()
    with capture(model, statistics=SINK_STATISTICS) as record:
        model(ids(2, 20))
        model(ids(1, 33, seed=1))
    found = sink_profile(record)
    wanted = sink_profile(model, [ids(2, 20), ids(1, 33, seed=1)])
    wanted.attrs["source"] = "record"
    # A record knows no token ids; one key of each query is gathered by itself or beside another.
    assert found["induction_mass"].isnull().all() and wanted["induction_mass"].notnull().all()
    assert_same(found, wanted, ["previous_mass"], atol=1e-7)
    gathered = ["previous_mass", "induction_mass"]
    assert found.drop_vars(gathered).identical(wanted.drop_vars(gathered))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert"])
def test_hugging_face_models_against_their_own_weights(name):
    model, x = reader(name), ids(2, 20, vocab=50)
    profile = sink_profile(model, x, min_observers=1)
    window = getattr(model.config, "sliding_window", None)
    causal = name != "bert"
    lag = np.subtract.outer(np.arange(20), np.arange(20))
    allowed = (lag >= 0) | (not causal)
    if window:
        allowed &= lag < window
    counted = allowed[:, 0] & (allowed.sum(-1) > 1)
    prior = (1 / allowed.sum(-1))[counted]
    for layer, weights in enumerate(eager(model, x)):
        np.testing.assert_allclose(
            profile["importance"][layer], importance(weights, allowed).mean(0), atol=2e-5
        )
        np.testing.assert_allclose(
            profile["first_mass"][layer], weights[..., 0].mean((0, 2)), atol=2e-5
        )
        np.testing.assert_allclose(profile["prior_first_low"][layer], prior.min(), atol=1e-5)
        np.testing.assert_allclose(profile["prior_first_high"][layer], prior.max(), atol=1e-5)
        # A query that a window keeps from the first key tells nothing of signal and sink.
        assert (
            profile["signal_count"][layer].sum(("range_bin", "mass_bin")) == 2 * sum(counted)
        ).all()
    np.testing.assert_array_equal(profile["observers"][0], 2 * allowed.sum(0))
    assert profile.attrs["causal"] == causal and profile.attrs["prior"] == "none"
    assert np.isnan(profile["margin"]).all()


def test_an_extra_column_takes_mass_and_leaves_no_bound():
    model, x = reader("gpt-oss", sliding_window=64), ids(2, 20, vocab=50)
    profile = sink_profile(model, x)
    for layer, weights in enumerate(eager(model, x)):
        column = 1 - weights.sum(-1).mean((0, 2))
        np.testing.assert_allclose(profile["sink_column_mass"][layer], column, atol=2e-5)
    assert float(profile["sink_column_mass"].min()) > 0
    assert np.isnan(profile["prior_first_low"]).all()
    assert "an extra column takes mass" in profile.attrs["notes"]


def test_layers_may_have_different_heads():
    class TwoKinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Attention(
                32, 2, prior=goat_prior(2, rank=1, sink_rank=1, training_length=9)
            )
            self.second = Attention(32, 4, prior=ALiBiPrior(4))

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, x = TwoKinds(), torch.randn(3, 20, 32)
    profile = sink_profile(model, x, maps=4)
    assert profile["layer_name"].values.tolist() == ["first", "second"]
    assert profile["present"].values.tolist() == [[True, True, False, False], [True] * 4]
    absent = profile.sel(layer=0, head=[2, 3])
    for name in (*FLOATS, "map_logits", "importance_low"):
        if "head" in absent[name].dims:
            assert np.isnan(absent[name]).all(), name
    assert (absent["signal_count"] == 0).all()
    rate = profile["sink_rate"].values[profile["present"].values].mean(0)
    np.testing.assert_allclose(profile["model_sink_rate"], rate, atol=1e-12)
    part = sink_profile(model, x, layers="second", maps=4)
    assert part["layer"].values.tolist() == [1]
    np.testing.assert_array_equal(part["importance"][0], profile["importance"][1])
    for kind in SINK_KINDS[:-1]:
        draw_sinks(profile, kind=kind)


def test_a_layer_that_is_called_again_is_said_to_be():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(8, 2)

        def forward(self, x):
            return self.layer(self.layer(x))

    profile = sink_profile(Twice(), torch.randn(3, 20, 8))
    assert profile.attrs["n_inputs"] == 6 and "every call counts" in profile.attrs["notes"]
    assert sink_profile(lm(), ids(3, 20)).attrs["notes"] == ""


def test_torch_and_bidirectional_layers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 20, 16)
    profile = sink_profile(encoder, x)
    assert profile.attrs["causal"] == 0 and (profile["observers"] == 40).all()
    np.testing.assert_allclose(profile["importance"].sum("key"), 1.0, atol=1e-5)
    layer = Attention(16, 2, causal=False, prior=ALiBiPrior(2, symmetric=True))
    (plan,) = dense(layer, x)
    both = sink_profile(layer, x)
    np.testing.assert_allclose(both["importance"][0], plan.weights.mean((0, 2)).numpy(), atol=1e-6)
    single = sink_profile(lm(), [ids(1, 20), ids(1, 20, seed=1)])
    assert single.attrs["causal"] == 1
    with pytest.warns(UserWarning, match="the shortest input has 1 tokens"):
        mixed = sink_profile(lm(), [ids(1, 20), ids(1, 1)])
    assert mixed.attrs["causal"] == 1


# --- maps, norms, tokens ---


@pytest.mark.parametrize("size", [True, 5, 20])
def test_maps_are_mean_logits_and_weights(size):
    model, x = lm(), ids(3, 20)
    profile = sink_profile(model, x, maps=size)
    n = 20 if size is True else size
    tri = np.tri(n, dtype=bool)
    for layer, plan in enumerate(dense(model, x)):
        own = model.blocks[layer].attention.prior.log_prior(20, 20).detach().double()
        logits = (plan.scores + own.repeat_interleave(2, dim=0)).mean(0).numpy()[:, :n, :n]
        weights = plan.weights.mean(0).numpy()[:, :n, :n]
        for name, wanted in (("map_logits", logits), ("map_probability", weights)):
            np.testing.assert_allclose(
                profile[name][layer], np.where(tri, wanted, np.nan), atol=1e-5, err_msg=name
            )
        np.testing.assert_array_equal(profile["map_allowed"][layer], tri)
    assert profile["map_query"].values.tolist() == profile["map_key"].values.tolist()
    assert "map_logits" not in sink_profile(model, x)


def test_maps_of_an_additive_bias_hold_it():
    model, x = reader("t5", num_layers=1), ids(2, 20, vocab=50)
    profile = sink_profile(model, x, maps=20)
    weights = eager(model, x)[0]
    np.testing.assert_allclose(profile["map_probability"][0], weights.mean(0), atol=2e-5)
    single = sink_profile(model, x[:1], maps=20)
    soft = torch.as_tensor(single["map_logits"][0].values).softmax(-1)
    np.testing.assert_allclose(soft, weights[0], atol=2e-5)
    assert "counts as prior" in profile.attrs["notes"]
    assert np.isnan(profile["prior_first_low"]).all()


def test_norms_are_those_of_hooks_by_hand():
    model = reader("gpt2")
    with torch.no_grad():
        model.wte.weight[7, 3] = 1e5
    x, y = ids(2, 20, vocab=7), ids(1, 24, seed=1, vocab=7)
    x[:, 5], y[:, 9] = 7, 7
    blocks, values = [], []
    handles = [b.register_forward_hook(lambda _m, _a, out: blocks.append(out)) for b in model.h]
    handles += [
        b.attn.c_attn.register_forward_hook(lambda _m, _a, out: values.append(out[..., 64:]))
        for b in model.h
    ]
    with torch.no_grad():
        for one in (x[:1], x[1:], y):
            model(one)
    for handle in handles:
        handle.remove()
    profile = sink_profile(model, [x, y], norms=True)
    blocks = [b[0] if isinstance(b, tuple) else b for b in blocks]
    for state in range(2):
        hidden, own = blocks[state::2], values[state::2]
        found = {"hidden_norm": [], "hidden_largest": [], "massive": [], "value_norm": []}
        medians = []
        for h, v in zip(hidden, own, strict=True):
            medians.append(h.abs().median())
            bound = max(MASSIVE[0], MASSIVE[1] * medians[-1])
            found["hidden_norm"].append(h[0].norm(dim=-1))
            found["hidden_largest"].append(h[0].abs().amax(-1))
            found["massive"].append((h[0].abs() > bound).sum(-1).float())
            found["value_norm"].append(v[0].view(-1, 4, 8).norm(dim=-1).mean(-1))
        for name, rows in found.items():
            wanted = np.full((3, 24), np.nan)
            for at, row in enumerate(rows):
                wanted[at, : len(row)] = row
            np.testing.assert_allclose(
                profile[name][state], np.nanmean(wanted, axis=0), rtol=1e-5, err_msg=name
            )
        assert profile["hidden_median"][state].item() == pytest.approx(np.mean(medians), rel=1e-5)
        massive = profile["massive"][state].values
        assert massive[5] == pytest.approx(2 / 3) and massive[9] == pytest.approx(1 / 3)
        assert massive.sum() == pytest.approx(1.0)
    assert profile["massive"].dims == ("state", "key")
    assert "value_norm" not in sink_profile(model, x) and not model.h[0]._forward_hooks


class Tokenizer:
    """One token a character."""

    def __call__(self, text, return_tensors):
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(c) % 50 for c in text]])}

    def convert_ids_to_tokens(self, numbers):
        return [HOSTILE[number % len(HOSTILE)] for number in numbers]


class IdsTokenizer(Tokenizer):
    """goatviz models take `ids`, not `input_ids`."""

    def __call__(self, text, return_tensors):
        return {"ids": super().__call__(text, return_tensors)["input_ids"] % 20}


def test_tokens_are_read_from_the_tokenizer_or_given(tmp_path):
    model, text = reader("gpt2"), "how long is a sink?!"
    profile = sink_profile(model, text, tokenizer=Tokenizer())
    wanted = [piece_text(HOSTILE[ord(c) % 50 % len(HOSTILE)]) for c in text]
    assert profile["token"].values.tolist() == wanted
    given = Tokenizer()(text, return_tensors="pt")["input_ids"]
    by_ids = sink_profile(model, given, tokenizer=Tokenizer())
    assert by_ids.identical(profile)
    several = sink_profile(model, [text, text], tokenizer=Tokenizer())
    assert "token" not in several and several.attrs["n_inputs"] == 2
    named = sink_profile(lm(), text, tokenizer=IdsTokenizer())
    wanted = map(piece_text, Tokenizer().convert_ids_to_tokens((given[0] % 20).tolist()))
    assert named["token"].values.tolist() == list(wanted)
    plain = sink_profile(model, given, tokenizer=lambda text, return_tensors: None)
    assert "token" not in plain
    own = sink_profile(model, given, tokens=HOSTILE * 2, tokenizer=Tokenizer(), maps=8, norms=True)
    assert own["token"].values.tolist() == HOSTILE * 2
    loaded = load_result(save_result(own, tmp_path / "own.nc"))
    assert loaded.identical(own)
    for kind in SINK_KINDS:
        draw_sinks(loaded, kind=kind)


def test_tokens_that_no_file_can_hold_are_spelt_out(tmp_path):
    tokens = ["\0", "a\0b", "\ud800", *("x" * 17)]
    profile = sink_profile(reader("gpt2"), ids(1, 20, vocab=50), tokens=tokens)
    assert profile["token"].values.tolist()[:3] == ["\\x00", "a\\x00b", "\\ud800"]
    assert load_result(save_result(profile, tmp_path / "odd.nc")).identical(profile)


# --- names ---


def test_checkpoints_have_names():
    x = torch.randint(32, (2, 40), generator=torch.Generator().manual_seed(0))
    checkpoint = load_pretrained("copy-mixture-1-goat")
    named, bare = sink_profile(checkpoint, x), sink_profile(checkpoint.model, x)
    assert named.attrs["source"] == "copy-mixture-1-goat" and bare.attrs["source"] == "CausalLM"
    assert named["importance"].identical(bare["importance"])


# --- what is refused ---


@pytest.mark.parametrize("length", [1, 2, 15])
def test_short_inputs_warn(length):
    with pytest.warns(UserWarning, match=f"the shortest input has {length} tokens: below 16"):
        profile = sink_profile(lm(), ids(2, length), min_observers=1, maps=True, spectra=True)
    assert profile["importance"].shape == (2, 4, length)
    for kind in SINK_KINDS:
        draw_sinks(profile, kind=kind)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"threshold": -0.1}, ValueError, r"threshold must be in \[0, 1\), got -0.1"),
        ({"threshold": 1.0}, ValueError, r"got 1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be"),
        ({"min_observers": 0}, ValueError, "min_observers must be an integer of at least 1, got 0"),
        ({"min_observers": 2.0}, TypeError, "min_observers must be an integer of at least 1"),
        ({"resamples": True}, TypeError, "resamples must be an integer of at least 1, got True"),
        ({"recent": 0}, ValueError, "recent must be an integer of at least 1, got 0"),
        ({"maps": -3}, ValueError, "maps must be True, False or a positive number.*got -3"),
        ({"maps": 2.7}, TypeError, "maps must be True, False or a positive number.*got 2.7"),
        ({"maps": "8"}, TypeError, "maps must be True, False or a positive number.*got '8'"),
        ({"inputs": ids(1, 20) + 1}, ValueError, r"token ids in 0 \.\. 19.*got 20: is the token"),
        ({"inputs": ids(1, 20) - 1}, ValueError, r"token ids in 0 \.\. 19.*got -1"),
        ({"layers": 2}, ValueError, r"layers must be numbers in 0 \.\. 1"),
        ({"tokens": ["a"]}, ValueError, "tokens must hold 20 texts, one for each key, got 1"),
        ({"inputs": None}, TypeError, "inputs must be given with a model"),
        ({"inputs": "text"}, TypeError, "inputs are texts: pass tokenizer="),
        ({"inputs": 3}, TypeError, "inputs must be a Tensor, a mapping.*got int"),
    ],
)
def test_bad_arguments_are_named(options, error, match):
    given = {"inputs": ids(1, 20), **options}
    with pytest.raises(error, match=match):
        sink_profile(lm(), **given)


def test_texts_must_fit_the_models_positions_and_vocabulary():
    learned = lm("learned")
    sink_profile(learned, ids(1, 32))
    with pytest.raises(ValueError, match="at most 32 tokens .the model's positions., got 33: cut"):
        sink_profile(learned, [ids(1, 20), ids(1, 33)])
    # Where positions are computed, length is what is studied.
    sink_profile(lm("rope"), ids(1, 40))
    for name in ("gpt2", "llama", "bert"):
        for model in (reader(name), tiny_huggingface(name)):
            with pytest.raises(ValueError, match="at most 64 tokens .*got 65"):
                sink_profile(model, {"input_ids": ids(1, 65, vocab=50)})
            with pytest.raises(ValueError, match=r"ids in 0 \.\. 49 .*got 7\d+: is the tokenizer"):
                sink_profile(model, {"input_ids": ids(1, 20, vocab=50) + 750})
    # Relative positions have no end.
    sink_profile(reader("t5"), ids(1, 80, vocab=50))


def test_models_without_numbers_or_with_quantised_weights_are_refused():
    for empty in (lm().to("meta"), reader("gpt2").to("meta")):
        with pytest.raises(ValueError, match="model must hold numbers, got one on the meta device"):
            sink_profile(empty, ids(1, 20))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = reader("llama")
        for layer in model.layers:
            weight = layer.self_attn.q_proj.weight.detach().to(dtype)
            layer.self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(TypeError, match=f"weights that give float scores, got {dtype}: load"):
            sink_profile(model, ids(1, 20, vocab=50))
    eighth = torch.zeros(1, 1, 4, 8).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="q must be of at least 16 bits, got torch.float8_e4m3fn"):
        AttentionCall.from_tensors(eighth, eighth)
    # Weights that are quantised and give floats are none of these.
    model = reader("llama")
    dynamic = copy.deepcopy(model)
    for layer in dynamic.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    found, wanted = (sink_profile(one, ids(1, 20, vocab=50)) for one in (dynamic, model))
    np.testing.assert_allclose(found["entropy"], wanted["entropy"], atol=0.1)
    # What fails for another reason says that.
    with pytest.raises(TypeError, match="unexpected keyword argument 'idz'"):
        sink_profile(lm(), {"idz": ids(1, 20)})


class Packed(nn.Module):
    """A linear layer of 8 bits that multiplies floats."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).T


@pytest.mark.parametrize("source", [3, "gpt2", None, ALiBiPrior])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match="source must be a model, a Checkpoint or a Record, got"):
        sink_profile(source, ids(1, 20))


def test_models_without_attention_or_blocks_are_refused():
    with pytest.raises(TypeError, match="attention that cannot be captured"):
        sink_profile(nn.Linear(4, 4), torch.zeros(1, 20, 4))
    with pytest.raises(ValueError, match="norms needs blocks in a ModuleList"):
        sink_profile(Attention(8, 2), torch.zeros(1, 20, 8), norms=True)


def recorded(**options):
    model = lm()
    with capture(model, **options) as record:
        model(ids(1, 20))
    return record


def test_records_that_cannot_be_profiled_say_why():
    record = recorded()
    for options, error, match in (
        ({"inputs": ids(1, 20)}, TypeError, "inputs must not be given with a Record"),
        ({"layers": 0}, TypeError, "layers must not be given with a Record"),
        ({"norms": True}, ValueError, "norms needs the model and inputs"),
        ({"maps": True}, ValueError, "keep='projections'"),
    ):
        with pytest.raises(error, match=match):
            sink_profile(record, **options)
    with pytest.raises(ValueError, match="record lacks entropy"):
        names = [n for n in vars(record.calls[0].rows) if n != "entropy"][:12]
        sink_profile(recorded(statistics=[n for n in names if n != "visible"] + ["incoming_mass"]))
    with pytest.raises(ValueError, match="record must hold log_normaliser"):
        sink_profile(recorded(statistics=["entropy"]))
    with pytest.raises(ValueError, match=r"mass of key 0 first, got \(3, 0\)"):
        sink_profile(recorded(keys=(3, 0)))
    with capture(lm()) as empty:
        pass
    with pytest.raises(ValueError, match="record must hold an attention call"):
        sink_profile(empty)


def test_records_of_cached_decoding_and_left_padding_are_refused():
    layer, x = Attention(8, 2), torch.randn(1, 20, 8)
    cache = LayerCache()
    layer(x, cache=cache)
    with capture(layer) as record:
        layer(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match="1 queries over 21 keys; sinks need whole sequences"):
        sink_profile(record)
    model, mask = reader("gpt2"), torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    with capture(model) as record:
        model(ids(2, 20, vocab=50), attention_mask=mask)
    with pytest.raises(ValueError, match="padded on the left"):
        sink_profile(record)


def test_layers_called_unequally_often_are_refused():
    model = lm()
    with capture(model) as record:
        model(ids(1, 20))
    record.calls.append(record.calls[0])
    with pytest.raises(ValueError, match=r"equally often, got \[1, 2\] inputs"):
        sink_profile(record)


def test_queries_that_cannot_see_the_first_key_tell_nothing_of_the_sink():
    model = reader("mistral", sliding_window=20, num_hidden_layers=1)
    profile = sink_profile(model, ids(2, 60, vocab=50))
    assert (profile["observers"].values[0, :41] == 40).all()
    assert (profile["signal_count"].sum(["range_bin", "mass_bin"]) == 2 * 19).all()
    np.testing.assert_allclose(profile["prior_first_low"], 1 / 20, rtol=1e-4)
    np.testing.assert_allclose(profile["prior_first_high"], 1 / 2, rtol=1e-4)
    layer = Attention(8, 1, prior=SinkPrior(1, rank=0, training_length=8))
    keep = torch.ones(1, 24, dtype=torch.bool)
    keep[0, 20:] = False
    with torch.no_grad():
        layer.prior.bump.fill_(3.0)
    with capture(layer) as record:
        layer(torch.randn(1, 24, 8), padding_mask=keep)
    log_prior = layer.prior.log_prior([19], 20).detach()[0, 0]
    wanted = float(log_prior[0] - log_prior[1:].max())
    assert float(sink_profile(record)["margin"][0, 0]) == pytest.approx(wanted, abs=1e-5)


# --- more signs of a sink ---


def test_effective_rank_and_second_sinks_are_those_of_the_plan():
    model, inputs = tiny_huggingface("gpt-oss"), ids(2, 24, vocab=50)
    with capture(model, keep="projections", statistics=[]) as record, torch.no_grad():
        model(inputs)
    profile = sink_profile(model, inputs, min_observers=4)
    for layer, head in ((0, 1), (1, 3)):
        each = []
        importance = 0
        for batch in range(2):
            window = record.plan(layer=layer, head=head, batch=batch)
            rows = torch.cat([window.weights, window.sink_weight[:, None]], dim=-1)
            mean = rows.mean(0)
            information = torch.special.entr(mean).sum() - torch.special.entr(rows).sum(-1).mean()
            each.append(information.exp())
            importance = importance + window.weights.sum(0) / window.allowed.sum(0) / 2
        one = profile.sel(layer=layer, head=head)
        np.testing.assert_allclose(one["effective_rank"], np.mean(each), rtol=1e-5)
        later = importance[1:21]
        np.testing.assert_allclose(one["second_importance"], later.max(), rtol=1e-5)
        assert int(one["second_key"]) == 1 + int(later.argmax())


def test_a_plan_of_equal_rows_has_effective_rank_one():
    model = tiny_huggingface("bert")
    for layer in model.encoder.layer:
        # Without queries all rows are the keys' biases, none.
        for part in layer.attention.self.query.parameters():
            torch.nn.init.zeros_(part)
    profile = sink_profile(model, ids(2, 20, vocab=50))
    np.testing.assert_allclose(profile["effective_rank"], 1.0, atol=1e-5)


def test_spectra_of_hidden_states():
    model = tiny_huggingface("llama")
    texts = [ids(1, 30, vocab=50, seed=1), ids(1, 50, vocab=50, seed=2)]
    profile = sink_profile(model, texts, spectra=True)
    entropies, shares, ratios = [], [], []
    for text in texts:
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
        # The last one is normalised before it is returned.
        powers = np.linalg.svd(states[1][0].double().numpy(), compute_uv=False) ** 2
        powers = powers / powers.sum()
        entropies.append(-(powers * np.log(powers)).sum())
        shares.append(powers.max())
        norms = states[1][0].norm(dim=-1)
        ratios.append(float(norms[0] / norms[1:].mean()))
    first = profile.sel(state=0)
    np.testing.assert_allclose(first["hidden_entropy"], np.mean(entropies), rtol=1e-5)
    np.testing.assert_allclose(first["hidden_anisotropy"], np.mean(shares), rtol=1e-5)
    np.testing.assert_allclose(first["norm_ratio"], np.mean(ratios), rtol=1e-5)


def test_spectra_are_computed_when_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    profile = sink_profile(tiny_huggingface("llama"), ids(1, 30, vocab=50), norms=True)
    assert "norm_ratio" in profile and "hidden_entropy" not in profile
    with pytest.raises(ValueError, match="spectra needs the model and inputs"):
        with capture(tiny_huggingface("llama")) as record:
            pass
        sink_profile(record, spectra=True)
