"""Thumbnails are the plans of all heads, pooled, and the structured head is found among them."""

import numpy as np
import pytest
import torch
from torch import nn

from goatviz.adapters import capture
from goatviz.analysis import (
    PriorSource,
    plan_thumbnails,
    prior_profile,
    prior_thumbnails,
    sink_profile,
    structured_head,
)
from goatviz.examples import example_text
from goatviz.priors import ALiBiPrior, KeyTablePrior, UniformPrior
from goatviz.results import load_result, save_result
from tests.factories import MixedHeads, hidden_states, ids, tiny_huggingface, tiny_lm


def record_of(model, *inputs, **arguments):
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(*inputs, **arguments)
    return record


def check_against_plans(thumbnails, record, batch=0):
    """Compare every head with its dense plan, pooled."""
    assert thumbnails["weights"].dtype == np.float32
    for one in (thumbnails.sel(layer=layer) for layer in thumbnails["layer"].values):
        layer = int(one["layer"])
        call = record.of(layer)[-1]
        assert str(one["layer_name"].item()) == call.name
        assert one["present"].values.tolist() == [h < call.shape[1] for h in one["head"].values]
        rows, columns = one["query"].values >= 0, one["key_start"].values >= 0
        queries, starts = one["query"].values[rows], one["key_start"].values[columns]
        stops = one["key_stop"].values[columns]
        np.testing.assert_array_equal(starts[1:], stops[:-1])
        assert stops[-1] == call.call.gone + call.shape[3]
        assert queries[0] == 0 and queries[-1] == call.shape[2] - 1
        for head in range(call.shape[1]):
            plan = record.plan(layer=layer, head=head, batch=batch)
            weights = np.where(plan.allowed, plan.weights, np.nan)[queries]
            wanted = [
                np.fmax.reduce(weights[:, a:b], 1) for a, b in zip(starts, stops, strict=True)
            ]
            picture = one["weights"].values[head]
            np.testing.assert_allclose(
                picture[np.ix_(rows, columns)], np.array(wanted).T, atol=1e-6
            )
            assert np.isnan(picture[~rows]).all() and np.isnan(picture[:, ~columns]).all()
            p = np.column_stack([np.nan_to_num(weights), plan.sink_weight[queries]])
            places = plan.allowed[queries].sum(-1).numpy() + (call.call.sink is not None)
            used = (places > 1) & (plan.allowed[queries].any(-1).numpy())
            entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
            relative = (entropy[used] / np.log(places[used])).mean()
            assert float(one["relative_entropy"][head]) == pytest.approx(relative, abs=1e-9)
        assert np.isnan(one["weights"].values[call.shape[1] :]).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("cells", [5, 64])
def test_thumbnails_are_pooled_plans(name, cells):
    record = record_of(tiny_huggingface(name), ids(2, 40))
    thumbnails = plan_thumbnails(record, cells=cells, batch=1)
    assert thumbnails["weights"].shape[2:] == (min(cells, 40),) * 2
    check_against_plans(thumbnails, record, batch=1)


def test_priors_count():
    record = record_of(tiny_lm(), ids(1, 40))
    check_against_plans(plan_thumbnails(record, cells=7), record)


def test_blocks_do_not_show(monkeypatch):
    record = record_of(tiny_huggingface("llama"), ids(1, 40))
    whole = plan_thumbnails(record)
    monkeypatch.setattr("goatviz.analysis.thumbnails._PAIRS", 1)
    assert plan_thumbnails(record).identical(whole)


def test_layers_of_other_shapes(tmp_path):
    record = record_of(MixedHeads(), *hidden_states(20))
    thumbnails = plan_thumbnails(record, cells=8)
    assert thumbnails["present"].sum("head").values.tolist() == [3, 4, 4]
    check_against_plans(thumbnails, record)
    assert np.isnan(thumbnails["first_mass"].values[0, 3])
    save_result(thumbnails, tmp_path / "thumbnails.nc")
    assert load_result(tmp_path / "thumbnails.nc").identical(thumbnails)


