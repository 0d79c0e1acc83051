"""Figures of evidence, calibration, training and spectrum; the only module here that imports matplotlib.

Every function takes plain arrays and returns a `Figure` of its own: no pyplot state, no global settings. Save it with
`figure.savefig(path)`. Colours are those of Okabe and Ito, distinguishable with colour vision deficiencies; marker
shapes and line styles carry the same distinctions for print in grey.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from bnnlaplace.calibration import ReliabilityBins

BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 1, 1, 1)), (0, (3, 1)))
_GREY = "#555555"
_REACHED = "#A6C8E0"  # a tint of the blue: bars that carry the two colours of a gap on top
_FONT = 9.0
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
    Three panels over one logarithmic axis. Vertical lines through all of them mark the optimum of the evidence
    (solid, its error band shaded) and that of the validation NLL (dotted).
    """
    if not curves:
        raise ValueError("curves must hold at least one structure; got none; pass {'diagonal': PrecisionCurve(...)}")
    figure = _figure(6.6, 7.4)
    evidence, nll, ece = axes = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1, 1))
    columns = []
    for (name, curve), colour, style in zip(curves.items(), _cycle(PALETTE), _cycle(_LINE_STYLES), strict=False):
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
    _finish(evidence, "log evidence (nats)")
    _evidence_axis(evidence, list(curves.values()))
    _finish(nll, "validation NLL\n(nats per image)")
    _log_axis(nll)
    _finish(ece, "validation ECE", "prior precision (1 / variance of a weight)")
    _log_axis(ece)
    ece.set_xscale("log")
    ece.xaxis.set_major_formatter(FuncFormatter(_tick))
    ece.set_xlim(min(c.precision[0] for c in curves.values()), max(c.precision[-1] for c in curves.values()))
    figure.align_ylabels(axes)
    return figure


