"""Ctrl-C and termination signals as a question that a loop asks between two steps."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM only set a flag; the function given to the block returns it.

    A second signal raises KeyboardInterrupt at once. The previous handlers return with the end of the block. Outside
    the main thread, where Python lets nobody handle signals, the flag stays false.
    """
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        # Not through Python's streams: this may interrupt the very call that holds their lock.
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
