"""What follows from a sink profile's numbers, against the definitions."""

import numpy as np
import pytest
import torch

from goatviz.analysis import sink_profile
from goatviz.analysis.sink_measures import first_mass_bounds, sink_rank, uniform_importance
from tests.factories import ids, sink_result, tiny_lm

PRIOR = {
    "none": "uniform",
    "rope": "uniform",
    "alibi": "fixed",
    "bucket": "learned",
    "goat": "learned",
}


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_a_pretrained_kind_of_model_has_no_explicit_prior(case):
    assert sink_result(case).attrs["prior"] == "none"


@pytest.mark.parametrize("positions", PRIOR)
def test_the_prior_is_named_by_its_kind(positions):
    assert sink_profile(tiny_lm(positions), ids()).attrs["prior"] == PRIOR[positions]


@pytest.mark.parametrize("case", ["toy", "one input", "gpt2", "12 x 12"])
def test_ranks_order_the_heads_by_their_first_keys_importance(case):
    profile = sink_result(case)
    rank, present = profile["sink_rank"].values, profile["present"].values
    assert (rank[~present] == -1).all()
    assert sorted(rank[present]) == list(range(present.sum()))
    strength = np.nanmean(profile["first_importance"].values[:, present], axis=0)
    assert (np.diff(strength[np.argsort(rank[present])]) <= 0).all()


def test_heads_without_importance_come_last():
    first = np.array([[[np.nan, 0.2, 0.5, 0.2]]])
    present = np.array([[True, True, True, False]])
    assert sink_rank(first, present).tolist() == [[2, 1, 0, -1]]


def test_bounds_are_reached_and_never_exceeded():
    generator = torch.Generator().manual_seed(0)
    prior = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    width = np.array([0.0, 0.7, 5.0])
    lower, upper = first_mass_bounds(prior[0].numpy(), prior[0].numpy(), width)
    for at, w in enumerate(width):
        scores = w * torch.rand(500, 6, generator=generator, dtype=torch.float64)
        mass = torch.softmax(scores + prior.log(), -1)[:, 0]
        assert lower[at] - 1e-12 <= mass.min() and mass.max() <= upper[at] + 1e-12
        raised = torch.zeros(6, dtype=torch.float64)
        raised[0] = w
        for scores, bound in ((raised, upper[at]), (-raised, lower[at])):
            reached = torch.softmax(scores + prior.log(), -1)[0]
            assert reached.item() == pytest.approx(bound, rel=1e-12)


def test_certain_priors_have_certain_bounds():
    lower, upper = first_mass_bounds(np.array(0.0), np.array(1.0), np.array([0.0, 3.0, 800.0]))
    assert lower.tolist() == [0, 0, 0] and upper.tolist() == [1, 1, 1]


@pytest.mark.parametrize("case", ["toy", "gpt2", "12 x 12"])
def test_no_query_lies_outside_its_bounds(case):
    profile = sink_result(case)
    count = profile["signal_count"].values
    least, most = (profile[name].values for name in ("mass_bin", "mass_stop"))
    lower, upper = (profile[f"signal_{end}"].values for end in ("lower", "upper"))
    for layer, head, at, bin_of_mass in np.argwhere(count > 0):
        assert lower[layer, head, at] <= most[bin_of_mass] + 1e-6
        assert upper[layer, head, at] >= least[bin_of_mass] - 1e-6
    mean, queries = profile["signal_first_mass"].values, count.sum(-1)
    assert (lower <= mean + 1e-6)[queries > 0].all()
    assert (mean <= upper + 1e-6)[queries > 0].all()


def test_an_extra_column_leaves_no_bounds():
    profile = sink_result("gpt-oss")
    assert np.isnan(profile["signal_lower"]).all() and np.isnan(profile["layer_signal_upper"]).all()


@pytest.mark.parametrize("case", ["toy", "12 x 12"])
def test_a_layers_signal_is_that_of_its_heads_together(case):
    profile = sink_result(case)
    heads = profile.where(profile["present"])
    queries = heads["signal_count"].sum("mass_bin")
    np.testing.assert_array_equal(profile["layer_signal_count"], heads["signal_count"].sum("head"))
    for name in ("first", "largest", "recent"):
        total = (queries * heads[f"signal_{name}_mass"]).sum("head")
        expected = total / queries.sum("head")
        np.testing.assert_allclose(profile[f"layer_signal_{name}_mass"], expected)
    np.testing.assert_allclose(profile["layer_signal_lower"], heads["signal_lower"].min("head"))
    np.testing.assert_allclose(profile["layer_signal_upper"], heads["signal_upper"].max("head"))
    np.testing.assert_allclose(profile["layer_sink_rate"], heads["sink_rate"].mean("head"))
    np.testing.assert_allclose(
        profile["model_any_sink_rate"], heads["any_sink_rate"].mean(["layer", "head"])
    )


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None)])
def test_uniform_importance_is_the_mean_of_uniform_weights(causal, window):
    seen = np.tri(12, dtype=bool) if causal else np.ones((12, 12), dtype=bool)
    if window:
        seen &= ~np.tri(12, k=-window, dtype=bool)
    weights = seen / seen.sum(1, keepdims=True)
    expected = [weights[seen[:, key], key].mean() for key in range(12)]
    importance = uniform_importance(seen.sum(1), seen.sum(0), causal=causal)
    np.testing.assert_allclose(importance, expected)


def test_uniform_importance_of_an_unknown_pattern_is_unknown():
    seen = np.eye(6, dtype=bool)
    seen[:, 0] = True
    assert np.isnan(uniform_importance(seen.sum(1), seen.sum(0), causal=True)).all()
    assert np.isnan(uniform_importance(seen.sum(1), seen.sum(0), causal=False)).all()


@pytest.mark.parametrize("case", ["toy", "mistral", "bert"])
def test_models_without_scores_have_uniform_importance(case):
    # Mistral has a window of five tokens, BERT sees both sides.
    profile = sink_result(case)
    length, window = profile.attrs["length"], 5 if case == "mistral" else 10**6
    at = np.arange(length)
    lag = at[:, None] - at
    seen = (lag < window) & ((lag >= 0) | (case == "bert"))
    weights = seen / seen.sum(1, keepdims=True)
    expected = weights.sum(0) / seen.sum(0)
    for row in profile["uniform_importance"].values:
        np.testing.assert_allclose(row, expected)
