"""One program at a time in a directory, also after the holder was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import lock
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import sys, time
from pathlib import Path
from training import lock
with lock.held(Path(sys.argv[1]), shared=sys.argv[2] == "shared", report=print):
    print("held", flush=True)
    time.sleep(60)
"""


def quiet(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path."""
    kind = getattr(request, "param", "alone")
    command = [sys.executable, "-c", HOLDER, str(tmp_path), kind]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with lock.held(tmp_path / "new" / "run", report=quiet):
        record = json.loads((tmp_path / "new" / "run" / ".lock").read_text())
        assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.mark.parametrize("shared", [False, True])
def test_the_second_is_told_who_holds_it(holder: subprocess.Popen, shared: bool, tmp_path: Path) -> None:
    named = rf"{tmp_path} is in use by -c, process {holder.pid} on host {socket.gethostname()} since \d+-"
    with pytest.raises(UserError, match=named) as caught, lock.held(tmp_path, shared=shared, report=quiet):
        pass
    assert "\n" not in str(caught.value) and (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said: list[str] = []
    with lock.held(tmp_path, report=said.append):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert len(said) == 1 and f"taking over the lock of -c, process {holder.pid} on host" in said[0]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("record", ["", "half a rec", "[1]", '{"pid": 1}'])
def test_any_remains_of_a_reboot_are_taken_over(record: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(record)
    with lock.held(tmp_path, report=lambda message: None):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("shared", [False, True])
def test_the_lock_is_not_written_through_a_link(shared: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("thesis")
    (tmp_path / ".lock").symlink_to("thesis")
    with pytest.raises(OSError, match="symbolic links"), lock.held(tmp_path, shared=shared, report=quiet):
        pass
    assert (tmp_path / "thesis").read_text() == "thesis" and (tmp_path / ".lock").is_symlink()


@pytest.mark.parametrize("holder", ["shared"], indirect=True)
def test_readers_share_it_and_keep_a_writer_out(holder: subprocess.Popen, tmp_path: Path) -> None:
    with lock.held(tmp_path, shared=True, report=quiet):
        pass
    assert (tmp_path / ".lock").exists()
    with pytest.raises(UserError, match="is in use by"), lock.held(tmp_path, report=quiet):
        pass


def test_a_reader_of_a_directory_that_nobody_can_write_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.os, "access", lambda path, mode: False)
    with lock.held(tmp_path, shared=True, report=quiet):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    said: list[str] = []
    with lock.held(tmp_path, report=said.append):
        pass
    assert said == [f"warning: {tmp_path} has no locks; see that only one program at a time uses it"]


def test_a_full_disk_still_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(lock.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", refuse)
    busy = pytest.raises(UserError, match="in use by another process")
    with lock.held(tmp_path, report=quiet), busy, lock.held(tmp_path, report=quiet):
        pass
