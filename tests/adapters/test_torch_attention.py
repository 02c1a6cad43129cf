"""torch.nn.MultiheadAttention under watch: its own weights, the same bits, nothing left behind."""

import math
import warnings

import pytest
import torch
from torch import nn

from goatviz.adapters.capture import capture

CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
SCATTERED = torch.tensor([[False, True, False, False, True, False]]).expand(6, 6)
OPTIONS = {
    "plain": {},
    "not batch first": {"batch_first": False},
    "no bias": {"bias": False},
    "appended bias": {"add_bias_kv": True},
    "appended zero": {"add_zero_attn": True},
    "both appended": {"add_zero_attn": True, "add_bias_kv": True},
    "sizes of their own": {"kdim": 5, "vdim": 7},
}
MASKS = {
    "none": {},
    "causal": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.linspace(-2, 2, 36).view(6, 6).masked_fill(CAUSAL, -math.inf)},
    "scattered": {"attn_mask": SCATTERED},
    "each head": {"attn_mask": torch.rand(8, 6, 6, generator=torch.manual_seed(0)) < 0.4},
    "padding": {"key_padding_mask": PADDING},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
}


def made(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()


def plans(record, layer=0):
    batch, heads = record.calls[0].shape[:2]
    return torch.stack(
        [
            torch.stack([record.plan(layer=layer, head=h, batch=b).weights for h in range(heads)])
            for b in range(batch)
        ]
    )


def check(module, *inputs, **masks):
    with torch.no_grad():
        out, weights = module(*inputs, need_weights=True, average_attn_weights=False, **masks)
        with capture(module, keep="projections") as record:
            again, _ = module(*inputs, need_weights=True, average_attn_weights=False, **masks)
    assert torch.equal(out, again) or bool(out.isnan().any())
    weights = weights if weights.ndim == 4 else weights.unsqueeze(0)
    found = plans(record)
    if module.add_zero_attn:
        # Its column is no key's.
        weights = weights[..., :-1].masked_fill(found.isnan(), math.nan)
    torch.testing.assert_close(found, weights.double(), atol=2e-6, rtol=1e-5, equal_nan=True)
    assert "forward" not in vars(module)
    return record


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_the_modules_own(options, masks):
    module = made(**OPTIONS[options])
    x = torch.randn(2, 6, 16)
    key = torch.randn(2, 6, 5) if "kdim" in OPTIONS[options] else x
    value = torch.randn(2, 6, 7) if "kdim" in OPTIONS[options] else x
    inputs = (x, key, value)
    if not module.batch_first:
        inputs = (x.transpose(0, 1),) * 3
    check(module, *inputs, **MASKS[masks])


def test_cross_attention_and_single_sequences():
    module = made()
    check(module, torch.randn(2, 3, 16), *(torch.randn(2, 6, 16),) * 2)
    check(module, *(torch.randn(6, 16),) * 3, key_padding_mask=PADDING[1])
    record = check(module, *(torch.randn(2, 6, 16),) * 3)
    assert record.calls[0].call.query_mask is None


def test_padding_tells_real_queries():
    module = made()
    x = torch.randn(2, 6, 16)
    record = check(module, x, x, x, key_padding_mask=PADDING)
    assert torch.equal(record.calls[0].call.query_mask, ~PADDING)
    assert record.calls[0].incoming.observers[1].amax(0).tolist() == [4, 4, 4, 4, 0, 0]


@pytest.fixture
def no_prototype_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        yield


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
def test_encoders_keep_their_fast_path_and_bits(fast, norm_first, masks, no_prototype_warning):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model.train(not fast)
    given = {
        "none": {},
        "padding": {"src_key_padding_mask": PADDING},
        "causal": {"mask": CAUSAL, "is_causal": False},
    }[masks]
    x = torch.randn(2, 6, 16)
    with torch.set_grad_enabled(not fast):
        plain = model(x, **given)
        with capture(model, keep="projections") as record:
            watched = model(x, **given)
    assert torch.equal(plain, watched)
    assert [call.layer for call in record.calls] == [0, 1]
    assert all("forward" not in vars(module) for module in model.modules())
    first = model.layers[0]
    with torch.no_grad():
        y = first.norm1(x) if norm_first else x
        _, weights = first.self_attn(
            y,
            y,
            y,
            attn_mask=given.get("mask"),
            key_padding_mask=given.get("src_key_padding_mask"),
            average_attn_weights=False,
        )
    found = plans(record)
    real = torch.ones(2, 6, dtype=torch.bool) if masks != "padding" else ~PADDING
    for b in range(2):
        torch.testing.assert_close(
            found[b][:, real[b]], weights[b][:, real[b]].double(), atol=2e-6, rtol=1e-5
        )


def test_decoder_layers():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = model(x, memory, tgt_mask=CAUSAL)
        with capture(model) as record:
            watched = model(x, memory, tgt_mask=CAUSAL)
    assert torch.equal(plain, watched)
    assert [call.shape for call in record.calls] == [(2, 4, 6, 6), (2, 4, 6, 5)]


def test_dropout_in_training_is_refused_and_everything_restored():
    module = nn.MultiheadAttention(16, 4, dropout=0.2)
    x = torch.randn(3, 1, 16)
    with pytest.raises(ValueError, match=r"training mode with attention dropout p=0.2"):
        with capture(module):
            module(x, x, x)
    assert "forward" not in vars(module)
    with capture(module.eval()) as record:
        module(x, x, x)
    assert len(record) == 1


def test_watching_twice_at_once_is_refused():
    module = made()
    with capture(module):
        with pytest.raises(ValueError, match="has a forward of its own already"):
            with capture(module):
                pass
    assert "forward" not in vars(module)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "masks",
    [
        {"key_padding_mask": torch.zeros(2, 6).masked_fill(PADDING, -math.inf)},
        {"key_padding_mask": torch.linspace(-1, 1, 12).view(2, 6).masked_fill(PADDING, -math.inf)},
        {"attn_mask": torch.rand(8, 6, 6, generator=torch.manual_seed(2))},
        {
            "key_padding_mask": torch.linspace(-1, 1, 12).view(2, 6),
            "attn_mask": torch.zeros(6, 6).masked_fill(CAUSAL, -math.inf),
        },
        # Not contiguous: one mask, expanded.
        {"attn_mask": CAUSAL.t().contiguous().t().expand(8, 6, 6)},
    ],
)
@pytest.mark.parametrize("options", ["plain", "appended bias"])
def test_floating_masks_and_those_of_each_head(options, masks):
    module = made(**OPTIONS[options])
    check(module, *(torch.randn(2, 6, 16),) * 3, **masks)


