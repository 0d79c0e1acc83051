"""Figures of what training recorded in each epoch: all of it, and the evidence alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnnlaplace.plots.style import (
    FONT,
    GREY,
    LINE_STYLES,
    NARROW,
    NEUTRAL,
    Look,
    finish,
    log_axis,
    looks_of,
    new_figure,
)

GRADIENTS = {
    "gradient_norm": "all images, batch statistics frozen",
    "step_gradient_norm": "last step of the epoch",
    "log_determinant_gradient_norm": "log-determinant's part",
}


# The mark of the trained network.
_OPEN = {"marker": "o", "ms": 6, "mfc": "white", "mew": 1.5, "ls": "none"}


def training_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy over the epochs, and evidence, prior precision and gradient norms if recorded.

    All curves are grey: colours are left to the methods of a report.

    Parameters
    ----------
    history
        One mapping per epoch: `epoch`, `phase` ("train" or "polish"; the latter is shaded), and any of `loss`
        (negative log joint per image, nats), `validation_nll`, `accuracy`, `validation_accuracy`, `log_evidence` with
        its standard error `log_evidence_sem` (nats), `prior_precision`, `prior_precision_by_layer` (a dictionary, drawn
        as thin lines), `gradient_norm` (of the log joint over all data), `step_gradient_norm` (of the last step) and
        `log_determinant_gradient_norm`. Missing values and None leave gaps.

    Raises
    ------
    ValueError
        If the history is empty, or holds none of these values.
    """
    if not history:
        raise ValueError("history must hold at least one epoch; got none; train first")
    panels = [
        ("nats per image", "upper right", {"loss": "training loss", "validation_nll": "validation NLL"}),
        ("accuracy", "lower right", {"accuracy": "training", "validation_accuracy": "validation"}),
        ("negative log\nevidence, nats", None, {"log_evidence": "negative log evidence"}),
        ("prior precision", None, {"prior_precision": "prior precision"}),
        ("gradient norm of\nthe log joint", None, GRADIENTS),
    ]
    recorded = [panel for panel in panels if any(_varies(_series(history, key)) for key in panel[2])]
    if not recorded:
        raise ValueError(f"history must hold loss or accuracy by epoch; got {sorted(history[0])}; see the docstring")
    figure = new_figure(NARROW, 0.5 + 1.75 * len(recorded))
    axes = figure.subplots(len(recorded), 1, sharex=True, squeeze=False)[:, 0]
    epochs = _series(history, "epoch")
    for panel, (label, corner, series) in zip(axes, recorded, strict=True):
        for (key, name), colour, style in zip(series.items(), NEUTRAL, LINE_STYLES, strict=False):
            values = _series(history, key)
            present = np.isfinite(values)
            if not present.any():
                continue
            marker = "o" if present.sum() < len(values) / 2 else None  # a line alone would hide how few points it has
            look = {"color": colour, "ls": style, "lw": 1.6, "marker": marker, "ms": 3}
            values = -values if key == "log_evidence" else values
            panel.plot(epochs[present], values[present], label=name, **look)
            if key == "log_evidence":
                error = np.nan_to_num(_series(history, "log_evidence_sem")[present])
                band = values[present] - error, values[present] + error
                panel.fill_between(epochs[present], *band, color=colour, alpha=0.25, lw=0, label="standard error")
            if key == "prior_precision":
                _draw_layers(panel, history, epochs)
        _shade_polishing(panel, history, label="polishing phase" if panel is axes[0] else None)
        finish(panel, label)
        if corner != "lower right":  # everything but the accuracy
            log_axis(panel)
        if corner or (series is GRADIENTS and len(panel.lines) > 1):
            if not corner:
                _make_room_below(panel)
            panel.legend(fontsize=FONT, frameon=False, loc=corner or "lower left")
    axes[-1].set_xlabel("epoch", fontsize=FONT)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    return figure


