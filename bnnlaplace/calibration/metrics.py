"""Metrics of predicted class probabilities: accuracy, proper scores, calibration.

Everything is float64 NumPy on the probabilities that a predictive returns: (N, C) of any floating-point type. A binary
classifier may give P(class 1) alone, (N,) or (N, 1), which is scored as the two classes that it stands for. Average a
Bayesian predictive over posterior samples *before* it comes here: the score of the mean probability is not the mean of
the scores.

Every metric has a function of its own, which takes weights of the examples. `evaluate` returns all of them with
bootstrap intervals, together with the scores of out-of-distribution detection.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from bnnlaplace.calibration import predictions
from bnnlaplace.calibration.bootstrap import Bootstrap, Interval, intervals, resample
from bnnlaplace.calibration.detection import weighted_detection
from bnnlaplace.calibration.predictions import Labelled, Labels, Probs, Weights
from bnnlaplace.core import checks
from bnnlaplace.core.types import AnyArray

Binning = Literal["equal_width", "equal_mass"]
ProbsOutside = Float[AnyArray, "M D"] | Float[AnyArray, " M"]

# Both are sums of |mean gap| over bins, which sampling noise makes larger.
_BIASED_UPWARDS = ("ece", "ece_equal_mass")

_MOST_BINS = 1_000_000  # the arrays of a reliability diagram are then 32 MB


class ReliabilityBins(NamedTuple):
    """Examples grouped by confidence.

    Attributes
    ----------
    edges
        Edges of the B bins, ascending.
    counts
        Number of examples in each bin, or the sum of their weights.
    confidence, accuracy
        Their means over the examples of each bin; NaN in an empty bin.
    """

    edges: Float[np.ndarray, " B+1"]
    counts: Int[np.ndarray, " B"] | Float[np.ndarray, " B"]
    confidence: Float[np.ndarray, " B"]
    accuracy: Float[np.ndarray, " B"]


# --- one metric each --------------------------------------------------------------------------------------------


def accuracy(probs: Probs, labels: Labels, *, weights: Weights | None = None) -> float:
    """Fraction of examples whose most probable class is the label; among equal probabilities the first counts.

    Parameters
    ----------
    probs, labels
        (N, C) class probabilities and (N,) integer classes. For a binary classifier also P(class 1), (N,) or (N, 1).
    weights
        How many times each example counts, at least 0, (N,); by default once.
    """
    return _mean("accuracy", predictions.labelled(probs, labels, weights))


def mean_confidence(probs: Probs, *, weights: Weights | None = None) -> float:
    """Mean over examples of the largest probability. Predictions are overconfident if it exceeds the accuracy.

    Parameters
    ----------
    probs
        (N, C) class probabilities, or P(class 1), (N,) or (N, 1).
    weights
        How many times each example counts, at least 0, (N,); by default once.
    """
    array = predictions.numbers(probs, "probs")
    array, _, counted = predictions.present(array, array, weights)
    return float(np.average(predictions.rows(array, "probs").max(axis=1), weights=counted))


def negative_log_likelihood(probs: Probs, labels: Labels, *, weights: Weights | None = None) -> float:
    """Mean of -log p(label), natural logarithm, in nats per example.

    Parameters
    ----------
    probs
        (N, C) class probabilities, already averaged over posterior samples. For a binary classifier also P(class 1),
        (N,) or (N, 1).
    labels
        (N,) integer classes. Those of a binary classifier may be bools, or the numbers 0.0 and 1.0.
    weights
        How many times each example counts, at least 0, (N,); by default once.

    Returns
    -------
    float
        Infinite if a label that counts was given probability exactly 0: that is the value of the score, and no floor
        hides it.

    Raises
    ------
    ValueError
        If shapes are wrong, a row is not a distribution, a label lies outside the classes, or weights are negative, not
        finite, or all zero.
    """
    return _mean("nll", predictions.labelled(probs, labels, weights))


def brier_score(probs: Probs, labels: Labels, *, weights: Weights | None = None) -> float:
    """Mean over examples of sum_c (p_c - [c = label])^2: in [0, 2], 0 is perfect (Brier 1950).

    For a binary classifier this is the mean of 2 (p - label)^2, as both classes count.

    Parameters
    ----------
    probs, labels
        (N, C) class probabilities and (N,) integer classes. For a binary classifier also P(class 1), (N,) or (N, 1).
    weights
        How many times each example counts, at least 0, (N,); by default once.
    """
    return _mean("brier", predictions.labelled(probs, labels, weights))


def expected_calibration_error(
    probs: Probs,
    labels: Labels,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    *,
    weights: Weights | None = None,
) -> float:
    """Top-label calibration error, sum_b (n_b / N) |accuracy_b - confidence_b|, in [0, 1].

    With weights, n_b and N are sums of weights, and the means of a bin are weighted.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3. The estimate is biased
    upwards: perfectly calibrated predictions get a positive value of order sqrt(B / N).

    Parameters
    ----------
    probs, labels
        (N, C) class probabilities and (N,) integer classes. For a binary classifier also P(class 1), (N,) or (N, 1).
    num_bins
        How many bins of confidence, at most a million.
    binning
        "equal_width": bins (k/B, (k+1)/B]. A confidence exactly on an edge belongs to the bin below, and the last bin
        holds 1. "equal_mass": bins [lower, upper) between quantiles of the confidences, the last one closed. Examples
        of equal confidence share a bin, so the result does not depend on their order.
    weights
        How many times each example counts, at least 0, (N,); by default once. Not with "equal_mass".

    Raises
    ------
    ValueError
        As `negative_log_likelihood`. Also if there are weights with "equal_mass": quantiles of weighted examples have
        several definitions.
    """
    _check_binning("expected_calibration_error", binning, weights)
    checked = predictions.labelled(probs, labels, weights)
    return float(np.abs(_summed_gaps(checked, num_bins, binning)).sum() / checked.total)


def calibration_gaps(
    probs: Probs, labels: Labels, num_bins: int = 15, *, weights: Weights | None = None
) -> Float[np.ndarray, " num_bins"]:
    """Sum confidence - correctness over the examples of each bin of equal width.

    The sums of several batches add up. `expected_calibration_error` is the sum of their absolute values over all N
    examples, divided by N, or by the sum of the weights.

    Parameters
    ----------
    probs, labels, num_bins, weights
        As for `expected_calibration_error`.

    Returns
    -------
    np.ndarray
        One sum for each bin, (num_bins,).
    """
    return _summed_gaps(predictions.labelled(probs, labels, weights), num_bins, "equal_width")


def reliability_bins(
    probs: Probs,
    labels: Labels,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    *,
    weights: Weights | None = None,
) -> ReliabilityBins:
    """Counts, mean confidence and accuracy in the bins of `expected_calibration_error`, for a reliability diagram.

    Parameters
    ----------
    probs, labels, num_bins, binning, weights
        As for `expected_calibration_error`.
    """
    _check_binning("reliability_bins", binning, weights)
    checked = predictions.labelled(probs, labels, weights)
    columns, weights = per_example(checked.probs, checked.labels), checked.weights
    edges, index = _binned(columns["confidence"], num_bins, binning)
    counts = np.bincount(index, weights, num_bins)
    once = 1 if weights is None else weights
    with np.errstate(invalid="ignore"):  # 0 / 0 is the documented NaN of an empty bin
        confidence = np.bincount(index, once * columns["confidence"], num_bins) / counts
        correct = np.bincount(index, once * columns["accuracy"], num_bins) / counts
    return ReliabilityBins(edges, counts, confidence, correct)


# --- all metrics with their uncertainty -------------------------------------------------------------------------


def bootstrap(
    probs: Probs,
    labels: Labels,
    probs_ood: ProbsOutside | None = None,
    *,
    seed: int,
    num_bins: int = 15,
    resamples: int = 1000,
) -> Bootstrap:
    """Evaluate all metrics on the data and on resamples of it. Methods that share `seed` share the resamples.

    Weights of examples are not taken. Resamples of examples that are copies, and of examples that stand for more others
    than they are, differ, and a weight does not say which of both it is. Equal-mass bins and the scores of detection
    have no one weighted definition either.

    Parameters
    ----------
    probs, labels
        (N, C) class probabilities and (N,) integer classes. For a binary classifier also P(class 1), (N,) or (N, 1).
    probs_ood
        Class probabilities of out-of-distribution images, in a form of `probs`. They add `auroc` and `fpr95` of the
        largest probability. Both sets are resampled independently.
    seed
        Seeds the resamples.
    num_bins
        Bins of the calibration errors. Resamples use the equal-mass bins of the whole sample.
    resamples
        How many resamples R, at most a million.

    Returns
    -------
    Bootstrap
        Values and replicates of accuracy, nll, ece, ece_equal_mass, brier, confidence and, with `probs_ood`, auroc and
        fpr95, for `intervals` and `paired_differences`. Time O(R (N + M)).

    Raises
    ------
    ValueError
        If shapes are wrong, a row is not a distribution, a label lies outside the classes, or `resamples` is below 1.
    """
    probs, labels, _ = predictions.labelled(probs, labels)
    metrics = _weighted_metrics(probs, labels, num_bins)
    if probs_ood is None:
        return resample(metrics, [len(probs)], seed=seed, resamples=resamples, biased_upwards=_BIASED_UPWARDS)
    probs_ood = predictions.rows(probs_ood, "probs_ood")
    if probs_ood.shape[1] != probs.shape[1]:
        raise ValueError(
            f"probs_ood must have the {probs.shape[1]} classes of probs; got {probs_ood.shape[1]} columns; "
            "predict both with one network"
        )
    detection = weighted_detection(probs.max(axis=1), probs_ood.max(axis=1))
    return resample(
        lambda weights, weights_ood: metrics(weights) | detection(weights, weights_ood),
        [len(probs), len(probs_ood)],
        seed=seed,
        resamples=resamples,
        biased_upwards=_BIASED_UPWARDS,
    )


def evaluate(
    probs: Probs,
    labels: Labels,
    probs_ood: ProbsOutside | None = None,
    *,
    seed: int,
    num_bins: int = 15,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Return all metrics with 95 % bootstrap intervals: `intervals(bootstrap(...))`.

    Parameters
    ----------
    probs, labels, probs_ood, seed, num_bins, resamples
        As for `bootstrap`.

    Examples
    --------
    >>> probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> round(evaluate(probs, np.array([0, 1, 1]), seed=0)["brier"].value, 4)
    0.2733
    """
    return intervals(bootstrap(probs, labels, probs_ood, seed=seed, num_bins=num_bins, resamples=resamples))


