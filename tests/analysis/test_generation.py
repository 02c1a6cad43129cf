"""Rows of a cached generation are those of one forward pass over the whole text."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from goatviz.adapters import capture
from goatviz.analysis import generation_steps, generation_thumbnails, plan_thumbnails
from goatviz.analysis.generation import step_summary
from goatviz.attention import Attention
from goatviz.results import load_result, save_result
from tests.factories import ids, tiny_huggingface, tiny_lm

NEW = 5


def check_against_one_pass(steps, model, prompt):
    """Compare every row with the plan of an uncached pass over the prompt and the new tokens."""
    text = torch.cat([prompt, torch.from_numpy(steps["next_id"].values)[None]], dim=1)
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        logits = model(text[:, :-1])
    logits = getattr(logits, "logits", logits)
    query = steps["query"].values
    assert query.tolist() == list(range(prompt.shape[1] - 1, text.shape[1] - 1))
    assert steps["next_id"].values.tolist() == logits[0, query].argmax(-1).tolist()
    assert steps["weights"].dtype == np.float32
    for layer in steps["layer"].values.tolist():
        count = record.of(layer)[0].shape[1]
        for head in range(count):
            plan = record.plan(layer=layer, head=head)
            rows = steps["weights"].sel(layer=layer, head=head).values
            for row, at in zip(rows, query, strict=True):
                np.testing.assert_allclose(row[: at + 1], plan.weights[at, : at + 1], atol=1e-5)
                assert np.isnan(row[at + 1 :]).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gpt-oss"])
def test_cached_is_uncached(name):
    model, prompt = tiny_huggingface(name), ids(1, 12)
    model.generation_config.eos_token_id = None
    steps = generation_steps(model, prompt, max_new_tokens=NEW)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    text = model.generate(**given, max_new_tokens=NEW, do_sample=False)
    assert text[0, 12:].tolist() == steps["next_id"].values.tolist()
    check_against_one_pass(steps, model, prompt)


@pytest.mark.parametrize("positions", ["goat", "alibi", "rope"])
def test_a_goatviz_model(positions, tmp_path):
    model, prompt = tiny_lm(positions), ids(1, 9)
    steps = generation_steps(model, prompt, max_new_tokens=NEW)
    check_against_one_pass(steps, model, prompt)
    np.testing.assert_allclose(steps["weights"].sum("key"), 1, atol=1e-5)
    assert "token" not in steps and steps.attrs["prompt_tokens"] == 9
    save_result(steps, tmp_path / "steps.nc")
    assert load_result(tmp_path / "steps.nc").identical(steps)
    part = generation_steps(model, prompt, max_new_tokens=NEW, layers=1)
    assert part["layer"].values.tolist() == [1]
    np.testing.assert_array_equal(part["weights"], steps["weights"].sel(layer=[1]))


def test_tokens_are_named(smollm2):
    model, tokenizer = smollm2
    prompt = "The capital of France is Paris, and the capital of Italy is"
    steps = generation_steps(model, prompt, tokenizer=tokenizer, max_new_tokens=3, layers=[0, 29])
    assert steps["next_token"].values.tolist()[0] == "␣Rome"
    assert steps["token"].values.tolist()[:3] == ["The", "␣capital", "␣of"]
    assert steps["token"].values[steps["query"][1]] == "␣Rome"
    given = tokenizer(prompt, return_tensors="pt")
    again = generation_steps(model, dict(given), max_new_tokens=3, layers=[0, 29])
    assert again.identical(steps.drop_vars(["token", "next_token"]))


def test_padding_is_cut_away():
    model, prompt = tiny_huggingface("llama"), ids(1, 10)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    padded = generation_steps(model, {"input_ids": prompt, "attention_mask": mask})
    assert padded.identical(generation_steps(model, prompt[:, 3:]))


def test_the_end_of_a_text_ends_it():
    model, prompt = tiny_huggingface("llama"), ids(1, 6)
    model.generation_config.eos_token_id = None
    whole = generation_steps(model, prompt, max_new_tokens=6)["next_id"].values.tolist()
    model.generation_config.eos_token_id = whole[2]
    steps = generation_steps(model, prompt, max_new_tokens=6)
    assert steps["next_id"].values.tolist() == whole[: whole.index(whole[2]) + 1]


class Speaker(nn.Module):
    """Two layers that attend to so many first tokens in the first pass and in later ones."""

    def __init__(self, *seen):
        super().__init__()
        self.layers = nn.ModuleList(Attention(8, 1) for _ in seen)
        self.seen = seen

    def generate(self, input_ids, max_new_tokens, logits_processor, **_):
        for step in range(max_new_tokens):
            for layer, seen in zip(self.layers, self.seen, strict=True):
                if length := min(input_ids.shape[1], seen[step > 0]):
                    layer(torch.zeros(1, length, 8))
            logits_processor[0](input_ids, torch.zeros(1, 4))
            input_ids = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
        return input_ids


def test_layers_attend_to_the_text_at_every_step():
    all_of_it, some, nothing = (99, 99), (2, 2), (0, 0)
    steps = generation_steps(Speaker(all_of_it, nothing), ids(1, 4), max_new_tokens=2)
    assert steps["layer"].values.tolist() == [0]
    with pytest.raises(ValueError, match=r"layer 1 \(layers.1\) must attend to the text so far"):
        generation_steps(Speaker(all_of_it, some), ids(1, 4))
    with pytest.raises(ValueError, match="got layers.0, which some passes leave out"):
        generation_steps(Speaker((99, 0), all_of_it), ids(1, 4))
    with pytest.raises(ValueError, match="attention that every forward pass calls, got none"):
        generation_steps(Speaker(nothing), ids(1, 4))
    encoder = Speaker(all_of_it)
    encoder.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="model must be a decoder alone, got Speaker"):
        generation_steps(encoder, ids(1, 4))


def test_what_cannot_be_generated():
    model = tiny_lm()
    with pytest.raises(TypeError, match=r"model must be a CausalLM or have generate\(\).*Linear"):
        generation_steps(nn.Linear(2, 2), ids(1, 4))
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        generation_steps("model", ids(1, 4))
    with pytest.raises(ValueError, match=r"prompt must be one text.*1 input of shape \(2, 4\)"):
        generation_steps(model, ids(2, 4))
    with pytest.raises(ValueError, match="prompt must be one text.*got 2 inputs"):
        generation_steps(model, [ids(1, 4), ids(1, 4)])
    with pytest.raises(TypeError, match="inputs are texts: pass tokenizer="):
        generation_steps(model, "text")
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        generation_steps(model, ids(1, 4), max_new_tokens=0)
    with pytest.raises(ValueError, match="inputs must hold token ids in 0 .. 19"):
        generation_steps(model, torch.full((1, 4), 20))
    learned = tiny_lm("learned")
    assert generation_steps(learned, ids(1, 30), max_new_tokens=3).sizes["step"] == 3
    with pytest.raises(ValueError, match="inputs must hold at most 32 tokens"):
        generation_steps(learned, ids(1, 30), max_new_tokens=4)


# --- all heads at a glance, and one row in words ---


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_thumbnails_are_the_last_rows_of_the_plans(name):
    model, prompt = tiny_huggingface(name, sliding_window=64), ids(1, 40)
    model.generation_config.eos_token_id = None
    steps = generation_steps(model, prompt, max_new_tokens=NEW)
    text = torch.cat([prompt, torch.from_numpy(steps["next_id"].values)[None]], dim=1)[:, :-1]
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(text)
    found, whole = generation_thumbnails(steps, cells=8), plan_thumbnails(record, cells=44)
    assert found["weights"].shape[2:] == (NEW, 8)
    edges = [*found["key_start"].values[0], 44]
    rows = whole["weights"].values[:, :, -NEW:]
    for at, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        wanted = np.fmax.reduce(rows[..., start:stop], axis=-1)
        np.testing.assert_allclose(found["weights"][..., at], wanted, atol=1e-6)
    assert found["query"].values.tolist() == [list(range(39, 44))] * 2
    for layer in range(2):
        for head in range(4):
            plan = record.plan(layer=layer, head=head)
            weights = plan.weights[39:].double()
            np.testing.assert_allclose(
                found["first_mass"][layer, head], weights[:, 0].mean(), atol=1e-6
            )
            rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
            entropy = torch.special.entr(torch.cat([weights, rest], -1)).sum(-1)
            share = (entropy / torch.arange(40, 45).double().log()).mean()
            np.testing.assert_allclose(found["relative_entropy"][layer, head], share, atol=1e-4)


def test_a_row_in_words(smollm2):
    model, tokenizer = smollm2
    prompt = "The capital of France is Paris, and the capital of Italy is"
    steps = generation_steps(model, prompt, tokenizer=tokenizer, max_new_tokens=2, layers=[0, 29])
    query = int(steps["query"][0])
    said = step_summary(steps, layer=29, head=3, query=query)
    row = steps["weights"].sel(layer=29, head=3, step=0).values
    top = int(np.nanargmax(row))
    assert said.startswith(f"Step 1 of 2: query {query} “␣is” chooses token “␣Rome”. Layer 29, ")
    assert f"gives most to key {top} “{steps['token'].values[top]}” ({row[top]:.3g})" in said
    known = row[: query + 1].astype(float)
    entropy = -(known * np.log(np.where(known > 0, known, 1))).sum()
    assert f"entropy {entropy:.3g} of at most {np.log(query + 1):.3g} nats." in said
    with pytest.raises(ValueError, match=f"{query + 2}"):
        step_summary(steps, layer=29, head=3, query=query + 2)


def test_a_column_without_a_key_is_said():
    steps = generation_steps(tiny_huggingface("gpt-oss"), ids(1, 6), max_new_tokens=1)
    rest = 1 - float(steps["weights"].sel(layer=1, head=2, step=0).sum())
    said = step_summary(steps, layer=1, head=2, query=5)
    assert f"of at most {np.log(7):.3g} nats. A column without a key takes {rest:.3g}." in said
