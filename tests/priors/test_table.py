"""Priors from tables: looked up, held at the ends, and with the lanes that they can have."""

import math

import pytest
import torch

from goatviz.priors import KeyTablePrior, LagTablePrior


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


@pytest.mark.parametrize(("kind", "name"), [(LagTablePrior, "kernel"), (KeyTablePrior, "sink")])
def test_bad_tables_are_refused(kind, name):
    with pytest.raises(TypeError, match=f"{name} must be a floating-point Tensor, got list"):
        kind([[1.0]])
    with pytest.raises(TypeError, match="got torch.int64"):
        kind(torch.ones(1, 2, dtype=torch.long))
    for bad in (torch.zeros(3), torch.zeros(1, 0), torch.tensor([[math.inf]])):
        with pytest.raises(ValueError, match=f"{name} must be finite, of shape"):
            kind(bad)
