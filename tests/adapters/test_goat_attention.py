"""The paper's own package in our words: equal outputs, equal priors, and what it cannot say."""

import math
import subprocess
import sys

import pytest
import torch
from goat import GoatAttention
from torch import nn

from goatviz.adapters import (
    convert,
    find_goat_attention,
    is_goat_attention,
    read_goat_attention,
)
from goatviz.analysis import prior_profile
from goatviz.priors import grid_positions

DIM, LENGTH = 48, 12


def unsettle(module):
    """Away from the initial values, where the prior is nearly flat and a mistake would not show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "proj" not in name and "gate" not in name:
                parameter.normal_()
            elif name.endswith("bias"):
                parameter.normal_()
    return module.eval()


def goat(**changes):
    settings = {
        "pos_rank": 3,
        "abs_rank": 2,
        "batch_first": True,
        "training_seq_len": 20,
    } | changes
    return unsettle(GoatAttention(DIM, 4, **settings))


def vit(class_token=True, **changes):
    return unsettle(
        GoatAttention.for_vit(
            DIM, 4, pos_rank=3, abs_rank=3, has_cls_token_default=class_token, **changes
        )
    )


def scaled(module, factor):
    module.set_goat_prior_scale(factor)
    return module


def tokens(length=LENGTH):
    return torch.randn(2, length, DIM)


MODULES = {
    "plain": goat,
    "batch second": lambda: goat(batch_first=False),
    "grouped heads": lambda: goat(kv_num_heads=2),
    "one key-value head": lambda: goat(kv_num_heads=1),
    "fused qkv": lambda: goat(fuse_qkv=True),
    "fused qkv, grouped": lambda: goat(fuse_qkv=True, kv_num_heads=2),
    "rank 0": lambda: goat(pos_rank=0),
    "rank 0, no key bias": lambda: goat(pos_rank=0, enable_key_bias=False),
    "rank 1": lambda: goat(pos_rank=1, abs_rank=1),
    "abs_rank 0": lambda: goat(abs_rank=0),
    "no key bias": lambda: goat(enable_key_bias=False),
    "prior scale": lambda: scaled(goat(), 0.3),
    "prior scale 0": lambda: scaled(goat(kv_num_heads=2), 0.0),
    "no bias": lambda: goat(bias=False, fuse_qkv=True),
    "no bias, apart": lambda: goat(bias=False),
    "other bases": lambda: goat(pos_base=100.0, abs_base=50.0),
    "no training length": lambda: goat(training_seq_len=None),
    "for_gpt": lambda: unsettle(GoatAttention.for_gpt(DIM, 4, kv_num_heads=2)),
    "for_bert": lambda: unsettle(GoatAttention.for_bert(DIM, 4, pos_rank=3)),
    "uniform start": lambda: GoatAttention(
        DIM, 4, batch_first=True, pos_rank=3, training_seq_len=9, prior_init="uniform"
    ).eval(),
    "auto": lambda: goat(pos_encoding="auto"),
}


def forward(module, x, **settings):
    """The module's own output, batch first whatever the module prefers."""
    own = x if module.batch_first else x.transpose(0, 1)
    out, weights = module(own, own, own, need_weights=True, average_attn_weights=False, **settings)
    return (out if module.batch_first else out.transpose(0, 1)), weights


def how(module):
    settings = {"length": LENGTH} if module.training_seq_len is None else {}
    return settings | ({"axes": 0} if module.pos_encoding == "auto" else {})


def effective_log_prior(module, length, **settings):
    """Per query head, up to row constants: the weights of a call whose content is zero."""
    with torch.no_grad():
        _, weights = forward(module, torch.zeros(1, length, module.embed_dim), **settings)
    return weights[0].double().log()


def without_content(module):
    """Biases of queries and keys would give zero inputs a content of their own."""
    with torch.no_grad():
        for linear in (module.q_proj, module.k_proj, module.in_proj):
            if linear is not None and linear.bias is not None:
                linear.bias.zero_()
    return module


