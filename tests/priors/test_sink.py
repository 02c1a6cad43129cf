"""The key-only terms against their formulas: the sink u(j) and the recency slope."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.priors import RecencyPrior, SinkPrior, alibi_slopes, as_positions, grid_positions

lawful = settings(derandomize=True, deadline=None, max_examples=15)
indices = st.lists(st.integers(0, 10**6), min_size=1, max_size=6)


def make(heads=2, rank=3, training_length=40, seed=0, **kwargs):
    prior = SinkPrior(heads, rank=rank, training_length=training_length, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return prior


def silu(x):
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


def u_by_the_formula(prior, head, index, coordinates):
    """gain MLP([cos, sin, j/T, log(1+j)/log(1+T)]) + bump [j = 0], unit by unit.

    `coordinates` holds, for each frequency, what its phase runs along (None: the token has none).
    """
    cosines, sines = [], []
    for m, at in enumerate(coordinates):
        phase = 0.0 if at is None else prior.frequencies[m].item() * at
        cosines.append(0.0 if at is None else math.cos(phase))
        sines.append(0.0 if at is None else math.sin(phase))
    length = prior.training_length
    inputs = [*cosines, *sines, index / length, math.log1p(index) / math.log1p(length)]
    first, second = prior.mlp[0], prior.mlp[2]
    out = second.bias.item()
    for unit in range(first.out_features):
        before = first.bias[unit].item()
        before += sum(w * x for w, x in zip(first.weight[unit].tolist(), inputs, strict=True))
        out += second.weight[0, unit].item() * silu(before)
    return prior.gain[head].item() * out + prior.bump[head].item() * (index == 0)


@pytest.mark.parametrize("rank", [0, 1, 3])
@lawful
@given(indices)
def test_u_is_the_formula(rank, index):
    prior = make(rank=rank)
    got = prior.key_bias(as_positions(index))
    dense = prior.log_prior([3, 9], index)
    for h in range(2):
        for at, j in enumerate(index):
            wanted = u_by_the_formula(prior, h, j, [j] * rank)
            assert got[h, at].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
            assert dense[h, 0, at] == dense[h, 1, at] == got[h, at]


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_u_on_a_grid_shares_its_frequencies_between_the_axes(rank):
    prior = make(rank=rank, axes=2)
    points = grid_positions(3, 4, class_token=True)
    got = prior.key_bias(points)
    along_rows = (rank + 1) // 2
    for h in range(2):
        wanted = u_by_the_formula(prior, h, 0, [None] * rank)
        assert got[h, 0].item() == pytest.approx(wanted, abs=1e-12)
        for cell in range(12):
            coordinates = [cell // 4] * along_rows + [cell % 4] * (rank - along_rows)
            # The index counts the class token, the coordinates do not.
            wanted = u_by_the_formula(prior, h, cell + 1, coordinates)
            assert got[h, cell + 1].item() == pytest.approx(wanted, abs=1e-12)


@lawful
@given(st.integers(1, 60), st.integers(1, 60))
def test_a_longer_context_extends_a_shorter_one(short, more):
    prior = make()
    whole = prior.log_prior(short + more, short + more)
    torch.testing.assert_close(
        prior.log_prior(short, short), whole[:, :short, :short], rtol=1e-13, atol=1e-13
    )


def test_the_training_length_is_what_normalises():
    weights = make(training_length=40).state_dict()
    other = make(training_length=80)
    other.load_state_dict(weights)
    assert not torch.allclose(other.log_prior(1, 16), make(training_length=40).log_prior(1, 16))


def test_frequencies():
    got = SinkPrior(1, rank=3, training_length=8, base=100.0).frequencies.tolist()
    assert got == pytest.approx([1.0, 0.1, 0.01])


def test_starts():
    flat = SinkPrior(2, rank=3, training_length=8, init="uniform")
    assert flat.log_prior(1, 9).abs().max() == 0
    # Zero output, but not a dead end: the output layer's gradient does not vanish.
    flat.log_prior(1, 9).sum().backward()
    assert flat.mlp[2].weight.grad.abs().max() > 0
    assert 0 < SinkPrior(2, rank=3, training_length=8).log_prior(1, 9).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rank": -1}, ValueError, "rank must be an integer of at least 0, got -1"),
        ({"rank": 1.5}, TypeError, "rank must be"),
        (
            {"training_length": 0},
            ValueError,
            "training_length must be an integer of at least 1, got 0",
        ),
        ({"training_length": 8.0}, TypeError, "training_length must be an integer .*, got 8.0"),
        ({"training_length": None}, TypeError, "got None"),
        ({"hidden": 0}, ValueError, "hidden must be an integer of at least 1, got 0"),
        ({"init": "zero"}, ValueError, "init must be one of seeded, uniform; got 'zero'"),
        ({"num_heads": 0}, ValueError, "num_heads must be an integer of at least 1"),
    ],
)
def test_sink_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        SinkPrior(**({"num_heads": 1, "rank": 2, "training_length": 8} | arguments))


@lawful
@given(indices, indices)
def test_recency_is_minus_slope_times_lag(query, key):
    slopes = [0.3, 4.0, 1e-4]
    prior = RecencyPrior(3, slopes=slopes).double()
    got = prior.log_prior(query, key)
    for h, slope in enumerate(slopes):
        for a, i in enumerate(query):
            for b, j in enumerate(key):
                assert got[h, a, b].item() == pytest.approx(-slope * (i - j), rel=1e-5)


def test_recency_is_measured_from_the_diagonal():
    at = [0, 7, 10**6]
    assert RecencyPrior(2).log_prior(at, at).diagonal(dim1=1, dim2=2).abs().max() == 0


@lawful
@given(st.floats(1e-6, 50))
def test_initial_slopes_come_back_through_softplus(slope):
    prior = RecencyPrior(1, slopes=[slope])
    assert prior.slope().item() == pytest.approx(slope, rel=1e-5)
    assert math.log1p(math.exp(prior.raw_slope.item())) == pytest.approx(slope, rel=1e-5)


def test_a_slope_of_zero_is_flat_and_its_gradient_finite():
    prior = RecencyPrior(2, slopes=[0.0, 0.5])
    dense = prior.log_prior(4, 4)
    assert dense[0].abs().max() == 0
    dense.sum().backward()
    assert prior.raw_slope.grad.isfinite().all()
    lanes = prior.lanes(4, 4)
    assert (lanes.query @ lanes.key.mT)[0].abs().max() == 0


def test_default_slopes_are_alibis():
    assert RecencyPrior(12).slope().tolist() == pytest.approx(alibi_slopes(12), rel=1e-6)


@pytest.mark.parametrize("slopes", [[0.1], [0.1, -0.1], [0.1, math.inf], [math.nan, 0.1]])
def test_recency_errors(slopes):
    with pytest.raises(ValueError, match="slopes must"):
        RecencyPrior(2, slopes=slopes)
