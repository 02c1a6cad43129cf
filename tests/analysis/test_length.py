"""Sweeps count what the evaluation counts, with Wilson's intervals, and go on where they were."""

import json

import numpy as np
import pytest
import torch

from goatviz.analysis import join_sweeps, length, length_sweep, needle_grid, wilson_interval
from goatviz.models import CausalLM, ModelConfig
from goatviz.results import load_result, load_shipped_result, save_result
from goatviz.tasks import CopyMixture, Needle, Passkey
from goatviz.training import evaluate_answers

TASK = Needle(value_length=2)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "training_length": 32, "embed_dim": 32, **options}
    return CausalLM(ModelConfig(**sizes))


def test_a_sweep_holds_what_the_evaluation_says():
    models = {"goat": [small_model(0), small_model(1)], "rope": small_model(2, positions="rope")}
    sweep = length_sweep(models, TASK, lengths=[24, 40], examples={24: 70, 40: 5}, seed=9)
    assert sweep["scheme"].values.tolist() == ["goat", "rope"]
    for scheme, run, model in (
        ("goat", 0, models["goat"][0]),
        ("goat", 1, models["goat"][1]),
        ("rope", 0, models["rope"]),
    ):
        for size, count in ((24, 70), (40, 5)):
            cell = sweep.sel(scheme=scheme, run=run, length=size)
            wanted = evaluate_answers(
                model, TASK.at_length(size), examples=count, batch_size=64, seed=9
            )
            for name, value in wanted._asdict().items():
                assert float(cell[name]) == pytest.approx(value, rel=1e-5), name
            assert float(cell["token"]) == wanted.token
            low, high = wilson_interval(wanted.right_tokens, wanted.tokens)
            assert (float(cell["token_low"]), float(cell["token_high"])) == (low, high)
    missing = sweep.sel(scheme="rope", run=1)
    assert (missing["examples"] == 0).all() and missing["strict"].isnull().all()
    pooled = sweep.sel(scheme="goat")
    wanted = pooled["right_tokens"].sum("run") / pooled["tokens"].sum("run")
    np.testing.assert_array_equal(pooled["mean_token"], wanted)
    assert sweep.attrs["chance_token"] == 0.25 and sweep.attrs["training_length"] == "32"


def test_sweeps_of_other_seeds_are_one():
    models = [small_model(seed) for seed in range(3)]
    asked = {"lengths": [24, 40], "examples": 6}
    whole = length_sweep({"goat": models}, TASK, **asked)
    parts = [length_sweep({"goat": each}, TASK, **asked) for each in (models[:1], models[1:])]
    parts[1].attrs["command"] = "goatviz sweep"
    joined = join_sweeps(*parts)
    assert joined.attrs.pop("command") == "goatviz sweep"
    assert joined.identical(whole)
    depths = {"depths": [0.0, 0.5], **asked}
    parts = [needle_grid({"goat": each}, TASK, **depths) for each in (models[:1], models[1:])]
    assert join_sweeps(*parts).identical(needle_grid({"goat": models}, TASK, **depths))


def test_sweeps_of_other_questions_are_not_joined():
    model = small_model()
    sweep = length_sweep({"goat": model}, TASK, lengths=[24], examples=1)
    for options, message in (
        ({"seed": 1}, "same questions, got seed 1000003 and 1"),
        ({"lengths": [24, 40]}, "same lengths, got 24 and 24, 40"),
    ):
        other = {"lengths": [24], "examples": 1, **options}
        with pytest.raises(ValueError, match=message):
            join_sweeps(sweep, length_sweep({"goat": model}, TASK, **other))
    with pytest.raises(ValueError, match="same schemes, got goat and other"):
        join_sweeps(sweep, sweep.assign_coords(scheme=["other"]))
    grid = needle_grid({"goat": model}, TASK, lengths=[24], depths=[0.0], examples=1)
    with pytest.raises(TypeError, match="length_sweep"):
        join_sweeps(sweep, grid)
    with pytest.raises(TypeError, match="at least one, got none"):
        join_sweeps()


def test_a_grid_pools_runs_and_knows_depths():
    models = {"goat": [small_model(0), small_model(1)]}
    grid = needle_grid(models, TASK, lengths=[40], depths=[0.0, 0.5], examples=6, seed=2)
    for depth in (0.0, 0.5):
        each = [
            evaluate_answers(m, TASK.at_length(40), examples=6, seed=2, depth=depth)
            for m in models["goat"]
        ]
        cell = grid.sel(scheme="goat", depth=depth, length=40)
        assert int(cell["examples"]) == 12 and int(cell["tokens"]) == 24
        assert float(cell["token"]) == sum(e.right_tokens for e in each) / 24
        assert float(cell["strict"]) == sum(e.right for e in each) / 12


def test_learned_positions_end_at_the_training_length():
    model = small_model(positions="learned")
    sweep = length_sweep({"learned": model}, TASK, lengths=[32, 33], examples=2)
    assert sweep["examples"].values.tolist() == [[[2, 0]]]
    assert sweep["token"].isnull().values.tolist() == [[[False, True]]]


