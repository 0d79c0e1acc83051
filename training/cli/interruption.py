"""Ctrl-C and termination signals as a question that a program asks where it can stop."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from training.errors import Interrupted

EXIT_STATUS = 130
SECONDS_TO_UNWIND = 2.0
"""After the second signal: how long the program may take to put its files and the terminal in order."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_count: int | None = None
"""Signals that came in the present watch. None if there is no watch."""


def requested() -> bool:
    """Say whether a signal came in the present watch."""
    return bool(_count)


def stop_if_requested(message: str) -> None:
    """Raise Interrupted, with what the person should know, if a signal came."""
    if requested():
        raise Interrupted(message)


@contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Within the block, let SIGINT and SIGTERM only set a flag, and yield the function that returns it.

    An exception would not do: raised while JAX runs one of its own callbacks, it is printed and forgotten. A second
    signal raises KeyboardInterrupt. If that is forgotten too, or the main thread is not in Python, the process ends.
    A block within another shares its flag. Outside the main thread, where Python handles no signals, the block changes
    nothing.
    """
    global _count
    if _count is not None or threading.current_thread() is not threading.main_thread():
        yield requested
        return
    _count = 0
    previous = {number: signal.signal(number, _handle) for number in _SIGNALS}
    arrived, sender = socket.socketpair()
    sender.setblocking(False)
    wakeup = signal.set_wakeup_fd(
        sender.fileno(), warn_on_full_buffer=False
    )  # Told of signals also during computation.
    listener = threading.Thread(target=_end_after_two, args=(arrived,), daemon=True)
    listener.start()
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(wakeup)
        sender.close()  # which ends the thread
        listener.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
        _count = None


def _handle(number: int, frame: FrameType | None) -> None:
    global _count
    _count += 1
    if _count > 1:
        raise KeyboardInterrupt
    # Not through Python's streams: this may interrupt the very call that holds their lock.
    os.write(2, b"\nstopping as soon as the work so far can be kept; once more to stop at once\n")


def _end_after_two(arrived: socket.socket) -> None:
    """End the process if the watch goes on after two signals."""
    with arrived:
        count = 0
        while count < 2:
            if not (number := arrived.recv(1)):  # the end of the watch
                return
            count += number[0] in _SIGNALS
        arrived.settimeout(SECONDS_TO_UNWIND)
        with suppress(TimeoutError):
            if not arrived.recv(1):
                return
    os.write(2, b"stopped at once; what was finished is kept\n")
    os._exit(EXIT_STATUS)
