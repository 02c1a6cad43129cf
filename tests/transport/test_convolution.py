"""The prior's normaliser as a convolution equals the sum over pairs, or is not offered."""

import math

import pytest
import torch

from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior, LagTablePrior, SpectralPrior, UniformPrior
from goatviz.transport import AttentionCall, convolution
from goatviz.transport.convolution import prior_normaliser
from goatviz.transport.statistics import row_statistics


def learned_prior(heads=2, slope=-3.0):
    torch.manual_seed(1)
    prior = goat_prior(heads, rank=3, sink_rank=3, training_length=64)
    for name, parameter in prior.named_parameters():
        if "raw_slope" in name:
            torch.nn.init.constant_(parameter, slope)
        else:
            torch.nn.init.normal_(parameter, std=0.7)
    return prior.double()


def problem(n_queries, n_keys, prior, **options):
    q = torch.zeros(2, 2, n_queries, 4, dtype=torch.float64)
    return AttentionCall.from_tensors(
        q, torch.zeros(2, 2, n_keys, 4, dtype=torch.float64), prior=prior, **options
    )


def by_pairs(case, batch):
    values = case.prior.log_prior(case.query_pos, case.key_pos)
    allowed = case.visibility.block(slice(None), slice(None), batch=batch)
    return torch.logsumexp(values.masked_fill(~allowed, -math.inf), -1) / math.log(2.0)


def padding(n_keys, left=0, right=0):
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, :left] = False
    mask[1, n_keys - right :] = False
    return mask


BUCKETS = BucketPrior(2, bidirectional=True).double()
torch.nn.init.normal_(BUCKETS.table, generator=torch.Generator().manual_seed(0))
TABLE = LagTablePrior(torch.randn(1, 900, generator=torch.Generator().manual_seed(2)).double())

CASES = {
    "causal": (700, 700, {}),
    "one token": (1, 1, {}),
    "decoding": (3, 600, {}),
    "bidirectional": (300, 520, {"causal": False}),
    "more queries": (520, 70, {"causal": False}),
    "window": (600, 600, {"window": 90}),
    "window both ways": (400, 400, {"window": 300, "causal": False}),
    "left padding": (400, 400, {"mask": padding(400, left=130)}),
    "right padding": (400, 400, {"mask": padding(400, right=300)}),
    "far away": (
        300,
        300,
        {"query_pos": torch.arange(300) + 5000, "key_pos": torch.arange(300) + 4900},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "prior",
    [learned_prior(), learned_prior(slope=0.5), ALiBiPrior(1).double(), BUCKETS, TABLE],
    ids=["goat", "steep", "alibi", "buckets", "table"],
)
def test_convolution_is_the_sum_over_pairs(case, prior):
    n_queries, n_keys, options = CASES[case]
    made = problem(n_queries, n_keys, prior, **options)
    for batch in range(2):
        found, wanted = prior_normaliser(made, batch), by_pairs(made, batch)
        assert found.shape == wanted.shape == (prior.num_heads, n_queries)
        assert torch.equal(torch.isneginf(found), torch.isneginf(wanted))
        seen = ~torch.isneginf(wanted)
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dense mask", "gaps", "packed", "no prior", "additive mask"])
def test_nothing_is_offered_where_it_is_no_convolution(name):
    options = {
        "dense mask": {"mask": torch.rand(1, 1, 40, 40) < 0.5},
        "gaps": {"key_pos": 2 * torch.arange(40), "query_pos": 2 * torch.arange(40)},
        "packed": {"key_pos": torch.arange(40) % 20, "query_pos": torch.arange(40) % 20},
        "no prior": {},
        "additive mask": {"mask": torch.randn(1, 1, 40, 40)},
    }[name]
    prior = None if name == "no prior" else learned_prior()
    assert prior_normaliser(problem(40, 40, prior, **options), 0) is None


def test_a_prior_that_is_not_what_it_says_is_summed_by_pairs():
    class Product(UniformPrior):
        kind = "relative"
        has_lanes = False

        def _log_prior(self, query, key):
            return (query[:, :1] * key[:, 0] / 500.0).sin().unsqueeze(0)

    made = problem(60, 60, Product())
    assert prior_normaliser(made, 0) is None
    exact = row_statistics(made.q, made.k, prior=Product(), impl="reference").kl_to_prior
    found = row_statistics(made.q, made.k, prior=Product(), impl="blockwise").kl_to_prior
    torch.testing.assert_close(found, exact)


def test_terms_beyond_the_range_of_float64_take_smaller_blocks_or_pairs(monkeypatch):
    steep = LagTablePrior(-3.0 * torch.arange(900, dtype=torch.float64)[None])
    made = problem(700, 700, steep)
    tried = []
    whole = convolution._convolve_blocks

    def spy(kernel, bias, band, size):
        found = whole(kernel, bias, band, size)
        tried.append((size, found is not None))
        return found

    monkeypatch.setattr(convolution, "_convolve_blocks", spy)
    found = prior_normaliser(made, 0)
    assert tried == [(256, False), (64, True)]
    torch.testing.assert_close(found, by_pairs(made, 0), rtol=1e-12, atol=1e-12)
    steeper = LagTablePrior(-30.0 * torch.arange(900, dtype=torch.float64)[None])
    assert prior_normaliser(problem(700, 700, steeper), 0) is None
    found = row_statistics(made.q, made.k, prior=steeper, impl="blockwise").entropy
    exact = row_statistics(made.q, made.k, prior=steeper, impl="reference").entropy
    torch.testing.assert_close(found, exact)


def test_no_exponential_for_each_pair():
    made = problem(4096, 4096, SpectralPrior(2, rank=4).double())
    largest = 0
    original = torch.exp2

    def counted(value, *args, **kwargs):
        nonlocal largest
        largest += value.numel()
        return original(value, *args, **kwargs)

    torch.exp2 = counted
    try:
        prior_normaliser(made, 0)
    finally:
        torch.exp2 = original
    assert largest < 4096 * 4096 / 50
