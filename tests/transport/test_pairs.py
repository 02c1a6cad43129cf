"""Weights of single pairs are those of the dense plan, of every kind of call."""

import copy
import dataclasses
import math

import pytest
import torch

from goatviz import Attention, capture
from goatviz.attention import LayerCache
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior, LagTablePrior
from goatviz.transport import AttentionCall, row_statistics
from goatviz.transport.statistics import previous_keys, statistics_of
from tests.factories import lively

BATCH, HEADS, GROUPS, LENGTH = 2, 4, 2, 300
PADDING = torch.ones(BATCH, LENGTH, dtype=torch.bool)
PADDING[0, 200:] = False
PADDING[1, :5] = False
SPARSE = torch.rand(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
BIAS = torch.randn(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))

CALLS = {
    "causal": {},
    "both ways": {"causal": False},
    "window": {"window": 3},
    "padding": {"mask": PADDING},
    "a mask for each head": {"mask": SPARSE},
    "an additive mask": {"mask": BIAS.masked_fill(BIAS > 1.5, -math.inf)},
    "bias": {"bias": BIAS[:1]},
    "softcap": {"softcap": 1.5},
    "sink": {"sink": torch.linspace(-1, 3, HEADS)},
    "scale": {"scale": 0.9},
    "goat": {"prior": lively(goat_prior(GROUPS, rank=2, sink_rank=1, training_length=64), 0.4)},
    "alibi": {"prior": ALiBiPrior(GROUPS)},
    "shared": {"prior": ALiBiPrior(1, symmetric=True), "causal": False},
    "buckets": {"prior": lively(BucketPrior(GROUPS))},
    "lags": {"prior": LagTablePrior(torch.linspace(-2, 2, 2 * LENGTH).view(2, LENGTH))},
    "everything": {
        "prior": ALiBiPrior(GROUPS),
        "bias": BIAS,
        "sink": torch.ones(HEADS),
        "softcap": 4.0,
        "window": 40,
        "mask": PADDING,
        "scale": 0.5,
    },
}


def made(name, *, queries=LENGTH, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, LENGTH, 8, generator=random, dtype=torch.float64)
    k = torch.randn(BATCH, GROUPS, LENGTH, 8, generator=random, dtype=torch.float64)
    return AttentionCall.from_tensors(q[:, :, -queries:].to(dtype), k.to(dtype), **CALLS[name])


def some_keys(queries, *, batch=BATCH, seed=3):
    random = torch.Generator().manual_seed(seed)
    keys = torch.randint(-1, LENGTH, (batch, queries, 5), generator=random)
    keys[..., 0] = -1
    keys[..., 1] = torch.arange(LENGTH - queries, LENGTH) - 1
    return keys


def by_hand(call, keys):
    """Pairs picked out of dense plans, head by head."""
    wanted = torch.full((*call.shape[:3], keys.shape[-1]), math.nan, dtype=torch.float64)
    for b in range(call.shape[0]):
        at = keys[b if len(keys) > 1 else 0]
        for h in range(call.shape[1]):
            weights = call.plan(b, h).weights.gather(-1, at.clamp(min=0))
            wanted[b, h] = weights.masked_fill(at < 0, math.nan)
    return wanted


def normaliser(call):
    rows = [[call.logits(b, h).logits for h in range(HEADS)] for b in range(BATCH)]
    logits = torch.stack([torch.stack(row) for row in rows])
    if call.sink is not None:
        column = call.sink.view(1, HEADS, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.logsumexp(-1)


@pytest.mark.parametrize("name", CALLS)
def test_weights_of_pairs_are_the_dense_ones(name):
    call, keys = made(name), some_keys(LENGTH)
    wanted = by_hand(call, keys)
    seen = torch.stack([torch.stack([call.has_keys(b, h) for h in range(HEADS)]) for b in (0, 1)])
    found = call.weights_at(keys, normaliser(call))
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-12, atol=1e-15, equal_nan=True)
    assert bool((found[seen].nan_to_num(0.0) > 0).any())


