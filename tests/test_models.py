"""Models under every position scheme: cached = full, causality, padding, grids, and the config."""

import dataclasses
import math

import pytest
import torch

from goatviz.attention import InterpolatedRotaryEmbedding
from goatviz.models import (
    IMAGE_SCHEMES,
    POSITION_SCHEMES,
    CausalLM,
    ImageClassifier,
    ModelConfig,
    build_model,
    goat_prior,
    interpolate_positions,
)
from goatviz.priors import BucketPrior, Prior, UniformPrior, grid_positions

TRAINING, LENGTH, VOCAB = 8, 13, 11


def model(positions="goat", *, target=LENGTH, **changes):
    settings = {
        "vocab_size": VOCAB,
        "training_length": TRAINING,
        "embed_dim": 48,
        "num_layers": 2,
        "num_heads": 4,
        "prior_rank": 2,
        "sink_rank": 2,
    }
    lm = CausalLM(ModelConfig(positions=positions, **(settings | changes))).eval()
    with torch.no_grad():
        for module in lm.modules():
            # A fresh prior is nearly flat: laws are only tested where it matters.
            if isinstance(module, Prior):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_()
            if isinstance(module, InterpolatedRotaryEmbedding):
                module.target_length = target
    return lm


def tokens(batch=2, length=LENGTH):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def longest(positions):
    return TRAINING if positions == "learned" else LENGTH


VARIANTS = {
    "plain": {},
    "grouped heads": {"num_kv_heads": 2},
    "no skip": {"skip": False},
    "no MLP": {"mlp_ratio": 0.0},
}


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 3, 5]], ids=str)
def test_cached_is_full_also_beyond_the_training_length(positions, variant, chunks):
    lm = model(positions, **VARIANTS[variant])
    length = longest(positions)
    if positions == "learned":
        chunks = chunks[: 3 if len(chunks) == 4 else length]
    ids = tokens(length=length)
    cache = lm.new_cache()
    with torch.no_grad():
        parts = [lm(part, cache=cache) for part in ids.split(chunks, dim=1)]
        full = lm(ids)
    assert [layer.length for layer in cache] == [length] * 2
    assert full.shape == (2, length, VOCAB)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_the_future_changes_nothing(positions):
    lm, ids = model(positions), tokens(length=longest(positions))
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(lm(ids)[:, :5], lm(other)[:, :5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_padding_on_the_right_changes_nothing(positions):
    lm = model(positions)
    length = longest(positions)
    ids = tokens(length=length)
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, 5:] = False
    other = ids.clone()
    other[1, 5:] = 0
    with torch.no_grad():
        padded = lm(ids, padding_mask=keep)
        torch.testing.assert_close(padded[:1], lm(ids[:1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(padded[1:, :5], lm(ids[1:, :5]), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            padded[1, :5], lm(other, padding_mask=keep)[1, :5], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("positions", [p for p in POSITION_SCHEMES if p != "none"])
def test_every_scheme_but_none_tells_order(positions):
    # One layer: a deeper causal model can tell order by counting keys, without any positions.
    ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    with torch.no_grad():
        told = model(positions, num_layers=1)(ids)
        blind = model("none", num_layers=1)(ids)
    assert (told[0, -1] - told[1, -1]).abs().max() > 1e-4
    torch.testing.assert_close(blind[0, -1], blind[1, -1], rtol=0, atol=1e-5)


def test_without_skip_a_token_passes_through_the_plan_alone():
    # With all the prior's mass on key 0, the last token's own embedding cannot matter.
    lm = model("goat", num_layers=1, skip=False)
    sink = lm.blocks[0].attention.prior.components()["sink"]
    with torch.no_grad():
        sink.bump.fill_(1e4)
        ids = tokens()
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % VOCAB
        torch.testing.assert_close(lm(ids)[:, -1], lm(other)[:, -1], rtol=0, atol=1e-5)
        lm.blocks[0].skip = True
        assert (lm(ids)[:, -1] - lm(other)[:, -1]).abs().max() > 1e-3


def test_what_a_scheme_puts_where():
    kinds = {p: model(p).blocks[0].attention for p in POSITION_SCHEMES}
    assert list(kinds["goat"].prior.components()) == ["relative", "sink", "recency"]
    assert kinds["goat"].content_dim == 12 - 5
    assert isinstance(kinds["bucket"].prior, BucketPrior)
    for scheme in ("none", "rope", "rope-interpolated", "sinusoidal", "learned"):
        assert isinstance(kinds[scheme].prior, UniformPrior)
        assert kinds[scheme].content_dim == 12
    for scheme, layer in kinds.items():
        assert (layer.rotary is not None) == scheme.startswith("rope")


def test_layers_have_their_own_priors():
    lm = model("goat")
    first, second = (block.attention.prior for block in lm.blocks)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_learned_positions_end():
    with pytest.raises(ValueError, match=f"position {LENGTH - 1} was never learned"):
        model("learned")(tokens())


def test_interpolation_needs_its_target():
    with pytest.raises(ValueError, match="set target_length"):
        model("rope-interpolated", target=TRAINING)(tokens())


def test_goat_prior_starts():
    seeded = goat_prior(2, rank=2, sink_rank=2, training_length=8)
    uniform = goat_prior(2, rank=2, sink_rank=2, training_length=8, init="uniform")
    two_sided = goat_prior(2, rank=2, sink_rank=2, training_length=8, causal=False)
    assert list(two_sided.components()) == ["relative", "sink"]
    lag = torch.arange(6).unsqueeze(-1) - torch.arange(6)
    torch.testing.assert_close(
        uniform.log_prior(6, 6), (-1e-3 * lag).expand(2, -1, -1), rtol=1e-4, atol=1e-8
    )
    slopes = torch.tensor([2.0**-4, 2.0**-8]).view(2, 1, 1)
    torch.testing.assert_close(
        seeded.components()["recency"].log_prior(6, 6), -slopes * lag, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"training_length": 0}, "training_length must be"),
        ({"num_heads": -1}, "num_heads must be"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 64 and 5"),
        ({"positions": "nope"}, "positions must be one of goat, none, rope"),
        ({"prior_init": "zero"}, "prior_init must be one of seeded, uniform; got 'zero'"),
    ],
)
def test_config_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**({"vocab_size": 4, "training_length": 8} | changes))


def test_construction_errors():
    with pytest.raises(TypeError, match="config must be a ModelConfig, got dict"):
        CausalLM({})
    with pytest.raises(ValueError, match="leave no content"):
        model(prior_rank=8)
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 4 and 3"):
        model(num_kv_heads=3)


def test_call_errors():
    lm = model()
    for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"ids must have shape \(batch, length\)"):
            lm(ids)
    for ids in (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="ids must be integers"):
            lm(ids)
    for bad in (-1, VOCAB):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 11\), got values from"):
            lm(torch.tensor([[0, bad]]))
    with pytest.raises(ValueError, match="cache must have 2 entries, got 1"):
        lm(tokens(), cache=lm.new_cache()[:1])


