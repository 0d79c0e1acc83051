"""The tables of studies in the results: what a summary says of a few methods in each regime."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = list[Any]
# Name of a method, how its prior was chosen, link.
Method = tuple[str, str | None, str | None]

COLUMNS = (
    "training images",
    "method",
    "NLL",
    "minus MAP",
    "minus MAP + T of folds",
    "under shifts, minus MAP + T of folds",
    "ECE",
    "AUROC",
)

_MAP: dict[Method, str] = {
    ("map", None, None): "MAP",
    ("map-t-split", None, None): "MAP + temperature, from folds of the training images",
    ("map-t-validation", None, None): "MAP + temperature, from the validation images",
}
_BY_EVIDENCE: dict[Method, str] = {
    ("last-layer-full-laplace", "evidence", "probit"): "last layer, Laplace, by the evidence",
    ("last-layer-full-variational", "evidence", "probit"): "last layer, variational, by the evidence",
}
_DIGITS = {
    "clean_100": "100 images",
    "wrong_100": "100 images, 20 % wrong labels",
    "clean_300": "300 images",
    "wrong_300": "300 images, 20 % wrong labels",
}


@dataclass(frozen=True)
class StudyTable:
    """Which study a table shows, and what of it."""

    name: str
    """Of the config and of the work directory."""
    methods: Mapping[Method, str]
    """What the table calls each method, in its order."""
    regimes: Mapping[str, str]
    """What it calls each regime, in its order."""

    @property
    def command(self) -> str:
        """The command that prints the numbers."""
        return f"python -m training.study --config configs/{self.name}.py --workdir checkpoints/{self.name}"

    @property
    def record(self) -> str:
        """The file that holds them."""
        return f"checkpoints/{self.name}/summary/summary.json"

    def read(self, records: list[dict[str, Any]]) -> list[Row]:
        """Turn a summary into rows: regime, method, NLL, two differences, that under shifts, ECE and AUROC."""
        rows = []
        for regime, label in self.regimes.items():
            of_regime = records[0]["regimes"][regime]
            if of_regime["missing"]:
                raise KeyError(f"{of_regime['missing']} units of {regime}")
            by_key = {(row["method"], row["prior"], row["link"]): row for row in of_regime["methods"]}
            for key, name in self.methods.items():
                row = by_key[key]
                differences = [_interval(row["differences"].get(other, {}).get("nll")) for other in ("MAP", "MAP + T")]
                shifted = _interval(row["differences"].get("MAP + T", {}).get("shift_nll"))
                numbers = row["numbers"]
                measured = [numbers["nll"], *differences, shifted, numbers["ece"], numbers["auroc"]["noise"]]
                rows.append([label, name, *measured])
        return rows


BY_EVIDENCE = StudyTable("study_digits_short", _MAP | _BY_EVIDENCE, _DIGITS)
BY_FOLDS = StudyTable(
    "study_digits_folds",
    _MAP
    | {
        ("lanczos-laplace-by-folds", "folds", "probit"): "all weights, Laplace, by folds",
    },
    _DIGITS,
)
NATURAL = StudyTable(
    "study_cifar10_short",
    _MAP
    | _BY_EVIDENCE
    | {
        ("last-layer-full-laplace-by-folds", "folds", "probit"): "last layer, Laplace, by a held-out tenth",
    },
    {"clean_2000": "2,000 images"},
)


def write_study(row: Row) -> list[str]:
    """Write a row of numbers. A difference whose interval excludes zero is bold."""
    regime, name, nll, *differences, ece, auroc = row
    return [regime, name, f"{nll:.3f}", *map(_difference, differences), f"{ece:.3f}", f"{auroc:.3f}"]


def _interval(difference: dict[str, Any] | None) -> list[float] | None:
    return None if difference is None else [difference[part] for part in ("value", "low", "high")]


def _difference(interval: list[float] | None) -> str:
    if interval is None:
        return "–"
    value, low, high = interval
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
