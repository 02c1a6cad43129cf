"""What a run says while it goes on: one JSON line every few steps, and TensorBoard where installed.

The file survives being killed: a run that is resumed drops what was said after the state it goes on
from, and says it again.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from goatviz.files import whole_file


class RunLog:
    """A JSON-lines file, and a TensorBoard folder beside it.

    Parameters
    ----------
    path : path-like
        Ends in .jsonl, in an existing folder.
    first : int
        Steps done before: lines of later steps are dropped; 0 begins a new log.
    tensorboard : bool or None
        Whether to write `path` without its ending as a TensorBoard folder; None: if it is
        installed.

    Raises
    ------
    ValueError
        If `path` does not fit.
    ImportError
        If TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: str | os.PathLike, *, first: int = 0, tensorboard: bool | None = None
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"log must end in .jsonl, got {self.path.name!r}")
        if not self.path.parent.is_dir():
            raise ValueError(f"log must lie in an existing folder, got {self.path}")
        installed = importlib.util.find_spec("tensorboard") is not None
        if tensorboard and not installed:
            raise ImportError(
                "tensorboard=True needs the package tensorboard: pip install 'goatviz[train]'"
            )
        kept = _lines_until(self.path, first)
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if installed and tensorboard is not False:
            from torch.utils.tensorboard import SummaryWriter

            # What was said after that step is said again.
            self._writer = SummaryWriter(str(self.path.with_suffix("")), purge_step=first + 1)

    def write(self, step: int, **values: float) -> None:
        """Say values of a step."""
        entry: dict[str, Any] = {"step": step, **values}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of a log up to a step; a last line cut short by a kill is dropped."""
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
