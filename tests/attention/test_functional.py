"""softmax(scores / tau + log prior) V three ways: the definition, one call on lanes, one mask."""

import math
from inspect import isfunction

import pytest
import torch

from goatviz.attention import attention_plan, prior_attention
from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    RecencyPrior,
    SinkPrior,
    SpectralPrior,
    UniformPrior,
)
from goatviz.transport import row_statistics

IMPLS = ("reference", "sdpa", "sdpa_bias")


def goat(heads=2):
    prior = (
        SpectralPrior(heads, rank=3)
        + SinkPrior(heads, rank=2, training_length=20)
        + RecencyPrior(heads)
    )
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    return prior.double()


def draw(*, queries=6, keys=6, heads=4, kv_heads=2, batch=2, dim=5, value_dim=7):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return (
        normal(batch, heads, queries, dim),
        normal(batch, kv_heads, keys, dim),
        normal(batch, kv_heads, keys, value_dim),
    )


def weights_by_loops(q, k, *, prior, query_pos, key_pos, causal, padding_mask, temperature):
    """p_ij = exp(logit_ij) / sum over the allowed keys, one entry at a time."""
    dense = prior.log_prior(query_pos, key_pos).double()
    batch, heads, n, dim = q.shape
    m = k.shape[2]
    out = torch.zeros(batch, heads, n, m, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own = h * k.shape[1] // heads
            table = dense[h * len(dense) // heads]
            for i in range(n):
                logits = {}
                for j in range(m):
                    if causal and key_pos[j] > query_pos[i]:
                        continue
                    if padding_mask is not None and not padding_mask[b, j]:
                        continue
                    dot = sum(
                        x * y
                        for x, y in zip(q[b, h, i].tolist(), k[b, own, j].tolist(), strict=True)
                    )
                    logits[j] = dot / math.sqrt(dim) / temperature + table[i, j].item()
                peak = max(logits.values())
                total = math.fsum(math.exp(x - peak) for x in logits.values())
                for j, x in logits.items():
                    out[b, h, i, j] = math.exp(x - peak) / total
    return out


PADDING = torch.tensor([[True] * 6, [True, True, False, True, True, False]])
PROBLEMS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "padded": {"padding_mask": PADDING},
    "padded, bidirectional": {"padding_mask": PADDING, "causal": False},
    "cached decode": {"queries": 2},
    "cached decode of one": {"queries": 1},
    "cached decode, padded": {"queries": 2, "padding_mask": PADDING},
    "more queries than keys": {"queries": 9, "causal": False},
    "given positions": {"query_pos": [9, 3, 40, 4, 4, 17], "key_pos": [0, 3, 2, 11, 40, 5]},
    "given keys": {"key_pos": [2, 3, 5, 8, 13, 21]},
    "given keys, fewer queries": {"key_pos": [2, 3, 5, 8, 13, 21], "queries": 2},
    "given keys, bidirectional": {"key_pos": [5, 3, 2, 8, 1, 0], "causal": False, "queries": 3},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 5.0, "causal": False},
    "one head each": {"heads": 2},
    "all heads on one": {"kv_heads": 1, "prior_heads": 1},
    "shared prior": {"prior_heads": 1},
    "value narrower": {"value_dim": 2},
}


def problem(name):
    settings = dict(PROBLEMS[name])
    prior = goat(settings.pop("prior_heads", 2))
    shapes = {
        s: settings.pop(s) for s in ("queries", "heads", "kv_heads", "value_dim") if s in settings
    }
    return draw(**shapes), {"prior": prior} | settings


