"""Writing files whole or not at all, and the folder of files that come with goatviz.

What files hold is the business of other modules.
"""

from __future__ import annotations

import importlib.resources
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends without error.

    A reader sees the old file or the new one, never half of it, and a failure leaves nothing
    behind.

    Parameters
    ----------
    target : Path
        In an existing folder.

    Yields
    ------
    Path
        An empty file of the same ending, to be written.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shipped_names(ending: str) -> list[str]:
    """Names, without `ending`, of the files of a kind that come with goatviz."""
    names = (entry.name for entry in shipped_file("").iterdir())
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))


def shipped_file(name: str) -> Traversable:
    """A file that comes with goatviz, by its whole name; "" is their folder."""
    folder = importlib.resources.files("goatviz") / "checkpoints"
    return folder / name if name else folder


def check_shipped(name: str, known: list[str]) -> None:
    """Raise a KeyError that lists what there is, unless `name` is known."""
    if name not in known:
        raise KeyError(f"name must be one of {', '.join(known)}; got {name!r}")
