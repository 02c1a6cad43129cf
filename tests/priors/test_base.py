"""Laws of every prior: lanes = dense, sums and scaling, named parts, and what positions may be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    Prior,
    RecencyPrior,
    ScaledPrior,
    SinkPrior,
    SpectralPrior,
    SumPrior,
    UniformPrior,
    as_positions,
    grid_positions,
)

lawful = settings(derandomize=True, deadline=None, max_examples=6)

# Rounding of one lane product, relative to the terms it sums: twice-carried bfloat16 has 16 bits.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 5e-7,
    torch.bfloat16: 4e-5,
    torch.float16: 2e-6,
}


def randomise(prior, seed=0):
    """Every learned number away from its initial value, in float64."""
    generator = torch.Generator().manual_seed(seed)
    prior = prior.double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return prior


def sink(heads=2, **kwargs):
    return SinkPrior(heads, rank=3, training_length=50, **kwargs)


SEQUENCE_PRIORS = {
    "uniform": lambda: UniformPrior(2),
    "alibi": lambda: ALiBiPrior(3),
    "spectral": lambda: SpectralPrior(2, rank=4),
    "spectral of rank 0": lambda: SpectralPrior(2, rank=0),
    "spectral of rank 1": lambda: SpectralPrior(2, rank=1),
    "sink": sink,
    "sink of rank 0": lambda: SinkPrior(2, rank=0, training_length=7),
    "recency": lambda: RecencyPrior(2),
    "goat": lambda: SpectralPrior(2, rank=4) + sink() + RecencyPrior(2),
    "shared and own heads": lambda: SpectralPrior(1, rank=2) + RecencyPrior(4) + UniformPrior(),
    "two key terms": lambda: sink() + sink(),
    "scaled": lambda: -0.7 * (SpectralPrior(2, rank=2) + sink()),
    "scaled to nothing": lambda: 0 * (SpectralPrior(2, rank=2) + sink()),
    "sum with a scaled sum": lambda: RecencyPrior(2) + 2 * (SpectralPrior(2, rank=2) + sink()),
}
GRID_PRIORS = {
    "spectral": lambda: SpectralPrior(2, rank=5, axes=2),
    "sink": lambda: sink(axes=2),
    "all": lambda: SpectralPrior(2, rank=4, axes=2) + sink(axes=2) + RecencyPrior(2),
    "scaled": lambda: 1.5 * (SpectralPrior(2, rank=1, axes=2) + sink(axes=2)),
}


def centred(values):
    """One representative of the class of matrices that differ by row constants."""
    return values - values.mean(-1, keepdim=True)


def assert_lanes_are_dense(prior, query, key, dtype, scale):
    lanes = prior.lanes(query, key, dtype=dtype, scale=scale)
    assert lanes.query.dtype == lanes.key.dtype == dtype
    phi, psi = lanes.query.double(), lanes.key.double()
    assert phi.shape[-1] == psi.shape[-1] == prior.num_lanes(dtype)
    dense = prior.log_prior(query, key).double()
    terms = scale * (phi.abs() @ psi.abs().mT)
    bound = TOLERANCE[dtype] * (1 + terms.max())
    difference = centred(scale * phi @ psi.mT) - centred(dense)
    assert difference.abs().max() <= bound


positions = st.lists(st.integers(0, 100_000), min_size=1, max_size=6)


@pytest.mark.parametrize("name", SEQUENCE_PRIORS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@lawful
@given(positions, positions, st.sampled_from([1.0, 0.125, 1 / math.sqrt(59), 3.0]))
def test_lanes_are_the_dense_prior_up_to_row_constants(name, dtype, query, key, scale):
    assert_lanes_are_dense(randomise(SEQUENCE_PRIORS[name]()), query, key, dtype, scale)


@pytest.mark.parametrize("name", GRID_PRIORS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("class_token", [False, True])
def test_lanes_are_the_dense_prior_on_grids(name, dtype, class_token):
    prior = randomise(GRID_PRIORS[name]())
    points = grid_positions(3, 5, class_token=class_token)
    assert_lanes_are_dense(prior, points, points, dtype, 0.25)
    assert_lanes_are_dense(prior, points[2:5], points[[7, 0, 1]], dtype, 1.0)


@pytest.mark.parametrize("name", SEQUENCE_PRIORS)
def test_lanes_of_float32_parameters_stay_within_float32(name):
    prior = SEQUENCE_PRIORS[name]()
    dense = prior.log_prior(64, 64).double()
    lanes = prior.lanes(64, 64, scale=0.5)
    assert lanes.key.dtype == torch.float32
    product = 0.5 * lanes.query.double() @ lanes.key.double().mT
    torch.testing.assert_close(centred(product), centred(dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SEQUENCE_PRIORS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Gradients arrive in the lanes' own precision.
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 3e-2),
        (torch.float16, 4e-3),
    ],
    ids=str,
)
def test_split_lanes_have_the_dense_gradient(name, dtype, tolerance):
    prior = randomise(SEQUENCE_PRIORS[name]())
    parameters = list(prior.parameters())
    if not parameters:
        assert name in ("uniform", "alibi")
        return
    generator = torch.Generator().manual_seed(1)
    shape = (prior.num_heads, 5, 9)
    # Row sums of zero: the gradient then ignores what row constants are allowed to differ by.
    weights = centred(torch.randn(shape, generator=generator, dtype=torch.float64))
    query, key = torch.arange(4, 9), torch.arange(9)
    lanes = prior.lanes(query, key, dtype=dtype, scale=0.5)
    product = 0.5 * lanes.query.double() @ lanes.key.double().mT
    dense = prior.log_prior(query, key)
    if not dense.requires_grad or product.grad_fn is None:
        assert prior.num_lanes() == 0
        return
    kwargs = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad((weights * product).sum(), parameters, **kwargs)
    wanted = torch.autograd.grad((weights * dense).sum(), parameters, **kwargs)
    # Relative to the largest: a gradient that cancels to nothing keeps the rounding of its terms.
    largest = max((float(w.norm()) for w in wanted if w.numel()), default=0.0)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= tolerance * (largest + 1e-12)


def test_number_of_lanes():
    spectral, key = SpectralPrior(2, rank=4), sink()
    goat = spectral + key + RecencyPrior(2)
    for prior, single, split in (
        (UniformPrior(), 0, 0),
        (spectral, 8, 24),
        (key, 1, 3),
        (ALiBiPrior(2), 1, 3),
        (goat, 9, 27),
        (2 * goat, 9, 27),
        (key + key, 1, 3),
    ):
        assert prior.num_lanes() == prior.num_lanes(torch.float64) == single
        assert prior.num_lanes(torch.bfloat16) == prior.num_lanes(torch.float16) == split


@pytest.mark.parametrize("name", SEQUENCE_PRIORS)
def test_components_add_up_to_the_whole(name):
    prior = randomise(SEQUENCE_PRIORS[name]())
    parts = prior.components()
    query, key = [3, 90, 17], [0, 2, 5, 90]
    total = sum(part.log_prior(query, key) for part in parts.values())
    whole = prior.log_prior(query, key)
    torch.testing.assert_close(total.expand_as(whole), whole, rtol=0, atol=1e-12)
    # Whatever reads parts by their kind must never meet a sum among them.
    assert all(part.kind != "sum" for part in parts.values())


def test_component_names():
    goat = SpectralPrior(2, rank=1) + sink() + RecencyPrior(2)
    assert list(goat.components()) == ["relative", "sink", "recency"]
    assert list((0.5 * goat).components()) == ["relative", "sink", "recency"]
    twice = sink() + sink() + ALiBiPrior(2) + sink()
    assert list(twice.components()) == ["sink", "sink_2", "recency", "sink_3"]
    nested = RecencyPrior(2) + 2 * (sink() + RecencyPrior(2))
    assert list(nested.components()) == ["recency", "sink", "recency_2"]
    assert [part.kind for part in nested.components().values()] == ["recency", "key", "recency"]
    assert list(UniformPrior().components()) == ["uniform"]


def test_addition_flattens_and_keeps_the_parts():
    a, b, c = SpectralPrior(2, rank=1), sink(), RecencyPrior(2)
    for total in (a + b + c, a + (b + c), SumPrior([a, b + c])):
        assert isinstance(total, SumPrior)
        assert [id(part) for part in total.parts] == [id(a), id(b), id(c)]
    assert (a + UniformPrior()).num_heads == 2
    assert not (a + BucketPrior(2)).has_lanes
    assert (a + b).has_lanes


@lawful
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_scaling_multiplies_and_composes(c, d):
    prior = randomise(SpectralPrior(2, rank=2) + sink() + RecencyPrior(2))
    base = prior.log_prior(5, 7)
    torch.testing.assert_close((c * prior).log_prior(5, 7), c * base)
    torch.testing.assert_close((prior * c).log_prior(5, 7), c * base)
    torch.testing.assert_close((d * (c * prior)).log_prior(5, 7), d * c * base)
    torch.testing.assert_close((2 * prior).log_prior(5, 7), (prior + prior).log_prior(5, 7))


def test_a_window_is_a_window_of_the_whole():
    prior = randomise(SpectralPrior(2, rank=3) + sink() + RecencyPrior(2))
    whole = prior.log_prior(40, 40)
    query, key = [39, 0, 12], [5, 5, 31, 0]
    torch.testing.assert_close(prior.log_prior(query, key), whole[:, query][:, :, key])


def test_kinds_and_flags():
    assert SpectralPrior(1, rank=1).kind == "relative"
    assert sink().kind == "key"
    assert RecencyPrior(1).kind == ALiBiPrior(1).kind == "recency"
    assert ALiBiPrior(1, symmetric=True).kind == "relative"
    assert (-1 * sink()).kind == "key"
    assert (-1 * sink()).name == "sink"


@pytest.mark.parametrize("bad", [Prior(), SpectralPrior])
def test_sums_refuse_what_is_no_prior_or_has_no_law(bad):
    if isinstance(bad, Prior):
        with pytest.raises(TypeError, match="does not define its log-prior"):
            bad.log_prior(1, 1)
        with pytest.raises(TypeError, match="does not define its factors"):
            bad.lanes(1, 1)
    else:
        with pytest.raises(TypeError, match="parts must be priors"):
            SumPrior([bad])


def test_errors_of_sums_and_scaling():
    with pytest.raises(ValueError, match="at least one prior"):
        SumPrior([])
    with pytest.raises(ValueError, match=r"equal head counts.*\[2, 3\]"):
        SpectralPrior(2, rank=1) + RecencyPrior(3)
    with pytest.raises(ValueError, match="same grid axes"):
        SpectralPrior(2, rank=1, axes=1) + SpectralPrior(2, rank=1, axes=2)
    for factor in (math.inf, math.nan):
        with pytest.raises(ValueError, match="factor must be finite"):
            ScaledPrior(sink(), factor)
    for other in ("2", None, True, torch.ones(2)):
        with pytest.raises(TypeError):
            other * sink()
    with pytest.raises(TypeError):
        sink() + 1


def test_errors_of_lanes():
    prior = sink()
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="dtype must be float64, float32, bfloat16"):
            prior.lanes(2, 2, dtype=dtype)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive"):
            prior.lanes(2, 2, scale=scale)
    for lawless in (BucketPrior(2), ALiBiPrior(2, symmetric=True), sink() + BucketPrior(2)):
        with pytest.raises(ValueError, match="no finite factorisation.*sdpa_bias"):
            lawless.lanes(2, 2)


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        (0, ValueError, "at least one position, got a length of 0"),
        (-3, ValueError, "got a length of -3"),
        (True, TypeError, "got True"),
        ("8", TypeError, "got '8'"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "got an empty one"),
        (torch.zeros(0, 3), ValueError, "got an empty one"),
        ([1, -1], ValueError, "must not be negative, got -1"),
        ([0.0, math.nan], ValueError, "must be finite"),
        ([math.inf], ValueError, "must be finite"),
        (torch.tensor([[0.0, math.inf]]), ValueError, "must be finite"),
        (torch.tensor([[0.0, -2.0]]), ValueError, "must not be negative"),
        ([True, False], TypeError, "got dtype torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(2, 2, 2), ValueError, r"got \(2, 2, 2\)"),
        (torch.zeros(2, 0), ValueError, r"got \(2, 0\)"),
        (torch.tensor(3), ValueError, r"got \(\)"),
        ([["a"]], TypeError, "got list"),
    ],
)
def test_positions_that_are_none(positions, error, words):
    with pytest.raises(error, match=words):
        as_positions(positions)
    for name, arguments in (("query_pos", (positions, 2)), ("key_pos", (2, positions))):
        with pytest.raises(error, match=name):
            UniformPrior().log_prior(*arguments)


def test_positions_in_all_their_forms():
    wanted = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    for form in (3, [0, 1, 2], (0.0, 1.0, 2.0), np.arange(3), torch.arange(3), wanted.float()):
        assert torch.equal(as_positions(form), wanted)
    assert torch.equal(as_positions(range(3)), wanted)


def test_grid_positions_are_row_major():
    points = grid_positions(2, 3, class_token=True)
    assert points.shape == (7, 3)
    assert points[:, 0].tolist() == list(range(7))
    assert points[0, 1:].isnan().all()
    assert points[1:, 1:].tolist() == [[r, c] for r in range(2) for c in range(3)]
    assert torch.equal(grid_positions(2, 3)[:, 1:], points[1:, 1:])
    for size in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="height and width must be at least 1"):
            grid_positions(*size)


def test_grid_priors_ask_for_grid_positions():
    prior = SpectralPrior(1, rank=2, axes=2)
    with pytest.raises(
        ValueError, match=r"query_pos must have shape \(length, 3\).*grid_positions"
    ):
        prior.log_prior(4, 4)
    with pytest.raises(ValueError, match="key_pos must have shape"):
        prior.lanes(grid_positions(2, 2), 4)
