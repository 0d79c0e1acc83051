"""A save replaces a checkpoint and nothing else; what stops it leaves everything as it was."""

import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import bnnlaplace
from bnnlaplace.checkpoint import CheckpointError, load_pytree, pytree, save_pytree
from bnnlaplace.checkpoint.errors import Damage


def save(path: Path, value: float = 1.0) -> None:
    save_pytree(path, {"w": np.full(300, value)}, {"value": value})


def value_at(path: Path) -> float:
    tree, metadata = load_pytree(path)
    assert (tree["w"] == metadata["value"]).all()
    return metadata["value"]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


# --- what is refused ------------------------------------------------------------------------------------------------


def thesis(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("thesis")


def checkpoint_with_a_note(path: Path) -> None:
    save(path)
    (path / "notes.txt").write_text("note")


def checkpoint_with_a_note_among_its_arrays(path: Path) -> None:
    save(path)
    (path / "arrays" / "notes.txt").write_text("note")


def checkpoint_of_linked_arrays(path: Path) -> None:
    save(path)
    (path / "arrays").rename(path.parent / "elsewhere")
    (path / "arrays").symlink_to(path.parent / "elsewhere")


def web_application(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"files": {"main.js": "/static/main.js"}}))
    (path / "metadata.json").write_text(json.dumps({"title": "mine"}))


def folder_of_arrays(path: Path) -> None:
    (path / "arrays").mkdir(parents=True)
    (path / "arrays" / "00000.bin").write_bytes(b"mine")


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (thesis, "thesis.tex"),
        (checkpoint_with_a_note, "notes.txt"),
        (checkpoint_with_a_note_among_its_arrays, "arrays/notes.txt"),
        (checkpoint_of_linked_arrays, "arrays"),
        (web_application, "manifest.json"),
        (folder_of_arrays, "arrays"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_left_alone(tmp_path, make, held):
    make(tmp_path / "x")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=f"must not overwrite .*x is a directory that holds '{held}'; choose ano"):
        save(tmp_path / "x")
    assert snapshot(tmp_path) == before and ".x.writing" not in os.listdir(tmp_path)


def test_a_file_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("thesis")
    with pytest.raises(CheckpointError, match="must not overwrite anything but a checkpoint; .*x is a file; choose"):
        save(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"must be able to write to .*x/y; got Not a directory|File exists"):
        save(tmp_path / "x" / "y")
    assert (tmp_path / "x").read_text() == "thesis" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("path", [".", "../here", ".."])
def test_the_current_directory_is_left_alone(tmp_path, monkeypatch, diagonal, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="the current directory; choose another path"):
        diagonal.save(path)
    assert os.getcwd() == str(tmp_path / "here") and os.listdir(tmp_path) == ["here"] and os.listdir() == []


def test_a_checkpoint_inside_another_is_refused(tmp_path):
    """The outer one could not be read any more, as its manifest lists all files."""
    save(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    for inner in ("x/inner", "x/arrays/inner", "link/a/b"):
        with pytest.raises(CheckpointError, match="lies in the checkpoint .*x, which would be damaged; choose another"):
            save(tmp_path / inner)
    assert value_at(tmp_path / "x") == 1.0


def test_names_that_do_not_print_are_shown_as_literals(tmp_path):
    """A message with such a path ended in the middle of a line, or could not be printed."""
    for name in ("a\nb", os.fsdecode(b"\xff")):
        thesis(tmp_path / name)
        with pytest.raises(CheckpointError, match="is a directory that holds 'thesis.tex'") as caught:
            save(tmp_path / name)
        assert str(caught.value).isprintable()


def test_a_path_that_cannot_be_looked_at(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for path in ("n" * 300, "relative"):
        for call in (save, load_pytree):
            with pytest.raises(CheckpointError, match="File name too long|No such file or directory"):
                call(Path(path))


@pytest.mark.parametrize(
    ("path", "error"),
    [("", ValueError), ("a\0b", ValueError), ("\ud800", ValueError), (3, TypeError), (None, TypeError)],
)
def test_what_is_not_a_path(diagonal, path, error, unchecked_annotations):
    with pytest.raises(error, match=r"save\(path=...\) must be a path; got"):
        diagonal.save(path)
    with pytest.raises(error, match=r"load\(path=...\) must be a path; got"):
        bnnlaplace.Laplace.load(path, diagonal.network)


# --- what is replaced -----------------------------------------------------------------------------------------------


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def with_half_a_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 20)


def with_a_pipe_for_a_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


def without_arrays(path: Path) -> None:
    shutil.rmtree(path / "arrays")


def without_metadata(path: Path) -> None:
    (path / "metadata.json").unlink()


def whole(path: Path) -> None:
    pass


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        *(whole, empty, without_manifest, with_half_a_manifest, with_a_pipe_for_a_manifest),
        *(without_arrays, without_metadata),
    ],
)
def test_a_checkpoint_is_replaced_damaged_or_not(tmp_path, damage):
    save(tmp_path / "x")
    damage(tmp_path / "x")
    save(tmp_path / "x", 2.0)
    assert value_at(tmp_path / "x") == 2.0 and os.listdir(tmp_path) == ["x"]


