"""Rejection curves by hand, against all orders of tied examples, and against the definition of the areas."""

import itertools

import numpy as np
import pytest

from bnnlaplace.calibration import accuracy, entropy, rejection_curve


def by_loop(is_right, confidence):
    """Mean over all orders that reject lower confidence first: the accuracy of those that are kept."""
    curves = [
        [np.mean([is_right[n] for n in order[k:]]) for k in range(len(order))]
        for order in itertools.permutations(range(len(is_right)))
        if all(confidence[a] <= confidence[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(curves, axis=0)


def predicted(is_right):
    """Two classes with class 0 most probable, and labels that make the predictions right or wrong."""
    return np.tile([0.7, 0.3], (len(is_right), 1)), np.where(is_right, 0, 1)


def test_by_hand():
    probs = np.array([[0.6, 0.4], [0.95, 0.05], [0.2, 0.8], [0.1, 0.9]])
    curve = rejection_curve(probs, np.array([1, 0, 0, 1]))  # in order of confidence: right, right, wrong, wrong
    np.testing.assert_allclose(curve.rejection, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(curve.accuracy, [1 / 2, 2 / 3, 1, 1])
    assert curve.area == pytest.approx((1 / 2 + 2 / 3 + 1 + 1) / 4)
    assert curve.excess == 0
    worst = rejection_curve(probs, np.array([1, 1, 0, 0]), confidence=np.array([4, 1, 2, 3.0]))
    np.testing.assert_allclose(worst.accuracy, [0, 0, 0, 0])
    assert (worst.area, worst.excess) == (0, 0)  # no order helps where nothing is right


@pytest.mark.parametrize(
    "confidence", [[0.5] * 6, [0.9, 0.9, 0.5, 0.5, 0.5, 0.1], [0.3, 0.8, 0.3, 0.8, 0.3, 0.8], [1, 2, 3, 4, 5, 6]]
)
def test_ties_are_the_mean_over_all_orders(confidence):
    for is_right in ([1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1] * 6):
        curve = rejection_curve(*predicted(np.array(is_right)), np.array(confidence, float))
        expected = by_loop(is_right, confidence)
        np.testing.assert_allclose(curve.accuracy, expected, rtol=1e-13)
        assert curve.area == pytest.approx(expected.mean(), rel=1e-13)
        ideal = by_loop(is_right, np.argsort(np.argsort(is_right, kind="stable")))
        np.testing.assert_allclose(curve.ideal, ideal, rtol=1e-13)
        assert curve.excess == pytest.approx(np.mean(ideal - expected), abs=1e-13)


def test_ends_and_order_of_examples(case):
    probs, labels, _ = case
    probs = probs.round(1)  # many ties
    probs[:, 0] += 1 - probs.sum(axis=1)
    probs = np.abs(probs) / np.abs(probs).sum(axis=1, keepdims=True)
    curve = rejection_curve(probs, labels)
    assert curve.accuracy[0] == pytest.approx(accuracy(probs, labels), rel=1e-14)
    assert 0 < curve.excess < 1 - curve.area
    shuffled = np.random.default_rng(0).permutation(len(labels))
    np.testing.assert_allclose(rejection_curve(probs[shuffled], labels[shuffled]).accuracy, curve.accuracy, rtol=1e-14)
    by_entropy = rejection_curve(probs, labels, -entropy(probs))
    assert by_entropy.area != curve.area and by_entropy.accuracy[0] == curve.accuracy[0]


def test_a_binary_classifier_is_as_confident_as_its_likelier_class():
    curve = rejection_curve(np.array([0.1, 0.8, 0.6]), np.array([0, 0, 1]))
    np.testing.assert_allclose(curve.accuracy, [2 / 3, 1 / 2, 1])


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (np.ones(3), "confidence must be one number for each of the 4 examples; got 3"),
        (np.array([1, 2, 3, np.nan]), "confidence must be a non-empty vector without NaN"),
        (np.ones((4, 2)), r"confidence must be .* shape \(4, 2\)"),
    ],
)
def test_bad_confidences_are_refused(confidence, message):
    with pytest.raises(ValueError, match=message):
        rejection_curve(*predicted(np.ones(4, bool)), confidence)
