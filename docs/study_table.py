"""A table of a study: what its summary says of a few methods in each regime, and checks of remarks on it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from result_table import Check, Remark, Row, Table

Method = tuple[str, str, str | None, str | None]
"""Training, name of a method, how its prior was chosen, link."""


def point(name: str, training: str = "adamw") -> Method:
    """A method without a posterior."""
    return training, name, None, None


def posterior(name: str, training: str = "adamw", choice: str = "evidence") -> Method:
    """A posterior whose predictions go through the probit link."""
    return training, name, choice, "probit"


AVERAGED, CALIBRATED = "NLL, averaged over samples", "NLL, calibrated"
SHIFTED = "under shifts, minus MAP + T of folds"
KEY = ("training", "method", "prior", "link")
# What a difference in NLL is to, by its name in a summary.
TO_FOLDS = {"MAP": "minus MAP", "MAP + T": "minus MAP + T of folds"}
TO_ALL = TO_FOLDS | {"MAP + T (validation)": "minus MAP + T of validation"}
AGAINST_MAP, AGAINST_T, AGAINST_VALIDATION = TO_ALL.values()

# Rows and regimes of several tables, and their names there.
MAP: dict[Method, str] = {
    point("map"): "MAP",
    point("map-t-split"): "MAP + temperature, from folds of the training images",
    point("map-t-validation"): "MAP + temperature, from the validation images",
}
DIGITS = {
    "clean_100": "100 images",
    "wrong_100": "100 images, 20 % wrong labels",
    "clean_300": "300 images",
    "wrong_300": "300 images, 20 % wrong labels",
}
MORE_DIGITS = DIGITS | {"clean_1257": "1,257 images", "wrong_1257": "1,257 images, 20 % wrong labels"}
FEW = {name: DIGITS[name] for name in ("clean_100", "wrong_100")}


@dataclass(frozen=True)
class Shown:
    """Which study a table shows, and what of it."""

    study: str
    """Name of the config and of the work directory."""
    methods: Mapping[Method, str]
    """The rows of each regime in their order: methods, and their names in the table."""
    regimes: Mapping[str, str]
    """The regimes in their order, and their names in the table."""
    differences: Mapping[str, str] = field(default_factory=lambda: TO_ALL)
    """Its columns of differences."""
    foreign: Mapping[str, str] = field(default_factory=lambda: {"noise": "AUROC"})
    """The sets of foreign images in their order, and the heads of their columns of AUROC."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Heads of the columns."""
        numbers = ("NLL", AVERAGED, CALIBRATED, *self.differences.values(), SHIFTED, "ECE", *self.foreign.values())
        return ("training images", "method", *numbers)

    def says(self, method: str, column: str, **verdicts: str) -> Check:
        """Return a check of a column of differences: "better", "alike" or "worse" by the name of the regime.

        Alike are methods that the test images do not tell apart.
        """
        at = self.columns.index(column)

        def check(rows: Sequence[Row]) -> bool:
            found = {row[0]: _verdict(row[at]) for row in rows if row[1] == method}
            return all(found[self.regimes[regime]] == verdict for regime, verdict in verdicts.items())

        return check

    def says_not(self, method: str, column: str, **verdicts: str) -> Check:
        """Return a check that no difference is as these verdicts say."""
        checks = [self.says(method, column, **{regime: verdict}) for regime, verdict in verdicts.items()]
        return lambda rows: not any(check(rows) for check in checks)

    def within(self, method: str, column: str, low: float, high: float, regimes: Iterable[str]) -> Check:
        """Return a check that a number, or the value of a difference, lies between two others in some regimes."""
        at = self.columns.index(column)

        def check(rows: Sequence[Row]) -> bool:
            found = {row[0]: row[at] for row in rows if row[1] == method}
            numbers = [found[self.regimes[regime]] for regime in regimes]
            return all(low < (each[0] if isinstance(each, list) else each) < high for each in numbers)

        return check

    def rises(self, method: str, *columns: str, regimes: Iterable[str]) -> Check:
        """Return a check that the numbers of a method rise in this order of columns, in some regimes."""
        places = [self.columns.index(column) for column in columns]

        def check(rows: Sequence[Row]) -> bool:
            found = {row[0]: [row[at] for at in places] for row in rows if row[1] == method}
            return all(found[self.regimes[regime]] == sorted(found[self.regimes[regime]]) for regime in regimes)

        return check

    def orders(self, column: str, *methods: str, regimes: Iterable[str]) -> Check:
        """Return a check that the numbers of a column rise in this order of methods, in some regimes."""
        at = self.columns.index(column)

        def check(rows: Sequence[Row]) -> bool:
            numbers = {(row[0], row[1]): row[at] for row in rows}
            ordered = [[numbers[self.regimes[regime], method] for method in methods] for regime in regimes]
            return all(each == sorted(each) for each in ordered)

        return check

    def table(
        self,
        name: str,
        heading: str,
        text: str,
        remarks: Sequence[Remark],
        figures: Mapping[str, str] | None = None,
    ) -> Table:
        """Make the table."""
        command = f"python -m training.study --config configs/{self.study}.py --workdir checkpoints/{self.study}"
        record = f"checkpoints/{self.study}/summary/summary.json"
        return Table(name, heading, command, text, self.columns, self.read, self.write, record, remarks, figures or {})

    def read(self, records: list[dict[str, Any]]) -> list[Row]:
        """Turn a summary into rows, with the cells of `columns`."""
        rows = []
        for regime, label in self.regimes.items():
            of_regime = records[0]["regimes"][regime]
            if of_regime["missing"]:
                raise KeyError(f"{of_regime['missing']} units of {regime}")
            by_key = {tuple(row[part] for part in KEY): row for row in of_regime["methods"]}
            for key, name in self.methods.items():
                numbers, to = by_key[key]["numbers"], by_key[key]["differences"]
                differences = [_interval(to.get(other, {}).get("nll")) for other in self.differences]
                shifted = _interval(to.get("MAP + T", {}).get("shift_nll"))
                averaged = by_key.get((*key[:-1], "MC"), {}).get("numbers", {}).get("nll")
                nll = numbers["nll"], averaged, -numbers["calibrated"]
                auroc = [numbers["auroc"][foreign] for foreign in self.foreign]
                rows.append([label, name, *nll, *differences, shifted, numbers["ece"], *auroc])
        return rows

    def write(self, row: Row) -> list[str]:
        """Write a row of numbers. A difference whose interval excludes zero is bold."""
        differences = {*self.differences.values(), SHIFTED}
        cells = dict(zip(self.columns, row, strict=True))
        return [_difference(cell) if column in differences else _number(cell) for column, cell in cells.items()]


def _interval(difference: dict[str, Any] | None) -> list[float] | None:
    return None if difference is None else [difference[part] for part in ("value", "low", "high")]


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return "no difference"
    _, low, high = interval
    return "better" if high < 0 else "worse" if low > 0 else "alike"


def _number(cell: str | float | None) -> str:
    return cell if isinstance(cell, str) else "–" if cell is None else f"{cell:.3f}"


def _difference(interval: list[float] | None) -> str:
    if interval is None:
        return "–"
    value, low, high = interval
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
