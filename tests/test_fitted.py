"""The record of a fit: the distance of its weights to a mode, and its evidence at every prior precision."""

import numpy as np

from bnnlaplace.core.tree import ravel


def test_weights_are_at_a_mode(full):
    prior_part = np.linalg.norm(ravel(full.network.params))
    assert np.linalg.norm(full.mode_gradient(1.0)) < 1e-2 * prior_part
    assert np.linalg.norm(full.mode_gradient(50.0)) > prior_part


def test_mode_decrement(full, diagonal, lanczos):
    gradient = np.asarray(full.mode_gradient(50.0), np.float64)
    values, vectors = np.linalg.eigh(np.asarray(full.structure.matrix, np.float64))
    exact = gradient @ (vectors @ ((vectors.T @ gradient) / (values + 50.0)))
    np.testing.assert_allclose(full.mode_decrement(50.0), exact, rtol=1e-6)
    assert exact <= lanczos.mode_decrement(50.0) * (1 + 1e-3) <= 2 * exact
    assert diagonal.mode_decrement(50.0) > 0
    assert full.mode_decrement(1.0) < 1e-2


def test_the_whole_curve_of_the_evidence(full):
    curve = full.evidence_curve()
    best = curve.prior_precision[np.argmax(curve.log_marginal_likelihood.mean)]
    np.testing.assert_allclose(best, full.prior_precision, rtol=0.15)  # to the step of the grid
    assert curve.prior_precision[0] < 1e-2 * best < 1e2 * best < curve.prior_precision[-1]
