"""Losses of documents are those of the full pass, and intervals are over documents."""

import numpy as np
import pytest
import torch
import xarray as xr

from goatviz.analysis import join_sweeps, loss_difference, perplexity, perplexity_sweep
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.models import CausalLM, ModelConfig
from goatviz.results import (
    PERPLEXITY_SWEEP,
    load_result,
    load_shipped_result,
    make_result,
    save_result,
)
from goatviz.tasks import DNA, Passkey, Text
from goatviz.training.evaluation import next_token_loss


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "training_length": 32, "embed_dim": 32, "num_layers": 2}
    return CausalLM(ModelConfig(**{**sizes, **options})).eval()


@pytest.fixture
def task(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, size in (("a", 200), ("b", 150), ("c", 300), ("short", 20)):
        letters = random.integers(97, 123, size)
        (folder / f"{name}.txt").write_bytes(bytes(letters.tolist()))
    return Text(source=str(folder))


def test_losses_are_those_of_full_passes(task):
    models = {"goat": [small_model(0), small_model(1)], "rope": small_model(2, positions="rope")}
    sweep = perplexity_sweep(models, task, lengths=[16, 32, 128], chunk=24)
    assert sweep.sizes["piece"] == 3 and sweep["scheme"].values.tolist() == ["goat", "rope"]
    pieces, _ = task.pieces(128)
    for scheme, run, model in (
        ("goat", 0, models["goat"][0]),
        ("goat", 1, models["goat"][1]),
        ("rope", 0, models["rope"]),
    ):
        for length in (16, 32, 128):
            for at, piece in enumerate(pieces):
                with torch.no_grad():
                    each = torch.cat(
                        [
                            next_token_loss(model, piece[None, start : start + length + 1])[0]
                            for start in range(0, 128, length)
                        ]
                    )
                cell = sweep["loss"].sel(scheme=scheme, run=run, piece=at, length=length)
                assert float(cell) == pytest.approx(float(each.mean()), abs=1e-4)
            if length == 128:
                places = sweep["position_loss"].sel(scheme=scheme, run=run, piece=2).values
                ends = sweep["position"].values.tolist()
                assert ends == [16, 32, 64, 128]
                wanted = [each[a:b].mean() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
                np.testing.assert_allclose(places, wanted, atol=1e-4)
    assert np.isnan(sweep["loss"].sel(scheme="rope", run=1)).all()


def test_sweeps_of_other_seeds_are_one(task):
    models = [small_model(seed) for seed in range(3)]
    whole = perplexity_sweep({"goat": models}, task, lengths=[32, 128])
    parts = [
        perplexity_sweep({"goat": each}, task, lengths=[32, 128])
        for each in (models[:1], models[1:])
    ]
    parts[0].attrs["command"], parts[1].attrs["command"] = "first", "second"
    joined = join_sweeps(*parts)
    assert joined.attrs.pop("command") == "first; second"
    assert joined.identical(whole)
    shipped = load_shipped_result("text-eltec")
    again = join_sweeps(shipped.isel(run=[0]), shipped.isel(run=slice(1, None)))
    # To rounding: the shipped one was computed by another processor.
    xr.testing.assert_allclose(again, shipped, rtol=1e-12)


def test_sweeps_of_other_pieces_are_not_joined(task, tmp_path):
    model = small_model()
    sweep = perplexity_sweep({"goat": model}, task, lengths=[32])
    for options, message in (
        ({"lengths": [16, 32]}, "same lengths, got 32 and 16, 32"),
        ({"per_document": 2}, "same questions, got documents "),
        ({"seed": 1}, "same questions, got seed 0 and 1"),
    ):
        other = perplexity_sweep({"goat": model}, task, **{"lengths": [32], **options})
        with pytest.raises(ValueError, match=message):
            join_sweeps(sweep, other)
    fewer = sweep.assign(position_tokens=sweep["position_tokens"] - 1)
    with pytest.raises(ValueError, match="same pieces, but their tokens are not as many"):
        join_sweeps(sweep, fewer)


def test_means_and_intervals(task):
    models = {"goat": [small_model(0), small_model(1)], "alibi": small_model(2, positions="alibi")}
    sweep = perplexity_sweep(models, task, lengths=[32, 128], seed=3)
    loss = sweep["loss"]
    np.testing.assert_allclose(sweep["mean_loss"], loss.mean("run").mean("piece"), rtol=1e-12)
    np.testing.assert_allclose(sweep["run_loss"], loss.mean("piece"), rtol=1e-12)
    np.testing.assert_allclose(sweep["perplexity"], np.exp(sweep["mean_loss"]))
    draws = np.random.default_rng(3).integers(3, size=(perplexity.RESAMPLES, 3))
    each = loss.mean("run").sel(scheme="goat", length=128).values
    low, high = np.percentile(each[draws].mean(axis=1), [2.5, 97.5])
    cell = sweep.sel(scheme="goat", length=128)
    assert float(cell["mean_loss_low"]) == pytest.approx(low)
    assert float(cell["mean_loss_high"]) == pytest.approx(high)
    assert (sweep["mean_position_loss_low"] <= sweep["mean_position_loss"]).all()
    # The mean over positions, weighted by their tokens, is the mean of the longest windows.
    weights = sweep["position_tokens"].sum("piece")
    whole = (sweep["mean_position_loss"] * weights).sum("position") / weights.sum()
    np.testing.assert_allclose(whole, sweep["mean_loss"].sel(length=128), rtol=1e-6)


def test_intervals_of_shipped_tables_follow_from_their_losses():
    sweep = load_shipped_result("text-eltec")
    weights = bootstrap_weights(sweep.sizes["piece"], sweep.attrs["resamples"], sweep.attrs["seed"])
    for name, loss, tokens in (
        ("mean_loss", "loss", "tokens"),
        ("mean_position_loss", "position_loss", "position_tokens"),
    ):
        by_piece = sweep[loss].mean("run").transpose("piece", ...)
        sizes = sweep[tokens].expand_dims(scheme=sweep["scheme"]).transpose(*by_piece.dims)
        low, high = bootstrap_interval(by_piece.values, weights, sizes.values)
        np.testing.assert_allclose(low, sweep[f"{name}_low"], rtol=1e-12)
        np.testing.assert_allclose(high, sweep[f"{name}_high"], rtol=1e-12)


def test_masked_bases_and_pieces_without_any(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text(">one\n" + "ACGTN" * 60 + "\n>gap\n" + "N" * 300)
    sweep = perplexity_sweep(
        {"goat": small_model(vocab_size=5)},
        DNA(source=str(path)),
        lengths=[16, 64],
        per_document=4,
    )
    assert sweep.sizes["piece"] == 4 and "gap" not in sweep.attrs["documents"]
    assert (sweep["tokens"] < 64).all() and (sweep["tokens"] > 40).all()
    assert np.isfinite(sweep["mean_loss"]).all()


def test_learned_positions_end_and_results_survive(task, tmp_path):
    models = {"goat": small_model(), "learned": small_model(positions="learned")}
    sweep = perplexity_sweep(models, task, lengths=[32, 128])
    learned = sweep.sel(scheme="learned")
    assert np.isfinite(learned["mean_loss"].sel(length=32))
    assert np.isnan(learned["mean_loss"].sel(length=128))
    assert np.isnan(learned["perplexity_high"].sel(length=128))
    assert np.isfinite(sweep["mean_loss"].sel(scheme="goat")).all()
    assert load_result(save_result(sweep, tmp_path / "sweep.nc")).identical(sweep)


def test_cells_are_measured_once(task, tmp_path, monkeypatch):
    cells = tmp_path / "cells"
    cells.mkdir()
    model = small_model()
    first = perplexity_sweep({"goat": model}, task, lengths=[32, 128], cache=cells)
    assert len(list(cells.iterdir())) == 6

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(perplexity, "sequence_loss", never)
    again = perplexity_sweep({"goat": model}, task, lengths=[32, 128], cache=cells)
    assert again.identical(first)
    with pytest.raises(AssertionError, match="measured again"):
        perplexity_sweep({"goat": small_model(9)}, task, lengths=[32, 128], cache=cells)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lengths": [24, 128]}, ValueError, "lengths must all divide the last, 128"),
        ({"lengths": [1000]}, ValueError, "lengths must be below the length"),
        ({"lengths": [256]}, ValueError, "must give at least two pieces of 257 tokens, got 1"),
        ({"lengths": []}, ValueError, "lengths must be increasing positive integers"),
        ({"documents": 1}, ValueError, "documents must be an integer of at least 2, got 1"),
        ({"cache": "nowhere"}, ValueError, "cache must be an existing folder, got nowhere"),
        ({"task": Passkey(length=40)}, TypeError, "task must be a Text or DNA, got Passkey"),
        ({"models": {}}, ValueError, "models must be a mapping of scheme names"),
    ],
)
def test_errors(task, options, error, words):
    given = {"models": {"goat": small_model()}, "task": task, "lengths": [32], **options}
    with pytest.raises(error, match=words):
        perplexity_sweep(given.pop("models"), given.pop("task"), **given)


def test_documents_are_spread_evenly(task):
    sweep = perplexity_sweep({"goat": small_model()}, task, lengths=[32], documents=2)
    assert sweep.attrs["documents"] == '["a.txt", "c.txt"]'


def made_up(loss, tokens=None):
    """A sweep of these losses, (schemes, runs, pieces, lengths), and nothing else of use."""
    schemes, runs, pieces, lengths = loss.shape
    sizes = {"scheme": schemes, "run": runs, "piece": pieces, "length": lengths, "position": 1}
    tokens = np.full((pieces, lengths), 7) if tokens is None else tokens
    data = {
        name: np.zeros([sizes[dim] for dim in field.dims])
        for name, field in PERPLEXITY_SWEEP.fields.items()
    }
    return make_result(
        PERPLEXITY_SWEEP,
        data | {"loss": loss, "tokens": tokens},
        coords={
            "scheme": [f"s{n}" for n in range(schemes)],
            "run": range(runs),
            "piece": range(pieces),
            "length": [2**n for n in range(lengths)],
            "position": [1],
        },
        attrs={"training_length": "1"},
    )


def test_paired_differences_leave_out_how_hard_a_piece_is():
    rng = np.random.default_rng(0)
    hard = rng.normal(scale=5.0, size=(1, 1, 20, 1))
    loss = (
        hard
        + np.array([0.0, 0.3])[:, None, None, None]
        + rng.normal(scale=0.01, size=(2, 3, 20, 4))
    )
    found = loss_difference(made_up(loss), "s0", resamples=400)
    wanted = (loss[1] - loss[0]).mean(axis=(0, 1))
    assert np.allclose(found["difference"].sel(scheme="s1"), wanted)
    assert not found["difference"].sel(scheme="s0").any()
    width = (found["difference_high"] - found["difference_low"]).sel(scheme="s1")
    assert float(width.max()) < 0.02
    assert bool((found["difference_low"].sel(scheme="s1") > 0.28).all())


def test_differences_weigh_pieces_by_their_tokens_and_runs_alike():
    loss = np.zeros((2, 2, 2, 1))
    loss[1, :, 0, 0], loss[1, :, 1, 0] = [1.0, 3.0], [10.0, 10.0]
    tokens = np.array([[3], [1]])
    found = loss_difference(made_up(loss, tokens), "s0")
    assert found["difference"].sel(scheme="s1").item() == pytest.approx((3 * 2.0 + 10.0) / 4)
    back = loss_difference(made_up(loss, tokens), "s1")
    assert back["difference"].sel(scheme="s0").item() == pytest.approx(-4.0)


def test_differences_of_runs_that_are_missing():
    loss = np.zeros((2, 2, 3, 2))
    loss[1] = 1.0
    loss[1, 1] = np.nan  # one run less
    loss[1, 0, :, 1] = np.nan  # a length it does not have
    found = loss_difference(made_up(loss), "s0")["difference"].sel(scheme="s1")
    assert float(found[0]) == 1.0 and np.isnan(found[1])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reference": "x"}, ValueError, "reference must be one of s0, s1; got 'x'"),
        ({"reference": "s0", "resamples": 0}, ValueError, "resamples must be an integer of at le"),
    ],
)
def test_differences_of_what_is_not_there(options, error, says):
    with pytest.raises(error, match=says):
        loss_difference(made_up(np.zeros((2, 1, 2, 1))), **options)
    with pytest.raises(TypeError, match="expected a perplexity_sweep"):
        loss_difference({}, "s0")


def test_a_chunk_of_nothing_is_told(task):
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        perplexity_sweep({"goat": small_model()}, task, lengths=[16], chunk=0)
