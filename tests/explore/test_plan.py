"""The plan explorer as a plain object: traits, pictures and what it says, without a browser."""

import base64
import gc
import json
import weakref

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from goatviz.adapters import capture
from goatviz.adapters.intervene import capture_changed
from goatviz.analysis import explain, plan_thumbnails, structured_head
from goatviz.explore import PlanExplorer, Selection, explore_plan
from goatviz.explore.export import LIMIT_BYTES
from goatviz.models import CausalLM, ModelConfig
from goatviz.training import load_pretrained
from goatviz.transport import Hide, Temper
from goatviz.transport.changes import changed_call
from tests.factories import figure_text

LENGTH = 48


def small_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "training_length": 32, "embed_dim": 32, "num_layers": 2, **options}
    return CausalLM(ModelConfig(**sizes)).eval()


def ids(length=LENGTH, batch=1):
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(1))


def captured(model, inputs):
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(inputs)
    return record


def curve(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return np.asarray(trace.y)


def shown(explorer):
    """The figure that the page has."""
    return go.Figure(json.loads(figure_text(explorer, "row")))


def values(figure, name):
    """A curve of a figure that was read back from JSON."""
    (trace,) = [trace for trace in figure.data if trace.name == name]
    packed = trace.to_plotly_json()["y"]
    if not isinstance(packed, dict):
        return np.asarray(packed, dtype=float)
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


@pytest.fixture
def explorer():
    return explore_plan(small_model(), ids(), tokens=[f"t{i}" for i in range(LENGTH)])


def test_what_is_shown_is_the_plan(explorer):
    record = captured(small_model(), ids())
    for layer, head, query in ((0, 0, 47), (1, 1, 20), (1, 0, 0)):
        explorer.layer, explorer.head, explorer.query = layer, head, query
        plan = record.plan(layer=layer, head=head)
        found = values(shown(explorer), "plan")
        wanted = np.where(plan.allowed[query], plan.weights[query], np.nan)
        np.testing.assert_allclose(found, wanted, atol=1e-9)
        assert explorer.map.title == f"Layer {layer}, head {head}"
        assert f"Query {query} " in explorer.summary
        assert "POT (semi relaxed): agrees" in explorer.summary
        assert explorer.error == ""


def test_draw_needs_no_kernel_and_changes_nothing(explorer):
    before = explorer.layer, explorer.head, explorer.query, explorer.temperature
    figure = explorer.draw(layer=1, head=1, query=30, temperature=0.5)
    assert (explorer.layer, explorer.head, explorer.query, explorer.temperature) == before
    explorer.layer, explorer.head, explorer.query, explorer.temperature = 1, 1, 30, 0.5
    for name in ("plan", "prior", "score / τ", "log-prior"):
        np.testing.assert_array_equal(curve(figure, name), values(shown(explorer), name))
    title = shown(explorer).layout.title.text
    assert title == "Query 30: plan and prior"
    assert any(title in note.text for note in figure.layout.annotations)


def test_temperature_moves_a_row_from_its_largest_score_to_its_prior(explorer):
    explorer.query = 40
    cold = explorer.draw(temperature=0.001)
    scores = curve(cold, "score / τ")
    # Equal tokens have equal scores: the prior parts them.
    best = np.isclose(scores, np.nanmax(scores))
    assert curve(cold, "plan")[best].sum() > 0.99 and best.sum() < 8
    hot = explorer.draw(temperature=1e4)
    np.testing.assert_allclose(curve(hot, "plan"), curve(hot, "prior"), atol=1e-3)
    explorer.temperature = 0.1
    explorer._received(None, {"kind": "press", "name": "reset"}, [])
    assert explorer.temperature == 1.0 and explorer.temperature == 1.0


def test_choosing_in_the_map_chooses_the_query(explorer):
    explorer.map.selection = [17, 3]
    assert explorer.query == 17 and explorer.query == 17 and explorer.key == 3
    assert shown(explorer).layout.title.text == "Query 17: plan and prior"


def test_controls_and_traits_are_one(explorer):
    explorer.set_state({"layer": 1, "head": 1, "query": 9})
    assert (explorer.layer, explorer.head, explorer.query) == (1, 1, 9)
    assert shown(explorer).layout.title.text.startswith("Query 9")
    explorer.temperature = 10.0
    assert explorer.temperature == 10.0


def test_errors_are_seen_and_go_away(explorer):
    explorer.query = 999
    assert explorer.error == "ValueError: query must be an integer in 0 .. 47, got 999"
    explorer.query = 5
    assert explorer.error == ""


def test_tokens_are_text_wherever_they_are_shown():
    tokens = ["x"] * 19 + ["<img src=x onerror=alert(1)>"]
    explorer = explore_plan(small_model(), ids(20), tokens=tokens)
    explorer.query = 19
    assert "<img" not in explorer.summary
    ticks = list(shown(explorer).layout.xaxis2.ticktext)
    assert ticks[-1].startswith("&lt;img") and "<img" not in str(shown(explorer).data[0].text)


def test_a_record_a_checkpoint_and_a_model_show_the_same():
    checkpoint = load_pretrained("copy-mixture-1-goat")
    inputs = ids(64)
    record = captured(checkpoint.model, inputs)
    pictures = [
        curve(source.draw(query=50), "plan")
        for source in (
            explore_plan(checkpoint, inputs),
            explore_plan(checkpoint.model, inputs),
            explore_plan(record),
        )
    ]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_a_chosen_sequence_of_a_batch():
    model, inputs = small_model(), ids(batch=3)
    explorer = explore_plan(model, inputs, input=2)
    alone = explore_plan(model, inputs[2:])
    found, wanted = (curve(each.draw(query=30), "plan") for each in (explorer, alone))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_inputs_are_run_when_they_are_chosen_and_the_last_two_records_kept(monkeypatch):
    model, texts = small_model(), [ids(20, 2), ids(32), ids(12)]
    runs = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: (runs.append(tuple(x.shape)), forward(x))[1])
    tokens = [[f"{n}:{at}" for at in range(size)] for n, size in enumerate((20, 20, 32, 12))]
    explorer = explore_plan(model, texts, tokens=tokens)
    assert runs == [(2, 20)] and len(explorer.controls["input"].options) == 4
    assert explorer.query == 19
    explorer.input = 1
    assert runs == [(2, 20)] and explorer.map.title.startswith("Input 1, layer")
    explorer.set(input=2, query=30)
    assert runs == [(2, 20), (1, 32)]
    plan = captured(model, texts[1]).plan(layer=explorer.layer, head=explorer.head)
    wanted = np.where(plan.allowed[30], plan.weights[30], np.nan)
    np.testing.assert_allclose(values(shown(explorer), "plan"), wanted, atol=1e-9)
    assert {*shown(explorer).layout.xaxis.ticktext} <= {*tokens[2]}
    assert explorer.parts["passage"].tokens == tokens[2]
    thumbnails = plan_thumbnails(captured(model, texts[1]))
    first = explorer.parts["heads"].measures[1]["values"]
    np.testing.assert_allclose(first, thumbnails["first_mass"].values)
    runs.clear()
    # A shorter input has no query 30; of three records the first is forgotten.
    explorer.input = 3
    assert explorer.query == 11 and explorer.error == "" and explorer.map.size == [12, 12]
    explorer.input = 2
    assert runs == [(1, 12)]
    explorer.input = 0
    assert runs == [(1, 12), (2, 20)]
    with pytest.raises(ValueError, match="input must be an integer in 0 .. 3, got 4"):
        explorer.draw(input=4)
    with pytest.raises(ValueError, match="tokens must be texts of one sequence, or of each of 4"):
        explore_plan(model, texts, tokens=tokens[:2])
    assert "input" not in explore_plan(model, ids()).controls


