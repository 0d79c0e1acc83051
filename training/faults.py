"""Full disks, missing permissions and exhausted memory, recognised in whatever exception they arrive."""

import errno
import os
from collections.abc import Iterator

# Libraries in C++ raise errors of their own, whose text holds the words of the system. JAX does so for memory.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


def describe(error: BaseException) -> str | None:
    """Say in one line what the disk or the memory refused, and what helps. For an error of another kind: None."""
    causes = list(_causes(error))
    for cause in causes:
        if fault := _disk(cause):
            return fault
    for cause in causes:
        if isinstance(cause, MemoryError) or any(word in str(cause) for word in _MEMORY):
            return (
                f"there must be enough memory: {_line(cause) or 'an allocation failed'}; free memory, or lower "
                "--curvature.max-vectors or --curvature.microbatch of training.fit_van"
            )
    return None


def _disk(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno is None and ";" in str(error):
        return _line(error)  # a sentence already, with advice
    if isinstance(error, BrokenPipeError):
        return "what is printed must be read to the end; got Broken pipe; print to a file, or to nothing: > /dev/null"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        advice = "free the disk, or mend the permissions" if error.errno in _DISK else "check the path and the disk"
        return f"files must be readable and writable; got {where}{error.strerror or error}; {advice}"
    words = [os.strerror(number) for number in _DISK if os.strerror(number) in str(error)]
    if not words:
        return None
    return f"files must be readable and writable; got {words[0]}; free the disk, or mend the permissions"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, and what it holds, each once."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        parts = [cause.__cause__, cause.__context__, *getattr(cause, "exceptions", ())]
        waiting += [part for part in parts if isinstance(part, BaseException)]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]
