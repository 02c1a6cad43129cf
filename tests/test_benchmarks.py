"""Benchmarks run at tiny scale and print the columns they promise; their speed is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
RUNS = {
    "diagnostics": (
        ["--lengths", "64", "--single-head-lengths", "--repeats", "1", "--heads", "2"],
        ("one SDPA forward", "cheap set, GOAT prior", "block-wise dense, full", "targets:", "MiB"),
    ),
    "imports": (["--repeats", "1"], ("above bare", "target: import goatviz", ": none")),
    "plots": (
        ["--lengths", "50", "--large-lengths", "--repeats", "1"],
        ("plot_prior", "payload", "payload below 2 MB: met"),
    ),
    "priors": (
        [
            "--lengths",
            "64",
            "--sample",
            "16",
            "--cost-lengths",
            "64",
            "--repeats",
            "1",
            "--no-memory",
        ],
        ("worst head", "goat-attention bf16", "goatviz bf16", "ratio"),
    ),
    "transport": (["--sizes", "16", "--repeats", "1"], ("semi", "balanced", "agrees")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_and_prints_its_columns(name):
    arguments, columns = RUNS[name]
    run = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for column in columns:
        assert column in run.stdout, run.stdout


def test_every_benchmark_is_tested_and_documented():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(RUNS)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        assert f"{script}.py" in readme
