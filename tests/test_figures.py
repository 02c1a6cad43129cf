"""The verbs: whatever has a prior draws in one call, and whatever has none is told what to do."""

import numpy as np
import pytest
import torch
import transformers
from goat import GoatAttention
from torch import nn

from goatviz.adapters.capture import capture
from goatviz.analysis import implied_prior, plan_slice, prior_profile, sink_profile
from goatviz.attention import Attention
from goatviz.figures import plot_extrapolation, plot_length, plot_plan, plot_prior, plot_sinks
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.plots import PRIOR_KINDS, SINK_KINDS, Figure, draw_prior, draw_sinks
from goatviz.priors import ALiBiPrior
from goatviz.training import load_pretrained
from goatviz.transport import solve_rows
from tests.factories import TextTokenizer, ids, length_result, tiny_huggingface, tiny_lm


def caption(figure):
    return " ".join(a.text for a in figure.layout.annotations)


SOURCES = {
    "prior": lambda: goat_prior(2, rank=2, sink_rank=2, training_length=32),
    "layer": lambda: Attention(32, 2, prior=ALiBiPrior(2)),
    "model": lambda: CausalLM(ModelConfig(vocab_size=8, training_length=32)),
    "checkpoint": lambda: load_pretrained("copy-mixture-1-goat"),
    "goat-attention": lambda: nn.Sequential(GoatAttention(128, 4, training_seq_len=32)),
    "profile": lambda: prior_profile(ALiBiPrior(2), length=8),
}


@pytest.mark.parametrize("name", SOURCES)
def test_everything_with_a_prior_draws(name):
    assert plot_prior(SOURCES[name]()).layout.title.text == "Learned prior"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.MultiheadAttention(8, 2), object()])
def test_a_model_without_a_prior_is_told_what_to_do(model):
    with pytest.raises(TypeError, match=r"no explicit prior|must be a goatviz Prior"):
        plot_prior(model)


def test_options_reach_the_profile():
    figure = plot_prior(ALiBiPrior(2), length=100, heads=1, queries=slice(90, 100), kind="matrix")
    heatmap = next(t for t in figure.data if t.name == "plan")
    assert list(heatmap.y) == list(range(90, 100))
    assert "head 1" in figure.layout.title.subtitle.text
    assert figure.layout.title.subtitle.text.startswith("100 tokens")


def test_notes_of_foreign_modules_are_shown():
    gated = GoatAttention(64, 2, prior_gate="query_norm", training_seq_len=32)
    assert "⚠ Gated by the query's norm" in caption(plot_prior(gated))
    assert "⚠ No training_seq_len" in caption(plot_prior(GoatAttention(64, 2), length=16))


