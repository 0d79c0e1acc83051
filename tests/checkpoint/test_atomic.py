"""Files and directories are whole under their final name, or do not exist; nothing else is ever replaced."""

import os
import threading
from pathlib import Path

import pytest

from bnnlaplace.checkpoint.atomic import recover, replacing, write_text


def make_directory(path: Path, content: str) -> None:
    path.mkdir()
    (path / "inner").write_text(content)


def read(path: Path) -> str:
    return ((path / "inner") if path.is_dir() else path).read_text()


def anything_goes(path: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, Path.write_text),
        (None, make_directory),
        (Path.write_text, Path.write_text),
        (make_directory, make_directory),
    ],
)
def test_the_new_takes_the_place_of_the_old(tmp_path, old, new):
    path = tmp_path / "parent" / "x"
    if old is not None:
        path.parent.mkdir()
        old(path, "old")
    with replacing(path, anything_goes) as temporary:
        new(temporary, "new")
        assert old is None or read(path) == "old"
    assert read(path) == "new" and os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    make_directory(path, "old")
    with pytest.raises(error), replacing(path, anything_goes) as temporary:
        make_directory(temporary, "half")
        raise error
    assert read(path) == "old" and os.listdir(tmp_path) == ["x"]


def test_a_failure_leaves_no_parents(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "a" / "b" / "x"):
        raise KeyError
    assert os.listdir(tmp_path) == []


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
    with pytest.raises(OSError, match="No space left"), replacing(path, anything_goes) as temporary:
        make_directory(temporary, "new")
    assert read(path) == "old" and os.listdir(tmp_path) == ["x"]


# --- what must not be replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "through the parent", "through a link"])
def test_a_directory_that_holds_something_is_left_alone(tmp_path, way):
    make_directory(tmp_path / "work", "thesis")
    (tmp_path / "work" / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    path = {"plain": "work", "through the parent": "work/sub/..", "through a link": "link"}[way]
    refused = pytest.raises(
        FileExistsError, match="must be free; .*work is a directory that holds 'inner'; choose anoth"
    )
    with refused, replacing(tmp_path / path):
        pytest.fail("nothing may be written before the refusal")
    assert read(tmp_path / "work") == "thesis" and sorted(os.listdir(tmp_path)) == ["link", "work"]


@pytest.mark.parametrize("path", ["here", "here/..", ".", "..", "/", "~", "~/.."])
def test_places_are_refused_even_if_all_may_be_replaced(tmp_path, monkeypatch, path):
    for place in ("here", "home/me"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.chdir(tmp_path / "here")
    target = Path(path.replace("~", str(tmp_path / "home/me"))) if path[0] in "~./" else tmp_path / path
    refused = pytest.raises(
        FileExistsError, match="is (a parent of )?the (current|home) directory; choose another path"
    )
    with refused, replacing(target, anything_goes):
        pytest.fail("nothing may be written before the refusal")
    assert sorted(os.listdir(tmp_path)) == ["here", "home"]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(FileExistsError, match="neither a file nor a directory"):
        write_text(tmp_path / "x", "text")


def test_a_directory_that_is_filled_meanwhile_is_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(FileExistsError, match="holds 'inner'"), replacing(tmp_path / "x") as temporary:
        make_directory(temporary, "new")
        (tmp_path / "x" / "inner").write_text("thesis")
    assert read(tmp_path / "x") == "thesis" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [make_directory, Path.write_text])
def test_a_link_is_followed_any_number_of_times(tmp_path, make):
    (tmp_path / "there").mkdir()
    make(tmp_path / "there" / "x", "0")
    (tmp_path / "link").symlink_to("there/x")
    for content in ("1", "2", "3"):
        with replacing(tmp_path / "link", anything_goes) as temporary:
            make(temporary, content)
        assert (tmp_path / "link").is_symlink() and read(tmp_path / "there" / "x") == content
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == ["x"]


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="must not be a link to nowhere; got .*link; create .*nowhere"):
        write_text(tmp_path / "link", "text")
    assert os.listdir(tmp_path) == ["link"]


