"""Masses of the answering queries against plans formed whole, and intervals that hold them."""

import numpy as np
import pytest
import torch

from goatviz.analysis import mass_sweep
from goatviz.models import CausalLM, ModelConfig, interpolate_positions
from goatviz.results import load_result, save_result
from goatviz.tasks import CopyMixture, Needle, Passkey
from goatviz.training import evaluate_answers, load_pretrained

TASK = Needle(length=32, value_length=3)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "training_length": 32, "embed_dim": 32, **options}
    return CausalLM(ModelConfig(**sizes))


def whole_plans(model, ids):
    """Every layer's plan and prior, dense, from its own projections."""
    calls = []
    for block in model.blocks:
        block.attention.observer = lambda *args, **options: calls.append((*args, options["prior"]))
    with torch.no_grad():
        model(ids)
    for block in model.blocks:
        block.attention.observer = None
    plans = []
    for q, k, learned in calls:
        length = q.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        log_prior = torch.zeros(1, length, length, dtype=torch.float64)
        if learned is not None:
            log_prior = learned.log_prior(range(length), range(length)).detach().double()
        logits = q.detach().double() @ k.detach().double().mT / q.shape[-1] ** 0.5 + log_prior
        weights, prior = (
            values.masked_fill(~allowed, -torch.inf).softmax(-1) for values in (logits, log_prior)
        )
        plans.append((weights, prior.expand(weights.shape[1], -1, -1)))
    return plans


@pytest.mark.parametrize("positions", ["goat", "rope", "alibi"])
def test_masses_are_those_of_plans_formed_whole(positions):
    model = small_model(1, positions=positions, num_layers=2)
    sweep = mass_sweep({"it": model}, TASK, lengths=[32], examples=3, recent=5, seed=7)
    ids = TASK.sample(3, generator=torch.Generator().manual_seed(7))
    text = TASK.decode(ids)
    for layer, (weights, prior) in enumerate(whole_plans(model, ids[:, :-1])):
        wanted = {}
        for example in range(3):
            first = text[example].index("=") + 1
            for query in (29, 30, 31):
                for name, plan in (("", weights[example]), ("prior_", prior)):
                    row = plan[:, query]
                    for group, mass in (
                        ("answer", row[:, first : first + 3].sum(-1)),
                        ("first", row[:, 0]),
                        ("recent", row[:, query - 4 : query + 1].sum(-1)),
                    ):
                        wanted.setdefault(f"{name}{group}_mass", []).append(mass)
        for name, masses in wanted.items():
            found = sweep[name].values[0, 0, 0, layer]
            assert found == pytest.approx(torch.stack(masses).mean(0).numpy(), abs=1e-5), name


def test_intervals_hold_the_mean_and_close_with_examples():
    model = small_model(2)
    few, many = (
        mass_sweep({"goat": model}, TASK, lengths=[32], examples=n, seed=1) for n in (4, 64)
    )
    for sweep in (few, many):
        for group in ("answer", "first", "recent"):
            low, mean, high = (sweep[f"{group}_mass{end}"] for end in ("_low", "", "_high"))
            assert bool((low <= mean + 1e-12).all()) and bool((mean <= high + 1e-12).all())

    def width(sweep):
        return float((sweep["answer_mass_high"] - sweep["answer_mass_low"]).mean())

    assert 0 < width(many) < width(few)


def test_a_trained_model_looks_at_its_answer_and_gets_it_right():
    checkpoint = load_pretrained("passkey-goat")
    task = Passkey(length=64, value_length=4)
    sweep = mass_sweep({"goat": checkpoint.model}, task, lengths=[64, 128], examples=8)
    assert float(sweep["token"].min()) > 0.95
    assert float(sweep["answer_mass"].max()) > 0.9
    assert sweep.attrs["training_length"] == "64"


def test_right_answers_are_those_of_the_evaluation():
    model = load_pretrained("needle-rope").model
    task = Needle(length=512, value_length=4)
    sweep = mass_sweep({"rope": model}, task, lengths=[512], examples=12, seed=3)
    wanted = evaluate_answers(model, task, examples=12, batch_size=12, seed=3)
    assert sweep["token"].item() == wanted.token
    assert 0 < wanted.token < 1


def test_squeezed_positions_are_squeezed_here_too():
    model = load_pretrained("passkey-rope").model
    task = Passkey(length=64, value_length=4)
    sweep = mass_sweep(
        {"rope": model, "squeezed": interpolate_positions(model)}, task, lengths=[64, 256]
    )
    at_training = sweep.sel(length=64)
    assert np.array_equal(at_training["answer_mass"][0], at_training["answer_mass"][1])
    beyond = sweep.sel(length=256)
    assert float(abs(beyond["answer_mass"][0] - beyond["answer_mass"][1]).max()) > 0.1


def test_runs_that_are_not_there_and_lengths_that_a_model_lacks_are_nan():
    models = {"goat": [small_model(0), small_model(1)], "learned": small_model(positions="learned")}
    sweep = mass_sweep(models, TASK, lengths=[32, 64], examples=2)
    learned = sweep.sel(scheme="learned")
    assert np.isfinite(learned["answer_mass"].sel(run=0, length=32)).all()
    assert np.isnan(learned["answer_mass"].sel(length=64)).all()
    assert np.isnan(learned["answer_mass"].sel(run=1)).all()
    assert learned["tokens"].values.tolist() == [[6, 0], [0, 0]]
    assert np.isnan(learned["token"].sel(length=64)).all()


def test_a_saved_sweep_comes_back(tmp_path):
    sweep = mass_sweep({"goat": small_model()}, TASK, lengths=[32], examples=2)
    save_result(sweep, tmp_path / "mass.nc")
    assert load_result(tmp_path / "mass.nc").identical(sweep)


@pytest.mark.parametrize(
    ("models", "task", "options", "error", "says"),
    [
        ({"goat": 0}, CopyMixture(), {}, TypeError, "task must be a Passkey or Needle, got Copy"),
        ({}, TASK, {}, ValueError, "models must be a mapping of scheme names"),
        ({"a": {}}, TASK, {"lengths": [8]}, ValueError, "length must be at least"),
        ({"a": {}}, TASK, {"examples": 1}, ValueError, "examples must be an integer of at least 2"),
        ({"a": {}}, TASK, {"recent": 0}, ValueError, "recent must be an integer of at least 1"),
        (
            {"a": {}, "b": {"num_layers": 2}},
            TASK,
            {},
            ValueError,
            r"models must all have the same \(layers, heads\), got .*\(1, 2\), \(2, 2\)",
        ),
    ],
)
def test_bad_input(models, task, options, error, says):
    built = {
        name: small_model(**({"num_heads": 2} | kind)) if isinstance(kind, dict) else kind
        for name, kind in models.items()
    }
    with pytest.raises(error, match=says):
        mass_sweep(built, task, **{"lengths": [32], **options})