def test_saves_through_a_link_keep_the_link(tmp_path, diagonal):
    (tmp_path / "scratch" / "posterior").mkdir(parents=True)
    (tmp_path / "link").symlink_to("scratch/posterior")
    for _ in range(3):
        diagonal.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert bnnlaplace.Laplace.load(tmp_path / "link", diagonal.network).prior == diagonal.prior
    assert os.listdir(tmp_path / "scratch") == ["posterior"]


def test_a_link_to_nowhere(tmp_path, diagonal):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="must not be a link to nowhere; got .*link; create .*nowhere"):
        diagonal.save(tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


# --- file systems that refuse ---------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Files of at most 1,000 bytes: writing more fails as it does on a full disk, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_is_full_is_one_sentence_and_loses_nothing(tmp_path, request, capfd, old):
    if old:
        save(tmp_path / "x")
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match=r"must be able to write to .*x; got File too large; free the") as caught:
        save(tmp_path / ("x" if old else "new/x"), 2.0)
    assert isinstance(caught.value, OSError) and caught.value.__cause__ is None
    assert os.listdir(tmp_path) == (["x"] if old else []) and (not old or value_at(tmp_path / "x") == 1.0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("call", ["fsync", "mkdir", "replace"])
def test_each_call_to_the_file_system_may_fail(tmp_path, monkeypatch, call):
    save(tmp_path / "x")
    before = snapshot(tmp_path)

    def failing(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(
        CheckpointError, match="must be able to write to .*x; got No space left on device; free the dis"
    ):
        save(tmp_path / "x", 2.0)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["x"]


@pytest.fixture
def open_directory():
    """A directory that everybody may enter, for a process that is not the superuser for a while."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        save(Path(directory) / "imported")  # which imports what may be out of reach later
        shutil.rmtree(Path(directory) / "imported")
        if user == 0:
            os.seteuid(65534)
        yield Path(directory)
        os.seteuid(user)


def test_what_permissions_forbid(open_directory):
    save(open_directory / "x")
    open_directory.joinpath("there").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="must be able to write to .*y; got Permission denied; free the disk"):
        save(open_directory / "there" / "y")
    for name in ("manifest.json", "metadata.json", "arrays/00000.bin", "arrays", "."):
        entry = open_directory / "x" / name
        mode = entry.stat().st_mode
        entry.chmod(0)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); restore it"):
            load_pytree(open_directory / "x")
        entry.chmod(mode)
    assert value_at(open_directory / "x") == 1.0 and sorted(os.listdir(open_directory)) == ["there", "x"]


# --- a reader beside a writer ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    save(tmp_path / "x")
    read, calls = pytree._arrays, []

    def replaced_meanwhile(path, declared):
        calls.append(declared)
        if len(calls) == 1:
            save(path, 2.0)
            raise Damage("an array is missing")
        return read(path, declared)

    monkeypatch.setattr(pytree, "_arrays", replaced_meanwhile)
    assert value_at(tmp_path / "x") == 2.0 and len(calls) == 2


@pytest.mark.parametrize("metadata", [{"text": "x" * 17_000_000}, {"lists": [[]] * 1_100_000}], ids=["long", "wide"])
def test_metadata_that_would_not_be_parsed_are_not_written(tmp_path, metadata):
    with pytest.raises(ValueError, match=r"metadata=...\)` must be at most 16.8 MB of JSON .*a million.*; put numbers"):
        save_pytree(tmp_path / "x", {}, metadata)
    assert os.listdir(tmp_path) == []
