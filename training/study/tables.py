"""The tables of a study in Markdown."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.report.numbers import digits
from training.study import method_names

INTRODUCTION = """\
Numbers are means over seeds. A difference is that to the reference training, with its 95 % interval over images and
seeds (ECE, rejection and AUROC: over seeds alone), and a method is called better or worse only where the interval
excludes zero. "+ T" is a temperature: fitted on training images that the networks of folds have not
seen, or on the validation images. In differences it is that of the folds unless validation is named.
Posteriors have the prior that the evidence chose (a lower bound for variational ones), or beside it the one with the
lowest NLL on the validation images, which only those methods and "MAP + T (validation images)" use; or the one with
the lowest NLL on the shares of the folds.
"""


def page(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the whole page."""
    yield "# Study"
    yield ""
    yield f"Command: `{document['command']}`"
    yield f"Versions: {', '.join(f'{name} {number}' for name, number in document['versions'].items())}"
    yield f"Platform: {document['platform']}. Reference training: {document['reference']}."
    yield ""
    yield from INTRODUCTION.splitlines()
    for name, regime in document["regimes"].items():
        yield from _regime(name, regime)


def short(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one small table for each regime: NLL, its differences, ECE and accuracy."""
    columns = [_name, _value("nll"), _difference("nll", "MAP"), _difference("nll", "MAP + T"), _value("ece")]
    heads = ["method", "NLL", "minus MAP", "minus MAP + T", "ECE", "accuracy"]
    for name, regime in document["regimes"].items():
        yield f"{name}: {_sizes(regime)}"
        if regime["methods"]:
            yield from _table(heads, [*columns, _value("accuracy")], regime["methods"])
        yield from _failures(regime)


def _regime(name: str, regime: dict[str, Any]) -> Iterator[str]:
    rows = regime["methods"]
    yield from ("", f"## {name}", "", _sizes(regime), "")
    if not rows:
        yield from _failures(regime)
        return
    yield from _table(
        ["method", "NLL", "minus MAP", "minus MAP + T", "minus MAP + T (validation)", "minus MAP of its training"],
        [
            _name,
            _value("nll"),
            *(_difference("nll", other) for other in ("MAP", "MAP + T", "MAP + T (validation)", "own MAP")),
        ],
        rows,
    )
    foreign = sorted({entry for row in rows for entry in (row["numbers"]["auroc"] or {})})
    yield ""
    yield from _table(
        ["method", "calibrated log likelihood", "minus MAP", "ECE", "Brier", "accuracy", "confidence", "rejection"]
        + [f"AUROC {entry}" for entry in foreign],
        [
            _name,
            _value("calibrated"),
            _difference("calibrated", "MAP"),
            *(_value(score) for score in ("ece", "brier", "accuracy", "confidence", "rejection")),
            *(_value("auroc", entry) for entry in foreign),
        ],
        rows,
    )
    shifts = sorted({entry for row in rows for entry in (row["numbers"]["shifts"] or {})})
    if shifts:
        yield ""
        yield from _table(
            ["method", "NLL under shifts, minus MAP", "minus MAP + T", *(f"NLL {entry} 1 / 3 / 5" for entry in shifts)],
            [
                _name,
                _difference("shift_nll", "MAP"),
                _difference("shift_nll", "MAP + T"),
                *(_severities(entry) for entry in shifts),
            ],
            rows,
        )
    yield ""
    yield from _table(
        ["method", "prior precision", "log evidence or bound", "temperature", "seconds of fit and choice", "notes"],
        [_name, _of("prior_precision"), _of("log_evidence"), _of("temperature"), _seconds, _notes],
        rows,
    )
    yield from _failures(regime)


def _sizes(regime: dict[str, Any]) -> str:
    if not (regime["methods"] or regime["failures"]):
        return f"Nothing has been computed: all {regime['missing']} units are missing."
    images = regime["about"].get("images", {})
    seeds = sorted({seed for row in regime["methods"] for seed in row["seeds"]}) or ["none"]
    missing = f"; {regime['missing']} units are missing" if regime["missing"] else ""
    words = ", ".join(f"{count:,} {name}" for name, count in images.items())
    return f"Images: {words}. Seeds: {', '.join(map(str, seeds))}{missing}."


def _failures(regime: dict[str, Any]) -> Iterator[str]:
    for each in regime["failures"]:
        yield f"- failed: {each['training']}, {each['name']}, seed {each['seed']}: {each['failed']}"


def _table(
    heads: Sequence[str], columns: Sequence[Callable[[dict[str, Any]], str]], rows: Sequence[dict[str, Any]]
) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join('---' for _ in heads)}|"
    for row in rows:
        yield f"| {' | '.join(column(row) for column in columns)} |"


# --- columns --------------------------------------------------------------------------------------------------------


def _name(row: dict[str, Any]) -> str:
    chosen = ", ".join(filter(None, (row["prior"], row["link"])))
    return f"{row['training']}: {method_names.label(row['method'])}{f' ({chosen})' if chosen else ''}"


def _value(*names: str) -> Callable[[dict[str, Any]], str]:
    def column(row: dict[str, Any]) -> str:
        value = row["numbers"]
        for name in names:
            value = None if value is None else value.get(name)
        return "not finite" if value is None else digits(value)

    return column


def _of(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row[name] is None else digits(row[name])


def _difference(score: str, other: str) -> Callable[[dict[str, Any]], str]:
    def column(row: dict[str, Any]) -> str:
        entry = row["differences"].get(other, {}).get(score)
        if entry is None:
            return ""
        if entry["low"] is None:
            return f"{digits(entry['value'], sign='+')}"
        low, high = digits(entry["low"], sign="+"), digits(entry["high"], sign="+")
        return f"{digits(entry['value'], sign='+')} [{low}, {high}] {entry['verdict']}"

    return column


def _severities(shift: str) -> Callable[[dict[str, Any]], str]:
    def column(row: dict[str, Any]) -> str:
        values = (row["numbers"]["shifts"] or {}).get(shift, {}).get("nll")
        if values is None:
            return "not finite"
        return " / ".join(
            "not finite" if values[severity] is None else digits(values[severity]) for severity in (1, 3, 5)
        )

    return column


def _seconds(row: dict[str, Any]) -> str:
    seconds = row["seconds"] or {}
    return " + ".join(digits(seconds[name]) for name in ("fit", "prior") if name in seconds)


def _notes(row: dict[str, Any]) -> str:
    return "; ".join([*row["reservations"], *row["warnings"]]).replace("|", "/")
