"""The command line as a typed record, and one line for one that cannot be used."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from training.errors import UserError

Record = TypeVar("Record")

_FRAME = "│╭╮╰╯─ "


def parse(record: type[Record], argv: Sequence[str], program: str, **options: Any) -> Record:
    """Read the arguments into a record, by `tyro.cli`, which takes the `options`.

    Raises
    ------
    UserError
        An option is unknown or has no value, or one of the wrong type: the message names both and `--help`.
    SystemExit
        After `--help`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(record, args=list(argv), prog=program, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(f"{first_paragraph(said.getvalue())}; see {program} --help")


def first_paragraph(box: str) -> str:
    """What the box that tyro draws says first, as one line: the fault, before help texts and suggestions."""
    lines = []
    for line in box.splitlines():
        text = line.strip(_FRAME)
        if text and not line.startswith("╭"):  # whose line holds the title
            lines.append(text)
        elif lines:
            break
    said = " ".join(lines).removeprefix("Error parsing ").removesuffix(" (required)").rstrip(".")
    return said or "the arguments must be those that the program knows"
