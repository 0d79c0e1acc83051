"""Hundreds of thousands of examples, whose log likelihoods, gradients and curvature are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace

NUM, CLASSES = 300_006, 7  # as many of each class
LABELS = (np.arange(NUM) % CLASSES).astype(np.int32)
ONES = np.ones((NUM, 1), np.float32)


def batches(x, y, size):
    return [(x[first : first + size], y[first : first + size]) for first in range(0, len(x), size)]


@pytest.fixture(scope="module", params=usual(["batches"], ["arrays", "batches"]))
def arrange(request):
    return (lambda x, y: (x, y)) if request.param == "arrays" else lambda x, y: batches(x, y, 3000)


@pytest.mark.parametrize("structure", usual(["full", "kron"], ["full", "diag", "kron"]))
def test_evidence_of_a_head_of_zeros(arrange, structure):
    """Each log p is -log C, and G is N (I / C - 1 1' / C^2)."""
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((1, CLASSES)))
    la = bnnlaplace.Laplace(network, hessian_structure=structure).fit(arrange(ONES, LABELS), microbatch=50)
    curvature = NUM * (np.eye(CLASSES) / CLASSES - 1 / CLASSES**2)
    if structure == "diag":
        curvature = np.diag(np.diagonal(curvature))
    expected = -NUM * np.log(CLASSES) - 0.5 * np.linalg.slogdet(np.eye(CLASSES) + curvature)[1]
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, expected, rtol=5e-7)  # of each log p
    np.testing.assert_allclose(la.fitted.log_likelihood.gradient, 0, atol=1e-3)


def test_a_well_fitted_regression(arrange):
    """Residuals of a thousandth of the targets: their squares are summed on their own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM, 1)).astype(np.float32)
    y = (0.5 * x + 1e-3 * rng.normal(size=x.shape)).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.full((1, 1), 0.5))
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=1e-3).fit(arrange(x, y))
    squares = ((y.astype(np.float64) - 0.5 * x.astype(np.float64)) ** 2).sum() / 1e-6
    np.testing.assert_allclose(la.fitted.log_likelihood.squared_residuals, squares, rtol=1e-6)
    value = -0.5 * squares - NUM * (np.log(1e-3) + 0.5 * np.log(2 * np.pi))
    assert la.fitted.log_likelihood.value == pytest.approx(value, rel=1e-6)
    assert la.fitted.log_likelihood.num_targets == NUM


def test_products_do_not_lose_digits_with_examples():
    """A product with G over many microbatches is as exact as one over few."""
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((1, CLASSES)))
    product = bnnlaplace.curvature.ggn.block_product(
        network, bnnlaplace.categorical(), network.params, ONES, microbatch=16, vectors_at_once=2
    )
    vectors = np.random.default_rng(1).normal(size=(2, CLASSES)).astype(np.float32)
    expected = NUM * (vectors / CLASSES - vectors.sum(axis=1, keepdims=True) / CLASSES**2)
    np.testing.assert_allclose(jax.jit(product)(vectors), expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
