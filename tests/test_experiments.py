"""Experiments are rehearsed at tiny scale: cut off, resumed, measured, and taken home in pieces.

What they find at the paper's scale needs a GPU and is not tested.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import goatviz
from experiments import __main__ as command
from experiments import _slices, _weights
from goatviz.examples import example_text
from goatviz.models import CausalLM
from goatviz.paper import claim_named
from goatviz.results import load_result
from goatviz.training import load_checkpoint

ROOT = Path(__file__).parents[1]
#: No file that is to be taken home may be larger.
LIMIT = 16 * 2**20
#: A limit of time that the first step exceeds.
AT_ONCE = ("--minutes=1e-9",)
RECORDS = ("cards.json", "log.jsonl", "priors.safetensors")


@pytest.fixture
def experiment(tmp_path):
    """Run an experiment at tiny scale in a folder of this test; return its exit status."""

    def run(*arguments: str, work: str = "work") -> int:
        places = ["--work", str(tmp_path / work), "--out", str(tmp_path / work / "out")]
        return command.main([*arguments, "--tiny", "--device", "cpu", *places])

    return run


@pytest.fixture
def documents(tmp_path) -> list[str]:
    """Options that name texts, a third of which is not trained on."""
    text = example_text()
    for at in range(6):
        file = tmp_path / ("valid" if at % 3 == 2 else "train") / f"{at}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text[4000 * at : 4000 * (at + 1)], encoding="utf-8")
    return ["--source", str(tmp_path / "train"), "--validation", str(tmp_path / "valid")]


@pytest.fixture
def bases(tmp_path) -> list[str]:
    """Options that name two FASTA files."""
    for name in ("train", "valid"):
        drawn = torch.randint(4, (2, 700)).tolist()
        records = ["".join("ACGT"[base] for base in record) for record in drawn]
        lines = [f">{name} {at}\n{record}\n" for at, record in enumerate(records)]
        (tmp_path / f"{name}.fa").write_text("".join(lines))
    return ["--source", str(tmp_path / "train.fa"), "--validation", str(tmp_path / "valid.fa")]


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Options that name images whose class is their brightness."""
    classes = np.arange(60) % 3
    images = (100 * classes[:, None, None, None] + np.zeros((1, 24, 24, 3))).astype(np.uint8)
    held = {f"x_{part}": images for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **held, **{f"y_{part}": classes for part in ("train", "test")})
    return ["--source", str(tmp_path / "a.npz")]


def brought_home(out: Path, name: str, *ends: str) -> dict[str, object]:
    """The tables of an experiment, after a check of everything beside them."""
    files = {path.name.removeprefix(f"{name}-"): path for path in out.iterdir()}
    assert files.keys() == {*RECORDS, *ends}
    assert max(path.stat().st_size for path in files.values()) < LIMIT
    cards = json.loads(files["cards.json"].read_text())
    assert all(
        card["command"].startswith(f"python -m experiments {name} ") for card in cards.values()
    )
    lines = [json.loads(line) for line in files["log.jsonl"].read_text().splitlines()]
    assert {line["run"] for line in lines} == cards.keys()
    assert any(
        ".blocks.1.attention.prior." in key for key in load_file(files["priors.safetensors"])
    )
    tables = {end: load_result(path) for end, path in files.items() if end.endswith(".nc")}
    words = tables["sweep.nc"].attrs["command"].split()
    assert not {"--out", "--work", "--minutes"} & set(words) and "--tiny" in words
    return tables


def test_a_run_cut_off_goes_on_bit_for_bit(experiment, tmp_path, capsys, slow):
    passkey = ["passkey", "--schemes", "goat", "rope"]
    for step in (1, 2):
        assert experiment(*passkey, *AT_ONCE) == _slices.UNFINISHED
        assert f"stopped at step {step} of 6" in capsys.readouterr().out
    folder = tmp_path / "work" / "passkey-tiny"
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "passkey-goat-0.state.safetensors"
    }
    assert experiment(*passkey) == experiment(*passkey, work="whole") == _slices.DONE
    for scheme in ("goat", "rope"):
        resumed, whole = (
            load_checkpoint(tmp_path / work / "passkey-tiny" / f"passkey-{scheme}-0").card
            for work in ("work", "whole")
        )
        for key in ("sha256", "losses", "history"):
            assert resumed[key] == whole[key]
    resumed, whole = (
        brought_home(tmp_path / work / "out", "passkey", "prior.nc", "sweep.nc")["sweep.nc"]
        for work in ("work", "whole")
    )
    assert resumed.drop_attrs().identical(whole.drop_attrs())
    assert list(whole["scheme"].values) == ["goat", "rope", "rope-interpolated"]
    assert whole.attrs["training_length"] == "64"
    assert list(whole["length"].values) == [64, 128, 256, 512, 1024]
    # The claims are judged by it at once.
    (judged,) = goatviz.judge_claims({"passkey-sweep": whole}, [claim_named("passkey")])
    assert [one.value for one in judged.measured] == [0.0] * len(judged.claim.rule)
    # Time that is over while nothing is left to train ends the measures; then they go on.
    assert experiment(*passkey, *AT_ONCE) == _slices.UNFINISHED
    assert "out of time while measuring" in capsys.readouterr().out
    assert experiment(*passkey) == _slices.DONE


