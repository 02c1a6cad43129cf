"""goat-attention under watch: its own weights, with the prior as an object."""

import math

import pytest
import torch
from goat import GoatAttention

from goatviz.adapters.capture import capture

SCATTERED = torch.rand(7, 7, generator=torch.manual_seed(1)) < 0.3
SCATTERED.fill_diagonal_(False)
PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "bool": {"attn_mask": SCATTERED},
    "float": {"attn_mask": torch.linspace(-1, 1, 49).view(7, 7)},
    "float forbids": {"attn_mask": torch.zeros(7, 7).masked_fill(SCATTERED, -math.inf)},
}


def made(**options):
    torch.manual_seed(0)
    module = GoatAttention(
        32,
        4,
        **{
            "batch_first": True,
            "pos_rank": 2,
            "abs_rank": 2,
            "training_seq_len": 64,
            "pos_encoding": "1d",
            **options,
        },
    ).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kv_num_heads": 2}, {"batch_first": False}, {"pos_encoding": "auto"}]
)
def test_weights_are_the_modules_own(options, causal, masks):
    module = made(**options)
    x = torch.randn(2, 7, 32)
    given = {"is_causal": causal, "average_attn_weights": False, **MASKS[masks]}
    inputs = (x,) * 3 if module.batch_first else (x.transpose(0, 1),) * 3
    with torch.no_grad():
        out, weights = module(*inputs, **given)
        with capture(module, keep="projections") as record:
            again, _ = module(*inputs, **given)
    assert torch.equal(out, again)
    assert "forward" not in vars(module)
    real = ~PADDING if masks == "padding" else torch.ones(2, 7, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            found = record.plan(head=h, batch=b).weights[real[b]]
            torch.testing.assert_close(found, weights[b, h][real[b]].double(), atol=2e-6, rtol=1e-4)
    assert record.calls[0].call.prior is not None


@pytest.mark.parametrize(
    ("options", "given", "what"),
    [
        ({"prior_gate": "query_norm"}, {}, "gated by the query's norm"),
        ({"add_bias_kv": True}, {}, "appended keys"),
        ({"add_zero_attn": True}, {}, "appended keys"),
        ({}, {"position_offset_q": 3}, "positional offsets"),
        ({"pos_encoding": "2d"}, {"spatial_shape": (1, 7)}, "a grid"),
    ],
)
def test_what_cannot_be_watched_is_named(options, given, what):
    module = made(**options)
    x = torch.randn(1, 7, 32)
    with pytest.raises(ValueError, match=f"cannot be captured.*{what}"):
        with capture(module):
            module(x, x, x, **given)
    assert "forward" not in vars(module)


def test_caches_and_other_keys_are_refused():
    module = made()
    x, y = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    with pytest.raises(ValueError, match="keys of another sequence"):
        with capture(module):
            module(x, y, y)
    past = (torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="a key-value cache"):
        with capture(module):
            module(x, x, x, past_key_value=past)


def weights_agree(module, *inputs, **given):
    given = {"average_attn_weights": False, **given}
    with torch.no_grad():
        out, weights = module(*inputs, **given)
        with capture(module, keep="projections") as record:
            again, _ = module(*inputs, **given)
    assert torch.equal(out, again)
    for b in range(len(weights)):
        for h in range(4):
            found = record.plan(head=h, batch=b).weights
            torch.testing.assert_close(found, weights[b, h].double(), atol=2e-6, rtol=1e-4)
    return record


def scattered(*shape):
    mask = torch.rand(*shape, generator=torch.manual_seed(2)) < 0.3
    mask[..., 0] = False
    return mask


PAIRS = {
    "each sequence": scattered(2, 7, 7),
    "one for all": scattered(1, 7, 7),
    "each key-value head": scattered(4, 7, 7),
    "each head": scattered(8, 7, 7),
    "four dimensions, one head": scattered(2, 1, 7, 7),
    "four dimensions, key-value heads": scattered(2, 2, 7, 7),
    "four dimensions, all heads": scattered(2, 4, 7, 7),
    "four dimensions, one row": scattered(2, 1, 1, 7),
    "not contiguous": scattered(8, 7, 7).transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("pairs", PAIRS)
def test_pair_masks_of_every_shape(pairs, dtype):
    mask = PAIRS[pairs]
    if dtype == torch.float32:
        values = torch.linspace(-2, 2, mask.numel()).view(mask.shape)
        mask = values.masked_fill(mask, -math.inf)
    weights_agree(made(kv_num_heads=2), *(torch.randn(2, 7, 32),) * 3, attn_mask=mask)


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": (~PADDING).long()},
        {"attention_mask": torch.linspace(-1, 1, 49).view(1, 1, 7, 7).expand(2, 1, 7, 7)},
        {"attn_mask": SCATTERED, "key_padding_mask": PADDING},
        {"attn_mask": torch.zeros(7, 7).masked_fill(SCATTERED, torch.finfo(torch.float32).min)},
        {"attn_mask": torch.full((7, 7), 90.0).triu(1)},
    ],
)
def test_masks_under_other_names_together_and_extreme(given):
    weights_agree(made(), *(torch.randn(2, 7, 32),) * 3, is_causal=False, **given)


@pytest.mark.parametrize(
    ("length", "given"),
    [(9, {}), (10, {"has_cls_token": True}), (7, {"spatial_shape": (1, 7)})],
)
def test_auto_takes_square_numbers_for_a_grid(length, given):
    # The package infers a grid of 3 x 3 from nine tokens, and weights are then no sequence's.
    module = made(pos_encoding="auto")
    x = torch.randn(1, length, 32)
    with pytest.raises(ValueError, match="called with a grid"):
        with capture(module):
            module(x, x, x, **given)
    weights_agree(module, *(torch.randn(1, 10, 32),) * 3, is_causal=True)
    weights_agree(made(), *(torch.randn(1, 9, 32),) * 3, spatial_shape=(3, 3))


def test_the_first_token_alone_may_not_ask():
    # A view of the keys begins where they begin, and yet is not all of them.
    module, x = made(), torch.randn(1, 7, 32)
    with pytest.raises(ValueError, match="keys of another sequence"):
        with capture(module):
            module(x[:, :1], x, x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_values_of_their_own(batch_first):
    module = made(batch_first=batch_first)
    x, value = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    inputs = [x, x, value]
    if not batch_first:
        # Two views of the same memory, not the same object.
        inputs = [tensor.transpose(0, 1) for tensor in inputs]
    record = weights_agree(module, *inputs)
    with torch.no_grad():
        wanted = module.v_proj(value).view(2, 7, 4, 8).transpose(1, 2)
    torch.testing.assert_close(record.calls[0].call.v, wanted)


def test_random_numbers_of_the_model_are_its_own():
    # Dropout after attention, or sampling, would draw others if watching drew some.
    module, x = made(), torch.randn(1, 7, 32)
    state = torch.random.get_rng_state()
    with capture(module) as record:
        module(x, x, x)
    assert len(record) == 1 and torch.equal(torch.random.get_rng_state(), state)


def test_dropout_in_training_is_refused_and_everything_restored():
    module = made(dropout=0.1).train()
    x = torch.randn(1, 7, 32)
    with pytest.raises(ValueError, match="attention dropout in training mode"):
        with capture(module):
            module(x, x, x)
    assert "forward" not in vars(module)
