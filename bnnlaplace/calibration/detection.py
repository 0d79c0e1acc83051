"""Detection of out-of-distribution inputs: how well a score separates them from inputs like the training images.

Everything is float64 NumPy on one score per image. A higher score means more like the training images.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported at their first use
from jaxtyping import Float

from bnnlaplace.calibration import predictions
from bnnlaplace.calibration.predictions import Probs
from bnnlaplace.core.types import AnyArray

ScoresIn = Float[AnyArray, " N"] | Float[AnyArray, "N 1"]
ScoresOut = Float[AnyArray, " M"] | Float[AnyArray, "M 1"]


class RocCurve(NamedTuple):
    """Shares of examples that are accepted at each threshold of a score.

    Attributes
    ----------
    false_positive_rate
        Share of the out-of-distribution examples whose score is at least the threshold, from 0 to 1.
    true_positive_rate
        The same share of the in-distribution examples.
    thresholds
        Infinity, which stands for accepting nothing, and then every distinct score, descending.
    area
        The area under the curve that joins the points by straight lines: `auroc`.
    """

    false_positive_rate: Float[np.ndarray, " T"]
    true_positive_rate: Float[np.ndarray, " T"]
    thresholds: Float[np.ndarray, " T"]
    area: float


def auroc(scores_in: ScoresIn, scores_out: ScoresOut) -> float:
    """Area under the ROC curve: P(score_in > score_out) + P(equal) / 2.

    0.5 is chance, 1 is perfect. Computed from ranks in O((N + M) log(N + M)).

    Parameters
    ----------
    scores_in, scores_out
        Scores of N examples in distribution and of M out of it, vectors or columns, for example the largest class
        probability. For P(class 1) of a binary classifier, auroc(p[y == 1], p[y == 0]) tells how well it ranks.
    """
    return _detection_of_all(scores_in, scores_out)["auroc"]


def fpr_at_95_tpr(scores_in: ScoresIn, scores_out: ScoresOut) -> float:
    """Fraction of out-of-distribution inputs accepted at the highest threshold that accepts 95 % of the others.

    Lower is better. An example is accepted if its score is at least the threshold, so ties with it are accepted on both
    sides.

    Parameters
    ----------
    scores_in, scores_out
        As for `auroc`.
    """
    return _detection_of_all(scores_in, scores_out)["fpr95"]


def roc_curve(scores_in: ScoresIn, scores_out: ScoresOut) -> RocCurve:
    """Return the ROC curve of detection: what is accepted of both sets, threshold by threshold.

    Equal scores are accepted together, so ties between the sets are one oblique step, whose half is what `auroc`
    counts.

    Parameters
    ----------
    scores_in, scores_out
        As for `auroc`: the largest class probability, or `-entropy(probs)`.

    Returns
    -------
    RocCurve
        From (0, 0) to (1, 1), with one point for each distinct score. O((N + M) log(N + M)).

    Raises
    ------
    ValueError
        If scores are not a non-empty vector or column, or NaN.

    Examples
    --------
    >>> curve = roc_curve(np.array([0.9, 0.8, 0.5]), np.array([0.8, 0.3]))
    >>> curve.true_positive_rate.round(2), curve.false_positive_rate, curve.area
    (array([0.  , 0.33, 0.67, 1.  , 1.  ]), array([0. , 0. , 0.5, 0.5, 1. ]), 0.75)
    """
    scores_in = predictions.scores(scores_in, "scores_in")
    scores_out = predictions.scores(scores_out, "scores_out")
    levels = np.unique(np.concatenate([scores_in, scores_out]))[::-1]
    accepted_in, accepted_out = (
        len(scores) - np.r_[len(scores), np.searchsorted(np.sort(scores), levels, side="left")]
        for scores in (scores_in, scores_out)
    )
    # Twice the area in whole pairs of examples, which is exact.
    pairs = np.sum(np.diff(accepted_out) * (accepted_in[1:] + accepted_in[:-1]))
    area = float(pairs / (2 * len(scores_in) * len(scores_out)))
    return RocCurve(accepted_out / len(scores_out), accepted_in / len(scores_in), np.r_[np.inf, levels], area)


def entropy(probs: Probs) -> Float[np.ndarray, " N"]:
    """Entropy of each predicted distribution, -sum_c p_c log p_c in nats, from 0 (certain) to log C (uniform).

    Its negative is a score of confidence for `auroc`, `roc_curve` and `rejection_curve`.

    Parameters
    ----------
    probs
        (N, C) class probabilities, or P(class 1) of a binary classifier, (N,) or (N, 1).

    Raises
    ------
    ValueError
        If the shape is wrong or a row is not a distribution.
    """
    return scipy.special.entr(predictions.rows(probs, "probs")).sum(axis=1)


def weighted_detection(
    scores_in: ScoresIn, scores_out: ScoresOut
) -> Callable[[Float[np.ndarray, "R N"], Float[np.ndarray, "R M"]], dict[str, Float[np.ndarray, " R"]]]:
    """Return the map from weights (R, N) and (R, M) to the R values of AUROC and FPR95, for `resample`.

    The scores are sorted once, here.

    Parameters
    ----------
    scores_in, scores_out
        As for `auroc`.
    """
    scores_in = predictions.scores(scores_in, "scores_in")
    scores_out = predictions.scores(scores_out, "scores_out")
    descending = np.argsort(-scores_in, kind="stable")
    ascending = np.argsort(scores_out, kind="stable")
    below = np.searchsorted(scores_out[ascending], scores_in[descending], side="left")
    up_to = np.searchsorted(scores_out[ascending], scores_in[descending], side="right")

    def detection(
        weights_in: Float[np.ndarray, "R N"], weights_out: Float[np.ndarray, "R M"]
    ) -> dict[str, Float[np.ndarray, " R"]]:
        weights_in = weights_in[:, descending]
        lower = np.zeros((len(weights_out), len(scores_out) + 1))  # [r, j]: weight of the j smallest of the others
        np.cumsum(weights_out[:, ascending], axis=1, out=lower[:, 1:])
        # Twice the weight of the pairs that are ordered rightly: a strict win counts in both sums, a tie in one.
        wins = np.einsum("rn,rn->r", weights_in, lower[:, below]) + np.einsum("rn,rn->r", weights_in, lower[:, up_to])
        accepted = np.cumsum(weights_in, axis=1)
        # Weights are whole numbers, so 20 a >= 19 N decides "at least 95 %" exactly.
        threshold = np.argmax(20 * accepted >= 19 * accepted[:, -1:], axis=1)
        rejected = lower[np.arange(len(lower)), below[threshold]]
        return {
            "auroc": wins / (2 * accepted[:, -1] * lower[:, -1]),
            "fpr95": (lower[:, -1] - rejected) / lower[:, -1],
        }

    return detection


def _detection_of_all(scores_in: ScoresIn, scores_out: ScoresOut) -> dict[str, float]:
    """AUROC and FPR95 with weight one for each example."""
    weights = np.ones((1, np.size(scores_in))), np.ones((1, np.size(scores_out)))
    values = weighted_detection(scores_in, scores_out)(*weights)
    return {name: float(value[0]) for name, value in values.items()}
