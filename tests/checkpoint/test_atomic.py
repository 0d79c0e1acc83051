"""Files and directories are whole under their final name, or do not exist."""

import os
from pathlib import Path

import pytest

from bnnlaplace.checkpoint.atomic import recover, replacing, write_text


def make_directory(path: Path, content: str) -> None:
    path.mkdir()
    (path / "inner").write_text(content)


def read(path: Path) -> str:
    return ((path / "inner") if path.is_dir() else path).read_text()


@pytest.mark.parametrize("old", [None, Path.write_text, make_directory], ids=["nothing", "file", "directory"])
@pytest.mark.parametrize("new", [Path.write_text, make_directory], ids=["file", "directory"])
def test_the_new_takes_the_place_of_the_old(tmp_path, old, new):
    path = tmp_path / "parent" / "x"
    if old is not None:
        path.parent.mkdir()
        old(path, "old")
    with replacing(path) as temporary:
        new(temporary, "new")
        assert old is None or read(path) == "old"
    assert read(path) == "new" and os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    make_directory(path, "old")
    with pytest.raises(error), replacing(path) as temporary:
        make_directory(temporary, "half")
        raise error
    assert read(path) == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_rename_that_fails_leaves_the_old(tmp_path, monkeypatch, fails_at):
    path, calls, rename = tmp_path / "x", [], os.replace
    make_directory(path, "old")

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at + 1:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        make_directory(temporary, "new")
    assert read(path) == "old" and os.listdir(tmp_path) == ["x"]


def test_remains_of_a_killed_write_are_cleared(tmp_path):
    path = tmp_path / "x"
    make_directory(tmp_path / ".x.writing", "half")
    make_directory(tmp_path / ".x.replaced", "old")
    recover(path)
    assert read(path) == "old"
    write_text(tmp_path / "y", "text, \N{GREEK SMALL LETTER DELTA}")
    with replacing(path) as temporary:
        make_directory(temporary, "new")
    assert read(path) == "new" and sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert (tmp_path / "y").read_bytes() == "text, \N{GREEK SMALL LETTER DELTA}".encode()


def test_a_write_that_fails_after_a_killed_one_leaves_the_old(tmp_path):
    """The kill came between the renames, so the old directory is under its hidden name when the next write starts."""
    make_directory(tmp_path / ".x.replaced", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "x"):
        raise KeyError
    assert read(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "x", "text")
