"""``import goatviz`` is light, and every name it promises is there."""

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import goatviz

ROOT = Path(__file__).parents[1]
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"][
    "lint"
]["flake8-tidy-imports"]
PLOTS = Path(goatviz.__file__).parent / "plots"
HEAVY = {"torch", "plotly", "ipywidgets", "anywidget", "xarray", "ot", "numpy"}
#: What no module may import at its top, and what it brings along.
DEFERRED = {*RULES["banned-module-level-imports"], "h5netcdf", "pandas"}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh Python holds after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_is_light():
    assert loaded_by("import goatviz") & HEAVY == set()


def test_listing_the_names_is_light():
    assert loaded_by("import goatviz; dir(goatviz); goatviz.__version__") & HEAVY == set()


def test_results_need_no_torch():
    assert loaded_by("import goatviz.results") & (HEAVY | DEFERRED) == {"numpy"}
    loaded = loaded_by("import goatviz; goatviz.load_shipped_result('passkey-sweep')")
    assert "xarray" in loaded
    assert "torch" not in loaded


def test_plots_need_no_torch():
    modules = ["goatviz.plots", *(f"goatviz.plots.{path.stem}" for path in PLOTS.glob("[!_]*.py"))]
    loaded = loaded_by(f"import {', '.join(modules)}")
    assert "plotly" in loaded
    assert loaded & {"torch", *DEFERRED} == set()


def test_the_first_use_of_a_name_loads_nothing_that_can_wait():
    loaded = loaded_by("import goatviz.figures, goatviz.paper, goatviz.training.presets")
    assert {"torch", "plotly"} <= loaded
    assert loaded & DEFERRED == set()


@pytest.mark.parametrize("command", ["", "reproduce", "train", "sweep", "pretrained", "info"])
def test_help_is_light(command):
    call = f"main({[*command.split(), '--help']})"
    loaded = loaded_by(
        f"from goatviz.cli import main\ntry: {call}\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded & (HEAVY | DEFERRED) == set()
    # tyro asks it about every type that is not plain, and it takes longer than all the rest.
    assert command or "typeguard" not in loaded


def test_one_name_does_not_load_another_subject():
    assert "plotly" not in loaded_by("from goatviz import solve_rows")


def test_all_is_sorted_out():
    assert len(set(goatviz.__all__)) == len(goatviz.__all__) > 0
    assert all(not name.startswith("_") or name == "__version__" for name in goatviz.__all__)


@pytest.mark.parametrize("name", goatviz.__all__)
def test_every_public_name_resolves(name):
    value = getattr(goatviz, name)
    # A class or function is the very one its module defines, not a copy or a wrapper.
    if isinstance(value, type) or callable(value):
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__module__.startswith("goatviz.")


def test_dir_lists_every_public_name():
    assert set(goatviz.__all__) <= set(dir(goatviz))


def test_star_import_gives_every_public_name():
    namespace: dict[str, object] = {}
    exec("from goatviz import *", namespace)
    assert set(goatviz.__all__) <= namespace.keys()


def test_unknown_name_raises_and_names_it():
    with pytest.raises(AttributeError, match="plot_nothing"):
        goatviz.plot_nothing  # noqa: B018 - the access is the test
    with pytest.raises(ImportError, match="plot_nothing"):
        exec("from goatviz import plot_nothing")
    assert not hasattr(goatviz, "plot_nothing")
