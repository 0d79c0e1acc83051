"""Calibration metrics against hand-computed cases, scikit-learn, and loops that follow the definitions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from bnnlaplace import calibration
from bnnlaplace.calibration import bootstrap as resampling
from bnnlaplace.calibration import detection
from bnnlaplace.calibration.bootstrap import Bootstrap, intervals, paired_differences

NUM_CLASSES = 5


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def case():
    """Overconfident predictions: labels drawn from softmax(logits), probabilities from softmax(2 logits)."""
    rng = np.random.default_rng(1)
    logits = 1.5 * rng.normal(size=(200, NUM_CLASSES))
    labels = (softmax(logits).cumsum(axis=1) < rng.random((200, 1))).sum(axis=1)
    ood = softmax(1.2 * rng.normal(size=(150, NUM_CLASSES)))
    return softmax(2 * logits), labels, ood


def ece_by_loop(probs, labels, edges, closed):
    """Bins closed above or below, by definition; a confidence outside all of them is a bug of the test."""
    total, counted = 0.0, 0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        members = []
        for n, confidence in enumerate(probs.max(axis=1)):
            if low < confidence <= high if closed == "above" else low <= confidence < high + (high == edges[-1]):
                members.append(n)
        counted += len(members)
        if members:
            hits = np.mean([float(probs[n].argmax() == labels[n]) for n in members])
            total += len(members) * abs(hits - np.mean([probs[n].max() for n in members]))
    assert counted == len(probs)
    return total / len(probs)


# --- point values -----------------------------------------------------------------------------------------------


def test_hand_computed():
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    labels = np.array([0, 1, 1, 0])
    assert calibration.accuracy(probs, labels) == 0.75
    assert calibration.mean_confidence(probs) == pytest.approx(0.7, abs=1e-15)
    assert calibration.negative_log_likelihood(probs, labels) == pytest.approx(
        -(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.5)) / 4, abs=1e-15
    )
    assert calibration.brier_score(probs, labels) == pytest.approx((0.02 + 0.08 + 0.72 + 0.5) / 4, abs=1e-15)
    # Two bins (0, .5], (.5, 1]: {.5, right} and {.9 right, .8 right, .6 wrong}.
    assert calibration.expected_calibration_error(probs, labels, 2) == pytest.approx(
        0.25 * 0.5 + 0.75 * abs(2 / 3 - 2.3 / 3), abs=1e-15
    )


def test_against_sklearn(case):
    probs, labels, _ = case
    classes = np.arange(NUM_CLASSES)
    assert calibration.accuracy(probs, labels) == sklearn.metrics.accuracy_score(labels, probs.argmax(axis=1))
    assert calibration.negative_log_likelihood(probs, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, probs, labels=classes), rel=1e-12
    )
    assert calibration.brier_score(probs, labels) == pytest.approx(
        sklearn.metrics.brier_score_loss(labels, probs, labels=classes, scale_by_half=False), rel=1e-12
    )


def test_brier_limits():
    """A wrong sign or a missing square would leave [0, 2]."""
    certain = np.eye(3)
    assert calibration.brier_score(certain, np.array([0, 1, 2])) == 0
    assert calibration.brier_score(certain, np.array([1, 2, 0])) == 2


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_ece_is_the_sum_over_bins(case, num_bins):
    probs, labels, _ = case
    equal_width = ece_by_loop(probs, labels, np.linspace(0, 1, num_bins + 1), "above")
    assert calibration.expected_calibration_error(probs, labels, num_bins) == pytest.approx(equal_width, rel=1e-12)
    edges = np.quantile(probs.max(axis=1), np.linspace(0, 1, num_bins + 1))
    equal_mass = ece_by_loop(probs, labels, edges, "below")
    assert calibration.expected_calibration_error(probs, labels, num_bins, "equal_mass") == pytest.approx(
        equal_mass, rel=1e-12
    )


def test_ece_counts_the_last_bin():
    """Certain and wrong: the whole error sits at confidence 1, in the bin that half-open binning loses."""
    probs, labels = np.array([[1.0, 0.0]] * 4), np.array([1, 1, 1, 0])
    assert calibration.expected_calibration_error(probs, labels) == 0.75
    assert calibration.expected_calibration_error(probs, labels, binning="equal_mass") == 0.75


def test_ece_notices_wrong_labels(case):
    probs, labels, _ = case
    shifted = calibration.expected_calibration_error(probs, (labels + 1) % NUM_CLASSES)
    assert shifted > calibration.expected_calibration_error(probs, labels) + 0.2


def test_confidence_on_an_edge_belongs_to_the_bin_below():
    bins = calibration.reliability_bins(np.array([[0.75, 0.25], [1.0, 0.0]]), np.array([0, 0]), num_bins=4)
    assert bins.counts.tolist() == [0, 0, 1, 1]


def test_equal_mass_bins_are_equal_and_keep_ties_together():
    confidence = np.linspace(0.51, 0.99, 30)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.zeros(30, int)
    assert calibration.reliability_bins(probs, labels, 5, "equal_mass").counts.tolist() == [6] * 5
    tied = np.array([[1.0, 0.0]] * 9 + [[0.5, 0.5]])
    bins = calibration.reliability_bins(tied, np.zeros(10, int), 5, "equal_mass")
    assert bins.counts.tolist() == [1, 0, 0, 0, 9]


def test_reliability_bins_explain_the_ece(case):
    probs, labels, _ = case
    bins = calibration.reliability_bins(probs, labels)
    assert bins.counts.sum() == len(labels) and len(bins.edges) == 16
    full = bins.counts > 0
    assert np.isnan(bins.accuracy[~full]).all() and (~full).any()
    gaps = bins.counts[full] * np.abs(bins.accuracy[full] - bins.confidence[full]) / len(labels)
    assert gaps.sum() == pytest.approx(calibration.expected_calibration_error(probs, labels), rel=1e-12)


def test_nll_is_of_the_mean_probability_and_not_the_mean_nll():
    samples = np.array([[[0.9, 0.1]], [[0.1, 0.9]]])
    labels = np.array([0])
    assert calibration.negative_log_likelihood(samples.mean(axis=0), labels) == pytest.approx(math.log(2), abs=1e-15)
    with pytest.raises(ValueError, match="average over posterior samples first"):
        calibration.negative_log_likelihood(samples, labels)


def test_probability_zero_at_the_label_is_infinite_and_stays_so():
    probs, labels = np.array([[1.0, 0.0]] + [[0.7, 0.3]] * 9), np.array([1] + [0] * 9)
    assert calibration.negative_log_likelihood(probs, labels) == np.inf
    nll = calibration.evaluate(probs, labels, seed=0)["nll"]
    assert nll.value == nll.high == np.inf
    # Resamples that miss the impossible example, (9/10)^10 = 35 % of them, have the finite value of the others.
    assert nll.low == pytest.approx(-math.log(0.7), rel=1e-12)


def test_certain_and_right_scores_plus_zero():
    assert math.copysign(1, calibration.negative_log_likelihood(np.eye(2), np.array([0, 1]))) == 1


# --- bootstrap --------------------------------------------------------------------------------------------------


def test_evaluate_reports_the_functions_and_brackets_them(case):
    probs, labels, ood = case
    found = calibration.evaluate(probs, labels, ood, seed=0, resamples=200)
    scores = probs.max(axis=1), ood.max(axis=1)
    expected = {
        "accuracy": calibration.accuracy(probs, labels),
        "nll": calibration.negative_log_likelihood(probs, labels),
        "ece": calibration.expected_calibration_error(probs, labels),
        "ece_equal_mass": calibration.expected_calibration_error(probs, labels, binning="equal_mass"),
        "brier": calibration.brier_score(probs, labels),
        "confidence": calibration.mean_confidence(probs),
        "auroc": detection.auroc(*scores),
        "fpr95": detection.fpr_at_95_tpr(*scores),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-12)
        assert found[name].low < found[name].value <= found[name].high
    assert set(calibration.evaluate(probs, labels, seed=0, resamples=2)) == set(expected) - {"auroc", "fpr95"}


def test_replicates_are_the_metrics_of_resampled_data(case, monkeypatch):
    """The definition: draw with replacement, then compute the metric from scratch."""
    probs, labels, ood = case
    drawn = []
    original = resampling._multinomial
    monkeypatch.setattr(resampling, "_multinomial", lambda *a: drawn.append(original(*a)) or drawn[-1])
    result = calibration.bootstrap(probs, labels, ood, seed=3, resamples=4)
    weights_in, weights_out = (weights.astype(int) for weights in drawn)
    assert (weights_in.sum(axis=1) == len(probs)).all() and weights_in.max() > 1
    for r in range(4):
        inside, outside = (np.repeat(np.arange(w.shape[1]), w[r]) for w in (weights_in, weights_out))
        again = calibration.bootstrap(probs[inside], labels[inside], ood[outside], seed=0, resamples=1).values
        again["ece_equal_mass"] = ece_by_loop(
            probs[inside], labels[inside], np.quantile(probs.max(axis=1), np.linspace(0, 1, 16)), "below"
        )  # with the bins of the whole sample, as documented
        for name, value in again.items():
            assert result.replicates[name][r] == pytest.approx(value, rel=1e-12), name


def test_chunks_do_not_change_the_result(case, monkeypatch):
    whole = calibration.bootstrap(*case, seed=0, resamples=25)
    monkeypatch.setattr(resampling, "_CHUNK_ELEMENTS", 7 * (200 + 150))
    parts = calibration.bootstrap(*case, seed=0, resamples=25)
    for name in whole.values:
        np.testing.assert_allclose(parts.replicates[name], whole.replicates[name], rtol=1e-12)


def test_two_sets_of_one_size_are_resampled_independently():
    def alike(weights, others):
        return {"alike": (weights == others).all(axis=1).astype(float)}

    result = resampling.resample(alike, [9, 9], seed=0, resamples=5)
    assert result.values["alike"] == 1 and not result.replicates["alike"].any()


def test_interval_of_a_biased_metric_holds_its_value_and_no_negative_number():
    result = Bootstrap({"ece": 0.01}, {"ece": np.linspace(0.02, 0.05, 100)}, ("ece",))
    assert intervals(result)["ece"] == (0.01, 0.0, 0.01)


def test_interval_of_the_accuracy_is_binomial():
    correct = 0.8
    labels = np.repeat([0, 1], [320, 80])
    found = calibration.evaluate(np.tile([0.9, 0.1], (400, 1)), labels, seed=0, resamples=2000)["accuracy"]
    half_width = 1.96 * math.sqrt(correct * (1 - correct) / 400)
    assert found.value == correct
    assert found.high - found.low == pytest.approx(2 * half_width, rel=0.1)


def test_reflected_interval_covers_the_calibration_error_and_the_percentile_one_does_not():
    """Confidence c, accuracy c - 0.05, 360 examples: resampling adds its own bias to the plug-in's."""
    rng = np.random.default_rng(0)
    covered = {"reflected": 0, "percentile": 0}
    for _ in range(60):
        confidence = 0.1 + 0.9 * rng.beta(4, 1, size=360)
        probs = np.concatenate([confidence[:, None], np.tile((1 - confidence[:, None]) / 19, 19)], axis=1)
        labels = (rng.random(360) > confidence - 0.05).astype(int)
        result = calibration.bootstrap(probs, labels, seed=1, resamples=200)
        for kind, biased in (("reflected", ("ece",)), ("percentile", ())):
            ends = intervals(result._replace(biased_upwards=biased))["ece"]
            covered[kind] += ends.low <= 0.05 <= ends.high
    assert covered["reflected"] >= 0.85 * 60
    assert covered["percentile"] < 0.7 * 60


