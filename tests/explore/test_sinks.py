"""The explorer of sinks without a page: its numbers are those of sink_profile."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from goatviz import explore_sinks as public
from goatviz.adapters import capture
from goatviz.analysis import PlanLevels, plan_thumbnails, sink_profile
from goatviz.explore import Selection, SinkExplorer, explore_sinks
from goatviz.explore.plan_map import PlanMap
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots.base import as_figure, as_json
from goatviz.training import load_pretrained
from tests.factories import figure_text

PANELS = ["heads", "sink rate", "importance", "signal"]


def small_model(layers=2, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "training_length": 32, "embed_dim": 32, **options}
    model = CausalLM(ModelConfig(num_layers=layers, **sizes)).eval()
    with torch.no_grad():
        # Sinks of different strength, so that a threshold parts them.
        for name, parameter in model.named_parameters():
            if name.endswith("bump"):
                parameter.copy_(torch.linspace(0, 6, parameter.numel()))
    return model


def ids(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (1, length), generator=generator) for length in lengths]


INPUTS = ids(40, 48, 32)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def profile(model):
    return sink_profile(model, INPUTS)


@pytest.fixture
def explorer(model):
    return explore_sinks(model, INPUTS)


def shown(explorer, panel):
    """What the page would draw, as plotly's JSON."""
    return json.loads(figure_text(explorer, panel))


def figures(explorer, **values):
    """Every panel's figure for these values."""
    return {n: as_figure(panel) for n, panel in explorer.picture(values).figures.items()}


