"""The plan explorer as a plain object: traits, pictures and what it says, without a browser."""

import numpy as np
import pytest
import torch

from goatviz.adapters import capture
from goatviz.explore import PlanExplorer, explore_plan
from goatviz.models import CausalLM, ModelConfig
from goatviz.training import load_pretrained

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


@pytest.fixture
def explorer():
    return explore_plan(small_model(), ids(), tokens=[f"t{i}" for i in range(LENGTH)])


def test_what_is_shown_is_the_plan(explorer):
    record = captured(small_model(), ids())
    for layer, head, query in ((0, 0, 47), (1, 1, 20), (1, 0, 0)):
        explorer.layer, explorer.head, explorer.query = layer, head, query
        plan = record.plan(layer=layer, head=head)
        shown = curve(explorer._figure, "plan")
        wanted = np.where(plan.allowed[query], plan.weights[query], np.nan)
        np.testing.assert_allclose(shown, wanted, atol=1e-9)
        assert explorer.map.title == f"Layer {layer}, head {head}"
        assert f"Query {query} " in explorer._summary.value
        assert "POT: agrees" in explorer._summary.value and explorer._problem.value == ""


def test_draw_needs_no_kernel_and_changes_nothing(explorer):
    before = explorer.layer, explorer.head, explorer.query, explorer.temperature
    figure = explorer.draw(layer=1, head=1, query=30, temperature=0.5)
    assert (explorer.layer, explorer.head, explorer.query, explorer.temperature) == before
    assert not hasattr(figure, "_js2py_pointsCallback")
    explorer.layer, explorer.head, explorer.query, explorer.temperature = 1, 1, 30, 0.5
    for name in ("plan", "prior", "content score / temperature", "log-prior"):
        np.testing.assert_array_equal(curve(figure, name), curve(explorer._figure, name))
    assert figure.layout.title.text == explorer._figure.layout.title.text


def test_temperature_moves_a_row_from_its_largest_score_to_its_prior(explorer):
    explorer.query = 40
    cold = explorer.draw(temperature=0.001)
    scores = curve(cold, "content score / temperature")
    # Equal tokens have equal scores: the prior parts them.
    best = np.isclose(scores, np.nanmax(scores))
    assert curve(cold, "plan")[best].sum() > 0.99 and best.sum() < 8
    hot = explorer.draw(temperature=1e4)
    np.testing.assert_allclose(curve(hot, "plan"), curve(hot, "prior"), atol=1e-3)
    explorer.temperature = 0.1
    explorer._reset.click()
    assert explorer.temperature == 1.0 and explorer._temperature.value == 1.0


def test_choosing_in_the_map_chooses_the_query(explorer):
    explorer.map.selection = [17, 3]
    assert explorer.query == 17 and explorer._query.value == 17
    assert explorer._figure.layout.title.text == "Query 17: plan and prior"


def test_controls_and_traits_are_one(explorer):
    explorer._layer.value, explorer._head.value, explorer._query.value = 1, 1, 9
    assert (explorer.layer, explorer.head, explorer.query) == (1, 1, 9)
    explorer.temperature = 10.0
    assert explorer._temperature.value == 10.0


def test_errors_are_seen_and_go_away(explorer):
    explorer.query = 999
    assert "query must be in 0 .. 47, got 999" in explorer._problem.value
    assert 'role="alert"' in explorer._problem.value
    explorer.query = 5
    assert explorer._problem.value == ""


def test_tokens_are_text_wherever_they_are_shown():
    tokens = ["<img src=x onerror=alert(1)>"] + ["x"] * (LENGTH - 1)
    explorer = explore_plan(small_model(), ids(), tokens=tokens)
    explorer.query = 3
    assert "<img" not in explorer._summary.value
    ticks = list(explorer._figure.layout.xaxis2.ticktext)
    assert ticks[0].startswith("&lt;img") and "<img" not in str(explorer._figure.data[0].text)


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
    explorer = explore_plan(model, inputs, batch=2)
    alone = explore_plan(model, inputs[2:])
    shown, wanted = (curve(each.draw(query=30), "plan") for each in (explorer, alone))
    np.testing.assert_allclose(shown, wanted, atol=1e-6)


def test_layers_with_other_numbers_of_heads():
    record = captured(small_model(num_heads=4, positions="none"), ids())
    fewer = captured(small_model(num_heads=2, positions="none"), ids())
    record.calls[1] = fewer.calls[1]
    explorer = PlanExplorer(record)
    explorer.head = 3
    explorer.layer = 1
    assert explorer.head == 1 and list(explorer._head.options) == [0, 1]
    assert explorer.map.title == "Layer 1, head 1" and explorer._problem.value == ""


def test_bad_input():
    with pytest.raises(TypeError, match="inputs must be given with a model"):
        explore_plan(small_model())
    record = captured(small_model(), ids())
    with pytest.raises(TypeError, match="inputs must not be given with a Record"):
        explore_plan(record, ids())
    with pytest.raises(ValueError, match=r"batch must be in 0 .. 0, got 4"):
        explore_plan(record, batch=4)
    with capture(small_model()) as empty:
        pass
    with pytest.raises(ValueError, match="record is empty"):
        explore_plan(empty)