def test_a_fresh_model_knows_nothing():
    for positions in POSITION_SCHEMES:
        config = ModelConfig(vocab_size=VOCAB, training_length=TRAINING, positions=positions)
        lm, ids = CausalLM(config), tokens(8, TRAINING)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(lm(ids).flatten(0, 1), ids.flatten())
        assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.15)


def test_interpolated_positions_are_the_same_model_up_to_the_training_length():
    sizes = {"vocab_size": 11, "training_length": 24, "embed_dim": 32, "num_layers": 2}
    torch.manual_seed(0)
    rope = CausalLM(ModelConfig(positions="rope", **sizes)).eval()
    squeezed = interpolate_positions(rope)
    ids = torch.randint(11, (2, 24))
    assert squeezed.config == dataclasses.replace(rope.config, positions="rope-interpolated")
    assert torch.equal(squeezed(ids), rope(ids))
    squeezed.head.weight.data.zero_()
    assert rope.head.weight.abs().max() > 0
    with pytest.raises(ValueError, match="model must have positions 'rope', got 'goat'"):
        interpolate_positions(CausalLM(ModelConfig(**sizes)))


def classifier(positions="goat", **changes):
    settings = {"vocab_size": 256, "training_length": 1 + 4 * 4, "embed_dim": 48, "num_layers": 2}
    settings |= {"num_heads": 4, "prior_rank": 4, "sink_rank": 2, "patch": 2}
    made = build_model(ModelConfig(positions=positions, **(settings | changes))).eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, Prior):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_()
        if made.position_embedding is not None:
            made.position_embedding.table.normal_()
    return made


