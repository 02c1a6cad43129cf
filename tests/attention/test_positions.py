"""The position schemes GOAT is compared with, against their formulas."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.attention import (
    InterpolatedRotaryEmbedding,
    LearnedEmbedding,
    RotaryEmbedding,
    SinusoidalEmbedding,
)

lawful = settings(derandomize=True, deadline=None, max_examples=15)
positions = st.integers(0, 10**6)


def turned(x, position, dim, base=10_000.0):
    """Pairs (x_i, x_{i + d/2}) as complex numbers, turned by pos base^(-2 i / d)."""
    pairs = dim // 2
    out = list(x)
    for i in range(pairs):
        # The module keeps its frequencies in single precision.
        angle = position * torch.tensor(base ** (-i / pairs)).item()
        z = complex(x[i], x[i + pairs]) * cmath.exp(1j * angle)
        out[i], out[i + pairs] = z.real, z.imag
    return out


@pytest.mark.parametrize("dim", [2, 6, 7])
@lawful
@given(positions)
def test_rotary_turns_pairs(dim, position):
    x = torch.linspace(-1, 2, dim, dtype=torch.float64)
    got = RotaryEmbedding(dim)(x.view(1, 1, 1, dim), torch.tensor([position]))
    assert got.flatten().tolist() == pytest.approx(turned(x.tolist(), position, dim), abs=1e-6)
    assert got.norm().item() == pytest.approx(x.norm().item())


@lawful
@given(positions, positions, positions)
def test_rotary_scores_depend_on_the_lag_alone(i, j, shift):
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def score(a, b):
        return (rotary(q, torch.tensor([a])) * rotary(k, torch.tensor([b]))).sum().item()

    assert score(i + shift, j + shift) == pytest.approx(score(i, j), abs=1e-8)


def test_interpolation_squeezes_the_target_into_the_training_length():
    plain, squeezed = RotaryEmbedding(6), InterpolatedRotaryEmbedding(6, training_length=8)
    x = torch.randn(1, 2, 32, 6, dtype=torch.float64)
    index = torch.arange(32)
    torch.testing.assert_close(squeezed(x[:, :, :8], index[:8]), plain(x[:, :, :8], index[:8]))
    squeezed.target_length = 32
    torch.testing.assert_close(squeezed(x, index), plain(x, index / 4))
    # A target below the training length stretches nothing.
    squeezed.target_length = 4
    torch.testing.assert_close(squeezed(x[:, :, :8], index[:8]), plain(x[:, :, :8], index[:8]))


def test_interpolation_refuses_what_lies_beyond_its_target():
    squeezed = InterpolatedRotaryEmbedding(4, training_length=8)
    with pytest.raises(ValueError, match="position 8 lies beyond target_length=8"):
        squeezed(torch.zeros(1, 1, 9, 4), torch.arange(9))


@lawful
@given(positions)
def test_sinusoids(position):
    got = SinusoidalEmbedding(6)(torch.tensor([position]))[0].tolist()
    for i in range(3):
        angle = position * torch.tensor(10_000.0 ** (-2 * i / 6)).item()
        assert got[2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert got[2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_learned_positions_end_where_training_ended():
    learned = LearnedEmbedding(4, max_length=5)
    assert torch.equal(learned(torch.tensor([3, 0])), learned.table.weight[[3, 0]])
    with pytest.raises(ValueError, match="position 5 was never learned: max_length is 5"):
        learned(torch.arange(6))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RotaryEmbedding(1), "dim must be at least 2, got 1"),
        (lambda: RotaryEmbedding(4, base=1.0), "base must exceed 1"),
        (lambda: RotaryEmbedding(4)(torch.zeros(1, 5), torch.arange(1)), "last size of 4, got 5"),
        (lambda: InterpolatedRotaryEmbedding(4, training_length=0), "training_length must be"),
        (lambda: SinusoidalEmbedding(3), "dim must be even"),
        (lambda: SinusoidalEmbedding(0), "dim must be even"),
        (lambda: LearnedEmbedding(0, max_length=3), "at least 1, got 0, 3"),
        (lambda: LearnedEmbedding(3, max_length=0), "at least 1, got 3, 0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