def weights_of(record, layer, head, batch=0):
    plan = record.plan(layer=layer, head=head, batch=batch)
    return torch.where(plan.allowed, plan.weights, torch.nan).numpy()


def differences(explorer):
    """What the bytes of the map of the difference stand for."""
    part = explorer.parts["difference"]
    view = part.view
    codes = np.frombuffer(part.pixels, np.uint8).reshape(view["rows"], view["columns"])
    low, high = view["range"]["low"], view["range"]["high"]
    assert low == -high and view["range"]["kind"] == "signed"
    share = 2 * (codes.astype(float) - 1) / 254 - 1
    return np.where(codes == 0, np.nan, share * np.abs(share) * high), high / 127


CHANGE = [Hide([0]), Temper(2.0, heads=[1])]


def hidden_record(model, inputs):
    """What the change does to a model of one head group: layer by layer, by hand."""
    with capture_changed(model, CHANGE) as (record, _), torch.no_grad():
        model(inputs)
    return record


@pytest.mark.parametrize("kind", ["model", "record", "head", "input", "change"])
def test_plans_are_compared(kind):
    model, inputs = small_model(), ids(batch=2)
    other = small_model(positions="alibi")
    record = captured(model, inputs)
    against, suffix, wanted = {
        "model": lambda: (other, " of the other model", weights_of(captured(other, inputs), 1, 0)),
        "record": lambda: (captured(other, inputs), " of the other record", None),
        "head": lambda: ({"layer": 0, "head": 1}, "", weights_of(record, 0, 1)),
        "input": lambda: ({"input": 1}, "", weights_of(record, 1, 0, 1)),
        "change": lambda: (CHANGE, " after Hide, Temper", None),
    }[kind]()
    if kind == "record":
        wanted = weights_of(captured(other, inputs), 1, 0)
    if kind == "change":
        call = hidden_record(model, inputs).of(1)[-1].call
        plan = changed_call(call, 0, 0, CHANGE).plan()
        wanted = torch.where(plan.allowed, plan.weights, torch.nan).numpy()
    explorer = explore_plan(model, inputs, against=against)
    explorer.set(layer=1, head=0, query=30)
    assert explorer.error == ""
    one = weights_of(record, 1, 0)
    both = np.isnan(one) & np.isnan(wanted)
    difference = np.where(both, np.nan, np.nan_to_num(one) - np.nan_to_num(wanted))
    found, step = differences(explorer)
    np.testing.assert_allclose(found, difference, atol=step)
    assert np.array_equal(np.isnan(found), both)
    row = shown(explorer)
    place = {"head": "layer 0, head 1", "input": "input 1, layer 1, head 0"}
    where = place.get(kind, "layer 1, head 0") + suffix
    np.testing.assert_allclose(values(row, f"plan, {where}"), wanted[30], atol=1e-6)
    variation = np.abs(np.nan_to_num(difference)).sum(1) / 2
    at = np.unravel_index(np.nanargmax(np.abs(difference)), difference.shape)
    assert f"Against {where}, at temperature 1" in explorer.summary
    assert f"distance {variation[30]:.3g} for query 30" in explorer.summary
    assert f"{variation.mean():.3g} on average over all queries" in explorer.summary
    assert f"largest difference {difference[at]:+.3g}, query {at[0]}" in explorer.summary
    against = explorer.parts["against"]
    assert against.title == f"{where[0].upper()}{where[1:]}" and against.linked
    assert explorer.parts["difference"].title.endswith(f", minus {where}")
    assert explorer.map.palette != explorer.parts["difference"].palette


