"""JSON documents that carry their own SHA-256, so that a changed bit is an error and never another number.

A document is an object of JSON. Its entry "sha256" is the digest of all its other entries, written without spaces and
with sorted keys. It lies in the same file, so one rename replaces both, and a killed process cannot part them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from training.errors import UserError

ENTRY = "sha256"

# More than any document has. It bounds what a file that has been replaced by another can make a program read.
_LARGEST = 64 * 2**20


def digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a document, without its own entry for it."""
    content = {name: value for name, value in document.items() if name != ENTRY}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump(document: dict[str, Any], indent: int) -> str:
    """Write a document with its digest as JSON. Numbers have to be finite."""
    return json.dumps({**document, ENTRY: digest(document)}, indent=indent, allow_nan=False) + "\n"


def load(path: Path) -> tuple[dict[str, Any], bool]:
    """Read a document, and say whether a digest vouches for it. The entry of the digest is taken out.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    UserError
        It is not a regular file that can be read, not an object of JSON, or its digest is that of another document.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"the file must be an object; got {str(document)[:80]}")
    if ENTRY not in document:
        return document, False
    if document.pop(ENTRY) != digest(document):
        raise UserError("its entry sha256 must be the digest of all others; something in it was changed afterwards")
    return document, True


def read_json(path: Path) -> Any:
    """Read a JSON file, however odd what lies there may be. Raises as `load` does, except for the digest."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe would wait forever
            raise UserError("it must be a file; got something else")
        if path.stat().st_size > _LARGEST:
            raise UserError(f"the file must have at most {_LARGEST} bytes; got {path.stat().st_size}")
        return from_json(path.read_bytes())  # Unlike `json`, it bounds how deep a document may be nested.
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"the file must be readable; got {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"the file must be JSON; got {error}") from error