def test_the_lowest_number_forbids_too():
    module = made()
    x = torch.randn(2, 6, 16)
    record = check(
        module,
        *(x,) * 3,
        key_padding_mask=torch.zeros(2, 6).masked_fill(PADDING, LOWEST),
        attn_mask=torch.zeros(6, 6).masked_fill(CAUSAL, LOWEST),
    )
    call = record.calls[0]
    assert not call.call.biased and torch.equal(call.call.query_mask, ~PADDING)
    assert call.rows.visible[1, 0].tolist() == [1, 2, 3, 4, 4, 4]


def test_the_first_token_alone_may_ask():
    # A view of the keys begins where they begin, and yet is not all of them.
    module = made()
    x = torch.randn(2, 6, 16)
    record = check(module, x[:, :1], x, x, key_padding_mask=PADDING)
    assert record.calls[0].shape == (2, 4, 1, 6)
    assert record.calls[0].call.query_mask is None


def test_nested_tensors(no_prototype_warning):
    module = made()
    x = torch.randn(2, 6, 16)
    nested = torch.nested.nested_tensor([x[0], x[1, :4]])
    with torch.no_grad():
        plain, _ = module(nested, nested, nested, need_weights=False)
        with capture(module, keep="projections") as record:
            watched, _ = module(nested, nested, nested, need_weights=False)
        _, weights = module(x, x, x, key_padding_mask=PADDING, average_attn_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.unbind(), watched.unbind(), strict=True))
    assert torch.equal(record.calls[0].call.query_mask, ~PADDING)
    found = plans(record)
    torch.testing.assert_close(found[0], weights[0].double(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found[1, :, :4], weights[1, :, :4].double(), atol=2e-6, rtol=1e-5)


class Scaled(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, query, key, value, *, gain=1.0, **kwargs):
        out, weights = super().forward(query, key, value, **kwargs)
        return gain * out, weights


class Wrapped(nn.TransformerEncoderLayer):
    def forward(self, src, *, gain=1.0, **kwargs):
        return gain * super().forward(src, **kwargs)


def test_subclasses_keep_their_own_arguments():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    for model, inputs in (
        (Scaled(16, 4, batch_first=True), (x, x, x)),
        (Wrapped(16, 4, 32, dropout=0.0, batch_first=True).train(), (x,)),
    ):
        plain = model(*inputs, gain=2.0)
        with capture(model) as record:
            watched = model(*inputs, gain=2.0)
        assert len(record) == 1
        plain, watched = (y[0] if isinstance(y, tuple) else y for y in (plain, watched))
        assert torch.equal(plain, watched)


@pytest.mark.parametrize("broken", ["norm1", "self_attn"])
def test_everything_is_restored_after_an_exception(broken):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).train()
    model.self_attn.dropout = 0.0
    with torch.no_grad():
        getattr(model, broken).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with capture(model):
            model(torch.randn(1, 6, 16))
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(RuntimeError, match="outside"):
        with capture(model):
            raise RuntimeError("outside")
    assert all("forward" not in vars(module) for module in model.modules())
