"""Products from rows of the Jacobian in memory are those without them. Rows are kept only where they pay and fit."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive

import bnnlaplace
from bnnlaplace import Laplace, Variational
from bnnlaplace.core import memory
from bnnlaplace.core.tree import ravel
from bnnlaplace.curvature import dense
from bnnlaplace.curvature.keep import keep
from bnnlaplace.curvature.kept import CurvatureAt, diagonal_by_rows
from bnnlaplace.curvature.rows import row_sizes
from bnnlaplace.fitting import prepare
from bnnlaplace.model.data import as_data
from bnnlaplace.variational import newton_outputs

COUNT = 11


@pytest.fixture
def problem(x64):
    return cases.at_positions(COUNT)


def kept_and_where(network, likelihood, data):
    """Rows of two batches, of which the second one is padded, and where the curvature is evaluated."""
    for _ in data:
        pass
    rows = keep(network, data, num_products=1000, microbatch=4)
    at = [
        CurvatureAt(network(network.params, batch.inputs), likelihood.weights_of(batch.targets, batch.weights))
        for batch in data
    ]
    return rows, at


def test_products_are_those_of_the_matrix(problem):
    """Several positions, examples that count differently, padding in batches and microbatches, columns with factors."""
    network, inputs, labels, weights = problem
    likelihood = bnnlaplace.categorical()
    data = as_data([(inputs[:6], labels[:6], weights[:6]), (inputs[6:], labels[6:], weights[6:])])
    rows, at = kept_and_where(network, likelihood, data)
    whole = jax.jit(lambda params: dense.ggn(network, likelihood, params, inputs, weights=weights))
    matrix = np.asarray(whole(network.params))
    rng = np.random.default_rng(1)
    factors, vectors = (
        jnp.asarray(rng.uniform(0.5, 2, size=len(matrix))),
        jnp.asarray(rng.normal(size=(3, len(matrix)))),
    )
    scaled = rows.scaled(factors)
    by_factors = factors[:, None] * matrix * factors
    np.testing.assert_allclose(rows.ggn_product(likelihood, at, 2.5)(vectors), 2.5 * vectors @ matrix, atol=1e-9)
    np.testing.assert_allclose(scaled.ggn_product(likelihood, at, 1.0)(vectors), vectors @ by_factors, atol=1e-9)
    np.testing.assert_allclose(rows.ggn_diagonal(likelihood, at), np.diagonal(matrix), atol=1e-9)
    factor = np.asarray(scaled.ggn_factor(likelihood, at))
    np.testing.assert_allclose(factor.T @ factor, by_factors, atol=1e-9)
    images, back = scaled.ggn_factors(likelihood, at, 2.5)
    np.testing.assert_allclose(images(vectors), np.sqrt(2.5) * vectors @ factor.T, atol=1e-9)
    of_rows = jnp.asarray(rng.normal(size=(3, len(factor))))
    np.testing.assert_allclose(back(of_rows), np.sqrt(2.5) * of_rows @ factor, atol=1e-9)
    sizes = row_sizes(network, inputs, 4)
    by_parts = diagonal_by_rows(network, likelihood, inputs[:6], at[0], sizes)
    by_parts += diagonal_by_rows(network, likelihood, inputs[6:], CurvatureAt(*(each[:5] for each in at[1])), sizes)
    np.testing.assert_allclose(by_parts, np.diagonal(matrix), atol=1e-9)
    np.testing.assert_allclose(scaled.ggn_diagonal(likelihood, at), np.diagonal(by_factors), atol=1e-9)


def test_derivatives_and_linearised_outputs(problem):
    network, inputs, labels, _ = problem
    data = as_data([(inputs[:6], labels[:6]), (inputs[6:], labels[6:])])
    rows, _ = kept_and_where(network, bnnlaplace.categorical(), data)
    batches = [np.asarray(batch.inputs) for batch in data]
    step = jnp.asarray(np.random.default_rng(2).normal(size=len(ravel(network.params))))
    _, unravel = jax.flatten_util.ravel_pytree(network.params)
    for batch, pushed, moved in zip(
        batches, rows.pushed(step[None]), rows.linearised_outputs(ravel(network.params) + step), strict=True
    ):
        at, expected = jax.jvp(lambda p, x=batch: network(p, x), (network.params,), (unravel(step),))
        np.testing.assert_allclose(pushed[0], expected, atol=1e-10)
        np.testing.assert_allclose(moved, at + expected, atol=1e-10)
    cotangents = [jnp.asarray(np.random.default_rng(3).normal(size=(6, 4, 3))) for _ in batches]
    pulled = sum(
        ravel(jax.vjp(lambda p, x=batch: network(p, x), network.params)[1](u)[0])
        for batch, u in zip(batches, cotangents, strict=True)
    )
    np.testing.assert_allclose(rows.pulled(cotangents), pulled, atol=1e-10)


@pytest.mark.parametrize(
    ("structure", "layerwise", "max_vectors"),
    [
        ("lanczos", True, 24),
        ("lanczos", True, 4 * 3 * COUNT),  # all eigenpairs
        exhaustive("lanczos", False, 24),
        exhaustive("diag", True, 24),
    ],
)
def test_a_variational_fit_is_the_same_with_and_without_rows(problem, monkeypatch, structure, layerwise, max_vectors):
    network, inputs, labels, _ = problem
    precision = {"first": 2.0, "second": 0.5} if layerwise else 1.0
    la = Laplace(network, hessian_structure=structure, prior_precision=precision)
    options = {"key": jax.random.key(1), "num_probes": 8, "max_vectors": max_vectors, "microbatch": 4}
    chosen = Variational(num_samples=64, max_iterations=1)
    monkeypatch.setattr(newton_outputs, "MOST_OUTPUTS", 0)  # Newton steps as they are without rows

    def fitted():
        with pytest.warns(UserWarning, match="stopped after one iteration"):
            return la.fit((inputs, labels), approximation=chosen, **options)

    with_rows = fitted()
    asked = []
    monkeypatch.setattr(prepare, "keep", lambda *_, **__: asked.append(True))
    without = fitted()
    assert asked  # the control: rows would have been used
    np.testing.assert_allclose(with_rows.log_marginal_likelihood().mean, without.log_marginal_likelihood().mean)
    np.testing.assert_allclose(ravel(with_rows.network.params), ravel(without.network.params), rtol=1e-6)
    np.testing.assert_allclose(with_rows.functional_variance(inputs), without.functional_variance(inputs), rtol=1e-6)


def test_rows_are_kept_only_where_they_pay_and_fit(problem, monkeypatch):
    network, inputs, labels, _ = problem
    data = as_data((inputs, labels))
    for _ in data:
        pass
    options = {"num_products": 9, "microbatch": 4}
    assert keep(network, data, **options) is not None
    assert keep(network, data, **options | {"num_products": 8}) is None  # twelve outputs: as many backward passes
    monkeypatch.setattr(memory, "free_bytes", lambda: 4 * 8 * COUNT * 12 * len(ravel(network.params)) - 1)
    assert keep(network, data, **options) is None
    monkeypatch.setattr(memory, "free_bytes", lambda: 4 * 8 * COUNT * 12 * len(ravel(network.params)))
    assert keep(network, data, **options) is not None
    assert keep(network, data, **options, bytes_beside=memory.free_bytes()) is None
    monkeypatch.undo()
    dense_layer = bnnlaplace.Network.from_function(lambda w, x: x.reshape(len(x), -1) @ w, jnp.ones((10, 3)))
    flat = as_data((inputs, labels[:, 0]))
    for _ in flat:
        pass
    assert keep(dense_layer, flat, num_products=1000, microbatch=4) is None  # a product costs less than its rows
