"""A profile of many inputs is the same profile: in batches, from a cache, after it was stopped."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from goatviz import capture, plot_sinks
from goatviz.analysis import sink_profile
from goatviz.analysis.cells import inputs_digest, model_digest
from goatviz.analysis.inputs import forward_passes
from goatviz.attention import Attention
from goatviz.results import load_result
from goatviz.training import Execution
from tests.factories import MixedHeads, TextTokenizer, hidden_states, ids, tiny_huggingface, tiny_lm

INPUTS = [ids(2, 24), ids(1, 20, seed=1), ids(3, 24, seed=2), ids(1, 17, seed=3)]


def counting(model):
    """The lengths of the batches that a model is called with."""
    seen = []
    model.register_forward_pre_hook(
        lambda _module, given, named: seen.append(tuple((*given, *named.values())[0].shape[:2])),
        with_kwargs=True,
    )
    return seen


def assert_near(found, wanted):
    assert found.attrs == wanted.attrs and set(found) == set(wanted)
    for name in wanted.data_vars:
        if wanted[name].dtype.kind == "f" and not name.startswith(("signal", "layer_signal")):
            np.testing.assert_allclose(
                found[name], wanted[name], rtol=1e-4, atol=2e-5, err_msg=name
            )


# --- batches ---


@pytest.mark.parametrize(("size", "wanted"), [(1, 7), (2, 5), (16, 3)])
def test_sequences_of_equal_length_run_together_and_stay_in_order(size, wanted):
    model = tiny_lm()
    alone = sink_profile(model, INPUTS, maps=8)
    seen = counting(model)
    found = sink_profile(model, INPUTS, maps=8, batch_size=size)
    assert len(seen) == wanted and sum(batch for batch, _ in seen) == 7
    assert max(batch for batch, _ in seen) == min(size, 5)
    assert_near(found, alone)
    assert (found["signal_count"].sum() == alone["signal_count"].sum()).all()


def test_texts_and_masks_run_together_too():
    model = tiny_huggingface("gpt2").base_model
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 20:] = 0
    inputs = [
        {"input_ids": ids(2, 24, vocab=50), "attention_mask": mask},
        {"input_ids": ids(1, 24, vocab=50, seed=1), "attention_mask": mask[:1]},
        {"input_ids": ids(1, 20, vocab=50, seed=2)},
    ]
    alone = sink_profile(model, inputs, norms=True)
    seen = counting(model)
    found = sink_profile(model, inputs, norms=True, batch_size=8)
    # The row that was cut has lost its mask, and one that is whole has kept it.
    assert sorted(seen) == [(1, 24), (1, 24), (2, 20)]
    assert_near(found, alone)
    texts = ["one text or", "two texts, ", "three of them"]
    tiny, tokenizer = tiny_lm(), TextTokenizer()
    with pytest.warns(UserWarning, match="the shortest input has 11 tokens"):
        together = sink_profile(tiny, texts, tokenizer=tokenizer, min_observers=2, batch_size=4)
    with pytest.warns(UserWarning, match="the shortest input has 11 tokens"):
        assert_near(together, sink_profile(tiny, texts, tokenizer=tokenizer, min_observers=2))
    assert [one.places for one in forward_passes(texts, tokenizer, 4)] == [(0, 1), (2,)]


def test_a_layer_that_is_called_again_keeps_its_inputs_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = Attention(8, 2)

        def forward(self, x):
            return self.layer(self.layer(x))

    model, inputs = Twice(), hidden_states(20, 24, 20, width=8)
    assert_near(sink_profile(model, inputs, batch_size=2), sink_profile(model, inputs))


def test_what_differs_in_more_than_numbers_runs_apart():
    rows = [
        {"ids": ids(1, 20), "flag": True},
        {"ids": ids(1, 20), "flag": False},
        {"ids": ids(1, 20).int(), "flag": True},
        {"ids": ids(1, 20), "flag": True, "more": torch.zeros(3)},
        {"ids": ids(1, 20, seed=4), "flag": True},
    ]
    passes = forward_passes(rows, batch_size=9)
    assert [one.places for one in passes] == [(0, 4), (1,), (2,), (3,)]
    assert torch.equal(passes[0].arguments["ids"], torch.cat([rows[0]["ids"], rows[4]["ids"]]))


# --- the cache ---


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_a_cache_changes_no_bit_and_runs_nothing_twice(tmp_path, size, norms):
    model = MixedHeads()
    inputs = hidden_states(30, 27, 30, 30, 22)
    options = {"maps": 8, "min_observers": 4, "norms": norms, "batch_size": size}
    wanted = sink_profile(model, inputs, **options)
    seen = counting(model)
    first = sink_profile(model, inputs, **options, cache=tmp_path)
    passes = len(seen)
    again = sink_profile(model, inputs, **options, cache=tmp_path)
    assert first.identical(wanted) and again.identical(wanted)
    assert len(seen) == passes == len(list(tmp_path.iterdir()))
    # Only what is new runs, and options that follow from what is kept need no run at all.
    more = [*inputs, *hidden_states(25, seed=1)]
    sink_profile(model, more, **options, cache=tmp_path, threshold=0.5, resamples=10, seed=3)
    assert len(seen) == passes + 1


def test_a_run_that_was_stopped_goes_on(tmp_path):
    model = tiny_lm()
    wanted = sink_profile(model, INPUTS)
    broken = copy.deepcopy(model)
    calls = counting(broken)

    def stop(*_):
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = broken.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sink_profile(broken, INPUTS, cache=tmp_path)
    handle.remove()
    assert len(list(tmp_path.iterdir())) == 2
    assert sink_profile(broken, INPUTS, cache=tmp_path).identical(wanted)
    assert len(calls) == 3 + 2


def test_cells_of_other_models_inputs_and_options_are_others(tmp_path):
    model = tiny_lm()
    sink_profile(model, ids(1, 24), cache=tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].attention.q_proj.weight[0, 0] += 1e-3
    uncausal = copy.deepcopy(model)
    for block in uncausal.blocks:
        block.attention.causal = False
    seen = 1
    for one, given, options in (
        (other, ids(1, 24), {}),
        (uncausal, ids(1, 24), {}),
        (copy.deepcopy(model).double(), ids(1, 24), {}),
        (model, ids(1, 24, seed=1), {}),
        (model, ids(1, 24).int(), {}),
        (model, ids(1, 24), {"recent": 5}),
        (model, ids(1, 24), {"layers": [0]}),
        (model, ids(1, 24), {"maps": 4}),
        (model, ids(1, 24), {"norms": True}),
    ):
        kept = sink_profile(one, given, **options, cache=tmp_path)
        seen += 1
        assert len(list(tmp_path.iterdir())) == seen, options
        assert kept.identical(sink_profile(one, given, **options)), options


def test_damaged_and_foreign_cells_are_errors(tmp_path):
    model = tiny_lm()
    before = model_digest(model)
    sink_profile(model, [ids(1, 24), ids(1, 20)], cache=tmp_path)
    assert model_digest(model) == before
    one, other = sorted(tmp_path.iterdir())
    kept = one.read_bytes()
    for damage in (
        b"",
        b"no archive",
        kept[: len(kept) // 2],
        kept[: len(kept) // 3] + bytes([kept[len(kept) // 3] ^ 1]) + kept[len(kept) // 3 + 1 :],
        other.read_bytes(),
    ):
        one.write_bytes(damage)
        with pytest.raises(ValueError, match=f"cell .*{one.name} is damaged, remove it"):
            sink_profile(model, [ids(1, 24), ids(1, 20)], cache=tmp_path)
    one.unlink()
    sink_profile(model, [ids(1, 24), ids(1, 20)], cache=tmp_path)
    assert one.read_bytes() and len(list(tmp_path.iterdir())) == 2


def test_digests_see_every_part():
    layer = Attention(8, 2)
    same = copy.deepcopy(layer)
    assert model_digest(layer) == model_digest(same)
    same.causal = False
    assert model_digest(layer) != model_digest(same)
    assert model_digest(copy.deepcopy(layer).bfloat16()) != model_digest(layer)
    x = torch.zeros(2, 3)
    different = [x, x.int(), x.view(3, 2), {"a": x}, {"b": x}, [x], [x, x], True, 1, "1", None]
    assert len({inputs_digest(value) for value in different}) == len(different)
    with pytest.raises(TypeError, match="inputs must be tensors and plain values.*got object"):
        inputs_digest({"a": [object()]})


# --- several processes ---

WORKER = """
import os, sys
import torch
from goatviz.analysis import sink_profile
from goatviz.results import save_result
from goatviz.training import Execution
from tests.analysis.test_sink_cells import INPUTS
from tests.factories import tiny_lm

