"""Results: their schema is checked, they survive the disk, and damage is told."""

import subprocess
import sys

import h5py
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
    # For others, too, what comes after the end is none of the file's business.
    stored = xr.load_dataset(path, engine="h5netcdf")
    assert stored.attrs.pop("goatviz_file_sha256") == "the last 64 bytes of the file"
    xr.testing.assert_identical(stored, result)


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


def test_other_content_is_told(tmp_path):
    path = save_result(plan_result(), tmp_path / "result.nc")
    content = path.read_bytes()
    changes = (
        lambda file: file["margin"].write_direct(file["margin"][()] + 1),
        lambda file: file["margin"].attrs.update(long_name="profit"),
        lambda file: file.attrs.update(source="elsewhere"),
        lambda file: file.create_dataset("more", data=[1.0]),
        lambda file: file.pop("margin"),
    )
    for change in changes:
        path.write_bytes(content)
        with h5py.File(path, "a") as file:
            change(file)
        with pytest.raises(ValueError, match=r"result\.nc was damaged since it was saved"):
            load_result(path)


def test_files_without_a_sum_still_load(tmp_path):
    result = plan_result("hostile")
    path = tmp_path / "old.nc"
    result.to_netcdf(path, engine="h5netcdf")
    xr.testing.assert_identical(load_result(path), result)
    # Checked all the same.
    margin = result["margin"]
    for wrong, words in (
        (result.assign(more=margin), "has no field more"),
        (result.assign(margin=margin.assign_attrs(units="metres")), "units 'nats', got 'metres'"),
        (result.assign(margin=margin.astype(str).assign_attrs(margin.attrs)), "must hold numbers"),
        (result.drop_vars("margin"), "lacks margin"),
        (result.assign_attrs(schema="mass_sweep"), ""),
    ):
        path.unlink()
        wrong.to_netcdf(path, engine="h5netcdf")
        with pytest.raises(ValueError, match=rf"old\.nc holds a damaged result: .*{words}"):
            load_result(path)


def test_a_file_that_claims_more_than_it_holds(tmp_path):
    path = tmp_path / "large.nc"
    plan_result().to_netcdf(path, engine="h5netcdf")
    with h5py.File(path, "a") as file:
        file.create_dataset("loss", shape=(10**6, 10**6), dtype="f8")
    with pytest.raises(ValueError, match=r"large\.nc .* must hold at most .* claims"):
        load_result(path)


LOAD_DAMAGED = """
import random, sys, threading
from pathlib import Path
from goatviz.results import load_result

path = Path(sys.argv[1])
whole, wanted = path.read_bytes(), load_result(path)
def load_all(seed):
    source = random.Random(seed)
    for at in range(100):
        content = bytearray(whole)
        for _ in range(source.choice([1, 1, 8, 64])):
            content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        path.write_bytes(content[: source.randrange(len(whole))] if at % 4 == 0 else content)
        try:
            assert load_result(path).identical(wanted)
        except ValueError as error:
            assert str(error).startswith("result.nc "), error
load_all(0)
thread = threading.Thread(target=load_all, args=(1,))
thread.start()
thread.join()
print("done")
"""


def test_damage_is_told_in_an_error_and_nowhere_else(tmp_path):
    path = save_result(plan_result(), tmp_path / "result.nc")
    # In a process of its own, for what HDF5 prints when it meets damage or the process ends.
    run = subprocess.run(
        [sys.executable, "-c", LOAD_DAMAGED, str(path)], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_paths_are_checked(result, tmp_path):
    with pytest.raises(ValueError, match=r"end in \.nc"):
        save_result(result, tmp_path / "result.json")
    with pytest.raises(ValueError, match="existing folder"):
        save_result(result, tmp_path / "none" / "result.nc")
    with pytest.raises(TypeError, match="goatviz result"):
        save_result(xr.Dataset(), tmp_path / "result.nc")


def test_what_would_not_load_is_not_saved(result, tmp_path):
    more = result.assign(more=result["margin"])
    with pytest.raises(ValueError, match="has no field more"):
        save_result(more, tmp_path / "result.nc")
    assert list(tmp_path.iterdir()) == []


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
