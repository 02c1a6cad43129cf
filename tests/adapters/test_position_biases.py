"""Swin, DeBERTa and SuperGlue: biases of offsets, of queries and keys, and a two-sided plan."""

import numpy as np
import ot
import pytest
import torch
import transformers
from torch import nn
from transformers.models.superglue import modeling_superglue

from goatviz.adapters import capture, intervene
from goatviz.adapters.capture import find_attention
from goatviz.transport import Hide, Temper
from tests.factories import build_huggingface, ids

SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
SWIN |= {"depths": [2, 2], "num_heads": [2, 4]}
PIXELS = {"image_size": 8, "patch_size": 1}
DEBERTA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
}
MODELS = {
    "swin of maskformer": ("MaskFormerSwinModel", "MaskFormerSwinConfig", SWIN),
    "swin of donut": ("DonutSwinModel", "DonutSwinConfig", SWIN),
    "swin2sr": ("Swin2SRModel", "Swin2SRConfig", SWIN | {"num_heads": [2, 2]} | PIXELS),
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "swinv2": ("Swinv2Model", "Swinv2Config", SWIN),
    "deberta": ("DebertaModel", "DebertaConfig", DEBERTA),
    "deberta, c2p": ("DebertaModel", "DebertaConfig", DEBERTA | {"pos_att_type": ["c2p"]}),
    "deberta, no bias": ("DebertaModel", "DebertaConfig", DEBERTA | {"relative_attention": False}),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", DEBERTA | {"position_buckets": 4}),
    "deberta-v2, shared": ("DebertaV2Model", "DebertaV2Config", DEBERTA | {"share_att_key": True}),
    "deberta-v2, p2c": ("DebertaV2Model", "DebertaV2Config", DEBERTA | {"pos_att_type": ["p2c"]}),
}
MATCHER = {
    "hidden_size": 32,
    "keypoint_encoder_sizes": [8, 16],
    "gnn_layers_types": ["self", "cross"],
    "num_attention_heads": 4,
}
DETECTOR = {
    "encoder_hidden_sizes": [8, 8, 16, 16],
    "decoder_hidden_size": 16,
    "descriptor_decoder_dim": 32,
    "keypoint_threshold": 0.0,
    "border_removal_distance": 2,
}


