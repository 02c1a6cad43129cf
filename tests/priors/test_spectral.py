"""The relative term against its formula: equivariance, symmetry, bounds, grids."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.priors import SpectralPrior, grid_positions
from goatviz.priors.base import frequency_axis

lawful = settings(derandomize=True, deadline=None, max_examples=15)
indices = st.lists(st.integers(0, 10**6), min_size=1, max_size=5)


def make(heads=2, rank=4, seed=0, **kwargs):
    prior = SpectralPrior(heads, rank=rank, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (prior.alpha, prior.beta):
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return prior


def polynomial(prior, head, lag, ranks=None):
    """sum_r alpha_r cos(w_r lag) + beta_r sin(w_r lag), term by term."""
    total = 0.0
    for r in range(prior.rank) if ranks is None else ranks:
        phase = prior.frequencies[r].item() * lag
        total += prior.alpha[head, r].item() * math.cos(phase)
        total += prior.beta[head, r].item() * math.sin(phase)
    return total


@pytest.mark.parametrize(("rank", "base"), [(1, 10_000.0), (2, 100.0), (5, 10_000.0)])
def test_frequencies(rank, base):
    got = SpectralPrior(1, rank=rank, base=base).frequencies.tolist()
    wanted = [1.0] if rank == 1 else [base ** (-r / (rank - 1)) for r in range(rank)]
    assert got == pytest.approx(wanted, rel=1e-7)


@lawful
@given(indices, indices)
def test_is_the_trigonometric_polynomial(query, key):
    prior = make()
    got = prior.log_prior(query, key)
    for h in range(2):
        for a, i in enumerate(query):
            for b, j in enumerate(key):
                assert got[h, a, b].item() == pytest.approx(polynomial(prior, h, i - j), abs=1e-9)


@lawful
@given(indices, indices, st.integers(0, 10**6))
def test_translation_changes_nothing(query, key, shift):
    prior = make()
    moved = prior.log_prior([i + shift for i in query], [j + shift for j in key])
    torch.testing.assert_close(moved, prior.log_prior(query, key), rtol=0, atol=1e-12)
    far = prior.lanes([i + shift for i in query], [j + shift for j in key])
    product = far.query @ far.key.mT
    torch.testing.assert_close(product, prior.log_prior(query, key), rtol=0, atol=2e-9)


@lawful
@given(st.integers(-(10**6), 10**6))
def test_alpha_is_even_beta_is_odd_and_both_are_bounded(lag):
    even, odd = make(), make()
    with torch.no_grad():
        even.beta.zero_()
        odd.alpha.zero_()
    there, back = torch.tensor([lag]), torch.tensor([-lag])
    torch.testing.assert_close(even.kernel(there), even.kernel(back))
    torch.testing.assert_close(odd.kernel(there), -odd.kernel(back))
    prior = make()
    bound = torch.hypot(prior.alpha, prior.beta).sum(-1)
    assert (prior.kernel(there)[:, 0].abs() <= bound + 1e-12).all()


def test_kernel_is_the_dense_prior_and_keeps_shapes():
    prior = make()
    lag = torch.arange(9).unsqueeze(-1) - torch.arange(7)
    assert prior.kernel(lag).shape == (2, 9, 7)
    torch.testing.assert_close(prior.kernel(lag), prior.log_prior(9, 7))


def test_phases_stay_exact_far_out_in_float32():
    prior = make().float()
    i = 10**6
    got = prior.log_prior([i], [i - 3, 5])
    for b, lag in enumerate((3, i - 5)):
        assert got[0, 0, b].item() == pytest.approx(polynomial(prior, 0, lag), abs=5e-6)


def test_rank_zero_is_flat_and_uniform_start_is_zero():
    assert torch.equal(SpectralPrior(2, rank=0).log_prior(3, 4), torch.zeros(2, 3, 4))
    assert torch.equal(
        SpectralPrior(2, rank=3, init="uniform").log_prior(3, 4), torch.zeros(2, 3, 4)
    )
    seeded = SpectralPrior(2, rank=3)
    assert 0 < seeded.log_prior(3, 4).abs().max() < 0.2


@pytest.mark.parametrize(
    ("rank", "axes", "wanted"),
    [
        (5, 2, [0, 0, 0, 1, 1]),
        (4, 2, [0, 0, 1, 1]),
        (1, 2, [0]),
        (4, 3, [0, 0, 1, 2]),
        (3, 1, [0, 0, 0]),
        (3, 0, [0, 0, 0]),
    ],
)
def test_which_axis_a_frequency_runs_along(rank, axes, wanted):
    assert frequency_axis(rank, axes).tolist() == wanted


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_grid_prior_adds_one_polynomial_for_each_axis(rank):
    prior = make(rank=rank, axes=2)
    points = grid_positions(3, 4)
    got = prior.log_prior(points, points)
    rows = range((rank + 1) // 2)
    columns = range((rank + 1) // 2, rank)
    for h in range(2):
        for a in range(12):
            for b in range(12):
                wanted = polynomial(prior, h, a // 4 - b // 4, rows)
                wanted += polynomial(prior, h, a % 4 - b % 4, columns)
                assert got[h, a, b].item() == pytest.approx(wanted, abs=1e-12)


def test_grid_prior_is_equivariant_in_both_axes_and_ignores_the_index():
    prior = make(rank=5, axes=2)
    points = grid_positions(3, 4)
    moved = points.clone()
    moved[:, 1] += 7
    moved[:, 2] += 2
    moved[:, 0] += 5
    torch.testing.assert_close(
        prior.log_prior(moved, moved), prior.log_prior(points, points), rtol=0, atol=1e-12
    )


def test_the_class_token_has_no_relative_features():
    prior = make(rank=5, axes=2)
    points = grid_positions(3, 4, class_token=True)
    dense = prior.log_prior(points, points)
    assert dense[:, 0].abs().max() == dense[:, :, 0].abs().max() == 0
    bare = grid_positions(3, 4)
    torch.testing.assert_close(dense[:, 1:, 1:], prior.log_prior(bare, bare))
    lanes = prior.lanes(points, points)
    assert lanes.query[:, 0].abs().max() == lanes.key[:, 0].abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": -1}, "rank must be an integer of at least 0, got -1"),
        ({"rank": 1, "base": 1.0}, "base must exceed 1"),
        ({"rank": 1, "base": math.nan}, "base must exceed 1"),
        ({"rank": 1, "axes": -1}, "axes must be an integer of at least 0"),
        ({"rank": 1, "init": "zero"}, "init must be one of seeded, uniform; got 'zero'"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        SpectralPrior(1, **arguments)


def test_a_grid_has_no_kernel_over_one_lag():
    with pytest.raises(ValueError, match="needs axes=0, got axes=2"):
        SpectralPrior(1, rank=2, axes=2).kernel(torch.arange(3))
