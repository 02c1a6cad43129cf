"""However a run is carried out, it is the same run: processes, micro-batches, precision, memory."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import goatviz.training.execution as execution_module
import goatviz.training.loop as loop
from goatviz.models import POSITION_SCHEMES, CausalLM
from goatviz.tasks import DNA, Needle
from goatviz.training import Execution, TrainConfig, load_checkpoint, train
from goatviz.training.evaluation import evaluate, evaluate_answers
from goatviz.training.execution import start

CONFIG = TrainConfig(
    task=Needle(length=24, value_length=2),
    embed_dim=32,
    num_layers=2,
    prior_rank=2,
    sink_rank=2,
    steps=6,
    batch_size=8,
    warmup=2,
    # Adam does not feel the scale of gradients: they are compared themselves, unclipped.
    clip=1e6,
)


@pytest.fixture(autouse=True)
def _small_held_out(monkeypatch):
    monkeypatch.setattr(
        loop, "evaluate", lambda model, task, seed: evaluate(model, task, sequences=8, seed=seed)
    )
    monkeypatch.setattr(
        loop,
        "evaluate_answers",
        lambda model, task, seed: evaluate_answers(model, task, examples=8, seed=seed),
    )


def run(config=CONFIG, **options):
    return train(config, progress=False, execution=Execution(device="cpu", **options))


def losses(result):
    return [entry["loss"] for entry in result.history]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def gradients(result):
    """Of the last step."""
    return torch.cat([p.grad.flatten() for p in result.model.parameters()])


def assert_near(found, wanted):
    """As a whole: where a gradient is 0, Adam makes whole steps of what rounding left of it."""
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.fixture(scope="module")
def dna(tmp_path_factory):
    """A config whose sequences have very different numbers of targets."""
    letters = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join("ACGT"[k] for k in letters)
    text = text[:100] + "N" * 60 + text[160:300] + "N" * 20 + text[320:]
    folder = tmp_path_factory.mktemp("dna")
    for name in ("train", "test"):
        (folder / f"{name}.fa").write_text(f">{name}\n{text}\n")
    task = DNA(length=48, source=str(folder / "train.fa"), validation=str(folder / "test.fa"))
    return dataclasses.replace(CONFIG, task=task)


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_add_up_to_the_batch(parts, dna):
    for config in (CONFIG, dna):
        whole, split = run(config), run(config, accumulation=parts)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
        assert_near(weights(split), weights(whole))
        assert_near(gradients(split), gradients(whole))
        assert split.execution["accumulation"] == parts


def test_checkpointed_activations_change_no_bit():
    whole, again = run(), run(checkpoint_activations=True)
    assert losses(again) == losses(whole)
    assert torch.equal(weights(again), weights(whole))
    assert again.model.checkpoint_activations is False


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(model):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros((2, 64), dtype=torch.long))
        return total

    model = CausalLM(dataclasses.replace(CONFIG.model_config(), num_layers=4))
    whole = kept(model)
    model.checkpoint_activations = True
    assert kept(model) < whole / 4
    with torch.no_grad():
        assert kept(model) == 0


def test_half_precision_is_near_and_its_weights_are_not_half():
    whole, half = run(), run(mixed_precision="bf16")
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=2e-2)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    # Evaluation is in full precision again.
    ids = torch.zeros((1, 4), dtype=torch.long)
    assert half.model(ids).dtype == torch.float32
    plain = CausalLM(half.model.config).eval()
    plain.load_state_dict(half.model.state_dict())
    assert torch.equal(plain(ids), half.model(ids))
    assert half.execution["mixed_precision"] == "bf16"


# torch's own, while it traces; here every warning is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_run_is_the_same_run(monkeypatch):
    # The graphs are captured; a compiler for C++ is not asked for.
    monkeypatch.setattr(execution_module, "COMPILER", "aot_eager")
    whole, compiled = run(), run(compile=True)
    assert losses(compiled) == pytest.approx(losses(whole), rel=1e-5)
    assert type(compiled.model) is CausalLM
    assert list(compiled.model.state_dict()) == list(whole.model.state_dict())


def test_runs_of_one_process_leave_no_state_behind():
    from accelerate.state import PartialState

    run(mixed_precision="bf16")
    assert not PartialState._shared_state
    assert run().execution["mixed_precision"] == "no"
    # Not even those that fail.
    with pytest.raises(ValueError, match="batch_size"):
        run(accumulation=3)
    assert not PartialState._shared_state


def test_what_was_launched_counts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run().execution["mixed_precision"] == "bf16"
    assert run(mixed_precision="no").execution["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision must be no or bf16, got 'fp16'"):
        run()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="leave gradient accumulation out.*got 4 steps there"):
        run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device must be cpu, cuda or None, got 'tpu'"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got 'fp16'"),
        ({"accumulation": 0}, "accumulation must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        Execution(**options)


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match="multiple of processes x accumulation = 1 x 3, got 8"):
        run(accumulation=3)
    with pytest.raises(TypeError, match="execution must be an Execution, got dict"):
        train(CONFIG, execution={})


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be cpu where there is no GPU, got 'cuda'"):
        Execution(device="cuda")
    with start(Execution()) as engine:
        assert engine.device.type == "cpu" and engine.is_main and engine.processes == 1


WORKER = """
import json, os, sys
import torch
import goatviz.training.loop as loop
from goatviz.cli import main
from goatviz.training import Execution, TrainConfig, train
from goatviz.training.evaluation import evaluate, evaluate_answers

