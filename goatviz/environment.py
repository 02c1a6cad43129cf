"""Where goatviz runs: versions, devices, the checkpoints' folder, and the kernels that serve here.

`goatviz info` prints it, for reports of bugs and before a long run.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from goatviz.attention.backends import BACKENDS
from goatviz.files import shipped_file
from goatviz.training.checkpoint import device_name, list_pretrained

#: Distributions whose versions are told: what computes, what draws, and what is compared with.
DISTRIBUTIONS = (
    "goatviz",
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "transformers",
    "accelerate",
    "POT",
    "goat-attention",
    "numpy",
    "xarray",
    "plotly",
    "anywidget",
    "jupyterlab",
)
_WIDTH = 80
_COLUMN = 17


@dataclass(frozen=True)
class BackendState:
    """Whether one attention backend can run here.

    Attributes
    ----------
    summary : str
        What it is and what it serves.
    hindrance : str, optional
        Why it cannot run on this machine; None if it can.
    """

    summary: str
    hindrance: str | None


@dataclass(frozen=True, repr=False)
class Environment:
    """What a report of a bug should say about the machine; its text fits 80 columns.

    Attributes
    ----------
    python : str
        Version and implementation of Python, and the system.
    versions : dict of str to str or None
        Version of each of `DISTRIBUTIONS`; None if it is not installed.
    cpu : str
        Name of the processor, its cores, and the threads that torch uses.
    gpus : tuple of str
        Name, memory and compute capability of each GPU that torch sees.
    torch_build : str
        What torch was built for: "CUDA 12.8", "ROCm 6.4" or "the CPU alone".
    checkpoints : str
        Folder of the shipped checkpoints, with ~ for the user's own.
    pretrained : int
        Number of checkpoints in it.
    backends : dict of str to BackendState
        Attention backends by name, each with what keeps it from running here.
    """

    python: str
    versions: dict[str, str | None]
    cpu: str
    gpus: tuple[str, ...]
    torch_build: str
    checkpoints: str
    pretrained: int
    backends: dict[str, BackendState]

    def __repr__(self) -> str:
        gpus = self.gpus or (f"none that torch sees; it was built for {self.torch_build}",)
        sections = {
            "Versions": [
                ("Python", self.python),
                *((name, each or "not installed") for name, each in self.versions.items()),
            ],
            "Devices": [
                ("CPU", self.cpu),
                *((f"GPU {at}" if self.gpus else "GPU", gpu) for at, gpu in enumerate(gpus)),
            ],
            "Checkpoints": [("shipped", f"{self.pretrained} in {self.checkpoints}")],
            "Attention backends that run here": [
                (name, state.summary)
                for name, state in self.backends.items()
                if state.hindrance is None
            ],
            "Attention backends that do not": [
                (name, state.hindrance)
                for name, state in self.backends.items()
                if state.hindrance is not None
            ],
        }
        return "\n\n".join(
            "\n".join([title, *_aligned(rows)]) for title, rows in sections.items() if rows
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON.

        Examples
        --------
        >>> import json
        >>> json.loads(json.dumps(info().to_dict()))["versions"]["torch"] == torch.__version__
        True
        """
        return dataclasses.asdict(self)


def info() -> Environment:
    """Versions, devices, the folder of checkpoints, and which attention backends serve here.

    Returns
    -------
    Environment
        Shown as text; paste it into reports of bugs. `goatviz info` prints it, and
        `goatviz info --json` prints `to_dict()`.

    Examples
    --------
    >>> found = info()
    >>> found.versions["torch"] == torch.__version__
    True
    >>> print(found.backends["reference"].hindrance)
    None
    """
    return Environment(
        python=f"{platform.python_version()} ({platform.python_implementation()}), "
        f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in DISTRIBUTIONS},
        cpu=f"{device_name(torch.device('cpu')).removeprefix('CPU: ')}, {os.cpu_count()} cores",
        gpus=tuple(_gpu(at) for at in range(torch.cuda.device_count())),
        torch_build=_torch_build(),
        checkpoints=_short(Path(str(shipped_file("")))),
        pretrained=len(list_pretrained()),
        backends={
            name: BackendState(backend.summary, backend.hindrance())
            for name, backend in BACKENDS.items()
        },
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    """Name, memory and compute capability of a GPU."""
    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return f"{found.name}, {memory:.1f} GiB, compute capability {found.major}.{found.minor}"


def _torch_build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU alone"


def _short(path: Path) -> str:
    """A path that names no user where it lies in the user's own folder."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _aligned(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Two columns, the second wrapped."""
    for name, text in rows:
        lead = f"  {name:<{_COLUMN}}"
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=lead,
            subsequent_indent=" " * len(lead),
            break_long_words=False,
            break_on_hyphens=False,
        )
