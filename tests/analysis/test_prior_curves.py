"""The engine of priors against dense float64 sums, whatever the tiles, scales and ties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import goatviz.analysis.prior_curves as module
from goatviz.analysis import prior_profile, prior_summary
from goatviz.analysis.prior_curves import (
    PriorCurves,
    PriorSource,
    binned_log_prior,
    component_names,
    even_rows,
    induced_rows,
    key_bins,
    lag_edges,
)
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, KeyTablePrior, LagTablePrior, Prior, SpectralPrior
from tests.factories import lively


def oracle(sink, kernel, queries, edges):
    """The definition: every log-prior in a heads x queries x keys array of float64."""
    sink, kernel = torch.tensor(sink), torch.tensor(kernel)
    length = sink.shape[-1]
    lags = torch.tensor(queries)[:, None] - torch.arange(length)
    seen = lags >= length - kernel.shape[-1]
    k = kernel[:, lags - (length - kernel.shape[-1])] + sink[:, None]
    weights = k.masked_fill(~seen, -math.inf).softmax(-1)
    top = torch.nn.functional.pad(k.masked_fill(~seen, -math.inf), (0, 1), value=-math.inf)
    best = top.topk(2, dim=-1).values
    mean = (k * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    count = np.add.reduceat(seen.numpy().astype(float), edges[:-1], axis=-1)
    with np.errstate(invalid="ignore"):
        binned, centred = (
            np.add.reduceat((part * seen).numpy(), edges[:-1], axis=-1) / count
            for part in (k, k - mean)
        )
    mass = np.add.reduceat(weights.numpy(), edges[:-1], axis=-1)
    return {
        "margin": (best[..., 0] - best[..., 1]).numpy(),
        "margin_key": top.argmax(-1).double().numpy(),
        "top_mass": weights.amax(-1).numpy(),
        "prior_entropy": torch.special.entr(weights).sum(-1).numpy(),
        "probability": np.where(count > 0, mass, np.nan),
        "log_prior": binned,
        "row_centred": centred,
    }


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 70),
    most=st.integers(1, 70),
    bins=st.integers(1, 70),
    # Flat, of a learned prior's size, and so steep that most weights are 0 in float64.
    size=st.sampled_from([0.0, 1.0, 30.0, 2000.0]),
    tile=st.sampled_from([1, 7, 64, 1 << 16]),
    causal=st.booleans(),
)
def test_rows_are_those_of_the_dense_prior(seed, length, most, bins, size, tile, causal):
    random = np.random.default_rng(seed)
    sink = size * random.standard_normal((3, length))
    kernel = size * random.standard_normal((3, length if causal else 2 * length - 1))
    # Whole numbers make ties, of which the first key counts.
    sink[2], kernel[2] = sink[2].round(), kernel[2].round()
    queries, edges = even_rows(length, most), key_bins(length, bins)
    wanted = oracle(sink, kernel, queries, edges)
    before = module._TILE, module._WIDTH
    try:
        module._TILE, module._WIDTH = tile, max(1, tile // 3)
        rows = induced_rows(sink, kernel, queries, edges)
    finally:
        module._TILE, module._WIDTH = before
    rows |= binned_log_prior(sink, kernel, queries, edges)
    for name, values in wanted.items():
        close = 1e-5 * max(size, 1.0) if name in ("log_prior", "row_centred") else 1e-9
        np.testing.assert_allclose(rows[name], values, rtol=1e-9, atol=close, err_msg=name)


def test_a_margin_beyond_what_float64_can_weigh_is_exact():
    sink = np.zeros((1, 50))
    sink[0, 7], sink[0, 3] = 5000.0, 1000.0
    rows = induced_rows(sink, np.zeros((1, 50)), np.arange(50), np.arange(51))
    assert rows["margin"][0, 49] == 4000.0 and rows["margin_key"][0, 49] == 7
    assert rows["top_mass"][0, 49] == 1.0 and rows["probability"][0, 49, 3] == 0.0
    assert 0 <= rows["prior_entropy"][0, 49] < 1e-290


def curves_of(prior, length, *, causal=True, heads=None):
    heads = range(prior.num_heads) if heads is None else heads
    return PriorCurves(PriorSource("prior", prior, causal), heads, length)


@pytest.mark.parametrize("causal", [True, False])
def test_curves_add_up_to_the_prior(causal, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    prior = lively(goat_prior(3, rank=3, sink_rank=2, training_length=64)) + ALiBiPrior(1)
    curves = curves_of(prior, 30, causal=causal, heads=[2, 0])
    lags = np.arange(30)[:, None] - np.arange(30)
    kernel = curves.relative() + curves.recency()
    summed = kernel[:, lags - curves.first_lag] + curves.sink()[:, None]
    wanted = prior.double().log_prior(30, 30).detach().numpy()[[2, 0]]
    seen = lags >= curves.first_lag
    np.testing.assert_allclose(np.where(seen, summed - wanted, 0), 0, atol=1e-12)
    assert curves.misfit() == 0 and curves.finite
    np.testing.assert_array_equal(curves.sink(2.0), 2.0 * curves.sink())
    assert not curves.relative(0.0).any()


def test_edges_cover_both_sides():
    assert lag_edges(3, 8, causal=True).tolist() == [0, 1, 2, 3]
    assert lag_edges(3, 8, causal=False).tolist() == [-2, -1, 0, 1, 2, 3]
    assert even_rows(10, 4).tolist() == [0, 3, 6, 9]
    assert key_bins(10, 4).tolist() == [0, 3, 6, 9, 10]


def test_components_of_a_scaled_sum_and_of_an_empty_spectrum():
    assert component_names(-0.5 * (ALiBiPrior(1) + SpectralPrior(1, rank=2))) == (
        "relative",
        "recency",
    )
    assert component_names(2.0 * SpectralPrior(1, rank=0)) == ()


# --- priors that are not a sum of curves, or not finite ---


class Crossed(Prior):
    """No sum of functions of the lag and of the key."""

    has_lanes = False

    def _log_prior(self, query, key):
        return torch.sin(query[:, :1] * key[:, 0]).unsqueeze(0)


class Window(Prior):
    """A function of the lag, minus infinity from lag 5 on."""

    has_lanes = False

    def _log_prior(self, query, key):
        lag = query[:, :1] - key[:, 0]
        return torch.where(lag < 5, 0.1 * lag, -math.inf).unsqueeze(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prior", [Crossed(), Window(), Crossed() + ALiBiPrior(2)])
def test_any_prior_is_profiled_row_by_row(prior, causal):
    length = 24
    profile = prior_profile(prior, length=length, resolution=8, causal=causal).isel(layer=0)
    k = prior.double().log_prior(length, length)
    if causal:
        k = k.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    k = k[:, profile["query"].values.tolist()]
    weights = k.softmax(-1)
    mass = np.add.reduceat(weights.numpy(), profile["key_bin"].values, axis=-1)
    np.testing.assert_allclose(np.nan_to_num(profile["probability"]), mass, atol=1e-7)
    entropy = torch.special.entr(weights).sum(-1)
    np.testing.assert_allclose(profile["prior_entropy"], entropy, atol=1e-9)
    top = k.topk(2, dim=-1).values
    np.testing.assert_allclose(profile["margin"], top[..., 0] - top[..., 1], atol=1e-9)


def test_a_prior_without_curves_has_none_and_says_so():
    profile = prior_profile(Crossed(), length=24)
    for name in ("sink", "kernel", "relative", "recency_slope", "kernel_range"):
        assert profile[name].isnull().all(), name
    assert "not a function of the lag plus one of the key" in profile.attrs["notes"]
    assert prior_summary(profile)[0].endswith("no kernel")
    # A window is a function of the lag, infinite or not.
    assert prior_profile(Window(), length=24)["kernel"].sel(lag=4).item() == pytest.approx(0.4)


def test_a_head_that_is_not_a_number_leaves_the_others_alone():
    prior = lively(goat_prior(2, rank=3, sink_rank=2, training_length=64))
    wanted = prior_profile(prior, length=30).sel(layer=0, head=0)
    with torch.no_grad():
        prior.parts[0].alpha[1, 0] = torch.nan
    profile = prior_profile(prior, length=30).isel(layer=0)
    for name in ("margin", "top_mass", "prior_entropy", "kernel", "row_centred"):
        np.testing.assert_allclose(profile[name].sel(head=0), wanted[name], atol=1e-6, rtol=1e-6)
        assert profile[name].sel(head=1)[1:].isnull().all(), name
    assert profile["margin_rank"].values.tolist() == [0, 1]


def test_tables_keep_their_ends():
    prior = LagTablePrior(torch.tensor([[3.0, 1.0]]), first_lag=-1) + KeyTablePrior(
        torch.tensor([[2.0, 0.0]])
    )
    curves = curves_of(prior, 4, causal=False)
    assert curves.relative()[0].tolist() == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert curves.sink()[0].tolist() == [2.0, 0.0, 0.0, 0.0]
