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


@pytest.mark.parametrize("levels", [1, 2, 7, None])
def test_roc_curve_against_sklearn_and_auroc(levels):
    rng = np.random.default_rng(levels or 0)
    scores_in, scores_out = rng.beta(4, 2, 60), rng.beta(3, 3, 45)
    if levels:  # many ties
        scores_in, scores_out = (np.ceil(scores * levels) / levels for scores in (scores_in, scores_out))
    curve = detection.roc_curve(scores_in, scores_out)
    truth = np.repeat([1, 0], [60, 45])
    expected = sklearn.metrics.roc_curve(truth, np.r_[scores_in, scores_out], drop_intermediate=False)
    for ours, theirs in zip(curve, expected, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    assert curve.area == pytest.approx(detection.auroc(scores_in, scores_out), abs=1e-15)
    assert curve.area == pytest.approx(np.trapezoid(curve.true_positive_rate, curve.false_positive_rate), abs=1e-14)
    accepts_95 = np.argmax(20 * np.rint(60 * curve.true_positive_rate) >= 19 * 60)
    assert curve.false_positive_rate[accepts_95] == detection.fpr_at_95_tpr(scores_in, scores_out)


def test_roc_curve_of_columns_and_infinite_scores():
    curve = detection.roc_curve(np.array([[np.inf], [1.0]]), np.array([[1.0], [-np.inf]]))
    assert curve.thresholds.tolist() == [np.inf, np.inf, 1.0, -np.inf]
    assert curve.true_positive_rate.tolist() == [0, 0.5, 1, 1]
    assert curve.false_positive_rate.tolist() == [0, 0, 0.5, 1]
    assert curve.area == 0.875


def test_entropy_by_hand():
    probs = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]])
    np.testing.assert_allclose(detection.entropy(probs), [0, np.log(3), 1.5 * np.log(2)], atol=1e-15)
    binary = detection.entropy(np.array([0.5, 0.0, 0.1]))
    np.testing.assert_allclose(binary, [np.log(2), 0, -0.1 * np.log(0.1) - 0.9 * np.log(0.9)], rtol=1e-14)
    with pytest.raises(ValueError, match="probs must have rows that sum to 1"):
        detection.entropy(np.ones((2, 2)))


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
    with pytest.raises(ValueError, match=message):
        detection.roc_curve(scores_in, scores_out)