def test_cross_attention():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()
    record = record_of(model, torch.randn(1, 6, 16), torch.randn(1, 30, 16))
    thumbnails = plan_thumbnails(record, cells=10)
    assert thumbnails["weights"].shape == (2, 4, 6, 10)
    assert (thumbnails["key_start"].values >= 0).sum(1).tolist() == [6, 10]
    check_against_plans(thumbnails, record)


def test_keys_that_have_left_a_cache():
    model = tiny_huggingface("mistral")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with capture(model, statistics=(), keep="projections") as record:
        model.generate(ids(1, 6), **options)
    assert record.calls[-1].call.gone > 0
    thumbnails = plan_thumbnails(record)
    check_against_plans(thumbnails, record)
    assert (thumbnails["first_mass"].values == 0).all()


def test_padding_on_the_left_is_no_first_key():
    model, tokens = tiny_huggingface("llama"), ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :8] = 0
    padded = plan_thumbnails(record_of(model, tokens, attention_mask=mask), cells=20, batch=1)
    alone = plan_thumbnails(record_of(model, tokens[1:, 8:]), cells=12)
    for name in ("relative_entropy", "first_mass"):
        np.testing.assert_allclose(padded[name], alone[name], rtol=1e-4)
    np.testing.assert_allclose(padded["weights"][..., 8:, 8:], alone["weights"], atol=1e-5)


def test_the_first_mass_is_that_of_the_sink_profile():
    model, tokens = tiny_lm(), ids(1, 40)
    profile = sink_profile(model, tokens, min_observers=1)
    first = plan_thumbnails(record_of(model, tokens), cells=40)["first_mass"]
    # The profile counts the first query, which sees no other key.
    np.testing.assert_allclose((39 * first + 1) / 40, profile["first_mass"], rtol=1e-5)


def test_the_structured_head(smollm2):
    model, tokenizer = smollm2
    tokens = tokenizer(example_text(), return_tensors="pt")["input_ids"][:, :64]
    thumbnails = plan_thumbnails(record_of(model, tokens))
    entropy, first = thumbnails["relative_entropy"], thumbnails["first_mass"]
    layer, head = structured_head(thumbnails)
    assert float(first.sel(layer=layer, head=head)) < 0.3
    chosen = float(entropy.sel(layer=layer, head=head))
    assert chosen == float(entropy.where(first < 0.3).min()) > float(entropy.min())
    # Without a limit, a sink has the least entropy.
    layer, head = structured_head(thumbnails, sink=1.0)
    assert float(first.sel(layer=layer, head=head)) > 0.99
    # If all are sinks, all are compared.
    assert structured_head(thumbnails, sink=0.0) == (layer, head)
    part = thumbnails.sel(layer=[16, 17], head=[3, 5])
    assert structured_head(part)[0] in (16, 17) and structured_head(part)[1] in (3, 5)
    assert structured_head(thumbnails.sel(layer=16, head=2)) == (16, 2)


def test_what_has_no_thumbnails():
    record = record_of(tiny_lm(), ids(1, 1))
    with pytest.raises(ValueError, match="thumbnails must hold a head whose queries see two keys"):
        structured_head(plan_thumbnails(record))
    with pytest.raises(TypeError, match="record must be a Record, got CapturedCall"):
        plan_thumbnails(record.calls[0])
    with pytest.raises(ValueError, match="cells must be an integer of at least 1, got 0"):
        plan_thumbnails(record, cells=0)
    with pytest.raises(ValueError, match=r"batch must be an integer in 0 .. 0, got 1"):
        plan_thumbnails(record, batch=1)
    with pytest.raises(ValueError, match="sink must be a finite number of at least 0"):
        structured_head(plan_thumbnails(record), sink=2)
    with pytest.raises(TypeError, match="expected a plan_thumbnails Dataset, got dict"):
        structured_head({})
    with capture(tiny_lm()) as empty:
        pass
    with pytest.raises(ValueError, match="record must hold an attention call"):
        plan_thumbnails(empty)


# --- priors ---