# --- weighted metrics -------------------------------------------------------------------------------------------


def _mean(name: str, checked: Labelled) -> float:
    """The mean over examples of one of the metrics of `per_example`."""
    return checked.mean(per_example(checked.probs, checked.labels)[name])


def _summed_gaps(checked: Labelled, num_bins: int, binning: Binning) -> Float[np.ndarray, " {num_bins}"]:
    """Sum the gaps of the examples of each bin."""
    columns = per_example(checked.probs, checked.labels)
    _, index = _binned(columns["confidence"], num_bins, binning)
    gaps = columns["confidence"] - columns["accuracy"]
    return np.bincount(index, gaps if checked.weights is None else checked.weights * gaps, num_bins)


def _check_binning(caller: str, binning: Binning, weights: Weights | None) -> None:
    if weights is not None and binning == "equal_mass":
        raise ValueError(
            f"{caller}(weights=...) must be left out with binning='equal_mass', whose bins hold equally many examples; "
            "got both; use binning='equal_width'"
        )


def per_example(probs: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> dict[str, Float[np.ndarray, " N"]]:
    """Metrics that are means over examples, before the mean is taken."""
    at_label = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0]
    with np.errstate(divide="ignore"):  # -log 0 = inf is the documented value
        nll = 0.0 - np.log(at_label)  # not -log: a certain prediction scores 0, not -0
    return {
        "accuracy": (probs.argmax(axis=1) == labels).astype(np.float64),
        "nll": nll,
        "brier": (probs**2).sum(axis=1) - at_label**2 + (1 - at_label) ** 2,
        "confidence": probs.max(axis=1),
    }


