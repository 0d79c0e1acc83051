"""One table of the results, as `docs/results.py` reads and writes it."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = list[Any]
Record = dict[str, Any]
Check = Callable[[Sequence[Row]], bool]


def row_of(rows: Sequence[Row], label: str) -> Row:
    """Return the row that begins with a label."""
    return next(row for row in rows if row[0] == label)


def as_list(texts: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown list, or of a paragraph if there is one text alone."""
    first, rest = ("- ", "  ") if len(texts) > 1 else ("", "")
    options = {"initial_indent": first, "subsequent_indent": rest, "break_on_hyphens": False}
    return [line for text in texts for line in textwrap.wrap(text, 120, **options)]


def all_of(*checks: Check) -> Check:
    """Whether all of some checks hold."""
    return lambda rows: all(check(rows) for check in checks)


@dataclass(frozen=True)
class Remark:
    """A statement below a table, and whether its numbers support it."""

    text: str
    """In Markdown."""
    holds: Check = lambda rows: True
    """Whether the rows still say so. Without it the remark explains, and rests on no number of the table."""


@dataclass(frozen=True)
class Table:
    """One table: where its numbers come from, and how they are written."""

    name: str
    """Its key in `results.json`."""
    heading: str
    command: str
    """The command that prints these numbers."""
    text: str
    """What is measured, in Markdown, above the table."""
    columns: Sequence[str]
    read: Callable[[list[Record]], list[Row]]
    """Turns the records into rows of numbers. A KeyError says that a record is not of a whole benchmark."""
    write: Callable[[Row], list[str]]
    """Turns a row of numbers into the cells of the table."""
    record: str | None = None
    """A file of `benchmarks/results`, or one by its path from the root; None for the metrics of the runs."""
    remarks: Sequence[Remark] = ()
    """Statements below the table, as a list if there are several."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """Figures below the table, in files beside the record, and what they show."""

    def image(self, figure: str) -> str:
        """Return the name that a figure has in `docs/images`."""
        return f"{self.name}_{figure}"

    def remarks_on(self, rows: Sequence[Row]) -> list[str]:
        """Return the lines below the table.

        Raises
        ------
        SystemExit
            The rows contradict a remark.
        """
        for remark in self.remarks:
            if not remark.holds(rows):
                raise SystemExit(
                    f"the numbers of table {self.name!r} must agree with what is said of them; they contradict: "
                    f"{remark.text} Write that remark anew, where the table is defined"
                )
        return as_list([remark.text for remark in self.remarks])