def test_results_save_and_load(tmp_path):
    models = {"goat": small_model()}
    for made in (
        length_sweep(models, TASK, lengths=[24], examples=2),
        needle_grid(models, TASK, lengths=[24], depths=[0.5], examples=2),
    ):
        path = save_result(made, tmp_path / f"{made.attrs['schema']}.nc")
        assert load_result(path).identical(made)


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    models = {"goat": small_model(), "none": small_model(positions="none")}
    asked = []
    original = length.evaluate_answers

    def counted(model, task, **options):
        asked.append(task.length)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(model, task, **options)

    options = {"lengths": [24, 32], "examples": 3, "cache": tmp_path}
    monkeypatch.setattr(length, "evaluate_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        length_sweep(models, TASK, **options)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = length_sweep(models, TASK, **options)
    assert asked == [24, 32, 24, 24, 32]
    again = length_sweep(models, TASK, **options)
    assert len(asked) == 5
    fresh = length_sweep(models, TASK, **{**options, "cache": None})
    assert again.identical(resumed) and resumed.identical(fresh)


@pytest.mark.parametrize("change", ["weights", "examples", "seed", "task", "length", "depth"])
def test_other_cells_are_other_files(tmp_path, change):
    model, task = small_model(), TASK
    options = {"lengths": [32], "depths": [0.5], "examples": 2, "cache": tmp_path}
    needle_grid({"a": model}, task, **options)
    if change == "weights":
        with torch.no_grad():
            model.head.weight[0, 0] += 1e-6
    elif change == "task":
        task = Needle(value_length=3)
    else:
        name = {"length": "lengths", "depth": "depths"}.get(change, change)
        options[name] = {"examples": 3, "seed": 8, "length": [33], "depth": [0.6]}[change]
    needle_grid({"b": model}, task, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_cells_are_readable(tmp_path):
    length_sweep({"a": small_model()}, TASK, lengths=[24], examples=2, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("needle-24-")
    assert json.loads(path.read_text())["examples"] == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"models": {}}, ValueError, "models must be a mapping of scheme names"),
        ({"models": small_model()}, TypeError, "models must be a mapping of scheme names"),
        ({"models": {"goat": 3}}, TypeError, "must be a CausalLM or a sequence of them, got int"),
        ({"models": {"goat": []}}, ValueError, "at least one model, got none"),
        ({"models": {"goat": [3]}}, TypeError, "must be a CausalLM, got int"),
        (
            {"models": {"a": small_model(vocab_size=8)}},
            ValueError,
            "a vocabulary of at least .*, got 8",
        ),
        ({"task": CopyMixture()}, ValueError, "task must have answers"),
        ({"lengths": []}, ValueError, "lengths must be increasing"),
        ({"lengths": [64, 32]}, ValueError, "lengths must be increasing"),
        ({"lengths": [32.5]}, TypeError, "lengths must be an integer"),
        ({"lengths": [4]}, ValueError, "length must be at least"),
        ({"examples": 0}, ValueError, "examples at length 32 must be .*, got 0"),
        ({"examples": {64: 3}}, TypeError, "examples at length 32 must be .*, got None"),
        ({"cache": "/nowhere"}, ValueError, "cache must be an existing folder"),
    ],
)
def test_errors(changes, error, words):
    options = {"models": {"goat": small_model()}, "task": Passkey(), "lengths": [32], **changes}
    models, task = options.pop("models"), options.pop("task")
    with pytest.raises(error, match=words):
        length_sweep(models, task, **options)


@pytest.mark.parametrize("depths", [[], [0.5, 0.1], [1.5]])
def test_depths_must_lie_in_the_text(depths):
    with pytest.raises(ValueError, match="depths must be"):
        needle_grid({"goat": small_model()}, TASK, lengths=[32], depths=depths)


def test_depths_pooled_are_sums_over_them():
    grid = load_shipped_result("needle-grid").copy(deep=True)
    empty = {"scheme": "goat", "length": 1024, "depth": 0.1}
    for values in grid.data_vars.values():
        values.loc[empty] = 0 if values.dtype.kind == "i" else np.nan
    pooled = length.over_depths(grid)
    for name, unit in (("strict", "examples"), ("token", "tokens")):
        np.testing.assert_array_equal(pooled[unit], grid[unit].sum("depth"))
        right = (grid[name].fillna(0) * grid[unit]).sum("depth")
        np.testing.assert_allclose(pooled[name] * pooled[unit], right, rtol=1e-12)
        low, high = wilson_interval(right.round(), pooled[unit])
        np.testing.assert_allclose(pooled[f"{name}_low"], low)
        np.testing.assert_allclose(pooled[f"{name}_high"], high)
    with pytest.raises(TypeError, match="expected a needle_grid"):
        length.over_depths(None)
