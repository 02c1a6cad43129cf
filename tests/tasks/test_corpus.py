"""Windows of text and DNA are what the files hold; bad files are errors."""

import gzip
import json
import lzma
import sys
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch

from goatviz.tasks import DNA, Text

FIRST = "The quick brown fox. " * 8
SECOND = "Größe und Maß, ein Fuß; " * 9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deeper").mkdir(parents=True)
    (root / "a.txt").write_text(FIRST, encoding="utf-8")
    (root / "deeper" / "b.md").write_text(SECOND, encoding="utf-8")
    (root / "short.txt").write_text("Short.", encoding="utf-8")
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    return root


def archive(folder, tmp_path, mode):
    path = tmp_path / f"texts.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as file:
        file.add(folder, arcname="texts")
    return path


@pytest.fixture
def fasta(tmp_path):
    def write(content, name="genome.fa"):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wb") as file:
            file.write(content.encode())
        return DNA(source=str(path), length=8)

    return write


def test_windows_are_bytes_of_one_document(folder):
    ids = Text(source=str(folder), length=20).sample(200, generator=generator())
    assert ids.shape == (200, 21) and ids.dtype == torch.int64
    where = {False: 0, True: 0}
    for row in ids.tolist():
        window = bytes(row)
        assert (window in FIRST.encode()) != (window in SECOND.encode())
        where[window in SECOND.encode()] += 1
    assert min(where.values()) > 50


def test_every_window_is_drawn_and_all_alike(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef", encoding="utf-8")
    (tmp_path / "b.txt").write_text("uvwxyz", encoding="utf-8")
    ids = Text(source=str(tmp_path), length=3).sample(6000, generator=generator())
    found, counts = np.unique(ids.numpy(), axis=0, return_counts=True)
    assert {bytes(row.tolist()).decode() for row in found} == {
        "abcd", "bcde", "cdef", "uvwx", "vwxy", "wxyz",
    }  # fmt: skip
    assert abs(counts - 1000).max() < 150


@pytest.mark.parametrize("mode", ["gz", "xz"])
def test_archives_hold_what_folders_hold(folder, tmp_path, mode):
    a = Text(source=str(folder)).documents()
    b = Text(source=str(archive(folder, tmp_path, mode))).documents()
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.starts, b.starts)
    assert a.names == ("a.txt", "deeper/b.md", "short.txt")
    assert [name.removeprefix("texts/") for name in b.names] == list(a.names)


@pytest.mark.parametrize("opened", [open, gzip.open, lzma.open])
def test_one_file_is_one_document(tmp_path, opened):
    path = tmp_path / {open: "a.txt", gzip.open: "a.txt.gz", lzma.open: "a.txt.xz"}[opened]
    with opened(path, "wb") as file:
        file.write(SECOND.encode())
    found = Text(source=str(path)).documents()
    assert bytes(found.tokens) == SECOND.encode() and found.lengths.tolist() == [len(found.tokens)]


def test_packed_windows_cross_documents_in_training_only(folder):
    task = Text(source=str(folder), validation=str(folder), length=120, packed=True)
    whole = "\n\n".join([FIRST, SECOND, "Short.", ""]).encode()
    seen = [bytes(row) for row in task.sample(100, generator=generator()).tolist()]
    assert all(window in whole for window in seen)
    assert any(b"\n\n" in window for window in seen)
    apart = task.held_out().sample(100, generator=generator())
    assert not any(b"\n\n" in bytes(row) for row in apart.tolist())


