"""The README's table of what sinks do for SmolLM2 is that of the result, which a script made."""

import importlib.util
from pathlib import Path

import numpy as np

from goatviz.analysis import sink_effect
from goatviz.results import SINK_EFFECT, check_result, load_shipped_result, save_result
from goatviz.transport import Hide
from tests.factories import ids, tiny_huggingface

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("laboratory", ROOT / "docs" / "sink_effect.py")
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
