"""Calibration metrics against hand-computed cases, scikit-learn, and loops that follow the definitions."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from bnnlaplace import calibration

GOOD = np.array([[0.5, 0.5], [0.2, 0.8]])


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
    classes = np.arange(probs.shape[1])
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
def test_ece_is_the_sum_over_bins(case, ece_by_loop, num_bins):
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
    shifted = calibration.expected_calibration_error(probs, (labels + 1) % probs.shape[1])
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


@pytest.mark.usefixtures("unchecked_annotations")
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


def test_jax_arrays_of_lower_precision_are_welcome(case):
    probs, labels, _ = case
    results = calibration.evaluate(jnp.asarray(probs, jnp.float32), jnp.asarray(labels), seed=0, resamples=2)
    assert results["nll"].value == pytest.approx(calibration.negative_log_likelihood(probs, labels), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_probabilities_of_16_bits_are_welcome(dtype):
    """A softmax in 16 bits sums to one within its own rounding; the scores are those of the numbers given."""
    rng = np.random.default_rng(3)
    for num_classes in (3, 100):
        logits = jnp.asarray(2 * rng.normal(size=(40, num_classes)), dtype)
        probs, labels = jax.nn.softmax(logits, axis=-1), rng.integers(0, num_classes, 40)
        at_label = np.asarray(probs, np.float64)[np.arange(40), labels]
        found = calibration.evaluate(probs, labels, seed=0, resamples=2)["nll"].value
        assert found == pytest.approx(-np.log(at_label).mean(), rel=1e-12)
    far = np.array([[0.5, 0.6], [0.3, 0.7]])
    with pytest.raises(ValueError, match="row 0 sums to 1.1"):
        calibration.accuracy(jnp.asarray(far, dtype), np.array([0, 1]))


def test_a_binary_classifier_is_scored_as_its_two_classes():
    rng = np.random.default_rng(5)
    positive, labels = rng.random(60), rng.integers(0, 2, 60)
    both = np.stack([1 - positive, positive], axis=1)
    outside = rng.random(30)
    expected = calibration.bootstrap(both, labels, np.stack([1 - outside, outside], 1), seed=2, resamples=3)
    forms = [(positive, labels), (positive[:, None], labels[:, None]), (positive, labels > 0.5)]
    forms += [(positive[:, None], labels[:, None].astype(np.float32)), (jnp.asarray(positive), jnp.asarray(labels))]
    for probs, targets in forms:
        found = calibration.bootstrap(probs, targets, outside[:, None], seed=2, resamples=3)
        for name, value in expected.values.items():
            assert found.values[name] == pytest.approx(value, rel=1e-5), name
            np.testing.assert_allclose(found.replicates[name], expected.replicates[name], rtol=1e-5)
    chosen = np.where(labels == 1, positive, 1 - positive)
    assert calibration.negative_log_likelihood(positive, labels) == pytest.approx(-np.log(chosen).mean(), rel=1e-12)
    assert calibration.brier_score(positive, labels) == pytest.approx(2 * np.mean((positive - labels) ** 2), rel=1e-12)
    assert calibration.accuracy(positive[:, None], labels) == np.mean((positive > 0.5) == labels)
    ranks = sklearn.metrics.roc_auc_score(labels, positive)
    by_column = positive[:, None][labels == 1], positive[:, None][labels == 0]
    assert calibration.auroc(*by_column) == pytest.approx(ranks, rel=1e-12)
    certain = jnp.asarray([[0.0], [1.0]], jnp.bfloat16)
    assert calibration.negative_log_likelihood(certain, np.array([False, True])) == 0


@pytest.mark.usefixtures("unchecked_annotations")
def test_bad_arguments_are_refused(case):
    probs, labels, _ = case
    predictions = {
        "logits of a vector": (GOOD[0] - 1, [0, 1], "between 0 and 1 .* one number for each example.*sigmoid"),
        "NaN in a vector": (GOOD[0] * np.nan, [0, 1], "between 0 and 1 .* got 2 NaN"),
        "scalar": (np.float64(0.5), [0], r"\(N, C\) array; got shape \(\)"),
        "strings": (np.array([["a", "b"]]), [0], "array of real numbers; got ndarray of <U1"),
        "nothing": (None, [0], "array of real numbers; got None"),
        "ragged": ([[0.5, 0.5], [1.0]], [0, 1], "array of real numbers"),
        "complex": (GOOD + 0j, [0, 1], "array of real numbers; got ndarray of complex128"),
        "labels of three": (GOOD[:, 1], [0, 2], r"lie in 0\.\.1; got 0\.\.2"),
        "soft labels": (GOOD[:, 1], [0.0, 0.4], "binary classifier must be 0 or 1; .*threshold"),
        "labels that are strings": (GOOD, ["a", "b"], "labels must be an array of real numbers"),
        "empty": (np.empty((0, 2)), np.empty(0, int), "non-empty"),
        "NaN": (GOOD * [1, np.nan], [0, 1], "must not contain NaN"),
        "negative": (GOOD + [[-0.6, 0.6], [0, 0]], [0, 1], "must not be negative; got -0.1"),
        "sum": (GOOD * [[1], [2]], [0, 1], "row 1 sums to 2"),
        "infinite": (GOOD * [[1], [np.inf]], [0, 1], "row 1 sums to inf"),
        "float labels": (GOOD, [0.0, 1.0], "integer classes; got dtype float64"),
        "number of labels": (GOOD, [0, 1, 1], r"shape \(2,\), one per example; got \(3,\)"),
        "high label": (GOOD, [0, 2], r"lie in 0\.\.1; got 0\.\.2"),
        "low label": (GOOD, [-1, 1], r"got -1\.\.1"),
    }
    calls = {
        name: (partial(calibration.evaluate, rows, np.asarray(classes), seed=0), message)
        for name, (rows, classes, message) in predictions.items()
    } | {
        "bins": (
            partial(calibration.expected_calibration_error, probs, labels, 0),
            r"num_bins=\.\.\. must be an integer from 1 to 1000000; got 0; 15 is usual",
        ),
        "binning": (
            partial(calibration.reliability_bins, probs, labels, binning="quantile"),
            r"binning=\.\.\. must be 'equal_width' or 'equal_mass'; got 'quantile'",
        ),
        "resamples": (
            partial(calibration.evaluate, probs, labels, seed=0, resamples=0),
            r"resamples=\.\.\. must be an integer from 1 to 1000000; got 0; 1000 is usual",
        ),
        "seed": (
            partial(calibration.evaluate, probs, labels, seed=-1),
            r"seed=\.\.\. must be an integer of at least 0; got -1",
        ),
        "no seed": (
            partial(calibration.evaluate, probs, labels, seed=None),
            r"seed=\.\.\. must be an integer of at least 0; got None",
        ),
        "half a resample": (
            partial(calibration.evaluate, probs, labels, seed=0, resamples=6.5),
            r"resamples=\.\.\. must be an integer from 1 to 1000000; got 6\.5",
        ),
        "traced": (
            partial(jax.jit(calibration.mean_confidence), jnp.asarray(GOOD)),
            "probs must be known numbers.*outside of jit",
        ),
        "classes": (
            partial(calibration.evaluate, probs, labels, GOOD, seed=0),
            "the 5 classes of probs; got 2 columns",
        ),
    }
    for name, (call, message) in calls.items():
        try:
            call()
        except ValueError as error:
            assert re.search(message, str(error)), f"{name}: {error}"
        else:
            pytest.fail(f"{name} was accepted")


METRICS = {
    "accuracy": calibration.accuracy,
    "nll": calibration.negative_log_likelihood,
    "brier": calibration.brier_score,
    "ece": calibration.expected_calibration_error,
    "gaps": calibration.calibration_gaps,
    "confidence": lambda probs, labels, **options: calibration.mean_confidence(probs, **options),
    "bins": lambda probs, labels, **options: calibration.reliability_bins(probs, labels, **options)[1:],
    "temperature": lambda probs, labels, **options: calibration.fit_temperature(np.log(probs), labels, **options),
}


@pytest.mark.parametrize("name", METRICS)
def test_an_example_of_weight_k_is_k_examples(case, name):
    """A metric that forgets the weights in one of its two sums, or looks at an example that does not count, fails."""
    probs, labels, _ = case
    metric, counts = METRICS[name], np.random.default_rng(0).integers(0, 4, size=len(labels))
    expected = metric(np.repeat(probs, counts, axis=0), np.repeat(labels, counts))
    spoilt, wrong = np.where((counts > 0)[:, None], probs, np.nan), np.where(counts > 0, labels, 99)
    np.testing.assert_allclose(metric(spoilt, wrong, weights=counts), expected, rtol=1e-11)
    half = metric(spoilt, wrong, weights=jnp.asarray(counts / 4, jnp.float32))
    if name in ("gaps", "bins"):  # which are sums, and have sums among them
        return
    np.testing.assert_allclose(half, expected, rtol=1e-11)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    "weights", [np.ones(3), np.ones((2, 1)), [-1.0, 1.0], [0.0, 0.0], [np.nan, 1.0], "ab", [1j, 1]]
)
def test_weights_are_checked(weights):
    labels = np.array([0, 1])
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=r"weights must be (one finite number for each example|an array of real)"):
            metric(GOOD, labels, weights=weights)


def test_equal_mass_has_no_weights(case):
    probs, labels, _ = case
    for metric in (calibration.expected_calibration_error, calibration.reliability_bins):
        with pytest.raises(ValueError, match=r"\(weights=\.\.\.\) must be left out with binning='equal_mass'"):
            metric(probs, labels, binning="equal_mass", weights=np.ones(len(labels)))


def test_more_bins_than_examples_take_the_memory_of_the_examples():
    """Each bin had a column for all examples: a million bins asked for gigabytes."""
    probs, labels = np.random.default_rng(0).dirichlet(np.ones(3), size=400), np.arange(400) % 3
    alone = np.abs(probs.max(axis=1) - (probs.argmax(axis=1) == labels)).mean()  # every example has a bin of its own
    for num_bins in (100_000_000, 10**12):
        with pytest.raises(
            ValueError, match=r"num_bins=... must be an integer from 1 to 1000000; got 10+; 15 is usual"
        ):
            calibration.expected_calibration_error(probs, labels, num_bins)
    assert calibration.expected_calibration_error(probs, labels, 1_000_000) == pytest.approx(alone, rel=1e-3)
    assert calibration.calibration_gaps(probs, labels, 1_000_000).shape == (1_000_000,)
    found = calibration.bootstrap(probs, labels, seed=0, num_bins=1_000_000, resamples=3)
    assert found.values["ece"] == pytest.approx(alone, rel=1e-3)
    with pytest.raises(ValueError, match="resamples=... must be an integer from 1 to 1000000; got 1000000000000"):
        calibration.bootstrap(probs, labels, seed=0, resamples=10**12)