def test_paired_differences_are_sharper_than_the_intervals(case):
    probs, labels, ood = case
    flatter = 0.98 * probs + 0.02 / NUM_CLASSES
    ours, theirs = (calibration.bootstrap(p, labels, ood, seed=5) for p in (flatter, probs))
    difference = paired_differences(ours, theirs)["nll"]
    assert difference.value == pytest.approx(ours.values["nll"] - theirs.values["nll"], rel=1e-12)
    assert difference.high < 0  # flatter is better here, although the two intervals overlap
    assert intervals(ours)["nll"].high > intervals(theirs)["nll"].low
    itself = paired_differences(ours, ours)
    assert all(interval == (0, 0, 0) for interval in itself.values())


def test_differences_of_infinite_scores_are_nan_and_unequal_resamples_refused():
    infinite = Bootstrap({"nll": np.inf}, {"nll": np.array([np.inf, 1.0])}, ())
    assert all(math.isnan(end) for end in paired_differences(infinite, infinite)["nll"])
    with pytest.raises(ValueError, match="same resamples; got 2 and 1"):
        paired_differences(infinite, Bootstrap({"nll": 1.0}, {"nll": np.ones(1)}, ()))


# --- what comes in ----------------------------------------------------------------------------------------------


def test_jax_arrays_of_lower_precision_are_welcome(case):
    probs, labels, _ = case
    found = calibration.evaluate(jnp.asarray(probs, jnp.float32), jnp.asarray(labels), seed=0, resamples=2)
    assert found["nll"].value == pytest.approx(calibration.negative_log_likelihood(probs, labels), rel=1e-6)