def test_bidirectional_priors_show_both_sides():
    figure = plot_prior(ALiBiPrior(1, symmetric=True), length=16, causal=False)
    kernel = next(t for t in figure.data if t.name == "κ(lag)")
    assert kernel.x.min() == -15 and kernel.x.max() == 15
    np.testing.assert_array_equal(kernel.y, kernel.y[::-1])
    assert not figure.layout.shapes


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kind": "map"}, ValueError, "kind must be one of.*got 'map'"),
        ({"layers": 3}, ValueError, "layers must be an integer in 0 .. 0, got 3"),
        ({"heads": [7]}, ValueError, "heads must be an integer in 0 .. 1, got 7"),
        ({"length": 0}, ValueError, "length must be an integer of at least 1"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        plot_prior(ALiBiPrior(2), **options)


def test_a_finished_profile_takes_no_options():
    profile = prior_profile(ALiBiPrior(2), length=8)
    with pytest.raises(TypeError, match="inputs, length, heads must not be given with a finished"):
        plot_prior(profile, ids(), length=5, heads=1)


@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_a_model_without_a_prior_draws_the_one_its_logits_imply(kind):
    model, inputs = tiny_huggingface("gpt2"), ids(2, 24, vocab=50)
    with pytest.raises(TypeError, match=r"plot_prior\(model, inputs\)"):
        plot_prior(model, kind=kind)
    figure = plot_prior(model, inputs, kind=kind, layers=[1], max_lag=8)
    wanted = draw_prior(
        implied_prior(
            model,
            inputs,
            layers=[1],
            max_lag=8,
            **({"resolution": 2, "points": 512} if kind == "heads" else {}),
        ),
        kind=kind,
    )
    assert figure.to_json() == wanted.to_json()
    if kind == "decomposition":
        assert figure.layout.title.text == "Implied prior"


def test_implied_priors_of_text_of_records_and_of_uniform_layers():
    text = plot_prior(tiny_lm("rope"), "seven seas", tokenizer=TextTokenizer(), heads=1, length=12)
    assert text.layout.title.text == "Implied prior"
    assert "12 tokens" in text.layout.title.subtitle.text
    model = tiny_lm()
    with capture(model, keep="projections") as record:
        model(ids(1, 12))
    assert plot_prior(record).layout.title.text == "Implied prior"


@pytest.mark.parametrize("option", ["inputs", "tokenizer", "max_lag"])
def test_an_explicit_prior_takes_no_inputs(option):
    for source in (load_pretrained("copy-mixture-1-goat"), ALiBiPrior(2)):
        with pytest.raises(TypeError, match=f"{option} must not be given with an explicit prior"):
            plot_prior(source, **{option: 3})


def test_plans_of_plans_models_checkpoints_and_slices():
    ids = torch.zeros(1, 6, dtype=torch.long)
    checkpoint = load_pretrained("copy-mixture-4-goat")
    plan = solve_rows(torch.zeros(4, 4))
    for figure in (
        plot_plan(plan),
        plot_plan(plan_slice(plan)),
        plot_plan(checkpoint, ids, head=1),
        plot_plan(checkpoint.model, ids),
    ):
        assert "POT" in caption(figure)


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_sinks_of_real_models(kind):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    ids = torch.randint(20, (3, 24))
    for model in (transformers.GPT2Model(config).eval(), load_pretrained("copy-mixture-1-goat")):
        figure = plot_sinks(model, ids, kind=kind, threshold=0.2)
        assert len(figure.to_json()) < 2_000_000
        assert isinstance(figure, Figure)


def test_sinks_refuse_what_cannot_be():
    profile = sink_profile(load_pretrained("copy-mixture-1-goat"), torch.randint(32, (2, 30)))
    assert plot_sinks(profile, kind="rate", threshold=0.5).layout.title.text
    with pytest.raises(ValueError, match="kind must be one of overview, profile.*got 'map'"):
        plot_sinks(profile, kind="map")
    with pytest.raises(TypeError, match="inputs, recent must not be given with a finished profile"):
        plot_sinks(profile, torch.zeros(1, 3), recent=3)


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_sinks_of_a_model_a_record_and_a_profile_are_one_drawing(kind):
    model = CausalLM(ModelConfig(vocab_size=20, training_length=32, num_layers=2))
    ids = torch.randint(20, (3, 24))
    options = {"threshold": 0.11, "min_observers": 4, "recent": 5}
    profile = sink_profile(model, ids, maps=True, spectra=True, **options)
    drawn = plot_sinks(model, ids, kind=kind, **options).to_json()
    assert drawn == plot_sinks(profile, kind=kind).to_json()
    assert drawn == draw_sinks(profile, kind=kind, threshold=0.11).to_json()
    with capture(model, keep="projections", recent=5) as record:
        model(ids)
    if kind == "hidden":
        with pytest.raises(ValueError, match="a record holds no hidden states"):
            plot_sinks(record, kind=kind)
        return
    figure = plot_sinks(record, kind=kind, threshold=0.11, min_observers=4)
    assert "record · 3 inputs of 24 tokens · causal · prior: learned" in caption(figure)
    assert "CausalLM · 3 inputs of 24 tokens" in caption(plot_sinks(profile, kind=kind))


def test_maps_need_a_profile_that_has_them():
    model, ids = CausalLM(ModelConfig(vocab_size=20, training_length=32)), torch.zeros(1, 20).long()
    profile = sink_profile(model, ids)
    for kind in ("logits", "probabilities"):
        with pytest.raises(ValueError, match=r"pass maps=True to sink_profile"):
            plot_sinks(profile, kind=kind)
    heatmap = next(
        t for t in plot_sinks(model, ids, kind="logits", maps=6).data if t.name == "logit"
    )
    assert np.asarray(heatmap.z).shape == (6, 6)


def test_the_old_name_of_plot_length_warns_and_draws_the_same():
    with pytest.warns(DeprecationWarning, match="plot_extrapolation is now plot_length"):
        old = plot_extrapolation(length_result(), measure="token")
    assert old.to_json() == plot_length(length_result(), measure="token").to_json()