def assert_same_up_to_row_constants(ours, theirs, tolerance=2e-4):
    seen = theirs.isfinite()
    difference = torch.where(seen, ours - theirs, 0.0)
    mean = difference.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    assert torch.where(seen, difference - mean, 0.0).abs().max() <= tolerance


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("causal", [True, False])
def test_converted_equals_the_modules_own_forward(name, causal):
    module, x = MODULES[name](), tokens()
    ours = convert(module, causal=causal, **how(module))
    with torch.no_grad():
        wanted, _ = forward(module, x, is_causal=causal)
        torch.testing.assert_close(ours(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("training_length", [None, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_converted_equals_the_modules_own_forward_on_a_grid(class_token, training_length, causal):
    module = vit(class_token, training_seq_len=training_length)
    tokens_on_grid = 12 + class_token
    x = tokens(tokens_on_grid)
    ours = convert(module, causal=causal, length=tokens_on_grid)
    with torch.no_grad():
        wanted, _ = forward(module, x, spatial_shape=(3, 4), is_causal=causal)
        got = ours(x, positions=grid_positions(3, 4, class_token=class_token))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "rank 0, no key bias"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_prior_is_what_the_module_attends_with(name, causal):
    module = without_content(MODULES[name]())
    record = read_goat_attention(module, causal=causal, **how(module))
    theirs = effective_log_prior(module, LENGTH, is_causal=causal)
    ours = record.prior.log_prior(LENGTH, LENGTH).detach().double()
    assert len(ours) == module.kv_num_heads
    ours = ours.repeat_interleave(module.num_heads // module.kv_num_heads, dim=0)
    assert_same_up_to_row_constants(ours, theirs)


def test_no_parameters_no_prior():
    record = read_goat_attention(MODULES["rank 0, no key bias"]())
    assert list(record.prior.components()) == ["uniform"]
    assert record.prior.log_prior(3, 3).abs().max() == 0


def test_the_prior_on_a_grid_is_what_the_module_attends_with():
    module = without_content(vit())
    record = read_goat_attention(module, length=13)
    assert not record.causal
    points = grid_positions(3, 4, class_token=True)
    ours = record.prior.log_prior(points, points).detach().double()
    theirs = effective_log_prior(module, 13, spatial_shape=(3, 4))
    assert_same_up_to_row_constants(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "grouped heads", "prior scale", "rank 0"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_packages_head_mean_is_the_mean_of_our_heads(name, causal):
    module = MODULES[name]()
    theirs = module.compute_log_prior(LENGTH, torch.device("cpu"), is_causal=causal).double()
    record = read_goat_attention(module, causal=causal)
    ours = record.prior.log_prior(LENGTH, LENGTH).detach().double().mean(0)
    assert_same_up_to_row_constants(ours, theirs)
    assert ("recency" in record.prior.components()) == causal


def test_gradients_of_a_converted_layer_train_it():
    layer = convert(goat())
    layer(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_parts_keep_their_names_and_scales():
    record = read_goat_attention(scaled(goat(), 0.5), path="blocks.3.attn")
    assert list(record.prior.components()) == ["relative", "sink", "recency"]
    assert record.path == "blocks.3.attn"
    assert record.causal and not record.query_dependent and not record.length_dependent
    assert record.notes == []
    whole = read_goat_attention(scaled(goat(), 1.0)).prior
    # The package scales its key terms and leaves the relative term alone.
    module = goat()
    full = read_goat_attention(scaled(module, 1.0)).prior.components()
    half = read_goat_attention(scaled(module, 0.5)).prior.components()
    for part, factor in (("relative", 1.0), ("sink", 0.5), ("recency", 0.5)):
        torch.testing.assert_close(half[part].log_prior(6, 6), factor * full[part].log_prior(6, 6))
    assert list(whole.components()) == ["relative", "sink", "recency"]


def test_the_module_is_left_as_it_was():
    module = goat(kv_num_heads=2)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    record, layer = read_goat_attention(module), convert(module)
    with torch.no_grad():
        for parameter in [*record.prior.parameters(), *layer.parameters()]:
            parameter.add_(1.0)
        for buffer in [*record.prior.buffers(), *layer.buffers()]:
            buffer.add_(1.0)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    module.train()
    assert convert(module).training and module.training


def test_a_gated_prior_is_reported_and_not_converted():
    module = goat(prior_gate="query_norm")
    record = read_goat_attention(module)
    assert record.query_dependent
    assert any("gated by the query's norm" in note for note in record.notes)
    with pytest.raises(ValueError, match="gated by the query's norm"):
        convert(module)


def test_a_module_without_training_length_says_so():
    module = goat(training_seq_len=None)
    with pytest.raises(ValueError, match="length is needed.*no training_seq_len"):
        read_goat_attention(module)
    record = read_goat_attention(module, length=LENGTH)
    assert record.length_dependent
    assert any("no training_seq_len" in note for note in record.notes)
    # It is a different prior at every length, and each is the module's own.
    for length in (2, 5, 40):
        prior = read_goat_attention(module, length=length).prior
        theirs = module.compute_log_prior(length, torch.device("cpu"), is_causal=True).double()
        ours = prior.log_prior(length, length).detach().double().mean(0)
        assert_same_up_to_row_constants(ours, theirs)
    assert not read_goat_attention(goat(enable_key_bias=False, training_seq_len=None)).notes


def test_which_kind_of_position():
    auto = goat(pos_encoding="auto")
    for axes in (None, 1, 3):
        with pytest.raises(ValueError, match="axes must be 0 .* or 2 .* 'auto'|axes must be 0"):
            read_goat_attention(auto, axes=axes)
    assert read_goat_attention(auto, axes=2).prior.axes == 2
    assert not read_goat_attention(auto, axes=2).causal
    assert read_goat_attention(auto, axes=0).causal
    with pytest.raises(ValueError, match="axes must be 0 for pos_encoding='1d', got 2"):
        read_goat_attention(goat(), axes=2)
    with pytest.raises(ValueError, match="axes must be 2 for pos_encoding='2d', got 0"):
        read_goat_attention(vit(), axes=0, length=13)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_bias_kv": True}, "appended keys"),
        ({"add_zero_attn": True}, "appended keys"),
        ({"kdim": 20}, "another size"),
        ({"vdim": 20}, "another size"),
    ],
)
def test_what_our_layer_does_not_have(changes, words):
    with pytest.raises(ValueError, match=f"module cannot be converted.*{words}"):
        convert(goat(**changes))


def test_dropout_is_converted_only_where_it_is_off():
    module = goat(dropout=0.1)
    convert(module)
    with pytest.raises(ValueError, match="dropout in training mode"):
        convert(module.train())


@pytest.mark.parametrize("other", [nn.MultiheadAttention(8, 2), nn.Linear(2, 2), None, "goat"])
def test_other_modules_are_not_taken_for_it(other):
    assert not is_goat_attention(other)
    for verb in (read_goat_attention, convert):
        with pytest.raises(TypeError, match="goat-attention's GoatAttention, got"):
            verb(other)


def test_a_namesake_is_not_taken_for_it():
    namesake = type("GoatAttention", (nn.Module,), {"__module__": "goatherd.attention"})
    assert not is_goat_attention(namesake())
    assert is_goat_attention(goat())
    assert is_goat_attention(type("Mine", (GoatAttention,), {})(DIM, 2, pos_rank=2))


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = goat()
        self.rest = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(goat(kv_num_heads=2))])


def test_modules_are_found_in_order():
    tree = Tree()
    assert list(find_goat_attention(tree)) == ["first", "rest.1.0"]
    assert list(find_goat_attention(tree.first)) == [""]
    assert find_goat_attention(nn.Linear(2, 2)) == {}
    profile = prior_profile(tree)
    assert profile["layer_name"].values.tolist() == ["first", "rest.1.0"]
    assert profile["present"].sum("head").values.tolist() == [4, 2]


def test_the_package_is_never_imported_by_ours():
    code = (
        "import sys, torch\n"
        "import goatviz.adapters, goatviz.analysis\n"
        "goatviz.adapters.find_goat_attention(torch.nn.Linear(1, 1))\n"
        "assert 'goat' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_converting_what_was_initialised_uniform_keeps_its_vanishing_slope():
    # softplus(-30) is 1e-13: it must not come back as 0, or as ALiBi's default.
    module = MODULES["uniform start"]()
    slope = read_goat_attention(module).prior.components()["recency"].slope()
    assert slope.tolist() == pytest.approx([math.log1p(math.exp(-30.0))] * 4, rel=1e-4)
