"""What scripts of docs/ measured of SmolLM2's sinks: the README's table, and the long profile."""

import importlib.util
from pathlib import Path

import numpy as np

from goatviz.analysis import sink_effect, sink_profile
from goatviz.plots import draw_sinks
from goatviz.results import (
    SINK_EFFECT,
    SINK_PROFILE,
    check_result,
    load_result,
    load_shipped_result,
    save_result,
)
from goatviz.transport import Hide
from tests.factories import ids, tiny_huggingface

ROOT = Path(__file__).parents[2]


def script(name="sink_effect"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_shipped_result():
    effect = load_shipped_result("smollm2-sink-effect")
    assert effect.attrs["source"] == "LlamaForCausalLM" and effect.attrs["layers"] == 30
    assert effect.sizes["input"] == script().PIECES and effect.sizes["layer"] == 30
    lines = "\n".join(script().table(effect))
    assert lines in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_script_measures_what_it_says(tmp_path):
    laboratory = script()
    model = tiny_huggingface("llama")
    tokens = ids(1, (laboratory.PIECES + laboratory.FITTED) * 12, vocab=50)[0]
    effect = laboratory.laboratory(model, tokens, length=12)
    check_result(effect, SINK_EFFECT)
    save_result(effect, tmp_path / "effect.nc")
    pieces = tokens.view(-1, 12)[: laboratory.PIECES]
    alone = sink_effect(model, pieces, changes={"hidden": Hide([0])})
    hidden = effect.sel(change="first key hidden")
    for name in ("mean_increase", "mean_increase_high"):
        np.testing.assert_allclose(hidden[name], alone[name][0], atol=1e-6)
        np.testing.assert_allclose(hidden[f"layer_{name}"], alone[f"layer_{name}"][0], atol=1e-6)
    assert np.isnan(effect.sel(change="temperature 1.5")["layer_mean_increase"]).all()
    assert len(list(laboratory.table(effect))) == 2 + effect.sizes["change"]


def test_the_long_profile_is_of_one_input_of_all_heads():
    profile = load_shipped_result("smollm2-sinks-8000")
    made = script("long_sinks")
    assert profile.attrs["length"] == profile.attrs["length_min"] == made.LENGTH == 8000
    assert profile.attrs["source"] == "LlamaForCausalLM" and profile.attrs["n_inputs"] == 1
    assert profile["importance"].shape == (30, 9, made.KEYS)
    np.testing.assert_allclose(
        profile["importance"].sel(key=0), profile["first_mass"], atol=2e-4, rtol=0
    )
    assert "1 input of 8,000 tokens" in draw_sinks(profile).layout.annotations[-1].text


def test_the_long_profile_is_part_of_the_whole(tmp_path):
    model, tokens = tiny_huggingface("llama"), ids(1, 60, vocab=50)[0]
    part = script("long_sinks").long_sinks(model, tokens, length=48)
    whole = sink_profile(model, tokens[None, :48]).sel(key=slice(0, 31))
    path = save_result(part, tmp_path / "long.nc")
    loaded = check_result(load_result(path), SINK_PROFILE)
    assert set(whole) > set(loaded)
    assert loaded.identical(whole[list(loaded)].assign_attrs(loaded.attrs))
