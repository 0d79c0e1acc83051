"""Out-of-distribution detection by a score: how well it parts the images a network knows from foreign ones.

Float64 NumPy on one score per image; higher means more like the training images.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.checks import described

Scores = Float[np.ndarray, "N"] | Float[Array, "N"]


def auroc(scores_in: Scores, scores_out: Scores) -> float:
    """Area under the ROC curve: P(score_in > score_out) + P(equal) / 2, by ranks in O((N + M) log(N + M)).

    Higher scores mean in-distribution, e.g. the largest class probability. 0.5 is chance, 1 is perfect.

    Parameters
    ----------
    scores_in, scores_out
        Of examples in and out of distribution, (N,) and (M,).
    """
    return _detection_of_all(scores_in, scores_out)["auroc"]


def fpr_at_95_tpr(scores_in: Scores, scores_out: Scores) -> float:
    """Fraction of out-of-distribution scores accepted at the highest threshold that accepts 95 % of the others.

    An example is accepted when its score is at least the threshold, so that ties with it are accepted on both sides.
    Lower is better.

    Parameters
    ----------
    scores_in, scores_out
        Of examples in and out of distribution, (N,) and (M,).
    """
    return _detection_of_all(scores_in, scores_out)["fpr95"]


def weighted_detection(
    scores_in: np.ndarray, scores_out: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """Map weights (R, N) and (R, M) to the R values of AUROC and FPR95; everything is sorted once, here.

    Parameters
    ----------
    scores_in, scores_out
        Of examples in and out of distribution, (N,) and (M,).
    """
    descending = np.argsort(-scores_in, kind="stable")
    ascending = np.argsort(scores_out, kind="stable")
    below = np.searchsorted(scores_out[ascending], scores_in[descending], side="left")
    up_to = np.searchsorted(scores_out[ascending], scores_in[descending], side="right")

    def detection(weights_in: np.ndarray, weights_out: np.ndarray) -> dict[str, np.ndarray]:
        weights_in = weights_in[:, descending]
        lower = np.zeros((len(weights_out), len(scores_out) + 1))  # [r, j]: weight of the j smallest of the others
        np.cumsum(weights_out[:, ascending], axis=1, out=lower[:, 1:])
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


def _detection_of_all(scores_in: Scores, scores_out: Scores) -> dict[str, float]:
    both = []
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        scores = np.asarray(scores, np.float64)
        if scores.ndim != 1 or scores.size == 0 or np.isnan(scores).any():
            raise ValueError(f"{name} must be a non-empty vector without NaN; got {described(scores)}")
        both.append(scores)
    found = weighted_detection(*both)(np.ones((1, both[0].size)), np.ones((1, both[1].size)))
    return {name: float(value[0]) for name, value in found.items()}
