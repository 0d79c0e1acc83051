"""Files and directories that are complete under their final name, or not there at all.

They are made under a temporary name beside the final one, flushed to disk, and renamed. What a killed process leaves is
a hidden temporary entry, which the next write to the same path removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path at which to make a file or a directory; on leaving, it takes the place of `path`.

    Until the last instant `path` holds what it held before. A process killed at any point leaves the old or the new
    one; between the two renames that replacing a directory takes, the old one is under a hidden name, from which
    `recover` fetches it back. Where the block fails, what it made is removed and `path` is as it was. Parents are
    created. Two processes must not write to the same path at once.

    Raises
    ------
    OSError
        From the file system: the disk is full, a parent is a file, there is no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, replaced = path.with_name(f".{path.name}.writing"), _replaced(path)
    _remove(temporary)
    _remove(replaced)
    try:
        yield temporary
        _flush(temporary)
        if path.exists() and not (path.is_file() and temporary.is_file()):  # no rename replaces a full directory
            os.replace(path, replaced)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        recover(path)
        raise
    _flush_entry(path.parent)
    _remove(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8: readers see the old one or the new one, whole. See `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def recover(path: Path) -> None:
    """Put the old directory back where a write was killed between moving it aside and moving the new one in."""
    if not path.exists() and _replaced(path).exists():
        os.replace(_replaced(path), path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file, or all of a directory, to disk, so that the rename is never ahead of what it names."""
    for entry in [*path.rglob("*"), path]:
        _flush_entry(entry)


def _flush_entry(entry: Path) -> None:
    if entry.is_dir() and os.name == "nt":
        return  # Windows neither needs nor allows it.
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
