"""Detection of out-of-distribution inputs: how well a score separates them from inputs like the training images.

Everything is float64 NumPy on one score per image. A higher score means more like the training images.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core import checks

ScoresIn = Float[np.ndarray, " N"] | Float[Array, " N"]
ScoresOut = Float[np.ndarray, " M"] | Float[Array, " M"]


def auroc(scores_in: ScoresIn, scores_out: ScoresOut) -> float:
    """Area under the ROC curve: P(score_in > score_out) + P(equal) / 2.

    0.5 is chance, 1 is perfect. Computed from ranks in O((N + M) log(N + M)).

    Parameters
    ----------
    scores_in, scores_out
        Scores (N,) of examples in distribution and (M,) of examples out of it, for example the largest class
        probability.
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
    scores_in: Float[np.ndarray, " N"], scores_out: Float[np.ndarray, " M"]
) -> Callable[[Float[np.ndarray, "R N"], Float[np.ndarray, "R M"]], dict[str, Float[np.ndarray, " R"]]]:
    """Return the map from weights (R, N) and (R, M) to the R values of AUROC and FPR95, for `resample`.

    The scores are sorted once, here.

    Parameters
    ----------
    scores_in, scores_out
        As for `auroc`.
    """
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
    checked = []
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        scores = np.asarray(scores, np.float64)
        if scores.ndim != 1 or scores.size == 0 or np.isnan(scores).any():
            raise ValueError(
                f"{name} must be a non-empty vector without NaN; got {checks.shape_and_faults(scores)}; "
                "pass one score per example"
            )
        checked.append(scores)
    scores_in, scores_out = checked
    values = weighted_detection(scores_in, scores_out)(np.ones((1, scores_in.size)), np.ones((1, scores_out.size)))
    return {name: float(value[0]) for name, value in values.items()}
