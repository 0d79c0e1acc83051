"""The promised gain of a step is half of the derivative of the bound along it. Quadrature gives the derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import bnnlaplace
from bnnlaplace import Laplace, Variational
from bnnlaplace.variational import iteration, promise

PRECISION, COUNT, WEIGHTS = 0.5, 12, 3
NODES, FACTORS = np.polynomial.hermite_e.hermegauss(60)
FACTORS = FACTORS / FACTORS.sum()


@pytest.fixture
def called(x64, monkeypatch):
    """The arguments and the result of the estimate at the second iterate of a logistic regression, and its data."""
    rng = np.random.default_rng(0)
    x, truth = 2 * rng.normal(size=(COUNT, WEIGHTS)), rng.normal(size=WEIGHTS)
    y = (rng.random(COUNT) < expit(x @ truth)).astype(int)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w[:, None], jnp.asarray(truth))
    calls = []

    def spy(*given, **options):
        calls.append((given, promise.promised_gain(*given, **options)))
        return calls[-1][1]

    monkeypatch.setattr(promise, "NUM_SAMPLES", 2000)
    monkeypatch.setattr(iteration, "promised_gain", spy)
    la = Laplace(network, "binary", hessian_structure="full", prior_precision=PRECISION)
    la.fit((x, y[:, None]), key=jax.random.key(1), approximation=Variational(num_samples=1024, tolerance=1e6))
    return *calls[0], x, y


def bound(covariance, mean, x, y):
    """The evidence lower bound of N(mean, covariance), up to a constant."""
    outputs = x @ mean + NODES[:, None] * np.sqrt(np.einsum("ni,ij,nj->n", x, covariance, x))
    expected = (FACTORS @ -np.logaddexp(0, (1 - 2 * y) * outputs)).sum()
    divergence = PRECISION * (np.trace(covariance) + mean @ mean) - np.linalg.slogdet(covariance)[1]
    return expected - 0.5 * divergence


def test_it_is_half_of_the_derivative(called):
    (model, _, _, (here, proposed, after), _), found, x, y = called
    here, proposed, after = (np.asarray(each.batches[0])[:, 0, 0] for each in (here, proposed, after))
    mean = np.asarray(model.head.params)  # where the sites were averaged is not the centre: only Sigma matters below

    def covariance(share):
        sites = here + share * (after - here)
        return np.linalg.inv(PRECISION * np.eye(WEIGHTS) + (x * sites[:, None]).T @ x)

    def curvature(of):
        return (x * of[:, None]).T @ x

    sigma = covariance(0.0)
    dense = 0.25 * np.trace(sigma @ curvature(proposed - here) @ sigma @ curvature(after - here))
    assert dense > 0.01
    # Pairs of 2,000 samples: the error is a few per cent.
    np.testing.assert_allclose(found, dense, rtol=0.15)
    # The formula itself, at the sites that quadrature gives at this mean.
    outputs = x @ mean + NODES[:, None] * np.sqrt(np.einsum("ni,ij,nj->n", x, sigma, x))
    exact = FACTORS @ (expit(outputs) * expit(-outputs))
    by_formula = 0.5 * np.trace(sigma @ curvature(exact - here) @ sigma @ curvature(after - here))
    step = 1e-4
    derivative = (bound(covariance(step), mean, x, y) - bound(covariance(-step), mean, x, y)) / (2 * step)
    np.testing.assert_allclose(by_formula, derivative, rtol=1e-5)
