"""Figure of how well confidence tells own images from foreign ones: ROC curves, and histograms of the confidence."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bnnlaplace.calibration.detection import roc_curve
from bnnlaplace.plots.style import FONT, NARROW, Look, finish, looks_of, new_figure, tick

_BINS = 20


class Confidences(NamedTuple):
    """Confidence of one method in its predictions.

    Attributes
    ----------
    own
        On N images like those of training, for example the largest class probability.
    foreign
        On M images unlike them.
    """

    own: Float[np.ndarray, " N"]
    foreign: Float[np.ndarray, " M"]


def detection_figure(
    methods: Mapping[str, Confidences], looks: Mapping[str, Look] | None = None, score: str = "confidence"
) -> Figure:
    """Draw the ROC curves of all methods, and below them for each a histogram of its confidence on both kinds of image.

    Parameters
    ----------
    methods
        By name, in the order of the legend. Scores may be any numbers that are higher for own images.
    looks
        Colour and line style of each method; by default by their order. See `bnnlaplace.plots.looks`.
    score
        What the numbers are, for the axis of the histograms.

    Returns
    -------
    Figure
        The legend has the area under each curve (AUROC): the chance that an own image gets a higher score than a
        foreign one. Histograms share their bins; own images are filled, and foreign ones are a black outline.

    Raises
    ------
    ValueError
        If there are no methods, looks are given and one has none, or scores are not numbers.
    """
    if not methods:
        raise ValueError("methods must hold at least one method; got none; pass {'MAP': Confidences(own, foreign)}")
    styles = looks_of(methods, looks)
    rows = -(-len(methods) // 2)
    # Panels are placed in inches, so that the ROC is square and all histograms are of one size.
    key, side, below, step = 0.2 * len(methods) + 0.15, 2.9, 0.95, 1.25
    height = key + side + below + rows * step
    figure = new_figure(NARROW, height, layout="none")
    bottom = height - key - side
    panel = figure.add_axes(((0.95) / NARROW, bottom / height, side / NARROW, side / height))
    for name, (colour, style) in styles.items():
        curve = roc_curve(*methods[name])
        panel.plot(
            100 * curve.false_positive_rate, 100 * curve.true_positive_rate,
            color=colour, ls=style, lw=1.8, label=f"{name}: AUROC {curve.area:.3f}", clip_on=False,
        )  # fmt: skip
    panel.plot([0, 100], [0, 100], color="black", lw=0.8, ls=(0, (4, 3)))
    finish(panel, "own images accepted (%)", "foreign images accepted (%)")
    panel.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100))
    figure.legend(*panel.get_legend_handles_labels(), loc="upper left", fontsize=FONT, frameon=False, borderaxespad=0.2)
    _histograms(figure, methods, styles, score, top=bottom - below, step=step)
    return figure


def _histograms(
    figure: Figure, methods: Mapping[str, Confidences], styles: Mapping[str, Look], score: str, top: float, step: float
) -> None:
    """Draw one histogram for each method, two in a row, the first row at `top` inches above the bottom."""
    _, height = figure.get_size_inches()
    flat = {name: Confidences(*(np.asarray(part, float).ravel() for part in pair)) for name, pair in methods.items()}
    edges = np.linspace(*_range(np.concatenate([part for pair in flat.values() for part in pair])), _BINS + 1)
    panels: list[Axes] = []
    for position, (name, pair) in enumerate(flat.items()):
        row, column = divmod(position, 2)
        left, low = 0.6 + 1.9 * column, top - step * row - 0.8
        place = (left / NARROW, low / height, 1.7 / NARROW, 0.75 / height)
        panel = figure.add_axes(place, sharey=panels[0] if panels else None)
        panels.append(panel)
        filled, outlined = (np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] / len(part) for part in pair)
        panel.stairs(100 * filled, edges, fill=True, color=styles[name].colour, alpha=0.6)
        panel.stairs(100 * outlined, edges, color="black", lw=1.2)
        is_last = position >= len(methods) - 2
        finish(panel, "images (%)" if column == 0 else "", score if is_last else "")
        panel.set_title(name, fontsize=FONT, pad=3)
        panel.tick_params(labelleft=column == 0, labelbottom=is_last)
        panel.set(xlim=(edges[0], edges[-1]), xticks=np.linspace(edges[0], edges[-1], 3).round(2))
        panel.xaxis.set_major_formatter(FuncFormatter(tick))
    handles = [
        Line2D([], [], color="#999999", lw=7, label="own images"),
        Line2D([], [], color="black", lw=1.2, label="foreign images"),
    ]
    at = (0.5, (top + 0.3) / height)
    figure.legend(handles=handles, loc="center", bbox_to_anchor=at, ncols=2, fontsize=FONT, frameon=False)


def _range(scores: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Ends of the bins: 0 to 1 for probabilities, else of most scores; the bins at the ends hold the rest."""
    if scores.min() >= 0 and scores.max() <= 1 + 1e-4:
        return 0.0, 1.0
    low, high = (float(end) for end in np.quantile(scores, (0.01, 0.99), method="inverted_cdf"))
    return (low, high) if low < high else (low - 0.5, low + 0.5)
