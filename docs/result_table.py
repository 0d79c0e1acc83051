"""One table of the results, as `docs/results.py` reads and writes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = list[Any]
Record = dict[str, Any]


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
    remarks: str = ""
    """What follows from the table, in Markdown, below it."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """Figures below the table, in files beside the record, and what they show."""

    def image(self, figure: str) -> str:
        """Return the name that a figure has in `docs/images`."""
        return f"{self.name}_{figure}"