def test_compared_maps_move_together():
    explorer = explore_plan(small_model(), ids(), against={"layer": 0, "head": 1})
    explorer.parts["difference"].selection = [20, 4]
    assert explorer.query == 20
    assert all(explorer.parts[name].selection == [20, 4] for name in ("map", "against"))
    explorer.map.without = True
    explorer.parts["difference"].pool = "mean"
    assert all(explorer.parts[name].without for name in ("against", "difference"))
    assert explorer.map.pool == explorer.parts["against"].pool == "mean"
    sent = []
    explorer.parts["difference"].send = sent.append
    explorer.parts["difference"].received({"kind": "cell", "query": 20, "key": 4})
    cell = sent[0]["cell"]
    assert cell["difference"] == cell["weight"] - cell["other"] and cell["allowed"]


def test_what_cannot_be_compared(tmp_path, monkeypatch):
    model, record = small_model(), captured(small_model(), ids())
    with pytest.raises(ValueError, match="other must have 48 queries and 48 keys .* got 20 and 20"):
        explore_plan(model, [ids(), ids(20)], against={"input": 1})
    with pytest.raises(ValueError, match="against must be among layer, head, input; got 'heads'"):
        explore_plan(model, ids(), against={"heads": 1})
    with pytest.raises(ValueError, match="layer of against must be one of 0, 1; got 7"):
        explore_plan(model, ids(), against={"layer": 7})
    with pytest.raises(TypeError, match="against must be a model, a record, a place .* got int"):
        explore_plan(model, ids(), against=3)
    with pytest.raises(TypeError, match="against must not be changes beside a Record"):
        explore_plan(record, against=Hide([0]))
    with pytest.raises(TypeError, match="inputs must be given with a model"):
        explore_plan(record, against=small_model())
    monkeypatch.setattr("goatviz.explore.plan_source.MAX_PAIRS", 47 * 48)
    with pytest.raises(ValueError, match="changes must be of plans of at most 2,256 pairs"):
        explore_plan(model, ids(), against=Hide([0]))
    fewer = small_model(num_layers=1)
    explorer = explore_plan(fewer, ids(), against=model)
    explorer.save_html(tmp_path / "plan.html")
    explorer = explore_plan(model, ids(), against=fewer)
    explorer.set(layer=1)
    assert explorer.error == "ValueError: layer of against must be one of 0; got 1"


