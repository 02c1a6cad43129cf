"""Hugging Face models, watched: the right weights, the same bits, and nothing left behind."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface

from goatviz.adapters import huggingface
from goatviz.adapters.capture import capture
from goatviz.adapters.huggingface import (
    _Captured,
    find_huggingface_attention,
    unwatchable_huggingface,
    watch_huggingface,
)
from goatviz.adapters.kernel_call import KernelCall, Masks
from goatviz.transport import AttentionCall
from tests.factories import HUGGINGFACE, build_huggingface, tiny_huggingface

LENGTH = 12
EAGER_ONLY = {"gemma2", "gpt-oss"}
CAUSAL = set(HUGGINGFACE) - {"bert", "t5", "vit"}
PADDINGS = {"none": None, "left": [0] * 3 + [1] * 9, "right": [1] * 8 + [0] * 4}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module", params=HUGGINGFACE)
def named(request):
    return request.param, tiny_huggingface(request.param)


def registries():
    return [
        {id(key): value for key, value in registry._global_mapping.items()}
        for registry in (AttentionInterface, AttentionMaskInterface)
    ]


def arguments(name, padding=None):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    given = {"input_ids": torch.randint(3, 50, (2, LENGTH), generator=generator)}
    if padding is not None:
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[0] = torch.tensor(padding)
        given["attention_mask"] = mask
    return given


def eager_weights(model, given):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**given, output_attentions=True).attentions


def check_weights(record, attentions, real):
    assert len(record) == len(attentions)
    for layer, theirs in enumerate(attentions):
        batch, heads = theirs.shape[:2]
        for b in range(batch):
            for h in range(heads):
                window = record.plan(layer=layer, head=h, batch=b)
                rows = (
                    torch.ones(len(window.weights), dtype=torch.bool) if real is None else real[b]
                )
                difference = (window.weights[rows] - theirs[b, h][rows]).abs().max()
                assert float(difference) < 5e-5
                total = window.weights[rows].sum(-1) + window.sink_weight[rows]
                torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_are_the_models_own_and_outputs_keep_every_bit(named, implementation, padding):
    name, model = named
    if name == "vit" and padding != "none":
        padding = "none"
    given = arguments(name, PADDINGS[padding])
    attentions = eager_weights(model, given)
    if implementation == "sdpa" and name in EAGER_ONLY:
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("sdpa")
        return
    model.set_attn_implementation(implementation)
    before, named_before = registries(), model.config._attn_implementation
    with torch.no_grad():
        plain = model(**given)[0]
        with capture(model, keep="projections") as record:
            watched = model(**given)[0]
    assert torch.equal(plain, watched)
    assert registries() == before
    assert model.config._attn_implementation is named_before
    assert type(model.config._attn_implementation) is str
    mask = given.get("attention_mask")
    check_weights(record, attentions, None if mask is None else mask.bool())
    if mask is not None and name in CAUSAL:
        assert torch.equal(record.calls[0].call.query_mask, mask.bool())


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt-oss"])
def test_cached_decoding(name, new):
    model = tiny_huggingface(name)
    ids = arguments(name)["input_ids"]
    attentions = eager_weights(model, {"input_ids": ids})
    for implementation in ("eager",) if name in EAGER_ONLY else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(input_ids=ids[:, :-new], use_cache=True).past_key_values
            with capture(model, keep="projections") as record:
                model(input_ids=ids[:, -new:], past_key_values=cache)
        for layer, theirs in enumerate(attentions):
            window = record.plan(layer=layer, head=3, batch=1).weights
            # A sliding window's cache forgets the keys that nobody may use any more.
            kept = theirs[1, 3, -new:, -window.shape[1] :]
            assert float((window - kept).abs().max()) < 5e-5


def test_a_sliding_window_is_an_interval_and_not_a_mask():
    model = tiny_huggingface("mistral")
    with capture(model, keep="projections") as record:
        model(**arguments("mistral"))
    visibility = record.calls[0].call.visibility
    assert visibility.dense is None
    assert visibility.count().flatten().tolist() == [1, 2, 3, 4] + [5] * 8


def test_everything_is_restored_after_an_exception(monkeypatch):
    model = tiny_huggingface("llama")
    before, name = registries(), model.config._attn_implementation
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", None)
    with pytest.raises(TypeError):
        with capture(model):
            model(**arguments("llama"))
    assert registries() == before and model.config._attn_implementation is name


def test_other_models_are_left_alone():
    model = tiny_huggingface("llama")
    shared = transformers.LlamaForCausalLM(model.config).eval()
    other = tiny_huggingface("llama")
    given = arguments("llama")
    with torch.no_grad():
        wanted = [m(**given).logits for m in (shared, other)]
        with capture(model) as record:
            found = [m(**given).logits for m in (shared, other)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert len(record) == 0


def test_some_layers_only():
    model = tiny_huggingface("gpt2")
    with capture(model, layers=1) as record:
        model(**arguments("gpt2"))
    assert [call.name for call in record.calls] == ["transformer.h.1.attn"]
    assert record.layers == ("transformer.h.0.attn", "transformer.h.1.attn")


def test_watching_twice_at_once_is_refused():
    model = tiny_huggingface("gpt2")
    before = registries()
    with capture(model):
        with pytest.raises(ValueError, match="captured already"):
            with capture(model):
                pass
    assert registries() == before


def test_the_name_reads_as_before_while_watched():
    model = tiny_huggingface("gpt2")
    with capture(model):
        name = model.config._attn_implementation
        assert name == "sdpa" and name in ("eager", "sdpa") and name in AttentionInterface()
        assert name != "eager" and {name} != {"sdpa"}


def test_dropout_in_training_is_refused():
    model = tiny_huggingface("llama", attention_dropout=0.1).train()
    name = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"training mode with attention dropout p=0.1"):
        with capture(model):
            model(**arguments("llama"))
    assert model.config._attn_implementation is name
    quiet_model = tiny_huggingface("llama").train()
    with capture(quiet_model) as record:
        quiet_model(**arguments("llama"))
    assert len(record) == 2


def test_gpt2_that_bypasses_the_interface_is_refused():
    model = tiny_huggingface("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        with capture(model):
            pass


def test_attention_that_cannot_be_watched_is_named():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = build_huggingface("MegatronBertModel", "MegatronBertConfig", sizes)
    refused, skipped = unwatchable_huggingface(model, {})
    assert list(refused.values()) == ["MegatronBertSelfAttention"] and skipped == {}
    with pytest.raises(TypeError, match=r"MegatronBertSelfAttention cannot\); what can: goatviz"):
        with capture(model):
            pass
    bert = tiny_huggingface("bert")
    assert unwatchable_huggingface(bert, find_huggingface_attention(bert)) == ({}, {})


def test_meta_device_is_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_huggingface("llama").config)
    with pytest.raises(ValueError, match="meta device"):
        with capture(model):
            pass


def test_nan_activations_name_their_layer():
    model = tiny_huggingface("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    name = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.self_attn: q must be finite"):
        with capture(model):
            model(**arguments("llama"))
    assert model.config._attn_implementation is name


def seen(implementation, mask, *, name="mistral", keys=8, batch=2, **options):
    """The call that would be reported of an implementation that need not be installed."""
    module = next(iter(find_huggingface_attention(tiny_huggingface(name)).values()))
    heads = 4 if name == "bert" else 2
    q, k = torch.randn(batch, 4, 8, 8), torch.randn(batch, heads, keys, 8)
    given = KernelCall("attn", module, q, k, mask, implementation, options)
    options = given.options_of_call(Masks())
    return AttentionCall.from_tensors(q, k, **options)


def test_padding_and_window_of_flash_attention():
    keep = torch.ones(2, 8, dtype=torch.long)
    keep[1, :3] = 0
    call = seen("flash_attention_2", keep, sliding_window=4)
    lag = torch.arange(8)[:, None] - torch.arange(8)
    for b in range(2):
        wanted = (lag >= 0) & (lag < 4) & keep[b].bool()
        assert torch.equal(call.visibility.block(slice(None), slice(None), batch=b), wanted)
    assert torch.equal(call.query_mask, keep.bool())


def test_block_masks_of_flex_attention():
    def nearby(b, h, q, k):
        return (q >= k) & (q - k < 3)

    mask = create_block_mask(nearby, 2, None, 8, 8, device="cpu")
    call = seen("flex_attention", mask)
    assert call.visibility.dense is None
    assert call.visibility.count().flatten().tolist() == [1, 2] + [3] * 6


def test_masks_of_an_unknown_kind_are_refused():
    with pytest.raises(TypeError, match=r"tensor of shape \(2, 8\) as its mask under 'sdpa'"):
        seen("sdpa", torch.ones(2, 8))


def test_find_and_watch_are_open_to_others():
    model = tiny_huggingface("gpt2")
    found = find_huggingface_attention(model)
    paths = []
    with watch_huggingface(model, found, lambda path, *_, **__: paths.append(path)):
        model(**arguments("gpt2"))
    assert paths == list(found)
    assert find_huggingface_attention(torch.nn.Linear(2, 2)) == {}


SEQ2SEQ = {
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**HUGGINGFACE["t5"][2], "num_layers": 1, "decoder_start_token_id": 0},
    ),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_with_decoders(name, implementation):
    model = build_huggingface(*SEQ2SEQ[name])
    given = arguments(name, PADDINGS["right"])
    keep = given["attention_mask"].bool()
    given["decoder_input_ids"] = given["input_ids"].flip(0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**given, output_attentions=True)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = model(**given).logits
        with capture(model, keep="projections") as record:
            watched = model(**given).logits
    assert torch.equal(plain, watched)
    wanted = [theirs.encoder_attentions, theirs.decoder_attentions, theirs.cross_attentions]
    for call, (attention,) in zip(record.calls, wanted, strict=True):
        for b in range(2):
            rows = keep[b] if call is record.calls[0] else slice(None)
            window = record.plan(layer=call.layer, head=2, batch=b).weights
            assert float((window[rows] - attention[b, 2][rows]).abs().max()) < 5e-5
    encoder, decoder, cross = record.calls
    assert torch.equal(encoder.call.query_mask, keep)
    assert bool(decoder.call.query_mask.all())
    # Padding of the encoder says nothing about the decoder's queries.
    assert cross.call.query_mask is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_empty_places_of_a_static_cache(implementation, padding):
    model = tiny_huggingface("llama")
    model.set_attn_implementation(implementation)
    given = arguments("llama", PADDINGS[padding])
    more = given["input_ids"][:, :3]
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad(), capture(model, keep="projections") as record:
        model(**given, past_key_values=cache)
        if padding != "none":
            ones = torch.ones_like(more)
            given["attention_mask"] = torch.cat([given["attention_mask"], ones], dim=1)
        given["input_ids"] = more
        model(**given, past_key_values=cache)
    first, second = record.of(1)
    assert first.shape == (2, 4, LENGTH, 20) and second.shape == (2, 4, 3, 20)
    assert first.call.query_pos.flatten().tolist() == list(range(LENGTH))
    assert second.call.query_pos.flatten().tolist() == [12, 13, 14]
    keep = torch.tensor(PADDINGS[padding] or [1] * LENGTH).bool()
    assert torch.equal(first.call.query_mask[0], keep)
    assert bool(second.call.query_mask.all())
    assert float(first.incoming.mass[0].sum(-1)[0]) == pytest.approx(int(keep.sum()), abs=1e-4)


def test_every_eager_function_is_found_by_its_own_name():
    # Vision's function has another name than the text model's, in the same file.
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    config = transformers.Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        vision_output_dim=32,
        image_size=16,
        patch_size=8,
        projector_input_dim=32,
        projector_output_dim=32,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.Llama4VisionModel(config).eval()
    model.set_attn_implementation("eager")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        with capture(model, keep="projections") as record:
            watched = model(pixels).last_hidden_state
    assert torch.equal(plain, watched)
    assert record.calls[0].shape == (1, 4, 5, 5)


def test_a_config_copied_meanwhile_is_not_watched():
    model = tiny_huggingface("llama")
    given = arguments("llama")
    with capture(model) as record:
        copies = [copy.copy(model.config), copy.deepcopy(model.config)]
        assert type(copies[1]._attn_implementation) is str
        for config in copies:
            with torch.no_grad():
                transformers.LlamaForCausalLM(config)(**given)
    assert len(record) == 0
    assert type(pickle.loads(pickle.dumps(_Captured("sdpa")))) is str


def test_a_model_copied_or_saved_meanwhile_is_not_watched():
    model = tiny_huggingface("llama")
    given = arguments("llama")
    with torch.no_grad(), capture(model) as record:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        logits = [one(**given).logits for one in copies]
        assert len(record) == 0
        logits += [one(**given).logits for one in (model, *copies)]
    logits += [one(**given).logits for one in copies]
    assert len(record) == 2 and all(torch.equal(one, logits[0]) for one in logits)


def test_all_configs_of_a_composite_model_are_restored():
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [config._attn_implementation_internal for config in configs]
    given = {"input_ids": torch.randint(3, 50, (1, 6)), "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        plain = model(**given).logits_per_image
        with capture(model) as record:
            watched = model(**given).logits_per_image
    assert torch.equal(plain, watched)
    after = [config._attn_implementation_internal for config in configs]
    assert all(a is b for a, b in zip(before, after, strict=True))
    causal = {call.shape[2]: call.call.causal for call in record.calls}
    assert causal == {6: True, 5: False}


def test_scores_divided_by_the_layers_number():
    model = tiny_huggingface("gpt2", scale_attn_by_inverse_layer_idx=True)
    given = arguments("gpt2")
    attentions = eager_weights(model, given)
    with torch.no_grad(), capture(model, keep="projections") as record:
        model(**given)
    check_weights(record, attentions, None)


def test_a_row_of_a_mask_serves_all_queries():
    keep = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    keep[1, ..., 5:] = False
    lowest = torch.finfo(torch.float32).min
    for mask in (keep, torch.zeros(2, 1, 1, 8).masked_fill(~keep, lowest)):
        call = seen("eager", mask)
        assert call.visibility.count().flatten().tolist() == [8] * 8 + [5] * 8
        assert call.bias is None


def test_flash_attention_to_fewer_keys():
    call = seen("flash_attention_2", None, name="bert", keys=5)
    assert (call.visibility.n_queries, call.visibility.n_keys) == (8, 5)
    assert call.visibility.count().flatten().tolist() == [5] * 8


@pytest.mark.parametrize(
    "packed",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 8])},
    ],
)
def test_packed_sequences_are_refused_under_flash_attention(packed):
    with pytest.raises(ValueError, match="attn cannot be captured.*packed into one"):
        seen("flash_attention_2", None, batch=1, **packed)
    plain = {"position_ids": torch.arange(8).unsqueeze(0)}
    call = seen("flash_attention_2", None, batch=1, **plain)
    assert call.visibility.count().flatten().tolist() == list(range(1, 9))


def test_what_nobody_can_read_is_refused():
    with pytest.raises(ValueError, match="its weights depend on head_mask"):
        seen("eager", None, head_mask=torch.ones(4))
    with pytest.raises(TypeError, match="got no mask under 'mine'"):
        seen("mine", None)


def test_the_kernel_without_sink_and_softcap_is_read_without():
    options = {"softcap": 2.0, "s_aux": torch.zeros(4)}
    call = seen("eager", torch.ones(1, 1, 8, 8, dtype=torch.bool), **options)
    assert call.softcap == 2.0 and call.sink.shape == (4,)
    call = seen("sdpa", None, **options)
    assert call.softcap is None and call.sink is None


def test_eager_attention_beside_the_interface_is_refused(monkeypatch):
    model = tiny_huggingface("llama")
    model.set_attn_implementation("eager")

    def before_5_1(module):
        return tuple(name for name in names(module) if name != "get_interface")

    names = huggingface._names_used
    monkeypatch.setattr(huggingface, "_names_used", before_5_1)
    with pytest.raises(ValueError, match="without asking transformers' AttentionInterface"):
        with capture(model):
            pass


def float64(name, **changes):
    model = tiny_huggingface(name, **changes).double()
    if name == "gpt-oss":
        model.set_experts_implementation("eager")
    return model


def new_cache(model, kind):
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=24)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt-oss", "llama"])
@pytest.mark.parametrize("pieces", [[6] + [1] * 6, [3, 4, 1, 3, 1], [1, 9, 2]])
def test_positions_of_a_cache_are_those_of_the_text(name, kind, implementation, pieces):
    if implementation == "sdpa" and name in EAGER_ONLY:
        return
    model = float64(name)
    ids = arguments(name)["input_ids"]
    attentions = eager_weights(model, {"input_ids": ids})
    model.set_attn_implementation(implementation)
    options = {"keep": "projections", "keys": [0, 5, 11], "recent": 3}
    with torch.no_grad(), capture(model, **options) as record:
        cache = new_cache(model, kind)
        for piece in ids.split(pieces, dim=1):
            model(input_ids=piece, past_key_values=cache)
    lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    for layer, theirs in enumerate(attentions):
        first = 0
        for number, call in enumerate(record.of(layer)):
            last = first + call.shape[2]
            assert call.call.query_pos.flatten().tolist() == list(range(first, last))
            gone = call.call.gone
            assert call.call.key_pos.flatten().tolist() == list(range(gone, gone + call.shape[3]))
            wanted = theirs[1, 3, first:last]
            weights = record.plan(layer=layer, head=3, batch=1, call=number).weights
            shown = min(weights.shape[1], LENGTH)
            # The models round their rotations to float32.
            close = {"atol": 1e-6, "rtol": 0}
            torch.testing.assert_close(weights[:, :shown], wanted[:, :shown], **close)
            assert float(wanted[:, shown:].sum()) == 0 == float(weights[:, shown:].sum())
            keys = list(call.rows.keys)
            assert keys == [key for key in options["keys"] if key < gone + call.shape[3]]
            torch.testing.assert_close(call.rows.key_mass[1, 3], wanted[:, keys], **close)
            near = (wanted * (lag[first:last].abs() < 3)).sum(-1)
            torch.testing.assert_close(call.rows.recent_mass[1, 3], near, **close)
            first = last
    windowed = name != "llama" and len(pieces) > 3
    assert any(call.call.gone for call in record.calls) == windowed or len(pieces) == 3


def test_a_key_that_left_the_cache_weighs_nothing():
    model = float64("mistral", sliding_window=4)
    ids = arguments("mistral")["input_ids"][:1, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with capture(model, keep="projections", keys=[0, 8]) as record:
        text = model.generate(ids, **options)
    attentions = eager_weights(model, {"input_ids": text})
    calls = record.of(0)
    assert [call.call.gone for call in calls] == [0, 3, 4, 5]
    assert [call.rows.keys for call in calls] == [(0,), (0,), (0,), (0, 8)]
    last = calls[-1]
    assert repr(last).endswith("1 queries, 4 keys after 5 that have left the cache, rotary)")
    assert (
        float(last.rows.key_mass[..., 0].abs().max()) == 0 == float(attentions[0][0, :, 8, 0].max())
    )
    window = record.plan(layer=0, head=2)
    torch.testing.assert_close(window.weights[0], attentions[0][0, 2, 8, :9], atol=1e-6, rtol=0)
    assert window.allowed.tolist() == [[False] * 5 + [True] * 4]
    assert bool(window.scores[0, :5].isnan().all()) and window.logits[0, 0] == -torch.inf
    part = record.plan(layer=0, head=2, keys=slice(3, 7))
    assert torch.equal(part.weights, window.weights[:, 3:7])
    assert float(record.plan(layer=0, keys=slice(0, 2)).weights.sum()) == 0
    with pytest.raises(ValueError, match="non-empty window"):
        record.plan(keys=slice(9, 12))
    bare = capture(model, statistics=["entropy"])
    with bare as record:
        model.generate(ids, **options)
    assert record.calls[-1].rows.keys == (0,) and record.calls[-1].rows.key_mass is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama", "gpt2"])
def test_a_batch_padded_on_the_left_decodes(name, kind):
    model = float64(name)
    given = arguments(name, PADDINGS["left"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cache = new_cache(model, kind)
    with capture(model, keep="projections", keys=[0, 4]) as record:
        text = model.generate(**given, **options, past_key_values=cache)
    for b, pads in enumerate((3, 0)):
        attentions = eager_weights(model, {"input_ids": text[b : b + 1, pads:]})
        for layer, theirs in enumerate(attentions):
            for number, call in enumerate(record.of(layer)[1:], start=1):
                place = LENGTH - 1 + number
                assert call.call.query_pos.flatten().tolist() == [place]
                assert bool(call.call.query_mask.all())
                wanted = F.pad(theirs[0, 1, place - pads, : place - pads + 1], (pads, 0))
                weights = record.plan(layer=layer, head=1, batch=b, call=number).weights[0]
                close = {"atol": 1e-6, "rtol": 0}
                torch.testing.assert_close(weights[: place + 1], wanted, **close)
                torch.testing.assert_close(call.rows.key_mass[b, 1, 0], wanted[[0, 4]], **close)


def test_calls_of_several_threads_are_all_counted():
    model = tiny_huggingface("llama")
    given = arguments("llama")

    def run(_):
        with torch.no_grad():
            return [model(**given).logits for _ in range(30)]

    with torch.no_grad():
        plain = model(**given).logits
    with capture(model, keep="projections") as record:
        with ThreadPoolExecutor(4) as pool:
            logits = [one for thread in pool.map(run, range(4)) for one in thread]
    assert all(torch.equal(one, plain) for one in logits)
    assert [len(record.of(layer)) for layer in range(2)] == [120, 120]
    for layer in range(2):
        entropy = record.of(layer)[0].rows.entropy
        assert all(torch.equal(call.rows.entropy, entropy) for call in record.of(layer))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_a_backward_pass_is_no_call(reentrant):
    model = tiny_huggingface("llama").train()
    given = arguments("llama")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        with capture(model) as record:
            model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        assert [call.layer for call in record.calls] == [0, 1]
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_implementation_set_meanwhile_is_watched_too(implementation):
    model = tiny_huggingface("gemma3")
    model.set_attn_implementation("sdpa")
    before, given = registries(), arguments("gemma3", PADDINGS["left"])
    attentions = eager_weights(tiny_huggingface("gemma3"), given)
    with torch.no_grad(), capture(model, keep="projections") as record:
        model(**given)
        model.set_attn_implementation(implementation)
        model(**given)
    assert len(record) == 4 and registries() == before
    assert model.config._attn_implementation == implementation
    assert type(model.config._attn_implementation) is str
    record.calls = record.calls[2:]
    check_weights(record, attentions, given["attention_mask"].bool())
    with torch.no_grad():
        assert model(**given).attentions is None


def test_an_implementation_that_bypasses_the_interface_is_refused_meanwhile():
    model = tiny_huggingface("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("sdpa")
    before = registries()
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        with capture(model):
            model.set_attn_implementation("eager")
            model(**arguments("gpt2"))
    assert registries() == before and model.config._attn_implementation == "eager"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_calls_of_a_layer_in_one_step_stand_at_the_same_place():
    # Differential attention, whose cache may slide all the same.
    sizes = {**HUGGINGFACE["llama"][2], "attention_dropout": 0.0}
    model = build_huggingface("DiffLlamaForCausalLM", "DiffLlamaConfig", sizes)
    ids = arguments("llama")["input_ids"]
    cache = transformers.DynamicCache(config=tiny_huggingface("mistral").config)
    with torch.no_grad(), capture(model, statistics=()) as record:
        for piece in ids[:, :8].split([6, 1, 1], dim=1):
            model(piece, past_key_values=cache)
    first = [int(call.call.query_pos[0]) for call in record.of(1)]
    assert first == [0, 0, 6, 6, 7, 7]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_statistics_of_cached_steps_are_those_of_the_full_pass(name):
    """On a batch padded on the left, whose positions count from the first place, pads included."""
    model = float64(name)
    given = arguments(name, PADDINGS["left"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    watched = {"keys": [3, 4], "recent": 4, "impl": "reference"}
    with capture(model, **watched) as steps:
        text = model.generate(**given, **options)
    real = torch.ones_like(text)
    real[:, :LENGTH] = given["attention_mask"]
    with torch.no_grad(), capture(model, **watched) as whole:
        model(input_ids=text[:, :-1], attention_mask=real[:, :-1])
    for layer in range(2):
        (full,) = whole.of(layer)
        for number, step in enumerate(steps.of(layer)):
            at = step.call.query_pos.flatten().long()
            assert at.tolist() == (list(range(LENGTH)) if not number else [LENGTH - 1 + number])
            for statistic, value in step.rows.asked().items():
                wanted = full.rows.asked()[statistic][:, :, at]
                close = {"atol": 1e-5, "rtol": 1e-5, "equal_nan": True}
                torch.testing.assert_close(value, wanted, **close, msg=f"{statistic} of {number}")
