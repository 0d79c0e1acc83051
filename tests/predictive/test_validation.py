"""The predictive on validation data as a function of the prior precision, read in batches and scored in parts."""

import jax
import numpy as np
import pytest
from cases import random_problem, usual

import bnnlaplace
from bnnlaplace import calibration
from bnnlaplace.predictive import validation

RNG = np.random.default_rng(4)
GRID = [0.1, 3.0, 100.0]
X = RNG.normal(size=(12, 4))
LABELS, NUMBERS = RNG.integers(0, 3, size=12), RNG.normal(size=(12, 3))


@pytest.fixture(scope="module")
def regression():
    with jax.enable_x64(True):
        problem = random_problem(bnnlaplace.gaussian(0.4), RNG.normal(size=(20, 3)))
        la = bnnlaplace.Laplace(problem.network, problem.likelihood, hessian_structure="full")
        yield la.fit((problem.inputs, problem.targets))


@pytest.fixture(scope="module")
def classifier():
    """A classifier whose Krylov vectors give as many samples as probes, so that the key changes their order only."""
    with jax.enable_x64(True):
        problem = random_problem(bnnlaplace.categorical(), RNG.integers(0, 3, size=20))
        la = bnnlaplace.Laplace(problem.network)
        options = {"num_probes": 16, "max_vectors": 48, "tolerance": 0.05}
        yield la.fit((problem.inputs, problem.targets), key=jax.random.key(0), **options)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_a_regression_is_scored_by_its_gaussians(regression, x64):
    """The score has a closed form and needs neither key nor samples."""
    curve = regression.validation_curve(X, NUMBERS, GRID)
    for delta, found in zip(GRID, curve.negative_log_likelihood, strict=True):
        mean, variance = regression.with_prior_precision(delta).predictive(X, with_noise=True)
        expected = 0.5 * ((NUMBERS - mean) ** 2 / variance + np.log(2 * np.pi * variance))
        np.testing.assert_allclose(found, expected.mean(), rtol=1e-10)
    assert np.isnan(curve.expected_calibration_error).all()
    with pytest.warns(UserWarning, match="lowest at an end"):
        chosen = regression.optimize_prior_precision("gridsearch", validation=(X, NUMBERS), precisions=GRID)
    assert chosen.prior_precision == curve.best_precision


@pytest.mark.parametrize("most_numbers", usual([1], [1, 2**24]))
def test_batches_and_parts_give_what_arrays_give(regression, classifier, monkeypatch, most_numbers, x64):
    expected = regression.validation_curve(X, NUMBERS, GRID)
    options = {"link_approx": "mc", "key": jax.random.key(1), "num_samples": 16}
    of_classes = classifier.validation_curve(X, LABELS, GRID, **options)
    by_probit = classifier.validation_curve(X, LABELS, GRID)
    monkeypatch.setattr(validation, "MOST_NUMBERS", most_numbers)
    assert_same(regression.validation_curve(X, NUMBERS, GRID, microbatch=5), expected)
    assert_same(classifier.validation_curve(X, LABELS, GRID, microbatch=5, **options), of_classes)
    assert_same(classifier.validation_curve(X, LABELS, GRID, microbatch=5), by_probit)
    batches = [(X[:7], LABELS[:7]), (X[7:], LABELS[7:])]
    for data in (batches, iter(batches), (batch for batch in batches), (X, LABELS.tolist()), [X, LABELS]):
        with pytest.warns(UserWarning, match="lowest at an end"):
            chosen = classifier.optimize_prior_precision("gridsearch", validation=data, precisions=GRID, **options)
        assert chosen.prior_precision == of_classes.best_precision


def test_parts_draw_anew(regression, monkeypatch, x64):
    """If samples are drawn at each input, those of different parts are independent."""
    drawn = []
    draw = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", lambda key, *a: drawn.append(jax.random.key_data(key)) or draw(key, *a))
    monkeypatch.setattr(validation, "MOST_NUMBERS", 1)
    problem = random_problem(bnnlaplace.categorical(), LABELS)
    la = bnnlaplace.Laplace(problem.network, hessian_structure="diag").fit((problem.inputs, problem.targets))
    drawn.clear()
    la.validation_curve(X, LABELS, GRID, link_approx="mc", key=jax.random.key(1), microbatch=6)
    keys = [tuple(np.asarray(key)) for key in drawn]
    assert (
        len(keys) == 6
        and len(set(keys)) == 2
        and keys[0] == keys[1] == keys[2] == tuple(jax.random.key_data(jax.random.key(1)))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "must be two arrays .*got int 5"),
        ([X], "must be two arrays .*got shape .* for a batch"),
        ((X, LABELS, LABELS, X), "must be two arrays .*got shape .* for a batch"),
        ([X, LABELS, X], r"\(x, y, w\): w must be real numbers of shape \(12,\), one for each example; got"),
        ((X, LABELS, -np.ones(12)), "w must be finite and at least 0; got numbers from -1.0"),
        ([(X, LABELS[:5], np.arange(12))], "labels must be integers of shape .* got int64"),
        ([(X, LABELS, np.zeros(12))], "at least one example; got none; .* or all weights are 0"),
        ([(X, LABELS), (X, LABELS), X], "must be two arrays .*got shape .* for a batch"),
        (iter([]), "at least one example; got none"),
        ((X[:, :3], LABELS), "inputs to predict at must have the shape"),
        ((X, LABELS[:5]), "labels must be integers of shape .* got int64"),
        ([(X, LABELS), (X * np.nan, LABELS)], "must be finite"),
    ],
)
def test_data_that_are_none(classifier, data, message, x64, unchecked_annotations):
    with pytest.raises(ValueError, match=message):
        classifier.optimize_prior_precision("gridsearch", validation=data, key=jax.random.key(0))


def test_links_and_the_key_of_samples(classifier, x64, unchecked_annotations):
    with pytest.raises(ValueError, match=r"validation_curve\(key=...\), .*, must be one random key; got None"):
        classifier.optimize_prior_precision("gridsearch", validation=(X, LABELS), link_approx="mc")
    with pytest.raises(ValueError, match=r"\('marglik'\) must not be given link_approx=..., .* other method"):
        classifier.optimize_prior_precision(link_approx="probit")
    with pytest.raises(ValueError, match=r"validation_curve\(link_approx=...\) must be 'probit', 'mc' or 'bridge'"):
        classifier.validation_curve(X, LABELS, GRID, link_approx="probits")


def test_gaps_of_batches_add_up():
    probs, labels = RNG.dirichlet(np.ones(3), size=50), RNG.integers(0, 3, size=50)
    gaps = sum(calibration.calibration_gaps(probs[part], labels[part], 4) for part in (slice(20), slice(20, 50)))
    error = calibration.expected_calibration_error(probs, labels, 4)
    assert np.abs(gaps).sum() / 50 == pytest.approx(error, rel=1e-12)
