"""Scores of one method: the numbers of its tables, and those of each image, which paired intervals need."""

import math
from typing import Any, NamedTuple

import numpy as np

from bnnlaplace import calibration
from training.data.shifts import SEVERITIES
from training.study.inputs import HeldOut

SPLIT_SEED = 0
"""Seeds the halves of the calibrated log likelihood, which are alike for all methods and seeds."""


class Method(NamedTuple):
    """One method in one cell."""

    description: dict[str, Any]
    """training, method, prior (how its precision was chosen) and link name it. The rest says how it was made."""
    numbers: dict[str, Any]
    """Its metrics. None where one is not finite."""
    arrays: dict[str, np.ndarray]
    """Scores of each image in float32; see `measured`."""


def measured(probs: np.ndarray, held_out: HeldOut, bins: int, splits: int, **description: Any) -> Method:
    """Measure class probabilities of all held-out images.

    Parameters
    ----------
    probs : ndarray, shape (M, C)
        Of `held_out.images`; rows are made to sum to one in double precision.
    held_out
        The images.
    bins, splits
        Bins of the calibration error, and divisions of the calibrated log likelihood.
    **description
        Becomes `Method.description`.

    Returns
    -------
    Method
        Arrays: `nll`, `brier`, `accuracy`, `confidence` and `calibrated` (log likelihood) of N test images,
        `shift_nll`, `shift_accuracy` and `shift_confidence` (shifts, severities, n), and `foreign_<set>` (confidence).

    Raises
    ------
    FloatingPointError
        A probability is not finite.
    """
    probs = np.asarray(probs, np.float64)
    if not np.isfinite(probs).all():
        raise FloatingPointError(f"{np.sum(~np.isfinite(probs).all(axis=1))} predictions are not finite")
    probs = probs / probs.sum(axis=1, keepdims=True)
    test, labels = probs[: held_out.num_test], held_out.labels
    arrays = dict(calibration.example_scores(test, labels))
    arrays["calibrated"] = calibration.calibrated_log_likelihoods(test, labels, seed=SPLIT_SEED, splits=splits)
    numbers = {
        **{name: arrays[name].mean() for name in ("nll", "calibrated", "brier", "accuracy", "confidence")},
        "ece": calibration.expected_calibration_error(test, labels, bins),
        "rejection": calibration.rejection_curve(test, labels).area,
    }
    arrays |= _of_shifts(held_out.of_shifts(probs), held_out.shift_labels)
    numbers["shifts"] = _shift_numbers(held_out, probs, arrays, bins)
    confidence = probs.max(axis=1)
    for name, place in held_out.foreign.items():
        arrays[f"foreign_{name}"] = confidence[place]
    numbers["auroc"] = {
        name: calibration.auroc(arrays["confidence"], confidence[place]) for name, place in held_out.foreign.items()
    }
    return Method(
        description, _finite(numbers), {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    )


def _of_shifts(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Score each shifted image: arrays (shifts, severities, n)."""
    shape = probs.shape[:3]
    if not shape[0]:
        return {}
    rows = calibration.example_scores(probs.reshape(-1, probs.shape[-1]), np.tile(labels, shape[0] * shape[1]))
    return {f"shift_{name}": rows[name].reshape(shape) for name in ("nll", "accuracy", "confidence")}


def _shift_numbers(held_out: HeldOut, probs: np.ndarray, arrays: dict[str, np.ndarray], bins: int) -> dict[str, Any]:
    """By shift the NLL, ECE and accuracy at severities 0 (the same images, clean), 1, 2, ..."""
    clean, numbers = held_out.shifted_from, {}
    for position, shift in enumerate(held_out.shifts):
        moved = held_out.of_shifts(probs)[position]
        parts = [probs[: held_out.num_test][clean], *moved]
        numbers[shift] = {
            "nll": [arrays["nll"][clean].mean(), *arrays["shift_nll"][position].mean(axis=1)],
            "ece": [calibration.expected_calibration_error(part, held_out.shift_labels, bins) for part in parts],
            "accuracy": [arrays["accuracy"][clean].mean(), *arrays["shift_accuracy"][position].mean(axis=1)],
        }
        assert len(parts) == len(SEVERITIES) + 1
    return numbers


def _finite(value: Any) -> Any:
    """Make numbers plain, and those that are not finite None, as JSON has none of these."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return float(value) if math.isfinite(value) else None
