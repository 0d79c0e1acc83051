"""Files of a run: written whole or not at all, in a directory that was found writable before work was spent on it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnnlaplace import files
from training.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write a file: readers see the old one or the new one, whole.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path at which to make a file, which takes the place of `path` once it is whole.

    Raises
    ------
    UserError
        The file cannot be written; what `path` held is still there.
    """
    try:
        with files.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"{path} must be writable; got {error.strerror or error}; free the disk or choose another directory"
        ) from error


def why_not_writable(directory: Path) -> str | None:
    """Say why no file could be made in a directory, or in the one that it would be made in; None where one could.

    Leaves nothing behind, the directory itself included.
    """
    place = directory.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"
