"""Bootstrap intervals against their definition, and their coverage."""

import importlib
import math

import numpy as np
import pytest

from bnnlaplace import calibration
from bnnlaplace.calibration import Bootstrap, detection, intervals, paired_differences, resample

# `bnnlaplace.calibration.bootstrap` is the exported function; `importlib` reaches the file of that name.
MODULE = importlib.import_module("bnnlaplace.calibration.bootstrap")


def test_the_exported_function_wins_over_the_file_of_its_name():
    assert calibration.bootstrap is importlib.import_module("bnnlaplace.calibration.metrics").bootstrap
    assert MODULE.resample is resample


def test_evaluate_reports_the_functions_and_brackets_them(case):
    probs, labels, ood = case
    results = calibration.evaluate(probs, labels, ood, seed=0, resamples=200)
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
    assert list(results) == list(expected)
    for name, value in expected.items():
        assert results[name].value == pytest.approx(value, rel=1e-12)
        assert results[name].low < results[name].value <= results[name].high
    assert set(calibration.evaluate(probs, labels, seed=0, resamples=2)) == set(expected) - {"auroc", "fpr95"}


def test_replicates_are_the_metrics_of_resampled_data(case, ece_by_loop, monkeypatch):
    """The definition: draw with replacement, then compute the metric from scratch."""
    probs, labels, ood = case
    drawn = []
    original = MODULE._multinomial
    monkeypatch.setattr(MODULE, "_multinomial", lambda *a: drawn.append(original(*a)) or drawn[-1])
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
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 7 * (200 + 150))
    parts = calibration.bootstrap(*case, seed=0, resamples=25)
    for name in whole.values:
        np.testing.assert_allclose(parts.replicates[name], whole.replicates[name], rtol=1e-12)


def test_two_sets_of_one_size_are_resampled_independently():
    def alike(weights, others):
        return {"alike": (weights == others).all(axis=1).astype(float)}

    result = resample(alike, [9, 9], seed=0, resamples=5)
    assert result.values["alike"] == 1 and not result.replicates["alike"].any()


def test_interval_of_a_biased_metric_holds_its_value_and_no_negative_number():
    result = Bootstrap({"ece": 0.01}, {"ece": np.linspace(0.02, 0.05, 100)}, ("ece",))
    assert intervals(result)["ece"] == (0.01, 0.0, 0.01)


def test_interval_of_the_accuracy_is_binomial():
    correct = 0.8
    labels = np.repeat([0, 1], [320, 80])
    accuracy = calibration.evaluate(np.tile([0.9, 0.1], (400, 1)), labels, seed=0, resamples=2000)["accuracy"]
    half_width = 1.96 * math.sqrt(correct * (1 - correct) / 400)
    assert accuracy.value == correct
    assert accuracy.high - accuracy.low == pytest.approx(2 * half_width, rel=0.1)


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
    flatter = 0.98 * probs + 0.02 / probs.shape[1]
    ours, theirs = (calibration.bootstrap(p, labels, ood, seed=5) for p in (flatter, probs))
    difference = paired_differences(ours, theirs)["nll"]
    assert difference.value == pytest.approx(ours.values["nll"] - theirs.values["nll"], rel=1e-12)
    assert difference.high < 0  # flatter is better here, although the two intervals overlap
    assert intervals(ours)["nll"].high > intervals(theirs)["nll"].low
    itself = paired_differences(ours, ours)
    assert all(interval == (0, 0, 0) for interval in itself.values())


@pytest.mark.parametrize("resamples", [1, 39, 40, 41, 200, 1000])
def test_the_interval_of_a_difference_is_the_mirror_image_of_that_of_its_negative(case, resamples):
    probs, labels, ood = case
    flatter = 0.9 * probs + 0.1 / probs.shape[1]
    ours, theirs = (calibration.bootstrap(p, labels, ood, seed=5, resamples=resamples) for p in (flatter, probs))
    mirrored = paired_differences(theirs, ours)
    for name, (value, low, high) in paired_differences(ours, theirs).items():
        assert mirrored[name] == (-value, -high, -low), name


def test_a_fortieth_of_the_replicates_lies_at_or_beyond_each_end():
    replicates = np.random.default_rng(0).permutation(np.arange(1000.0))
    assert intervals(Bootstrap({"nll": 500.0}, {"nll": replicates}, ()))["nll"] == (500, 24, 975)
    replicates[replicates > 970] = np.inf
    assert intervals(Bootstrap({"nll": 500.0}, {"nll": replicates}, ()))["nll"] == (500, 24, np.inf)


def test_differences_of_infinite_scores_are_nan_and_unequal_resamples_refused():
    infinite = Bootstrap({"nll": np.inf}, {"nll": np.array([np.inf, 1.0])}, ())
    assert all(math.isnan(end) for end in paired_differences(infinite, infinite)["nll"])
    with pytest.raises(ValueError, match=r"same metrics; got \['nll'\] and \['brier', 'nll'\]"):
        paired_differences(
            infinite, Bootstrap({"nll": 1.0, "brier": 1.0}, {"nll": np.ones(2), "brier": np.ones(2)}, ())
        )
    with pytest.raises(ValueError, match="same resamples; got 2 and 1"):
        paired_differences(infinite, Bootstrap({"nll": 1.0}, {"nll": np.ones(1)}, ()))


@pytest.mark.usefixtures("unchecked_annotations")
def test_bad_arguments_are_refused():
    good = lambda weights: {"mean": weights.mean(axis=1)}  # noqa: E731
    for call, message in (
        (lambda: resample(None, [3], seed=0), "statistics must be a function of weights; got NoneType"),
        (lambda: resample(good, [], seed=0), "sizes must be the numbers of examples"),
        (lambda: resample(good, [2.5], seed=0), r"sizes=\[...\] must be an integer of at least 1; got 2.5"),
        (lambda: resample(good, [3], seed=True), "seed=... must be an integer of at least 0; got True"),
        (lambda: resample(good, [3], seed=0, biased_upwards="ece"), "biased_upwards must be several names; got 'ece'"),
        (lambda: intervals({"nll": 1.0}), "result must come from `bootstrap` or `resample`; got dict"),
        (lambda: paired_differences(None, None), "result must come from `bootstrap` or `resample`; got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
