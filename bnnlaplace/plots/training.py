"""Figure of what training recorded in each epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnnlaplace.plots.style import FONT, LINE_STYLES, PALETTE, finish, log_axis, new_figure


def training_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy over the epochs, and the prior precision and gradient of the log joint if recorded.

    Parameters
    ----------
    history
        One mapping per epoch: `epoch`, `phase` ("train" or "polish"; the latter is shaded), and any of `loss`
        (negative log joint per image, nats), `validation_nll`, `accuracy`, `validation_accuracy`, `prior_precision`,
        `gradient_norm`. Missing values and None leave gaps.

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
        ("prior precision", None, {"prior_precision": "prior precision"}),
        ("gradient norm of\nthe log joint", None, {"gradient_norm": "gradient norm"}),
    ]
    recorded = [panel for panel in panels if any(_varies(_series(history, key)) for key in panel[2])]
    if not recorded:
        raise ValueError(f"history must hold loss or accuracy by epoch; got {sorted(history[0])}; see the docstring")
    figure = new_figure(6.6, 0.5 + 1.75 * len(recorded))
    axes = figure.subplots(len(recorded), 1, sharex=True, squeeze=False)[:, 0]
    epochs = _series(history, "epoch")
    polished = epochs[[record.get("phase") == "polish" for record in history]]
    for panel, (label, corner, series) in zip(axes, recorded, strict=True):
        for (key, name), colour, style in zip(series.items(), PALETTE, LINE_STYLES, strict=False):
            values = _series(history, key)
            present = np.isfinite(values)
            if not present.any():
                continue
            marker = "o" if present.sum() < len(values) / 2 else None  # a line alone would hide how few points it has
            look = {"color": colour, "ls": style, "lw": 1.6, "marker": marker, "ms": 3}
            panel.plot(epochs[present], values[present], label=name, **look)
        if len(polished):
            ends = polished[0] - 0.5, polished[-1] + 0.5
            panel.axvspan(*ends, color="#999999", alpha=0.2, lw=0, label="polishing phase")
        finish(panel, label)
        if corner != "lower right":  # everything but the accuracy
            log_axis(panel)
        if corner:
            panel.legend(fontsize=FONT, frameon=False, loc=corner)
    axes[-1].set_xlabel("epoch", fontsize=FONT)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    return figure


def _series(history: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, " E"]:
    """Values of one entry over the epochs; NaN if it is missing."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in history], np.float64)


def _varies(values: Float[np.ndarray, " E"]) -> bool:
    """Whether there is a curve to draw: a prior precision that never changed needs none."""
    values = values[np.isfinite(values)]
    return len(values) == 1 or (len(values) > 1 and bool(values.min() < values.max()))
