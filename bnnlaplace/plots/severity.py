"""Figure of a metric against the severity of shifts, for several methods."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from bnnlaplace.calibration.bootstrap import Interval
from bnnlaplace.plots.style import FONT, NARROW, Look, finish, log_axis, looks_of, new_figure


def severity_curves(
    shifts: Mapping[str, Mapping[str, Sequence[Interval]]], metric: str, looks: Mapping[str, Look] | None = None
) -> Figure:
    """Draw a metric against the severity of each shift, one panel a shift and one line a method.

    Parameters
    ----------
    shifts
        By name of the shift and of the method, the metric at severities 0 (clean images), 1, 2, ... with its interval.
        Values that are not finite leave gaps.
    metric
        What is drawn, with its unit, for the axis.
    looks
        Colour and line style of each method; by default by their order. See `bnnlaplace.plots.looks`.

    Returns
    -------
    Figure
        Two panels in a row, all with one vertical axis; logarithmic where values differ much. Bands are the intervals.

    Raises
    ------
    ValueError
        If there are no shifts, one has no methods, or looks are given and a method has none.
    """
    if not shifts or not all(shifts.values()):
        raise ValueError(
            "shifts must hold at least one shift, each with at least one method; got "
            f"{ {name: list(methods) for name, methods in shifts.items()} }; pass {{'blur': {{'MAP': intervals}}}}"
        )
    names = list(dict.fromkeys(name for methods in shifts.values() for name in methods))
    styles = looks_of(names, looks)
    columns = min(2, len(shifts))
    rows = -(-len(shifts) // columns)
    figure = new_figure(NARROW, 0.5 + 0.1 * len(names) + 1.55 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (shift, methods) in zip(axes, shifts.items(), strict=False):
        for name, curve in methods.items():
            colour, style = styles[name]
            value, low, high = np.array([tuple(point) for point in curve], np.float64).T
            value = np.where(np.isfinite(value), value, np.nan)
            severity = np.arange(len(value))
            panel.fill_between(severity, low, high, where=np.isfinite(low + high), color=colour, alpha=0.15, lw=0)
            panel.plot(severity, value, color=colour, ls=style, lw=1.6, marker="o", ms=3, label=name)
        panel.set_title(shift, fontsize=FONT)
        finish(panel, "")
    for panel in axes[len(shifts) :]:
        panel.set_visible(False)
    for panel in axes[max(0, len(shifts) - columns) : len(shifts)]:
        panel.tick_params(labelbottom=True)
    axes[0].xaxis.set_major_locator(MultipleLocator(1))
    log_axis(axes[0])
    handles = [Line2D([], [], color=colour, ls=style, lw=1.6, label=name) for name, (colour, style) in styles.items()]
    figure.legend(handles=handles, loc="outside upper left", fontsize=FONT, frameon=False, ncols=2)
    figure.supxlabel("severity of the shift (0: clean images)", fontsize=FONT)
    figure.supylabel(metric, fontsize=FONT)
    return figure
