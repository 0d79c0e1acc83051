"""What goes wrong with a checkpoint, in one sentence each."""

import os
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged, has another structure than is asked for, or cannot be saved."""


class SaveError(CheckpointError, OSError):
    """A checkpoint cannot be written: the disk is full, permission is missing, or something else is at its path.

    It is an `OSError` as well, so that callers who expect one of the file system catch it.
    """


class Damage(Exception):
    """A file of a checkpoint is not as it was saved. The message is a clause that names the file."""


def why(error: OSError) -> str:
    """Say what the file system refuses, without the number and the path."""
    return error.strerror or str(error)


def shown(name: Path | str) -> str:
    """Write a path as it stands, or as a literal if it holds what does not print; of a long one both ends."""
    text = os.fspath(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-150:]}"
