"""Signals: the first is a question, the second stops the program even where exceptions are forgotten."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from training.cli import interruption
from training.errors import Interrupted

ROOT = Path(__file__).resolve().parents[3]


def test_a_second_signal_stops_at_once_and_handlers_return(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruption.watch() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("stopping as soon as") == 1


def test_a_watch_within_another_asks_the_outer_one(capfd: pytest.CaptureFixture[str]) -> None:
    with interruption.watch() as outer:
        with interruption.watch() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner() and outer() and interruption.requested()
        assert outer()
        with pytest.raises(Interrupted, match="stopped here"):
            interruption.stop_if_requested("stopped here")
    assert not interruption.requested()
    interruption.stop_if_requested("stopped here")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of Unix")
def test_streams_that_are_closed_are_opened_before_anything_else_takes_their_place(tmp_path: Path) -> None:
    """The next file would have number 1 or 2, and what is printed or said at a signal would be written into it."""
    code = (
        "import os, sys; from training.cli.interruption import end_while_loading; end_while_loading(); "
        f"file = open({str(tmp_path / 'x')!r}, 'w'); print('out'); os.write(1, b'out'); os.write(2, b'said'); "
        "file.write(str(file.fileno() > 2))"
    )
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "x").read_text() == "True"


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def ask() -> tuple[bool, Any]:
        with interruption.watch() as interrupted:
            return interrupted(), signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() == (False, before)


# Signals that come within a callback of the garbage collector, as JAX has one. Exceptions there are forgotten.
IN_A_CALLBACK = """
import gc, os, signal, sys, time
from training.cli import interruption
from training.errors import Interrupted

def interrupt(phase, info):
    for _ in range(int(sys.argv[1]) if phase == "start" else 0):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

interruption.SECONDS_TO_UNWIND = 0.2
try:
    with interruption.watch():
        gc.callbacks.append(interrupt)
        gc.collect(0)
        gc.callbacks.clear()
        if sys.argv[1] == "2":
            time.sleep(60)
        interruption.stop_if_requested("stopped; all is kept")
except Interrupted as error:
    sys.exit(str(error))
print("went on")
"""


@pytest.mark.parametrize(
    ("signals", "status", "last_line"),
    [(1, 1, "stopped; all is kept"), (2, 130, "stopped at once; what was finished is kept")],
)
def test_signals_in_a_callback_are_not_forgotten(signals: int, status: int, last_line: str) -> None:
    command = [sys.executable, "-c", IN_A_CALLBACK, str(signals)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == status and "went on" not in done.stdout
    assert done.stderr.splitlines()[-1] == last_line
    assert ("Exception ignored" in done.stderr) == (signals == 2)  # the control: a second one does raise there


# One signal, where there is nothing to keep and the program does not answer.
STUCK = """
import signal, sys, time
from training.cli import interruption
from training.errors import Interrupted

interruption.SECONDS_TO_UNWIND = 0.2
try:
    with interruption.watch(), interruption.advising("; continue with: it"):
        if sys.argv[1] == "before":
            signal.raise_signal(signal.SIGTERM)
        with interruption.promptly("stopped; nothing is written"):
            if sys.argv[1] == "within":
                signal.raise_signal(signal.SIGTERM)
            if sys.argv[1] != "answer":
                time.sleep(60)
            signal.raise_signal(signal.SIGTERM)
        print("went on")
except Interrupted as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("when", "status", "last_line"),
    [
        ("before", 130, "stopped; nothing is written; continue with: it"),
        ("within", 130, "stopped; nothing is written; continue with: it"),
        ("answer", 1, "stopped; nothing is written"),
    ],
)
def test_with_nothing_to_keep_one_signal_is_enough(when: str, status: int, last_line: str) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK, when], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.splitlines()[-1] == last_line


LOADING = """
import signal, time
from training.cli import interruption
interruption.end_while_loading()
signal.raise_signal(signal.SIGINT)
print("went on")
"""


def test_a_signal_while_a_program_loads_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", LOADING], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; nothing was running\n")