def defaults(q, k, settings):
    """The positions that the documentation promises."""
    keys = list(settings.get("key_pos", range(k.shape[2])))
    n = q.shape[2]
    if "query_pos" in settings:
        return settings["query_pos"], keys
    return keys[len(keys) - n :] if n <= len(keys) else list(range(n)), keys


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(("queries", "keys"), ((2, 6), (6, 6), (6, 2)))
def test_the_plan_and_the_statistics_let_queries_stand_at_the_same_positions(queries, keys, causal):
    """One call, one rule: the last of the keys; more queries than keys are told where to stand."""
    q, k, v = draw(queries=queries, keys=keys)
    if queries > keys and causal:
        for refused in (attention_plan, row_statistics):
            with pytest.raises(ValueError, match="query_pos"):
                refused(q, k, prior=goat(), causal=causal)
        return
    prior = goat()
    plan = attention_plan(q, k, prior=prior, causal=causal)
    rows = row_statistics(q, k, prior=prior, causal=causal, impl="reference")
    torch.testing.assert_close(rows.entropy, plan.entropy)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = prior_attention(q, k, v, prior=prior, causal=causal, impl="sdpa")
    torch.testing.assert_close(out, plan.weights @ values)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_plan_is_the_softmax_and_all_ways_apply_it(name):
    (q, k, v), settings = problem(name)
    query_pos, key_pos = defaults(q, k, settings)
    wanted = weights_by_loops(
        q,
        k,
        prior=settings["prior"],
        query_pos=query_pos,
        key_pos=key_pos,
        causal=settings.get("causal", True),
        padding_mask=settings.get("padding_mask"),
        temperature=settings.get("temperature", 1.0),
    )
    plan = attention_plan(q, k, **settings)
    torch.testing.assert_close(plan.weights, wanted, rtol=1e-10, atol=1e-13)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    for impl in IMPLS:
        out = prior_attention(q, k, v, impl=impl, **settings)
        assert out.dtype == q.dtype
        torch.testing.assert_close(out, wanted @ values, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_agree_down_to_the_prior(name):
    (q, k, v), settings = problem(name)
    leaves = [q, k, v, *settings["prior"].parameters()]
    got = {}
    for impl in IMPLS:
        out = prior_attention(q, k, v, impl=impl, **settings)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        got[impl] = torch.autograd.grad((out * cotangent).sum(), leaves)
    for impl in IMPLS[1:]:
        for ours, wanted in zip(got[impl], got["reference"], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)


def test_gradients_are_the_derivatives():
    (q, k, v), settings = problem("causal")
    q, k, v = (t[:1, :, :3].detach().requires_grad_() for t in (q, k, v))
    for impl in IMPLS:
        assert torch.autograd.gradcheck(
            lambda *args, impl=impl: prior_attention(*args, impl=impl, **settings), (q, k, v)
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("causal", [True, False])
def test_low_precision_stays_close_to_the_definition(dtype, tolerance, impl, causal):
    prior = goat().float()
    q, k, v = (t.detach().to(dtype) for t in draw(queries=32, keys=32, dim=16, value_dim=16))
    out = prior_attention(q, k, v, prior=prior, causal=causal, impl=impl)
    wanted = prior_attention(
        q.double(), k.double(), v.double(), prior=prior, causal=causal, impl="reference"
    )
    assert out.dtype == dtype
    assert (out.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lanes_hold_their_precision_at_16384_tokens(dtype):
    # One unsplit bfloat16 lane is off by 79 % here; the promise is 1 %.
    keys, queries = 16_384, 16
    prior = ALiBiPrior(2) + SpectralPrior(2, rank=2)
    q, k, v = (
        t.detach().to(dtype)
        for t in draw(queries=queries, keys=keys, heads=2, batch=1, dim=8, value_dim=8)
    )
    out = prior_attention(q, k, v, prior=prior, impl="sdpa").double()
    wanted = prior_attention(q.double(), k.double(), v.double(), prior=prior, impl="reference")
    assert (out - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("start", [0, 10**6, 10**7])
def test_lanes_hold_their_precision_wherever_positions_begin(start):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    options = {"prior": ALiBiPrior(2), "query_pos": torch.arange(start, start + 64)}
    options["key_pos"] = options["query_pos"]
    wanted = prior_attention(q, k, v, impl="reference", **options)
    assert (prior_attention(q, k, v, **options) - wanted).abs().max() < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_no_prior_is_the_uniform_one_and_plain_attention(impl):
    q, k, v = draw(heads=2)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for prior in (None, UniformPrior(), UniformPrior(2), 0 * goat()):
        out = prior_attention(q, k, v, prior=prior, impl=impl)
        torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-12)


def test_a_prior_without_lanes_needs_the_dense_way():
    q, k, v = draw(heads=2)
    prior = BucketPrior(2).double()
    with torch.no_grad():
        prior.table.normal_()
    torch.testing.assert_close(
        prior_attention(q, k, v, prior=prior, impl="sdpa_bias"),
        prior_attention(q, k, v, prior=prior, impl="reference"),
    )
    with pytest.raises(ValueError, match="BucketPrior has no finite factorisation"):
        prior_attention(q, k, v, prior=prior, impl="sdpa")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "settings",
    [
        {"padding_mask": torch.tensor([[True] * 6, [False] * 6]), "causal": False},
        {"padding_mask": torch.tensor([[True] * 6, [False, *[True] * 5]])},
        {"query_pos": [2, 3, 4, 5, 6, 7], "key_pos": [3, 4, 5, 6, 7, 8]},
    ],
    ids=["all padding", "first key padding", "keys in the future"],
)
def test_a_query_without_a_key_is_an_error(impl, settings):
    q, k, v = draw()
    with pytest.raises(ValueError, match="allowed key|leave each query a key"):
        prior_attention(q, k, v, impl=impl, **settings)


@pytest.mark.parametrize("impl", IMPLS)
def test_adding_a_row_constant_to_the_prior_changes_nothing(impl):
    class Shifted(UniformPrior):
        has_lanes = False

        def _log_prior(self, query, key):
            return query[:, 0].view(1, -1, 1).expand(1, -1, len(key)) * 10.0

    q, k, v = draw(heads=2)
    if impl == "sdpa":
        # In lanes the constant is gone already: ALiBi's key-linear form differs by m i in row i.
        prior, same = ALiBiPrior(2).double(), ALiBiPrior(2).double()
        out = prior_attention(q, k, v, prior=prior, impl="sdpa")
        wanted = prior_attention(q, k, v, prior=same, impl="reference")
    else:
        out = prior_attention(q, k, v, prior=Shifted(), impl=impl)
        wanted = prior_attention(q, k, v, impl=impl)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)


def ask(impl="sdpa", **changes):
    q, k, v = draw()
    arguments = {"q": q, "k": k, "v": v, "prior": goat(), "impl": impl}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if isfunction(change) else change
    return prior_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": lambda t: t[0]}, ValueError, "q must have shape"),
        ({"k": lambda t: t[0]}, ValueError, "k must have shape"),
        ({"v": lambda t: t[0]}, ValueError, "v must have shape"),
        ({"v": lambda t: t[:, :, :3]}, ValueError, "v must have shape"),
        ({"v": lambda t: t[:, :1]}, ValueError, "v must have shape"),
        ({"q": lambda t: t.long()}, TypeError, "q must be floating point"),
        ({"k": lambda t: t.float()}, TypeError, "share a dtype"),
        ({"v": lambda t: t.float()}, TypeError, "v must have the dtype of k"),
        ({"q": lambda t: t[:1]}, ValueError, "agree in batch and head size"),
        ({"q": lambda t: t[..., :3]}, ValueError, "agree in batch and head size"),
        ({"q": lambda t: t[:, :3]}, ValueError, "multiple of k's 2 heads, got 3"),
        ({"q": lambda t: t[:, :, :0]}, ValueError, "q must have shape"),
        ({"k": lambda t: t[:, :, :0]}, ValueError, "k must have shape"),
        (
            {"k": lambda t: t[:, :, :4], "v": lambda t: t[:, :, :4]},
            ValueError,
            "query_pos must be given for 6 queries over 4 keys under a causal mask",
        ),
        (
            {
                "k": lambda t: t[:, :, :4],
                "v": lambda t: t[:, :, :4],
                "key_pos": [1, 2, 3, 4],
                "causal": False,
            },
            ValueError,
            "query_pos must be given for 6 queries over 4 keys at given positions",
        ),
        ({"query_pos": 5}, ValueError, "query_pos must hold 6 positions, got 5"),
        ({"key_pos": [1, 2], "query_pos": 6}, ValueError, "key_pos must hold 6 positions"),
        ({"query_pos": [-1] * 6}, ValueError, "query_pos must not be negative"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"temperature": math.inf}, ValueError, "temperature must be positive"),
        ({"prior": "alibi"}, TypeError, "prior must be a goatviz Prior, got str"),
        ({"prior": goat(3)}, ValueError, "prior must have"),
        ({"prior": goat(4)}, ValueError, "prior must have 1 or 2 heads"),
        ({"padding_mask": torch.ones(2, 6)}, TypeError, "padding_mask must be boolean"),
        (
            {"padding_mask": torch.ones(2, 5, dtype=torch.bool)},
            ValueError,
            r"padding_mask must have shape \(2, 6\)",
        ),
    ],
)
def test_errors_are_the_same_whatever_computes(impl, changes, error, words):
    with pytest.raises(error, match=words):
        ask(impl, **changes)


def test_impl_is_a_backend():
    for impl in ("dense", None, "SDPA"):
        with pytest.raises(ValueError, match="impl must be one of reference, sdpa, sdpa_flash"):
            ask(impl)


def test_the_definition_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        ask("reference", q=lambda t: t * math.nan)
