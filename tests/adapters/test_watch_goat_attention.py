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
    assert record.calls[0].prior is not None


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
