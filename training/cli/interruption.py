"""Ctrl-C and termination signals as a question that a program asks where it can stop."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from training.errors import Interrupted

EXIT_STATUS = 130
SECONDS_TO_UNWIND = 2.0
"""How long the program may take to put its files and the terminal in order: after the second signal, or after the first
one where nothing is lost by it."""

STOPPED_AT_ONCE = "stopped at once; what was finished is kept"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_count: int | None = None
"""Signals that came in the present watch. None if there is no watch."""
_nothing_to_keep: str | None = None
"""Within `promptly`: what the person should know. Otherwise None."""
_advice = ""


def requested() -> bool:
    """Say whether a signal came in the present watch."""
    return bool(_count)


def insisted() -> bool:
    """Say whether two signals came in the present watch."""
    return (_count or 0) > 1


def stop_if_requested(message: str) -> None:
    """Raise Interrupted, with what the person should know, if a signal came."""
    if requested():
        raise Interrupted(message)


def end_while_loading() -> None:
    """Until a watch begins, let a signal end the process with a line. Otherwise imports end in pages of traceback.

    Streams that are closed, as by `>&-`, are opened first: the next file would get their number, and all messages.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (stays open; takes the lowest free number)

    def end(number: int, frame: FrameType | None) -> None:
        _end("stopped; nothing was running")

    for number in _SIGNALS:
        signal.signal(number, end)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Within the block, end the last line of a program that has to be ended with some advice."""
    global _advice
    before, _advice = _advice, advice
    try:
        yield
    finally:
        _advice = before


@contextmanager
def promptly(message: str) -> Iterator[None]:
    """Within the block there is nothing to keep: the first signal ends the process, whatever runs, in two seconds.

    If the block asks earlier, by `stop_if_requested`, the program ends in the usual way. At the end of the block it
    does so in any case.
    """
    global _nothing_to_keep
    before, _nothing_to_keep = _nothing_to_keep, message
    try:
        yield
        stop_if_requested(message)
    finally:
        _nothing_to_keep = before


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
    # Told of signals also while the main thread computes outside Python.
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_end_when_due, args=(arrived,), daemon=True)
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


def _end_when_due(arrived: socket.socket) -> None:
    """End the process if the watch goes on for too long after two signals, or after one with nothing to keep."""
    with arrived:
        count, due = 0, None
        while True:
            is_last = count > 1 or (count == 1 and _nothing_to_keep is not None)
            if is_last and due is None:
                due = time.monotonic() + SECONDS_TO_UNWIND
            if due is not None and time.monotonic() >= due:
                break
            # After one signal the block with nothing to keep may still begin.
            arrived.settimeout(0.1 if count else None)
            try:
                number = arrived.recv(1)
            except TimeoutError:
                continue
            if not number:  # the end of the watch
                return
            count += number[0] in _SIGNALS
    _end(STOPPED_AT_ONCE if count > 1 or _nothing_to_keep is None else _nothing_to_keep)


def _end(message: str) -> None:
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # A live progress bar has hidden the cursor.
    os.write(2, f"{message}{_advice}\n".encode())
    os._exit(EXIT_STATUS)
