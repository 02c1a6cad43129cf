"""The attention layer: projections around prior_attention, grouped heads, and the cache."""

import copy
import math

import pytest
import torch

from goatviz.attention import (
    Attention,
    InterpolatedRotaryEmbedding,
    LayerCache,
    RotaryEmbedding,
    prior_attention,
)
from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    RecencyPrior,
    SinkPrior,
    SpectralPrior,
    UniformPrior,
    grid_positions,
)

LENGTH = 13


def goat(heads):
    prior = (
        SpectralPrior(heads, rank=2)
        + SinkPrior(heads, rank=2, training_length=8)
        + RecencyPrior(heads)
    )
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    return prior


def buckets(heads):
    prior = BucketPrior(heads, num_buckets=8, max_distance=16)
    torch.nn.init.normal_(prior.table)
    return prior


def interpolated():
    rotary = InterpolatedRotaryEmbedding(8, training_length=8)
    rotary.target_length = LENGTH
    return rotary


SCHEMES = {
    "goat": lambda: {"prior": goat(2)},
    "goat, shared": lambda: {"prior": goat(1)},
    "uniform": lambda: {},
    "alibi": lambda: {"prior": ALiBiPrior(2)},
    "buckets": lambda: {"prior": buckets(2)},
    "rotary": lambda: {"rotary": RotaryEmbedding(8)},
    "interpolated": lambda: {"rotary": interpolated()},
    "rotary and goat": lambda: {"rotary": RotaryEmbedding(3), "prior": goat(2)},
    "content_dim": lambda: {"prior": goat(2), "content_dim": 11},
    "reference": lambda: {"prior": goat(2), "impl": "reference"},
    "no bias": lambda: {"prior": goat(2), "bias": False},
}


def layer(name="goat", **changes):
    return Attention(32, 4, num_kv_heads=2, **(SCHEMES[name]() | changes)).eval()


def tokens(batch=2, length=LENGTH):
    return torch.randn(batch, length, 32)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 4, 3], [12, 1]], ids=str)
def test_cached_is_full(name, chunks):
    attention, x = layer(name), tokens()
    cache = LayerCache()
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split(chunks, dim=1)]
        full = attention(x)
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_beams_may_change_places_between_tokens():
    """Keys and values that were chosen anew are not those that the cache has room behind."""
    attention, x = layer(), tokens()
    cache = LayerCache()
    with torch.no_grad():
        for part in x[:, :7].split([4, 1, 1, 1], dim=1):
            attention(part, cache=cache)
        cache.k, cache.v = cache.k[[1, 0]], cache.v[[1, 0]]
        parts = [attention(part, cache=cache) for part in x[[1, 0], 7:].split(1, dim=1)]
        full = attention(x)[[1, 0], 7:]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_copies_of_a_cache_go_separate_ways():
    """And a cache may go back: what another copy holds is never written over."""
    attention, x = layer(), tokens()
    other = torch.cat([x[:, :7], torch.randn(2, 6, 32)], dim=1)
    cache = LayerCache()
    with torch.no_grad():
        for part in x[:, :7].split([5, 1, 1], dim=1):
            attention(part, cache=cache)
        branch = copy.copy(cache)
        for at in range(7, 13):
            ours = attention(x[:, at : at + 1], cache=cache)
            theirs = attention(other[:, at : at + 1], cache=branch)
        torch.testing.assert_close(ours, attention(x)[:, -1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs, attention(other)[:, -1:], rtol=0, atol=1e-5)
        held = cache.k.clone(), cache.k
        cache.k, cache.v = cache.k[:, :, :9], cache.v[:, :, :9]
        cache.positions, cache.end = cache.positions[:9], 9
        back = torch.cat([x[:, :9], other[:, 9:10]], dim=1)
        after = attention(back[:, 9:], cache=cache)
        torch.testing.assert_close(after, attention(back)[:, -1:], rtol=0, atol=1e-5)
    assert torch.equal(*held)


def test_a_prompt_may_be_read_in_inference_mode():
    attention, x = layer(), tokens()
    cache = LayerCache()
    with torch.inference_mode():
        for part in x[:, :7].split([5, 1, 1], dim=1):
            attention(part, cache=cache)
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x[:, 7:].split(1, dim=1)]
        full = attention(x)[:, 7:]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_a_cache_with_gradients_has_those_of_the_full_pass():
    attention, x = layer(), tokens().requires_grad_()
    cache = LayerCache()
    parts = [attention(part, cache=cache) for part in x.split([9, 1, 1, 2], dim=1)]
    leaves = [x, *attention.parameters()]
    ours = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), leaves)
    wanted = torch.autograd.grad(attention(x).square().sum(), leaves)
    for each, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)


