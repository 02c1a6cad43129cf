"""Interventions: the model computes what another one computes whose attention is really changed."""

import math

import pytest
import torch
from torch import nn

from goatviz.adapters import capture, intervene
from goatviz.adapters.intervene import capture_changed
from goatviz.models import POSITION_SCHEMES
from goatviz.transport import Ablate, Hide, SinkColumn, Streaming, Temper
from goatviz.transport.changes import changed_call
from tests.factories import ids, tiny_huggingface, tiny_lm

TEXT = ids(2, 24, vocab=50)
#: Softcaps and sink columns are not served by transformers' sdpa.
FAMILIES = ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt-oss"]


@torch.no_grad()
def logits(model, text=TEXT, changes=None, **options):
    if changes is None:
        out = model(text)
    else:
        with intervene(model, changes, **options):
            out = model(text)
    return out if isinstance(out, torch.Tensor) else out.logits


def near(first, second):
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_change_is_the_same_plan(name):
    model = tiny_huggingface(name)
    near(logits(model, changes=Temper(1.0)), logits(model))


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_our_layers(positions):
    model, text = tiny_lm(positions), ids(2, 24)
    near(logits(model, text, Temper(1.0)), logits(model, text))
    assert not torch.allclose(logits(model, text, Hide([0])), logits(model, text), atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_hidden_key_is_a_masked_key(implementation):
    model = tiny_huggingface("llama")
    model.set_attn_implementation(implementation)
    allowed = torch.ones(24, 24, dtype=torch.bool).tril()
    allowed[1:, 0] = False
    mask = torch.zeros(2, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        near(logits(model, changes=Hide([0])), model(TEXT, attention_mask=mask).logits)


def test_captured_calls_of_a_changed_model_are_those_of_a_masked_one():
    model = tiny_huggingface("llama")
    allowed = torch.ones(24, 24, dtype=torch.bool).tril()
    allowed[1:, 0] = False
    mask = torch.zeros(2, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with capture(model, statistics=[], keep="projections") as masked, torch.no_grad():
        model(TEXT, attention_mask=mask)
    with capture_changed(model, Hide([0])) as (record, changes), torch.no_grad():
        changed = model(TEXT).logits
    near(changed, logits(model, changes=Hide([0])))
    assert record.layers == masked.layers and changes == {0: (Hide([0]),), 1: (Hide([0]),)}
    for layer in (0, 1):
        call = changed_call(record.of(layer)[-1].call, 1, 3, changes[layer])
        near(call.plan().weights, masked.plan(layer=layer, head=3, batch=1).weights)
    with capture_changed(model, {1: Hide([0])}) as (record, changes), torch.no_grad():
        model(TEXT)
    assert [call.layer for call in record.calls] == [0, 1] and changes.keys() == {1}


def test_a_window_is_a_mask():
    model = tiny_huggingface("llama")
    row, column = torch.arange(24)[:, None], torch.arange(24)
    allowed = (column <= row) & ((row - column < 6) | (column < 2))
    mask = torch.zeros(2, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        masked = model(TEXT, attention_mask=mask).logits
    near(logits(model, changes=Streaming(6, sinks=2)), masked)


def test_temperature_is_the_scale_of_the_module():
    model = tiny_huggingface("llama")
    tempered = logits(model, changes=Temper(2.0), layers=[1])
    model.model.layers[1].self_attn.scaling /= 2
    near(tempered, logits(model))


def test_sink_columns_are_those_of_gpt_oss():
    model = tiny_huggingface("gpt-oss")
    chosen = [[0.5, -1.0, 2.0, 3.0], [1.0, 1.0, 0.0, -2.0]]
    changed = logits(model, changes={layer: SinkColumn(chosen[layer]) for layer in (0, 1)})
    without = logits(model, changes=SinkColumn(None))
    for layer, values in zip(model.model.layers, chosen, strict=True):
        layer.self_attn.sinks.data = torch.tensor(values)
    near(changed, logits(model))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-math.inf)
    with torch.no_grad():
        near(without, model(TEXT).logits)


def test_a_part_of_goats_prior():
    model, text = tiny_lm("goat"), ids(2, 24)
    ablated = logits(model, text, Ablate("sink"))
    for block in model.blocks:
        for parameter in block.attention.prior.components()["sink"].parameters():
            nn.init.zeros_(parameter)
    near(ablated, logits(model, text))


def test_only_chosen_layers_and_heads_change():
    model = tiny_huggingface("gpt2")
    kept = {}

    def keep(layer):
        def hook(module, arguments):
            kept.setdefault(layer, []).append(arguments[0])

        return hook

    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(keep(layer))
    logits(model)
    logits(model, changes={"transformer.h.1.attn": Hide([0], heads=[2])})
    assert torch.equal(*kept[0])
    before, after = (part.view(2, 24, 4, 8) for part in kept[1])
    assert torch.equal(before[:, :, [0, 1, 3]], after[:, :, [0, 1, 3]])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_decoding():
    model = tiny_huggingface("llama")
    with intervene(model, [Hide([0]), Streaming(8)]):
        tokens = model.generate(TEXT, max_new_tokens=6, do_sample=False, use_cache=True)
        again = model.generate(TEXT, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, model.generate(TEXT, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("model", [tiny_huggingface("llama"), tiny_lm("goat")])
def test_the_model_is_as_before(model):
    text = TEXT % 20
    before = logits(model, text)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), intervene(model, Hide([0])):
        model(text)
        raise ZeroDivisionError
    assert torch.equal(logits(model, text), before)
    with pytest.raises(ValueError, match="heads must be an integer in 0"):
        logits(model, text, Hide([0], heads=[9]))
    assert torch.equal(logits(model, text), before)


def test_gradients_are_refused():
    model = tiny_huggingface("llama")
    with pytest.raises(ValueError, match="run the model under torch.no_grad"):
        with intervene(model, Hide([0])):
            model(TEXT)


def test_weights_of_an_eager_kernel_are_not_handed_on():
    model = tiny_huggingface("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad(), intervene(model, Hide([0]), layers=[1]):
        weights = model(TEXT, output_attentions=True).attentions
    assert weights[0].isfinite().all() and weights[1].isnan().all()


def torch_layers():
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


@pytest.mark.parametrize(
    ("model", "changes", "layers", "error", "message"),
    [
        (nn.Linear(2, 2), Hide([0]), None, TypeError, "attention that cannot be captured"),
        ("llama", [0], None, TypeError, r"changes must be a Change such as goatviz.Hide"),
        ("llama", {}, None, ValueError, "changes must name at least one layer"),
        ("llama", {5: Hide([0])}, None, ValueError, "layers must be numbers in 0 .. 1"),
        ("llama", Hide([0]), ["x"], ValueError, "or paths such as 'model.layers.0.self_attn'"),
        ("llama", {0: Hide([0])}, [0], TypeError, "layers"),
        (
            "llama",
            {0: Hide([0]), "model.layers.0.self_attn": Hide([0])},
            None,
            ValueError,
            "changes must name each layer once",
        ),
        (torch_layers(), Hide([0]), None, ValueError, "kernel whose output can be seen, got"),
    ],
)
def test_bad_arguments(model, changes, layers, error, message):
    model = tiny_huggingface(model) if isinstance(model, str) else model
    with pytest.raises(error, match=message), intervene(model, changes, layers=layers):
        pass


def test_captured_models_are_busy():
    model = tiny_huggingface("llama")
    with capture(model), pytest.raises(ValueError, match="being captured already"):
        with intervene(model, Hide([0])):
            pass
    assert not torch.equal(logits(model, changes=Hide([0])), logits(model))
