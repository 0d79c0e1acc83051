"""The tables of a run: the short one on the console and in the report, and the rows of all methods and metrics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnlaplace.calibration import paired_differences
from training.report.findings import reservations
from training.report.numbers import difference, ends, number, precision
from training.report.results import MethodResult, RunResults, difference_from_map


class _Column(NamedTuple):
    heading: str
    direction: int
    """1 if larger is better, -1 if smaller is better, 0 if neither is."""


_COLUMNS = {
    "accuracy": _Column("accuracy", 1),
    "nll": _Column("NLL", -1),
    "ece": _Column("ECE", -1),
    "ece_equal_mass": _Column("ECE, equal mass", -1),
    "brier": _Column("Brier", -1),
    "confidence": _Column("confidence", 0),
    "auroc": _Column("AUROC", 1),
    "fpr95": _Column("FPR95", -1),
}
_SHORT = ("accuracy", "nll", "ece", "auroc")
_ARROWS = {1: "\N{NO-BREAK SPACE}\N{UPWARDS ARROW}", -1: "\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}", 0: ""}
_WIDE = 100  # Columns that the table takes on a console with its intervals.


def best_methods(methods: Sequence[MethodResult], metric: str) -> set[str]:
    """Return the labels of the best method and of those that the images do not tell from it.

    Two methods are told apart if the paired 95 % interval of their difference excludes zero. The set is empty if no
    method is told from the best, and for metrics without a better direction.
    """
    direction = _COLUMNS[metric].direction
    if direction == 0:
        return set()
    best = max(methods, key=lambda method: direction * method.bootstrap.values[metric])
    tied = {
        method.label
        for method in methods
        if not paired_differences(method.bootstrap, best.bootstrap)[metric].excludes_zero
    }
    return tied if len(tied) < len(methods) else set()


def short_columns(results: RunResults) -> list[str]:
    """Return the metrics of the short table."""
    return [metric for metric in _SHORT if metric in results.methods[0].bootstrap.values]


def all_columns(results: RunResults) -> list[str]:
    """Return all metrics that the run has."""
    return [metric for metric in _COLUMNS if metric in results.methods[0].bootstrap.values]


def headings(columns: Sequence[str]) -> list[str]:
    """Return the heading of each metric, with an arrow towards the better."""
    return [_COLUMNS[metric].heading + _ARROWS[_COLUMNS[metric].direction] for metric in columns]


def rows(results: RunResults, methods: Sequence[MethodResult], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each method, as the template of the report takes it."""
    best = {metric: best_methods(methods, metric) for metric in columns}
    table = []
    for method, before in zip(methods, (methods[0], *methods), strict=False):
        metrics, differences = method.metrics, difference_from_map(results, method)
        cells = [
            {
                "heading": _COLUMNS[metric].heading,
                "value": number(metrics[metric].value),
                "ends": ends(metrics[metric]),
                "difference": "" if method is results.methods[0] else difference(differences[metric]),
                "best": method.label in best[metric],
            }
            for metric in columns
        ]
        row = {"label": method.label, "name": method.name, "precision": _precision(method), "cells": cells}
        table.append(row | {"starts_section": method.name != before.name})
    return table


def print_table(console: Console, results: RunResults) -> None:
    """Print the short table, where the rest is, and what qualifies the numbers.

    If the console is wide enough, each value has its 95 % interval. Bold is for the best of a column and for what the
    images do not tell from it; see `best_methods`.
    """
    wide = console.width >= _WIDE
    columns, methods = short_columns(results), results.short_table
    title = f"{results.data}, {results.split}: {evaluated(results)} images"
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    table.add_column("prior\nprec.", justify="right", no_wrap=True)
    for metric in columns:
        table.add_column(_COLUMNS[metric].heading, justify="right", no_wrap=True)
        if metric == "nll":
            table.add_column("NLL minus\nthat of MAP", justify="right")
    for method, row in zip(methods, rows(results, methods, columns), strict=True):
        cells = []
        for metric, cell in zip(columns, row["cells"], strict=True):
            value = f"[bold]{cell['value']}[/bold]" if cell["best"] else cell["value"]
            cells.append(f"{value}\n[dim]{cell['ends']}[/dim]" if wide else value)
            if metric == "nll":
                cells.append(escape(cell["difference"] if wide else cell["difference"].replace(" [", "\n[")))
        table.add_row(escape(method.name), row["precision"], *cells)
    console.print(table)
    intervals = "" if wide else "intervals, "
    kept = "" if results.kept_precision is None else f"{results.kept_precision} "
    console.print(
        f"Posteriors by the evidence alone, probit link. {kept}Bold: best, or not told from the best by these images "
        f"(paired bootstrap, 95 %). All else ({intervals}precisions by the validation NLL, Monte Carlo link, more "
        "metrics): metrics.json, report.html.",
        style="dim",
        highlight=False,
    )
    for reservation in reservations(results):
        console.print(f"note: {reservation}", style="yellow", markup=False, highlight=False)


def evaluated(results: RunResults) -> str:
    """Write how many images of the split were evaluated, and of how many if not of all."""
    total = results.num_images[results.split]
    of_all = "" if results.num_evaluated == total else f" of {total:,}"
    return f"{results.num_evaluated:,}{of_all}"


def _precision(method: MethodResult) -> str:
    return "" if method.prior_precision is None else precision(method.prior_precision)
