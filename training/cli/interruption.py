"""Ctrl-C and termination signals as a question that a program asks where it can stop."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from training.errors import Interrupted

EXIT_STATUS = 130

# After the second signal: how long the program may take to put its files and the terminal in order.
SECONDS_TO_UNWIND = 2.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_counts: list[int] = []
"""The signals that came, for each watch under way: none, or one, since only one can change a process's handlers."""


def requested() -> bool:
    """Whether a signal came in the watch that is under way."""
    return bool(_counts and _counts[0])


def stop_if_requested(message: str) -> None:
    """Raise Interrupted, with what the person should know, if a signal came."""
    if requested():
        raise Interrupted(message)


@contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM only set a flag; the function given to the block returns it.

    An exception would not do: raised while JAX runs one of its own callbacks, it is printed and forgotten. A second
    signal raises KeyboardInterrupt at once, and ends the process where that is forgotten too or the main thread is
    not in Python. The previous handlers return with the end of the block. In a block within another, the signals are
    those of the outer one. Outside the main thread, where Python lets nobody handle signals, the flag stays false.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    if _counts:
        yield requested
        return
    _counts.append(0)
    previous = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        with _ending_the_process_on_the_second():
            yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _counts.clear()


def _handle(number: int, frame: FrameType | None) -> None:
    _counts[0] += 1
    if _counts[0] > 1:
        raise KeyboardInterrupt
    # Not through Python's streams: this may interrupt the very call that holds their lock.
    os.write(2, b"\nstopping as soon as the work so far can be kept; once more to stop at once\n")


@contextmanager
def _ending_the_process_on_the_second() -> Iterator[None]:
    """A thread that hears of signals while the main thread computes, and ends the process if that goes on."""
    hears, told = socket.socketpair()
    told.setblocking(False)
    previous = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()

    def listen() -> None:
        count = 0
        while count < 2:
            heard = hears.recv(16)
            if ended.is_set():
                return
            count += sum(number in _SIGNALS for number in heard)
        if not ended.wait(SECONDS_TO_UNWIND):
            os.write(2, b"stopped at once; what was finished is kept\n")
            os._exit(EXIT_STATUS)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        ended.set()
        told.send(b"\0")
        thread.join()
        hears.close()
        told.close()
