"""The prior precision by validation data."""

import jax
import numpy as np
import pytest

from bnnlaplace.predictive.validation import ValidationCurve


def test_gridsearch_takes_the_lowest_validation_nll(lanczos, trained):
    _, x, y = trained
    grid = [0.1, 1.0, 10.0, 100.0, 1000.0]
    key = jax.random.key(0)
    curve = lanczos.validation_curve(x[:80], y[:80], grid, key=key, num_samples=16)
    chosen = lanczos.optimize_prior_precision(
        "gridsearch", validation=(x[:80], y[:80]), precisions=grid, key=key, num_samples=16
    )
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
    options = {"validation": (x, y), "key": jax.random.key(0), "num_samples": 8}
    chosen = unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e6], **options)
    assert chosen.prior_precision == 1e6
    with pytest.raises(ValueError, match="must have converged at one prior precision"):
        unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e-1], **options)


def test_soft_targets_choose_by_their_cross_entropy(diagonal, trained):
    _, x, y = trained
    options = {"key": jax.random.key(0), "num_samples": 8}
    hard = diagonal.validation_curve(x[:20], y[:20], [1.0, 100.0], **options)
    soft = diagonal.validation_curve(x[:20], np.eye(10)[y[:20]], [1.0, 100.0], **options)
    np.testing.assert_allclose(soft.negative_log_likelihood, hard.negative_log_likelihood, rtol=1e-6)
    assert np.isnan(soft.expected_calibration_error).all()


def test_gridsearch_with_fewer_probes_than_samples_by_default(unconverged, trained):
    _, x, y = trained
    chosen = unconverged.optimize_prior_precision(
        "gridsearch", validation=(x[:20], y[:20]), precisions=[1e5, 1e6], key=jax.random.key(0)
    )
    assert chosen.prior_precision in (pytest.approx(1e5), pytest.approx(1e6))
