"""Evidence and validation scores of several curvature structures against the prior precision."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bnnlaplace.plots.style import FONT, LINE_STYLES, PALETTE, cycle, finish, log_axis, new_figure, number, tick

# The log evidence is drawn down to this multiple of the worst structure's best: further down lie prior precisions
# that nobody considers, and their values, thousands of times larger, would flatten the peaks.
_EVIDENCE_RANGE = 20.0
_LEAST_ECE = 1e-3  # drawn at this height where it is smaller: the axis is logarithmic, and 0 is possible


class PrecisionCurve(NamedTuple):
    """One curvature structure against prior precision.

    Attributes
    ----------
    precision
        The grid, increasing; the other arrays belong to its points.
    log_evidence, log_evidence_sem, log_evidence_truncation
        In nats; its standard error, and how much too low it can be because the recurrence was stopped.
    validation_nll, validation_ece
        Of a predictive on validation images; the NLL in nats per image.
    converged
        Whether the samples behind that predictive have converged.
    evidence_optimum, evidence_optimum_low, evidence_optimum_high
        The maximiser of the evidence, with its error band.
    evidence_at_bound, nll_at_bound
        Whether the optimum is at an end of what was searched, and may lie beyond it.
    nll_optimum
        The converged precision with the lowest validation NLL.
    """

    precision: Float[np.ndarray, "G"]
    log_evidence: Float[np.ndarray, "G"]
    log_evidence_sem: Float[np.ndarray, "G"]
    log_evidence_truncation: Float[np.ndarray, "G"]
    validation_nll: Float[np.ndarray, "G"]
    validation_ece: Float[np.ndarray, "G"]
    converged: Bool[np.ndarray, "G"]
    evidence_optimum: float
    evidence_optimum_low: float
    evidence_optimum_high: float
    evidence_at_bound: bool
    nll_optimum: float
    nll_at_bound: bool


def evidence_curve(curves: Mapping[str, PrecisionCurve]) -> Figure:
    """Log evidence, validation NLL and validation ECE against prior precision.

    The band around the evidence is 2 standard errors, and upwards also the truncation. NLL and ECE are drawn thin and
    faint where the samples behind them have not converged.

    Parameters
    ----------
    curves
        By name of the curvature structure, in the order of the legend.

    Returns
    -------
    Figure
        Three panels over one logarithmic axis. Vertical lines through all of them mark the optimum of the evidence
        (solid, its error band shaded) and that of the validation NLL (dotted).
    """
    if not curves:
        raise ValueError("curves must hold at least one structure; got none; pass {'diagonal': PrecisionCurve(...)}")
    figure = new_figure(6.6, 7.4)
    evidence, nll, ece = axes = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1, 1))
    columns = []
    for (name, curve), colour, style in zip(curves.items(), cycle(PALETTE), cycle(LINE_STYLES), strict=False):
        band = 2 * np.asarray(curve.log_evidence_sem)
        evidence.fill_between(
            curve.precision,
            curve.log_evidence - band,
            curve.log_evidence + band + np.asarray(curve.log_evidence_truncation),
            color=colour,
            alpha=0.25,
            lw=0,
        )
        drawn = {"color": colour, "linestyle": style, "lw": 1.8}
        faint = {"color": colour, "linestyle": ":", "lw": 1.0, "alpha": 0.6}
        everywhere = np.ones(len(curve.precision), bool)
        converged = np.asarray(curve.converged, bool)
        _line(evidence, curve.precision, curve.log_evidence, everywhere, drawn, faint)
        _line(nll, curve.precision, curve.validation_nll, converged, drawn, faint)
        _line(ece, curve.precision, np.maximum(curve.validation_ece, _LEAST_ECE), converged, drawn, faint)
        for panel in axes:
            panel.axvspan(curve.evidence_optimum_low, curve.evidence_optimum_high, color=colour, alpha=0.15, lw=0)
            panel.axvline(curve.evidence_optimum, color=colour, lw=0.9, alpha=0.8)
            panel.axvline(curve.nll_optimum, color=colour, lw=1.2, ls=(0, (1, 2)))
        at_evidence = {"marker": "o", "ms": 6, "color": colour, "ls": "none"}
        at_nll = {"marker": "D", "ms": 5.5, "color": colour, "mfc": "white", "mew": 1.5, "ls": "none"}
        _mark(evidence, curve.precision, curve.log_evidence, curve.evidence_optimum, at_evidence)
        _mark(nll, curve.precision, curve.validation_nll, curve.nll_optimum, at_nll)
        columns.append(
            [
                Line2D([], [], label=name, **drawn),
                Line2D([], [], label=f"best evidence: {_evidence_optimum(curve)}", **at_evidence),
                Line2D([], [], label=f"best validation NLL: {_nll_optimum(curve)}", **at_nll),
                *([] if converged.all() else [Line2D([], [], label="samples not converged", **faint)]),
            ]
        )
    _legend_columns(figure, columns)
    finish(evidence, "log evidence (nats)")
    _evidence_axis(evidence, list(curves.values()))
    finish(nll, "validation NLL\n(nats per image)")
    log_axis(nll)
    finish(ece, "validation ECE", "prior precision (1 / variance of a weight)")
    log_axis(ece)
    ece.set_xscale("log")
    ece.xaxis.set_major_formatter(FuncFormatter(tick))
    ece.set_xlim(min(c.precision[0] for c in curves.values()), max(c.precision[-1] for c in curves.values()))
    figure.align_ylabels(axes)
    return figure


def _evidence_optimum(curve: PrecisionCurve) -> str:
    """The optimum for the legend with its error band, or with the word that it is at an end of its search."""
    if curve.evidence_at_bound:
        return f"{number(curve.evidence_optimum)} (at end)"
    low, high = number(curve.evidence_optimum_low), number(curve.evidence_optimum_high)
    return number(curve.evidence_optimum) + ("" if low == high else f" ({low} to {high})")


def _nll_optimum(curve: PrecisionCurve) -> str:
    return number(curve.nll_optimum) + (" (at end)" if curve.nll_at_bound else "")


def _legend_columns(figure: Figure, columns: Sequence[list[Line2D]]) -> None:
    """A legend above the panels with a column for each structure; blanks make the columns equally long."""
    rows = max(map(len, columns))
    blank = Line2D([], [], ls="none", label=" ")
    handles = [handle for column in columns for handle in (*column, *[blank] * (rows - len(column)))]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(columns), fontsize=FONT, frameon=False)


def _line(
    panel: Axes,
    precision: np.ndarray,
    values: np.ndarray,
    trusted: np.ndarray,
    drawn: Mapping[str, Any],
    faint: Mapping[str, Any],
) -> None:
    """A curve with gaps where it is not finite, faint between points of which one is not trusted."""
    values = np.where(np.isfinite(values), values, np.nan)
    if not trusted.all():
        touched = ~trusted
        touched[1:] |= ~trusted[:-1]
        touched[:-1] |= ~trusted[1:]
        panel.plot(precision, np.where(touched, values, np.nan), **faint)
    panel.plot(precision, np.where(trusted, values, np.nan), **drawn)


def _mark(panel: Axes, precision: np.ndarray, values: np.ndarray, optimum: float, style: Mapping[str, Any]) -> None:
    """A marker on the curve; between grid points it sits on the line that is drawn there."""
    height = np.interp(np.log(optimum), np.log(precision), values)
    panel.plot([optimum], [height], zorder=5, clip_on=False, **style)


def _evidence_axis(panel: Axes, curves: Sequence[PrecisionCurve]) -> None:
    """Linear over a modest range of evidence, else logarithmic in its size, and clipped to where the optima are."""
    values = np.concatenate([np.asarray(curve.log_evidence) for curve in curves])
    values = values[np.isfinite(values)]
    peaks = [np.nanmax(curve.log_evidence) for curve in curves]
    top, bottom = max(peaks), values.min()
    if top >= 0:  # densities can exceed one: no logarithm, but the same care for the peaks
        bottom = max(bottom, min(peaks) - 2 * max(1.0, *np.abs(peaks)))
        panel.set_ylim(bottom, top + 0.1 * (top - bottom))
    if top >= 0 or bottom > 5 * top:
        return
    bottom = max(bottom, _EVIDENCE_RANGE * min(peaks))
    panel.set_yscale("symlog", linthresh=-top / 2)  # the linear part lies above everything drawn
    panel.set_ylim(1.15 * bottom, top / 1.3)
    decades = 10.0 ** np.arange(np.floor(np.log10(-top)), np.ceil(np.log10(-bottom)) + 1)
    ticks = -np.outer(decades, (1, 2, 5)).ravel()
    panel.yaxis.set_major_locator(FixedLocator(ticks[(ticks > 1.15 * bottom) & (ticks < top / 1.3)]))
    panel.yaxis.set_major_formatter(FuncFormatter(tick))
    panel.yaxis.set_minor_locator(NullLocator())