def test_lanes_give_the_weights_of_pairs_in_the_priors_precision():
    call, keys = made("goat"), some_keys(LENGTH)
    for prior, tolerance in ((call.prior, 2e-5), (copy.deepcopy(call.prior).double(), 1e-12)):
        call = dataclasses.replace(call, prior=prior)
        found = call.weights_at(keys, normaliser(call), lanes=True)
        wanted = by_hand(call, keys)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", ["blockwise", "reference"])
def test_statistics_gather_them_with_or_without_the_normaliser(name, impl):
    call, keys = made(name, dtype=torch.float32), some_keys(LENGTH)
    rows = statistics_of(call, ["gathered_mass"], at=keys, keys=(), impl=impl)
    assert set(rows.asked()) == {"gathered_mass"} and torch.equal(rows.at, keys)
    torch.testing.assert_close(
        rows.gathered_mass.double(), by_hand(call, keys), rtol=2e-5, atol=1e-6, equal_nan=True
    )


def test_fused_statistics_gather_them_too():
    call, keys = made("causal", dtype=torch.float32), some_keys(LENGTH)
    rows = statistics_of(call, ["gathered_mass", "log_normaliser"], at=keys, impl="fused")
    torch.testing.assert_close(
        rows.gathered_mass.double(), by_hand(call, keys), rtol=1e-4, atol=1e-6, equal_nan=True
    )


def test_one_set_of_keys_serves_a_whole_batch_and_cached_queries():
    for queries in (1, 7):
        call, keys = made("goat", queries=queries), some_keys(queries, batch=1)
        found = call.weights_at(keys, normaliser(call))
        wanted = by_hand(call, keys)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_the_key_before_each_query_is_found_by_its_position():
    q = torch.zeros(1, 1, 3, 4)
    call = AttentionCall.from_tensors(q, torch.zeros(1, 1, 5, 4))
    assert previous_keys(call)[0, :, 0].tolist() == [1, 2, 3]
    moved = AttentionCall.from_tensors(q, q, query_pos=[7, 0, 3], key_pos=[7, 6, 2])
    assert previous_keys(moved)[0, :, 0].tolist() == [1, -1, 2]


def test_capture_keeps_the_key_before_each_query_also_while_decoding():
    torch.manual_seed(0)
    layer, x = Attention(16, 4, num_kv_heads=2, prior=ALiBiPrior(2)), torch.randn(2, 9, 16)
    with capture(layer, keep="projections") as whole:
        layer(x)
    plan = torch.stack([whole.plan(head=h, batch=1).weights for h in range(4)])
    mass = whole.calls[0].rows.gathered_mass[1, ..., 0]
    assert bool(mass[:, 0].isnan().all())
    wanted = plan.diagonal(-1, dim1=1, dim2=2)
    torch.testing.assert_close(mass[:, 1:].double(), wanted, rtol=1e-5, atol=1e-6)
    cache = LayerCache()
    with capture(layer) as steps:
        for part in x.split(4, dim=1):
            layer(part, cache=cache)
    by_steps = torch.cat([call.rows.gathered_mass for call in steps.calls], dim=2)
    torch.testing.assert_close(by_steps[1, ..., 0], mass, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_keys_that_do_not_fit_are_refused():
    call = made("causal", queries=2)
    lse = torch.zeros(BATCH, HEADS, 2)
    for keys, error, match in (
        ([[0]], TypeError, "keys must be a Tensor of int64, got list"),
        (torch.zeros(1, 2, 1), TypeError, "keys must be a Tensor of int64, got torch.float32"),
        (torch.zeros(2, 1).long(), ValueError, r"keys must have shape \(2 or 1, 2, m\).*\(2, 1\)"),
        (torch.zeros(3, 2, 1).long(), ValueError, r"got \(3, 2, 1\)"),
        (
            torch.full((1, 2, 1), 300),
            ValueError,
            r"keys must be in -1 \.\. 299 .* got 300 \.\. 300",
        ),
        (torch.full((1, 2, 1), -2), ValueError, r"got -2 \.\. -2"),
    ):
        with pytest.raises(error, match=match):
            call.weights_at(keys, lse)
    with pytest.raises(ValueError, match=r"at must be in -1 \.\. 299"):
        row_statistics(call.q, call.k, at=torch.full((1, 2, 1), 300))
