"""One program at a time in a work directory: a lock that the system releases when its holder ends, however it ends.

The file `.lock` is locked by `flock`, and names the holder for the message that a second program prints. After a
SIGKILL or a reboot the file is still there, and its lock is not: the next program takes it over and says so.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from training.errors import UserError

LOCK_FILE = ".lock"

# What file systems answer that have no locks, as some network file systems do.
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def held(directory: Path, *, shared: bool = False, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a directory within the block. The directory is made if it is missing.

    Parameters
    ----------
    directory
        The directory.
    shared
        For a program that only reads: any number of those may share the lock. If the directory cannot be written,
        nobody can change what is read, and nothing is locked.
    report
        Told in one line that the lock of a program that was killed is taken over, or that there are no locks here.

    Raises
    ------
    UserError
        Another process holds it. The message names its program, process, host and start.
    OSError
        The directory or the file cannot be written.
    """
    descriptor = _open(directory / LOCK_FILE, shared, report)
    try:
        yield
    finally:
        if descriptor is not None:
            _release(directory / LOCK_FILE, descriptor)


def _open(path: Path, shared: bool, report: Callable[[str], None]) -> int | None:
    """Open and lock the file. If nothing can or need be locked: None."""
    if shared and not path.exists() and not os.access(path.parent, os.W_OK):
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name of the holder is not written through a link, into a file of somebody else.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError:
            if shared and not os.access(path.parent, os.W_OK):
                return None
            raise
        try:
            if not _lock(descriptor, shared):
                raise UserError(_busy(path, _read(descriptor)))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _UNSUPPORTED:
                report(f"warning: {path.parent} has no locks; see that only one program at a time uses it")
                return None
            raise
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # Its holder removed the file between our opening and our locking it.
    before = _read(descriptor)
    if before and not shared:
        report(f"taking over the lock of {_who(before)}, which ended without releasing it")
    with contextlib.suppress(OSError):  # On a full disk the lock holds without a name.
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_ourselves()).encode(), 0)
    return descriptor


def _lock(descriptor: int, shared: bool) -> bool:
    """Lock a file without waiting, and say whether that was possible."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no locks on this system")
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(path: Path, descriptor: int) -> None:
    """Remove the file unless others share it, and give the lock back."""
    with contextlib.suppress(OSError):
        if _lock(descriptor, shared=False) and _is_still(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Say whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, Any]:
    program = (sys.modules["__main__"].__spec__ and sys.modules["__main__"].__spec__.name) or Path(sys.argv[0]).name
    return {
        "program": program,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _read(descriptor: int) -> dict[str, Any]:
    """Read who holds or held the lock. If that is not readable: nothing."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _who(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    names = {name: str(record.get(name, "?"))[:80] for name in ("program", "pid", "host", "started")}
    return "{program}, process {pid} on host {host} since {started}".format(**names)


def _busy(path: Path, record: dict[str, Any]) -> str:
    return (
        f"one program at a time may use a work directory; {path.parent} is in use by {_who(record)}; wait for its end, "
        "stop it, or use another --workdir"
    )