def made(name):
    """A tiny model and its inputs, a sequence of which is padded."""
    model = build_huggingface(*MODELS[name])
    model.set_attn_implementation("eager")
    if name.startswith("swin"):
        size, generator = model.config.image_size, torch.Generator().manual_seed(0)
        return model, {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return model, {"input_ids": ids(2, 12, vocab=50), "attention_mask": mask}


def matcher():
    """A tiny SuperGlue, and two images of noise: the one with fewer keypoints is padded."""
    detector = transformers.SuperPointConfig(**DETECTOR)
    options = MATCHER | {"keypoint_detector_config": detector}
    model = build_huggingface("SuperGlueForKeypointMatching", "SuperGlueConfig", options)
    generator = torch.Generator().manual_seed(0)
    return model, {"pixel_values": torch.rand(1, 2, 3, 48, 64, generator=generator)}


def weights_of_layers(model, given):
    """What every attention layer returns itself, by path."""
    kept, hooks = {}, []
    for path, layer in find_attention(model).items():

        def keep(_module, _args, out, path=path):
            kept[path] = out[1]

        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model(**given, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return kept


def check_plans(model, given):
    """The same bits, certified, and the layers' own weights; returns the record."""
    with torch.no_grad():
        plain = model(**given)[0]
        with capture(model, keep="projections", certify=16) as record:
            assert torch.equal(model(**given)[0], plain)
    assert max(record.residuals().values()) < 1e-6
    theirs = weights_of_layers(model, given)
    assert list(theirs) == [call.name for call in record.calls]
    for captured in record.calls:
        call = captured.call
        for batch in range(call.shape[0]):
            real = slice(None)
            if call.query_mask is not None:
                real = call.query_mask[batch if len(call.query_mask) > 1 else 0]
            for head in range(call.shape[1]):
                plan = call.plan(batch, head).weights[real]
                wanted = theirs[captured.name][batch, head].double()[real]
                torch.testing.assert_close(plan, wanted, atol=2e-6, rtol=0)
    return record


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_those_of_the_model(name):
    record = check_plans(*made(name))
    for captured in record.calls:
        assert captured.call.biased == (name != "deberta, no bias")
        assert captured.call.prior is None and not captured.call.causal


@pytest.mark.parametrize(
    "name", ["swin", "swin of donut", "swin of maskformer", "swin2sr", "swinv2"]
)
def test_the_bias_of_a_window_is_a_table_of_offsets_and_a_mask(name):
    record = check_plans(*made(name))
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    offset = 7 * (rows[:, None] - rows + 3) + columns[:, None] - columns + 3
    # Windows of the second layer are shifted by two, and the last ones hold pieces of several.
    plain, shifted = (record.of(layer)[0].call for layer in (0, 1))
    for head in range(2):
        for at in range(49):
            values = plain.bias[0, head][offset == at]
            torch.testing.assert_close(values, values[:1].expand_as(values), atol=0, rtol=0)
    hidden = shifted.bias[:, 0] < -50
    assert hidden.flatten(1).any(1).tolist() == [False, True, True, True] * 2
    weights = torch.stack([shifted.plan(batch).weights for batch in range(8)])
    assert float(weights[hidden].max()) < 1e-30


def test_the_temperature_of_cosine_attention_is_in_the_queries():
    model, given = made("swinv2")
    layer = next(iter(find_attention(model).values()))
    nn.init.constant_(layer.logit_scale[0], 10.0)
    with torch.no_grad(), capture(model, keep="projections", certify=16) as record:
        model(**given)
    # At a hundredth, rounding of the scores shows.
    assert max(record.residuals().values()) < 1e-5
    call = record.calls[0].call
    wanted = layer.logit_scale.detach().flatten().exp().clamp(max=100.0)
    for head in range(2):
        lengths = call.q[:, head].norm(dim=-1)
        torch.testing.assert_close(lengths, wanted[head].expand_as(lengths))
    torch.testing.assert_close(call.k.norm(dim=-1), torch.ones(call.k.shape[:-1]))
    assert call.scale == 1.0


def test_the_bias_of_deberta_depends_on_queries_and_keys():
    # A prior of position would have one value at each lag.
    call = check_plans(*made("deberta-v2")).calls[0].call
    for shift in (0, 1, 3):
        diagonal = call.bias[0, 0].diagonal(shift)
        assert float(diagonal.std()) > 0.01


def test_what_dropout_or_talking_heads_change_is_refused():
    model, given = made("deberta-v2")
    for layer in find_attention(model).values():
        layer.dropout.p = 0.0
    with pytest.raises(ValueError, match=r"training mode with attention dropout p=0\.1"):
        with capture(model.train()):
            model(**given)
    model = build_huggingface(*MODELS["deberta"][:2], DEBERTA | {"talking_head": True})
    with pytest.raises(ValueError, match="talking heads mix the logits of all heads"):
        with torch.no_grad(), capture(model):
            model(**given)


@pytest.mark.parametrize("name", ["swinv2", "deberta", "deberta-v2"])
def test_plans_can_be_changed(name):
    model, given = made(name)
    with torch.no_grad():
        plain = model(**given)[0]
        with intervene(model, Temper(1.0)):
            torch.testing.assert_close(model(**given)[0], plain, atol=2e-5, rtol=1e-4)
        with intervene(model, Hide([0])):
            assert not torch.allclose(model(**given)[0], plain, atol=1e-3)


def test_graph_attention_of_superglue_is_captured():
    model, given = matcher()
    record = check_plans(model, given)
    own, cross = (record.of(layer)[0].call for layer in (0, 1))
    counts = own.visibility.count()[:, 0, 0]
    assert 1 < counts.min() < counts.max() == own.shape[3]
    # In the second layer the keypoints of an image ask those of the other.
    assert torch.equal(cross.visibility.count()[:, 0, 0], counts.flip(0))
    assert own.query_mask.sum(-1).tolist() == counts.tolist() and cross.query_mask is None


def test_the_two_sided_plan_of_superglue_is_that_of_pot(monkeypatch):
    model, given = matcher()
    kept = []

    def transport(scores, dustbin, iterations):
        found = modeling_superglue_transport(scores, dustbin, iterations=iterations)
        kept.append((scores[0].double().numpy(), float(dustbin), found[0].double().exp().numpy()))
        return found

    modeling_superglue_transport = modeling_superglue.log_optimal_transport
    monkeypatch.setattr(modeling_superglue, "log_optimal_transport", transport)
    with torch.no_grad():
        model(**given)
    ((scores, dustbin, theirs),) = kept
    m, n = scores.shape
    # Every keypoint has mass 1, and each dustbin room for all keypoints of the other image.
    source, target = np.append(np.ones(m), n) / (m + n), np.append(np.ones(n), m) / (m + n)
    gain = np.pad(scores, ((0, 1), (0, 1)), constant_values=dustbin)
    plan = ot.sinkhorn(
        source, target, -gain, 1.0, method="sinkhorn_log", numItermax=10_000, stopThr=1e-13
    )
    np.testing.assert_allclose(theirs / (m + n), plan, atol=1e-6, rtol=0)
    np.testing.assert_allclose(plan.sum(1), source, atol=1e-12)
    assert plan[:-1, :-1].sum() > 0.05 < plan[-1, :-1].sum()
    # Padding has nowhere to go but the dustbin.
    padding = [(plan[:, -1][:-1], scores.max(1)), (plan[-1, :-1], scores.max(0))]
    alone = [lost[best < -1e30] for lost, best in padding]
    assert 0 < sum(map(len, alone)) < n
    np.testing.assert_allclose(np.concatenate(alone), 1 / (m + n), atol=1e-12)
