"""Figure of accuracy against the share of images that are rejected as uncertain."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bnnlaplace.calibration.rejection import RejectionCurve
from bnnlaplace.plots.style import FONT, NARROW, Look, finish, looks_of, new_figure, tick

_LEAST_KEPT = 20  # With fewer images than these one more error moves the accuracy by more than methods differ.


def rejection_curves(methods: Mapping[str, RejectionCurve], looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw accuracy on the images that are kept against the share that is rejected, least confident first.

    Parameters
    ----------
    methods
        By name, in the order of the legend; see `bnnlaplace.calibration.rejection_curve`.
    looks
        Colour and line style of each method; by default by their order. See `bnnlaplace.plots.looks`.

    Returns
    -------
    Figure
        The legend has the area under each curve, a mean accuracy over all shares. The curves end where 20 images are
        left. Nothing lies below the lowest accuracy, so mind the axis.

    Raises
    ------
    ValueError
        If there are no methods, or looks are given and one has none.
    """
    if not methods:
        raise ValueError("methods must hold at least one method; got none; pass {'MAP': rejection_curve(...)}")
    figure = new_figure(NARROW, 3.6 + 0.2 * len(methods))
    panel = figure.subplots()
    for name, (colour, style) in looks_of(methods, looks).items():
        curve = methods[name]
        shown = slice(0, max(1, len(curve.accuracy) - _LEAST_KEPT + 1))
        panel.plot(
            100 * np.asarray(curve.rejection)[shown], 100 * np.asarray(curve.accuracy)[shown],
            color=colour, ls=style, lw=1.8, label=f"{name}: area {curve.area:.4f}",
        )  # fmt: skip
    finish(panel, "accuracy on the images kept (%)", "least confident images rejected (%)")
    panel.set_xlim(0, 100)
    panel.yaxis.set_major_formatter(FuncFormatter(tick))
    figure.legend(loc="outside upper left", fontsize=FONT, frameon=False)
    return figure
