"""Text and DNA: windows of real documents, read from files or streamed by name.

A window never crosses from one document into another unless `packed` is set, so a token is
predicted from its own document alone.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.tasks.base import Task

#: Prefix of sources that are streamed by name: hf:NAME:CONFIG:SPLIT, or hf:NAME:SPLIT.
STREAMED = "hf:"
_TEXTS = (".txt", ".md")
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz")
_NUCLEOTIDES = b"ACGTN"
_BETWEEN = "\n\n"


class Documents(NamedTuple):
    """Documents, one after another.

    Attributes
    ----------
    tokens : array
        Unsigned integers, shape (tokens of all documents,).
    starts : array
        Index of each document's first token, and the end of the last, shape (documents + 1,).
    names : tuple of str
        Names of the documents.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each document, shape (documents,)."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class _Corpus(Task):
    """What `Text` and `DNA` share."""

    source: str = ""
    validation: str = ""
    length: int = 256

    def __post_init__(self) -> None:
        checks.integer_fields(self, length=1)
        for name in ("source", "validation"):
            checks.instance(name, getattr(self, name), str, "text")

    @abstractmethod
    def documents(self) -> Documents:
        """The documents of `source`, read once and then kept in memory."""

    def held_out(self) -> Self:
        """The documents of `validation`, in windows that never span two documents.

        Raises
        ------
        ValueError
            If `validation` is empty.
        """
        if not self.validation:
            raise ValueError(
                f"{self.name} needs validation, documents that are not trained on, got none"
            )
        return replace(self, source=self.validation)

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` windows uniformly from all windows; shape (count, length + 1).

        Parameters
        ----------
        count : int
            Number of windows, at least 1.
        generator : torch.Generator
            A generator on the CPU.

        Raises
        ------
        ValueError
            If no document is longer than `length`, or the source cannot be read.
        """
        checks.positive_int("count", count)
        documents = self._drawn_from()
        tokens, starts, _ = documents
        room = np.maximum(documents.lengths - self.length, 0)
        if not room.any():
            raise self._too_short("length", self.length, documents)
        ends = np.cumsum(room)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
        chosen = np.minimum((drawn * ends[-1]).astype(np.int64), ends[-1] - 1)
        document = np.searchsorted(ends, chosen, side="right")
        first = starts[document] + chosen - (ends[document] - room[document])
        windows = tokens[first[:, None] + np.arange(self.length + 1)]
        return torch.from_numpy(windows.astype(np.int64))

    def pieces(self, length: int, *, per_document: int = 1) -> tuple[Tensor, tuple[str, ...]]:
        """Pieces of `length` tokens and the next, spread evenly over each document.

        Parameters
        ----------
        length : int
            Tokens of context.
        per_document : int
            Largest number of pieces from one document. Pieces do not overlap, so a short document
            gives fewer, or none.

        Returns
        -------
        ids : Tensor
            Shape (pieces, length + 1).
        names : tuple of str
            Name of each piece's document.

        Raises
        ------
        ValueError
            If no document is longer than `length`, or per_document is below 1.
        """
        checks.positive_int("per_document", per_document)
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
            raise self._too_short("lengths", length, documents)
        return torch.from_numpy(np.stack(windows).astype(np.int64)), tuple(names)

    def _drawn_from(self) -> Documents:
        """The documents that `sample` draws from."""
        return self.documents()

    def _too_short(self, name: str, length: int, documents: Documents) -> ValueError:
        return ValueError(
            f"{name} must be below the length of a document of {self.source}, got {length}; the "
            f"longest of {len(documents.names)} has {documents.lengths.max()} tokens"
        )


@dataclass(frozen=True)
class Text(_Corpus):
    """Windows of text, byte by byte or through a tokenizer.

    Attributes
    ----------
    source, validation : str
        Documents to train on, and others to evaluate on: a text file (.gz and .xz are
        decompressed); a folder, .tar, .tar.gz or .tar.xz of .txt and .md files, each a document;
        or "hf:NAME:CONFIG:SPLIT", a data set streamed from the Hugging Face hub, such as
        "hf:allenai/c4:en:train" (its column "text"; needs goatviz[train]).
    length : int
        Tokens of context; a window has one more, to be predicted.
    tokenizer : str, optional
        Path of a tokenizer.json (needs goatviz[huggingface]); None: the 256 UTF-8 bytes.
    packed : bool
        Train on documents joined by an empty line, so that short ones are used too. Windows then
        cross from one document into the next; in evaluation they never do.
    streamed_documents : int
        Largest number of documents read from a streamed data set.

    Raises
    ------
    ValueError, TypeError
        For values out of range. A source is read when it is first used; a file that is missing,
        empty or not UTF-8 is an error then.

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
        checks.integer_fields(self, streamed_documents=1)

    @property
    def vocab_size(self) -> int:
        """256 bytes, or the size of the tokenizer's vocabulary."""
        return 256 if self.tokenizer is None else _tokenizer(self.tokenizer).get_vocab_size()

    def documents(self) -> Documents:
        return _text_documents(self.source, self.tokenizer, self.streamed_documents)

    def held_out(self) -> Self:
        return replace(super().held_out(), packed=False)

    def _drawn_from(self) -> Documents:
        if self.packed:
            return _packed(self.source, self.tokenizer, self.streamed_documents)
        return self.documents()


@dataclass(frozen=True)
class DNA(_Corpus):
    """Windows of the nucleotides A, C, G and T; N (unknown) may be read but is never a target.

    Attributes
    ----------
    source, validation : str
        FASTA files (.gz is decompressed) to train on and to evaluate on; each record is a
        document.
    length : int
        Nucleotides of context; a window has one more, to be predicted.

    Raises
    ------
    ValueError, TypeError
        For values out of range. A file is read when it is first used; one that is missing, empty,
        not FASTA, or has other letters is an error then.

    Examples
    --------
    >>> DNA(length=512).vocab_size
    5
    """

    name: ClassVar[str] = "dna"
    vocab_size: ClassVar[int] = len(_NUCLEOTIDES)
    masked: ClassVar[int | None] = _NUCLEOTIDES.index(b"N")

    def documents(self) -> Documents:
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
    """Name and text of every document in a source, in a fixed order."""
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
        raise ValueError(f"source {path} is not a readable archive: {error}") from error


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
        raise ValueError(f"source {path} is not a readable {path.suffix} file: {error}") from error


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
        raise ValueError(f"tokenizer {path} is not a tokenizer.json: {error}") from error


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