def test_needle_is_asked_by_depth(experiment, tmp_path):
    assert experiment("needle", "--schemes", "goat") == _slices.DONE
    tables = brought_home(tmp_path / "work" / "out", "needle", "prior.nc", "grid.nc", "sweep.nc")
    assert list(tables["grid.nc"]["depth"].values) == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_language_models_are_measured_as_the_shipped_ones(experiment, documents, tmp_path, slow):
    assert experiment("language", *documents) == _slices.DONE
    ends = [f"{scheme}-{end}.nc" for scheme in ("goat", "rope", "alibi")
            for end in ("sinks", "signal", "sink-effect")]  # fmt: skip
    implied = ["rope-implied.nc", "alibi-implied.nc"]
    ends += ["prior.nc", "sweep.nc"]
    tables = brought_home(tmp_path / "work" / "out", "language", *ends, *implied)
    for ours, shipped in (
        ("rope-sink-effect.nc", "text-rope-sink-effect"),
        ("goat-signal.nc", "smollm2-signal"),
        ("goat-sinks.nc", "smollm2-last-layer-sinks"),
        ("alibi-implied.nc", "smollm2-last-layer-prior"),
        ("sweep.nc", "text-eltec"),
    ):
        wanted = goatviz.load_shipped_result(shipped)
        assert tables[ours].attrs["schema"] == wanted.attrs["schema"]
    assert tables["goat-sinks.nc"]["layer"].values.tolist() == [1]
    assert tables["sweep.nc"].sizes["scheme"] == 4 and tables["sweep.nc"].sizes["piece"] == 2


def test_dna_has_speed_and_memory(experiment, bases, tmp_path):
    assert experiment("dna", *bases, "--unseen", bases[-1]) == _slices.DONE
    out = tmp_path / "work" / "out"
    cost = brought_home(out, "dna", "prior.nc", "sweep.nc", "speed.nc")["speed.nc"]
    assert cost.attrs["schema"] == goatviz.load_shipped_result("dna-cost").attrs["schema"]
    assert cost["scheme"].values.tolist() == ["goat", "rope"]
    assert cost["length"].values.tolist() == [64, 96]
    assert (cost["tokens_per_second"] > 0).all() and (cost["peak_memory"] >= 0).all()
    # Attention is a part of a training step.
    assert (cost["attention_tokens_per_second"] > cost["tokens_per_second"]).all()


def test_images_are_read_at_finer_resolutions(experiment, pictures, tmp_path):
    assert experiment("vision", *pictures) == _slices.DONE
    sweep = brought_home(tmp_path / "work" / "out", "vision", "sweep.nc")["sweep.nc"]
    assert sweep.attrs["schema"] == goatviz.load_shipped_result("passkey-sweep").attrs["schema"]
    assert sweep["scheme"].values.tolist() == ["goat", "none", "learned"]
    # 7 patches across, and 384 / 224 and 512 / 224 times as many.
    assert sweep["length"].values.tolist() == [1 + across**2 for across in (7, 12, 16)]
    assert (sweep["examples"] == 8).all() and (sweep["tokens"] == 8).all()


def test_what_fails_stops_nothing_else(experiment, tmp_path, monkeypatch, capsys):
    def no_grid(*_, **__):
        raise RuntimeError("no grid today")

    monkeypatch.setattr("experiments.needle.needle_grid", no_grid)
    original = _slices.train

    def no_rope(config, **options):
        if config.positions == "rope":
            raise FloatingPointError("the loss is nan at step 3")
        return original(config, **options)

    monkeypatch.setattr(_slices, "train", no_rope)
    assert experiment("needle", "--schemes", "rope", "alibi") == _slices.FAILED
    printed = capsys.readouterr().out
    assert "needle-rope-0 FAILED" in printed and "the loss is nan at step 3" in printed
    assert "grid FAILED" in printed and "no grid today" in printed
    assert load_result(tmp_path / "work" / "out" / "needle-sweep.nc")["scheme"].values == ["alibi"]


