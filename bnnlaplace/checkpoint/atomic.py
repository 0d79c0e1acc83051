"""Atomic writes: under its final name a file or directory is complete, or it does not exist.

It is made under a temporary name beside the final one, flushed to disk, and renamed. A killed process leaves a hidden
temporary entry, which the next write to the same path removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. The file or directory that the block makes there then takes the place of `path`.

    Until then `path` stays as it was, and it stays so if the block fails. A process killed at any point leaves the old
    content or the new. To replace a directory takes two renames; between them the old one is under a hidden name, from
    which `recover` puts it back. Parents are created. Two processes must not write to the same path at once.

    Parameters
    ----------
    path
        The file or directory to write or to replace.

    Raises
    ------
    OSError
        If the file system refuses: the disk is full, a parent is a file, or permission is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, replaced = path.with_name(f".{path.name}.writing"), _replaced(path)
    _remove(temporary)
    _remove(replaced)
    try:
        yield temporary
        _flush(temporary)
        if path.exists() and not (path.is_file() and temporary.is_file()):  # a rename cannot replace a full directory
            os.replace(path, replaced)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        recover(path)
        raise
    _flush_entry(path.parent)
    _remove(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 by `replacing`: a reader sees all of the old text or all of the new.

    Parameters
    ----------
    path
        The file to write or to replace.
    text
        All of its new text.

    Raises
    ------
    OSError
        If the file system refuses, as for `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def recover(path: Path) -> None:
    """Put the old directory back if a write was killed between moving it aside and moving the new one in."""
    if not path.exists() and _replaced(path).exists():
        os.replace(_replaced(path), path)


def _replaced(path: Path) -> Path:
    """The hidden path of the old entry between the two renames."""
    return path.with_name(f".{path.name}.replaced")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file, or all of a directory, to disk, so that the rename never reaches the disk before the content."""
    for entry in [*path.rglob("*"), path]:
        _flush_entry(entry)


def _flush_entry(entry: Path) -> None:
    if entry.is_dir() and os.name == "nt":
        return  # Windows neither needs nor allows flushing a directory.
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
