"""Text and DNA: windows of real documents, read from files or streamed by name.

A window never crosses from one document into another unless `packed` asks for it, so that a token
is predicted from its own document alone.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

#: What a source begins with to be streamed by name: hf:NAME:CONFIG:SPLIT, or hf:NAME:SPLIT.
STREAMED = "hf:"
_TEXTS = (".txt", ".md")
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz")
_NUCLEOTIDES = b"ACGTN"
_BETWEEN = "\n\n"


class Documents(NamedTuple):
    """Documents one after another.

    Attributes
    ----------
    tokens : array
        Unsigned integers, shape (tokens of all documents,).
    starts : array
        Where each begins, and the end of the last, shape (documents + 1,).
    names : tuple of str
        What each is called.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, shape (documents,)."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class _Corpus(ABC):
    """What text and DNA share; see these."""

    source: str = ""
    validation: str = ""
    length: int = 256

    name: ClassVar[str]
    answer_length: ClassVar[int] = 0
    #: Targets of this id count for nothing.
    masked: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length must be an integer of at least 1, got {self.length!r}")
        for name in ("source", "validation"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {type(getattr(self, name)).__name__}")

    @abstractmethod
    def documents(self) -> Documents:
        """What `source` holds; read once, then kept in memory."""

    def at_length(self, length: int) -> Self:
        """The same documents in windows of another length."""
        return replace(self, length=length)

    def held_out(self) -> Self:
        """The documents of `validation`, in windows that cross no document.

        Raises
        ------
        ValueError
            If there is no `validation`.
        """
        if not self.validation:
            raise ValueError(
                f"{self.name} needs validation, documents that are not trained on, got none"
            )
        return replace(self, source=self.validation)

    def target_weights(self) -> None:
        """None: all predicted tokens count alike."""
        return None

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` windows, uniformly over all there are; shape (count, length + 1).

        Parameters
        ----------
        count : int
            At least 1.
        generator : torch.Generator
            On the CPU.

        Raises
        ------
        ValueError
            If no document is long enough, or the source is not what it should be.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        tokens, starts, _ = self._readable()
        room = np.maximum(np.diff(starts) - self.length, 0)
        if not room.any():
            raise ValueError(
                f"length must leave one document of {self.source} longer than it, got "
                f"{self.length}; the longest of {len(room)} has {np.diff(starts).max()} tokens"
            )
        ends = np.cumsum(room)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
        chosen = np.minimum((drawn * ends[-1]).astype(np.int64), ends[-1] - 1)
        document = np.searchsorted(ends, chosen, side="right")
        first = starts[document] + chosen - (ends[document] - room[document])
        windows = tokens[first[:, None] + np.arange(self.length + 1)]
        return torch.from_numpy(windows.astype(np.int64))

    def pieces(self, length: int, *, per_document: int = 1) -> tuple[Tensor, tuple[str, ...]]:
        """Stretches of `length` tokens and the next, spread evenly over each document.

        Parameters
        ----------
        length : int
            Tokens of context.
        per_document : int
            The most that are taken of a document; they do not overlap. Documents that are too
            short give fewer, or none.

        Returns
        -------
        ids : Tensor
            Shape (pieces, length + 1).
        names : tuple of str
            Of the documents they come from.

        Raises
        ------
        ValueError
            If no document is long enough, or per_document is below 1.
        """
        if per_document < 1:
            raise ValueError(f"per_document must be at least 1, got {per_document}")
        documents = self.documents()
        windows, names = [], []
        for start, size, name in zip(
            documents.starts, documents.lengths, documents.names, strict=False
        ):
            count = min(per_document, int(size) // (length + 1))
            for index in range(count):
                first = start + ((2 * index + 1) * size // count - (length + 1)) // 2
                windows.append(documents.tokens[first : first + length + 1])
                names.append(name)
        if not windows:
            raise ValueError(
                f"lengths must leave one document of {self.source} longer than them, got "
                f"{length}; the longest of {len(documents.names)} has {documents.lengths.max()} "
                "tokens"
            )
        return torch.from_numpy(np.stack(windows).astype(np.int64)), tuple(names)

    def _readable(self) -> Documents:
        """What `sample` draws from."""
        return self.documents()


@dataclass(frozen=True)
class Text(_Corpus):
    """Windows of text, byte by byte or through a tokenizer.

    Attributes
    ----------
    source, validation : str
        Documents to train on, and others to measure on: a text file (.gz and .xz are opened), a
        folder or a .tar, .tar.gz or .tar.xz of .txt and .md files, each a document; or
        "hf:NAME:CONFIG:SPLIT", a data set of the Hugging Face hub that is streamed, such as
        "hf:allenai/c4:en:train" (its column "text"; needs goatviz[train]).
    length : int
        Tokens of context; a window has one more, to be predicted.
    tokenizer : str, optional
        A tokenizer.json (needs goatviz[huggingface]); None: UTF-8 bytes, 256 of them.
    packed : bool
        Train on documents joined by an empty line, so that short ones count; windows then cross
        from one into the next. Evaluation never does.
    streamed_documents : int
        The most that are read of a streamed data set.

    Raises
    ------
    ValueError, TypeError
        For values out of range. Sources are read when first used: files that are missing, empty
        or not UTF-8 are errors then.

    Examples
    --------
    >>> Text(length=512).vocab_size
    256
    """

    tokenizer: str | None = None
    packed: bool = False
    streamed_documents: int = 10_000

    name: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.streamed_documents
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"streamed_documents must be an integer of at least 1, got {count!r}")

    @property
    def vocab_size(self) -> int:
        """256 bytes, or what the tokenizer has."""
        return 256 if self.tokenizer is None else _tokenizer(self.tokenizer).get_vocab_size()

    def documents(self) -> Documents:
        """What `source` holds; read once, then kept in memory."""
        return _text_documents(self.source, self.tokenizer, self.streamed_documents)

    def held_out(self) -> Self:
        """The documents of `validation`, in windows that cross no document."""
        return replace(super().held_out(), packed=False)

    def _readable(self) -> Documents:
        if self.packed:
            return _packed(self.source, self.tokenizer, self.streamed_documents)
        return self.documents()


@dataclass(frozen=True)
class DNA(_Corpus):
    """Windows of nucleotides, A, C, G and T; N (unknown) is read and never predicted.

    Attributes
    ----------
    source, validation : str
        FASTA files (.gz is opened) to train on, and to measure on; each record is a document.
    length : int
        Nucleotides of context; a window has one more, to be predicted.

    Raises
    ------
    ValueError, TypeError
        For values out of range. Files are read when first used: one that is missing, empty, no
        FASTA, or has other letters is an error then.

    Examples
    --------
    >>> DNA(length=512).vocab_size
    5
    """

    name: ClassVar[str] = "dna"
    vocab_size: ClassVar[int] = len(_NUCLEOTIDES)
    masked: ClassVar[int | None] = _NUCLEOTIDES.index(b"N")

    def documents(self) -> Documents:
        """What `source` holds; read once, then kept in memory."""
        return _fasta_documents(self.source)


@lru_cache(maxsize=4)
def _text_documents(source: str, tokenizer: str | None, most: int) -> Documents:
    each = list(_texts(source, most))
    if not each:
        raise ValueError(f"source must hold documents ({', '.join(_TEXTS)}), got none in {source}")
    names = tuple(name for name, _ in each)
    if tokenizer is None:
        return _joined([np.frombuffer(text.encode(), np.uint8) for _, text in each], names)
    encode = _tokenizer(tokenizer)
    return _joined([_encoded(encode, text) for _, text in each], names)


@lru_cache(maxsize=2)
def _packed(source: str, tokenizer: str | None, most: int) -> Documents:
    documents = _text_documents(source, tokenizer, most)
    if tokenizer is None:
        between = np.frombuffer(_BETWEEN.encode(), np.uint8)
    else:
        between = _encoded(_tokenizer(tokenizer), _BETWEEN)
    parts = np.split(documents.tokens, documents.starts[1:-1])
    joined = np.concatenate([part for each in parts for part in (each, between)])
    return _joined([joined], (source,))


def _joined(parts: list[np.ndarray], names: tuple[str, ...]) -> Documents:
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Documents(np.concatenate(parts), starts, names)


def _texts(source: str, most: int) -> Iterator[tuple[str, str]]:
    """Name and text of every document of a source, in a fixed order."""
    if source.startswith(STREAMED):
        yield from _streamed(source, most)
        return
    path = _existing(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXTS and p.is_file())
        for file in files:
            yield str(file.relative_to(path)), _decoded(file.read_bytes(), file)
    elif source.endswith(_ARCHIVES):
        yield from sorted(_archived(path))
    else:
        yield path.name, _decoded(_opened(path), path)


def _archived(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(_TEXTS):
                    content = archive.extractfile(member).read()
                    yield member.name, _decoded(content, f"{path}: {member.name}")
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"source {path} is no readable archive: {error}") from error


def _streamed(source: str, most: int) -> Iterator[tuple[str, str]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"source {source} needs the package datasets: pip install 'goatviz[train]'"
        ) from error
    parts = source.removeprefix(STREAMED).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"source must read hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, got {source!r}")
    rows = load_dataset(*parts[:-1], split=parts[-1], streaming=True)
    for index, row in enumerate(rows):
        if index == most:
            return
        if not isinstance(row.get("text"), str):
            raise ValueError(f"source {source} must have a column 'text', got {', '.join(row)}")
        if row["text"]:
            yield f"{source}#{index}", row["text"]


def _existing(source: str) -> Path:
    path = Path(source)
    if not source or not path.exists():
        raise FileNotFoundError(f"source must be an existing file or folder, got {source!r}")
    return path


def _opened(path: Path) -> bytes:
    """The bytes of a file, decompressed."""
    read = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with read(path, "rb") as file:
            return file.read()
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"source {path} is no readable {path.suffix} file: {error}") from error


def _decoded(content: bytes, where: str | Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {where} must be UTF-8, got byte {content[error.start]:#04x} at {error.start}"
        ) from error
    if not text:
        raise ValueError(f"source {where} is empty")
    return text


@lru_cache(maxsize=4)
def _tokenizer(path: str):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"tokenizer {path} needs the package tokenizers: pip install 'goatviz[huggingface]'"
        ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"tokenizer must be an existing file, got {path!r}")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:
        raise ValueError(f"tokenizer {path} is no tokenizer.json: {error}") from error


def _encoded(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


@lru_cache(maxsize=4)
def _fasta_documents(source: str) -> Documents:
    path = _existing(source)
    if path.is_dir():
        raise ValueError(f"source must be a FASTA file, got the folder {source}")
    code = np.full(256, 255, dtype=np.uint8)
    code[np.frombuffer(_NUCLEOTIDES, np.uint8)] = np.arange(len(_NUCLEOTIDES))
    code[np.frombuffer(_NUCLEOTIDES.lower(), np.uint8)] = np.arange(len(_NUCLEOTIDES))
    names: list[str] = []
    parts: list[list[bytes]] = []
    for number, line in enumerate(io.BytesIO(_opened(path)), start=1):
        line = line.strip()
        if line.startswith(b">"):
            names.append(line[1:].split(b" ")[0].decode("utf-8", "replace") or f"line {number}")
            parts.append([])
        elif line:
            if not parts:
                raise ValueError(f"source {source} must be FASTA: line 1 does not begin with >")
            wrong = line.translate(None, _NUCLEOTIDES + _NUCLEOTIDES.lower())
            if wrong:
                raise ValueError(
                    f"source {source} must have the letters A, C, G, T and N, got "
                    f"{chr(wrong[0])!r} in line {number}, record {names[-1]}"
                )
            parts[-1].append(line)
    filled = [(name, b"".join(lines)) for name, lines in zip(names, parts, strict=True) if lines]
    if not filled:
        raise ValueError(f"source {source} holds no sequences")
    tokens = [code[np.frombuffer(sequence, np.uint8)] for _, sequence in filled]
    return _joined(tokens, tuple(name for name, _ in filled))