loop.evaluate = lambda m, t, seed: evaluate(m, t, sequences=8, seed=seed)
loop.evaluate_answers = lambda m, t, seed: evaluate_answers(m, t, examples=8, seed=seed)
torch.set_num_threads(1)
found = []
for asked in json.load(open(sys.argv[1])):
    config = TrainConfig.from_dict(asked["config"])
    execution = Execution(device="cpu", accumulation=asked["accumulation"])
    result = train(config, progress=False, execution=execution)
    flat = torch.cat([p.detach().flatten() for p in result.model.parameters()])
    slopes = torch.cat([p.grad.flatten() for p in result.model.parameters()])
    found.append(
        {
            "losses": [entry["loss"] for entry in result.history],
            "held_out": result.held_out.mean,
            "weights": flat.tolist(),
            "gradients": slopes.tolist(),
            "execution": result.execution,
            "is_main": result.is_main,
        }
    )
json.dump(found, open(sys.argv[2] + os.environ["RANK"], "w"))
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def asked(dna):
    """Every scheme, weighted targets, masked targets, and micro-batches within processes."""
    schemes = [(dataclasses.replace(CONFIG, positions=it, steps=3), 1) for it in POSITION_SCHEMES]
    return [*schemes, (CONFIG, 2), (dna, 1), (dna, 4), (dataclasses.replace(dna, clip=0.05), 1)]


@pytest.fixture(scope="module")
def launched(asked, tmp_path_factory):
    """Two gloo processes on this machine: what both found, what both printed, the runs' folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    (folder / "asked.json").write_text(
        json.dumps([{"config": c.to_dict(), "accumulation": parts} for c, parts in asked])
    )
    places = [str(folder / name) for name in ("worker.py", "asked.json", "found")]
    command = ["train", "needle", "--out", str(folder / "runs"), "--name", "two"]
    command += ["--steps", "4", "--batch-size", "4", "--length", "24", "--value-length", "2"]
    command += ["--embed-dim", "32", "--device", "cpu", "--tensorboard", "False"]
    free = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RANK"))}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [*places, *command],
        env={**free, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    both = [json.loads((folder / f"found{rank}").read_text()) for rank in (0, 1)]
    return both, done.stdout, folder / "runs"


def test_two_processes_are_one_run(asked, launched):
    for (config, parts), first, second in zip(asked, *launched[0], strict=True):
        assert (first["is_main"], second["is_main"]) == (True, False)
        assert first["execution"]["processes"] == 2
        assert first["execution"]["accumulation"] == parts
        # Both processes hold the same model and say the same.
        for key in ("losses", "held_out", "weights", "gradients"):
            assert first[key] == second[key]
        alone = run(config)
        assert first["losses"] == pytest.approx(losses(alone), rel=1e-5), config.positions
        assert_near(torch.tensor(first["weights"]), weights(alone))
        assert_near(torch.tensor(first["gradients"]), gradients(alone))


def test_the_command_line_writes_once_for_two_processes(launched):
    _, printed, runs = launched
    assert printed.count("two.safetensors") == 1
    assert load_checkpoint(runs / "two").card["execution"]["processes"] == 2
    lines = (runs / "two.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    assert {path.name for path in runs.iterdir()} == {
        "two.safetensors",
        "two.json",
        "two.jsonl",
    }


def test_the_plain_model_is_what_is_kept():
    with start(Execution(device="cpu")) as engine:
        model = CausalLM(CONFIG.model_config())
        prepared, _ = engine.prepare(model, torch.optim.AdamW(model.parameters()))
        assert not isinstance(prepared, DistributedDataParallel) and prepared is model
        engine.release(prepared, model)
