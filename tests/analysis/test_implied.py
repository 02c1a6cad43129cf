"""The prior inside logits: recovered where it is known, least squares where it is not."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as student

import goatviz.analysis.implied as module
from goatviz.adapters.capture import capture
from goatviz.analysis import fit_priors, implied_prior, prior_summary, sink_profile
from goatviz.analysis.implied import _diagonals, _Geometry
from goatviz.attention import Attention
from goatviz.figures import plot_prior
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots import PRIOR_KINDS
from goatviz.priors import ALiBiPrior, KeyTablePrior, LagTablePrior
from goatviz.results import load_result, save_result
from goatviz.training import load_pretrained
from goatviz.transport import Ablate
from goatviz.transport.changes import changed_output
from tests.factories import ids as token_ids
from tests.factories import tiny_huggingface


def lm(positions="goat", *, content=False, **options):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20,
        training_length=32,
        num_layers=2,
        num_heads=2,
        embed_dim=32,
        positions=positions,
        **options,
    )
    model = CausalLM(config)
    for name, parameter in model.named_parameters():
        if "raw_slope" in name:
            torch.nn.init.constant_(parameter, -2.0)
        elif ".prior." in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "q_proj" in name and not content:
            torch.nn.init.zeros_(parameter)
    return model


def ids(batch, length, seed=0):
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(seed))


def row_centred(log_prior, allowed):
    mean = (log_prior * allowed).sum(-1, keepdims=True) / allowed.sum(-1, keepdims=True)
    return np.where(allowed, log_prior - mean, 0.0)


@pytest.mark.parametrize("positions", ["goat", "alibi", "bucket"])
@pytest.mark.parametrize("length", [2, 3, 32, 70])
def test_an_explicit_prior_is_recovered(positions, length):
    model = lm(positions)
    result = implied_prior(model, ids(2, length), resolution=max(2, length))
    assert float(result["explained_variance"].min()) > 0.999
    tri = np.tril(np.ones((length, length), dtype=bool))
    for layer in range(2):
        wanted = model.blocks[layer].attention.prior.log_prior(length, length).detach().numpy()
        found = np.nan_to_num(result["row_centred"].values[layer])
        np.testing.assert_allclose(found, row_centred(wanted, tri), atol=1e-4)


def brute_force(logits, allowed, most):
    """Dense least squares of several maps on row constants, kappa and u."""
    n = allowed.shape[0]
    rows, columns = np.nonzero(allowed)
    blocks = []
    for sample in range(len(logits)):
        design = np.zeros((len(rows), len(logits) * n + 2 * most + 1 + n))
        at = np.arange(len(rows))
        design[at, sample * n + rows] = 1
        design[at, len(logits) * n + np.clip(rows - columns, -most, most) + most] = 1
        design[at, len(logits) * n + 2 * most + 1 + columns] = 1
        blocks.append(design)
    design = np.concatenate(blocks)
    target = np.concatenate([sample[allowed] for sample in logits])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    lags, keys = solution[len(logits) * n : -n], solution[-n:]
    fitted = np.zeros((n, n))
    fitted[rows, columns] = lags[np.clip(rows - columns, -most, most) + most] + keys[columns]
    centred = np.stack([row_centred(sample, allowed) for sample in logits])
    rest = centred - row_centred(fitted, allowed)
    return row_centred(fitted, allowed), 1 - (rest**2).sum() / (centred**2).sum()


@pytest.mark.parametrize("case", ["causal", "bidirectional", "window", "max_lag"])
def test_least_squares_are_the_dense_ones(case):
    torch.manual_seed(0)
    n = 13
    x = torch.randn(3, n, 16)
    options = {}
    if case == "window":
        config = transformers.MistralConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=5,
            pad_token_id=0,
        )
        model = transformers.MistralModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x = ids(3, n)
    else:
        model = Attention(16, 2, causal=case != "bidirectional")
        options = {"max_lag": 4} if case == "max_lag" else {}
    result = implied_prior(model, x, resolution=n, **options)
    with capture(model, keep="projections") as record:
        model(x)
    for head in range(2):
        windows = [record.plan(batch=b, head=head) for b in range(3)]
        allowed = windows[0].allowed.numpy()
        fitted, share = brute_force(
            [w.scores.numpy() for w in windows], allowed, options.get("max_lag", n - 1)
        )
        found = np.nan_to_num(result["log_prior"].values[0, head].astype(float))
        np.testing.assert_allclose(row_centred(found, allowed), fitted, atol=2e-5)
        assert abs(float(result["explained_variance"][0, head]) - share) < 1e-5


def test_inputs_of_several_lengths_are_one_fit():
    model = lm(content=True)
    result = implied_prior(model, [ids(1, 20), ids(2, 33, seed=1)])
    assert result.attrs["length"] == 33 and "3 inputs" in result.attrs["notes"]
    share = result["explained_variance"].values
    assert (share > 0.3).all() and (share < 1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [12, 3])
def test_several_lengths_are_the_dense_least_squares_of_all(causal, most):
    torch.manual_seed(0)
    layer = Attention(16, 1, causal=causal)
    inputs = [torch.randn(2, 7, 16), torch.randn(1, 13, 16), torch.randn(1, 1, 16)]
    result = implied_prior(layer, inputs, max_lag=most, resolution=13)
    rows, targets, at = [], [], 0
    for x in inputs:
        with capture(layer, keep="projections") as record:
            layer(x)
        for b in range(len(x)):
            window = record.plan(batch=b)
            for i, j in window.allowed.nonzero().tolist():
                rows.append((at + i, min(max(i - j, -most), most) + most, j))
                targets.append(window.scores[i, j].item())
            at += x.shape[1]
    design = np.zeros((len(rows), at + 2 * most + 1 + 13))
    for place, (row, lag, key) in enumerate(rows):
        design[place, [row, at + lag, at + 2 * most + 1 + key]] = 1
    solution, *_ = np.linalg.lstsq(design, targets, rcond=None)
    kernel, sink = solution[at : at + 2 * most + 1], solution[at + 2 * most + 1 :]
    allowed = np.tri(13, dtype=bool) if causal else np.ones((13, 13), dtype=bool)
    lag = np.subtract.outer(np.arange(13), np.arange(13)).clip(-most, most) + most
    found = np.nan_to_num(result["log_prior"].values[0, 0].astype(float))
    np.testing.assert_allclose(
        row_centred(found, allowed), row_centred(kernel[lag] + sink, allowed), atol=2e-5
    )
    content = np.zeros_like(design)
    content[:, :at] = design[:, :at]
    centred = targets - content @ np.linalg.lstsq(content, targets, rcond=None)[0]
    share = 1 - ((targets - design @ solution) ** 2).sum() / (centred**2).sum()
    assert result["explained_variance"].item() == pytest.approx(share, abs=1e-5)


def test_a_prior_adds_to_what_content_implies():
    x = torch.randn(2, 20, 16)
    tables = LagTablePrior(torch.randn(1, 9)) + KeyTablePrior(torch.randn(1, 15))
    layer = Attention(16, 4, num_kv_heads=2, impl="sdpa_bias")
    plain = implied_prior(layer, x, resolution=20)
    layer.prior = tables
    whole = implied_prior(layer, x, resolution=20)
    tri = np.tri(20, dtype=bool)
    added = np.nan_to_num(whole["row_centred"] - plain["row_centred"])
    wanted = row_centred(tables.log_prior(20, 20).numpy(), tri)
    np.testing.assert_allclose(added[0], np.broadcast_to(wanted, (4, 20, 20)), atol=2e-5)
    assert whole["head"].size == 4


def test_a_bidirectional_prior_is_recovered():
    prior = ALiBiPrior(2, symmetric=True) + KeyTablePrior(torch.randn(2, 24))
    layer = Attention(16, 2, prior=prior, causal=False)
    torch.nn.init.zeros_(layer.q_proj.weight)
    torch.nn.init.zeros_(layer.q_proj.bias)
    result = implied_prior(layer, torch.randn(2, 24, 16), resolution=24)
    everything = np.ones((24, 24), dtype=bool)
    wanted = row_centred(prior.log_prior(24, 24).numpy(), everything)
    np.testing.assert_allclose(result["row_centred"].values[0], wanted, atol=1e-4)
    assert float(result["explained_variance"].min()) > 0.999
    assert result["lag"].values.tolist() == list(range(-23, 24))
    assert not result["causal"].any() and result.attrs["two_sided"] == 1
    for kind in PRIOR_KINDS:
        plot_prior(result, kind=kind)


@pytest.mark.parametrize("length", [5, 40])
def test_grouped_queries_share_a_prior(length):
    model = lm(num_kv_heads=1)
    result = implied_prior(model, ids(2, length), resolution=length)
    tri = np.tri(length, dtype=bool)
    wanted = model.blocks[1].attention.prior.log_prior(length, length).detach().numpy()
    for head in range(2):
        found = np.nan_to_num(result["row_centred"].values[1, head])
        np.testing.assert_allclose(found, row_centred(wanted[0], tri), atol=1e-4)


@pytest.mark.parametrize("max_lag", [1, 6, 100])
def test_beyond_the_largest_lag_the_kernel_is_one_number(max_lag):
    result = implied_prior(lm(content=True), ids(3, 30), max_lag=max_lag)
    kernel = result["kernel"].values
    beyond = kernel[..., int(min(max_lag, 29)) :]
    np.testing.assert_array_equal(beyond, np.broadcast_to(beyond[..., :1], beyond.shape))
    assert (np.abs(np.diff(kernel[..., : int(min(max_lag, 29))])) > 0).all()
    full = implied_prior(lm(content=True), ids(3, 30))
    gap = full["explained_variance"] - result["explained_variance"]
    assert (gap >= -1e-6).all() and (max_lag == 100 or (gap > 1e-4).all())


def test_a_bias_of_the_model_is_part_of_its_prior():
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = transformers.T5EncoderModel(config).eval()
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0)
        if name.endswith(".q.weight"):
            torch.nn.init.zeros_(parameter)
    result = implied_prior(model, ids(1, 20), resolution=20)
    assert float(result["explained_variance"].min()) > 0.999
    with torch.no_grad():
        weights = model(ids(1, 20), output_attentions=True).attentions[0][0]
    np.testing.assert_allclose(result["probability"].values[0], weights, atol=1e-5)


def test_a_softcap_is_applied_before_the_fit():
    config = transformers.Gemma2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=1.5,
        sliding_window=64,
    )
    model = transformers.Gemma2Model(config).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = ids(2, 10)
    result = implied_prior(model, x, resolution=10)
    with capture(model, keep="projections") as record:
        model(x)
    windows = [record.plan(batch=b, head=1) for b in range(2)]
    allowed = windows[0].allowed.numpy()
    fitted, share = brute_force([w.scores.numpy() for w in windows], allowed, 9)
    found = np.nan_to_num(result["log_prior"].values[0, 1].astype(float))
    np.testing.assert_allclose(row_centred(found, allowed), fitted, atol=2e-5)
    assert result["explained_variance"][0, 1].item() == pytest.approx(share, abs=1e-5)


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    model, x = lm(content=True), ids(2, 40)
    wanted = implied_prior(model, x)
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_NUMBERS", 1)
    found = implied_prior(model, x)
    for name in ("kernel", "sink", "explained_variance", "held_out", "kernel_error"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6, err_msg=name)


def test_padding_of_inputs_is_cut_before_the_fit():
    model, x = lm(content=True), ids(3, 30)
    keep = torch.arange(30) < torch.tensor([[30], [21], [9]])
    found = implied_prior(model, {"ids": x, "padding_mask": keep})
    wanted = implied_prior(model, [x[0], x[1, :21], x[2, :9]])
    assert found.identical(wanted)


def test_content_alone_is_hardly_prior():
    # About 3 L of the 16 L^2 / 2 degrees of freedom.
    share = implied_prior(Attention(16, 4), torch.randn(16, 64, 16))["explained_variance"].values
    assert (share < 0.1).all()


def test_trained_heads_are_prior():
    checkpoint = load_pretrained("copy-mixture-1-goat")
    data = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(0))
    result = implied_prior(checkpoint, data)
    assert float(result["explained_variance"].min()) > 0.99
    assert result.attrs["source"] == "copy-mixture-1-goat"
    with capture(checkpoint.model, keep="projections", statistics=()) as record:
        checkpoint.model(data)
    again = implied_prior(record)
    np.testing.assert_allclose(again["kernel"], result["kernel"])


def test_a_planted_spike_does_not_tilt_the_sink():
    model = lm()
    with torch.no_grad():
        for block in model.blocks:
            for part in block.attention.prior.parts:
                for parameter in part.parameters():
                    parameter.zero_()
            block.attention.prior.components()["sink"].bump.fill_(9.0)
            block.attention.prior.components()["recency"].raw_slope.fill_(-30.0)
    result = implied_prior(model, ids(2, 32))
    np.testing.assert_allclose(result["sink"].values[..., 0], 9.0, atol=1e-3)
    np.testing.assert_allclose(result["sink"].values[..., 1:], 0.0, atol=1e-3)
    np.testing.assert_allclose(result["kernel"].values, 0.0, atol=1e-3)


@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_it_draws_and_survives_the_disk(kind, tmp_path):
    result = implied_prior(lm(), ids(1, 20))
    loaded = load_result(save_result(result, tmp_path / "implied.nc"))
    figure = plot_prior(loaded, kind=kind)
    text = " ".join(a.text for a in figure.layout.annotations)
    text = f"{figure.layout.title.subtitle.text} {text}".replace("<br>", " ")
    share = "Explained variance of the logits" if kind == "heads" else "of the logits' variance"
    assert share in text
    if kind == "decomposition":
        assert figure.layout.title.text == "Implied prior"


@settings(max_examples=40)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_operators_are_the_dense_sums(n, seed):
    generator = torch.Generator().manual_seed(seed)
    stop = torch.randint(1, n + 1, (n,), generator=generator).sort().values
    start = (stop - torch.randint(1, n + 1, (n,), generator=generator)).clamp(min=0)
    start = start.flip(0).cummin(0).values.flip(0)
    geometry = _Geometry(start, stop, n)
    allowed = (torch.arange(n) >= start[:, None]) & (torch.arange(n) < stop[:, None])
    lag = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    kernel, sink, rows = (
        torch.randn(k, dtype=torch.float64, generator=generator) for k in (2 * n - 1, n, n)
    )
    a = allowed.double()
    by_lag = torch.zeros(2 * n - 1, n, n, dtype=torch.float64)
    by_lag[lag, torch.arange(n)[:, None], torch.arange(n)] = a
    for found, wanted in (
        (geometry.rows, a.sum(1)),
        (geometry.keys, a.sum(0)),
        (geometry.lags, by_lag.sum((1, 2))),
        (geometry.rows_from_lags(kernel), (a * kernel[lag]).sum(1)),
        (geometry.rows_from_keys(sink), a @ sink),
        (geometry.keys_from_rows(rows), rows @ a),
        (geometry.keys_from_lags(kernel), (a * kernel[lag]).sum(0)),
        (geometry.lags_from_rows(rows), torch.einsum("lij,i->l", by_lag, rows)),
        (geometry.lags_from_keys(sink), torch.einsum("lij,j->l", by_lag, sink)),
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 5), (5, 1), (1, 1)])
def test_diagonals_are_the_dense_sums(shape):
    block = torch.randn(shape)
    lags = range(1 - shape[1], shape[0])
    wanted = torch.stack([block.diagonal(-lag).sum() for lag in lags])
    torch.testing.assert_close(_diagonals(block), wanted)


def test_bad_arguments_are_named():
    model = lm()
    for lag, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_lag must be an integer of at least 1"):
            implied_prior(model, ids(1, 8), max_lag=lag)
    with pytest.raises(TypeError, match="inputs must be given"):
        implied_prior(model)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        implied_prior(tiny_huggingface("llama"), ids(1, 65))
    with pytest.raises(
        TypeError, match="source must be a model, a Checkpoint or a Record, got int"
    ):
        implied_prior(3, ids(1, 8))
    with capture(model) as record:
        model(ids(1, 8))
    with pytest.raises(ValueError, match="keep='projections'"):
        implied_prior(record)
    with pytest.raises(TypeError, match="inputs must not be given with a Record"):
        implied_prior(record, ids(1, 8))
    with pytest.raises(TypeError, match="layers must not be given with a Record"):
        implied_prior(record, layers=0)
    cache = model.new_cache()
    model(ids(1, 8), cache=cache)
    with capture(model, keep="projections") as decoding:
        model(ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="1 queries over 9 keys; implied_prior needs whole"):
        implied_prior(decoding)
    layer, shuffled = Attention(8, 2), torch.randperm(9)
    with capture(layer, keep="projections") as unordered:
        layer(torch.randn(1, 9, 8), positions=shuffled)
    with pytest.raises(ValueError, match="irregular masks cannot be fitted"):
        implied_prior(unordered)
    with capture(model, keep="projections") as empty:
        pass
    with pytest.raises(ValueError, match="record must hold"):
        implied_prior(empty)
    with capture(model, keep="projections") as padded:
        keep = torch.ones(1, 8, dtype=torch.bool)
        keep[0, 6:] = False
        model(ids(1, 8), padding_mask=keep)
    with pytest.raises(ValueError, match="padding and irregular masks cannot be fitted"):
        implied_prior(padded)


def test_logits_that_do_not_vary_have_no_share():
    result = implied_prior(lm("none"), ids(1, 12))
    assert np.isnan(result["explained_variance"].values).all()
    assert "variance" not in " ".join(a.text for a in plot_prior(result).layout.annotations)


def test_an_implied_prior_has_no_recency_of_its_own():
    result = implied_prior(tiny_huggingface("gpt2"), token_ids(2, 24, vocab=50))
    assert (result["recency_slope"] == 0).all() and (result["recency"] == 0).all()
    assert result["explained_variance"].notnull().all()
    np.testing.assert_allclose(result["relative_range"], result["kernel_range"])
    # Heads are ranked as those of an explicit prior are.
    order = np.argsort(result["margin_rank"].values, axis=None)
    assert (np.diff(result["margin"].values[..., -1].ravel()[order]) <= 0).all()


def test_some_layers_keep_their_own_numbers():
    model = tiny_huggingface("gpt2", n_layer=3)
    ids = token_ids(2, 24, vocab=50)
    whole = implied_prior(model, ids)
    some = implied_prior(model, ids, layers=[0, 2])
    assert some["layer"].values.tolist() == [0, 2]
    assert some.attrs["num_layers"] == 3
    for name in ("layer_name", "kernel", "sink", "margin", "explained_variance"):
        np.testing.assert_array_equal(some[name], whole[name].sel(layer=[0, 2]), err_msg=name)
    numbers = [sentence.split(",")[0] for sentence in prior_summary(some)]
    assert numbers == ["layer 0"] * 4 + ["layer 2"] * 4
    sinks = sink_profile(model, ids, layers=[0, 2], min_observers=4)
    assert sinks["layer"].equals(some["layer"])
    np.testing.assert_array_equal(sinks["layer_name"], some["layer_name"])


# --- what speaks for a fit ---


def own_pieces(model, texts):
    """Per layer: the fitted prior of all texts but one, and the row-centred logits of that one."""
    for at, text in enumerate(texts):
        priors = fit_priors(model, [*texts[:at], *texts[at + 1 :]])
        with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
            model(text)
        for layer, prior in priors.items():
            call = record.of(layer)[0].call
            window = call.logits(0, slice(None))
            length = text.shape[1]
            values = prior.log_prior(range(length), range(length))
            allowed = window.allowed.numpy()
            logits = row_centred(window.logits.masked_fill(~window.allowed, 0).numpy(), allowed)
            yield at, layer, row_centred(values.numpy(), allowed), logits


def test_held_out_variance_is_that_of_unseen_inputs():
    model = lm("rope", content=True)
    texts = [ids(1, 30, seed) for seed in range(4)]
    result = implied_prior(model, texts)
    total = np.zeros((4, 2, 2))
    explained = np.zeros((4, 2, 2))
    for at, layer, fit, logits in own_pieces(model, texts):
        total[at, layer] = (logits**2).sum((-2, -1))
        explained[at, layer] = total[at, layer] - ((logits - fit) ** 2).sum((-2, -1))
    np.testing.assert_allclose(result["held_out"], explained.sum(0) / total.sum(0), atol=1e-8)
    assert (result["held_out"] < result["explained_variance"]).all()
    shares = explained / total
    half = student.t.ppf(0.975, 3) * shares.std(0, ddof=1) / 2
    np.testing.assert_allclose(result["held_out_high"] - result["held_out"], half, atol=1e-8)


def test_intervals_are_the_jackknife_over_inputs():
    model = lm("rope", content=True)
    texts = [ids(1, 24, seed) for seed in range(3)]
    result = implied_prior(model, texts, points=24)
    values = {"kernel": [], "sink": []}
    for at in range(3):
        part = implied_prior(model, texts[:at] + texts[at + 1 :], points=24)
        for name, kept in values.items():
            kept.append(part[name].values)
    for name, kept in values.items():
        spread = np.stack(kept).var(0) * 2
        half = student.t.ppf(0.975, 2) * np.sqrt(spread)
        np.testing.assert_allclose(result[f"{name}_error"], half, atol=1e-7)


def test_how_many_inputs_saw_a_lag_and_a_key():
    result = implied_prior(lm("rope", content=True), [ids(1, n) for n in (6, 10, 10, 16)])
    for dim in ("lag", "key"):
        assert result[f"{dim}_inputs"][1].values.tolist() == [4] * 6 + [3] * 4 + [1] * 6
        curve = "kernel" if dim == "lag" else "sink"
        # What one group of inputs alone has seen has no interval.
        unknown = np.isnan(result[f"{curve}_error"][0, 0])
        assert unknown.values.tolist() == [False] * 10 + [True] * 6


def test_more_inputs_than_groups_are_dealt_out():
    model = lm("rope", content=True)
    texts = [ids(1, 20, seed) for seed in range(11)]
    one, another = implied_prior(model, texts), implied_prior(model, torch.cat(texts))
    assert np.isfinite(one["held_out"]).all() and one.attrs["notes"].startswith("least squares")
    for name in ("kernel", "kernel_error", "held_out", "held_out_low"):
        np.testing.assert_allclose(one[name], another[name], atol=1e-8)


def test_verdicts():
    texts = [ids(1, 40, seed) for seed in range(4)]
    # Without content, logits are the prior; content of random words is none.
    assert set(implied_prior(lm("goat"), texts)["verdict"].values.flat) == {"prior-like"}
    random = implied_prior(lm("none", content=True), texts)
    assert set(random["verdict"].values.flat) == {"content-like"}
    assert set(implied_prior(lm("goat"), texts[0])["verdict"].values.flat) == {"not known"}


def test_one_input_has_no_interval():
    result = implied_prior(lm("rope", content=True), ids(1, 12))
    for name in ("held_out", "held_out_low", "kernel_error", "sink_error"):
        assert np.isnan(result[name]).all()


def test_rotary_frequencies_travel_with_the_fit(tmp_path):
    model = tiny_huggingface("llama")
    texts = [token_ids(1, 40, vocab=50, seed=seed) for seed in range(3)]
    result = implied_prior(model, texts)
    np.testing.assert_allclose(result["rotary_frequency"][1], [0.001, 0.01, 0.1, 1.0], rtol=1e-5)
    assert "rotary_frequency" not in implied_prior(tiny_huggingface("gpt2"), texts)
    save_result(result, tmp_path / "implied.nc")
    assert load_result(tmp_path / "implied.nc").identical(result)
    names = {trace.name for trace in plot_prior(result, kind="kernel").data}
    assert {"95 % (jackknife)", "rotary periods"} <= names


def test_fitted_priors_are_those_of_the_profile():
    model = tiny_huggingface("gpt2")
    texts = [token_ids(1, 20, vocab=50, seed=seed) for seed in range(2)]
    result, priors = implied_prior(model, texts, points=20), fit_priors(model, texts)
    for layer, prior in priors.items():
        parts = prior.components()
        np.testing.assert_allclose(parts["sink"].sink, result["sink"][layer], atol=1e-9)
        np.testing.assert_allclose(parts["relative"].kernel, result["kernel"][layer], atol=1e-9)


def test_an_implied_prior_that_is_ablated_is_gone():
    model = tiny_huggingface("gpt2")
    texts = [token_ids(1, 20, vocab=50, seed=seed) for seed in range(2)]
    priors = fit_priors(model, texts, layers=[0])
    whole = priors[0].log_prior(range(20), range(20))
    with capture(model, layers=[0], statistics=(), keep="projections") as record, torch.no_grad():
        model(texts[0])
    call = record.calls[0].call
    output = changed_output(call, torch.zeros(1, 4, 20, 8), [Ablate(priors[0])])
    window = call.logits(0, slice(None))
    logits = (window.logits - whole).masked_fill(~window.allowed, -torch.inf)
    wanted = logits.softmax(-1) @ call.v[0].double()
    torch.testing.assert_close(output[0].double(), wanted, atol=1e-5, rtol=1e-4)


def test_a_rotary_kernel_is_made_of_rotary_waves():
    # Equal queries and keys at every position: the kernel is a sum of rotary waves, nothing else.
    model = tiny_huggingface("llama")
    texts = [torch.full((1, 60), token) for token in (3, 7)]
    result = implied_prior(model, texts)
    np.testing.assert_allclose(result["rotary_share"], 1.0, atol=1e-6)
    random = [token_ids(1, 60, vocab=50, seed=seed) for seed in range(2)]
    assert (implied_prior(model, random)["rotary_share"] < 0.95).all()
    # Too few lags for so many waves.
    assert np.isnan(implied_prior(model, token_ids(1, 12, vocab=50))["rotary_share"]).all()
