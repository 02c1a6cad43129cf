"""The log of a run: a JSON line every few steps, and TensorBoard where it is installed.

The file survives a kill: a resumed run drops the lines written after the state it starts from,
and writes them again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from goatviz import checks
from goatviz.files import whole_file

if TYPE_CHECKING:
    from accelerate.tracking import TensorBoardTracker


class RunLog:
    """A JSON-lines file, and a TensorBoard folder beside it; for use within `start`.

    Parameters
    ----------
    path : path-like
        File in an existing folder, ending in .jsonl.
    first : int
        Number of steps done before. Lines of later steps are dropped; 0 starts a new log.
    tensorboard : bool or None
        Whether to write a TensorBoard folder, named `path` without its ending; None: if TensorBoard
        is installed.

    Raises
    ------
    ValueError
        If `path` has another ending, or its folder does not exist.
    ImportError
        If TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: str | os.PathLike, *, first: int = 0, tensorboard: bool | None = None
    ) -> None:
        self.path = checks.output_file("log", path, ".jsonl")
        self._tracker = _tensorboard(self.path, first) if tensorboard is not False else None
        if tensorboard and self._tracker is None:
            raise ImportError(
                "tensorboard=True needs the package tensorboard: pip install 'goatviz[train]'"
            )
        kept = _lines_until(self.path, first)
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        """Log the values of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        """Close the file and the TensorBoard writer."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _tensorboard(path: Path, first: int) -> TensorBoardTracker | None:
    """accelerate's tracker, started, or None where TensorBoard is not installed."""
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        return None
    # Events after `first` are dropped: the run logs them again.
    tracker = TensorBoardTracker(path.stem, path.parent, purge_step=first + 1)
    tracker.start()
    return tracker


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log up to a step, except a last line that a kill cut short."""
    if step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if line.endswith("\n") and entry["step"] <= step:
            kept.append(line)
    return kept
