"""prior_profile against the dense float64 prior, at any length, and its refusals."""

import resource

import numpy as np
import pytest
import torch
from goat import GoatAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from goatviz.analysis import PriorSource, prior_profile, prior_sources, prior_summary
from goatviz.analysis.prior import has_explicit_prior
from goatviz.attention import Attention
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    RecencyPrior,
    SinkPrior,
    SpectralPrior,
    UniformPrior,
)
from goatviz.transport import off_sink_bound
from tests.factories import tiny_huggingface


def lively_prior(heads=2, training_length=64, seed=0):
    torch.manual_seed(seed)
    prior = goat_prior(heads, rank=3, sink_rank=2, training_length=training_length)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.7)
    return prior


def dense(prior, length, *, causal=True):
    """K, the allowed keys, and the induced prior: the definition, with an L x L array."""
    k = prior.double().log_prior(length, length).detach().double()
    allowed = torch.ones(length, length, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    return k, allowed, k.masked_fill(~allowed, -torch.inf).softmax(-1)


PRIORS = {
    "goat": lively_prior,
    "alibi": lambda: ALiBiPrior(2),
    "symmetric": lambda: ALiBiPrior(2, symmetric=True),
    "bucket": lambda: nn.init.normal_(p.table) is not None and p if (p := BucketPrior(2)) else p,
    "uniform": lambda: UniformPrior(2),
    "rank 0": lambda: SpectralPrior(2, rank=0),
    "scaled": lambda: -0.5 * lively_prior(),
    "shared": lambda: lively_prior() + ALiBiPrior(1),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("name", PRIORS)
def test_a_short_profile_is_the_dense_prior(name, length, causal):
    prior = PRIORS[name]()
    profile = prior_profile(prior, length=length, causal=causal).isel(layer=0)
    k, allowed, induced = dense(prior, length, causal=causal)
    mean = torch.where(allowed, k, 0.0).sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True)
    for field, wanted in (("log_prior", k), ("row_centred", k - mean), ("probability", induced)):
        got = profile[field].values
        assert np.array_equal(np.isnan(got), ~allowed.expand_as(k).numpy()), field
        shown = np.where(allowed, got, 0.0)
        np.testing.assert_allclose(shown, np.where(allowed, wanted, 0.0), atol=3e-5, err_msg=field)
    masked = k.masked_fill(~allowed, -torch.inf)
    np.testing.assert_array_equal(profile["allowed"].values, allowed.expand_as(k).numpy())
    if length > 1:
        top = masked.topk(2, dim=-1).values
        margin = profile["margin"].values
        np.testing.assert_allclose(margin[:, 1:], (top[..., 0] - top[..., 1])[:, 1:], atol=1e-9)
    np.testing.assert_allclose(
        profile["top_mass"].values, induced.max(-1).values.numpy(), atol=1e-9
    )
    entropy = torch.special.entr(induced).sum(-1)
    np.testing.assert_allclose(profile["prior_entropy"].values, entropy, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_parts_add_up_to_the_whole(causal):
    length = 40
    prior = lively_prior()
    profile = prior_profile(prior, length=length, causal=causal).isel(layer=0)
    k, allowed, _ = dense(prior, length, causal=causal)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    at = {int(value): place for place, value in enumerate(profile["lag"].values)}
    places = np.array([[at.get(int(value), 0) for value in row] for row in lag])
    rebuilt = profile["kernel"].values[:, places] + profile["sink"].values[:, None, :]
    np.testing.assert_allclose(np.where(allowed, rebuilt - k.numpy(), 0.0), 0.0, atol=1e-9)
    np.testing.assert_allclose(
        profile["kernel"], profile["relative"] + profile["recency"], atol=1e-12
    )
    slope = profile["recency_slope"].values
    np.testing.assert_allclose(slope, prior.parts[2].slope().detach().numpy(), atol=1e-9)
    zero = at[0]
    assert (profile["recency"].values[:, zero] == 0).all()


def test_the_spectrum_rebuilds_the_relative_term():
    profile = prior_profile(lively_prior(), length=50).isel(layer=0)
    phase = (
        profile["frequency"].values * profile["lag"].values[:, None]
        - (profile["phase"].values[:, None, :])
    )
    rebuilt = (profile["amplitude"].values[:, None, :] * np.cos(phase)).sum(-1)
    np.testing.assert_allclose(rebuilt, profile["relative"].values, atol=1e-9)


@settings(max_examples=25)
@given(
    length=st.integers(2, 300),
    resolution=st.integers(2, 40),
    points=st.integers(8, 64),
    causal=st.booleans(),
)
def test_pooled_is_exact_aggregated(length, resolution, points, causal):
    prior = lively_prior()
    whole = prior_profile(prior, length=length, resolution=300, points=300, causal=causal)
    pooled = prior_profile(
        prior, length=length, resolution=resolution, points=points, causal=causal
    )
    rows = pooled["query"].values
    edges = pooled["key_bin"].values
    full = np.nan_to_num(whole["probability"].values[:, :, rows].astype(float))
    mass = np.add.reduceat(full, edges, axis=-1)
    np.testing.assert_allclose(np.nan_to_num(pooled["probability"].values), mass, atol=1e-6)
    for field in ("margin", "margin_key", "top_mass", "prior_entropy"):
        np.testing.assert_allclose(pooled[field], whole[field].sel(query=rows), atol=1e-9)
    for field, dim in (("sink", "key"), ("kernel", "lag")):
        exact = whole[field].values[0]
        first = whole[dim].values[0]
        for index, (start, stop) in enumerate(
            zip(pooled[dim].values, pooled[f"{dim}_stop"].values, strict=True)
        ):
            piece = exact[:, start - first : stop - first]
            np.testing.assert_allclose(pooled[field].values[0][:, index], piece.mean(-1), atol=1e-9)
            low, high = (pooled[f"{field}_{end}"].values[0][:, index] for end in ("low", "high"))
            np.testing.assert_allclose(low, piece.min(-1), atol=1e-12)
            np.testing.assert_allclose(high, piece.max(-1), atol=1e-12)


def test_a_window_is_exact_and_normalised_over_the_whole_row():
    prior, length = lively_prior(), 200
    profile = prior_profile(
        prior, length=length, queries=slice(150, 160), keys=slice(140, 170), resolution=8
    ).isel(layer=0)
    _, allowed, induced = dense(prior, length)
    window = np.where(allowed[150:160, 140:170], induced[:, 150:160, 140:170], np.nan)
    np.testing.assert_allclose(profile["probability"].values, window, atol=1e-6)
    assert profile["key_bin"].values.tolist() == list(range(140, 170))
    negative = prior_profile(prior, length=length, queries=slice(-3, None), keys=slice(None, 5))
    assert negative["query"].values.tolist() == [197, 198, 199]


def test_memory_stays_far_below_the_square():
    length = 400_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    profile = prior_profile(lively_prior(), length=length, resolution=32)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 1200, f"{grown:.0f} MiB; the square would be {length**2 * 8 / 2**20:.0f}"
    assert profile.nbytes < 1_000_000
    np.testing.assert_allclose(profile["probability"].sum("key_bin"), 1.0, atol=1e-5)


@settings(max_examples=20)
@given(margin=st.floats(0.0, 30.0), length=st.integers(2, 500))
def test_margin_law(margin, length):
    sink = SinkPrior(1, rank=0, training_length=8, init="uniform").double()
    with torch.no_grad():
        sink.bump.fill_(margin)
    last = prior_profile(sink, length=length).isel(layer=0, head=0, query=-1)
    assert last["margin"].item() == pytest.approx(margin, abs=1e-9)
    bound = off_sink_bound(margin, length)
    assert 1 - last["top_mass"].item() <= bound + 1e-9
    # Flat competitors attain the bound.
    assert 1 - last["top_mass"].item() == pytest.approx(bound, abs=1e-9)


# --- layers, heads, sources ---


class TwoKinds(nn.Module):
    """Layers with different head counts and different priors."""

    def __init__(self):
        super().__init__()
        self.first = Attention(32, 4, num_kv_heads=2, prior=lively_prior(2), content_dim=8)
        self.second = Attention(32, 4, prior=ALiBiPrior(4), content_dim=8)


def test_layers_may_have_different_heads():
    profile = prior_profile(TwoKinds(), length=16)
    assert profile["layer_name"].values.tolist() == ["first", "second"]
    assert profile["present"].values.tolist() == [[True, True, False, False], [True] * 4]
    assert np.isnan(profile["kernel"].sel(layer=0, head=3)).all()
    alone = prior_profile(ALiBiPrior(4), length=16)
    np.testing.assert_array_equal(profile["kernel"].sel(layer=1), alone["kernel"].sel(layer=0))


def test_selecting_is_the_same_as_selecting_afterwards():
    model = CausalLM(ModelConfig(vocab_size=8, training_length=32, num_layers=3))
    whole = prior_profile(model)
    part = prior_profile(model, layers=[2, 0], heads=1)
    assert part.attrs["length"] == 32 and part.attrs["num_layers"] == 3
    np.testing.assert_array_equal(part["log_prior"], whole["log_prior"].sel(layer=[2, 0], head=[1]))


def test_layers_are_chosen_by_the_numbers_of_their_sources():
    sources = [PriorSource(f"layer {n}", ALiBiPrior(n), True, layer=n) for n in (3, 7)]
    assert prior_profile(sources, length=8)["layer"].values.tolist() == [3, 7]
    one = prior_profile(sources, length=8, layers=7)
    assert one["layer"].values.tolist() == [7]
    assert one["layer_name"].values.tolist() == ["layer 7"] and one.sizes["head"] == 7
    with pytest.raises(ValueError, match="layers must be one of 3, 7; got 0"):
        prior_profile(sources, length=8, layers=0)


def test_goat_attention_inside_is_found():
    model = nn.Sequential(nn.Linear(64, 64), GoatAttention(64, 2, training_seq_len=48))
    profile = prior_profile(model)
    assert profile["layer_name"].values.tolist() == ["1"]
    assert profile.attrs["length"] == profile.attrs["training_length"] == 48
    gated = GoatAttention(64, 2, prior_gate="query_norm", pos_encoding="auto")
    notes = prior_profile(gated, length=20).attrs["notes"]
    assert "query" in notes and "training_seq_len" in notes and "auto" in notes


def test_a_length_dependent_module_is_read_at_the_profile_length():
    torch.manual_seed(0)
    goat = GoatAttention(64, 2)
    nn.init.normal_(goat.key_bias.fc1.weight)
    nn.init.normal_(goat.key_bias.fc2.weight)
    model = nn.ModuleList([GoatAttention(64, 2, training_seq_len=24), goat])
    sink = prior_profile(model)["sink"].sel(layer=1, head=0).values
    same = prior_profile(goat, length=24)["sink"].sel(layer=0, head=0).values
    np.testing.assert_array_equal(sink, same)


def test_the_source_is_left_alone():
    prior = lively_prior()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    prior_profile(prior, length=20)
    for name, value in prior.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in prior.parameters())


def test_summary_says_where_sink_and_kernel_point():
    prior = RecencyPrior(1, slopes=[2.0]) + SinkPrior(1, rank=0, training_length=8, init="uniform")
    with torch.no_grad():
        prior.parts[1].bump.fill_(50.0)
    (sentence,) = prior_summary(prior_profile(prior, length=8))
    assert "top key 0" in sentence and "kernel highest at lag 0" in sentence
    (flat,) = prior_summary(prior_profile(UniformPrior(), length=8))
    assert "no top key" in flat and "kernel flat" in flat


def test_a_list_of_sources_may_be_read_in_both_directions():
    sources = prior_sources(ALiBiPrior(1))
    assert prior_profile(sources, length=4, causal=False)["lag"].values.tolist() == [*range(-3, 4)]


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (nn.Linear(2, 2), "pass a Prior"),
        (nn.MultiheadAttention(8, 2), r"plot_prior\(model, inputs\).*implied_prior"),
        (nn.TransformerEncoderLayer(8, 2), r"plot_prior\(model, inputs\)"),
        (tiny_huggingface("gpt2"), r"plot_prior\(model, inputs\)"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_model_without_a_prior_says_what_to_call(source, advice):
    assert not has_explicit_prior(source)
    for take_apart in (prior_sources, prior_profile):
        with pytest.raises(TypeError, match=f"no explicit prior.*{advice}"):
            take_apart(source)


@pytest.mark.parametrize("name", PRIORS)
def test_whatever_has_a_prior_is_known_to_have_one(name):
    prior = PRIORS[name]()
    assert has_explicit_prior(prior)
    # A uniform prior inside a layer is standard attention.
    assert has_explicit_prior(Attention(32, 2, prior=prior)) == (name != "uniform")
    assert has_explicit_prior(GoatAttention(64, 2))


# --- which head tells most ---


def test_heads_are_ranked_by_margin_and_by_kernel():
    profile = prior_profile(TwoKinds(), length=16)
    there = profile["present"].values
    margin = profile["margin"].isel(query=-1).values
    for name, values in (("margin_rank", margin), ("kernel_rank", profile["kernel_range"].values)):
        places = profile[name].values
        assert (places[~there] == -1).all() and sorted(places[there]) == list(range(6))
        order = np.argsort(places[there])
        assert (np.diff(values[there][order]) <= 0).all()
    # The steepest of ALiBi's slopes, 1/4, over 15 lags.
    alibi = profile["kernel_range"].sel(layer=1)
    np.testing.assert_allclose(alibi, 15 * 0.25 ** np.arange(1.0, 5.0))
    np.testing.assert_array_equal(profile["relative_range"].sel(layer=1), 0.0)
    # Nothing tells more than the rest: the first comes first.
    flat = prior_profile(UniformPrior(3), length=8)
    assert flat["margin_rank"].values.tolist() == [[0, 1, 2]]


def test_ranges_are_exact_where_curves_are_pooled():
    prior = lively_prior()
    pooled = prior_profile(prior, length=3000, points=16)
    kernel = prior_profile(prior, length=3000, points=3000)["kernel"]
    np.testing.assert_allclose(pooled["kernel_range"], np.ptp(kernel.values, axis=-1), atol=1e-9)


def test_profiles_of_earlier_versions_are_profiles():
    profile = prior_profile(ALiBiPrior(2), length=8)
    old = profile.drop_vars(["margin_rank", "kernel_rank", "kernel_range", "relative_range"])
    assert prior_summary(old) == prior_summary(profile)
    # Selecting a head drops its dimension.
    assert prior_summary(profile.isel(layer=0, head=1)) == prior_summary(profile)[1:]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"length": 0}, ValueError, "length must be an integer of at least 1, got 0"),
        ({"length": 2.5}, TypeError, "length must be an integer.*got 2.5"),
        ({"length": True}, TypeError, "length"),
        ({"layers": 1}, ValueError, "layers must be an integer in 0 .. 0, got 1"),
        ({"heads": [0, 2]}, ValueError, "heads must be an integer in 0 .. 1, got 2"),
        ({"heads": -1}, ValueError, "heads must be an integer in 0 .. 1, got -1"),
        ({"heads": []}, ValueError, "heads must name at least one of 0 .. 1, got none"),
        ({"heads": [0.5]}, TypeError, "heads must be an integer.*got 0.5"),
        ({"queries": slice(0, 100)}, ValueError, "queries must lie within 16 tokens"),
        ({"keys": slice(5, 5)}, ValueError, "keys must be a non-empty window of 0 .. 16"),
        ({"keys": slice(0, 8, 2)}, ValueError, "keys must have a step of 1"),
        ({"keys": 3}, TypeError, "keys must be a slice, got int"),
        ({"points": 7}, ValueError, "points must be an integer of at least 8, got 7"),
        ({"resolution": 1}, ValueError, "resolution must be an integer of at least 2, got 1"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        prior_profile(ALiBiPrior(2), **{"length": 16, **options})


def test_other_sources_are_refused():
    with pytest.raises(TypeError, match="source must be a goatviz Prior, a model.*got str"):
        prior_profile("gpt2")
    with pytest.raises(ValueError, match=r"grid of 2 axes.*grid_positions"):
        prior_profile(SpectralPrior(1, rank=2, axes=2), length=4)
