"""The collapse bound and the margin law, against plans and against fifty digits."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.transport import (
    collapse_bound,
    off_sink_bound,
    protected_length,
    required_margin,
    solve_rows,
)

lawful = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**31 - 1)


@lawful
@given(seeds, st.floats(-2, 2), st.floats(-3, 1.5))
def test_every_weight_lies_between_the_collapse_bounds(seed, log_tau, log_scale):
    generator = torch.Generator().manual_seed(seed)
    scores = 10**log_scale * torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    log_prior = 2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    mask = torch.ones(5, 6, dtype=torch.bool).tril(1)
    tau = 10**log_tau
    plan = solve_rows(scores, log_prior=log_prior, mask=mask, temperature=tau)
    lower, upper = collapse_bound(plan)
    slack = 1e-12
    assert (lower <= plan.weights * (1 + slack) + 1e-300).all()
    assert (plan.weights <= upper * (1 + slack) + 1e-300).all()
    assert (upper <= 1).all()
    assert (lower >= 0).all()
    assert (upper[:, ~mask] == 0).all()
    apart = collapse_bound(
        log_prior.masked_fill(~mask, -math.inf).expand(2, 5, 6),
        plan.content_range,
        temperature=tau,
    )
    torch.testing.assert_close(apart.lower, lower, rtol=1e-9, atol=0)
    torch.testing.assert_close(apart.upper, upper, rtol=1e-9, atol=0)


def test_flat_content_returns_the_prior():
    plan = solve_rows(torch.full((3, 4), 2.5), log_prior=torch.arange(4.0))
    lower, upper = collapse_bound(plan)
    torch.testing.assert_close(lower, plan.weights)
    torch.testing.assert_close(upper, plan.weights)


def test_the_bounds_survive_an_unbounded_content_range():
    lower, upper = collapse_bound(torch.tensor([[0.0, -math.inf, -1.0]]), math.inf)
    assert lower.tolist() == [[0.0, 0.0, 0.0]]
    assert upper.tolist() == [[1.0, 0.0, 1.0]]


@lawful
@given(seeds, st.floats(-3, 12), st.integers(2, 40))
def test_off_mass_of_a_plan_obeys_the_margin_law(seed, margin, length):
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(length, generator=generator, dtype=torch.float64)
    drop[:2] = torch.tensor([0.0, 0.0])
    log_prior = -drop
    log_prior[0] = margin
    width = 2 * torch.rand(1, generator=generator, dtype=torch.float64)
    scores = width * torch.rand(1, length, generator=generator, dtype=torch.float64)
    flat = solve_rows(torch.zeros(1, length, dtype=torch.float64), log_prior=log_prior)
    assert 1 - flat.weights[0, 0].item() <= off_sink_bound(margin, length) + 1e-14
    plan = solve_rows(scores, log_prior=log_prior, temperature=0.5)
    content = plan.content_range.item() / 0.5
    assert 1 - plan.weights[0, 0].item() <= off_sink_bound(margin - content, length) + 1e-14
    # With equal rivals and flat content the bound is attained.
    log_prior[1:] = 0.0
    tight = solve_rows(torch.zeros(1, length, dtype=torch.float64), log_prior=log_prior)
    assert tight.weights[0, 1:].sum().item() == pytest.approx(off_sink_bound(margin, length))


@pytest.mark.parametrize("length", [2, 3, 1024, 10**6, 10**9])
@pytest.mark.parametrize("margin", [-1e4, -3.0, 0.0, 0.5, 7.0, 20.7, 60.0, 700.0, 1e4])
def test_margin_law_matches_fifty_digits(margin, length):
    with mpmath.workdps(50):
        wanted = float((length - 1) / (mpmath.exp(margin) + length - 1))
    assert off_sink_bound(margin, length) == pytest.approx(wanted, rel=1e-12, abs=0)


def test_a_uniform_prior_protects_nothing_and_a_single_key_needs_nothing():
    assert off_sink_bound(0.0, 10**9) == pytest.approx(1.0)
    assert off_sink_bound(0.0, 1) == 0.0
    assert off_sink_bound(-1e4, 1) == 0.0
    assert off_sink_bound(math.inf, 10**9) == 0.0
    assert required_margin(1) == -math.inf


@lawful
@given(st.floats(0, 600), st.floats(1e-6, 1 - 1e-6))
def test_the_two_inverses_invert(margin, off_mass):
    length = protected_length(margin, off_mass)
    assert off_sink_bound(margin, length) == pytest.approx(off_mass, rel=1e-6) or length < 1.001
    if length > 1.001:
        assert required_margin(length, off_mass) == pytest.approx(margin, rel=1e-9, abs=1e-9)


def test_half_the_mass_protects_about_exp_margin_keys():
    assert protected_length(10.0) == pytest.approx(math.exp(10.0) + 1)
    assert protected_length(0.0, 0.9) == pytest.approx(10.0)
    assert protected_length(1e4) == math.inf
    assert protected_length(-1e4) == 1.0


def test_answers_come_in_the_kind_of_the_arguments():
    assert isinstance(off_sink_bound(1.0, 5), float)
    array = off_sink_bound(np.array([0, 1]), 5)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float64
    tensor = off_sink_bound(torch.tensor([0.0, 1.0]), torch.tensor([[5], [9]]))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (2, 2)
    assert off_sink_bound(1.0, torch.tensor(5)).dtype == torch.float64
    assert isinstance(off_sink_bound(np.float32(1.0), np.int64(5)), float)
    margin = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: off_sink_bound(x, 7), margin)
    np.testing.assert_allclose(protected_length(np.zeros(2)), 2.0)
    np.testing.assert_allclose(required_margin(np.array([2, 3]), 0.5), [0.0, math.log(2)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: off_sink_bound(math.nan, 5), ValueError, "margin"),
        (lambda: off_sink_bound(0.0, 0), ValueError, "length must be finite and at least 1"),
        (lambda: off_sink_bound(0.0, math.inf), ValueError, "length"),
        (lambda: off_sink_bound("1", 5), TypeError, "margin must .*got str"),
        (lambda: off_sink_bound(True, 5), TypeError, "margin must .*got bool"),
        (lambda: off_sink_bound(np.array(["a"]), 5), TypeError, "margin"),
        (lambda: off_sink_bound(torch.zeros(2), torch.ones(3)), ValueError, "broadcast"),
        (lambda: protected_length(math.nan), ValueError, "margin"),
        (lambda: protected_length(1.0, 0.0), ValueError, "off_mass"),
        (lambda: protected_length(1.0, 1.0), ValueError, "off_mass"),
        (lambda: required_margin(0), ValueError, "length"),
        (lambda: required_margin(5, math.nan), ValueError, "off_mass"),
        (lambda: collapse_bound([[0.0]], 1.0), TypeError, "prior must .*got list"),
        (lambda: collapse_bound(torch.zeros(2, 2, dtype=torch.int64), 1.0), TypeError, "prior"),
        (lambda: collapse_bound(torch.zeros(2, 2)), ValueError, "content_range must be given"),
        (lambda: collapse_bound(torch.zeros(2), 1.0), ValueError, "prior must have shape"),
        (lambda: collapse_bound(torch.full((1, 2), math.nan), 1.0), ValueError, "prior"),
        (lambda: collapse_bound(torch.full((1, 2), -math.inf), 1.0), ValueError, "prior"),
        (lambda: collapse_bound(torch.zeros(2, 2), -1.0), ValueError, "content_range"),
        (lambda: collapse_bound(torch.zeros(2, 2), torch.ones(3)), ValueError, "content_range"),
        (
            lambda: collapse_bound(torch.zeros(2, 2), 1.0, temperature=0.0),
            ValueError,
            "temperature",
        ),
        (
            lambda: collapse_bound(solve_rows(torch.zeros(2, 2)), 1.0),
            TypeError,
            "must not be given with a plan",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
