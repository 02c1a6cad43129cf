"""The import law, kept by import-linter and ruff with the rules of pyproject.toml, and broken here.

    checks, bins, derived, files, pages <- results <- priors <- transport <- attention
          <- models, tasks, adapters <- training <- analysis
          <- environment, figures, explore, paper <- cli
    results <- plots <- figures, explore, paper

Beyond what the linters can say: every package that is imported is declared, and the whole of
goatviz imports without the optional extras.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in SETTINGS["tool"]["importlinter"]["contracts"]}
DEFERRED = SETTINGS["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
#: Distributions whose modules go by another name.
IMPORT_NAMES = {"pot": "ot", "goat-attention": "goat", "ipykernel": "IPython"}

#: One breach of each contract: the module that gets a line, and the line.
BREACHES = {
    "layers": ("priors/base.py", "import goatviz.attention"),
    "plots": ("plots/style.py", "import goatviz.transport"),
    "torch": ("results.py", "import torch"),
    "plotly": ("analysis/plan.py", "import plotly"),
    "widgets": ("figures.py", "def f():\n    import ipywidgets"),
    "facade": ("tasks/base.py", "import goatviz"),
    "cycles": ("checks.py", "import goatviz.bins\nimport goatviz.checks"),
}


def broken_contracts(folder: Path) -> set[str]:
    """The ids of the contracts that the package in a folder breaks."""
    lint = "from importlinter.cli import lint_imports; lint_imports(no_cache=True, no_logo=True)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {lint}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = dict(re.findall(r"^(\S.*\S) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert verdicts.keys() == {c["name"] for c in CONTRACTS.values()}, done.stdout + done.stderr
    return {name for name, c in CONTRACTS.items() if verdicts[c["name"]] == "BROKEN"}


def test_the_package_keeps_every_contract():
    assert broken_contracts(ROOT) == set()


def test_every_contract_catches_its_breach(tmp_path):
    package = tmp_path / "goatviz"
    shutil.copytree(ROOT / "goatviz", package, ignore=shutil.ignore_patterns("__pycache__", "*.nc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert BREACHES.keys() == CONTRACTS.keys()
    for file, line in BREACHES.values():
        with (package / file).open("a", encoding="utf-8") as module:
            module.write(f"\n{line}\n")
    assert broken_contracts(tmp_path) == CONTRACTS.keys()


def test_a_module_without_a_place_in_the_order_is_caught(tmp_path):
    package = tmp_path / "goatviz"
    shutil.copytree(ROOT / "goatviz", package, ignore=shutil.ignore_patterns("__pycache__", "*.nc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (package / "more.py").touch()
    assert broken_contracts(tmp_path) == {"layers"}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("def f():\n    import json\n", "PLC0415"),
        ("async def f():\n    from goatviz.priors.base import Prior\n", "PLC0415"),
        ("import transformers\n", "TID253"),
        ("from goat import GOATAttention\n", "TID253"),
        ("from . import base\n", "TID252"),
        ("import importlib\n\nx = importlib.import_module('torch')\n", "TID251"),
        ("def f():\n    import transformers\n", None),
        ("import goatviz.priors.base\n", None),
    ],
)
def test_how_a_module_may_import(source, rule):
    rules = ["--select", "PLC0415,TID", "--output-format", "concise"]
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", *rules]
    done = subprocess.run(
        [*ruff, "--stdin-filename", "goatviz/tasks/new.py", "-"],
        input=source,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(re.findall(r"\b(?:PLC|TID)\d+\b", done.stdout)) == ({rule} if rule else set())
    assert done.returncode == bool(rule), done.stderr


def test_every_package_that_is_imported_is_declared():
    graph = grimp.build_graph("goatviz", include_external_packages=True, cache_dir=None)
    outside = {name.split(".")[0] for name in graph.modules} - {"goatviz"}
    project = SETTINGS["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {canonicalize_name(Requirement(line).name) for group in groups for line in group}
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    assert outside - set(sys.stdlib_module_names) <= declared


def test_the_whole_package_imports_without_the_extras():
    blocked = sorted(set(DEFERRED) - {"accelerate"})
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "goatviz").rglob("*.py"))
    ]
    modules = [name for name in modules if not name.startswith("goatviz.explore")]
    code = (
        "import importlib, sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
