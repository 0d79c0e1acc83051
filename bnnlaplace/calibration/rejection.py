"""Accuracy against rejection: how accurate predictions are if the least confident ones are left to someone else."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bnnlaplace.calibration import predictions
from bnnlaplace.calibration.predictions import Labels, Probs
from bnnlaplace.core.types import AnyArray


class RejectionCurve(NamedTuple):
    """Accuracy of the examples that are kept, by the share that is rejected.

    Attributes
    ----------
    rejection
        Shares 0, 1/N, ..., (N - 1)/N of rejected examples.
    accuracy
        Accuracy of the examples that are kept.
    ideal
        Accuracy if the wrong predictions were rejected first.
    area
        Mean of `accuracy`: the area under the curve as a staircase. 1 is perfect.
    excess
        Mean of `ideal` minus `area`: what the order of the confidences costs. 0 is perfect.
    """

    rejection: Float[np.ndarray, " N"]
    accuracy: Float[np.ndarray, " N"]
    ideal: Float[np.ndarray, " N"]
    area: float
    excess: float


def rejection_curve(
    probs: Probs, labels: Labels, confidence: Float[AnyArray, " N"] | Float[AnyArray, "N 1"] | None = None
) -> RejectionCurve:
    """Compute the accuracy of the predictions that remain when the least confident ones are rejected.

    Among examples of equal confidence every order of rejection is as good as any other. The curve is the mean over all
    of them, in closed form: of m tied examples of which c are right, k kept ones have k c / m right on average.

    1 - `area` is the area under the risk-coverage curve (AURC), and `excess` is E-AURC, both of Geifman, Uziel and
    El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019, with the ideal summed
    exactly.

    Parameters
    ----------
    probs, labels
        (N, C) class probabilities and (N,) integer classes. For a binary classifier also P(class 1), (N,) or (N, 1).
    confidence
        One number for each example, (N,) or (N, 1); the lowest are rejected first. By default the largest probability.
        With `-entropy(probs)` the examples of most entropy are.

    Returns
    -------
    RejectionCurve
        Time O(N log N).

    Raises
    ------
    ValueError
        As `accuracy`. Also if `confidence` is not one number for each example.

    Examples
    --------
    >>> curve = rejection_curve(np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]), np.array([0, 1, 0]))
    >>> curve.accuracy.round(3), round(curve.area, 3), round(curve.excess, 3)
    (array([0.667, 0.5  , 1.   ]), 0.722, 0.167)
    """
    probs, labels, _ = predictions.labelled(probs, labels)
    ordered_by = probs.max(axis=1) if confidence is None else predictions.scores(confidence, "confidence")
    if ordered_by.shape != labels.shape:
        raise ValueError(
            f"confidence must be one number for each of the {len(labels)} examples; got {len(ordered_by)}; leave it "
            "out for the largest probability"
        )
    is_right = probs.argmax(axis=1) == labels
    _, group, sizes = np.unique(-ordered_by, return_inverse=True, return_counts=True)  # the most confident come first
    kept = np.arange(1, len(labels) + 1)
    # Counts of what is more confident than each group of ties. Within a group the right ones come at a steady rate.
    before = np.cumsum(sizes) - sizes
    right = np.bincount(group, is_right)
    right_before = np.cumsum(right) - right
    tied = np.repeat(np.arange(len(sizes)), sizes)
    accuracy = (right_before[tied] + (kept - before[tied]) * (right / sizes)[tied]) / kept
    ideal = np.minimum(kept, is_right.sum()) / kept
    area = float(accuracy.mean())
    return RejectionCurve((kept - 1) / len(labels), accuracy[::-1], ideal[::-1], area, float(ideal.mean() - area))
