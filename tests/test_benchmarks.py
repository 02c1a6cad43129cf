"""Benchmarks run at tiny scale and write the records they promise; their speed is not tested.

What READMEs show of them is rendered from the committed records, and never typed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks._pages import documents, fill, page, scaling, view

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
#: Metrics and cases that each promises.
PROMISED = {
    "attention": (
        {"forward", "forward + backward", "decoding step", "training step", "ceiling"}
        | {"forward: share", "forward: slope", "training step: slope"},
        {"SDPA + RoPE", "SDPA + ALiBi as a mask", "goatviz, lanes beside", "goatviz, lanes inside"}
        | {"layer: goat-attention", "rope", "goat", "goat, 23 + 9", "goat-attention"},
    ),
    "diagnostics": (
        {"seconds", "heads"},
        {"one SDPA forward", "cheap set, GOAT prior", "block-wise dense, full + incoming"},
    ),
    "evaluation": ({"evaluation"}, {"one pass", "chunks of 1,024", "chunks of 256"}),
    "explorers": (
        {"median", "worst", "sent", "target", "page"},
        {"plan 40: another head, its map", "SmolLM2 40: explorer with 270 thumbnails"}
        | {"plan 300: zoom in, 1 steps", "goatviz save_html"},
    ),
    "imports": ({"wall", "CPU"}, {"import goatviz", "goatviz.plot_prior", "goatviz --help"}),
    "plots": ({"plot_prior", "to_json", "payload"}, {"1 x 2 heads, kernel"}),
    "precision": (
        {"fp32 out", "bf16 dq", "bf16 dk", "fp16 dv", "bf16 dq, rounded output"},
        {"no prior", "sink", "recency", "high frequencies", "GOAT"},
    ),
    "priors": ({"profile", "profile of a head", "mixer", "mix"}, {"1 head", "8 heads"}),
    "real_models": (
        {"seconds"},
        {"forward pass", "mass on the first key, certified", "sink_profile", "implied_prior"}
        | {"eager, with weights"},
    ),
    "transport": (
        {"POT", "closed form", "difference", "verdict"},
        {"semi_relaxed, tau = 1", "balanced, tau = 1e-06", "linear_programme, tau = 1"},
    ),
}
RECORD = {"table", "case", "length", "metric", "value", "unit", "ratio", "peak"}


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
    [pytest.param(n, marks=pytest.mark.browser) if n == "explorers" else n for n in PROMISED],
)
def test_a_benchmark_runs_and_writes_what_it_prints(benchmark, tmp_path, name):
    printed = benchmark(name, "--quick", "--out", str(tmp_path))
    document = documents(tmp_path)[name]
    metrics, cases = PROMISED[name]
    assert metrics <= {row["metric"] for row in document["rows"]}
    assert cases <= {row["case"] for row in document["rows"]}
    assert {frozenset(row) for row in document["rows"]} == {frozenset(RECORD)}
    assert document["machine"].keys() == {"cpu", "cores", "threads", "gpu"}
    assert document["versions"].keys() >= {"Python", "torch", "goatviz", "goat-attention"}
    assert document["arguments"]["device"] == "cpu"
    if name == "imports":
        loaded = "heavy modules loaded by import goatviz"
        assert document["notes"][0] == f"{loaded}: none"
        assert document["notes"][1] == f"{loaded}; goatviz.plot_prior: torch plotly numpy"
    # A file says what was printed, table by table; the tables may be filled in turn.
    assert sorted(view(document, None).splitlines()[1:-1]) == sorted(printed.splitlines())


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("attention", ("training step", "goat", "2048")),
        ("attention", ("float32", "goatviz, lanes beside", "2048")),
        ("evaluation", ("one pass", "2048")),
    ],
)
def test_memory_is_measured_in_a_process_of_its_own(benchmark, name, which):
    """One that starts for every line."""
    peak = float(benchmark(name, "--alone", *which))
    # Far above what one batch of ids takes, far below a plan of 4 x 2,048 x 2,048 numbers a layer.
    assert 1 < peak < 400


@pytest.mark.usefixtures("benchmark")
def test_one_command_runs_named_benchmarks_and_writes_their_pages(tmp_path, capfd):
    assert command.main(["evaluation", "--quick", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    found = documents(tmp_path)
    assert list(found) == ["evaluation"]
    assert view(found["evaluation"], None).splitlines()[1] in printed
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == page(found)


@pytest.mark.parametrize("arguments", [["nothing"], ["imports", "--device", "cuda"]])
def test_a_benchmark_that_is_not_there_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "NAME must be of attention" in capsys.readouterr().err


def test_every_benchmark_is_tested_and_documented():
    scripts = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert scripts == set(PROMISED) == set(command.NAMES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        assert f"{script}.py" in readme


# --- what READMEs show ---


@pytest.mark.parametrize("path", command.READMES, ids=lambda path: path.parent.name)
def test_a_readme_shows_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- benchmark: attention" in text
    assert fill(text, documents(command.RESULTS)) == text, "run python -m benchmarks --render"


def test_the_folder_of_results_holds_records_alone():
    for path in command.RESULTS.iterdir():
        assert path.suffix == ".json"
        assert json.loads(path.read_text(encoding="utf-8"))["name"] == path.stem


def test_every_committed_result_is_shown():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in documents(command.RESULTS):
        assert f"<!-- benchmark: {name} -->" in text


def test_a_block_of_an_unknown_benchmark_or_view_is_refused():
    found = documents(command.RESULTS)
    with pytest.raises(ValueError, match="no result"):
        fill("<!-- benchmark: nothing -->\n<!-- end -->", found)
    with pytest.raises(ValueError, match="a block must show"):
        fill("<!-- benchmark: attention, everything -->\n<!-- end -->", found)


def test_ratios_are_those_of_the_records():
    document = documents(command.RESULTS)["attention"]
    lines = view(document, "ratios of goatviz, lanes").splitlines()
    head, _, first, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    for length, cell in zip(head[2:], first[2:], strict=True):
        (row,) = (
            row
            for row in document["rows"]
            if row["ratio"] is not None
            and [row["metric"], row["case"], f"{row['length']:,}"] == [*first[:2], length]
        )
        assert cell == f"{row['ratio']:.2f}"
    assert all("goatviz, lanes" in line for line in lines[2:])


def test_growth_is_drawn_on_logarithmic_axes():
    found = documents(command.RESULTS)
    figure = scaling(found["attention"])
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    (trace,) = (t for t in figure.data if t.name == "SDPA + RoPE" and t.xaxis == "x")
    rows = found["attention"]["rows"]
    points = [r for r in rows if (r["case"], r["metric"]) == ("SDPA + RoPE", "forward")]
    assert list(trace.x) == [row["length"] for row in points]
    assert list(trace.y) == [row["value"] for row in points]
    assert scaling(found["precision"]) is None, "errors are no times"
