"""Checks of arguments: what passes comes back, what does not is named with what was wanted."""

import numpy as np
import pytest

from goatviz import checks


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_any_library_come_back_as_int(value):
    assert checks.positive_int("count", value) == 3
    assert type(checks.positive_int("count", value)) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, [3]])
def test_what_is_no_integer_is_a_type_error(value):
    with pytest.raises(TypeError, match="count must be an integer of at least 1, got"):
        checks.positive_int("count", value)


@pytest.mark.parametrize(("value", "bounds"), [(-1, {"low": 0}), (5, {"high": 4})])
def test_integers_outside_are_value_errors(value, bounds):
    with pytest.raises(ValueError, match=f"got {value}"):
        checks.integer("count", value, **bounds)


def test_indices_take_one_several_or_all():
    assert checks.indices("head", None, 3) == [0, 1, 2]
    assert checks.indices("head", 2, 3) == [2]
    assert checks.indices("head", np.array([0, 1]), 3) == [0, 1]
    with pytest.raises(ValueError, match="head must be an integer in 0 .. 2, got 3"):
        checks.indices("head", [0, 3], 3)
    with pytest.raises(ValueError, match="got none"):
        checks.indices("head", [], 3)
    with pytest.raises(TypeError):
        checks.indices("head", "12", 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1])
def test_numbers_are_finite_and_inside(value):
    with pytest.raises(ValueError, match="scale must be a finite number above 0, got"):
        checks.number("scale", value, above=0)


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="scale must be a finite number above 0 and below 1"):
        checks.number("scale", value, above=0, below=1)


def test_flags_are_no_truthy_values():
    assert checks.flag("causal", False) is False
    with pytest.raises(TypeError, match="causal must be True or False, got 'no'"):
        checks.flag("causal", "no")


def test_names():
    assert checks.one_of("kind", "a", ("a", "b")) == "a"
    assert checks.some_of("names", ["b", "a", "b"], ("a", "b")) == ("b", "a")
    with pytest.raises(ValueError, match="among a, b; got 'c'"):
        checks.some_of("names", ["a", "c"], ("a", "b"))
    with pytest.raises(TypeError, match="a list of names, got 'ab'"):
        checks.some_of("names", "ab", ("a", "b"))
    with pytest.raises(ValueError, match="one of 1, 2; got True"):
        checks.one_of("kind", True, (1, 2))


def test_settled_arguments_are_refused():
    checks.not_given("a record", inputs=None)
    with pytest.raises(TypeError, match="inputs, layers must not be given with a record"):
        checks.not_given("a record", inputs=1, layers=0, heads=None)


def test_output_folders_are_kept_once_something_is_in_them(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(KeyError), checks.output_folder("out", folder) as made:
        assert made == folder and folder.is_dir() and not list(folder.iterdir())
        raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), checks.output_folder("out", folder):
        (folder / "c").touch()
        raise KeyError
    assert (folder / "c").exists()
    with pytest.raises(ValueError, match="out must be a folder that can be written to, got"):
        with checks.output_folder("out", folder / "c"):
            pass
