"""Benchmarks run at tiny scale and print the columns they promise; their speed is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
RUNS = {
    "diagnostics": (
        # Two dense cases are measured in processes of their own all the same.
        ["--lengths", "64", "--single-head-lengths", "--repeats", "1", "--heads", "2"]
        + ["--no-memory"],
        ("one SDPA forward", "cheap set, GOAT prior", "block-wise dense, full", "targets:", "MiB"),
    ),
    "explorers": (
        ["--sizes", "40", "--plain-sizes", "--prior-lengths", "--long", "300", "--real", "40"]
        + ["--presses", "1", "--updates", "2", "--steps", "1", "--peer-length", "16"],
        (
            "another head, its map",
            "270 thumbnails",
            "zoom in, 1 steps",
            "memory of the page",
            "goatviz save_html",
        ),
    ),
    "imports": (
        ["--repeats", "1"],
        (
            "target: import goatviz within 50 ms beyond bare interpreter",
            "target: goatviz.plot_prior within 500 ms beyond import torch",
            "target: goatviz --help within 300 ms",
            "import goatviz: none",
            "goatviz.plot_prior: torch plotly numpy\n",
        ),
    ),
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
            "--profile-lengths",
            "64",
            "--repeats",
            "1",
            "--no-memory",
        ],
        ("worst head", "goat-attention bf16", "goatviz bf16", "ratio", "mixer"),
    ),
    "real_models": (
        ["--lengths", "32", "--repeats", "1", "--no-memory"],
        ("forward pass", "certified", "sink_profile", "implied_prior", "eager, with weights"),
    ),
    "training": (
        ["--lengths", "40", "--evaluation-length", "64"]
        + ["--repeats", "1", "--evaluation-repeats", "1", "--no-memory"],
        ("goat-attention", "goat, 23 + 9", "chunks of 256", "x rope", "agree to 1e-4: met"),
    ),
    "transport": (["--sizes", "16", "--repeats", "1"], ("semi", "balanced", "agrees")),
}


@pytest.fixture
def benchmark():
    """Run a benchmark; return what it prints."""

    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.browser) if n == "explorers" else n for n in RUNS],
)
def test_a_benchmark_runs_and_prints_its_columns(benchmark, name):
    arguments, columns = RUNS[name]
    text = benchmark(name, *arguments)
    for column in columns:
        assert column in text, text


def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    """One that `training` starts for every line."""
    for kind, case in (("step", "goat"), ("evaluation", "one pass")):
        peak = float(benchmark("training", "--alone", kind, case, "2048"))
        # Far above what one batch of ids takes, far below a plan of 4 x 2,048 x 2,048 numbers.
        assert 1 < peak < 400


def test_every_benchmark_is_tested_and_documented():
    scripts = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert scripts == set(RUNS)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        assert f"{script}.py" in readme
