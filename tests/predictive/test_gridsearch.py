"""The prior precision by validation data."""

import jax
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import calibration
from bnnlaplace.predictive.validation import ValidationCurve


def test_gridsearch_takes_the_lowest_validation_nll(lanczos, trained):
    _, x, y = trained
    grid = [0.1, 1.0, 10.0, 100.0, 1000.0]
    key = jax.random.key(0)
    samples = {"link_approx": "mc", "key": key, "num_samples": 16}
    curve = lanczos.validation_curve(x[:80], y[:80], grid, **samples)
    # On its own training data a network is the surer the better, so the optimum is beyond any grid.
    with pytest.warns(UserWarning, match=r"lowest at an end of the grid, prior precision 1e\+03.* with larger ones"):
        chosen = lanczos.optimize_prior_precision("gridsearch", validation=(x[:80], y[:80]), precisions=grid, **samples)
    assert chosen.prior_precision == grid[int(np.argmin(curve.negative_log_likelihood))]
    # the basis pushed through once gives what samples pushed one by one give
    at_one = lanczos.with_prior_precision(1.0).predictive(x[:80], link_approx="mc", key=key, num_samples=16)
    nll = -np.log(np.asarray(at_one)[np.arange(80), y[:80]]).mean()
    np.testing.assert_allclose(curve.negative_log_likelihood[1], nll, rtol=1e-3)


def test_a_validation_curve_of_nothing_but_nan_has_no_best_precision():
    grid, nan = np.array([1.0, 10.0]), np.full(2, np.nan)
    assert ValidationCurve(grid, np.array([np.nan, 2.0]), nan, np.array([True, True])).best_precision == 10.0
    with pytest.raises(ValueError, match="the validation NLL must be a number at one prior precision at least"):
        _ = ValidationCurve(grid, nan, nan, np.array([True, True])).best_precision


def test_gridsearch_chooses_where_the_decomposition_has_converged(trained, unconverged):
    _, x, y = trained
    options = {"validation": (x, y)}
    with pytest.warns(UserWarning, match="an end of the prior precisions that have converged, .*more max_vectors"):
        chosen = unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e6], **options)
    assert chosen.prior_precision == 1e6
    with pytest.raises(ValueError, match="must have converged at one prior precision"):
        unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e-1], **options)


def test_soft_targets_choose_by_their_cross_entropy(diagonal, trained):
    _, x, y = trained
    options = {"link_approx": "mc", "key": jax.random.key(0), "num_samples": 8}
    hard = diagonal.validation_curve(x[:20], y[:20], [1.0, 100.0], **options)
    soft = diagonal.validation_curve(x[:20], np.eye(10)[y[:20]], [1.0, 100.0], **options)
    np.testing.assert_allclose(soft.negative_log_likelihood, hard.negative_log_likelihood, rtol=1e-6)
    assert np.isnan(soft.expected_calibration_error).all()


def test_gridsearch_with_fewer_probes_than_samples_by_default(unconverged, trained):
    _, x, y = trained
    options = {"validation": (x[:20], y[:20]), "precisions": [1e5, 1e6], "link_approx": "mc", "key": jax.random.key(0)}
    with pytest.warns(UserWarning, match="lowest at an end"):
        chosen = unconverged.optimize_prior_precision("gridsearch", **options)
    assert chosen.prior_precision in (pytest.approx(1e5), pytest.approx(1e6))


@pytest.mark.filterwarnings("ignore:the Laplace bridge is outside of its domain:UserWarning")
@pytest.mark.parametrize("structure", usual(["unconverged"], ["full", "unconverged"]))
def test_the_curve_is_scored_with_the_link_of_predictive(structure, trained, request):
    """By default that is "probit", which needs neither key nor samples, for covariances and for samples alike."""
    la = request.getfixturevalue(structure)
    _, x, y = trained
    x, y, grid = x[:30], y[:30], [1e5, 1e6]
    for options in ({}, {"link_approx": "probit"}, {"link_approx": "bridge"}):
        curve = la.validation_curve(x, y, grid, **options)
        for precision, found in zip(grid, curve.negative_log_likelihood, strict=True):
            probs = np.asarray(la.with_prior_precision(precision).predictive(x, **options), np.float64)
            np.testing.assert_allclose(found, -np.log(probs[np.arange(30), y]).mean(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"validation_curve\(key=...\), .* link_approx='mc', must be one random key"):
        la.validation_curve(x, y, grid, link_approx="mc")


def test_gridsearch_warns_at_both_ends_and_not_between():
    nan, converged = np.full(4, np.nan), np.ones(4, bool)
    grid = np.array([10.0, 0.1, 1.0, 100.0])  # in any order

    def choice(losses, converged=converged):
        return ValidationCurve(grid, np.array(losses), nan, converged).choose()

    assert choice([1.0, 2.0, 3.0, 4.0]) == 10.0
    for losses, message in (([3.0, 1.0, 2.0, 4.0], "0.1: .*smaller"), ([3.0, 2.0, 2.0, 1.0], "100: .*larger")):
        with pytest.warns(UserWarning, match=f"lowest at an end of the grid, prior precision {message} ones"):
            choice(losses)
    with pytest.warns(UserWarning, match="end of the prior precisions that have converged, prior precision 1: .*fit"):
        choice([3.0, 1.0, 2.0, 4.0], np.array([True, False, True, True]))
    alone = ValidationCurve(grid[:1], np.ones(1), nan[:1], converged[:1])
    assert alone.choose() == 10.0  # nothing to choose, so nothing to warn of


def test_a_binary_curve_is_that_of_its_two_classes(trained):
    """P(class 1) = sigmoid(f): NLL and ECE are those of `calibration`, hard targets like soft ones."""
    rng = np.random.default_rng(6)
    x, weights = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(3, 1)).astype(np.float32)
    targets = (rng.random((40, 1)) < 1 / (1 + np.exp(-x @ weights))).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    la = bnnlaplace.Laplace(network, "binary", hessian_structure="diag").fit((x, targets))
    key = jax.random.key(1)
    for options in ({}, {"link_approx": "mc", "key": key, "num_samples": 32}):
        curve = la.validation_curve(x, targets, [0.5, 5.0], **options)
        probs = la.with_prior_precision(5.0).predictive(x, **options)
        expected = calibration.negative_log_likelihood(probs, targets)
        np.testing.assert_allclose(curve.negative_log_likelihood[1], expected, rtol=1e-5)
        expected = calibration.expected_calibration_error(probs, targets)
        np.testing.assert_allclose(curve.expected_calibration_error[1], expected, rtol=1e-4)
    soft = la.validation_curve(x, 0.8 * targets + 0.1, [5.0])
    probs, shares = np.asarray(la.with_prior_precision(5.0).predictive(x), np.float64), 0.8 * targets + 0.1
    expected = -(shares * np.log(probs) + (1 - shares) * np.log1p(-probs)).mean()
    np.testing.assert_allclose(soft.negative_log_likelihood[0], expected, rtol=1e-5)
    assert np.isnan(soft.expected_calibration_error).all()
    sure = bnnlaplace.Laplace(network.with_params(20 * weights), "binary", hessian_structure="diag").fit((x, targets))
    assert np.isfinite(sure.validation_curve(x, 1 - targets, [1e6]).negative_log_likelihood).all()
