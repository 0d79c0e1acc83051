"""Figure of the spectrum of the GGN, with prior precisions as lines in it."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from bnnlaplace.plots.style import FONT, GREY, LINE_STYLES, NARROW, NEUTRAL, finish, log_axis, new_figure, number

# The colour of values that have not converged, and the residual norm up to which a Ritz value counts as converged,
# relative to the value: an eigenvalue is that near.
UNSURE, CONVERGED = "#999999", 1e-2


def spectrum(
    ritz_values: Float[np.ndarray, " K"],
    prior_precisions: Mapping[str, float],
    residual_norms: Float[np.ndarray, " K"] | None = None,
) -> Figure:
    """Draw the Ritz values of the GGN in falling order, with prior precisions as lines.

    The data determine the directions above a line, the prior those below it. Ritz values that rounding has made zero or
    negative are left out, because the axis is logarithmic.

    A Ritz value is an eigenvalue of the GGN only if it has converged. The others, the smaller ones above all, are
    averages over what the recurrence has not resolved. Where it stopped they fall off a cliff that the GGN does not
    have. So only those that have converged are drawn as a curve. The rest are small crosses, and the legend counts
    them. Everything is grey: colours are left to the methods of a report.

    Parameters
    ----------
    ritz_values
        The Ritz values in any order.
    prior_precisions
        By name, in the order of the legend.
    residual_norms
        |A x - theta x| of each Ritz pair, in the same order; `couplings` of `bnnlaplace.krylov.ritz`. A value has
        converged if this is at most 0.01 of it. None says that all values are eigenvalues.

    Raises
    ------
    ValueError
        If no Ritz value is positive, or there is not one residual norm for each.
    """
    values = np.asarray(ritz_values, np.float64)
    norms = np.zeros_like(values) if residual_norms is None else np.asarray(residual_norms, np.float64)
    if norms.shape != values.shape:
        raise ValueError(
            f"residual_norms must be one for each of the {len(values)} ritz_values; got shape {norms.shape}; pass "
            "the couplings of the same decomposition"
        )
    order = np.argsort(-values)
    order = order[values[order] > 0]
    if not len(order):
        raise ValueError(
            f"ritz_values must hold a positive value; got {len(values)} values, none of them positive; check the fit"
        )
    values, has_converged = values[order], norms[order] <= CONVERGED * values[order]
    figure = new_figure(NARROW, 3.6)
    panel = figure.subplots()
    ranks, count, total = np.arange(1, len(values) + 1), has_converged.sum(), len(values)
    name = (
        "eigenvalues of the GGN"
        if count == total
        else f"Ritz values of the GGN that have converged: {count} of {total}"
    )
    if count:
        panel.plot(ranks[has_converged], values[has_converged], color=GREY, lw=2, marker=".", ms=3, label=name)
    if count < total:
        name = f"not converged: {total - count} of {total}"
        panel.plot(ranks[~has_converged], values[~has_converged], "x", color=UNSURE, ms=3, mew=0.7, label=name)
    # The solid line is that of the eigenvalues.
    for (name, precision), style in zip(prior_precisions.items(), cycle(LINE_STYLES[1:]), strict=False):
        panel.axhline(precision, color=NEUTRAL[0], ls=style, lw=1.5, label=f"{name}: {number(precision)}")
    finish(panel, "eigenvalue (1 / variance of a weight)", "rank")
    log_axis(panel)
    figure.legend(loc="outside upper left", fontsize=FONT, frameon=False)
    return figure
