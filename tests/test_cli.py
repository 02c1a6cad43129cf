"""The command line: each command does its job, and a bad argument is one clear line."""

import json
import shlex

import pytest

import goatviz.paper as paper
from goatviz.cli import main
from goatviz.training import list_pretrained, load_checkpoint

TINY = ["--steps", "3", "--batch-size", "2", "--length", "8", "--vocab-size", "5"]


def test_reproduce_prints_where_the_page_is(tmp_path, capsys, monkeypatch):
    exhibits = paper.make_exhibits()[:1]
    monkeypatch.setattr(paper, "make_exhibits", lambda: exhibits)
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size > 4_000_000


def test_pretrained_lists_all(capsys):
    assert main(["pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list_pretrained()


def test_a_trained_checkpoint_repeats_itself_from_its_card(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "runs"), "--offset", "2", *TINY]) == 0
    assert "held-out loss" in capsys.readouterr().out
    first = load_checkpoint(tmp_path / "runs" / "copy-mixture-2-goat")
    program, *arguments = shlex.split(first.card["command"])
    assert program == "goatviz"
    assert main([*arguments, "--overwrite"]) == 0
    second = load_checkpoint(tmp_path / "runs" / "copy-mixture-2-goat")
    assert second.card["sha256"] == first.card["sha256"]
    assert second.card["losses"] == first.card["losses"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    arguments = ["train", "--out", str(tmp_path), "--name", "run", *TINY]
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
        (["--offset", "0"], "offset must be an integer of at least 1, got 0"),
        (["--offset", "99"], "offset must not exceed length=8, got 99"),
        (["--positions", "goats"], "positions must be one of goat"),
        (["--first", "0.9", "--previous", "0.4"], "first + previous must not exceed 1"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--steps", "0"], "steps must be an integer of at least 1"),
    ],
)
def test_bad_values_are_one_clear_line(tmp_path, capsys, arguments, words):
    assert main(["train", "--out", str(tmp_path / "runs"), *TINY, *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and told.count("\n") == 0
    assert not (tmp_path / "runs").exists()


def test_unknown_flags_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(tmp_path), "--speed", "9"])
    assert stopped.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "figures").write_text("x")
    assert main(["reproduce", "--out", str(tmp_path / "figures")]) == 2
    assert "out must be a folder" in capsys.readouterr().err
