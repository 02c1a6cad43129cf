"""Certificates: what the kernel returned is the plan times the values, and a fault is a number."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch

from goatviz.adapters import capture
from goatviz.attention import layer as attention_layer
from goatviz.models import POSITION_SCHEMES
from goatviz.transport.call import AttentionCall
from tests.factories import HUGGINGFACE, ids, tiny_huggingface, tiny_lm

TEXT = ids(2, 24, vocab=50)


def residual(model, batch=TEXT, **options):
    with capture(model, statistics=["key_mass"], certify=8) as record, torch.no_grad():
        model(batch, **options)
    return max(record.residuals().values())


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_our_layers(positions):
    assert residual(tiny_lm(positions), ids(2, 24)) < 2e-6


TEXTS = sorted(set(HUGGINGFACE) - {"vit"})
#: Softcaps and sink columns are not served by transformers' sdpa.
ONLY_EAGER = {"gemma2", "gpt-oss"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "eager") for name in TEXTS]
    + [(name, "sdpa") for name in TEXTS if name not in ONLY_EAGER],
)
def test_families(name, implementation):
    model = tiny_huggingface(name)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(TEXT)
    mask[1, 20:] = 0
    assert residual(model, attention_mask=mask) < 5e-6


def test_low_precision_leaves_its_rounding():
    model = tiny_huggingface("llama").bfloat16()
    assert 1e-5 < residual(model) < 2e-2


def test_decoding_through_a_sliding_window():
    model = tiny_huggingface("mistral")
    with capture(model, statistics=[], certify=4) as record:
        model.generate(TEXT, max_new_tokens=6, do_sample=False)
    assert len(record.calls) == 12 and max(record.residuals().values()) < 5e-6


def without(name):
    """A kernel that was never told of one of its arguments."""

    def change(kernel):
        def faulty(module, query, key, value, mask, **options):
            options = {key: value for key, value in options.items() if key != name}
            return kernel(module, query, key, value, None if name == "mask" else mask, **options)

        return faulty

    return change


def scaled(kernel):
    def faulty(module, query, key, value, mask, **options):
        return kernel(module, 1.1 * query, key, value, mask, **options)

    return faulty


def without_sink(kernel):
    def faulty(module, *args, **options):
        lost = copy.copy(module)
        none = torch.nn.Parameter(torch.full_like(module.sinks, -1e4))
        lost._parameters = {**module._parameters, "sinks": none}
        return kernel(lost, *args, **options)

    return faulty


def one_head(kernel):
    """A kernel that computes one head as if it were the next."""

    def faulty(*args, **options):
        out, weights = kernel(*args, **options)
        return torch.cat([out[:, :, 1:2], out[:, :, 1:]], dim=2), weights

    return faulty


@pytest.mark.parametrize(
    ("fault", "model"),
    [
        (without("mask"), "mistral"),
        (scaled, "llama"),
        (one_head, "llama"),
        (without("softcap"), "gemma2"),
        (without_sink, "gpt-oss"),
    ],
    ids=["mask", "scale", "head", "softcap", "sink"],
)
def test_a_planted_fault_is_a_number(monkeypatch, fault, model):
    model = tiny_huggingface(model, std=0.4)
    scope = sys.modules[type(model).__module__]
    monkeypatch.setattr(scope, "eager_attention_forward", fault(scope.eager_attention_forward))
    model.set_attn_implementation("eager")
    assert residual(model) > 1e-3


def test_a_planted_fault_of_ours(monkeypatch):
    attend = attention_layer.attend
    monkeypatch.setattr(
        attention_layer,
        "attend",
        lambda inputs, impl: attend(replace(inputs, q=1.1 * inputs.q), impl),
    )
    assert residual(tiny_lm(), ids(2, 24)) > 1e-3


def test_nothing_changes_and_the_record_tells():
    model = tiny_huggingface("gpt2")
    with torch.no_grad():
        before = model(TEXT).logits
        with capture(model, certify=3) as record:
            after = model(TEXT).logits
    assert torch.equal(before, after) and "residual" in repr(record.calls[0])
    assert list(record.residuals()) == list(record.layers)
    with capture(model) as record, torch.no_grad():
        model(TEXT)
    with pytest.raises(ValueError, match="record must hold residuals: capture"):
        record.residuals()


def test_what_cannot_be_certified_is_named():
    encoder = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    with pytest.raises(ValueError, match="certify must be None for self_attn"):
        with capture(encoder, certify=4):
            pass
    with pytest.raises(ValueError, match="certify must be an integer of at least 1, got 0"):
        with capture(tiny_lm(), certify=0):
            pass


def test_shapes_are_checked():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="call must hold the values v, got none"):
        AttentionCall.from_tensors(q, q).residual(q)
    with pytest.raises(ValueError, match=r"output must have shape \(1, 2, 3, 4\), got"):
        AttentionCall.from_tensors(q, q, v=q).residual(q.transpose(1, 2))


def test_numbers_that_are_not_finite_are_certified_by_none():
    model = tiny_lm()
    with torch.no_grad():
        model.blocks[-1].attention.v_proj.bias[0] = math.nan
    assert residual(model, ids(2, 24)) == math.inf