def evidence_history(
    history: Sequence[Mapping[str, Any]],
    keys: Mapping[str, str],
    looks: Mapping[str, Look] | None = None,
    trained: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw the negative log evidence of a network in training against the epoch, of several curvatures.

    Parameters
    ----------
    history
        As for `training_curve`.
    keys
        By name, in the order of the legend, the entry with the log evidence in nats. Its standard error has the same
        name with `_sem` behind, and may be missing.
    looks
        Colour and line style of each name; by default by their order. See `bnnlaplace.plots.looks`.
    trained
        By name, log evidence and standard error of the trained network, which may be another estimate than that of
        `history`. It is an open circle at the last epoch, apart from the line. Names without a line are left out.

    Returns
    -------
    Figure
        Points with bars of a standard error, joined by lines. The polishing phase is shaded.

    Raises
    ------
    ValueError
        If no entry holds a number, or looks are given and a name has none.
    """
    present = {name: key for name, key in keys.items() if np.isfinite(_series(history, key)).any()}
    if not present:
        raise ValueError(f"history must hold an evidence; got none under {list(keys.values())}; train by the evidence")
    figure = new_figure(NARROW, 2.9)
    panel = figure.subplots()
    epochs = _series(history, "epoch")
    for name, (colour, style) in looks_of(present, looks).items():
        values = -_series(history, present[name])
        known = np.isfinite(values)
        error = np.nan_to_num(_series(history, f"{present[name]}_sem")[known])
        panel.errorbar(
            epochs[known], values[known], yerr=error,
            color=colour, ls=style, lw=1.6, marker="o", ms=3.5, capsize=2.5, elinewidth=1, label=name,
        )  # fmt: skip
        if trained and name in trained:
            value, error = trained[name]
            panel.errorbar(epochs[-1:], [-value], yerr=[error], color=colour, capsize=2.5, elinewidth=1, **_OPEN)
    if trained and not present.keys().isdisjoint(trained):
        panel.plot([], [], color=GREY, label="trained network", **_OPEN)
    _shade_polishing(panel, history, label="polishing phase")
    finish(panel, "negative log evidence (nats)", "epoch")
    log_axis(panel)
    panel.set_xlim(0, epochs[-1] + 1)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    entries = sorted(zip(*panel.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] not in present)
    figure.legend(*zip(*entries, strict=True), loc="outside upper left", fontsize=FONT, frameon=False, ncols=2)
    return figure


def _make_room_below(panel: Axes) -> None:
    """Lower the axis for a legend, where nothing says which corner the curves leave free."""
    low, high = panel.get_ylim()
    panel.set_ylim(low * (low / high) ** 0.6 if panel.get_yscale() == "log" else low - 0.6 * (high - low), high)


def _shade_polishing(panel: Axes, history: Sequence[Mapping[str, Any]], label: str | None) -> None:
    """Shade the epochs in which batch statistics are frozen."""
    polished = [record["epoch"] for record in history if record.get("phase") == "polish"]
    if polished:
        panel.axvspan(polished[0] - 0.5, polished[-1] + 0.5, color="#999999", alpha=0.2, lw=0, label=label)


def _draw_layers(panel: Axes, history: Sequence[Mapping[str, Any]], epochs: Float[np.ndarray, " E"]) -> None:
    """Draw the prior precision of each layer, if they are recorded, behind their geometric mean."""
    by_layer = [record.get("prior_precision_by_layer") or {} for record in history]
    for layer in dict.fromkeys(name for record in by_layer for name in record):
        values = [record.get(layer, np.nan) for record in by_layer]
        panel.plot(epochs, values, color="#999999", lw=0.6, zorder=1, label=f"_{layer}")


def _series(history: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, " E"]:
    """Values of one entry over the epochs; NaN if it is missing."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in history], np.float64)


def _varies(values: Float[np.ndarray, " E"]) -> bool:
    """Whether there is a curve to draw: a prior precision that never changed needs none."""
    values = values[np.isfinite(values)]
    return len(values) == 1 or (len(values) > 1 and bool(values.min() < values.max()))
