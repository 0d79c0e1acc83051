"""The table of a study in the results: what its summary says of a few methods in each regime."""

from typing import Any

Row = list[Any]

SUMMARY = "checkpoints/study_digits_short/summary/summary.json"

# Method, how its prior was chosen, link: in the order of the table.
SHOWN = {
    ("map", None, None): "MAP",
    ("map-t-split", None, None): "MAP + temperature, from folds of the training images",
    ("map-t-validation", None, None): "MAP + temperature, from the validation images",
    ("last-layer-full-laplace", "evidence", "probit"): "last layer, Laplace, by the evidence",
    ("last-layer-full-variational", "evidence", "probit"): "last layer, variational, by the evidence",
}
REGIMES = {
    "clean_100": "100 images",
    "wrong_100": "100 images, 20 % wrong labels",
    "clean_300": "300 images",
    "wrong_300": "300 images, 20 % wrong labels",
}


def read_study(records: list[dict[str, Any]]) -> list[Row]:
    """Turn a summary into rows: regime, method, NLL, two differences, ECE, AUROC, and NLL under shifts."""
    rows = []
    for regime, label in REGIMES.items():
        of_regime = records[0]["regimes"][regime]
        if of_regime["missing"]:
            raise KeyError(f"{of_regime['missing']} units of {regime}")
        by_key = {(row["method"], row["prior"], row["link"]): row for row in of_regime["methods"]}
        for key, name in SHOWN.items():
            row = by_key[key]
            differences = [_interval(row["differences"].get(other, {}).get("nll")) for other in ("MAP", "MAP + T")]
            shifted = _interval(row["differences"].get("MAP + T", {}).get("shift_nll"))
            numbers = row["numbers"]
            rows.append([label, name, numbers["nll"], *differences, shifted, numbers["ece"], numbers["auroc"]["noise"]])
    return rows


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
