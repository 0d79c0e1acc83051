"""Figure of the evidence and of validation scores against the prior precision, for several structures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bnnlaplace.plots.style import FONT, GREY, NARROW, Look, finish, log_axis, looks_of, new_figure, number, tick

# The log evidence is drawn down to this multiple of the lowest peak among the structures. Further down lie prior
# precisions that nobody considers. Their evidence is thousands of times larger in size and would flatten the peaks.
_EVIDENCE_RANGE = 20.0
# The marks of the two choices of the precision.
_DOT = {"marker": "o", "ms": 6, "ls": "none"}
_DIAMOND = {"marker": "D", "ms": 5.5, "mfc": "white", "mew": 1.5, "ls": "none"}


class PrecisionCurve(NamedTuple):
    """Evidence and validation scores of one curvature structure on a grid of prior precisions.

    Attributes
    ----------
    precision
        The grid, in increasing order. The other arrays have one entry for each of its points.
    log_evidence, log_evidence_sem, log_evidence_truncation
        The log evidence in nats, its standard error, and how much too low it can be because the recurrence was stopped.
    validation_nll, validation_ece
        Scores of a predictive on validation images; the NLL in nats per image. NaN where a search left them out.
    converged
        Whether the samples behind that predictive have converged.
    evidence_optimum, evidence_optimum_low, evidence_optimum_high
        The prior precision that maximises the evidence, and the ends of its error band.
    evidence_at_bound, nll_at_bound
        Whether the optimum is at an end of its search range, and may lie beyond it.
    nll_optimum
        The prior precision with the lowest validation NLL among those whose samples have converged.
    from_training
        Whether `evidence_optimum` is the precision that training chose. The posterior keeps it, whatever its own
        evidence prefers.
    """

    precision: Float[np.ndarray, " G"]
    log_evidence: Float[np.ndarray, " G"]
    log_evidence_sem: Float[np.ndarray, " G"]
    log_evidence_truncation: Float[np.ndarray, " G"]
    validation_nll: Float[np.ndarray, " G"]
    validation_ece: Float[np.ndarray, " G"]
    converged: Bool[np.ndarray, " G"]
    evidence_optimum: float
    evidence_optimum_low: float
    evidence_optimum_high: float
    evidence_at_bound: bool
    nll_optimum: float
    nll_at_bound: bool
    from_training: bool = False


def evidence_curve(curves: Mapping[str, PrecisionCurve], looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw log evidence and validation NLL against prior precision.

    The band around the evidence is 2 standard errors, and upwards also the truncation. The NLL is thin and faint at
    prior precisions whose samples have not converged.

    Parameters
    ----------
    curves
        By name of the posterior, in the order of the legend. Of a variational one, the lower bound is its evidence.
    looks
        Colour and line style of each posterior; by default by their order. See `bnnlaplace.plots.looks`.

    Returns
    -------
    Figure
        Two panels over one logarithmic axis. Dots mark the precision that the evidence prefers, or that a posterior
        keeps from training, with its error band in the upper panel, and in the lower one what that choice costs in NLL.
        Diamonds mark the lowest NLL.

    Raises
    ------
    ValueError
        If there are no curves, or looks are given and one has none.
    """
    if not curves:
        raise ValueError("curves must hold at least one structure; got none; pass {'diagonal': PrecisionCurve(...)}")
    figure = new_figure(NARROW, 4.9 + 0.18 * len(curves))
    evidence, nll = axes = list(figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1)))
    handles = [_draw_posterior(axes, name, curves[name], look) for name, look in looks_of(curves, looks).items()]
    figure.legend(handles=handles + _keys(curves), loc="outside upper left", fontsize=FONT, frameon=False)
    finish(evidence, "log evidence (nats)")
    _evidence_axis(evidence, list(curves.values()))
    finish(nll, "validation NLL\n(nats per image)", "prior precision (1 / variance of a weight)")
    log_axis(nll)
    nll.set_xscale("log")
    nll.xaxis.set_major_locator(LogLocator(numticks=5))
    nll.xaxis.set_major_formatter(FuncFormatter(tick))
    nll.set_xlim(
        min(curve.precision[0] for curve in curves.values()), max(curve.precision[-1] for curve in curves.values())
    )
    figure.align_ylabels(axes)
    return figure