def test_what_would_be_lost_is_refused_before_the_work(experiment, monkeypatch, capsys):
    assert experiment("needle", "--schemes", "alibi", *AT_ONCE) == _slices.UNFINISHED
    assert experiment("needle", "--schemes", "alibi") == _slices.DONE
    monkeypatch.setattr(_slices, "tiny", lambda recipe: recipe)
    with pytest.raises(SystemExit, match="2"):
        experiment("needle", "--schemes", "alibi")
    assert "of another recipe: give another folder" in capsys.readouterr().err
    monkeypatch.setattr(_slices, "find_spec", lambda name: None if name == "h5netcdf" else name)
    with pytest.raises(SystemExit, match="2"):
        experiment("needle", "--schemes", "goat")
    assert "results need h5netcdf, which are not installed" in capsys.readouterr().err


def test_recipes_are_those_of_the_paper(documents, bases, pictures, monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "run", lambda each, options, _: asked.update(each.runs(options)))
    for arguments in (["passkey"], ["needle"], ["language", *documents], ["dna", *bases]):
        command.main(arguments)
    assert len(asked) == 4 + 4 + 3 + 2
    for name, config in asked.items():
        assert config.embed_dim == 512 and config.num_heads == 8, name
        assert config.positions in name and config.task.name.replace("text", "language") in name
    passkey, dna = asked["passkey-goat-0"], asked["dna-goat-0"]
    assert (passkey.num_layers, passkey.task.length, passkey.task.value_length) == (12, 1024, 8)
    assert (passkey.steps, passkey.batch_size, passkey.prior_rank, passkey.sink_rank) == (
        *(2000, 32),
        *(8, 8),
    )
    assert (dna.num_layers, dna.batch_size, dna.steps, dna.prior_rank, dna.sink_rank) == (
        *(8, 8, 1000),
        *(2, 8),
    )
    command.main(["vision", *pictures])
    vision = asked["vision-goat-0"]
    assert (vision.embed_dim, vision.num_layers, vision.num_heads) == (384, 12, 6)
    assert (vision.prior_rank, vision.sink_rank, vision.learning_rate) == (16, 2, 5e-4)
    with torch.device("meta"):
        language = CausalLM(asked["language-rope-0"].model_config())
    assert 25e6 < sum(weight.numel() for weight in language.parameters()) < 125e6


def test_weights_go_home_in_pieces_and_come_back_rounded(experiment, tmp_path, capsys):
    assert experiment("passkey", "--schemes", "goat") == _slices.DONE
    source = tmp_path / "work" / "passkey-tiny" / "passkey-goat-0"
    shards, home, name = tmp_path / "shards", tmp_path / "home", "passkey-goat-0"
    cut = ["weights", str(source), "--out", str(shards), "--shard-bytes", "9001"]
    # In two calls, as where few files come home from each.
    assert command.main([*cut, "--shards", "1", "2"]) == 0
    with pytest.raises(SystemExit, match="2"):
        command.main(["join", str(shards), name, "--out", str(home)])
    assert "must hold passkey-goat-0.3-of-" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main([*cut, "--shards", "99"])
    assert "--shards must lie between 1 and" in capsys.readouterr().err
    assert command.main(cut) == 0
    for path in shards.iterdir():
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 9001
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert command.main(["join", str(shards), name, "--out", str(home)]) == 0
    ours, whole = load_checkpoint(home / name), load_checkpoint(source)
    assert ours.card["weights"] == _weights.ROUNDED
    assert ours.card["losses"] == whole.card["losses"]
    assert asdict(ours.model.config) == asdict(whole.model.config)
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[key], weight.half().float()), key


def test_the_first_ten_minutes_are_rehearsed(tmp_path, slow):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    script = ["bash", str(ROOT / "experiments" / "gpu_first_10_minutes.sh")]
    done = subprocess.run(
        [*script, "--tiny"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    summary = done.stdout.splitlines()[-4:]
    assert [line.split()[0] for line in summary] == ["ok"] * 4
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert len(files) <= 8 and max(path.stat().st_size for path in files.values()) < LIMIT
    assert {"first.log", "attention.json", "passkey-sweep.nc"} <= files.keys()
    assert subprocess.run([*script, "--wrong"], capture_output=True, check=False).returncode == 2
