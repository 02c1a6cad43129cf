"""The command line: each command does its job, and a bad argument is one clear line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from goatviz import analysis
from goatviz.cli import main
from goatviz.paper import claims_text, copy_mixture, gallery
from goatviz.results import load_result
from goatviz.training import list_pretrained, load_checkpoint, load_pretrained, loop
from goatviz.training.execution import Engine

TINY = ["--steps", "3", "--batch-size", "2", "--length", "8", "--vocab-size", "5"]


def test_reproduce_prints_verdicts_and_where_the_page_is(tmp_path, capsys, monkeypatch, judged):
    exhibit = copy_mixture.kernel(load_pretrained("copy-mixture-4-goat"))
    monkeypatch.setattr(gallery, "make_exhibits", lambda evidence: [exhibit])
    monkeypatch.setattr(gallery, "judge_claims", lambda evidence: judged)
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    *verdicts, page = capsys.readouterr().out.splitlines()
    assert page == str(tmp_path / "index.html")
    assert verdicts == claims_text(judged).splitlines()
    assert (tmp_path / "index.html").stat().st_size > 4_000_000


def test_pretrained_lists_all(capsys):
    assert main(["pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list_pretrained()


def test_a_trained_checkpoint_repeats_itself_from_its_card(tmp_path, capsys):
    assert (
        main(["train", "copy-mixture", "--out", str(tmp_path / "runs"), "--offset", "2", *TINY])
        == 0
    )
    assert "held-out loss" in capsys.readouterr().out
    first = load_checkpoint(tmp_path / "runs" / "copy-mixture-2-goat")
    program, *arguments = shlex.split(first.card["command"])
    assert program == "goatviz"
    assert main([*arguments, "--overwrite"]) == 0
    second = load_checkpoint(tmp_path / "runs" / "copy-mixture-2-goat")
    assert second.card["sha256"] == first.card["sha256"]
    assert second.card["losses"] == first.card["losses"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), "--name", "run", *TINY]
    assert main(arguments) == 0
    before = (tmp_path / "run.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--seed", "5"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and "--overwrite" in told and "run" in told
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--offset", "0"], "goatviz: --offset must be an integer of at least 1, got 0"),
        (["--offset", "99"], "goatviz: --offset must not exceed --length=8, got 99"),
        (["--positions", "goats"], "goatviz: --positions must be one of goat"),
        (["--first", "0.9", "--previous", "0.4"], "goatviz: --first + --previous must not exceed"),
        (["--learning-rate", "-1"], "goatviz: --learning-rate must be positive"),
        (["--steps", "0"], "goatviz: --steps must be an integer of at least 1"),
        (["--save-every", "0"], "goatviz: --save-every must be an integer of at least 1"),
        (["--accumulation", "3"], "goatviz: --batch-size must be a multiple of"),
        (["--name", ""], "goatviz: --name must be a file name, got ''"),
        (["--name", "a/b"], "goatviz: --name must be a file name, got 'a/b'"),
        (["--resume"], "goatviz: --resume found no training state at"),
    ],
)
def test_bad_values_are_one_clear_line(tmp_path, capsys, arguments, words):
    assert main(["train", "copy-mixture", "--out", str(tmp_path / "runs"), *TINY, *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told.splitlines()[-1] and "Traceback" not in told
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_costs_no_unfinished_one(tmp_path, capsys):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), "--name", "run", *TINY]
    kept = {"run.state.safetensors": b"state", "run.jsonl": b"log"}
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    assert main([*arguments, "--overwrite", "--save-every", "0"]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/x", "/proc/x"])
@pytest.mark.parametrize("command", ["reproduce", "train", "sweep", "sweep --cache"])
def test_an_out_that_cannot_be_written_is_told_before_the_work(
    tmp_path, capsys, monkeypatch, command, place
):
    def worked(*given, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(gallery, "make_exhibits", worked)
    monkeypatch.setattr(loop, "_run", worked)
    monkeypatch.setattr(analysis, "load_runs", worked)
    (tmp_path / "file").write_text("x")
    out = str(tmp_path / place)
    arguments = {
        "reproduce": ["reproduce", "--out", out],
        "train": ["train", "copy-mixture", *TINY, "--out", out],
        "sweep": ["sweep", str(tmp_path), "--out", f"{out}/sweep.nc"],
        "sweep --cache": ["sweep", str(tmp_path), "--out", f"{tmp_path}/a/b.nc", "--cache", out],
    }[command]
    assert main(arguments) == 2
    (told,) = capsys.readouterr().err.splitlines()
    option = "--cache" if "--cache" in command else "--out"
    subject = f"the folder of {option}" if command == "sweep" else option
    assert told.startswith(f"goatviz: {subject} must be a folder that can be written to, got {out}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_place_of_the_table(tmp_path, capsys):
    (tmp_path / "a.nc").mkdir()
    assert main(["sweep", str(tmp_path), "--out", str(tmp_path / "a.nc"), "--overwrite"]) == 2
    assert "--out must be a file, got the folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def needle_run(tmp_path_factory):
    """A folder with one untrained needle model."""
    runs = tmp_path_factory.mktemp("needle")
    sizes = ["--steps", "1", "--batch-size", "2", "--embed-dim", "32", "--content-dim", "8"]
    assert main(["train", "needle", "--out", str(runs), *sizes]) == 0
    return runs


@pytest.mark.parametrize("command", ["reproduce", "train", "sweep"])
def test_ctrl_c_is_one_line_and_keeps_what_was_finished(tmp_path, needle_run, command):
    out, cells = tmp_path / "out", tmp_path / "cells"
    state = out / "run.state.safetensors"
    lengths = map(str, range(32, 4096))
    many = ["--steps", "1000000", "--save-every", "1", "--name", "run"]
    arguments, at_work, kept = {
        "reproduce": (["--out", str(out)], out.exists, []),
        "train": (["copy-mixture", *TINY, *many, "--out", str(out)], state.exists, [state]),
        "sweep": (
            [str(needle_run), "--out", str(out / "a.nc"), "--cache", str(cells)]
            + ["--examples", "1", "--lengths", *lengths],
            # Files that are still being written have no dash.
            lambda: any(cells.glob("*-*.json")),
            [cells],
        ),
    }[command]
    # A shell's background job ignores SIGINT, and so would what it starts.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from goatviz.cli import main; raise SystemExit(main())"
    )
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program, command, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        )
        try:
            while not at_work():
                assert process.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    told = (tmp_path / "stderr").read_text()
    assert told.splitlines()[-1].startswith("goatviz: stopped") and "Traceback" not in told
    assert all(path.exists() for path in kept)
    # A folder that nothing was written to is gone again.
    assert out.exists() == (command == "train")


def test_a_needle_run_says_how_many_answers_are_right(tmp_path, capsys):
    options = ["--steps", "2", "--batch-size", "2", "--length", "24", "--value-length", "2"]
    options += ["--embed-dim", "32", "--num-layers", "1", "--positions", "rope"]
    assert main(["train", "needle", "--preset", "tiny", "--out", str(tmp_path), *options]) == 0
    told = capsys.readouterr().out
    assert "needle-rope.safetensors" in told and "(chance 25%)" in told
    card = load_checkpoint(tmp_path / "needle-rope").card
    assert card["config"]["task"] == {
        "name": "needle",
        "length": 24,
        "value_length": 2,
        "alphabet": "abcd",
        "depths": [0.0, 0.8],
        "distractors": 0,
        "haystack": None,
    }
    assert card["losses"]["answers_examples"] == 256 and "bayes_optimal" not in card["losses"]


def test_presets_are_where_flags_start(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "passkey", "--preset", "paper", "--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--embed-dim INT (default: 512)" in told and "--length INT" in told
    assert "{fixed}" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["haystack"],
            "task must be one of copy-mixture, passkey, needle, text, dna, images, got 'haystack'",
        ),
        (["passkey", "--preset", "huge"], "preset of passkey must be one of tiny, small, paper"),
        (["--preset", "tiny", "passkey"], "TASK comes first: goatviz train passkey --preset tiny"),
    ],
)
def test_tasks_and_presets_that_are_not_there(capsys, arguments, words):
    assert main(["train", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and told.count("\n") == 0


def test_unfinished_runs_are_neither_lost_nor_gone_on_with_unasked(tmp_path, capsys):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), "--name", "run", *TINY]
    state = tmp_path / "run.state.safetensors"
    state.write_bytes(b"kept")
    assert main(arguments) == 2
    assert "unfinished run run: pass --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err and state.read_bytes() == b"kept"
    assert main([*arguments, "--resume", "--overwrite"]) == 2
    assert "contradict each other" in capsys.readouterr().err and state.exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run",
        "run.json",
        "run.jsonl",
        "run.safetensors",
    ]
    assert main([*arguments, "--resume", "--name", "other"]) == 2
    assert "no training state at" in capsys.readouterr().err


def test_a_killed_run_that_replaces_a_checkpoint_can_go_on(tmp_path, capsys, monkeypatch):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), "--name", "run", *TINY]
    arguments += ["--save-every", "1"]
    assert main(arguments) == 0
    whole = load_checkpoint(tmp_path / "run").card
    original = Engine.take_step

    def killed(self, config, model, optimizer, data, step):
        if step == 2:
            raise KeyboardInterrupt
        return original(self, config, model, optimizer, data, step)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "take_step", killed)
        capsys.readouterr()
        assert main([*arguments, "--overwrite"]) == 130
        assert "pass --resume to go on" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "--resume"]) == 0
    resumed = load_checkpoint(tmp_path / "run").card
    assert resumed["sha256"] == whole["sha256"]
    # The command of its card repeats the whole run.
    assert resumed["command"] == whole["command"]


def test_a_run_out_of_time_says_how_to_go_on(tmp_path, capsys):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), "--name", "run", *TINY]
    assert main([*arguments, "--minutes", "1e-9"]) == 3
    assert "stopped at step 1 of" in (last := capsys.readouterr().err.splitlines()[-1])
    assert last.endswith("pass --resume to go on")
    assert main([*arguments, "--resume", "--minutes", "1e-9"]) == 3
    assert main([*arguments, "--resume", "--minutes=60"]) == 0
    card = load_checkpoint(tmp_path / "run").card
    assert card["command"].split() == ["goatviz", *arguments]


def test_a_loss_that_is_not_finite_is_one_clear_line(tmp_path, capsys):
    arguments = ["train", "copy-mixture", "--out", str(tmp_path), *TINY]
    assert main([*arguments, "--learning-rate", "1e30", "--warmup", "0"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("goatviz: the loss is ")


def test_unknown_flags_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "copy-mixture", "--out", str(tmp_path), "--speed", "9"])
    assert stopped.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "figures").write_text("x")
    assert main(["reproduce", "--out", str(tmp_path / "figures")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err


def test_a_folder_is_swept(tmp_path, capsys):
    options = ["--steps", "1", "--batch-size", "2", "--embed-dim", "32", "--content-dim", "8"]
    runs = tmp_path / "runs"
    for positions in ("goat", "rope"):
        arguments = ["train", "needle", "--out", str(runs), "--positions", positions, *options]
        assert main(arguments) == 0
    capsys.readouterr()
    out = tmp_path / "sweep.nc"
    sweep = ["sweep", str(runs), "--lengths", "32", "80", "--examples", "3", "--out", str(out)]
    cached = [*sweep, "--cache", str(tmp_path / "cells")]
    assert main(cached) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("goat (1 run), whole answers right: ") and told[-1] == str(out)
    result = load_result(out)
    assert result["scheme"].values.tolist() == ["goat", "rope", "rope-interpolated"]
    assert result["length"].values.tolist() == [32, 80] and int(result["examples"].max()) == 3
    assert result.attrs["command"] == shlex.join(["goatviz", *cached])
    assert len(list((tmp_path / "cells").iterdir())) == 6
    assert main(sweep) == 2
    assert "is there already: pass --overwrite" in capsys.readouterr().err
    both = tmp_path / "both.nc"
    joining = [*cached[:-4], "--cache", cached[-1], "--out", str(both), "--join", str(out)]
    assert main(joining) == 0
    assert "goat (1 run and those joined)" in capsys.readouterr().out
    joined = load_result(both)
    assert joined.sizes["run"] == 2 and joined.attrs["command"].count("goatviz sweep") == 2
    assert (joined["right"].isel(run=1) == result["right"].isel(run=0)).all()
    joining[joining.index("32")] = "48"
    assert main([*joining, "--overwrite"]) == 2
    told = capsys.readouterr().err
    assert f"--join {out}: sweeps must have the same lengths, got 32, 80 and 48, 80" in told
    assert load_result(both).identical(joined)
    grid = [*sweep, "--depths", "0.2", "0.8", "--overwrite"]
    assert main(grid) == 0
    assert load_result(out)["depth"].values.tolist() == [0.2, 0.8]
    assert main(["sweep", str(runs), "--out", str(tmp_path / "sweep.csv")]) == 2
    assert "--out must end in .nc, got sweep.csv" in capsys.readouterr().err
    deep = tmp_path / "new" / "sweep.nc"
    assert main(["sweep", str(runs), "--lengths", "32", "--examples", "1", "--out", str(deep)]) == 0
    assert deep.exists()
    nothing = ["sweep", str(tmp_path / "nowhere"), "--out", str(tmp_path / "none" / "sweep.nc")]
    assert main([*nothing, "--cache", str(tmp_path / "none" / "cells")]) == 2
    assert "folder must be an existing folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_small_weights_are_flushed_to_zero_while_it_runs_and_kept_after(tmp_path, monkeypatch):
    flushed = []

    def write(*arguments, **options):
        flushed.append(float(torch.tensor(1e-38) * 0.1) == 0)
        raise ValueError("enough")

    monkeypatch.setattr("goatviz.training.train", write)
    assert main(["train", "copy-mixture", "--out", str(tmp_path)]) == 2
    assert flushed == [True]
    assert float(torch.tensor(1e-38) * 0.1) > 0


def test_a_sweep_names_what_it_left_out(tmp_path, capsys):
    options = ["--steps", "1", "--batch-size", "2", "--embed-dim", "32", "--content-dim", "8"]
    assert main(["train", "needle", "--out", str(tmp_path), "--name", "good", *options]) == 0
    for name in ("huge", "torn"):
        for ending in (".json", ".safetensors"):
            shutil.copy(tmp_path / f"good{ending}", tmp_path / f"{name}{ending}")
    card = json.loads((tmp_path / "huge.json").read_text())
    card["model"]["num_layers"] = 10**9
    card["format"] = "goatviz-checkpoint-1"
    del card["card_sha256"]
    (tmp_path / "huge.json").write_text(json.dumps(card))
    (tmp_path / "torn.safetensors").write_bytes(b"")
    capsys.readouterr()
    out = tmp_path / "out" / "sweep.nc"
    sweep = ["sweep", str(tmp_path), "--lengths", "32", "--examples", "1", "--out", str(out)]
    assert main(sweep) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if "goatviz" in line]
    assert len(told) == 2
    assert told[0].startswith("goatviz: left out: huge.safetensors does not fit the model in its")
    assert told[1].startswith("goatviz: left out: torn.safetensors is not the file its card")
    assert load_result(out)["scheme"].values.tolist() == ["goat"]


def test_documents_are_swept(tmp_path, capsys):
    for name, text in (("train", "It rained. "), ("valid", "It shone. "), ("test", "It blew. ")):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.txt").write_text(text * 30)
    options = ["--steps", "1", "--batch-size", "2", "--embed-dim", "32", "--content-dim", "8"]
    options += ["--source", str(tmp_path / "train"), "--validation", str(tmp_path / "valid")]
    runs, out = tmp_path / "runs", tmp_path / "sweep.nc"
    arguments = ["train", "text", "--out", str(runs), "--positions", "alibi", *options]
    assert main([*arguments, "--length", "32"]) == 0
    capsys.readouterr()
    sweep = ["sweep", str(runs), "--lengths", "16", "64", "--out", str(out)]
    assert main(sweep) == 2
    assert "holds models of text: pass --source with documents" in capsys.readouterr().err
    assert main([*sweep, "--source", str(tmp_path / "train")]) == 2
    assert "is what these models were trained on" in capsys.readouterr().err
    new = [*sweep, "--source", str(tmp_path / "test"), "--per-document", "2"]
    assert main([*new, "--depths", "0.5"]) == 2
    assert "documents have no answers" in capsys.readouterr().err
    assert not out.exists()
    assert main(new) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("alibi (1 run), loss [nats/token]: 5.") and told[-1] == str(out)
    result = load_result(out)
    assert result.attrs["source"] == str(tmp_path / "test")
    assert result.attrs["command"] == shlex.join(["goatviz", *new])
    assert result.sizes["piece"] == 4
    both = tmp_path / "both.nc"
    new[new.index(str(out))] = str(both)
    joining = [*new, "--join", str(out)]
    assert main(joining) == 0
    assert "alibi (1 run and those joined)" in capsys.readouterr().out
    joined = load_result(both)
    assert joined.sizes["run"] == 2 and joined.attrs["command"].count("goatviz sweep") == 2
    assert (joined["loss"].isel(run=1) == result["loss"].isel(run=0)).all()
    joining[joining.index("2")] = "1"
    assert main([*joining, "--overwrite"]) == 2
    told = capsys.readouterr().err
    assert f"--join {out}: sweeps must be of the same questions, got documents" in told
    assert load_result(both).identical(joined)


def test_answers_have_no_documents(tmp_path, capsys):
    sizes = ["--steps", "1", "--batch-size", "2", "--embed-dim", "32", "--content-dim", "8"]
    assert main(["train", "needle", "--out", str(tmp_path), *sizes]) == 0
    assert main(["sweep", str(tmp_path), "--source", "x", "--out", str(tmp_path / "a.nc")]) == 2
    assert "--source, --documents and --per-document are for text" in capsys.readouterr().err


def test_a_missing_package_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    streamed = ["--source", "hf:allenai/c4:en:train", "--validation", "hf:allenai/c4:en:validation"]
    assert main(["train", "text", "--out", str(tmp_path), "--steps", "1", *streamed]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "needs the package datasets: pip install 'goatviz[train]'" in told
