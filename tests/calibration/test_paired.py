"""Paired intervals over seeds and examples: against their definition, and their coverage whatever varies."""

import numpy as np
import pytest
from cases import exhaustive
from scipy.stats import norm, t

from bnnlaplace import calibration
from bnnlaplace.calibration import Interval, calibrated_log_likelihoods, example_scores, paired_interval


def differences(rng, seeds, examples, of_seeds, of_examples, residual, mean=0.0):
    """A table of differences, in which the three parts have the given standard deviations of the mean."""
    by_seed = of_seeds * np.sqrt(seeds) * rng.normal(size=(seeds, 1))
    by_example = of_examples * np.sqrt(examples) * rng.normal(size=(1, examples))
    return mean + by_seed + by_example + residual * np.sqrt(seeds * examples) * rng.normal(size=(seeds, examples))


@pytest.mark.parametrize(
    ("seeds", "parts"),
    [
        (3, (1, 0.01, 0.01)),
        exhaustive(5, (1, 0.01, 0.01)),
        exhaustive(5, (0.01, 1, 0.01)),
        exhaustive(3, (0.01, 0.01, 1)),
        exhaustive(3, (1, 1, 1)),
    ],
)
def test_intervals_hold_the_truth_in_95_percent_of_the_cases(seeds, parts):
    rng, covered, repeats = np.random.default_rng(2), 0, 150
    for repeat in range(repeats):
        table = differences(rng, seeds, 60, *parts)
        interval = paired_interval(table, np.zeros_like(table), seed=repeat, resamples=200)
        covered += interval.low <= 0 <= interval.high
    # A share of 150 has a standard error of .018. Resamples of three or five seeds alone would have .73 and .80.
    assert 0.95 - 3 * 0.018 <= covered / repeats <= 0.99


def test_widths_are_those_of_normal_theory():
    """Seeds alone: the t-interval of their means. Examples alone: the normal one. Residuals: once, not twice."""
    rng = np.random.default_rng(1)
    widths = {}
    for name, parts in (("seeds", (1, 0, 0)), ("examples", (0, 1, 0)), ("residual", (0, 0, 1))):
        table = differences(rng, 8, 400, *parts)
        interval = paired_interval(table, np.zeros_like(table), seed=3, resamples=20_000)
        widths[name] = (interval.high - interval.low) / 2
        assert interval.value == pytest.approx(table.mean(), rel=1e-12)
        means = table.mean(axis=1) if name != "examples" else table.mean(axis=0)
        quantile = t.ppf(0.975, 7) if name != "examples" else norm.ppf(0.975)
        expected = quantile * means.std(ddof=1) / np.sqrt(len(means))
        # Means of eight draws of few seeds are less long-tailed than normal ones; residuals leave a trace in examples.
        assert widths[name] == pytest.approx(expected, rel={"seeds": 0.12, "examples": 0.03, "residual": 0.15}[name])


def test_the_interval_of_a_difference_is_the_mirror_image_of_that_of_its_negative():
    table = differences(np.random.default_rng(5), 5, 40, 1, 1, 1, mean=0.5)
    value, low, high = paired_interval(table, np.zeros_like(table), seed=0)
    assert paired_interval(np.zeros_like(table), table, seed=0) == (-value, -high, -low)


def test_replicates_are_those_of_the_documented_formula():
    rng = np.random.default_rng(4)
    table = differences(rng, 3, 7, 1, 1, 1, mean=0.5)
    ours, theirs = rng.normal(size=(2, 3, 7))
    ours = theirs + table
    drawn = []
    calibration.resample(lambda w, v: drawn.append((w, v)) or {"": w[:, 0]}, [3, 7], seed=9, resamples=500)
    mean = table.mean()
    a, b = table.mean(axis=1) - mean, table.mean(axis=0) - mean
    e = table - mean - a[:, None] - b[None]
    h = np.sqrt(max(0, 1 - (np.sum(e**2) / (2 * 6)) / (3 * np.sum(b**2) / 6)))
    k = np.sqrt(3 / 2) * t.ppf(0.975, 2) / norm.ppf(0.975)
    seed_counts, example_counts = drawn[0]
    values = np.sort([
        mean + k * np.sum((w - 1) * a) / 3 + h * np.sum((v - 1) * b) / 7
        for w, v in zip(seed_counts, example_counts, strict=True)
    ])  # fmt: skip
    interval = paired_interval(list(ours), list(theirs), seed=9, resamples=500)
    np.testing.assert_allclose(interval, (mean, values[12], values[487]), rtol=1e-10)
    assert 0 < h < 1


def test_a_difference_counts_only_where_seeds_and_examples_agree():
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(3, 100))
    for shift, counts in ((np.full(3, -0.2), True), (np.array([-0.7, 0.2, -0.1]), False)):
        ours = theirs + shift[:, None] + 0.05 * rng.normal(size=(3, 100))
        interval = paired_interval(ours, theirs, seed=0)
        opposite = paired_interval(theirs, ours, seed=0)
        assert interval.excludes_zero == opposite.excludes_zero == counts
        assert interval.value == -opposite.value < 0
    assert paired_interval(theirs, theirs, seed=0) == (0, 0, 0)
    assert not any(Interval(*ends).excludes_zero for ends in ((0, 0, 0), (1, 0, 2), (1, np.nan, np.nan)))
    assert Interval(-1, -2, -0.5).excludes_zero


def test_example_scores_have_the_metrics_as_means(case):
    probs, labels, _ = case
    scores = example_scores(probs, labels)
    for name, metric in calibration.bootstrap(probs, labels, seed=0, resamples=1).values.items():
        if name in scores:
            assert scores[name].mean() == pytest.approx(metric, rel=1e-12)
    assert sorted(scores) == ["accuracy", "brier", "confidence", "nll"]
    # Temperature decides the log likelihoods of overconfident predictions, and not the calibrated ones.
    flat = probs**0.5 / (probs**0.5).sum(axis=1, keepdims=True)
    nll = paired_interval([example_scores(flat, labels)["nll"]] * 2, [scores["nll"]] * 2, seed=0)
    assert nll.excludes_zero and nll.value < 0
    equal = paired_interval(*([calibrated_log_likelihoods(p, labels, seed=0)] * 2 for p in (flat, probs)), seed=0)
    assert abs(equal.value) < 1e-9


@pytest.mark.usefixtures("unchecked_annotations")
def test_bad_arguments_are_refused():
    good = np.arange(6.0).reshape(2, 3)
    for scores, reference, message in (
        (good, good[:, :2], r"reference=...\) must have the 2 seeds and 3 examples of scores; got 2 and 2"),
        (good[:1], good[:1], r"two or more seeds; got 1 of lengths \[3\]; for one seed use `paired_differences`"),
        (good[0], good[0], r"scores=...\) must be .* two or more seeds; got ndarray"),
        ([good[0], good[1, :2]], good, r"of the same two or more examples, .*; got 2 of lengths \[2, 3\]"),
        ([], [], "two or more seeds; got list"),
        (good[:, :1], good[:, :1], r"two or more examples, .*; got 2 of lengths \[1\]"),
        (good, np.where(good == 4, np.inf, good), r"reference=...\) must be finite.*1 non-finite.*such as brier"),
        (good * np.nan, good, "must be a non-empty vector without NaN"),
        (None, good, r"scores=...\) must be arrays \(N,\) .*; got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_interval(scores, reference, seed=0)
    with pytest.raises(ValueError, match="resamples=... must be .* got 0"):
        paired_interval(good, good, seed=0, resamples=0)
