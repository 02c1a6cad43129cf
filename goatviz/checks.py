"""Checks of arguments at the public edge, with error messages of one form.

Every message reads "{name} must be {requirement}, got {value}". A value of the wrong type is a
TypeError, an unacceptable value of the right type a ValueError. Nothing here loads torch.
"""

from __future__ import annotations

import math
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """An integer within inclusive bounds, as int; a bool is refused.

    Raises
    ------
    TypeError, ValueError
        If the value is not an integer, or is out of bounds.

    Examples
    --------
    >>> integer("length", 0, low=1)
    Traceback (most recent call last):
    ValueError: length must be an integer of at least 1, got 0
    """
    wanted = f"an integer{_bounds(low, high)}"
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, got {value!r}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def positive_int(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return integer(name, value, low=1)


def integer_fields(record: Any, **lowest: int) -> None:
    """Check that fields of a frozen dataclass are integers of at least these values."""
    for name, low in lowest.items():
        object.__setattr__(record, name, integer(name, getattr(record, name), low=low))


def index(name: str, value: Any, count: int) -> int:
    """An index in 0 .. count - 1.

    Examples
    --------
    >>> index("head", 9, 9)
    Traceback (most recent call last):
    ValueError: head must be an integer in 0 .. 8, got 9
    """
    return integer(name, value, low=0, high=count - 1)


def indices(name: str, values: Any, count: int) -> list[int]:
    """Indices in 0 .. count - 1: one, a sequence of them, or None for all."""
    if values is None:
        return list(range(count))
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        values = [values]
    chosen = [index(name, value, count) for value in values]
    if not chosen:
        raise ValueError(f"{name} must name at least one of 0 .. {count - 1}, got none")
    return chosen


def places(name: str, values: Any, count: int | None = None) -> tuple[int, ...]:
    """A sequence of indices in 0 .. count - 1, or from 0 up; a single one, or text, is an error.

    Examples
    --------
    >>> places("keys", 0, 4)
    Traceback (most recent call last):
    TypeError: keys must be a list of integers, got 0
    """
    single = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    if single or isinstance(values, str | bytes):
        raise TypeError(f"{name} must be a list of integers, got {values!r}")
    high = None if count is None else count - 1
    return tuple(integer(name, value, low=0, high=high) for value in values)


def window(name: str, value: Any, count: int, first: int = 0) -> tuple[int, int]:
    """Start and stop of a slice of the positions `first` .. `first` + `count` - 1, less `first`.

    As in Python, negative numbers count from the end, and what lies outside is left out; None is
    the whole.

    Examples
    --------
    >>> window("keys", slice(-3, None), 4, first=10)
    (1, 4)
    >>> window("keys", slice(2, 2), 4)
    Traceback (most recent call last):
    ValueError: keys must be a non-empty window of 0 .. 4, got slice(2, 2, None)
    """
    if value is None:
        return 0, count
    instance(name, value, slice, "a slice")
    if value.step not in (None, 1):
        raise ValueError(f"{name} must have a step of 1, got {value.step}")
    start, stop, _ = value.indices(first + count)
    start, stop = max(start - first, 0), stop - first
    if start >= stop:
        raise ValueError(
            f"{name} must be a non-empty window of {first} .. {first + count}, got {value}"
        )
    return start, stop


def number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite real number within bounds, as float: `low` and `high` are inclusive.

    Examples
    --------
    >>> number("temperature", 0.0, above=0)
    Traceback (most recent call last):
    ValueError: temperature must be a finite number above 0, got 0.0
    """
    parts = [
        f"{word} {bound:g}"
        for word, bound in (
            ("of at least", low),
            ("above", above),
            ("of at most", high),
            ("below", below),
        )
        if bound is not None
    ]
    wanted = "a finite number" + (" " + " and ".join(parts) if parts else "")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    value = float(value)
    inside = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not inside:
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def one_of(name: str, value: T, options: Iterable[T]) -> T:
    """One of some options.

    Examples
    --------
    >>> one_of("kind", "lines", ("heads", "kernel"))
    Traceback (most recent call last):
    ValueError: kind must be one of heads, kernel; got 'lines'
    """
    options = list(options)
    if not any(type(value) is type(option) and value == option for option in options):
        listed = ", ".join(map(str, options))
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")
    return value


def some_of(name: str, values: Any, options: Sequence[str]) -> tuple[str, ...]:
    """Distinct names from some options, in the order given; a bare string is an error."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of names, got {values!r}")
    chosen = tuple(dict.fromkeys(values))
    unknown = [value for value in chosen if value not in options]
    if unknown:
        raise ValueError(
            f"{name} must be among {', '.join(options)}; got {', '.join(map(repr, unknown))}"
        )
    return chosen


def instance(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> Any:
    """An instance of some kinds; `wanted` is a noun phrase for the message."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    return value


def not_given(why: str, **arguments: Any) -> None:
    """Refuse arguments that have no meaning beside another one.

    Examples
    --------
    >>> not_given("a finished profile", length=64, heads=None)
    Traceback (most recent call last):
    TypeError: length must not be given with a finished profile
    """
    names = [name for name, value in arguments.items() if value is not None]
    if names:
        raise TypeError(f"{', '.join(names)} must not be given with {why}")


def existing_folder(name: str, folder: str | os.PathLike) -> Path:
    """A folder that exists, as Path."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{name} must be an existing folder, got {path}")
    return path


def output_file(name: str, path: str | os.PathLike, *endings: str) -> Path:
    """A path to write to, with one of the given endings and in an existing folder."""
    path = Path(path)
    if path.suffix not in endings:
        wanted = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
        raise ValueError(f"{name} must end in {wanted}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{name} must lie in an existing folder, got {path}")
    return path


@contextmanager
def output_folder(name: str, folder: str | os.PathLike) -> Iterator[Path]:
    """Make a folder for the block to write to, and check that it is writable.

    If the block fails or is interrupted, new folders that are still empty are removed.

    Raises
    ------
    ValueError
        If the folder cannot be made or written to; nothing is left behind.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{name} must be a folder that can be written to, got {folder}: {error.strerror}"
            ) from error
        yield folder
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def count_text(count: int, noun: str) -> str:
    """A count with its noun, for messages and labels.

    Examples
    --------
    >>> count_text(1, "input"), count_text(1000, "input")
    ('1 input', '1,000 inputs')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _bounds(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f" in {low} .. {high}"
    if low is not None:
        return f" of at least {low}"
    return "" if high is None else f" of at most {high}"
