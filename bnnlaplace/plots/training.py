"""What was recorded over the epochs of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnnlaplace.plots.style import FONT, LINE_STYLES, PALETTE, finish, log_axis, new_figure


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
            sparse = "o" if present.sum() < len(values) / 2 else None
            drawn = {"color": colour, "ls": style, "lw": 1.6, "marker": sparse, "ms": 3}
            panel.plot(epochs[present], values[present], label=name, **drawn)
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


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if record.get(key) is None else record[key] for record in history], np.float64)


def _varies(values: np.ndarray) -> bool:
    """Whether there is a curve to draw; a prior precision that stayed where it was is none."""
    values = values[np.isfinite(values)]
    return len(values) > 0 and (len(values) == 1 or values.min() < values.max())
