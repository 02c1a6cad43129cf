"""Plans, statistics and outputs of random calls against the oracles.

A slice of seconds; `make fuzz MINUTES=10` tries them for ten minutes.
"""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from goatviz.attention import prior_attention
from goatviz.priors import ALiBiPrior, RecencyPrior, SinkPrior, SpectralPrior
from goatviz.transport import incoming_mass, row_statistics
from goatviz.transport.call import AttentionCall
from tests.fuzz import oracles
from tests.fuzz.minutes import fuzzed

BASE, TRAINED = 10_000.0, 24
KEYS, RECENT = (0,), 5


def close(q, float32):
    """How close answers come: a prior's frequencies are float32 whatever its dtype."""
    return 1e-6 if q.dtype == torch.float64 else float32


def array(tensor):
    return tensor.detach().double().numpy()


def log_prior(prior, head, query_pos, key_pos):
    """The log-prior of one head by the formulas, from the prior's parameters."""
    total = np.zeros((len(query_pos), len(key_pos)))
    for part in getattr(prior, "parts", [prior]):
        values = {name: array(value) for name, value in part.state_dict().items()}
        if isinstance(part, ALiBiPrior | RecencyPrior):
            slopes = part.slopes if isinstance(part, ALiBiPrior) else part.slope()
            total += oracles.alibi(array(slopes)[head], query_pos, key_pos)
        elif isinstance(part, SpectralPrior):
            alpha, beta = values["alpha"][head], values["beta"][head]
            total += oracles.spectral(alpha, beta, query_pos, key_pos, BASE)
        else:
            total += oracles.sink(values, head, TRAINED, BASE, key_pos)
    return total


@st.composite
def calls(draw):
    """Arguments of `row_statistics`, and of every head what the oracles need."""
    batch, kv_heads, group = draw(
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2))
    )
    heads = kv_heads * group
    n_keys, dim = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    n_queries = draw(st.integers(1, n_keys))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([0.1, 1.0, 5.0]))
    q = size * torch.randn(batch, n_queries, heads, dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, dim, n_keys, dtype=dtype).transpose(2, 3)
    options = {"causal": draw(st.booleans())}
    key_pos = np.arange(n_keys, dtype=float)
    if draw(st.booleans()):
        steps = draw(st.lists(st.integers(1, 4), min_size=n_keys, max_size=n_keys))
        key_pos = np.cumsum(steps).astype(float) + draw(st.sampled_from([-1, 0, 7, 1000]))
        options["key_pos"] = options["query_pos"] = torch.tensor(key_pos)
    query_pos = key_pos[n_keys - n_queries :]
    if "query_pos" in options:
        options["query_pos"] = torch.tensor(query_pos)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    kinds = draw(st.lists(st.sampled_from(["alibi", "recency", "spectral", "sink"]), max_size=3))
    if kinds:
        options["prior"] = make_prior(kinds, draw(st.sampled_from([1, kv_heads])), dtype)
    if draw(st.booleans()):
        options["sink"] = torch.randn(heads, dtype=torch.float64)
    lag = oracles.lags(query_pos, key_pos)
    allowed = np.ones((batch, heads, n_queries, n_keys), dtype=bool)
    bias = np.zeros((batch, heads, n_queries, n_keys))
    if options["causal"]:
        allowed &= lag >= 0
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 8))
        allowed &= np.abs(lag) < options["window"]
    mask = draw(st.sampled_from(["none", "padding", "pairs", "additive"]))
    if mask == "padding":
        keep = torch.rand(batch, n_keys) < 0.7
        options["mask"] = keep
        allowed &= keep.numpy()[:, None, None, :]
    elif mask in ("pairs", "additive"):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
        pairs = torch.rand(*shape, n_queries, n_keys) < 0.8
        options["mask"] = pairs
        if mask == "additive":
            lowest = draw(st.sampled_from([-torch.inf, -1e9, torch.finfo(dtype).min]))
            extra = torch.randn(*shape, n_queries, n_keys, dtype=dtype)
            options["mask"] = extra.masked_fill(~pairs, lowest)
            bias = bias + np.where(pairs.numpy(), array(extra), 0.0)
        allowed &= pairs.numpy()
    return (q, k, options), (allowed, bias, query_pos, key_pos)