def test_layers_with_other_numbers_of_heads():
    record = captured(small_model(num_heads=4, positions="none"), ids())
    fewer = captured(small_model(num_heads=2, positions="none"), ids())
    record.calls[1] = fewer.calls[1]
    explorer = PlanExplorer(record)
    explorer.head = 3
    explorer.layer = 1
    assert explorer.head == 1 and explorer.controls["head"].options == [(0, "0"), (1, "1")]
    assert explorer.map.title == "Layer 1, head 1" and explorer.error == ""
    assert explorer.head == 1


def test_bad_input():
    with pytest.raises(TypeError, match="inputs must be given with a model"):
        explore_plan(small_model())
    record = captured(small_model(), ids())
    with pytest.raises(TypeError, match="inputs must not be given with a Record"):
        explore_plan(record, ids())
    with pytest.raises(ValueError, match=r"input must be an integer in 0 .. 0, got 4"):
        explore_plan(record, input=4)
    with capture(small_model()) as empty:
        pass
    with pytest.raises(ValueError, match="record must hold an attention call"):
        explore_plan(empty)


def test_brushed_queries_show_their_mean(explorer):
    layer, head = explorer.layer, explorer.head
    plan = captured(small_model(), ids()).plan(layer=layer, head=head)
    explorer.map.brush = [10, 20]
    assert explorer.queries == (10, 20)
    found = values(shown(explorer), "queries 10–19, mean")
    wanted = plan.weights[10:20].double().mean(0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    explorer.map.brush = []
    assert "mean" not in str([trace.name for trace in shown(explorer).data])
    with pytest.raises(ValueError, match="queries must be a non-empty range within 0 .. 48"):
        explorer.draw(queries=(30, 90))


def test_the_row_shows_the_keys_that_the_map_shows(explorer):
    def view(queries, keys):
        ask = {"part": "map", "kind": "view", "id": 1, "rows": 99, "columns": 99}
        explorer._received(explorer, ask | {"queries": queries, "keys": keys}, [])

    whole = values(shown(explorer), "plan")
    view([0, 48], [8, 20])
    assert explorer.key_range == (8, 20)
    np.testing.assert_array_equal(values(shown(explorer), "plan"), whole[8:20])
    assert list(shown(explorer).layout.xaxis.ticktext) == [f"t{i}" for i in range(8, 20)]
    explorer.query = 30
    assert len(values(shown(explorer), "plan")) == 12
    view([4, 30], [0, 48])
    assert explorer.key_range == () and len(values(shown(explorer), "plan")) == 48
    view([0, 48], [8, 20])
    drawn = []
    explorer.parts["row"].observe(drawn.append, "figure")
    explorer.layer = 1 - explorer.layer
    # Another plan is shown whole, and the row is drawn once.
    assert explorer.key_range == () and len(values(shown(explorer), "plan")) == 48
    assert len(drawn) == 1 and explorer.error == ""
    with pytest.raises(ValueError, match="key_range must be a non-empty range within 0 .. 48"):
        explorer.draw(key_range=(40, 60))


def test_why_takes_the_logits_of_the_row_apart(explorer):
    explorer.set(layer=1, head=1, query=30, temperature=0.5)
    figure = go.Figure(json.loads(figure_text(explorer, "why")))
    record = captured(small_model(), ids())
    why = explain(record, layer=1, head=1, query=30, top=8, temperature=0.5)
    assert [trace.name for trace in figure.data] == [*why["part"].values, "logit"]
    plan = explorer.draw()
    best = np.argsort(-np.nan_to_num(curve(plan, "plan")))[:8]
    assert best.tolist() == why["key"].values.tolist()
    assert list(figure.layout.yaxis.ticktext) == [f"t{key}  {key}" for key in best]
    assert figure.layout.title.text == "Why query 30 attends there"


def test_two_explorers_share_one_selection():
    selection = Selection()
    record = captured(small_model(), ids())
    one = PlanExplorer(record, selection=selection)
    one.set(layer=1, head=1, query=20)
    other = PlanExplorer(record, selection=selection)
    assert (other.layer, other.head, other.query) == (1, 1, 20)
    other.map.selection = [12, 4]
    assert (one.query, one.key) == (12, 4) and one.map.selection == [12, 4]
    assert shown(one).layout.title.text.startswith("Query 12")
    # What another explorer cannot show stays with the one that chose it.
    selection.query = 40_000
    assert (one.query, other.query) == (12, 12) and one.error == ""


def test_several_values_at_once_ask_for_one_picture(explorer, monkeypatch):
    drawn = []
    inner = explorer._picture
    monkeypatch.setattr(
        explorer, "_picture", lambda values, task: (drawn.append(values), inner(values, task))[1]
    )
    explorer.set(layer=1, head=1, query=30, temperature=0.5)
    assert [(v["layer"], v["head"], v["query"], v["temperature"]) for v in drawn] == [
        (1, 1, 30, 0.5)
    ]
    with pytest.raises(ValueError, match="values must be among input, layer, head.*got 'heads'"):
        explorer.set(heads=3)


def test_the_doubly_stochastic_plan_is_said_to_be_the_identity(explorer):
    explorer.set(balanced=True, query=20)
    found = values(shown(explorer), "doubly stochastic")
    np.testing.assert_allclose(found[:21], np.arange(21) == 20, atol=1e-9)
    assert "identity" in explorer.summary


def test_closing_forgets_the_record():
    explorer = explore_plan(small_model(), ids())
    kept = weakref.ref(explorer.map.levels), weakref.ref(explorer._source.record(0))
    explorer.close()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert explorer.comm is None
    explorer.close()


def test_it_opens_on_the_structured_head(explorer):
    record = captured(small_model(), ids())
    thumbnails = plan_thumbnails(record)
    assert (explorer.layer, explorer.head) == structured_head(thumbnails, 0.3)
    heads = explorer.parts["heads"]
    assert heads.layers == [0, 1] and heads.heads == [0, 1] and heads.cells == [32, 32]
    codes = np.frombuffer(heads.pixels, np.uint8).reshape(2, 2, 32, 32)
    weights = thumbnails["weights"].values
    assert np.array_equal(codes == 0, np.isnan(weights))
    share = 1 + np.log10(np.clip(np.nan_to_num(weights), 1e-5, 1)) / 5
    np.testing.assert_allclose(codes[codes > 0], 1 + np.rint(254 * share[codes > 0]), atol=1)
    (entropy, first) = (each["values"] for each in heads.measures)
    assert entropy == thumbnails["relative_entropy"].values.tolist()
    assert first == thumbnails["first_mass"].values.tolist()
    one = explore_plan(small_model(num_layers=1, num_heads=1), ids())
    assert "heads" not in one.parts and "passage" not in one.parts


def test_the_passage_is_a_row_or_a_column(explorer, monkeypatch):
    passage = explorer.parts["passage"]
    explorer.set(layer=1, head=0, query=30)
    plan = captured(small_model(), ids()).plan(layer=1, head=0)
    wanted = np.where(plan.allowed, plan.weights, np.nan)

    def weights():
        return np.frombuffer(passage.weights, np.float32)

    assert passage.tokens[:2] == ["t0", "t1"] and passage.at == 30
    np.testing.assert_allclose(weights(), wanted[30], atol=1e-6)
    explorer.key = 4
    explorer.set_state({"passage_direction": "receives"})
    assert passage.at == 4
    np.testing.assert_allclose(weights(), wanted[:, 4], atol=1e-6)
    sent = []
    monkeypatch.setattr(explorer, "send", lambda *message: sent.append(message))
    explorer._received(explorer, {"part": "passage", "kind": "weights", "at": 7}, [])
    ((message, (buffer,)),) = sent
    assert message == {"part": "passage", "kind": "weighed", "at": 7}
    np.testing.assert_allclose(np.frombuffer(buffer, np.float32), wanted[:, 7], atol=1e-6)
    explorer._received(explorer, {"part": "passage", "kind": "weights", "at": 99}, [])
    assert sent[-1][0] == {"part": "passage", "kind": "weighed"}
    assert explorer.error == "ValueError: at must be an integer in 0 .. 47, got 99"


def test_an_image_has_maps_and_figures_and_thumbnails_on_demand(tmp_path, monkeypatch):
    model = small_model()
    explorer = explore_plan(
        model, ids(), tokens=[f"t{n}" for n in range(LENGTH)], against=Hide([0])
    )
    written = []
    monkeypatch.setattr(
        "goatviz.plots.figure.Figure.write_image", lambda figure, path: written.append(figure)
    )
    explorer.save_image(tmp_path / "all.png")
    titles = [note.text for note in written[0].layout.annotations if "<b>" in note.text]
    where = f"layer {explorer.layer}, head {explorer.head}"
    for title, wanted in zip(
        titles,
        [where.capitalize(), f"{where.capitalize()} after Hide", "Difference: ", "Query 47"],
        strict=False,
    ):
        assert title.replace("<br>", " ").replace("</b> <b>", " ").startswith(f"<b>{wanted}")
    maps = [trace for trace in written[0].data if trace.type == "heatmap"]
    assert len(maps) == 3 and maps[2].colorscale != maps[0].colorscale

    explorer.save_image(tmp_path / "heads.png", panel="heads")
    thumbnails = plan_thumbnails(captured(model, ids()))
    (atlas,) = [trace for trace in written[1].data if trace.type == "heatmap"]
    rows, columns = thumbnails.sizes["row"], thumbnails.sizes["column"]
    layer, head = 1, thumbnails.sizes["head"] - 1
    picture = np.asarray(atlas.z)[
        head * (rows + 1) : (head + 1) * (rows + 1) - 1,
        layer * (columns + 1) : (layer + 1) * (columns + 1) - 1,
    ]
    wanted = np.clip(thumbnails["weights"].sel(layer=layer, head=head).values, 1e-5, 1)
    np.testing.assert_allclose(picture, 1 + np.log10(wanted) / 5, atol=1e-5)
    with pytest.raises(ValueError, match="panel must be one of heads, map, .* got 'passage'"):
        explorer.save_image(tmp_path / "text.png", panel="passage")


def test_a_page_without_a_choice_fits_and_keeps_what_is_shown(tmp_path):
    tokens = [f"t{i}" for i in range(700)]
    explorer = explore_plan(small_model(num_heads=4, embed_dim=64), ids(700), tokens=tokens)
    explorer.set(layer=1, head=2, query=123)
    vary = explorer._default_vary()
    assert 2 in vary["head"] and 123 in vary["query"]
    assert {0, 699} <= {*vary["query"]} and len(vary["query"]) == 25
    assert np.prod([len(options) for options in vary.values()]) <= 240
    page = explorer.save_html(tmp_path / "plan.html")
    held = page.read_text().split('id="data">')[1].split("</script>")[0]
    assert 2_000_000 < len(held) < LIMIT_BYTES
    assert json.loads(held)["values"]["query"] == 123
    # A short text has room for everything.
    short = explore_plan(small_model(), ids(12))._default_vary()
    assert short["query"] == list(range(12)) and short["head"] == [0, 1]
    assert short["temperature"] == [0.1, 0.5, 1.0, 2.0, 10.0]
