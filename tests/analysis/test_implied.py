"""The prior inside logits: recovered where it is known, least squares where it is not."""

import numpy as np
import pytest
import torch
import transformers

from goatviz.adapters.capture import capture, problem_of
from goatviz.analysis import implied_prior
from goatviz.analysis.implied import _diagonals, _Geometry
from goatviz.attention import Attention
from goatviz.figures import plot_prior
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots import PRIOR_KINDS
from goatviz.results import load_result, save_result
from goatviz.training import load_pretrained
from goatviz.transport.fused import dense_window


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
    problem = problem_of(record.calls[0].call)
    for head in range(2):
        windows = [dense_window(problem, batch=b, head=head) for b in range(3)]
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


def test_content_alone_is_hardly_prior():
    model = lm("none", content=True)
    share = implied_prior(model, ids(16, 32))["explained_variance"].values
    assert (share < 0.5).all()


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
    assert "of the logits' variance" in text
    if kind == "decomposition":
        assert figure.layout.title.text == "Implied prior"


def test_operators_are_the_dense_sums():
    torch.manual_seed(0)
    n = 9
    start = torch.randint(0, 4, (n,)).sort().values
    stop = (start + torch.randint(1, 5, (n,))).clamp(max=n).cummax(0).values
    start = torch.minimum(start, stop - 1)
    geometry = _Geometry(start, stop, n)
    allowed = (torch.arange(n) >= start[:, None]) & (torch.arange(n) < stop[:, None])
    lag = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    kernel, sink, rows = (torch.randn(k, dtype=torch.float64) for k in (2 * n - 1, n, n))
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
    block = torch.randn(4, 7)
    wanted = torch.stack([block.diagonal(-k).sum() for k in range(-6, 4)])
    torch.testing.assert_close(_diagonals(block), wanted)


def test_bad_arguments_are_named():
    model = lm()
    for lag in (0, 1.5, True):
        with pytest.raises(ValueError, match="max_lag must be a positive number of tokens"):
            implied_prior(model, ids(1, 8), max_lag=lag)
    with pytest.raises(TypeError, match="inputs must be given"):
        implied_prior(model)
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
    with capture(model, keep="projections") as empty:
        pass
    with pytest.raises(ValueError, match="record is empty"):
        implied_prior(empty)
    with capture(model, keep="projections") as padded:
        keep = torch.ones(1, 8, dtype=torch.bool)
        keep[0, 6:] = False
        model(ids(1, 8), padding_mask=keep)
    with pytest.raises(ValueError, match="padding and irregular masks cannot be fitted"):
        implied_prior(padded)
