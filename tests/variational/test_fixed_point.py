"""Against a dense fixed point in NumPy, in float64: mean, covariance, sites and the bound."""

import cases
import fixed_point
import jax
import numpy as np
import pytest

import bnnlaplace
from bnnlaplace import Laplace, Variational

PRECISION, SAMPLES = 0.7, 16
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def problem(x64_module):
    rng = np.random.default_rng(1)
    return cases.random_problem(bnnlaplace.categorical(), rng.integers(0, 3, size=9))


def fitted(problem, structure, targets=None, **options):
    la = Laplace(problem.network, hessian_structure=structure, prior_precision=PRECISION)
    chosen = Variational(num_samples=SAMPLES, tolerance=1e-12, max_iterations=80, max_newton_steps=30, **options)
    data = problem.inputs, problem.targets if targets is None else targets
    return la.fit(data, key=KEY, approximation=chosen)


def oracle(problem, targets, **options):
    network = problem.network
    return fixed_point.solve(network, network.params, problem.inputs, targets, PRECISION, KEY, SAMPLES, **options)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


@pytest.mark.parametrize("targets", cases.usual(["labels"], ["labels", "soft"]))
def test_full_is_the_dense_fixed_point(problem, targets):
    one_hot = np.eye(3)[problem.targets]
    given = problem.targets if targets == "labels" else 0.7 * one_hot + 0.1
    soft = one_hot if targets == "labels" else given
    expected, la = oracle(problem, soft), fitted(problem, "full", given)
    precision = la.structure.matrix + PRECISION * np.eye(43)
    np.testing.assert_allclose(flat(la.network.params), expected.mean, atol=1e-8)
    np.testing.assert_allclose(np.linalg.inv(precision), expected.covariance, atol=1e-8)
    found = la.log_marginal_likelihood()
    assert isinstance(found, bnnlaplace.LowerBound)
    np.testing.assert_allclose(found.mean, expected.elbo, atol=1e-8)
    # The Laplace approximation of the same network is another posterior: the averages have run.
    assert np.abs(precision - PRECISION * np.eye(43) - problem.ggn).max() > 1e-2


def test_diag_is_the_mean_field_fixed_point(problem):
    expected = oracle(problem, np.eye(3)[problem.targets], keep=lambda ggn: np.diag(np.diag(ggn)))
    la = fitted(problem, "diag")
    np.testing.assert_allclose(flat(la.network.params), expected.mean, atol=1e-8)
    np.testing.assert_allclose(1 / (la.structure.diagonal + PRECISION), np.diag(expected.covariance), atol=1e-8)
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, expected.elbo, atol=1e-8)


def test_a_fixed_mean_has_the_covariance_of_its_own_fixed_point(problem):
    expected = oracle(problem, np.eye(3)[problem.targets], fixed_mean=True)
    la = fitted(problem, "full", fixed_mean=True)
    np.testing.assert_array_equal(flat(la.network.params), flat(problem.network.params))
    found = np.linalg.inv(la.structure.matrix + PRECISION * np.eye(43))
    np.testing.assert_allclose(found, expected.covariance, atol=1e-8)
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, expected.elbo, atol=1e-8)
    # The bound is largest at another mean, and says so.
    assert np.linalg.norm(la.mode_gradient()) > 0.1
    assert la.log_marginal_likelihood().mean < fitted(problem, "full").log_marginal_likelihood().mean - 0.1


@pytest.mark.exhaustive  # the others are compared whole
def test_kron_has_the_bound_of_its_own_covariance(problem):
    la = fitted(problem, "kron")
    product = [la.structure.product(row) for row in np.eye(43)]
    covariance = np.linalg.inv(np.array(product) + PRECISION * np.eye(43))
    network = problem.network
    jacobians = fixed_point.oracles.jacobian(network, network.params, problem.inputs)
    offsets = np.asarray(network(network.params, problem.inputs)) - jacobians @ flat(network.params)
    of_fit, of_bound = (fixed_point.standard_noise(key, 9, 3, SAMPLES) for key in jax.random.split(KEY))
    mean, one_hot = flat(la.network.params), np.eye(3)[problem.targets]
    given = mean, covariance, jacobians, offsets, one_hot, PRECISION
    (elbo, _, _), (_, residuals, _) = (fixed_point.bound(*given, noise) for noise in (of_bound, of_fit))
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, elbo, atol=1e-8)
    # At the end the gradient in the mean is zero.
    gradient = np.einsum("ncp,nc->p", jacobians, residuals) - PRECISION * mean
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    np.testing.assert_allclose(la.mode_gradient(), gradient, atol=1e-8)
    assert elbo < oracle(problem, one_hot).elbo