def reliability_diagram(methods: Mapping[str, ReliabilityBins], columns: int = 3) -> Figure:
    """Small multiples: accuracy against confidence, the gap to the diagonal, and below it how many images lie where.

    Parameters
    ----------
    methods
        Bins by name of the method; see `bnnlaplace.calibration.reliability_bins`.
    columns
        Diagrams side by side.

    Returns
    -------
    One diagram per method. Bars are accuracies, their coloured ends the gap to the mean confidence, whiskers 95 %
    Wilson intervals of the accuracy: a gap that its whisker spans may be chance.
    """
    if not methods:
        raise ValueError("methods must hold at least one method; got none; pass {'MAP': reliability_bins(...)}")
    columns = min(columns, len(methods))
    rows = -(-len(methods) // columns)
    # Positions in inches: an automatic layout would make the first column, which has the labels, narrower.
    side, step_x, step_y, below, top = 1.95, 2.2, 3.4, 1.15, 0.5
    width, height = max(3.7, 0.9 + step_x * columns), top + step_y * rows
    figure = _figure(width, height, layout="none")

    def place(row: int, column: int, bottom: float, tall: float) -> Axes:
        low = height - top - step_y * (row + 1) + bottom
        return figure.add_axes(((0.85 + step_x * column) / width, low / height, side / width, tall / height))

    for position, (name, bins) in enumerate(methods.items()):
        row, column = divmod(position, columns)
        diagram, histogram = place(row, column, below, side - 0.1), place(row, column, below - 0.65, 0.5)
        error = _reliability_bars(diagram, bins)
        share = bins.counts / bins.counts.sum()
        histogram.bar(bins.edges[:-1], share, np.diff(bins.edges), align="edge", color=_GREY, edgecolor="white", lw=0.5)
        diagram.set_title(f"{name}\nECE {error:.3f}", fontsize=_FONT)
        _finish(diagram, "accuracy" if column == 0 else "")
        _finish(histogram, "share of\nimages" if column == 0 else "", "confidence")
        diagram.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(0, 1), yticks=(0, 0.5, 1))
        histogram.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(0, 1), yticks=(0, 1))
        diagram.tick_params(labelbottom=False)
        for panel in (diagram, histogram):
            panel.yaxis.set_major_formatter(FuncFormatter(_tick))
            panel.xaxis.set_major_formatter(FuncFormatter(_tick))
            panel.yaxis.set_label_coords(-0.45 / side, 0.5)
            panel.tick_params(labelleft=column == 0)
    handles = [
        Line2D([], [], color=_REACHED, lw=7, label="accuracy"),
        Line2D([], [], color=VERMILLION, lw=7, alpha=0.6, label="gap: overconfident"),
        Line2D([], [], color=GREEN, lw=7, alpha=0.6, label="gap: underconfident"),
        Line2D([], [], color="black", marker="|", ms=9, ls="none", label="95 % interval"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=2, fontsize=_FONT, frameon=False)
    return figure


def training_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs, and where recorded the prior precision and the gradient of the log joint.

    Parameters
    ----------
    history
        One mapping per epoch: `epoch`, `phase` ("train" or "polish"; the latter is shaded), and any of `loss`
        (negative log joint per image, nats), `validation_nll`, `accuracy`, `validation_accuracy`, `prior_precision`,
        `gradient_norm`. Missing values and None leave gaps.
    """
    if not history:
        raise ValueError("history must hold at least one epoch; got none; train first")
    panels = [
        ("nats per image", "upper right", {"loss": "training loss", "validation_nll": "validation NLL"}),
        ("accuracy", "lower right", {"accuracy": "training", "validation_accuracy": "validation"}),
        ("prior precision", None, {"prior_precision": "prior precision"}),
        ("gradient norm of\nthe log joint", None, {"gradient_norm": "gradient norm"}),
    ]
    recorded = [panel for panel in panels if any(_varies(_series(history, key)) for key in panel[2])]
    if not recorded:
        raise ValueError(f"history must hold loss or accuracy by epoch; got {sorted(history[0])}; see the docstring")
    figure = _figure(6.6, 0.5 + 1.75 * len(recorded))
    axes = figure.subplots(len(recorded), 1, sharex=True, squeeze=False)[:, 0]
    epochs = _series(history, "epoch")
    polished = epochs[[record.get("phase") == "polish" for record in history]]
    for panel, (label, corner, series) in zip(axes, recorded, strict=True):
        for (key, name), colour, style in zip(series.items(), PALETTE, _LINE_STYLES, strict=False):
            values = _series(history, key)
            present = np.isfinite(values)
            if not present.any():
                continue
            sparse = "o" if present.sum() < len(values) / 2 else None
            drawn = {"color": colour, "ls": style, "lw": 1.6, "marker": sparse, "ms": 3}
            panel.plot(epochs[present], values[present], label=name, **drawn)
        if len(polished):
            ends = polished[0] - 0.5, polished[-1] + 0.5
            panel.axvspan(*ends, color="#999999", alpha=0.2, lw=0, label="polishing phase")
        _finish(panel, label)
        if corner != "lower right":  # everything but the accuracy
            _log_axis(panel)
        if corner:
            panel.legend(fontsize=_FONT, frameon=False, loc=corner)
    axes[-1].set_xlabel("epoch", fontsize=_FONT)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    return figure


def spectrum(ritz_values: Float[np.ndarray, "K"], prior_precisions: Mapping[str, float]) -> Figure:
    """Ritz values of the GGN in falling order, with prior precisions as lines.

    Directions above a line are determined by the data, those below it by the prior. Ritz values that are not positive
    (rounding) cannot be drawn on the logarithmic axis and are left out.
    """
    values = np.sort(np.asarray(ritz_values, np.float64))[::-1]
    values = values[values > 0]
    if not len(values):
        raise ValueError(f"ritz_values must hold a positive value; got {len(ritz_values)} values and none is")
    figure = _figure(6.6, 3.4)
    panel = figure.subplots()
    panel.plot(np.arange(1, len(values) + 1), values, color=_GREY, lw=2, label="Ritz values of the GGN")
    for (name, precision), colour, style in zip(
        prior_precisions.items(), _cycle(PALETTE), _cycle(_LINE_STYLES), strict=False
    ):
        panel.axhline(precision, color=colour, ls=style, lw=1.5, label=f"{name}: {_number(precision)}")
    _finish(panel, "eigenvalue (1 / variance of a weight)", "rank")
    _log_axis(panel)
    figure.legend(loc="outside upper left", fontsize=_FONT, frameon=False, ncols=2)
    return figure


def _figure(width: float, height: float, layout: str = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _cycle(values: Sequence[Any]) -> Iterable[Any]:
    while True:
        yield from values


def _finish(panel: Axes, ylabel: str, xlabel: str = "") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=_FONT)
    panel.set_ylabel(ylabel, fontsize=_FONT)
    panel.set_xlabel(xlabel, fontsize=_FONT)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if record.get(key) is None else record[key] for record in history], np.float64)


def _varies(values: np.ndarray) -> bool:
    """Whether there is a curve to draw; a prior precision that stayed where it was is none."""
    values = values[np.isfinite(values)]
    return len(values) > 0 and (len(values) == 1 or values.min() < values.max())


def _number(value: float) -> str:
    """Two digits that count, and no powers of ten: 0.083, 1.7, 560, 1,800."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _evidence_optimum(curve: PrecisionCurve) -> str:
    """The optimum for the legend with its error band, or with the word that it is at an end of its search."""
    if curve.evidence_at_bound:
        return f"{_number(curve.evidence_optimum)} (at end)"
    low, high = _number(curve.evidence_optimum_low), _number(curve.evidence_optimum_high)
    return _number(curve.evidence_optimum) + ("" if low == high else f" ({low} to {high})")


def _nll_optimum(curve: PrecisionCurve) -> str:
    return _number(curve.nll_optimum) + (" (at end)" if curve.nll_at_bound else "")


def _legend_columns(figure: Figure, columns: Sequence[list[Line2D]]) -> None:
    """A legend above the panels with a column for each structure; blanks make the columns equally long."""
    rows = max(map(len, columns))
    blank = Line2D([], [], ls="none", label=" ")
    handles = [handle for column in columns for handle in (*column, *[blank] * (rows - len(column)))]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(columns), fontsize=_FONT, frameon=False)


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


