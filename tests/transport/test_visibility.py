"""Which pairs are allowed: rules, masks and intervals say the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goatviz.transport.visibility import Visibility


def dense(visibility, batch=0, head=0):
    return visibility.block(slice(None), slice(None), batch=batch, head=head)


def by_hand(n_queries, n_keys, causal, window, keep):
    query = torch.arange(n_queries).unsqueeze(-1) + n_keys - n_queries
    lag = query - torch.arange(n_keys)
    allowed = keep.clone().expand(n_queries, -1).clone()
    if causal:
        allowed &= lag >= 0
    if window is not None:
        allowed &= lag.abs() < window
    return allowed


@given(
    n_keys=st.integers(1, 12),
    short=st.integers(0, 8),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_rules_masks_and_intervals_agree(n_keys, short, causal, window, seed):
    n_queries = max(1, n_keys - short)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, n_keys, generator=generator) < 0.7
    index = torch.arange(n_keys)
    rules = Visibility.from_rules(
        index[n_keys - n_queries :], index, causal=causal, window=window, padding_mask=keep
    )
    mask = torch.stack([by_hand(n_queries, n_keys, causal, window, row) for row in keep])
    found = Visibility.from_mask(mask.unsqueeze(1))
    assert found.dense is None
    query_mask = torch.rand(2, n_queries, generator=generator) < 0.5
    for visibility in (rules, found):
        for b in range(2):
            assert torch.equal(dense(visibility, b), mask[b])
            window_ = visibility.block(slice(0, 2), slice(1, None, 2), batch=b)
            assert torch.equal(window_, mask[b, 0:2, 1::2])
        assert torch.equal(visibility.count().squeeze(1), mask.sum(-1))
        assert torch.equal(visibility.observers().squeeze(1), mask.sum(-2))
        counted = (mask & query_mask.unsqueeze(-1)).sum(-2)
        assert torch.equal(visibility.observers(query_mask).squeeze(1), counted)


def test_positions_in_any_order():
    keys = torch.tensor([3.0, 0.0, 2.0, 1.0])
    queries = torch.tensor([2.0, 0.0])
    visibility = Visibility.from_rules(queries, keys, causal=True)
    assert torch.equal(dense(visibility), keys <= queries.unsqueeze(-1))


def test_a_mask_without_intervals_stays_dense():
    mask = torch.tensor([[[[True, True, False], [True, False, True], [True, True, True]]]])
    visibility = Visibility.from_mask(mask)
    assert visibility.dense is not None and visibility.batch == 1
    assert torch.equal(dense(visibility), mask[0, 0])
    assert visibility.count().tolist() == [[[2, 2, 3]]]
    assert visibility.observers().tolist() == [[[3, 2, 2]]]
    assert visibility.observers(torch.tensor([[True, False, False]])).tolist() == [[[1, 1, 0]]]


def test_heads_of_their_own_stay_dense_and_expanded_ones_do_not():
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert Visibility.from_mask(causal.expand(3, 2, 4, 4)).dense is None
    heads = torch.stack([causal, causal.mT]).unsqueeze(0)
    visibility = Visibility.from_mask(heads)
    assert torch.equal(dense(visibility, head=1), causal.mT)


def test_large_masks_are_read_in_blocks_of_rows():
    mask = torch.ones(1, 1, 2500, 40, dtype=torch.bool)
    mask[0, 0, 2400, 3] = False
    assert Visibility.from_mask(mask).dense is not None
    mask[0, 0, :, 3] = False
    visibility = Visibility.from_mask(mask)
    assert visibility.dense is None and 3 not in visibility.keys[0]


def test_a_mask_that_allows_nothing():
    visibility = Visibility.from_mask(torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    assert visibility.count().tolist() == [[[0, 0]]]
    assert not dense(visibility).any()
    assert visibility.observers().tolist() == [[[0, 0, 0]]]


def test_padding_of_self_attention():
    index = torch.arange(4)
    keep = torch.tensor([[False, True, True, True], [True, True, True, False]])
    visibility = Visibility.from_rules(index, index, causal=True, padding_mask=keep)
    assert torch.equal(visibility.real_queries(0), keep)
    cached = Visibility.from_rules(index[2:], index, causal=True, padding_mask=keep)
    assert torch.equal(cached.real_queries(2), keep[:, 2:])


def test_queries_before_the_empty_places_of_a_cache():
    mask = torch.ones(2, 6, dtype=torch.bool).tril(1)
    visibility = Visibility.from_mask(mask[None, None])
    assert visibility.real_queries(1).tolist() == [[True, True]]
    # Nobody uses the key behind the second query, nor any behind that.
    assert visibility.real_queries(2).tolist() == [[True, False]]
    mask[0] = False
    assert Visibility.from_mask(mask[None, None]).real_queries(1).tolist() == [[False, True]]


def test_bad_masks_are_refused():
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch.float32"):
        Visibility.from_mask(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"mask must have shape .* got \(2, 2\)"):
        Visibility.from_mask(torch.zeros(2, 2, dtype=torch.bool))
