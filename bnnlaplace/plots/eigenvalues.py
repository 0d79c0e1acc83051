"""Figure of the spectrum of the GGN, with prior precisions as lines in it."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from bnnlaplace.plots.style import FONT, GREY, LINE_STYLES, PALETTE, finish, log_axis, new_figure, number


def spectrum(ritz_values: Float[np.ndarray, " K"], prior_precisions: Mapping[str, float]) -> Figure:
    """Draw the Ritz values of the GGN in falling order, with prior precisions as lines.

    The data determine the directions above a line, the prior those below it. Ritz values that rounding has made zero or
    negative are left out, because the axis is logarithmic.

    Parameters
    ----------
    ritz_values
        The Ritz values in any order.
    prior_precisions
        By name, in the order of the legend.

    Raises
    ------
    ValueError
        If no Ritz value is positive.
    """
    values = np.sort(np.asarray(ritz_values, np.float64))[::-1]
    values = values[values > 0]
    if not len(values):
        raise ValueError(
            f"ritz_values must hold a positive value; got {len(ritz_values)} values, none of them positive; check the "
            "fit"
        )
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
