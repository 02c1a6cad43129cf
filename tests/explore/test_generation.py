"""The explorer of generations as a plain object: its rows are those of the model that writes."""

import json

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.analysis import generation_steps, generation_thumbnails, structured_head
from goatviz.explore import GenerationExplorer, Selection, explore_generation
from goatviz.plots.base import as_json
from tests.factories import HOSTILE, MixedHeads, figure_text, ids, tiny_huggingface, tiny_lm

NEW = 5


class Tokenizer:
    """One token a letter; every token reads as one of `HOSTILE`."""

    def __call__(self, text, return_tensors="pt"):
        return {"ids": torch.tensor([[ord(letter) % 20 for letter in text]])}

    def convert_ids_to_tokens(self, ids):
        return [HOSTILE[each % len(HOSTILE)] for each in ids]


@pytest.fixture
def explorer():
    return explore_generation(tiny_lm(), "abcdefghijkl", tokenizer=Tokenizer(), max_new_tokens=NEW)


def trace(explorer, name, **values):
    (found,) = [each for each in explorer.draw(**values).data if each.name == name]
    return found


@pytest.mark.parametrize("name", ["goat", "llama"])
def test_what_is_drawn_is_one_pass_over_the_whole_text(name):
    model, prompt = tiny_lm() if name == "goat" else tiny_huggingface(name), ids(1, 12)
    if name == "llama":
        model.generation_config.eos_token_id = None
    explorer = explore_generation(model, prompt, max_new_tokens=NEW)
    new = torch.from_numpy(explorer._steps["next_id"].values)[None]
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(torch.cat([prompt, new], dim=1)[:, :-1])
    for layer, heads in explorer._heads.items():
        for head in heads:
            plan = record.plan(layer=layer, head=head).weights.numpy()
            rows = trace(explorer, "weights", layer=layer, head=head, query=13)
            assert rows.type == "heatmap"
            shown = np.tril(np.ones_like(plan))[11:] > 0
            np.testing.assert_allclose(np.asarray(rows.z)[shown], plan[11:][shown], atol=1e-5)
            assert np.isnan(np.asarray(rows.z)[~shown]).all()
            for query in (11, 15):
                bars = trace(explorer, "largest weights", layer=layer, head=head, query=query)
                wanted = np.sort(plan[query, : query + 1])[::-1][:10]
                np.testing.assert_allclose(bars.x, wanted, atol=1e-5)


def test_it_opens_on_the_structured_head_and_the_first_step(explorer):
    assert explorer.error == "" and explorer.query == 11
    chosen = structured_head(generation_thumbnails(explorer._steps), 0.3)
    assert (explorer.layer, explorer.head) == chosen
    assert list(explorer.parts) == ["heads", "passage", "steps", "row"]
    assert "Step 1 of 5" in explorer.summary
    view = explorer.parts["heads"]
    assert view.cells == [NEW, 16] and "Opened first" in view.rule


def test_the_page_shows_what_draw_returns(explorer):
    explorer.set(layer=1, head=1, query=14)
    for name, panel in explorer.picture({}).figures.items():
        assert json.loads(figure_text(explorer, name)) == json.loads(as_json(panel))
    before = explorer.values()
    explorer.draw(query=12)
    assert explorer.values() == before and "Step 4 of 5" in explorer.summary


def test_the_text_is_coloured_by_the_row_or_the_column(explorer):
    rows = explorer._steps["weights"].sel(layer=1, head=0).values
    explorer.set(layer=1, head=0, query=13)
    passage = explorer.parts["passage"]
    assert passage.at == 13 and len(passage.tokens) == 16
    assert passage.tokens[:2] == explorer._steps["token"].values[:2].tolist()
    np.testing.assert_array_equal(np.frombuffer(passage.weights, np.float32), rows[2])
    passage.direction = "receives"
    explorer.key = 12
    assert passage.at == 12
    wanted = np.full(16, np.nan, np.float32)
    wanted[11:] = rows[:, 12]
    np.testing.assert_array_equal(np.frombuffer(passage.weights, np.float32), wanted)


def test_a_click_chooses_query_and_key(explorer):
    view = explorer.parts["steps"]
    view.received({"kind": "click", "trace": "weights", "x": 4, "y": 14, "index": [3, 4]})
    assert (explorer.query, explorer.key) == (14, 4) and "Step 4 of 5" in explorer.summary