def pictures(side=8, channels=1):
    shape = (3, side, side, channels)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("positions", IMAGE_SCHEMES)
def test_images_of_any_resolution_give_one_row_of_logits(positions):
    model = classifier(positions)
    assert isinstance(model, ImageClassifier)
    with torch.no_grad():
        for side in (2, 8, 14):
            assert model(pictures(side).flatten(1)).shape == (3, 1, 256)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_is_a_square_of_pixels(channels):
    model = classifier("none", channels=channels, num_layers=1)
    seen = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    image = pictures(channels=channels)
    with torch.no_grad():
        model(image.flatten(1))
    assert seen[0].shape == (3, 16, 4 * channels)
    wanted = image[:, 2:4, 6:8].flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(seen[0][:, 1 * 4 + 3], wanted)


@pytest.mark.parametrize("positions", IMAGE_SCHEMES)
def test_only_positions_tell_where_patches_are(positions):
    model, image = classifier(positions), pictures()
    swapped = torch.cat([image[:, 4:], image[:, :4]], dim=1)
    with torch.no_grad():
        apart = (model(image.flatten(1)) - model(swapped.flatten(1))).abs().max()
    assert apart < 1e-5 if positions == "none" else apart > 1e-4


def test_the_prior_of_images_is_on_their_grid_and_sees_all_patches():
    model = classifier()
    calls = []
    layer = model.blocks[0].attention
    layer.observer = lambda q, k, **call: calls.append(call)
    with torch.no_grad():
        model(pictures(12).flatten(1))
    (call,) = calls
    assert not call["causal"]
    assert set(layer.prior.components()) == {"relative", "sink"}
    assert torch.equal(
        call["key_pos"].nan_to_num(-1), grid_positions(6, 6, class_token=True).nan_to_num(-1)
    )
    # The same shift of query and key changes nothing in the relative term.
    term = layer.prior.components()["relative"]
    relative = term.log_prior(call["key_pos"], call["key_pos"]).detach()
    grid = relative[:, 1:, 1:].reshape(-1, 6, 6, 6, 6)
    torch.testing.assert_close(
        grid[:, :-1, :-2, :-1, :-2], grid[:, 1:, 2:, 1:, 2:], rtol=0, atol=1e-5
    )
    assert float(relative[:, 0].abs().max()) == 0


def test_learned_places_are_interpolated_to_other_resolutions():
    model = classifier("learned", embed_dim=8, num_heads=2)
    table = model.position_embedding.table.detach()
    torch.testing.assert_close(model.position_embedding(4), table.flatten(0, 1))
    with torch.no_grad():
        model.position_embedding.table[:] = torch.arange(4.0)[:, None, None]
        finer = model.position_embedding(8).reshape(8, 8, 8)
    # Rows stay apart, columns equal, and the order of the rows is kept.
    assert float((finer - finer[:, :1, :1]).abs().max()) < 1e-5
    assert bool((finer[1:, 0, 0] > finer[:-1, 0, 0]).all())


def test_recomputed_activations_of_images_change_nothing():
    model, image = classifier(), pictures().flatten(1)
    gradients = []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rope"}, "positions of images must be one of goat, none, learned"),
        ({"training_length": 64}, "length must be 1 \\+ n x n tokens, .* got 64"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
    ],
)
def test_configs_of_images_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        classifier(**changes)


def test_a_model_of_images_is_no_language_model_and_the_reverse():
    config = classifier().config
    with pytest.raises(ValueError, match="patch must be None for a language model, got 2"):
        CausalLM(config)
    with pytest.raises(ValueError, match="patch must be the side of a patch in pixels, got None"):
        ImageClassifier(dataclasses.replace(config, patch=None))
    for count in (1, 60, 81):
        with pytest.raises(ValueError, match=f"ids must hold side x side x 1 .* got {count}"):
            classifier()(torch.zeros(1, count, dtype=torch.long))
    with pytest.raises(ValueError, match="ids must lie in"):
        classifier()(torch.full((1, 64), 256))
