"""Results: their schema is checked, they survive the disk, and damage is told."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import goatviz.files
from goatviz.analysis import sink_profile
from goatviz.files import whole_file
from goatviz.results import (
    PLAN_SLICE,
    PRIOR_PROFILE,
    SCHEMAS,
    SINK_PROFILE,
    check_result,
    load_result,
    make_result,
    save_result,
)
from tests.factories import HOSTILE, ids, plan_result, prior_result, sink_result, tiny_lm

RESULTS = {
    "prior_profile": lambda: prior_result("alibi"),
    "implied_prior": lambda: prior_result("implied"),
    "plan_slice": plan_result,
    "with tokens": lambda: plan_result("hostile"),
    "sink_profile": lambda: sink_profile(
        tiny_lm(), ids(1, 20), tokens=2 * HOSTILE, maps=8, norms=True
    ),
}


@pytest.fixture(params=RESULTS)
def result(request):
    return RESULTS[request.param]()


def test_saved_is_loaded(result, tmp_path):
    path = save_result(result, tmp_path / "result.nc")
    loaded = load_result(path)
    xr.testing.assert_identical(loaded, result)
    assert list(tmp_path.iterdir()) == [path]


def test_every_field_has_units_and_a_name(result):
    for name, variable in result.data_vars.items():
        assert variable.attrs["units"] and variable.attrs["long_name"], name


def test_a_selection_is_still_a_result():
    profile = prior_result("alibi")
    check_result(profile.sel(layer=0, head=1), PRIOR_PROFILE)
    check_result(profile.isel(head=[1]), PRIOR_PROFILE)
    check_result(sink_result().sel(layer=0, head=1, threshold=0.3, input=0), SINK_PROFILE)


def test_wrong_things_are_refused(result):
    own = SCHEMAS[result.attrs["schema"]]
    other = PLAN_SLICE if own is PRIOR_PROFILE else PRIOR_PROFILE
    with pytest.raises(TypeError, match=other.name):
        check_result(result, other)
    with pytest.raises(TypeError, match="got dict"):
        check_result({}, own)
    with pytest.raises(ValueError, match="lacks margin"):
        check_result(result.drop_vars("margin"), own)
    with pytest.raises(ValueError, match="margin must have dimensions"):
        check_result(result.assign(margin=("other", [1.0])), own)


def test_building_checks_dimensions():
    with pytest.raises(ValueError, match="does not have.*nonsense"):
        make_result(PLAN_SLICE, {"nonsense": np.zeros(2)}, coords={})
    with pytest.raises(ValueError, match="weights must have dimensions"):
        make_result(PLAN_SLICE, {"weights": np.zeros(2)}, coords={})
    with pytest.raises(ValueError, match="lacks"):
        make_result(PLAN_SLICE, {"weights": np.zeros((2, 2))}, coords={})


def test_damage_is_told(result, tmp_path):
    path = save_result(result, tmp_path / "result.nc")
    content = path.read_bytes()
    for damaged in (content[:100], b"", b"not a file of this kind" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"result\.nc"):
            load_result(path)
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match="holds no goatviz result"):
        load_result(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_result(tmp_path / "missing.nc")


def test_paths_are_checked(result, tmp_path):
    with pytest.raises(ValueError, match=r"end in \.nc"):
        save_result(result, tmp_path / "result.json")
    with pytest.raises(ValueError, match="existing folder"):
        save_result(result, tmp_path / "none" / "result.nc")
    with pytest.raises(TypeError, match="goatviz result"):
        save_result(xr.Dataset(), tmp_path / "result.nc")


def test_a_failed_write_leaves_the_old_file(result, tmp_path, monkeypatch):
    path = save_result(result, tmp_path / "result.nc")
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(goatviz.files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_result(result, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_whole_file_leaves_nothing_behind_on_error(tmp_path):
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_results_load_without_torch(tmp_path):
    made = [make() for make in RESULTS.values()]
    paths = [str(save_result(each, tmp_path / f"{at}.nc")) for at, each in enumerate(made)]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import goatviz\n"
        f"print(*[goatviz.load_result(path).attrs['schema'] for path in {paths}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [each.attrs["schema"] for each in made]
