"""Calibrated log likelihood against its definition, with the temperature found on a grid."""

import numpy as np
import pytest
from scipy.special import log_softmax

from bnnlaplace.calibration import (
    calibrated_log_likelihood,
    calibrated_log_likelihoods,
    fit_temperature,
    negative_log_likelihood,
)


def scores_at(probs, labels, temperature):
    powers = probs ** (1 / temperature)
    return np.log(powers[np.arange(len(labels)), labels] / powers.sum(axis=1))


def test_each_half_is_scored_at_the_temperature_of_the_other(case):
    """By the definition: powers of probabilities, the best temperature of a fine grid, and the same halves."""
    probs, labels, _ = case
    probs, labels = probs[:41], labels[:41]
    grid, rng, expected = np.geomspace(0.1, 10, 4001), np.random.default_rng(7), np.zeros(41)
    for _ in range(3):
        order = rng.permutation(41)
        halves = order[:21], order[21:]
        for fitted, scored in (halves, halves[::-1]):
            best = max(grid, key=lambda t, i=fitted: scores_at(probs[i], labels[i], t).sum())
            expected[scored] += scores_at(probs[scored], labels[scored], best) / 3
    result = calibrated_log_likelihoods(probs, labels, seed=7, splits=3)
    np.testing.assert_allclose(result, expected, atol=2e-2)  # the grid is 0.1 % wide, and a score has a slope in T
    assert np.abs(result - expected).mean() < 1e-3
    assert calibrated_log_likelihood(probs, labels, seed=7, splits=3) == pytest.approx(result.mean(), rel=1e-14)


def test_the_score_does_not_depend_on_the_temperature_of_the_predictions(case):
    probs, labels, _ = case
    base = calibrated_log_likelihood(probs, labels, seed=0)
    assert base > -negative_log_likelihood(probs, labels) + 0.05  # the case is overconfident
    for power in (0.5, 1.7):
        other = probs**power / (probs**power).sum(axis=1, keepdims=True)
        assert calibrated_log_likelihood(other, labels, seed=0) == pytest.approx(base, abs=1e-9)


def test_held_out_halves_score_below_the_best_temperature_of_all_examples(case):
    """A temperature that had seen what it is scored on would reach the maximum; averaged over halves it cannot."""
    probs, labels, _ = case
    best = -fit_temperature(np.log(probs), labels).nll
    assert best - 0.05 < calibrated_log_likelihood(probs, labels, seed=0, splits=20) < best


def test_more_splits_have_less_noise(case):
    probs, labels, _ = case
    spread = {
        splits: np.std([calibrated_log_likelihood(probs[:60], labels[:60], seed=s, splits=splits) for s in range(12)])
        for splits in (1, 9)
    }
    assert spread[9] == pytest.approx(spread[1] / 3, rel=0.7)


def test_a_binary_classifier_may_give_one_probability():
    rng = np.random.default_rng(0)
    positive = rng.uniform(0.05, 0.95, 80)
    labels = rng.random(80) < positive
    rows = np.stack([1 - positive, positive], axis=1)
    assert calibrated_log_likelihood(positive, labels, seed=1) == calibrated_log_likelihood(
        rows, labels.astype(int), seed=1
    )


def test_zeros_elsewhere_do_not_matter_and_one_at_the_label_is_minus_infinity(case):
    probs, labels, _ = case
    elsewhere = (labels + 1) % 5
    zeroed, tiny = probs.copy(), probs.copy()
    zeroed[np.arange(200), elsewhere], tiny[np.arange(200), elsewhere] = 0.0, 1e-200
    zeroed, tiny = (p / p.sum(axis=1, keepdims=True) for p in (zeroed, tiny))
    scores = calibrated_log_likelihoods(zeroed, labels, seed=0)
    np.testing.assert_allclose(scores, calibrated_log_likelihoods(tiny, labels, seed=0), rtol=1e-9)
    labels = labels.copy()
    labels[3] = elsewhere[3]
    impossible = calibrated_log_likelihoods(zeroed, labels, seed=0)
    assert impossible[3] == -np.inf and np.isfinite(np.delete(impossible, 3)).all()
    # Of the others only those in a half with it may have another temperature, and that one has not seen it.
    assert calibrated_log_likelihood(zeroed, labels, seed=0) == -np.inf
    never = np.tile([1.0, 0.0], (4, 1))
    assert calibrated_log_likelihood(never, np.ones(4, int), seed=0) == -np.inf


def test_an_impossible_label_fits_no_temperature(case):
    """Left in, its logarithm of the smallest number would drag the temperature to the largest allowed one."""
    probs, labels, _ = case
    wrong = probs.copy()
    wrong[0] = np.eye(5)[(labels[0] + 1) % 5]
    change = calibrated_log_likelihoods(wrong, labels, seed=0) - calibrated_log_likelihoods(probs, labels, seed=0)
    assert np.abs(change[1:]).max() < 0.1


def test_float32_probabilities_are_renormalised(case):
    probs, labels, _ = case
    logits = np.log(probs)
    single = np.exp(log_softmax(logits.astype(np.float32), axis=1))
    assert single.dtype == np.float32
    expected = calibrated_log_likelihood(probs, labels, seed=0)
    assert calibrated_log_likelihood(single, labels, seed=0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("unchecked_annotations")
def test_bad_arguments_are_refused():
    probs, labels = np.full((6, 2), 0.5), np.zeros(6, int)
    for call, message in (
        (lambda: calibrated_log_likelihood(probs[:1], labels[:1], seed=0), "at least two examples, .*; got 1"),
        (lambda: calibrated_log_likelihood(probs, labels, seed=-1), r"seed=...\) must be an integer of at least 0"),
        (lambda: calibrated_log_likelihood(probs, labels, seed=0, splits=0), r"splits=...\) must be .* got 0"),
        (lambda: calibrated_log_likelihood(2 * probs, labels, seed=0), "probs must have rows that sum to 1"),
        (lambda: calibrated_log_likelihood(probs, labels + 2, seed=0), "labels must"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
