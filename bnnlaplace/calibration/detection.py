"""Detection of out-of-distribution inputs: how well a score separates them from inputs like the training images.

Everything is float64 NumPy on one score per image. A higher score means more like the training images.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from bnnlaplace.calibration import predictions
from bnnlaplace.core.types import AnyArray

ScoresIn = Float[AnyArray, " N"] | Float[AnyArray, "N 1"]
ScoresOut = Float[AnyArray, " M"] | Float[AnyArray, "M 1"]


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
