"""Reliability diagrams: accuracy against confidence, bin by bin."""

from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bnnlaplace.calibration.metrics import ReliabilityBins
from bnnlaplace.plots.style import FONT, GREY, Look, finish, looks_of, new_figure, tick

# The hatching of a gap, by whether the confidence is above or below the accuracy.
_OVER, _UNDER = "/////", "....."


def reliability_diagram(
    methods: Mapping[str, ReliabilityBins], columns: int = 2, looks: Mapping[str, Look] | None = None
) -> Figure:
    """Draw one reliability diagram for each method, with a histogram of the confidences below it.

    Parameters
    ----------
    methods
        The bins of each method by its name; see `bnnlaplace.calibration.reliability_bins`.
    columns
        How many diagrams to put side by side.
    looks
        The colour of each method; by default by their order. See `bnnlaplace.plots.looks`.

    Returns
    -------
    Figure
        Bars are accuracies, and their hatched ends the gaps to the mean confidence. Whiskers are 95 % Wilson intervals
        of the accuracy: a gap that its whisker spans may be chance.

    Raises
    ------
    ValueError
        If there are no methods, or looks are given and one has none.
    """
    if not methods:
        raise ValueError("methods must hold at least one method; got none; pass {'MAP': reliability_bins(...)}")
    columns = min(columns, len(methods))
    rows = -(-len(methods) // columns)
    # Panels are placed in inches. An automatic layout would make the first column narrower, because it has the labels.
    side, step_x, step_y, below, top = 1.6, 1.82, 2.9, 1.1, 0.6
    width, height = max(3.7, 0.86 + step_x * columns), top + step_y * rows
    figure = new_figure(width, height, layout="none")

    def place(row: int, column: int, bottom: float, tall: float) -> Axes:
        low = height - top - step_y * (row + 1) + bottom
        return figure.add_axes(((0.82 + step_x * column) / width, low / height, side / width, tall / height))

    highest = 0.5 if all(2 * bins.counts.max() <= bins.counts.sum() for bins in methods.values()) else 1
    for position, (name, look) in enumerate(looks_of(methods, looks).items()):
        bins = methods[name]
        row, column = divmod(position, columns)
        diagram, histogram = place(row, column, below, side - 0.1), place(row, column, below - 0.6, 0.45)
        error = _reliability_bars(diagram, bins, look.colour)
        _histogram(histogram, bins, look.colour)
        diagram.set_title(f"{name}\nECE {error:.3f}", fontsize=FONT)
        finish(diagram, "accuracy" if column == 0 else "")
        finish(histogram, "share of\nimages" if column == 0 else "", "confidence")
        diagram.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(0, 1), yticks=(0, 0.5, 1))
        histogram.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(0, highest), yticks=(0, highest))
        diagram.tick_params(labelbottom=False)
        for panel in (diagram, histogram):
            panel.yaxis.set_major_formatter(FuncFormatter(tick))
            panel.xaxis.set_major_formatter(FuncFormatter(tick))
            panel.yaxis.set_label_coords(-0.45 / side, 0.5)
            panel.tick_params(labelleft=column == 0)
    figure.legend(handles=_keys(), loc="upper center", ncols=2, fontsize=FONT, frameon=False)
    return figure


def _keys() -> list[Artist]:
    """Entries of the legend, the same for all methods."""
    return [
        Patch(color=GREY, alpha=0.6, lw=0, label="accuracy"),
        Patch(facecolor="white", edgecolor=GREY, hatch=_OVER, lw=0.5, label="gap: overconfident"),
        Patch(facecolor="white", edgecolor=GREY, hatch=_UNDER, lw=0.5, label="gap: underconfident"),
        Line2D([], [], color="black", marker="|", ms=9, ls="none", label="95 % interval"),
    ]


def _histogram(panel: Axes, bins: ReliabilityBins, colour: str) -> None:
    """Draw the share of the images in each bin."""
    share, width = bins.counts / bins.counts.sum(), np.diff(bins.edges)
    panel.bar(bins.edges[:-1], share, width, align="edge", color=colour, alpha=0.6, edgecolor="white", lw=0.5)


def _reliability_bars(panel: Axes, bins: ReliabilityBins, colour: str) -> float:
    """Draw one diagram, and return the calibration error of its bins."""
    occupied = bins.counts > 0
    left, width = bins.edges[:-1][occupied], np.diff(bins.edges)[occupied]
    accuracy, confidence, count = bins.accuracy[occupied], bins.confidence[occupied], bins.counts[occupied]
    reached = np.minimum(accuracy, confidence)
    panel.bar(left, reached, width, align="edge", color=colour, alpha=0.6, edgecolor="white", lw=0.5)
    for sign, hatch, face in ((-1, _OVER, "white"), (1, _UNDER, colour)):
        gap = np.where(sign * (accuracy - confidence) > 0, np.abs(accuracy - confidence), 0)
        panel.bar(
            left, gap, width, bottom=reached, align="edge",
            facecolor=to_rgba(face, 0.25), hatch=hatch, edgecolor=GREY, lw=0.5,
        )  # fmt: skip
    # Wilson's interval, which unlike the normal one has a width at accuracy 0 and 1.
    square = 1.96**2
    centre = (accuracy + square / (2 * count)) / (1 + square / count)
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / count + square / (4 * count**2)) / (1 + square / count)
    panel.vlines(left + width / 2, centre - half, centre + half, color="black", lw=0.9)
    panel.plot([0, 1], [0, 1], color="black", lw=0.8, ls=(0, (4, 3)))
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())