def test_cached_is_full_with_padding_that_comes_and_goes():
    attention, x = layer(), tokens()
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 3:5] = False
    cache = LayerCache()
    with torch.no_grad():
        parts = [
            attention(x[:, :2], cache=cache),
            attention(x[:, 2:6], cache=cache, padding_mask=keep[:, 2:6]),
            attention(x[:, 6:], cache=cache),
        ]
        full = attention(x, padding_mask=keep)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_cached_is_full_at_given_positions():
    attention, x = layer(), tokens()
    at = torch.tensor([3, 4, 7, 8, 9, 20, 21, 22, 30, 31, 32, 33, 50])
    cache = LayerCache()
    with torch.no_grad():
        parts = [
            attention(x[:, a:b], positions=at[a:b], cache=cache)
            for a, b in ((0, 4), (4, 5), (5, 13))
        ]
        full = attention(x, positions=at)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_default_positions_continue_what_is_cached():
    attention, x = layer(), tokens()
    cache = LayerCache()
    with torch.no_grad():
        parts = [
            attention(x[:, :6], positions=range(20, 26), cache=cache),
            attention(x[:, 6:], cache=cache),
        ]
        full = attention(x, positions=range(20, 20 + LENGTH))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_future_changes_nothing(name):
    attention, x = layer(name), tokens()
    other = x.clone()
    other[:, 7:] = torch.randn(2, LENGTH - 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(attention(x)[:, :7], attention(other)[:, :7], rtol=0, atol=1e-6)
        assert (attention(x)[:, 7:] - attention(other)[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_padded_tokens_reach_nobody(causal):
    attention, x = layer(causal=causal), tokens()
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 9:] = False
    other = x.clone()
    other[1, 9:] = torch.randn(LENGTH - 9, 32)
    with torch.no_grad():
        got = attention(x, padding_mask=keep)
        torch.testing.assert_close(got[1, :9], attention(other, padding_mask=keep)[1, :9])
        torch.testing.assert_close(got[1:, :9], attention(x[1:, :9]), rtol=0, atol=1e-5)
        torch.testing.assert_close(got[:1], attention(x[:1]), rtol=0, atol=1e-5)


def test_bidirectional_layers_see_everything_and_permute():
    attention, x = layer("uniform", causal=False), tokens()
    shuffled = torch.randperm(LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x)[:, shuffled], attention(x[:, shuffled]), rtol=0, atol=1e-5
        )
        later = x.clone()
        later[:, -1] += 1
        assert (attention(x)[:, 0] - attention(later)[:, 0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="cache needs a causal layer"):
        attention(x, cache=LayerCache())


def test_positions_travel_with_the_tokens():
    # Permuting tokens together with their positions permutes the output.
    attention, x = layer("goat", causal=False), tokens()
    shuffled = torch.randperm(LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x)[:, shuffled],
            attention(x[:, shuffled], positions=shuffled),
            rtol=0,
            atol=2e-5,
        )


def test_grids():
    prior = SpectralPrior(2, rank=2, axes=2)
    attention = Attention(32, 4, num_kv_heads=2, prior=prior, causal=False)
    points = grid_positions(3, 4, class_token=True)
    assert attention(tokens(), positions=points).shape == (2, LENGTH, 32)
    with pytest.raises(ValueError, match="grid_positions"):
        attention(tokens())


def test_grouped_heads_are_repeated_heads():
    grouped = layer("goat")
    full = Attention(32, 4, prior=UniformPrior(), content_dim=grouped.content_dim)
    with torch.no_grad():
        full.q_proj.load_state_dict(grouped.q_proj.state_dict())
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
        for ours, theirs in ((full.k_proj, grouped.k_proj), (full.v_proj, grouped.v_proj)):
            for name in ("weight", "bias"):
                rows = getattr(theirs, name).unflatten(0, (2, -1)).repeat_interleave(2, dim=0)
                getattr(ours, name).copy_(rows.flatten(0, 1))
        # Heads 0, 1 share the first parameter set and heads 2, 3 the second.
        x = tokens()
        q, k, v, _ = full.project(x)
        dense = grouped.prior.log_prior(LENGTH, LENGTH).repeat_interleave(2, dim=0)
        scores = q.double() @ k.double().mT / math.sqrt(grouped.content_dim) + dense
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        p = scores.masked_fill(later, -math.inf).softmax(-1).float()
        out = full.out_proj((p @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(grouped(x), out, rtol=0, atol=1e-5)


def test_project_is_what_forward_attends_with():
    attention, x = layer("rotary and goat"), tokens()
    with torch.no_grad():
        q, k, v, points = attention.project(x)
        assert q.shape == (2, 4, LENGTH, 3)
        assert k.shape == (2, 2, LENGTH, 3)
        assert v.shape == (2, 2, LENGTH, 8)
        assert points.flatten().tolist() == list(range(LENGTH))
        out = prior_attention(q, k, v, prior=attention.prior, query_pos=points, key_pos=points)
        out = attention.out_proj(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, attention(x), rtol=0, atol=1e-6)
    assert attention.project(x, start=5)[3].flatten().tolist() == list(range(5, 5 + LENGTH))


def test_content_gives_way_to_lanes():
    assert layer("goat").content_dim == 8 - (2 * 2 + 1)
    assert layer("uniform").content_dim == 8
    assert layer("buckets").content_dim == 8
    assert layer("buckets").impl == "sdpa_bias"
    assert layer("goat").impl == "sdpa"
    assert "content_dim=3" in repr(layer("goat"))


def test_every_parameter_learns():
    attention = layer("goat")
    attention(tokens()).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key's bias shifts all scores of a row alike (no rotary): the softmax ignores it.
        if name not in ("k_proj.bias", "prior.parts.1.mlp.2.bias"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_heads": 0}, ValueError, "num_heads must be an integer of at least 1"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an integer"),
        ({"num_kv_heads": 3}, ValueError, "multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be an integer of at least 1, got 0"),
        ({"embed_dim": 30}, ValueError, "multiple of num_heads, got 30 and 4"),
        ({"prior": "goat"}, TypeError, "prior must be a goatviz Prior, got str"),
        ({"prior": ALiBiPrior(4)}, ValueError, r"1 or 2 heads \(num_kv_heads\), got 4"),
        ({"prior": SpectralPrior(2, rank=4)}, ValueError, "8 lanes leave no content in head_dim=8"),
        ({"content_dim": 0}, ValueError, "content_dim and head_dim must be positive"),
        ({"rotary": RotaryEmbedding(6)}, ValueError, "rotary.dim must be content_dim=8, got 6"),
        ({"impl": "dense"}, ValueError, "impl must be one of"),
        (
            {"impl": "sdpa_flash", "prior": BucketPrior(2)},
            ValueError,
            "needs lanes, but BucketPrior",
        ),
        ({"impl": "sdpa", "prior": BucketPrior(2)}, ValueError, "needs lanes, but BucketPrior"),
    ],
)
def test_construction_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        Attention(**({"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2} | arguments))


def test_call_errors():
    attention = layer()
    for x in (torch.zeros(4, 32), torch.zeros(2, 4, 31)):
        with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 32\)"):
            attention(x)
    for x in (torch.zeros(0, 4, 32), torch.zeros(2, 0, 32)):
        with pytest.raises(ValueError, match="x must not be empty"):
            attention(x)
    with pytest.raises(ValueError, match="positions must hold 13 positions, got 4"):
        attention(tokens(), positions=4)
    with pytest.raises(ValueError, match=r"padding_mask must have shape \(2, 13\)"):
        attention(tokens(), padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="padding_mask must be boolean"):
        attention(tokens(), padding_mask=torch.ones(2, LENGTH))
    cache = LayerCache()
    attention(tokens(), cache=cache)
    with pytest.raises(ValueError, match="cache holds a batch of 2, got 3"):
        attention(tokens(batch=3), cache=cache)