GOOD = np.array([[0.5, 0.5], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (GOOD[0], [0, 1], r"\(N, C\) array; got shape \(2,\)"),
        (np.empty((0, 2)), np.empty(0, int), "non-empty"),
        (GOOD * [1, np.nan], [0, 1], "must not contain NaN"),
        (GOOD + [[-0.6, 0.6], [0, 0]], [0, 1], "must not be negative; got -0.1"),
        (GOOD * [[1], [2]], [0, 1], "row 1 sums to 2"),
        (GOOD * [[1], [np.inf]], [0, 1], "row 1 sums to inf"),
        (GOOD, [0.0, 1.0], "integer classes; got dtype float64"),
        (GOOD, [0, 1, 1], r"shape \(2,\), one per example; got \(3,\)"),
        (GOOD, [0, 2], r"lie in 0\.\.1; got 0\.\.2"),
        (GOOD, [-1, 1], r"got -1\.\.1"),
    ],
)
def test_bad_predictions_are_refused(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration.evaluate(probs, np.asarray(labels), seed=0)


def test_bad_options_are_refused(case):
    probs, labels, _ = case
    with pytest.raises(ValueError, match="num_bins must be at least 1; got 0"):
        calibration.expected_calibration_error(probs, labels, 0)
    with pytest.raises(ValueError, match="equal_width or equal_mass; got 'quantile'"):
        calibration.reliability_bins(probs, labels, binning="quantile")
    with pytest.raises(ValueError, match="resamples must be at least 1; got 0"):
        calibration.evaluate(probs, labels, seed=0, resamples=0)
    with pytest.raises(ValueError, match="the 5 classes of probs; got 2 columns"):
        calibration.evaluate(probs, labels, GOOD, seed=0)
