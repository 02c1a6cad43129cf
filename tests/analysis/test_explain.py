"""Explanations: parts add up to the model's own logits, and each is what it says."""

import html

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis import explain
from goatviz.analysis.levels import PlanLevels
from goatviz.figures import plot_explanation
from goatviz.priors import ALiBiPrior, KeyTablePrior, LagTablePrior
from goatviz.results import load_result, save_result
from goatviz.transport import AttentionCall
from tests.factories import HOSTILE, TextTokenizer, ids, tiny_huggingface, tiny_lm

LENGTH = 24
TEXT = ids(2, LENGTH, vocab=50)


def record_of(model, text=TEXT, **options):
    with capture(model, statistics=[], keep="projections") as record, torch.no_grad():
        model(text, **options)
    return record


def row_of(call, batch, head, query):
    """A row of the plan, and its logits less their mean over the keys that are allowed."""
    window = call.plan(batch, head, slice(query, query + 1))
    allowed = window.allowed[0]
    logits = window.logits[0] - window.logits[0][allowed].mean()
    return window.weights[0].numpy(), logits.numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt-oss", "t5", "goat"])
def test_parts_add_up(name):
    model = tiny_lm() if name == "goat" else tiny_huggingface(name)
    record = record_of(model, TEXT % 20)
    for layer, head, query in ((0, 1, -1), (1, 2 if name != "goat" else 1, 10), (1, 0, 0)):
        why = explain(record, layer=layer, head=head, query=query, batch=1, top=5)
        weights, logits = row_of(record.of(layer)[-1].call, 1, head, query % LENGTH)
        key = why["key"].values
        np.testing.assert_allclose(why["value"].sum("part"), why["logit"], atol=1e-9)
        np.testing.assert_allclose(why["logit"], logits[key], atol=1e-9)
        np.testing.assert_allclose(why["weight"], weights[key], atol=1e-12)
        assert (np.diff(why["weight"]) <= 0).all() and why["weight"][0] == np.nanmax(weights)
        total = why["weight"].sum() + why.attrs["rest_weight"] + why.attrs["column_weight"]
        np.testing.assert_allclose(total, 1.0)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "t5", "goat"])
def test_a_temperature_divides_the_scores(name):
    record = record_of(tiny_lm() if name == "goat" else tiny_huggingface(name), TEXT % 20)
    whole = explain(record, layer=1, query=20, top=50)
    why = explain(record, layer=1, query=20, top=50, temperature=0.25)
    row = PlanLevels(record.of(1)[-1]).row(20, temperature=0.25)
    np.testing.assert_allclose(why["weight"], row["weights"][why["key"]], atol=1e-12)
    np.testing.assert_allclose(why["value"].sum("part"), why["logit"], atol=1e-9)
    order = {
        one: np.argsort(which["key"].values) for one, which in (("why", why), ("whole", whole))
    }
    scores = [not str(text).startswith("log-prior") for text in whole["part_text"].values]
    scores = [one and part != "bias" for one, part in zip(scores, why["part"].values, strict=True)]
    factor = np.where(scores, 4.0, 1.0)[:, None]
    wanted = factor * whole["value"].values[:, order["whole"]]
    np.testing.assert_allclose(why["value"].values[:, order["why"]], wanted, atol=1e-9)
    total = why["weight"].sum() + why.attrs["rest_weight"] + why.attrs["column_weight"]
    np.testing.assert_allclose(total, 1.0)
    with pytest.raises(ValueError, match="temperature must be"):
        explain(record, temperature=0.0)


def test_names_of_the_parts():
    names = {
        "gpt2": ["scores"],
        "gemma2": ["scores"],
        "llama": ["fast rotation", "slow rotation"],
        "t5": ["scores", "bias"],
    }
    for name, parts in names.items():
        why = explain(record_of(tiny_huggingface(name)))
        assert why["part"].values.tolist() == parts
    why = explain(record_of(tiny_lm(), TEXT % 20))
    assert why["part"].values.tolist() == ["content", "relative", "sink", "recency"]


def test_rotary_channels_by_their_period():
    call = record_of(tiny_huggingface("llama")).of(0)[0].call
    # Periods of 6.3, 63, 628 and 6,283 tokens: within 24 tokens only the first one turns.
    why = explain(call, head=1, batch=1, query=20, top=50)
    key = why["key"].values
    q, k = call.q[1, 1, 20].double(), call.k[1, 0].double()
    for part, channels in (("fast rotation", [0, 4]), ("slow rotation", [1, 2, 3, 5, 6, 7])):
        value = call.scale * (k[:21, channels] @ q[channels])
        wanted = (value - value.mean())[key].numpy()
        np.testing.assert_allclose(why["value"].sel(part=part), wanted, atol=1e-12)


