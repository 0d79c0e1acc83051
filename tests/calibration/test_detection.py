"""AUROC and FPR95 against scikit-learn and loops that follow the definitions."""

import numpy as np
import pytest
import sklearn.metrics

from bnnlaplace.calibration import detection


def auroc_by_loop(scores_in, scores_out):
    wins = [(a > b) + 0.5 * (a == b) for a in scores_in for b in scores_out]
    return float(np.mean(wins))


def fpr95_by_loop(scores_in, scores_out):
    accepted = [t for t in sorted(scores_in, reverse=True) if np.mean(np.asarray(scores_in) >= t) >= 0.95]
    return float(np.mean(np.asarray(scores_out) >= accepted[0]))


def test_auroc_against_sklearn_and_loop():
    rng = np.random.default_rng(2)
    for scores_in, scores_out in [
        (rng.beta(8, 2, 200), rng.beta(4, 2, 150)),
        (rng.integers(0, 6, 40) / 6, rng.integers(0, 5, 30) / 6),  # many ties
    ]:
        truth = np.repeat([1, 0], [len(scores_in), len(scores_out)])
        expected = sklearn.metrics.roc_auc_score(truth, np.concatenate([scores_in, scores_out]))
        area = detection.auroc(scores_in, scores_out)
        assert area == pytest.approx(expected, abs=1e-14)
        assert area == pytest.approx(auroc_by_loop(scores_in, scores_out), abs=1e-14)
        assert detection.fpr_at_95_tpr(scores_in, scores_out) == fpr95_by_loop(scores_in, scores_out)


def test_detection_limits():
    high, low = np.linspace(2, 3, 20), np.linspace(0, 1, 10)
    assert (detection.auroc(high, low), detection.fpr_at_95_tpr(high, low)) == (1, 0)
    assert (detection.auroc(low, high), detection.fpr_at_95_tpr(low, high)) == (0, 1)
    assert detection.auroc(np.ones(3), np.ones(4)) == 0.5
    # Exactly 95 % of 20 is 19: the threshold passes over one low score, and no more.
    assert detection.fpr_at_95_tpr(np.r_[0.0, high[1:]], np.array([1.0])) == 0
    assert detection.fpr_at_95_tpr(np.r_[0.0, 0.0, high[2:]], np.array([1.0])) == 1


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("scores_in", "scores_out", "message"),
    [
        (np.ones(3), np.empty(0), "scores_out must be a non-empty vector"),
        (np.array([1.0, np.nan]), np.ones(2), "scores_in must .* 1 non-finite"),
        (np.ones((2, 2)), np.ones(2), r"scores_in must .* shape \(2, 2\)"),
    ],
)
def test_bad_scores_are_refused(scores_in, scores_out, message):
    with pytest.raises(ValueError, match=message):
        detection.auroc(scores_in, scores_out)