def make_prior(kinds, heads, dtype):
    parts = []
    for kind in kinds:
        if kind == "alibi":
            parts.append(ALiBiPrior(heads))
        elif kind == "recency":
            parts.append(RecencyPrior(heads, slopes=torch.rand(heads).tolist()))
        elif kind == "spectral":
            parts.append(SpectralPrior(heads, rank=3, base=BASE))
        else:
            parts.append(SinkPrior(heads, rank=2, training_length=TRAINED, base=BASE))
        for name, parameter in parts[-1].named_parameters():
            if "slope" not in name:
                torch.nn.init.normal_(parameter)
    return sum(parts[1:], parts[0]).to(dtype)


def heads_of(call, known):
    """The oracles' view of every head: (batch, head), then the arguments of `statistics`."""
    q, k, options = call
    allowed, bias, query_pos, key_pos = known
    scale, prior = options.get("scale", q.shape[-1] ** -0.5), options.get("prior")
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            s = oracles.scores(array(q[b, h]), array(k[b, kv]), scale, options.get("softcap"))
            prior_head = None if prior is None else kv if prior.num_heads > 1 else 0
            total = bias[b, h]
            if prior is not None:
                total = total + log_prior(prior, prior_head, query_pos, key_pos)
            column = float(options["sink"][h]) if "sink" in options else None
            yield (b, h), (s, total, allowed[b, h], column, query_pos, key_pos)


@fuzzed(120)
@given(drawn=calls())
def test_statistics(drawn):
    call, known = drawn
    tolerance = close(call[0], 2e-4)
    for impl in ("reference", "blockwise", "fused"):
        try:
            names = (
                {} if impl != "fused" else {"statistics": ["entropy", "key_mass", "kl_to_prior"]}
            )
            rows = row_statistics(
                *call[:2], **call[2], keys=KEYS, recent=RECENT, impl=impl, **names
            )
            mass = incoming_mass(*call[:2], **call[2], impl=impl).mass
        except ValueError as error:
            assert impl == "fused" and "impl='fused' cannot do" in str(error)
            continue
        for (b, h), head in heads_of(call, known):
            wanted = oracles.statistics(*head, KEYS, RECENT)
            near = tolerance * (1 + np.abs(head[0]).max() + np.abs(head[1]).max())
            for name, value in rows.asked().items():
                # A standard deviation of 0 is a difference of squares.
                atol = near if name != "lag_std" else 4 * np.sqrt(near)
                np.testing.assert_allclose(
                    array(value[b, h]), wanted[name], rtol=tolerance, atol=atol, err_msg=name
                )
            incoming = np.nansum(oracles.plan(*head[:4])[0], axis=0)
            np.testing.assert_allclose(array(mass[b, h]), incoming, rtol=tolerance, atol=near)


@fuzzed(120)
@given(drawn=calls())
def test_plans(drawn):
    (q, k, options), known = drawn
    call = AttentionCall.from_tensors(q, k, **options)
    near = close(q, 1e-4)
    for (b, h), head in heads_of((q, k, options), known):
        window = call.plan(b, h)
        weights, outside, _ = oracles.plan(*head[:4])
        np.testing.assert_allclose(array(window.weights), weights, atol=near)
        np.testing.assert_allclose(array(window.sink_weight), outside, atol=near)


@fuzzed(120)
@given(drawn=calls())
def test_outputs(drawn):
    (q, k, options), known = drawn
    padding = options.get("mask")
    known[0][:] = oracles.lags(*known[2:]) >= 0 if options["causal"] else True
    known[1][:] = 0
    given = {
        name: options[name]
        for name in ("causal", "query_pos", "key_pos", "prior")
        if name in options
    }
    if padding is not None and padding.ndim == 2:
        given["padding_mask"] = padding
        known[0][:] &= padding.numpy()[:, None, None, :]
    v = torch.randn(*k.shape[:3], 3, dtype=q.dtype)
    bare = {name: value for name, value in given.items() if name == "prior"}
    near = close(q, 1e-4)
    for impl in ("reference", "sdpa", "sdpa_bias"):
        try:
            out = prior_attention(q, k, v, impl=impl, **given)
        except ValueError as error:
            assert "key" in str(error) and not known[0].any(-1).all()
            continue
        for (b, h), head in heads_of((q, k, bare), known):
            values = array(v[b, h // (q.shape[1] // k.shape[1])])
            wanted = oracles.plan(*head[:4])[0] @ values
            np.testing.assert_allclose(array(out[b, h]), wanted, atol=near)
