"""The spectrum of the GGN, and where prior precisions lie in it."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from bnnlaplace.plots.style import FONT, GREY, LINE_STYLES, PALETTE, cycle, finish, log_axis, new_figure, number


def spectrum(ritz_values: Float[np.ndarray, "K"], prior_precisions: Mapping[str, float]) -> Figure:
    """Ritz values of the GGN in falling order, with prior precisions as lines.

    Directions above a line are determined by the data, those below it by the prior. Ritz values that are not positive
    (rounding) cannot be drawn on the logarithmic axis and are left out.

    Parameters
    ----------
    ritz_values
        In any order.
    prior_precisions
        By name, in the order of the legend.
    """
    values = np.sort(np.asarray(ritz_values, np.float64))[::-1]
    values = values[values > 0]
    if not len(values):
        raise ValueError(f"ritz_values must hold a positive value; got {len(ritz_values)} values and none is")
    figure = new_figure(6.6, 3.4)
    panel = figure.subplots()
    panel.plot(np.arange(1, len(values) + 1), values, color=GREY, lw=2, label="Ritz values of the GGN")
    for (name, precision), colour, style in zip(
        prior_precisions.items(), cycle(PALETTE), cycle(LINE_STYLES), strict=False
    ):
        panel.axhline(precision, color=colour, ls=style, lw=1.5, label=f"{name}: {number(precision)}")
    finish(panel, "eigenvalue (1 / variance of a weight)", "rank")
    log_axis(panel)
    figure.legend(loc="outside upper left", fontsize=FONT, frameon=False, ncols=2)
    return figure
