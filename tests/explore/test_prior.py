"""The prior explorer as a plain object: traits, pictures and what it says, without a browser."""

import asyncio
import itertools
import json

import numpy as np
import pytest
import torch
import traitlets
from goat import GoatAttention
from torch import nn

from goatviz.analysis import fit_priors, implied_prior, prior_profile
from goatviz.analysis.prior_curves import COMPONENTS
from goatviz.attention import Attention
from goatviz.explore import PriorExplorer, Selection, explore_prior
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.plots.base import as_json
from goatviz.priors import ALiBiPrior, BucketPrior, KeyTablePrior, SpectralPrior, UniformPrior
from goatviz.priors.base import ScaledPrior, SumPrior
from goatviz.training import load_pretrained
from tests.factories import figure_text, ids, tiny_huggingface


def lively(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def small_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "training_length": 24, "embed_dim": 32, "num_layers": 2, **options}
    return lively(CausalLM(ModelConfig(**sizes)).eval())


@pytest.fixture
def explorer():
    found = explore_prior(small_model())
    found.set(layer=0, head=0)
    return found


def curve(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return np.asarray(trace.z if trace.type == "heatmap" else trace.y)


def shown(explorer, panel):
    """The figure that the page has."""
    return json.loads(figure_text(explorer, panel))


def really_scaled(prior, scales):
    parts = prior.components().values()
    return SumPrior(
        [ScaledPrior(part, scales.get(COMPONENTS.get(part.kind), 1.0)) for part in parts]
    )


# --- what is shown is the prior ---

SOURCES = {
    "goat": lambda: lively(goat_prior(2, rank=3, sink_rank=2, training_length=24)),
    "alibi": lambda: ALiBiPrior(2),
    "bucket": lambda: lively(BucketPrior(2)),
    "uniform": lambda: UniformPrior(2),
    "table": lambda: KeyTablePrior(torch.randn(2, 40)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_picture_is_the_profile_of_the_prior_that_is_really_scaled(name):
    prior = SOURCES[name]()
    explorer = explore_prior(prior, length=40)
    parts = [name for name in ("sink", "relative", "recency") if name in explorer.shown]
    for switches in itertools.product([True, False], repeat=len(parts)):
        values = dict(zip(parts, switches, strict=True))
        values |= {f"{part}_scale": 1.75 for part in parts}
        mix = explorer.result(head=1, **values)
        scales = {part: 1.75 * values[part] for part in parts}
        wanted = prior_profile(really_scaled(prior, scales), length=40).sel(layer=0, head=1)
        for field in ("sink", "kernel", "margin", "top_mass", "prior_entropy"):
            np.testing.assert_allclose(mix[field], wanted[field], atol=1e-9, err_msg=field)
        figure = explorer.draw(head=1, **values)
        np.testing.assert_allclose(
            curve(figure, "plan"), wanted["probability"], rtol=1e-6, atol=1e-9
        )


def test_models_layers_checkpoints_and_the_papers_modules():
    layer = Attention(32, 2, prior=lively(goat_prior(2, rank=2, sink_rank=1, training_length=20)))
    theirs = lively(GoatAttention.for_gpt(48, 4, kv_num_heads=2))
    checkpoint = load_pretrained("copy-mixture-1-goat")
    for source, model in ((layer, layer), (theirs, theirs), (checkpoint, checkpoint.model)):
        mix = explore_prior(source, length=30).result(head=1)
        wanted = prior_profile(model, length=30).sel(layer=0, head=1)
        for field in ("margin", "top_mass", "prior_entropy", "kernel"):
            np.testing.assert_allclose(mix[field], wanted[field], atol=1e-9)


def test_a_module_that_normalises_by_the_length_is_read_at_each():
    module = lively(GoatAttention(48, 2, pos_rank=2, abs_rank=2, training_seq_len=None))
    explorer = explore_prior(module, length=30)
    for length in (30, 60):
        explorer.length = length
        wanted = prior_profile(module, length=length).sel(layer=0, head=0)
        np.testing.assert_allclose(explorer.result()["sink"], wanted["sink"], atol=1e-9)
        assert "⚠ no training_seq_len" in explorer.summary


def test_the_widget_shows_what_draw_returns(explorer):
    explorer.set(layer=1, head=1, sink=False, relative_scale=2.0, content_range=3.0)
    picture = explorer.picture({})
    assert list(picture.figures) == list(explorer.panels)
    for name, figure in picture.figures.items():
        assert shown(explorer, name) == json.loads(as_json(figure))
    assert "sink off, relative × 2" in explorer.summary
    assert explorer.error == ""
    assert {trace.name for trace in explorer.draw().data} >= {"plan", "margin", "u(j)", "π"}


def test_draw_needs_no_kernel_and_changes_nothing(explorer):
    before, page = explorer.values(), shown(explorer, "plan")
    figure = explorer.draw(layer=1, head=1, length=50, sink=False, relative_scale=0.5)
    assert explorer.values() == before and shown(explorer, "plan") == page
    explorer.set(layer=1, head=1, length=50, sink=False, relative_scale=0.5)
    for name in ("plan", "margin", "u(j)", "κ(lag)", "π"):
        np.testing.assert_array_equal(curve(figure, name), curve(explorer.draw(), name))


def test_panels_that_did_not_change_are_not_drawn_again(explorer):
    first = explorer.picture({}).figures
    moved = explorer.picture({"content_range": 4.0}).figures
    same = [name for name in first if first[name] is moved[name]]
    assert same == ["sink", "kernel", "plan", "spectrum"]
    scaled = explorer.picture({"sink_scale": 0.5}).figures
    assert [name for name in first if first[name] is scaled[name]] == ["kernel", "spectrum"]


# --- laws ---


def test_all_switched_off_is_uniform_and_scale_zero_is_off(explorer):
    off = explorer.result(sink=False, relative=False, recency=False)
    np.testing.assert_allclose(off["top_mass"], 1 / off["seen"], rtol=1e-14)
    np.testing.assert_allclose(off["prior_entropy"], np.log(off["seen"]), atol=1e-12)
    zero = explorer.result(sink_scale=0.0, relative_scale=0.0, recency_scale=0.0)
    assert zero.identical(off)


def test_reset_is_the_learned_prior(explorer):
    learned = explorer.result()
    explorer.set(
        head=1, sink=False, relative_scale=3.0, recency=False, temperature=10.0, content_range=5.0
    )
    assert "as learned" not in explorer.summary
    explorer._received(None, {"kind": "press", "name": "reset"}, [])
    assert explorer.values() | {"head": 0, "content_range": 1.0} == {
        **dict.fromkeys(("layer", "head"), 0),
        "length": 24,
        **dict.fromkeys(("sink", "relative", "recency"), True),
        **dict.fromkeys(("sink_scale", "relative_scale", "recency_scale"), 1.0),
        "content_range": 1.0,
        "temperature": 1.0,
    }
    # What is not part of the prior stays.
    assert explorer.head == 1 and explorer.content_range == 5.0
    assert "as learned" in explorer.summary
    assert explorer.result(head=0, content_range=1.0).identical(learned)


def test_content_matters_through_its_range_over_the_temperature(explorer):
    a = explorer.result(content_range=4.0, temperature=2.0)
    b = explorer.result(content_range=2.0, temperature=1.0)
    for field in a.variables:
        np.testing.assert_array_equal(a[field], b[field])


# --- controls ---


def test_only_what_the_prior_has_can_be_switched():
    explorer = explore_prior(ALiBiPrior(2), length=20)
    assert explorer.shown[3:5] == ("recency", "recency_scale")
    assert list(explorer.panels) == ["kernel", "plan", "last query", "margin"]
    with pytest.raises(ValueError, match="values must be among.*got 'sink'"):
        explorer.draw(sink=False)
    with pytest.raises(traitlets.TraitError, match="sink cannot be set: this prior has no such"):
        explorer.sink = False
    assert list(explore_prior(UniformPrior()).panels) == ["plan", "last query", "margin"]
    assert "spectrum" not in explore_prior(BucketPrior(1)).panels
    assert "kernel" not in explore_prior(KeyTablePrior(torch.zeros(1, 3))).panels


def test_controls_and_traits_are_one(explorer):
    explorer.set_state({"sink_scale": 2.5, "recency": False, "length": 12})
    assert (explorer.sink_scale, explorer.recency, explorer.length) == (2.5, False, 12)
    explorer.temperature = 10.0
    assert explorer.temperature == 10.0
    names = [name for name in explorer.controls if name != "reset"]
    assert names[:3] == ["layer", "head", "length"] and set(names) == set(explorer.shown)
    for control in explorer.controls.values():
        assert control.kind in ("select", "button") or control.hint, control.name


def test_layers_with_other_heads_and_other_components():
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [
            Attention(32, 4, prior=ALiBiPrior(4)),
            Attention(32, 2, prior=lively(SpectralPrior(2, rank=2)), causal=False),
        ]
    )
    explorer = explore_prior(layers, length=20)
    explorer.layer = 0
    assert explorer.controls["relative"].disabled and not explorer.controls["recency"].disabled
    explorer.head = 3
    explorer.layer = 1
    assert explorer.head == 1 and len(explorer.controls["head"].options) == 2
    assert explorer.head == 1 and explorer.error == ""
    assert not explorer.controls["relative"].disabled and explorer.controls["recency"].disabled
    wanted = prior_profile(layers, length=20).sel(layer=1, head=1)
    np.testing.assert_allclose(explorer.result()["margin"], wanted["margin"], atol=1e-9)
    assert explorer.result()["lag"][0] == -19
    explorer.recency_scale = 0.0
    np.testing.assert_allclose(explorer.result()["margin"], wanted["margin"], atol=1e-9)


def test_errors_are_seen_and_go_away(explorer):
    for name, value, message in (
        ("head", 7, "head must be one of 0, 1; got 7"),
        ("layer", 5, "layer must be one of 0, 1; got 5"),
        ("length", 0, "length must be an integer in 1 .. 1000000, got 0"),
        (
            "sink_scale",
            4.0,
            "sink_scale must be a finite number of at least",
        ),
        (
            "content_range",
            -1.0,
            "content_range must be a finite number of at least",
        ),
        (
            "temperature",
            0.0,
            "temperature must be a finite number of at least",
        ),
    ):
        good = getattr(explorer, name)
        setattr(explorer, name, value)
        assert message in explorer.error
        with pytest.raises(ValueError, match=message.split(",")[0]):
            explorer.draw()
        setattr(explorer, name, good)
        assert explorer.error == ""


def test_a_prior_that_is_not_finite_is_said_and_others_still_show():
    model = small_model()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("gain"))[1] = torch.nan
    explorer = explore_prior(model)
    explorer.set(layer=0, head=1)
    assert "head 1: its sink is not finite" in explorer.error
    explorer.head = 0
    assert explorer.error == ""


def test_a_selection_is_followed_and_led():
    chosen = Selection()
    chosen.head = 1
    both = [explore_prior(small_model(), selection=chosen) for _ in range(2)]
    assert [each.head for each in both] == [1, 1]
    both[0].layer = 1
    assert chosen.layer == 1 and both[1].layer == 1
    assert both[1].layer == 1
    chosen.head = 9  # of another model: not one of this one's
    assert both[0].head == 1


# --- length ---


def test_a_million_tokens(explorer):
    explorer.length = 1_000_000
    assert explorer._is_long(explorer.values()) and not explorer._is_long({"length": 1024})
    assert "1,000,000 tokens" in explorer.summary and explorer.error == ""
    assert sum(len(figure_text(explorer, panel)) for panel in explorer.panels) < 2_000_000
    # What was evaluated for it is held once, and not for every length that was looked at.
    assert explorer._held() <= 4_000_000


def test_long_lengths_leave_the_loop_free_and_can_be_cancelled(explorer):
    async def steps():
        seen = []
        explorer.observe(lambda change: seen.append(change["new"]), "progress")
        explorer.length = 400_000
        assert explorer.progress == 0.0  # begun, not done
        while explorer.progress >= 0:
            await asyncio.sleep(0.01)
        assert "400,000 tokens" in explorer.summary
        assert sorted(seen[:-1]) == seen[:-1] and len(seen) > 5
        explorer.set(length=500_000)
        explorer.cancel()
        await asyncio.sleep(0.05)
        assert "400,000 tokens" in explorer.summary and explorer.error == ""
        explorer.set(length=450_000)
        explorer.set(length=32)
        assert "32 tokens" in explorer.summary
        await asyncio.sleep(0.3)
        assert " 32 tokens" in explorer.summary

    asyncio.run(steps())


# --- all heads ---


def test_it_opens_on_the_head_that_departs_most_from_uniform_and_shows_all():
    explorer = explore_prior(small_model())
    profile = prior_profile(explorer._source, length=24)
    entropy = profile["prior_entropy"].isel(query=slice(1, None))
    shares = (entropy / np.log(np.arange(2, 25))).mean("query").values
    least = np.unravel_index(shares.argmin(), shares.shape)
    assert (explorer.layer, explorer.head) == least
    view = explorer.parts["heads"]
    assert view.layers == [0, 1] and view.heads == [0, 1] and view.cells == [24, 24]
    assert view.title == "Priors of all heads at 24 tokens" and "Opened first" in view.rule
    said = {each["name"]: each["values"] for each in view.measures}
    np.testing.assert_allclose(said["entropy relative to uniform attention"], shares, rtol=1e-9)
    margins = profile["margin"].isel(query=-1).values
    np.testing.assert_allclose(said["margin of the last query in nats"], margins, rtol=1e-9)


def test_one_head_alone_has_no_overview_and_long_texts_a_shorter_one():
    assert "heads" not in explore_prior(ALiBiPrior(1), length=8).parts
    view = explore_prior(ALiBiPrior(2), length=1_000_000).parts["heads"]
    assert view.title == "Priors of all heads at 262,144 tokens" and view.cells == [32, 32]


# --- implied priors ---


def test_an_implied_prior_is_the_fit_that_is_really_scaled():
    model, inputs = tiny_huggingface("llama"), [ids(1, 24, seed=seed) for seed in range(3)]
    explorer = explore_prior(model, inputs)
    assert explorer.label == "Implied prior" and explorer.length == 24 and explorer.error == ""
    assert explorer.shown[3:7] == ("sink", "relative", "sink_scale", "relative_scale")
    fitted = fit_priors(model, inputs)
    for layer, head in itertools.product(fitted, range(4)):
        for scales in ({}, {"sink": 0.0}, {"sink": 1.5, "relative": 0.25}):
            values = {f"{name}_scale": scale for name, scale in scales.items()}
            mix = explorer.result(layer=layer, head=head, **values)
            scaled = really_scaled(fitted[layer], scales)
            wanted = prior_profile(scaled, length=24).sel(layer=0, head=head)
            for field in ("sink", "kernel", "margin", "top_mass", "prior_entropy"):
                np.testing.assert_allclose(mix[field], wanted[field], atol=1e-9, err_msg=field)
            assert mix.attrs["origin"] == "fitted"


def test_an_implied_prior_says_how_well_it_fits_and_goes_no_further(tmp_path):
    profile = implied_prior(tiny_huggingface("llama"), [ids(1, 20), ids(1, 24, seed=1)])
    with pytest.raises(ValueError, match="length must be an integer in 1 .. 24, got 30"):
        explore_prior(profile, length=30)
    explorer = explore_prior(profile)
    explorer.length = 25
    assert "length must be an integer in 1 .. 24, got 25" in explorer.error
    explorer.set(length=12, layer=0, head=1)
    share = float(profile["explained_variance"].sel(layer=0, head=1))
    assert f"explains {share:.1%} of the logits' variance within rows" in explorer.summary
    assert "known to 24 tokens; nothing is extrapolated" in explorer.summary
    assert "as fitted" in explorer.summary and explorer.controls["length"].high == 24
    names = {trace.name for trace in explorer.draw().data}
    assert {"fitted", "rotary periods", "amplitude"} <= names and "learned" not in names
    assert explorer.save_html(tmp_path / "implied.html").stat().st_size < 11e6
    explorer.close()
    assert explorer._profile is None


def test_layers_that_saw_less_have_shorter_priors():
    # Every other layer sees 8 tokens.
    model = tiny_huggingface("gemma2")
    window = model.config.sliding_window
    explorer = explore_prior(model, ids(2, window + 8))
    known = {layer: explorer._longest[layer] for layer in explorer._heads}
    assert sorted(set(known.values())) == [window, window + 8]
    (narrow, *_), (wide, *_) = (
        [n for n in known if known[n] == k] for k in sorted({*known.values()})
    )
    explorer.set(layer=wide, length=window + 8)
    assert explorer.error == ""
    explorer.layer = narrow
    assert explorer.length == window and explorer.error == ""
    with pytest.raises(ValueError, match=f"length must be an integer in 1 .. {window}"):
        explorer.draw(length=window + 1)


def test_chosen_layers_and_heads_of_an_implied_prior_keep_their_numbers():
    model, inputs = tiny_huggingface("llama"), ids(2, 16)
    part = implied_prior(model, inputs, layers=[1], heads=[1, 3])
    explorer, whole = explore_prior(part), explore_prior(implied_prior(model, inputs))
    assert explorer.layer == 1 and explorer.head in (1, 3) and explorer._heads == {1: [1, 3]}
    np.testing.assert_allclose(
        explorer.result(head=3)["margin"], whole.result(layer=1, head=3)["margin"], atol=1e-9
    )
    explorer.head = 2
    assert "head must be one of 1, 3; got 2" in explorer.error
    one = explore_prior(part.sel(layer=1, head=3))
    assert one.result().identical(explorer.result(head=3))


def test_implied_priors_that_cannot_be_recombined():
    profile = implied_prior(tiny_huggingface("llama"), ids(1, 24), points=8)
    with pytest.raises(ValueError, match="every key by itself, got means.*points=24"):
        explore_prior(profile)
    with pytest.raises(TypeError, match="causal must not be given with an implied prior"):
        explore_prior(implied_prior(tiny_huggingface("llama"), ids(1, 8)), causal=True)


# --- pages, the end, and refusals ---


def test_a_page_varies_what_fits(tmp_path):
    explorer = explore_prior(load_pretrained("copy-mixture-4-goat"))
    assert explorer._default_vary() == {
        "head": [0, 1],
        "sink": [True, False],
        "relative_scale": [0.0, 1.0, 2.0],
    }
    assert explorer.save_html(tmp_path / "prior.html").stat().st_size < 11e6
    assert "sink" not in explore_prior(ALiBiPrior(40))._default_vary()
    assert explore_prior(UniformPrior())._default_vary() == {"head": [0]}


def test_closed_explorers_hold_nothing(explorer):
    explorer.close()
    assert not explorer._mixers and not explorer._drawn and explorer._source is None


def test_bad_sources():
    with pytest.raises(TypeError, match="has no explicit prior"):
        explore_prior(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="profile of a learned prior cannot be recombined"):
        explore_prior(prior_profile(ALiBiPrior(1), length=8))
    with pytest.raises(TypeError, match="inputs must not be given with an explicit prior"):
        explore_prior(ALiBiPrior(1), ids(1, 8))
    with pytest.raises(ValueError, match="on a grid of 2 axes"):
        explore_prior(SpectralPrior(2, rank=4, axes=2))
    for length, error in (
        (0, ValueError),
        (2_000_000, ValueError),
        (True, TypeError),
        (3.0, TypeError),
    ):
        with pytest.raises(error, match="length must be"):
            PriorExplorer(ALiBiPrior(1), length=length)
    assert explore_prior(ALiBiPrior(1), causal=False, length=8).result()["lag"].size == 15


def test_an_implied_prior_opens_on_a_head_that_is_no_sink():
    profile = implied_prior(tiny_huggingface("llama"), [ids(1, 20), ids(1, 24, seed=1)])
    explorer = explore_prior(profile)
    first, entropy = (np.array(each["values"]) for each in explorer.parts["heads"].measures[1::-1])
    left = np.where(first < 0.3, entropy, np.inf)
    left = entropy if np.isinf(left).all() else left
    assert (explorer.layer, explorer.head) == np.unravel_index(left.argmin(), left.shape)
    assert "less than 0.3 of their mass on the first key" in explorer.parts["heads"].rule