# --- writes that were killed, and writes at once --------------------------------------------------------------------


def test_remains_of_a_killed_write_are_cleared(tmp_path):
    path = tmp_path / "x"
    workspace = tmp_path / ".x.writing"
    workspace.mkdir()
    make_directory(workspace / "new", "half")
    make_directory(workspace / "replaced", "old")
    recover(path)
    assert read(path) == "old" and os.listdir(tmp_path) == ["x"]
    workspace.mkdir()
    make_directory(workspace / "new", "half")
    write_text(tmp_path / "y", "text, \N{GREEK SMALL LETTER DELTA}")
    with replacing(path, anything_goes) as temporary:
        make_directory(temporary, "new")
    assert read(path) == "new" and sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert (tmp_path / "y").read_bytes() == "text, \N{GREEK SMALL LETTER DELTA}".encode()


def test_remains_of_the_first_release_are_cleared(tmp_path):
    """It wrote to `.x.writing` itself, and moved the old directory to `.x.replaced`."""
    make_directory(tmp_path / ".x.replaced", "old")
    (tmp_path / ".x.writing").mkdir()
    (tmp_path / ".x.writing" / "metadata.json").write_text("half")
    recover(tmp_path / "x")
    assert read(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]
    (tmp_path / ".y.json.writing").write_text("half")
    write_text(tmp_path / "y.json", "new")
    assert sorted(os.listdir(tmp_path)) == ["x", "y.json"]


def test_an_empty_directory_in_the_place_of_the_old_does_not_hide_it(tmp_path):
    """A program that is started again may create its directory before it looks into it."""
    (tmp_path / ".x.writing").mkdir()
    make_directory(tmp_path / ".x.writing" / "replaced", "old")
    (tmp_path / "x").mkdir()
    recover(tmp_path / "x")
    assert read(tmp_path / "x") == "old"


def test_a_hidden_directory_of_somebody_else_is_left_alone(tmp_path):
    make_directory(tmp_path / ".x.writing", "thesis")
    with pytest.raises(FileExistsError, match="must hold an unfinished write; it holds 'inner'; move it away"):
        write_text(tmp_path / "x", "text")
    recover(tmp_path / "x")
    assert read(tmp_path / ".x.writing") == "thesis" and os.listdir(tmp_path) == [".x.writing"]


def test_a_file_or_link_in_place_of_the_hidden_directory_is_left_alone(tmp_path):
    """It was taken for what the first release left, whatever it was."""
    (tmp_path / ".x.writing").write_text("thesis")
    (tmp_path / ".y.json.writing").symlink_to(".x.writing")
    for name in ("x", "y.json"):
        with pytest.raises(FileExistsError, match="must be free for an unfinished write; move what is there away"):
            write_text(tmp_path / name, "text")
        recover(tmp_path / name)
    assert (tmp_path / ".x.writing").read_text() == "thesis"
    assert sorted(os.listdir(tmp_path)) == [".x.writing", ".y.json.writing"]


def test_a_write_that_fails_after_a_killed_one_leaves_the_old(tmp_path):
    """The kill came between the renames, so the old directory is under its hidden name when the next write starts."""
    (tmp_path / ".x.writing").mkdir()
    make_directory(tmp_path / ".x.writing" / "replaced", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "x"):
        raise KeyError
    assert read(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


def test_a_reader_leaves_a_running_write_alone(tmp_path):
    make_directory(tmp_path / "x", "old")
    with replacing(tmp_path / "x", anything_goes) as temporary:
        make_directory(temporary, "new")
        recover(tmp_path / "x")
        assert read(temporary) == "new"
    assert read(tmp_path / "x") == "new"


def test_writers_at_once_wait_for_each_other(tmp_path):
    inside, most = [], []

    def write(number: int) -> None:
        for _ in range(10):
            with replacing(tmp_path / "x", anything_goes) as temporary:
                inside.append(number)
                most.append(len(inside))
                make_directory(temporary, str(number))
                inside.remove(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 40 and max(most) == 1
    assert read(tmp_path / "x") in "0123" and os.listdir(tmp_path) == ["x"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "x", "text")
