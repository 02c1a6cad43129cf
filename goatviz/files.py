"""Writing files whole or not at all, and the folder of files that come with goatviz.

What files hold is the business of other modules.
"""

from __future__ import annotations

import importlib.resources
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources.abc import Traversable
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows cannot lock folders: two processes must not write one checkpoint there.
    fcntl = None


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it when the block ends without error.

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
    with whole_files(target) as (temporary,):
        yield temporary


@contextmanager
def whole_files(*targets: Path) -> Iterator[list[Path]]:
    """`whole_file` for several files of one folder that belong together, renamed in order.

    Writers take turns, and nothing but renaming happens between two files.
    """
    with ExitStack() as stack:
        written = []
        for target in targets:
            handle, name = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
            os.close(handle)
            written.append(Path(name))
            stack.callback(written[-1].unlink, missing_ok=True)
        yield written
        for temporary in written:
            temporary.chmod(0o644)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        with locked(targets[0].parent):
            for temporary, target in zip(written, targets, strict=True):
                os.replace(temporary, target)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `whole_files` from renaming files in a folder, if its file system supports locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def shipped_names(ending: str) -> list[str]:
    """Names, without `ending`, of the files of a kind that come with goatviz."""
    names = (entry.name for entry in shipped_file("").iterdir())
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))


def shipped_file(name: str) -> Traversable:
    """A file that comes with goatviz, by its whole name; "" is their folder."""
    folder = importlib.resources.files("goatviz") / "checkpoints"
    return folder / name if name else folder


def check_shipped(name: str, known: list[str]) -> None:
    """Raise a KeyError that lists the known names, unless `name` is one of them."""
    if name not in known:
        raise KeyError(f"name must be one of {', '.join(known)}; got {name!r}")
