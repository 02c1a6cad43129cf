"""Priors from tables: looked up, held at the ends, and with the lanes that they can have."""

import math

import pytest
import torch

from goatviz.attention import prior_attention
from goatviz.priors import ALiBiPrior, KeyTablePrior, LagTablePrior


def test_lags_are_looked_up_and_held_at_the_ends():
    kernel = torch.tensor([[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    causal = LagTablePrior(kernel).log_prior(5, 5)
    both = LagTablePrior(kernel, first_lag=-1).log_prior(5, 5)
    for i in range(5):
        for j in range(5):
            lag = i - j
            assert causal[:, i, j].tolist() == kernel[:, min(max(lag, 0), 2)].tolist()
            assert both[:, i, j].tolist() == kernel[:, min(max(lag + 1, 0), 2)].tolist()
    assert not LagTablePrior(kernel).has_lanes


def test_keys_are_looked_up_and_their_lanes_say_the_same():
    prior = KeyTablePrior(torch.randn(2, 4, dtype=torch.float64))
    dense = prior.log_prior(3, 6)
    assert torch.equal(dense[:, 1, :4], prior.sink) and torch.equal(
        dense[:, 0, 5], prior.sink[:, 3]
    )
    lanes = prior.lanes(3, 6, dtype=torch.float64)
    torch.testing.assert_close(lanes.query @ lanes.key.mT, dense)


def test_tables_add_up_and_name_their_parts():
    total = LagTablePrior(torch.randn(2, 3)) + KeyTablePrior(torch.randn(2, 3))
    assert list(total.components()) == ["relative", "sink"] and total.num_heads == 2


def test_a_fractional_lag_takes_the_entry_below():
    prior = LagTablePrior(torch.arange(5.0).unsqueeze(0), first_lag=-2)
    found = prior.log_prior([1.0, 1.5], [0.0, 1.25, 2.0, 3.0])
    assert found[0].tolist() == [[3.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]]


def test_a_table_of_alibi_is_alibi():
    table = LagTablePrior(-ALiBiPrior(2).slopes[:, None] * torch.arange(30.0))
    tri = torch.ones(30, 30).tril().bool()
    found, wanted = table.log_prior(30, 30), ALiBiPrior(2).log_prior(30, 30)
    torch.testing.assert_close(found[:, tri], wanted[:, tri])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lanes_carry_keys_beyond_the_end(dtype):
    sink = 8 * torch.randn(2, 5)
    prior = KeyTablePrior(sink)
    lanes = prior.lanes(3, 12, dtype=dtype, scale=0.25)
    found = 0.25 * lanes.query.double() @ lanes.key.double().mT
    wanted = prior.log_prior(3, 12).double()
    rest = found - wanted
    assert (rest - rest[..., :1]).abs().max() < 1e-4


def test_attention_is_the_same_by_every_way_that_a_table_has():
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind(0)
    sink, lag = KeyTablePrior(torch.randn(2, 6)), LagTablePrior(torch.randn(2, 4))
    for prior, ways in (
        (sink, ("sdpa", "sdpa_bias")),
        (lag, ("sdpa_bias",)),
        (sink + lag, ("sdpa_bias",)),
    ):
        wanted = prior_attention(q, k, v, prior=prior, impl="reference")
        for impl in ways:
            torch.testing.assert_close(prior_attention(q, k, v, prior=prior, impl=impl), wanted)
    with pytest.raises(ValueError, match="LagTablePrior has no finite factorisation"):
        lag.lanes(3, 3)
    assert sink.has_lanes and not (sink + lag).has_lanes and not (2.0 * lag).has_lanes


def test_tables_are_copies_that_are_not_trained():
    for kind, name in ((LagTablePrior, "kernel"), (KeyTablePrior, "sink")):
        table = torch.zeros(1, 3, requires_grad=True)
        prior = kind(table)
        with torch.no_grad():
            table.fill_(1.0)
        assert getattr(prior, name).tolist() == [[0.0] * 3]
        assert not list(prior.parameters()) and list(prior.state_dict()) == [name]


@pytest.mark.parametrize(("kind", "name"), [(LagTablePrior, "kernel"), (KeyTablePrior, "sink")])
def test_bad_tables_are_refused(kind, name):
    with pytest.raises(TypeError, match=f"{name} must be a floating-point Tensor, got list"):
        kind([[1.0]])
    with pytest.raises(TypeError, match="got torch.int64"):
        kind(torch.ones(1, 2, dtype=torch.long))
    for bad in (torch.zeros(3), torch.zeros(1, 0), torch.tensor([[math.inf]])):
        with pytest.raises(ValueError, match=f"{name} must be finite, of shape"):
            kind(bad)