def _tick(value: float, _: int) -> str:
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


def _mark(panel: Axes, precision: np.ndarray, values: np.ndarray, optimum: float, style: Mapping[str, Any]) -> None:
    """A marker on the curve; between grid points it sits on the line that is drawn there."""
    height = np.interp(np.log(optimum), np.log(precision), values)
    panel.plot([optimum], [height], zorder=5, clip_on=False, **style)


def _log_axis(panel: Axes) -> None:
    """Ticks in plain numbers at 1, 2, 5 times powers of ten, at the powers alone over many decades; not for less
    than a factor of three, where a logarithmic axis shows nothing that a linear one does not."""
    low, high = panel.dataLim.intervaly
    if not 0 < 3 * low < high:
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=9))
    panel.yaxis.set_major_formatter(FuncFormatter(_tick))
    panel.yaxis.set_minor_formatter(NullFormatter())


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
    panel.yaxis.set_major_formatter(FuncFormatter(_tick))
    panel.yaxis.set_minor_locator(NullLocator())


def _reliability_bars(panel: Axes, bins: ReliabilityBins) -> float:
    """Draw one diagram; return the calibration error of these bins."""
    full = bins.counts > 0
    left, width = bins.edges[:-1][full], np.diff(bins.edges)[full]
    accuracy, confidence, count = bins.accuracy[full], bins.confidence[full], bins.counts[full]
    panel.bar(left, np.minimum(accuracy, confidence), width, align="edge", color=_REACHED, edgecolor="white", lw=0.5)
    for sign, colour in ((-1, VERMILLION), (1, GREEN)):
        gap = np.where(sign * (accuracy - confidence) > 0, np.abs(accuracy - confidence), 0)
        panel.bar(
            left, gap, width, bottom=np.minimum(accuracy, confidence), align="edge",
            color=colour, alpha=0.6, edgecolor="white", lw=0.5,
        )  # fmt: skip
    # Wilson's interval: unlike the normal one it has a width at accuracy 0 and 1.
    square = 1.96**2
    centre = (accuracy + square / (2 * count)) / (1 + square / count)
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / count + square / (4 * count**2)) / (1 + square / count)
    panel.vlines(left + width / 2, centre - half, centre + half, color="black", lw=0.9)
    panel.plot([0, 1], [0, 1], color="black", lw=0.8, ls=(0, (4, 3)))
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())