def _binned(
    confidence: Float[np.ndarray, " N"], num_bins: int, binning: Binning
) -> tuple[Float[np.ndarray, " {num_bins}+1"], Int[np.ndarray, " N"]]:
    """Edges of the bins, and the number of each example's bin."""
    num_bins = checks.count(num_bins, "num_bins=...", most=_MOST_BINS, advice="15 is usual")
    checks.choice(binning, "binning=...", get_args(Binning))
    levels = np.linspace(0, 1, num_bins + 1)
    # Only inner edges are compared, so a confidence of 1 + rounding has a bin.
    if binning == "equal_width":
        return levels, np.searchsorted(levels[1:-1], confidence, side="left")
    # Quantile bins are closed below. Confidences saturated at 1, often most of them, then have the last bin alone.
    edges = np.quantile(confidence, levels)
    return edges, np.searchsorted(edges[1:-1], confidence, side="right")


def _weighted_error(
    columns: dict[str, Float[np.ndarray, " N"]], num_bins: int, binning: Binning
) -> Callable[[Float[np.ndarray, "R N"]], Float[np.ndarray, " R"]]:
    """Return the map from weights to N times the calibration error: the sum over bins of |sum of weighted gaps|."""
    _, index = _binned(columns["confidence"], num_bins, binning)
    gaps = columns["confidence"] - columns["accuracy"]
    # Examples are sorted by bins, so that a bin is a slice, and an empty one is none.
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    return lambda weights: np.abs(np.add.reduceat(weights[:, order] * gaps[order], starts, axis=1)).sum(axis=1)


def _weighted_metrics(
    probs: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], num_bins: int
) -> Callable[[Float[np.ndarray, "R N"]], dict[str, Float[np.ndarray, " R"]]]:
    """Return the map from weights (R, N), whose rows sum to N, to the R values of each metric of labelled examples."""
    columns = per_example(probs, labels)
    impossible = np.isinf(columns["nll"])
    columns["nll"] = np.where(impossible, 0.0, columns["nll"])  # 0 * inf would be NaN; set to inf below
    sums = {
        name: _weighted_error(columns, num_bins, binning)
        for name, binning in (("ece", "equal_width"), ("ece_equal_mass", "equal_mass"))
    }

    def metrics(weights: Float[np.ndarray, "R N"]) -> dict[str, Float[np.ndarray, " R"]]:
        means = {name: weights @ column / len(labels) for name, column in columns.items()}
        means["nll"] = np.where(weights[:, impossible].any(axis=1), np.inf, means["nll"])
        errors = {name: summed(weights) / len(labels) for name, summed in sums.items()}
        scores = means | errors
        return {name: scores[name] for name in ("accuracy", "nll", "ece", "ece_equal_mass", "brier", "confidence")}

    return metrics