def _draw_posterior(axes: Sequence[Axes], name: str, curve: PrecisionCurve, look: Look) -> Line2D:
    """Draw one posterior into both panels, and return its entry of the legend."""
    colour, style = look
    evidence, nll = axes
    band = 2 * np.asarray(curve.log_evidence_sem)
    upper = curve.log_evidence + band + np.asarray(curve.log_evidence_truncation)
    evidence.fill_between(curve.precision, curve.log_evidence - band, upper, color=colour, alpha=0.25, lw=0)
    bold = {"color": colour, "linestyle": style, "lw": 1.8}
    faint = {"color": colour, "linestyle": ":", "lw": 1.0, "alpha": 0.6}
    _line(evidence, curve.precision, curve.log_evidence, np.ones(len(curve.precision), bool), bold, faint)
    # A search leaves out precisions, whose scores are NaN. The line connects the others.
    known = ~np.isnan(curve.validation_nll)
    precision, validation_nll = np.asarray(curve.precision)[known], np.asarray(curve.validation_nll)[known]
    _line(nll, precision, validation_nll, np.asarray(curve.converged, bool)[known], bold, faint)
    height = _mark(evidence, curve.precision, curve.log_evidence, curve.evidence_optimum, _DOT | {"color": colour})
    evidence.plot(
        [curve.evidence_optimum_low, curve.evidence_optimum_high], [height] * 2, color=colour, lw=5, alpha=0.35,
        solid_capstyle="butt",
    )  # fmt: skip
    _mark(nll, precision, validation_nll, curve.evidence_optimum, _DOT | {"color": colour})
    _mark(nll, precision, validation_nll, curve.nll_optimum, _DIAMOND | {"color": colour})
    optima = f"\N{BLACK CIRCLE} {_evidence_optimum(curve)} \N{WHITE DIAMOND} {_nll_optimum(curve)}"
    return Line2D([], [], label=f"{name}: {optima}", **bold)


def _keys(curves: Mapping[str, PrecisionCurve]) -> list[Line2D]:
    """Entries of the legend for what all posteriors share."""
    kept = any(curve.from_training for curve in curves.values())
    preferred = "precision that the evidence prefers" + (", or of training" if kept else "")
    marks = [
        Line2D([], [], color=GREY, label=preferred, **_DOT),
        Line2D([], [], color=GREY, label="precision of the lowest validation NLL", **_DIAMOND),
    ]
    if all(np.all(curve.converged) for curve in curves.values()):
        return marks
    return [*marks, Line2D([], [], color=GREY, ls=":", lw=1.0, label="samples not converged")]


def _evidence_optimum(curve: PrecisionCurve) -> str:
    """Write the optimum for the legend, with its error band, or where it is from if it is not the inner optimum."""
    if curve.from_training:
        return f"{number(curve.evidence_optimum)} (of training)"
    if curve.evidence_at_bound:
        return f"{number(curve.evidence_optimum)} (at end)"
    low, high = number(curve.evidence_optimum_low), number(curve.evidence_optimum_high)
    return number(curve.evidence_optimum) + ("" if low == high else f" ({low} to {high})")


def _nll_optimum(curve: PrecisionCurve) -> str:
    """Write the optimum for the legend, with the remark that it is at an end of its search if it is."""
    return number(curve.nll_optimum) + (" (at end)" if curve.nll_at_bound else "")


def _line(
    panel: Axes,
    precision: Float[np.ndarray, " G"],
    values: Float[np.ndarray, " G"],
    trusted: Bool[np.ndarray, " G"],
    bold: Mapping[str, Any],
    faint: Mapping[str, Any],
) -> None:
    """Draw a curve that is faint next to points that are not trusted, with gaps at values that are not finite."""
    values = np.where(np.isfinite(values), values, np.nan)
    if not trusted.all():
        beside = ~trusted  # and their neighbours, so that the faint line meets the bold one
        beside[1:] |= ~trusted[:-1]
        beside[:-1] |= ~trusted[1:]
        panel.plot(precision, np.where(beside, values, np.nan), **faint)
    panel.plot(precision, np.where(trusted, values, np.nan), **bold)


def _mark(
    panel: Axes,
    precision: Float[np.ndarray, " G"],
    values: Float[np.ndarray, " G"],
    optimum: float,
    style: Mapping[str, Any],
) -> float:
    """Draw a marker on the curve, and return its height. Between two grid points it sits on the line between them."""
    height = float(np.interp(np.log(optimum), np.log(precision), values))
    panel.plot([optimum], [height], zorder=5, clip_on=False, **style)
    return height


def _evidence_axis(panel: Axes, curves: Sequence[PrecisionCurve]) -> None:
    """Make the axis of the evidence linear over a modest range, else logarithmic in size; clip it below the peaks."""
    values = np.concatenate([np.asarray(curve.log_evidence) for curve in curves])
    values = values[np.isfinite(values)]
    peaks = [np.nanmax(curve.log_evidence) for curve in curves]
    top, bottom = max(peaks), values.min()
    if top >= 0:  # a density can exceed one: the axis cannot be logarithmic, but the peaks must stay visible
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
