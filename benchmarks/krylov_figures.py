"""The figures of `krylov.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

matplotlib.use("Agg")

# Colours of Okabe and Ito, which the colour-blind tell apart; markers and dashes say the same in print.
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
    """A row of panels with a light grid."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=sharey)
    for axis, title, ylabel in zip(axes, titles, ylabels, strict=True):
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def finish(figure: Figure, axes: list[Any], path: Path) -> Path:
    """One legend for all panels below them, and the file."""
    labelled = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    return path


def draw(axis: Any, x: list[float], y: list[float], label: str, style: tuple[str, str, str]) -> None:
    """One line with markers, open so that lines on top of each other stay visible."""
    colour, dashes, marker = style
    axis.plot(x, y, dashes, color=colour, marker=marker, markerfacecolor="white", markersize=6, label=label)


def plot_time(found: Mapping[str, Any], path: Path) -> Path:
    """Time and memory against depth; what was not run has no time."""
    depths = list(found["depths"])
    size = f"Lanczos, {found['rows']:,} rows"
    figure, axes = panels([f"{size}: time", f"{size}: memory"], ["milliseconds", "megabytes"], "depth")
    for name, style in TIME_STYLES.items():
        measured = [(depth, found["depths"][depth][name]) for depth in depths if name in found["depths"][depth]]
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


def plot_hilbert(found: Mapping[str, Any], path: Path) -> Path:
    """The error of the Jacobian against the size of the Hilbert matrix, one panel for each method."""
    errors = found["log10_errors"]
    titles = [f"{method.capitalize()}, float64" for method in errors]
    figure, axes = panels(
        titles, ["root-mean-square error of the Jacobian", ""], "rows of the Hilbert matrix", sharey=True
    )
    for axis, lines in zip(axes, errors.values(), strict=True):
        for name, logarithms in lines.items():
            draw(axis, found["sizes"], [10**value for value in logarithms], name, ERROR_STYLES[name])
        axis.set(yscale="log")
        axis.xaxis.set_major_locator(FixedLocator(found["sizes"]))
    return finish(figure, axes, path)
