"""Files are written whole or not at all, and those that come with goatviz are found by name."""

import pytest

from goatviz.files import check_shipped, shipped_file, shipped_names, whole_file


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a.txt"
    with whole_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists() and temporary.parent == tmp_path
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_shipped_files_by_ending():
    names = shipped_names(".safetensors")
    assert names == sorted(names) and "copy-mixture-1-goat" in names
    # Every checkpoint has its card.
    assert set(names) == set(shipped_names(".json"))
    assert shipped_file("README.md").read_text(encoding="utf-8").startswith("# ")
    assert shipped_names(".pt") == []


def test_a_name_that_is_not_shipped():
    check_shipped("a", ["a", "b"])
    with pytest.raises(KeyError, match="name must be one of a, b; got 'c'"):
        check_shipped("c", ["a", "b"])