def check_against_profile(thumbnails, source, length):
    """Compare every head with its exact prior, pooled."""
    whole = prior_profile(source, length=length, resolution=length)
    for layer in whole["layer"].values:
        one = thumbnails.sel(layer=layer)
        rows, columns = one["query"].values >= 0, one["key_start"].values >= 0
        queries, starts = one["query"].values[rows], one["key_start"].values[columns]
        stops = one["key_stop"].values[columns]
        assert queries[0] == 0 and queries[-1] == length - 1 and stops[-1] == length
        for head in whole["head"].values:
            exact = whole.sel(layer=layer, head=head)
            assert bool(exact["present"]) == bool(one["present"].sel(head=head))
            if not exact["present"]:
                continue
            dense = np.where(exact["allowed"], exact["probability"], np.nan)[queries]
            wanted = [np.fmax.reduce(dense[:, a:b], 1) for a, b in zip(starts, stops, strict=True)]
            picture = one["weights"].sel(head=head).values
            np.testing.assert_allclose(picture, np.transpose(wanted), rtol=1e-5, atol=1e-9)
            seen = exact["allowed"].sum("key_bin").values[queries]
            shares = exact["prior_entropy"].values[queries][seen > 1] / np.log(seen[seen > 1])
            found = one.sel(head=head)
            np.testing.assert_allclose(found["relative_entropy"], shares.mean(), rtol=1e-9)
            np.testing.assert_allclose(found["margin"], exact["margin"][-1], atol=1e-9)
            first = dense[seen > 1, 0].mean()
            np.testing.assert_allclose(found["first_mass"], first, rtol=1e-5)


PRIORS = {
    "goat": lambda: tiny_lm(),
    "two-sided": lambda: [PriorSource("layer", ALiBiPrior(3, symmetric=True), causal=False)],
    "shared": lambda: UniformPrior(1),
    "other heads": lambda: [
        PriorSource("a", ALiBiPrior(2), causal=True, layer=3),
        PriorSource("b", ALiBiPrior(4), causal=True, layer=5),
    ],
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("cells", [7, 32])
def test_prior_thumbnails_are_the_priors(name, cells):
    source = PRIORS[name]()
    thumbnails = prior_thumbnails(source, length=30, cells=cells)
    assert thumbnails["weights"].shape[2:] == (min(cells, 30),) * 2
    check_against_profile(thumbnails, source, 30)


def test_prior_thumbnails_of_blocks_of_a_fitted_layer_and_of_a_file(monkeypatch, tmp_path):
    source = PriorSource("fitted", ALiBiPrior(4), True, heads=(1, 3), fitted_length=9)
    whole = prior_thumbnails([source], length=20)
    assert whole["query"].values[0, -1] == 8 and whole["head"].size == 4
    assert whole["present"].values.tolist() == [[False, True, False, True]]
    np.testing.assert_allclose(whole["margin"].values[0, [1, 3]], ALiBiPrior(4).slopes[[1, 3]])
    monkeypatch.setattr("goatviz.analysis.thumbnails._PAIRS", 1)
    assert prior_thumbnails([source], length=20).identical(whole)
    save_result(whole, tmp_path / "priors.nc")
    assert load_result(tmp_path / "priors.nc").identical(whole)


def test_priors_of_one_token_and_numbers_that_are_not_finite():
    one = prior_thumbnails(ALiBiPrior(2), length=1)
    assert np.isnan(one["margin"]).all() and np.isnan(one["relative_entropy"]).all()
    with pytest.raises(ValueError, match="a head whose queries see two keys"):
        structured_head(one, None)
    broken = KeyTablePrior(torch.zeros(2, 5))
    broken.sink[0, 2] = torch.nan
    thumbnails = prior_thumbnails(broken, length=5)
    assert structured_head(thumbnails, None) == (0, 1)
    for name, value in (("length", 0), ("cells", 0)):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            prior_thumbnails(ALiBiPrior(1), **({"length": 4} | {name: value}))


def test_without_a_limit_sinks_are_compared_too():
    strong = torch.zeros(2, 12)
    strong[1, 0] = 9.0
    thumbnails = prior_thumbnails(KeyTablePrior(strong) + ALiBiPrior(2), length=12)
    assert structured_head(thumbnails) == (0, 0) and structured_head(thumbnails, None) == (0, 1)