torch.set_num_threads(1)
rank, folder = os.environ["RANK"], sys.argv[1]
for name, options in (("plain", {}), ("batches", {"batch_size": 2, "cache": folder})):
    options = {"maps": 8, "norms": True, "execution": Execution("cpu"), **options}
    found = sink_profile(tiny_lm(), INPUTS, **options)
    save_result(found, f"{folder}/{name}{rank}.nc")
def fail(module, given):
    if given[0].shape[1] == 17:
        raise ArithmeticError("seventeen")


broken = tiny_lm()
broken.register_forward_pre_hook(fail)
try:
    sink_profile(broken, INPUTS, execution=Execution("cpu"))
except Exception as error:
    with open(f"{folder}/error{rank}.txt", "w") as file:
        file.write(f"{type(error).__name__}: {error}")
# A process that ends while it is connected may be aborted by a thread of its connection.
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one_profile(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    free = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RANK"))}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(tmp_path / "worker.py"), str(tmp_path)],
        env={**free, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"maps": 8, "norms": True}
        wanted = {
            "plain": sink_profile(tiny_lm(), INPUTS, **options),
            "batches": sink_profile(tiny_lm(), INPUTS, **options, batch_size=2),
        }
    finally:
        torch.set_num_threads(before)
    for name, one in wanted.items():
        for rank in (0, 1):
            assert load_result(tmp_path / f"{name}{rank}.nc").identical(one), (name, rank)
    assert len(list(tmp_path.glob("sinks-*.npz"))) == 5
    errors = [(tmp_path / f"error{rank}.txt").read_text() for rank in (0, 1)]
    # The fourth input is the second process's.
    assert errors[1] == "ArithmeticError: seventeen"
    assert errors[0] == f"RuntimeError: another process failed: {errors[1]}"


def test_an_execution_of_one_process_changes_nothing():
    wanted = sink_profile(tiny_lm(), INPUTS)
    assert sink_profile(tiny_lm(), INPUTS, execution=Execution("cpu")).identical(wanted)
    with pytest.raises(TypeError, match="execution must be an Execution, got dict"):
        sink_profile(tiny_lm(), INPUTS, execution={})
    with pytest.raises(
        ValueError, match="execution must leave everything but device at its default"
    ):
        sink_profile(tiny_lm(), INPUTS, execution=Execution(compile=True))


# --- what is said ---


def test_progress_is_shown_if_asked_for(capsys):
    sink_profile(tiny_lm(), INPUTS)
    assert capsys.readouterr().err == ""
    sink_profile(tiny_lm(), INPUTS, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_what_does_not_fit_is_named(tmp_path):
    model = tiny_lm()
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        sink_profile(model, INPUTS, batch_size=0)
    with pytest.raises(ValueError, match="cache must be an existing folder, got"):
        sink_profile(model, INPUTS, cache=tmp_path / "nowhere")
    with capture(model) as record:
        model(ids(1, 24))
    with pytest.raises(TypeError, match="cache must not be given with a Record"):
        sink_profile(record, cache=tmp_path)
    with pytest.raises(TypeError, match="batch_size must not be given with a Record"):
        sink_profile(record, batch_size=4)


# --- certificates ---


@pytest.mark.parametrize("name", ["goat", "gpt2"])
def test_a_profile_says_how_near_its_plans_are_to_the_kernel(name, tmp_path):
    model = tiny_lm() if name == "goat" else tiny_huggingface(name)
    with capture(model, certify=4) as record:
        for each in INPUTS[:2]:
            model(each)
    wanted = list(record.residuals().values())
    assert 0 < max(wanted) < 1e-5
    plain = sink_profile(model, INPUTS[:2])
    assert "residual" not in plain and "residual" not in plain.attrs
    for options in ({}, {"cache": tmp_path}, {"cache": tmp_path}):
        profile = sink_profile(model, INPUTS[:2], certify=4, **options)
        np.testing.assert_allclose(profile["residual"], wanted)
        assert profile.attrs["residual"] == pytest.approx(max(wanted))
        assert profile.drop_vars("residual").equals(plain)
    caption = plot_sinks(profile).to_dict()["layout"]
    assert f"by at most {max(wanted):.1e} of the largest value" in str(caption).replace("<br>", " ")


def test_a_planted_fault_shows_in_the_profile():
    model = tiny_huggingface("gpt2")
    attend = torch.nn.functional.scaled_dot_product_attention
    right = sink_profile(model, INPUTS[:1], certify=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *rest, **named: attend(0.5 * q, *rest, **named),
        )
        wrong = sink_profile(model, INPUTS[:1], certify=4)
    assert right.attrs["residual"] < 1e-5 < 1e-3 < wrong.attrs["residual"]


def test_certificates_that_cannot_be_had():
    with pytest.raises(ValueError, match="certify must be"):
        sink_profile(tiny_lm(), INPUTS[:1], certify=0)
    with capture(tiny_lm(), certify=4) as record:
        pass
    with pytest.raises(TypeError, match="certify"):
        sink_profile(record, certify=4)
