"""Every backend against the definition: those that run here, and the contract of flash-attn."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from goatviz.attention import BACKENDS, Attention, LayerCache, flex, prior_attention
from goatviz.models import goat_prior
from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    KeyTablePrior,
    LagTablePrior,
    RecencyPrior,
    SpectralPrior,
    grid_positions,
)
from goatviz.priors.separable import is_separable, key_table, lag_table

LENGTH = 300


def goat(heads=2):
    torch.manual_seed(5)
    prior = goat_prior(heads, rank=3, sink_rank=2, training_length=64)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    return prior.requires_grad_(False)


def bucket():
    prior = BucketPrior(2).requires_grad_(False)
    torch.nn.init.normal_(prior.table)
    return prior


PRIORS = {
    "none": lambda: None,
    "goat": goat,
    "shared head": lambda: goat(1),
    "half of goat": lambda: 0.5 * goat(),
    "alibi": lambda: ALiBiPrior(2),
    "symmetric alibi": lambda: ALiBiPrior(2, symmetric=True),
    "bucket": bucket,
    "tables": lambda: (
        LagTablePrior(torch.randn(2, 90), first_lag=-30) + KeyTablePrior(torch.randn(2, 50))
    ),
}
SEPARABLE = {name: make for name, make in PRIORS.items() if name != "none"}


def draw(queries=LENGTH, keys=LENGTH, *, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((4, queries, 20), (2, keys, 20), (2, keys, 24))
    return [torch.randn(batch, *s, generator=generator).to(dtype) for s in shapes]


def padding(keys=LENGTH):
    keep = torch.ones(2, keys, dtype=torch.bool)
    keep[0, 4::5] = False
    keep[1, 5:9] = False
    return keep


def apart(keys=LENGTH):
    return 3 + 2 * torch.arange(keys)


def close(ours, wanted, tolerance=2e-5):
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
    assert float((ours - wanted).norm()) <= tolerance * float(wanted.norm())


def agree(impl, q, k, v, tolerance=2e-5, **settings):
    close(
        prior_attention(q, k, v, impl=impl, **settings),
        prior_attention(q, k, v, impl="reference", **settings),
        tolerance,
    )


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_prior_is_its_two_tables(name):
    prior = SEPARABLE[name]()
    assert is_separable(prior)
    index = torch.arange(40, dtype=torch.float64)
    lags = torch.arange(-39, 40, dtype=torch.float64)
    by_lag, by_key = lag_table(prior, lags), key_table(prior, index)
    place = (index[:, None] - index).long() + 39
    values = by_lag[:, place] + by_key[:, None]
    wanted = prior.log_prior(40, 40).double()
    # ALiBi and recency may differ by a constant of the row.
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)


def test_a_prior_on_a_grid_is_not_separable():
    assert not is_separable(SpectralPrior(2, rank=4, axes=2))


# --- PyTorch's kernels ---


@pytest.mark.parametrize("impl", ["sdpa", "sdpa_flash", "sdpa_math", "sdpa_bias"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": False},
        {"padding_mask": padding()},
        {"window": 7},
        {"window": 7, "causal": False, "padding_mask": padding()},
        {"query_pos": apart(), "key_pos": apart(), "window": 31},
    ],
    ids=["causal", "open", "padding", "window", "open window, padding", "given positions"],
)
def test_sdpa_is_the_definition(impl, settings):
    agree(impl, *draw(), prior=goat(), **settings)


@pytest.mark.parametrize("impl", ["sdpa", "sdpa_bias"])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_over_many_keys(impl, queries, dtype):
    settings = {"prior": goat(), "padding_mask": padding()}
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    agree(impl, *draw(queries, dtype=dtype), tolerance, **settings)
    agree(impl, *draw(queries, dtype=dtype), tolerance, prior=goat(), window=20)


@pytest.mark.parametrize("impl", ["sdpa_efficient", "sdpa_cudnn"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels are there")
def test_a_kernel_that_is_not_there_says_so(impl):
    with pytest.raises(ValueError, match=f"impl='{impl}' does not serve this call"):
        prior_attention(*draw(), prior=goat(), impl=impl)
    assert BACKENDS[impl].hindrance() == "there is no NVIDIA GPU"


@pytest.mark.parametrize("impl", ["sdpa", "sdpa_flash", "sdpa_bias"])
def test_a_softcap_is_refused_where_no_kernel_has_one(impl):
    with pytest.raises(ValueError, match="softcap"):
        prior_attention(*draw(8, 8), softcap=3.0, impl=impl)


def test_a_softcap_bends_the_scores_and_not_the_prior():
    q, k, v = draw(6, 6)
    cap, tau, prior = 0.7, 2.0, goat()
    keys, values = (each.double().repeat_interleave(2, 1) for each in (k, v))
    scores = q.double() @ keys.mT / math.sqrt(20) / tau
    logits = cap * torch.tanh(scores / cap)
    logits = logits + prior.log_prior(6, 6).double().repeat_interleave(2, 0)
    logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    out = prior_attention(q, k, v, prior=prior, softcap=cap, temperature=tau, impl="reference")
    close(out, (logits.softmax(-1) @ values).float())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"window": 0}, ValueError, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window must be an integer"),
        ({"softcap": 0.0}, ValueError, "softcap must"),
        ({"softcap": "3"}, TypeError, "softcap must"),
    ],
)
def test_bad_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        prior_attention(*draw(8, 8), impl="reference", **settings)


def test_a_window_that_leaves_a_query_nothing_is_an_error():
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[1, 10:15] = False
    for impl in ("reference", "sdpa"):
        with pytest.raises(ValueError, match=r"query 12 \(batch entry 1\) has no allowed key"):
            prior_attention(*draw(30, 30), padding_mask=keep, window=3, impl=impl)


# --- FlexAttention ---


@pytest.fixture
def uncompiled(monkeypatch):
    """The same function without its compiler, which takes half a minute for each kind of call."""
    monkeypatch.setattr(flex, "compiled", lambda device: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": False, "softcap": 0.8},
        {"padding_mask": padding(), "temperature": 0.5},
        {"window": 140},
        {"window": 9, "causal": False, "padding_mask": padding()},
        {"query_pos": apart(), "key_pos": apart()},
    ],
    ids=["causal", "open, softcap", "padding", "window", "open window, padding", "positions"],
)
def test_flex_is_the_definition(uncompiled, name, settings):
    agree("flex", *draw(), prior=PRIORS[name](), **settings)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [1, 7, 130])
def test_flex_serves_the_last_queries(uncompiled, queries):
    tensors = [each.requires_grad_() for each in draw(queries)]
    with torch.no_grad():
        agree("flex", *tensors, prior=goat())
    agree("flex", *draw(queries, dtype=torch.bfloat16), 1e-2, prior=goat(), window=40)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_layer_can_be_computed_by_flex(uncompiled):
    torch.manual_seed(0)
    plain = Attention(32, 4, num_kv_heads=2, prior=goat(), content_dim=8).eval()
    layer = Attention(32, 4, num_kv_heads=2, prior=goat(), content_dim=8, impl="flex").eval()
    layer.load_state_dict(plain.state_dict())
    x, cache = torch.randn(2, 40, 32), LayerCache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split([30, 1, 9], dim=1)]
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat(parts, 1), plain(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prior": RecencyPrior(2)}, "no gradients on a CPU"),
        (
            {
                "prior": SpectralPrior(2, rank=4, axes=2).requires_grad_(False),
                "query_pos": grid_positions(3, 4),
                "key_pos": grid_positions(3, 4),
                "causal": False,
            },
            "sums of functions of the lag and of the key",
        ),
        ({"query_pos": torch.arange(12) + 0.5, "key_pos": 12}, "fractions in query_pos"),
    ],
    ids=["gradients", "grid", "fractions"],
)
def test_flex_refuses_what_it_does_not_serve(settings, words):
    with pytest.raises(ValueError, match=words):
        prior_attention(*draw(12, 12), impl="flex", **settings)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_flex_compiled_is_the_definition(slow):
    """The real kernel, twice: whole sequences, and one token of decoding."""
    assert BACKENDS["flex"].hindrance() is None
    agree("flex", *draw(), prior=goat(), window=140)
    agree("flex", *draw(1), prior=goat())


# --- flash-attn, by a stand-in with its documented signature ---


@pytest.fixture
def flash_attn(monkeypatch):
    """A module `flash_attn` that does in float64 what its documentation says, and keeps its calls.

    flash-attn 2.8: layout (batch, length, heads, d); heads of k and v divide those of q; causal
    masks and windows are aligned to the last query and the last key, both ends of a window count;
    the softcap comes before -slope |i + n_keys - n_queries - j|; the log-sum-exp is natural.
    """
    calls = []

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append({"q": q, "k": k, "v": v, "slopes": alibi_slopes, "window": window_size})
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
        assert dropout_p == 0.0 and not return_attn_probs
        n_queries, n_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        query, key, value = (
            each.double().transpose(1, 2).repeat_interleave(times, 1)
            for each, times in ((q, 1), (k, group), (v, group))
        )
        logits = softmax_scale * query @ key.mT
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        lag = torch.arange(n_queries)[:, None] + n_keys - n_queries - torch.arange(n_keys)
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[2],)
            logits = logits - alibi_slopes.double()[:, None, None] * lag.abs()
        before, after = window_size
        forbidden = torch.zeros_like(lag, dtype=torch.bool)
        if causal:
            forbidden |= lag < 0
        if before >= 0:
            forbidden |= lag > before
        if after >= 0:
            forbidden |= -lag > after
        logits = logits.masked_fill(forbidden, -math.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2).to(q.dtype)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.fixture
def flash_attn_4(flash_attn, monkeypatch):
    """A module `flash_attn.cute` with the signature of flash-attn 4.0.0b36, and nothing of 2.

    The same layout and windows, whose absent ends are negative or None; no slopes; a tuple of the
    output and, if asked for, the log-sum-exp.
    """
    second = sys.modules["flash_attn"].flash_attn_func

    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        given = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
        return second(q, k, v, window_size=window_size, **given), None

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    cute.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    return flash_attn


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
@pytest.mark.parametrize(
    "settings",
    [{}, {"causal": False}, {"window": 9}, {"window": 9, "causal": False}],
    ids=["causal", "open", "window", "open window"],
)
@pytest.mark.parametrize("name", ["none", "goat", "shared head", "half of goat", "alibi"])
def test_flash_is_the_definition(flash_attn, dtype, settings, name):
    for queries in (LENGTH, 7):
        prior = PRIORS[name]()
        agree("flash", *draw(queries, dtype=dtype), 1e-2, prior=prior, **settings)
    # Keys and values are handed over as they are, not repeated for the heads that share them.
    assert {call["k"].shape[2] for call in flash_attn} == {2}


@pytest.mark.parametrize(
    "settings", [{}, {"causal": False}, {"window": 9}, {"window": 9, "causal": False}]
)
@pytest.mark.parametrize("name", ["none", "goat", "half of goat", "alibi"])
def test_flash_4_is_the_definition(flash_attn_4, settings, name):
    prior = PRIORS[name]()
    agree("flash", *draw(dtype=torch.bfloat16), 1e-2, prior=prior, **settings)
    assert [call["slopes"] for call in flash_attn_4] == [None]
    if name == "none":
        agree("flash", *draw(dtype=torch.bfloat16), 1e-2, prior=prior, softcap=2.0, **settings)


def test_flash_4_has_lanes_in_place_of_slopes(flash_attn_4):
    q, k, v = draw(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="uniform prior and, by flash-attn 2, ALiBi's slopes"):
        prior_attention(q, k, v, prior=ALiBiPrior(2), impl="flash", softcap=0.5)
    prior = RecencyPrior(2)
    prior_attention(q, k, v, prior=prior, impl="flash").float().square().sum().backward()
    assert float(prior.raw_slope.grad.abs().min()) > 0


def test_flash_takes_slopes_in_place_of_lanes(flash_attn):
    q, k, v = draw(dtype=torch.bfloat16)
    for prior, settings in (
        (ALiBiPrior(2), {"softcap": 0.5}),
        (RecencyPrior(2).requires_grad_(False), {"window": 12}),
        (ALiBiPrior(2, symmetric=True), {"causal": False}),
    ):
        agree("flash", q, k, v, 1e-2, prior=prior, **settings)
        call = flash_attn[-1]
        assert call["q"].shape[-1] == 24
        assert call["slopes"].tolist() == prior.slope().repeat_interleave(2).tolist()


def test_slopes_that_learn_go_through_lanes(flash_attn):
    q, k, v = draw(dtype=torch.bfloat16)
    prior = RecencyPrior(2)
    prior_attention(q, k, v, prior=prior, impl="flash").float().square().sum().backward()
    assert flash_attn[-1]["slopes"] is None
    assert float(prior.raw_slope.grad.abs().min()) > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 and float16, got torch.float32"),
        ({"padding_mask": torch.ones(2, 8, dtype=torch.bool)}, "takes no padding_mask"),
        ({"query_pos": 8, "key_pos": 8}, "leave query_pos and key_pos out"),
        ({"softcap": 2.0}, "serves the uniform prior and, by flash-attn 2"),
        ({"prior": BucketPrior(2)}, "BucketPrior has no finite factorisation"),
    ],
    ids=["float32", "padding", "positions", "softcap", "no lanes"],
)
def test_flash_refuses_what_it_does_not_serve(flash_attn, settings, words):
    settings = {"prior": goat()} | settings
    tensors = draw(8, 8, dtype=settings.pop("dtype", torch.bfloat16))
    with pytest.raises(ValueError, match=words):
        prior_attention(*tensors, impl="flash", **settings)


def test_flash_refuses_heads_that_are_too_wide(flash_attn):
    q, k, v = (torch.zeros(1, 2, 4, 250, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(ValueError, match="heads of up to 256 channels, got 272"):
        prior_attention(q, k, v, prior=goat(), impl="flash")


def test_flash_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(ImportError, match="impl='flash' cannot run"):
        prior_attention(*draw(8, 8, dtype=torch.bfloat16), impl="flash")


def test_every_backend_says_what_it_is():
    for name, backend in BACKENDS.items():
        assert backend.name == name and backend.summary
        assert backend.hindrance() is None or backend.hindrance().strip()
    for name in ("reference", "sdpa", "sdpa_flash", "sdpa_math", "sdpa_bias"):
        assert BACKENDS[name].hindrance() is None


def test_the_readme_names_every_backend():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## A prior in your own attention")[1].split("\n## ")[0]
    for name in BACKENDS:
        assert f"`{name}`" in section


@pytest.mark.parametrize("value_dim", [8, 12])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_query_is_the_definition(groups, value_dim):
    torch.manual_seed(0)
    q = torch.randn(2, 2 * groups, 1, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, width, requires_grad=True) for width in (8, value_dim))
    prior = goat_prior(2, rank=2, sink_rank=2, training_length=8)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :3] = False
    settings = {"prior": prior, "query_pos": [6], "padding_mask": keep, "temperature": 0.7}
    ours, wanted = (
        prior_attention(q, k, v, impl=impl, **settings) for impl in ("sdpa", "reference")
    )
    torch.testing.assert_close(ours, wanted)
    inputs = (q, k, v, *prior.parameters())
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), inputs, allow_unused=True),
        torch.autograd.grad(wanted.square().sum(), inputs, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