def test_parts_of_a_prior():
    q = k = torch.zeros(1, 4, 8, 4)
    prior = KeyTablePrior(torch.arange(16.0).view(2, 8)) + ALiBiPrior(2)
    call = AttentionCall.from_tensors(q, k[:, :2], prior=prior)
    why = explain(call, head=3, query=5, top=8)
    for name, part in prior.components().items():
        row = part.log_prior([5], range(6))[1, 0].double()
        wanted = (row - row.mean())[why["key"].values]
        np.testing.assert_allclose(why["value"].sel(part=name), wanted, atol=1e-6)
    assert not why["value"].sel(part="scores").any()


def test_an_implied_prior_is_taken_out_of_the_scores():
    call = record_of(tiny_huggingface("llama")).of(0)[0].call
    table = torch.randn(4, LENGTH, generator=torch.Generator().manual_seed(3))
    prior = LagTablePrior(table) + KeyTablePrior(table.flip(-1))
    plain = explain(call, head=2, top=50)
    why = explain(call, head=2, top=50, prior=prior)
    assert why["part"].values.tolist() == ["rest", "implied relative", "implied sink"]
    np.testing.assert_allclose(why["value"].sum("part"), plain["logit"], atol=1e-9)
    lag = table[2].flip(0).double().numpy()
    wanted = (lag - lag.mean())[why["key"].values]
    np.testing.assert_allclose(why["value"].sel(part="implied relative"), wanted, atol=1e-9)


def test_a_model_with_text(tmp_path):
    model, tokenizer = tiny_lm(), TextTokenizer()
    why = explain(model, "some letters", tokenizer=tokenizer, layer=1, top=4)
    names = tokenizer.convert_ids_to_tokens(tokenizer("some letters")["ids"][0].tolist())
    assert why["key_token"].values.tolist() == [names[key] for key in why["key"].values]
    assert why.attrs["query_token"] == names[-1] and names[-1] in HOSTILE
    save_result(why, tmp_path / "why.nc")
    assert load_result(tmp_path / "why.nc").identical(why)
    figure = plot_explanation(why)
    assert figure.layout.title.text.startswith("Why this query attends there")
    shown = [text.split("  ")[0] for text in figure.layout.yaxis.ticktext]
    assert [html.unescape(text) for text in shown] == why["key_token"].values.tolist()
    assert html.escape(f"query 11 “{names[-1]}”", quote=False) in figure.layout.title.subtitle.text


def test_a_models_own_kernel_certifies_the_row():
    why = explain(tiny_huggingface("llama"), ids(1, 20, vocab=50))
    assert 0 < why.attrs["residual"] < 1e-6
    caption = " ".join(note.text for note in plot_explanation(why).layout.annotations)
    assert f"at most {why.attrs['residual']:.1e} of the largest value" in caption


def test_decoding_names_tokens_of_the_text():
    model = tiny_huggingface("mistral")
    with capture(model, statistics=[], keep="projections") as record:
        model.generate(TEXT, max_new_tokens=6, do_sample=False)
    why = explain(record, layer=1, top=50)
    # The cache of a window of five holds the newest tokens alone.
    assert why.attrs["query"] == LENGTH + 4
    assert sorted(why["key"].values.tolist()) == list(range(LENGTH, LENGTH + 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 2}, ValueError, "layer must be"),
        ({"head": 4}, ValueError, "head must be an integer in 0 .. 3, got 4"),
        ({"query": LENGTH}, ValueError, "query must be an integer in -24 .. 23, got 24"),
        ({"batch": 2}, ValueError, "batch must be an integer in 0 .. 1, got 2"),
        ({"top": 0}, ValueError, "top must be"),
        ({"tokens": ["a"]}, ValueError, "tokens must hold 24 texts, one for each key, got 1"),
        ({"prior": 3}, TypeError, "prior must be a goatviz Prior, got int"),
        ({"prior": ALiBiPrior(3)}, ValueError, "prior must have 1 or 4 heads, got 3"),
        ({"inputs": TEXT}, TypeError, "inputs"),
    ],
)
def test_bad_arguments(options, error, message):
    record = record_of(tiny_huggingface("llama"))
    with pytest.raises(error, match=message):
        explain(record, **options)


def test_queries_without_keys():
    q = k = torch.zeros(1, 1, 8, 4)
    call = AttentionCall.from_tensors(q, k, mask=torch.arange(8)[None] >= 3)
    assert explain(call, query=3)["key"].values.tolist() == [3]
    with pytest.raises(ValueError, match="query must be one that may use a key, got 2"):
        explain(call, query=2)


def test_what_is_no_source():
    with pytest.raises(TypeError, match="source must be a model, a Checkpoint, a Record or one"):
        explain(torch.zeros(3, 3))
