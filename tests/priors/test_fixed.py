"""Uniform, ALiBi and T5 buckets against their published rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.priors import ALiBiPrior, BucketPrior, UniformPrior, alibi_slopes

lawful = settings(derandomize=True, deadline=None, max_examples=15)


def test_uniform_is_zero():
    prior = UniformPrior(3)
    assert torch.equal(prior.log_prior([2, 9], 4), torch.zeros(3, 2, 4))
    assert prior.lanes(2, 4).key.shape == (3, 4, 0)


def test_alibi_slopes_as_published():
    # The paper's own two examples: 8 heads, and 16 (ratio 2^-1/2); 12 heads as in its code.
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(16) == pytest.approx([2.0 ** (-h / 2) for h in range(1, 17)])
    extra = [2.0 ** -(h + 0.5) for h in range(4)]
    assert alibi_slopes(12) == pytest.approx([2.0**-h for h in range(1, 9)] + extra)
    assert alibi_slopes(1) == [2.0**-8]


@lawful
@given(st.integers(1, 200))
def test_alibi_slopes_of_any_head_count(heads):
    slopes = alibi_slopes(heads)
    assert len(set(slopes)) == heads
    assert all(0 < slope < 1 for slope in slopes)


@lawful
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
)
def test_alibi_is_minus_slope_times_lag(query, key):
    slopes = [0.5, 2.0**-7]
    one_sided = ALiBiPrior(2, slopes=slopes).double().log_prior(query, key)
    two_sided = ALiBiPrior(2, slopes=slopes, symmetric=True).double().log_prior(query, key)
    for h, slope in enumerate(slopes):
        for a, i in enumerate(query):
            for b, j in enumerate(key):
                assert one_sided[h, a, b].item() == -slope * (i - j)
                assert two_sided[h, a, b].item() == -slope * abs(i - j)


def test_alibi_is_the_maximum_entropy_prior_of_its_mean_lag():
    length = 30
    prior = ALiBiPrior(1, slopes=[0.2]).double()
    p = torch.softmax(prior.log_prior([length - 1], length)[0, 0], -1)
    lag = length - 1 - torch.arange(length, dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    # Directions that keep the mass and the mean lag: orthogonal to 1 and to the lag.
    basis = torch.stack([torch.ones_like(lag), lag], dim=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        direction = torch.randn(length, generator=generator, dtype=torch.float64)
        direction -= basis @ torch.linalg.lstsq(basis, direction.unsqueeze(-1)).solution.squeeze(-1)
        other = p + direction * (0.3 * p / direction.abs()).min()
        assert other.min() > 0
        assert torch.isclose((other * lag).sum(), (p * lag).sum())
        assert -(other * other.log()).sum() < entropy


@pytest.mark.parametrize("slopes", [[0.1], [0.1, 0.0], [0.1, -1.0], [0.1, math.nan], []])
def test_alibi_refuses_slopes(slopes):
    with pytest.raises(ValueError, match="slopes must"):
        ALiBiPrior(2, slopes=slopes)


@pytest.mark.parametrize("make", [UniformPrior, ALiBiPrior, BucketPrior, alibi_slopes])
def test_head_counts(make):
    with pytest.raises(ValueError, match="num_heads must be an integer of at least 1, got 0"):
        make(0)
    for bad in (2.0, True, "2"):
        with pytest.raises(TypeError, match="num_heads must be an integer"):
            make(bad)


def bucket_by_the_rule(lag, num_buckets, max_distance, bidirectional):
    """T5's rule, decided in exact integers.

    Bucket exact + floor(log(n / exact) / log(max / exact) * m) is at least exact + s just when
    n^m exact^s >= max^s exact^m.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        if lag < 0:
            first = num_buckets
        n = abs(lag)
    else:
        n = max(lag, 0)
    exact = num_buckets // 2
    if n < exact:
        return first + n
    m = num_buckets - exact
    steps = 0
    while steps < m - 1 and n**m * exact ** (steps + 1) >= max_distance ** (steps + 1) * exact**m:
        steps += 1
    return first + exact + steps


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "bidirectional"),
    # The last three put whole lags exactly on the edges of logarithmic buckets.
    [
        (32, 128, False),
        (32, 128, True),
        (8, 20, False),
        (4, 9, True),
        (2, 5, False),
        (8, 64, False),
        (16, 64, True),
        (12, 6 * 2**6, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_buckets_follow_the_published_rule(num_buckets, max_distance, bidirectional, dtype):
    prior = BucketPrior(
        1, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    lags = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    got = prior.buckets(lags.to(dtype)).tolist()
    rule = [
        bucket_by_the_rule(lag, num_buckets, max_distance, bidirectional) for lag in lags.tolist()
    ]
    wrong = [(lag, a, b) for lag, a, b in zip(lags.tolist(), got, rule, strict=True) if a != b]
    assert not wrong


def test_bucket_prior_reads_its_table():
    prior = BucketPrior(2, num_buckets=4, max_distance=8).double()
    with torch.no_grad():
        prior.table.copy_(torch.arange(8.0).reshape(2, 4))
    got = prior.log_prior([5, 30], [0, 4, 5, 6])
    buckets = [[bucket_by_the_rule(i - j, 4, 8, False) for j in (0, 4, 5, 6)] for i in (5, 30)]
    assert got[0].tolist() == buckets
    assert got[1].tolist() == [[4.0 + b for b in row] for row in buckets]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_buckets": 1}, "num_buckets must be a multiple of 1 and at least 2, got 1"),
        ({"num_buckets": 7, "bidirectional": True}, "multiple of 2 and at least 4, got 7"),
        ({"num_buckets": 2, "bidirectional": True}, "at least 4, got 2"),
        ({"max_distance": 16}, "max_distance must exceed the 16 lags"),
    ],
)
def test_bucket_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        BucketPrior(1, **arguments)