def test_a_tokenizer_file_gives_the_tokens(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: at for at, word in enumerate(["[?]", *sorted(set((FIRST + SECOND).split()))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[?]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    task = Text(source=str(folder), tokenizer=str(path), length=5)
    assert task.vocab_size == len(words)
    documents = task.documents()
    assert documents.lengths.tolist() == [32, 45, 1]
    assert documents.tokens[:4].tolist() == [words[w] for w in ("The", "quick", "brown", "fox.")]
    assert task.sample(4, generator=generator()).shape == (4, 6)
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="other.json is not a tokenizer.json"):
        Text(tokenizer=str(other)).vocab_size  # noqa: B018
    with pytest.raises(FileNotFoundError, match="tokenizer must be an existing file"):
        Text(tokenizer=str(tmp_path / "none.json")).vocab_size  # noqa: B018


def test_a_streamed_data_set(tmp_path, monkeypatch):
    class Rows:
        @staticmethod
        def load_dataset(*names, split, streaming):
            assert names == ("allenai/c4", "en") and split == "train" and streaming
            return iter([{"text": FIRST}, {"text": ""}, {"text": SECOND}, {"text": "never read"}])

    monkeypatch.setitem(sys.modules, "datasets", Rows)
    task = Text(source="hf:allenai/c4:en:train", streamed_documents=3)
    assert bytes(task.documents().tokens) == (FIRST + SECOND).encode()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets: pip install"):
        Text(source="hf:allenai/c4:en:validation").documents()


def test_a_data_set_is_streamed_by_the_datasets_library(tmp_path, monkeypatch):
    # The hub is not asked: a folder is a data set of that name.
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": FIRST, "url": "a"}, {"text": ""}, {"text": SECOND}, {"text": "more"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Text(source=f"hf:{folder}:train", streamed_documents=3).documents()
    assert bytes(found.tokens) == (FIRST + SECOND).encode()
    assert len(found.names) == 2


def test_streams_without_text_or_name(monkeypatch):
    class Rows:
        @staticmethod
        def load_dataset(*names, split, streaming):
            return iter([{"code": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", Rows)
    with pytest.raises(ValueError, match="must have a column 'text', got code"):
        Text(source="hf:code:train").documents()
    with pytest.raises(ValueError, match="must read hf:NAME:SPLIT"):
        Text(source="hf:code").documents()


def test_pieces_are_spread_over_documents_and_do_not_overlap(folder):
    task = Text(source=str(folder))
    ids, names = task.pieces(30, per_document=3)
    assert ids.shape == (6, 31) and names == ("a.txt",) * 3 + ("deeper/b.md",) * 3
    documents = task.documents()
    for number in range(2):
        content = bytes(documents.tokens[documents.starts[number] : documents.starts[number + 1]])
        places = [content.find(bytes(row)) for row in ids[3 * number : 3 * number + 3].tolist()]
        assert min(places) >= 0


def test_pieces_of_distinct_places(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    task = Text(source=str(tmp_path / "a.txt"))
    ids, _ = task.pieces(9, per_document=10)
    np.testing.assert_array_equal(ids.numpy().flatten(), np.arange(1, 101))
    ids, _ = task.pieces(9, per_document=2)
    assert ids[:, 0].tolist() == [21, 71]
    with pytest.raises(
        ValueError, match="lengths must be below the length of a document.*longest of 1 has 100"
    ):
        task.pieces(100)
    with pytest.raises(ValueError, match="per_document must be an integer of at least 1, got 0"):
        task.pieces(9, per_document=0)


def test_fasta_letters_are_codes_and_n_is_masked(fasta):
    task = fasta(">one first record\nACGT\nacgtn\n>empty\n>two\nNNNNNNNNNNNNA\n", "genome.fa.gz")
    found = task.documents()
    assert found.names == ("one", "two") and found.lengths.tolist() == [9, 13]
    assert found.tokens[:9].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4] and task.masked == 4
    assert task.sample(3, generator=generator()).shape == (3, 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ACGT\n", "must be FASTA: line 1 does not begin with >"),
        (">one\nACGT\nACRT\n", "letters A, C, G, T and N, got 'R' in line 3, record one"),
        (">one\n>two\n", "holds no sequences"),
        ("", "holds no sequences"),
    ],
)
def test_what_is_no_fasta(fasta, content, words):
    with pytest.raises(ValueError, match=words):
        fasta(content).documents()


def test_what_is_no_text(tmp_path, folder):
    (tmp_path / "bad.txt").write_bytes(b"fine until \xff here")
    with pytest.raises(ValueError, match=r"bad.txt must be UTF-8, got byte 0xff at 11"):
        Text(source=str(tmp_path / "bad.txt")).documents()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        Text(source=str(tmp_path / "empty.txt")).documents()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="must hold documents"):
        Text(source=str(tmp_path / "nothing")).documents()
    for source in ("", str(tmp_path / "none")):
        for task in (Text(source=source), DNA(source=source)):
            with pytest.raises(FileNotFoundError, match="source must be an existing file"):
                task.documents()
    with pytest.raises(ValueError, match="must be a FASTA file, got the folder"):
        DNA(source=str(folder)).documents()
    for name in ("bad.tar.xz", "bad.txt.xz", "bad.txt.gz"):
        (tmp_path / name).write_bytes(b"not compressed")
        with pytest.raises(ValueError, match="is not a readable"):
            Text(source=str(tmp_path / name)).documents()
    damaged = bytearray(gzip.compress(b"a tale of two cities" * 50))
    damaged[10] ^= 0xFF
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="is not a readable"):
        Text(source=str(tmp_path / "damaged.txt.gz")).documents()
    with pytest.raises(ValueError, match=r"got 1000; the longest of 3 has \d+ tokens"):
        Text(source=str(folder), length=1000).sample(1, generator=generator())
    with pytest.raises(ValueError, match="text needs validation"):
        Text(source=str(folder)).held_out()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"length": 0}, ValueError, "length must be an integer of at least 1, got 0"),
        ({"source": 3}, TypeError, "source must be text, got int"),
        ({"streamed_documents": 0}, ValueError, "streamed_documents must be an integer"),
    ],
)
def test_values_out_of_range(options, error, words):
    with pytest.raises(error, match=words):
        Text(**options)


def test_options_survive_json():
    task = Text(source="books/train", validation="books/valid", length=64)
    assert Text(**json.loads(json.dumps(asdict(task)))) == task
    assert task.at_length(128) == Text(source="books/train", validation="books/valid", length=128)
    assert task.held_out().source == "books/valid"
    with pytest.raises(ValueError, match="count must be an integer of at least 1"):
        task.sample(0, generator=generator())