def named(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def click(explorer, panel, x, y=0.0):
    """What a page sends when a point is clicked."""
    view = explorer.parts[panel]
    view.received({"kind": "click", "trace": "", "x": x, "y": y, "index": 0})


def test_it_is_public():
    assert public is explore_sinks


def test_the_numbers_are_those_of_sink_profile(explorer, profile):
    assert explorer.profile().identical(profile)
    explorer.set(layer=1, head=1, threshold=0.17)
    drawn = figures(explorer)
    assert list(drawn) == PANELS
    part = profile.sel(layer=1, head=1)
    first = profile["first_importance"].mean("input").values
    cells = named(drawn["heads"], "importance")
    np.testing.assert_allclose(cells.z, first.astype(np.float32), rtol=1e-6)
    model = named(drawn["sink rate"], "model")
    np.testing.assert_array_equal(model.y, profile["model_sink_rate"].values.astype(np.float32))
    head = named(drawn["sink rate"], "layer 1, head 1")
    np.testing.assert_array_equal(head.y, part["sink_rate"].values.astype(np.float32))
    curve = named(drawn["importance"], "importance")
    np.testing.assert_array_equal(curve.y, part["importance"].values.astype(np.float32))
    density = named(drawn["signal"], "queries")
    assert np.nansum(density.z) == part["signal_count"].sum()


def test_what_is_drawn_is_what_is_shown(explorer):
    for values in ({}, {"threshold": 0.5, "layer": 1}, {"head": 1, "key": 3, "threshold": 0.02}):
        wanted = explorer.picture(values)
        drawn = explorer.draw(**values)
        explorer.set(**values)
        for name in PANELS:
            assert figure_text(explorer, name) == as_json(wanted.figures[name])
        for name in ("importance", "model", "queries"):
            assert any(trace.name == name for trace in drawn.data)
        assert wanted.summary.split(">")[0] in explorer.summary
        assert explorer.error == ""


def test_draw_changes_nothing(explorer):
    before, title = explorer.values(), explorer.map.title
    explorer.draw(threshold=0.9, layer=1, head=1, key=4)
    assert explorer.values() == before and explorer.map.title == title


def test_a_threshold_is_exceeded_strictly():
    # One query sees one key: an importance of exactly 1, and 0.5 of two equal keys.
    model = small_model(1, positions="none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    explorer = explore_sinks(model, ids(16), min_observers=1)
    first = float(explorer.profile()["first_importance"][0, 0, 0])
    above, at = (
        explorer.picture({"threshold": threshold})
        for threshold in (np.nextafter(np.float32(first), np.float32(0)).item(), first)
    )
    assert "2 of 2 heads above" in above.figures["heads"].note
    assert "0 of 2 heads above" in at.figures["heads"].note
    assert "not above" in at.summary and "a sink in 0 of 1 input." in at.summary
    assert "a sink in 1 of 1 input." in above.summary


def test_a_click_on_a_head_chooses_it_and_shows_its_plan(explorer, model):
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(INPUTS[0])
    for layer, head in ((1, 0), (0, 1), (1, 1)):
        click(explorer, "heads", x=head, y=layer)
        assert (explorer.layer, explorer.head) == (layer, head)
        assert explorer.layer == layer
        assert explorer.map.title == f"Plan of layer {layer}, head {head}, first input"
        plan = record.plan(layer=layer, head=head).weights
        cell = explorer.map.levels.cell(30, 2)
        assert cell.weight == pytest.approx(float(plan[30, 2]), rel=1e-9)
        assert f"Layer {layer}, head {head} " in explorer.summary


@pytest.mark.parametrize("place", [(0, 7), (5, 0), (None, 0), ("<b>", 1), (float("nan"), 0)])
def test_a_click_beside_the_heads_does_nothing(explorer, place):
    before = explorer.values()
    click(explorer, "heads", x=place[0], y=place[1])
    assert explorer.values() == before and explorer.error == ""


def test_clicks_choose_a_threshold_and_a_key(explorer):
    click(explorer, "sink rate", x=0.4200001)
    assert explorer.threshold == 0.42
    click(explorer, "sink rate", x=1.0)
    assert explorer.threshold == 0.99
    click(explorer, "importance", x=7)
    assert explorer.key == 7
    explorer.map.selection = [20, 4]
    assert explorer.key == 4 and explorer.selection.query == 20


def test_a_key_chosen_in_the_plan_leaves_the_overview_alone(explorer):
    before = figures(explorer)["heads"]
    explorer.map.selection = [20, 4]
    after = explorer.picture({})
    assert as_figure(after.figures["heads"]) == before and "Key 4: importance" in after.summary
    followed = figures(explorer, follow=True)["heads"]
    wanted = explorer.profile()["importance"].sel(key=4).values.astype(np.float32)
    np.testing.assert_allclose(named(followed, "importance").z, wanted, rtol=1e-6)
    assert followed.layout.title.text == "Importance of key 4"


def test_it_opens_on_the_strongest_sink(explorer, model):
    with capture(model, keep="projections") as record, torch.no_grad():
        model(INPUTS[0])
    first = plan_thumbnails(record)["first_mass"].values
    wanted = np.unravel_index(first.argmax(), first.shape)
    assert (explorer.layer, explorer.head) == wanted
    assert explorer.parts["thumbnails"].measures[1]["values"] == first.tolist()
    finished = explore_sinks(explorer.profile())
    first = explorer.profile()["first_importance"].mean("input").values
    assert (finished.layer, finished.head) == np.unravel_index(first.argmax(), first.shape)
    assert "thumbnails" not in finished.parts


def test_any_input_has_its_plans(explorer, model):
    explorer.input = 2
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(INPUTS[2])
    layer, head = explorer.layer, explorer.head
    assert explorer.map.title == f"Plan of layer {layer}, head {head}, input 2"
    assert explorer.map.size == [32, 32]
    assert explorer.map.levels.cell(31, 3) == PlanLevels(record.of(layer)[0], head=head).cell(31, 3)
    masses = plan_thumbnails(record)["first_mass"].values.tolist()
    assert explorer.parts["thumbnails"].measures[1]["values"] == masses
    explorer.input = 3
    assert explorer.error == "ValueError: input must be an integer in 0 .. 2, got 3"
    assert "input" not in explore_sinks(model, INPUTS[0]).controls


def test_an_input_can_be_chosen_while_the_profile_is_made(model):
    async def main():
        explorer = explore_sinks(model, INPUTS)
        explorer.input = 1
        assert explorer.map.size == [48, 48] and explorer.progress >= 0
        while explorer.progress >= 0:
            await asyncio.sleep(0.005)
        return explorer

    assert asyncio.run(main()).profile().identical(sink_profile(model, INPUTS))


def test_keys_on_a_logarithmic_axis_begin_at_one():
    explorer = explore_sinks(small_model(1), ids(100))
    click(explorer, "importance", x=8)
    assert explorer.key == 7


def test_the_selection_is_followed_and_told(model):
    selection = Selection()
    explorer = explore_sinks(model, INPUTS, selection=selection)
    selection.layer = 1
    selection.head = 1
    selection.key = 5
    assert (explorer.layer, explorer.head, explorer.key) == (1, 1, 5)
    selection.head = 77
    assert explorer.head == 1 and explorer.error == ""
    click(explorer, "heads", x=0, y=0)
    assert (selection.layer, selection.head) == (0, 0)
    later = explore_sinks(model, INPUTS, selection=Selection(layer=1, head=1))
    assert (later.layer, later.head) == (1, 1) and "Layer 1, head 1" in later.summary
    assert later.map.title.startswith("Plan of layer 1, head 1")


def test_errors_are_seen_and_go_away(explorer):
    for values, text in (
        ({"threshold": 1.0}, "threshold must be in [0, 1), got 1.0"),
        ({"layer": 9}, "layer must be one of 0, 1; got 9"),
        ({"head": 9}, "head must be one of 0, 1; got 9"),
        ({"key": 48}, "key must be in 0 .. 47, got 48"),
    ):
        before = explorer.values()
        explorer.set(**values)
        assert explorer.error == f"ValueError: {text}"
        with pytest.raises(ValueError, match="must be"):
            explorer.draw()
        explorer.set(**before)
        assert explorer.error == ""


def test_controls_and_traits_are_one(explorer):
    assert (explorer.controls["threshold"].low, explorer.controls["threshold"].high) == (0.0, 0.99)
    assert explorer.controls["key"].high == 47
    explorer.set_state({"threshold": 0.11, "head": 1})
    assert (explorer.threshold, explorer.head) == (0.11, 1)
    explorer.threshold = 0.2
    assert explorer.threshold == 0.2


def test_one_head_and_one_layer():
    explorer = explore_sinks(small_model(1, num_heads=1), ids(40))
    assert "1 head above" in shown(explorer, "heads")["layout"]["title"]["subtitle"]["text"]
    assert "one input" not in explorer.error
    assert "of 1 input" in explorer.summary
    assert explorer._default_vary() == {"layer": [0], "head": [0]}


def test_layers_with_other_numbers_of_heads():
    with capture(small_model(num_heads=4, positions="none"), keep="projections") as record:
        with torch.no_grad():
            small_model(num_heads=4, positions="none")
    record.calls.clear()
    for heads in (4, 2):
        model = small_model(num_heads=heads, positions="none")
        with capture(model, keep="projections") as part, torch.no_grad():
            model(INPUTS[0])
        record.calls.append(part.calls[len(record.calls)])
    explorer = explore_sinks(record)
    explorer.set(layer=0, head=3)
    assert explorer.map.title.startswith("Plan of layer 0, head 3")
    explorer.layer = 1
    assert explorer.head == 1 and explorer.error == ""
    assert [value for value, _ in explorer.controls["head"].options] == [0, 1]
    assert explorer.map.title.startswith("Plan of layer 1, head 1")
    click(explorer, "heads", x=3, y=1)
    assert (explorer.layer, explorer.head) == (1, 1)
    click(explorer, "heads", x=3, y=0)
    assert (explorer.layer, explorer.head) == (0, 3)
    assert explorer._default_vary() == {"head": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match="head must be one of 0, 1; got 2"):
        explorer.draw(layer=1, head=2)


def test_a_finished_profile_has_no_plan_and_says_so(profile):
    explorer = explore_sinks(profile)
    assert explorer.map is None and "No plan is shown" in explorer.summary
    assert explorer.profile() is profile
    click(explorer, "heads", x=1, y=1)
    assert (explorer.layer, explorer.head) == (1, 1)
    # Names of layers and heads stay when some are selected.
    part = explore_sinks(profile.sel(layer=1).isel(head=[1]))
    assert (part.layer, part.head) == (1, 1) and part.error == ""
    click(part, "heads", x=1, y=1)
    assert (part.layer, part.head) == (1, 1)
    assert explore_sinks(profile, threshold=0.7).threshold == 0.7
    keys = explore_sinks(profile.sel(key=slice(3, 9)))
    assert keys.key == 3 and keys.error == ""


def test_heads_with_gaps_between_them_are_clicked_at_their_places():
    profile = sink_profile(small_model(3, num_heads=4, positions="none"), INPUTS)
    explorer = explore_sinks(profile.sel(layer=[0, 2], head=[0, 3]))
    click(explorer, "heads", x=1, y=1)
    assert (explorer.layer, explorer.head) == (2, 3)


def test_a_record_shows_plans_where_it_kept_projections(model):
    for keep in ("projections", "statistics"):
        with capture(model, keep=keep) as record, torch.no_grad():
            for one in INPUTS:
                model(one)
        explorer = explore_sinks(record)
        assert isinstance(explorer.map, PlanMap) == (keep == "projections")
        assert explorer.profile().identical(sink_profile(record))


def test_the_plan_is_that_of_the_first_sequence(model):
    batch = torch.cat(ids(40, 40))
    explorer = explore_sinks(model, batch)
    assert explorer.map.size == [40, 40]
    alone = explore_sinks(model, batch[:1])
    assert explorer.map.levels.cell(39, 0) == pytest.approx(alone.map.levels.cell(39, 0))
    padded = {"ids": batch}
    assert explore_sinks(model, padded).map.levels.cell(39, 0) == explorer.map.levels.cell(39, 0)


def test_every_input_passes_once():
    model, passes = small_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    explorer = explore_sinks(model, INPUTS)
    assert explorer.map is not None and explorer.profile().sizes["input"] == len(INPUTS)
    assert len(passes) == len(INPUTS)


def test_options_are_those_of_sink_profile(model):
    options = {"layers": [1], "min_observers": 4, "recent": 8, "resamples": 50, "seed": 3}
    explorer = explore_sinks(model, INPUTS, threshold=0.2, **options)
    wanted = sink_profile(model, INPUTS, threshold=0.2, **options)
    assert explorer.profile().identical(wanted)
    assert explorer.layer == 1 and explorer.threshold == 0.2
    assert explorer.map.title.startswith("Plan of layer 1")


def test_a_hugging_face_model():
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=64, n_positions=64)
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(config).eval()
    texts = {"input_ids": torch.randint(64, (2, 40)), "attention_mask": torch.ones(2, 40).long()}
    texts["attention_mask"][1, 30:] = 0
    explorer = explore_sinks(gpt, texts)
    assert explorer.profile().identical(sink_profile(gpt, texts))
    click(explorer, "heads", x=3, y=1)
    with capture(gpt, statistics=(), keep="projections") as record, torch.no_grad():
        gpt(input_ids=texts["input_ids"][:1])
    plan = record.plan(layer=1, head=3).weights
    assert explorer.map.levels.cell(25, 3).weight == pytest.approx(float(plan[25, 3]), rel=1e-6)
    assert "transformer.h.1.attn" in explorer.summary


class Letters:
    """A tokenizer whose tokens look like markup."""

    def __call__(self, text, return_tensors):
        return {"ids": torch.tensor([[ord(letter) % 32 for letter in text]])}

    def convert_ids_to_tokens(self, ids):
        return [f"<img src=x onerror=alert({i})>" for i in ids]


def test_tokens_are_text_wherever_they_are_shown(model):
    explorer = explore_sinks(model, "abcdefgh" * 4, tokenizer=Letters())
    panel = explorer.picture({}).figures["importance"]
    assert panel.x["ticktext"][0].startswith("&lt;img")
    assert "<img" not in str(named(as_figure(panel), "importance").text)
    assert "<img" not in explorer.summary
    own = ["<script>"] * 32
    explorer = explore_sinks(model, ids(32), tokens=own)
    assert explorer.map.view["query_tokens"]["texts"][0] == "<script>"
    assert explorer.picture({}).figures["importance"].x["ticktext"][0] == "&lt;script&gt;"


def test_short_inputs_are_told_of():
    explorer = explore_sinks(small_model(1), ids(9), min_observers=1)
    assert "the shortest input has 9 tokens" in explorer.summary


def test_in_a_kernel_the_profile_follows_the_widget(model, profile):
    async def main():
        explorer = explore_sinks(model, INPUTS)
        assert explorer.progress == 0.0 and explorer.summary == ""
        # The plan is there before the profile, and follows what is chosen meanwhile.
        explorer.set(layer=1, head=1)
        assert explorer.map.title.startswith("Plan of layer 1, head 1")
        shares = []
        explorer.observe(lambda change: shares.append(change["new"]), "progress")
        while explorer.progress >= 0:
            await asyncio.sleep(0.005)
        # The first forward pass belongs to the making of the explorer.
        assert shares == sorted(shares[:-1]) + [-1.0] and len(shares) == len(INPUTS)
        assert explorer.profile().identical(profile)
        assert "Layer 1, head 1" in explorer.summary
        assert explorer.controls["key"].high == 47

    asyncio.run(main())


def test_other_work_on_the_model_meanwhile_is_not_counted(model, profile):
    async def main():
        explorer = explore_sinks(model, INPUTS)
        while explorer.progress >= 0:
            await asyncio.sleep(0)
            with torch.no_grad(), capture(model):
                model(INPUTS[1])
        assert explorer.profile().identical(profile) and explorer.error == ""

    asyncio.run(main())


def test_a_model_that_changes_meanwhile_is_an_error():
    async def main():
        model = small_model(1)
        explorer = explore_sinks(model, INPUTS)
        await asyncio.sleep(0)
        with torch.no_grad():
            model.embedding.weight.mul_(2)
        while explorer.progress >= 0:
            await asyncio.sleep(0.005)
        assert "the model was changed while it was being profiled" in explorer.error
        with pytest.raises(RuntimeError, match="changed"):
            explorer.draw()

    asyncio.run(main())


def test_cancelled_it_goes_on_when_a_control_moves(model, profile):
    async def main():
        explorer = explore_sinks(model, INPUTS)
        await asyncio.sleep(0)
        explorer.cancel()
        assert explorer.progress == -1.0 and "Stopped at " in explorer.summary
        await asyncio.sleep(0.1)
        assert not explorer._steps.done
        explorer.threshold = 0.5
        while explorer.progress >= 0:
            await asyncio.sleep(0.005)
        assert explorer.profile().identical(profile) and "ε = 0.5" in explorer.summary
        other = explore_sinks(model, INPUTS)
        # Whoever asks for numbers gets them at once.
        assert other.profile().identical(profile)
        other.close()

    asyncio.run(main())


def test_errors_of_the_forward_pass_are_seen():
    async def main():
        def fail(module, given):
            if given[0].shape[1] == 41:
                raise ValueError("broken")

        model = small_model(1)
        with pytest.raises(ValueError, match=r"token ids in 0 \.\. 31"):
            explore_sinks(model, [*ids(40), torch.full((1, 40), 99)])
        model.register_forward_pre_hook(fail)
        explorer = explore_sinks(model, [*ids(40), torch.zeros(1, 41, dtype=torch.long)])
        while explorer.progress >= 0:
            await asyncio.sleep(0.005)
        assert "ValueError: broken" in explorer.error

    asyncio.run(main())


def test_a_page_moves_through_all_heads_if_they_fit(explorer, tmp_path):
    vary = explorer._default_vary()
    assert vary == {"layer": [0, 1], "head": [0, 1]}
    state = explorer.state_of({"layer": 1, "head": 1})
    assert state["map_title"] == "Plan of layer 1, head 1, first input"
    path = explorer.save_html(tmp_path / "sinks.html", vary={"head": [0, 1]})
    assert "Attention sinks" in path.read_text(encoding="utf-8")
    assert "map" not in explore_sinks(explorer.profile()).parts


def test_closed_it_lets_go(explorer):
    explorer.close()
    assert explorer.map is None and explorer.parts == {}


def test_a_checkpoint():
    checkpoint = load_pretrained("copy-mixture-1-goat")
    explorer = explore_sinks(checkpoint, ids(64))
    assert explorer.profile().attrs["source"] == "copy-mixture-1-goat"
    explorer.head = 1
    margin = float(explorer.profile()["margin"][0, 1])
    assert f"Margin δ = {margin:.3g} nats protects about " in explorer.summary


def test_bad_input(model, profile):
    with pytest.raises(TypeError, match="inputs must be given with a model"):
        explore_sinks(model)
    with pytest.raises(TypeError, match="source must be a model"):
        explore_sinks(3, INPUTS)
    with pytest.raises(TypeError, match="profile takes layers, .*, got maps"):
        explore_sinks(model, INPUTS, maps=True)
    with pytest.raises(TypeError, match="inputs, seed cannot be changed in a finished profile"):
        explore_sinks(profile, INPUTS, seed=1)
    for threshold, error in ((1.0, ValueError), (-0.1, ValueError), (True, TypeError)):
        for source, inputs in ((model, INPUTS), (profile, None)):
            with pytest.raises(error, match="threshold must be"):
                explore_sinks(source, inputs, threshold=threshold)
    with pytest.raises(ValueError, match="min_observers must be an integer of at least 1"):
        explore_sinks(model, INPUTS, min_observers=0)
    with capture(model) as empty:
        pass
    with pytest.raises(ValueError, match="record must hold an attention call"):
        explore_sinks(empty)
    with pytest.raises(TypeError, match="inputs must not be given with a Record"):
        SinkExplorer(empty, INPUTS)
    with pytest.raises(ValueError, match="no head that is present"):
        nothing = profile.copy(deep=True)
        nothing["present"][:] = False
        explore_sinks(nothing)
