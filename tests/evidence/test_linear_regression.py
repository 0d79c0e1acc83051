"""Bayesian linear regression: evidence, gradients and predictions of all structures against their closed forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from jax.scipy.stats import multivariate_normal

import bnnlaplace
from bnnlaplace import evidence

EXAMPLES, FEATURES, OUTPUTS = 9, 4, 2
SIGMA, PRECISION = np.array([0.6, 1.3]), 1.7


class Regression(NamedTuple):
    """Data, and a network with one layer, at weights away from the mode."""

    inputs: np.ndarray
    targets: np.ndarray
    test: np.ndarray
    network: bnnlaplace.Network

    def at(self, weights):
        return self._replace(network=self.network.with_params(jnp.asarray(weights)))


@pytest.fixture
def regression(x64):
    rng = np.random.default_rng(0)
    # Orthogonal columns of different lengths: the diagonal structure is exact, too.
    inputs = np.linalg.qr(rng.normal(size=(EXAMPLES, FEATURES)))[0] * np.array([0.5, 1.0, 2.0, 4.0])
    weights = jnp.asarray(rng.normal(size=(FEATURES, OUTPUTS)))
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    return Regression(inputs, rng.normal(size=(EXAMPLES, OUTPUTS)), rng.normal(size=(5, FEATURES)), network)


def mode(problem, precision=PRECISION, sigma=SIGMA):
    """The weights that ridge regression finds, and the posterior precision of each output."""
    posterior = [problem.inputs.T @ problem.inputs / s**2 + precision * np.eye(FEATURES) for s in sigma]
    right = (problem.inputs.T @ problem.targets / sigma**2).T
    return jnp.stack([jnp.linalg.solve(a, b) for a, b in zip(posterior, right, strict=True)], axis=1), posterior


def log_evidence(problem, weights, precision, sigma):
    """log N(y; 0, X X' / delta + sigma^2), less the loss of expanding a quadratic log joint beside its mode."""
    best, posterior = mode(problem, precision, sigma)
    total = 0.0
    for c in range(OUTPUTS):
        covariance = problem.inputs @ problem.inputs.T / precision + sigma[c] ** 2 * jnp.eye(EXAMPLES)
        total += multivariate_normal.logpdf(problem.targets[:, c], jnp.zeros(EXAMPLES), covariance)
        distance = weights[:, c] - best[:, c]
        total -= 0.5 * distance @ posterior[c] @ distance
    return total


def fitted(problem, structure, **fit_options):
    la = bnnlaplace.Laplace(
        problem.network, "regression", hessian_structure=structure, prior_precision=PRECISION, sigma_noise=SIGMA
    )
    return la.fit((problem.inputs, problem.targets), key=jax.random.key(0), **fit_options)


# A block of as many probes as weights spans the whole space, so the recurrence is not truncated here either.
KRYLOV = {"max_vectors": 16, "num_probes": 8}


@pytest.mark.parametrize(
    "structure", usual(["full", "block Lanczos"], ["full", "kron", "diag", "lanczos", "block Lanczos"])
)
def test_every_structure(regression, structure):
    name, options = ("lanczos", KRYLOV) if structure == "block Lanczos" else (structure, {})
    for problem in (regression, regression.at(mode(regression)[0])):
        la = fitted(problem, name, **options)
        weights = problem.network.params
        precisions = np.array([0.3, PRECISION, 20.0])
        at = jax.jit(jax.value_and_grad(lambda delta, p=problem, w=weights: log_evidence(p, w, delta, SIGMA)))
        expected = [at(delta)[0] for delta in precisions]
        found = la.evidence_curve(precisions).log_marginal_likelihood
        np.testing.assert_allclose(found.mean, expected, rtol=1e-8)
        np.testing.assert_allclose(la.log_marginal_likelihood().mean, expected[1], rtol=1e-8)
        _, slope = at(PRECISION)
        norm = np.sum(np.square(weights))
        effective = np.sum([np.trace(np.linalg.solve(a, a - PRECISION * np.eye(FEATURES))) for a in mode(problem)[1]])
        np.testing.assert_allclose(la.effective_parameters(), effective, rtol=1e-8)
        np.testing.assert_allclose(0.5 * (effective / PRECISION - norm), slope, rtol=1e-8)
        gradient = jax.jit(jax.grad(lambda w, p=problem: -0.5 * _distance(p, w)))(weights)
        np.testing.assert_allclose(la.mode_gradient().reshape(weights.shape), gradient, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(la.mode_decrement(), _distance(problem, weights), rtol=1e-8, atol=1e-8)
    mean, variance = la.predictive(problem.test)
    np.testing.assert_allclose(mean, problem.test @ mode(problem)[0], rtol=1e-8)
    exact = np.stack([np.sum(problem.test.T * np.linalg.solve(a, problem.test.T), 0) for a in mode(problem)[1]], axis=1)
    if structure == "block Lanczos":  # samples alone, with the spread that eight of them have
        assert np.all(abs(variance / exact - 1) < 5 * np.sqrt(2 / 8))
        return
    np.testing.assert_allclose(variance, exact, rtol=1e-8)
    np.testing.assert_allclose(la.predictive(problem.test, with_noise=True)[1], exact + SIGMA**2, rtol=1e-8)


def _distance(problem, weights):
    """(w - w*)' (G + delta) (w - w*), summed over outputs."""
    best, posterior = mode(problem)
    gaps = (weights - best).T
    return sum(gap @ a @ gap for gap, a in zip(gaps, posterior, strict=True))


@pytest.mark.parametrize(
    ("gradient", "side"),
    usual([("adjoint", "dual"), ("autodiff", "primal")], ("adjoint", "autodiff"), ("primal", "dual")),
)
def test_gradients(regression, side, gradient):
    """Gradients in precision, noise and weights. The probes form a basis, so there is no Monte Carlo error."""
    size = FEATURES * OUTPUTS if side == "primal" else EXAMPLES * OUTPUTS

    def ours(weights, precision, sigma):
        return evidence.log_marginal_likelihood(
            weights,
            precision,
            (regression.inputs, regression.targets),
            jnp.sqrt(size) * jnp.eye(size),
            network=regression.network,
            likelihood=bnnlaplace.gaussian(sigma),
            num_matvecs=size,
            side=side,
            gradient=gradient,
        ).mean

    at = regression.network.params, jnp.asarray(PRECISION), jnp.asarray(SIGMA)
    value, found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*at)
    reference = jax.jit(jax.value_and_grad(lambda *at: log_evidence(regression, *at), (0, 1, 2)))
    expected, slopes = reference(*at)
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    for ours_in, exact_in in zip(found, slopes, strict=True):
        np.testing.assert_allclose(ours_in, exact_in, rtol=1e-8)
