"""Figures of `krylov.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

matplotlib.use("Agg")

# The colour-blind can tell the colours of Okabe and Ito apart; markers and dashes make the same distinctions in print.
TIME_STYLES = {
    "ours forward": ("#56B4E9", "-", "o"),
    "ours value and gradient": ("#0072B2", "-", "s"),
    "ours value and gradient, backpropagation": ("#009E73", "-", "^"),
    "matfree forward": ("#E69F00", "--", "o"),
    "matfree value and gradient": ("#D55E00", "--", "s"),
}
ERROR_STYLES = {
    "projection": ("#0072B2", "-", "s"),
    "no projection": ("#CC79A7", "-", "v"),
    "backpropagation": ("#009E73", "--", "^"),
    "matfree": ("#D55E00", ":", "D"),
    "matfree, no projection": ("#E69F00", ":", "o"),
}


def panels(titles: list[str], ylabels: list[str], xlabel: str, sharey: bool = False) -> tuple[Figure, list[Any]]:
    """Make a row of panels with a light grid."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=sharey)
    for axis, title, ylabel in zip(axes, titles, ylabels, strict=True):
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def finish(figure: Figure, axes: list[Any], path: Path) -> Path:
    """Put one legend for all panels below them, and write the file."""
    labelled = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    return path


def draw(axis: Any, x: list[float], y: list[float], label: str, style: tuple[str, str, str]) -> None:
    """Draw a line with open markers, so that lines on top of each other stay visible."""
    colour, dashes, marker = style
    axis.plot(x, y, dashes, color=colour, marker=marker, markerfacecolor="white", markersize=6, label=label)


def plot_time(record: Mapping[str, Any], path: Path) -> Path:
    """Draw time and memory against depth. A case that was not run has no time."""
    depths = list(record["depths"])
    size = f"Lanczos, {record['rows']:,} rows"
    figure, axes = panels([f"{size}: time", f"{size}: memory"], ["milliseconds", "megabytes"], "depth")
    for name, style in TIME_STYLES.items():
        measured = [(depth, record["depths"][depth][name]) for depth in depths if name in record["depths"][depth]]
        timed = [(depth, 1e3 * case["seconds"]) for depth, case in measured if case["seconds"] is not None]
        sized = [(depth, case["memory_bytes"] / 1e6) for depth, case in measured]
        for axis, points in zip(axes, (timed, sized), strict=True):
            if points:
                draw(axis, *map(list, zip(*points, strict=True)), name, style)
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_locator(FixedLocator(depths))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    return finish(figure, axes, path)


def plot_hilbert(record: Mapping[str, Any], path: Path) -> Path:
    """Draw the error of the Jacobian against the size of the Hilbert matrix, in one panel for each method."""
    errors = record["log10_errors"]
    titles = [f"{method.capitalize()}, float64" for method in errors]
    figure, axes = panels(
        titles, ["root-mean-square error of the Jacobian", ""], "rows of the Hilbert matrix", sharey=True
    )
    for axis, lines in zip(axes, errors.values(), strict=True):
        for name, logarithms in lines.items():
            draw(axis, record["sizes"], [10**value for value in logarithms], name, ERROR_STYLES[name])
        axis.set(yscale="log")
        axis.xaxis.set_major_locator(FixedLocator(record["sizes"]))
    return finish(figure, axes, path)