def test_tokens_are_text(explorer):
    assert "<b>" in explorer._steps["token"].values
    names = trace(explorer, "largest weights").customdata
    assert all("<" not in name for name in names)


def test_without_names_there_is_no_passage_and_one_head_has_no_overview():
    explorer = explore_generation(tiny_lm(), ids(1, 8), max_new_tokens=2)
    assert list(explorer.parts) == ["heads", "steps", "row"]
    assert explorer._default_vary() == {"head": [0, 1], "query": [7, 8]}
    one = explorer._steps.sel(layer=1, head=1)
    alone = explore_generation(one)
    assert list(alone.parts) == ["steps", "row"] and (alone.layer, alone.head) == (1, 1)
    assert alone.summary == explorer.picture({"layer": 1, "head": 1}).summary


def test_a_single_token_of_prompt_and_of_text():
    explorer = explore_generation(tiny_lm(), ids(1, 1), max_new_tokens=1)
    assert explorer.error == "" and explorer._queries == [0]
    assert explorer.draw().data


def test_a_selection_is_followed_and_led():
    chosen = Selection()
    steps = generation_steps(tiny_lm(), ids(1, 8), max_new_tokens=4)
    both = [GenerationExplorer(steps, selection=chosen) for _ in range(2)]
    both[0].set(layer=1, head=1, query=9)
    assert (both[1].layer, both[1].head, both[1].query) == (1, 1, 9)
    # A query before the first step belongs to other explorers.
    chosen.query = 2
    assert both[0].query == 9 and both[0].error == ""


def test_a_page_holds_every_step(explorer, tmp_path):
    assert explorer._default_vary() == {"head": [0, 1], "query": list(range(11, 16))}
    assert explorer.save_html(tmp_path / "steps.html").stat().st_size < 11e6
    explorer.close()
    assert explorer._steps is None


def test_a_page_of_many_steps_holds_some_and_the_heads_around_the_chosen_one(tmp_path):
    model = tiny_lm(num_heads=12, embed_dim=144)
    explorer = explore_generation(model, ids(1, 8), max_new_tokens=40)
    explorer.head = 11
    assert explorer._default_vary()["head"] == [8, 9, 10, 11]
    long = explore_generation(tiny_lm(), ids(1, 3000), max_new_tokens=170)
    vary = long._default_vary()
    assert vary["query"][0] == 2999 and vary["query"][-1] == 3168 and len(vary["query"]) < 170
    assert long.save_html(tmp_path / "steps.html").stat().st_size < 11e6


def test_many_keys_are_pooled_in_the_map_and_keep_their_mass():
    explorer = explore_generation(tiny_lm(), ids(1, 1000), max_new_tokens=3)
    masses = trace(explorer, "weights")
    assert np.asarray(masses.z).shape == (3, 334)
    np.testing.assert_allclose(np.nansum(masses.z, axis=1), 1, atol=1e-5)
    row = explorer._steps["weights"].sel(layer=explorer.layer, head=explorer.head, step=0)
    np.testing.assert_allclose(np.asarray(masses.z)[0, 7], row.values[21:24].sum(), atol=1e-7)
    assert masses.x[7] == 22
    view = explorer.parts["steps"]
    view.received({"kind": "click", "trace": "weights", "x": 22, "y": 1001, "index": [2, 7]})
    assert (explorer.query, explorer.key) == (1001, 22)


def test_what_is_refused(explorer):
    explorer.query = 3
    assert "query must be an integer in 11 .. 15, got 3" in explorer.error
    explorer.query = 12
    assert explorer.error == ""
    with pytest.raises(ValueError, match="head must be one of 0, 1; got 7"):
        explorer.draw(head=7)
    with pytest.raises(TypeError, match="max_new_tokens must not be given with a finished gen"):
        explore_generation(explorer._steps, max_new_tokens=3)
    with pytest.raises(TypeError, match="expected a Dataset of schema 'generation'"):
        explore_generation(generation_thumbnails(explorer._steps))
    with pytest.raises(TypeError, match="model must be a CausalLM or have generate"):
        explore_generation(MixedHeads(), ids(1, 4))
