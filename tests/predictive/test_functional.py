"""Variances of outputs at the edges: next to no weights, leaves without numbers, and memory as it was promised."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.predictive import functional as posterior

RNG = np.random.default_rng(0)


def dense_variance(la, x):
    """J (G + delta I)^-1 J' from matrices."""
    jacobian = np.asarray(oracles.jacobian(la.network, la.network.params, x))
    covariance = np.linalg.inv(np.asarray(la.structure.matrix) + la.prior_precision * np.eye(jacobian.shape[-1]))
    return np.einsum("ncp,pq,ndq->ncd", jacobian, covariance, jacobian)


@pytest.mark.parametrize("num_weights", usual([3], [1, 2, 3, 4, 5]))
def test_next_to_no_weights(num_weights, x64):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(RNG.normal(size=(num_weights, 1))))
    x, y = RNG.normal(size=(9, num_weights)), RNG.integers(0, 2, size=(9, 1))
    la = bnnlaplace.Laplace(network, "binary", hessian_structure="full").fit((x, y))
    np.testing.assert_allclose(la.functional_variance(x), dense_variance(la, x), rtol=1e-8)
    assert la.predictive(x).shape == (9, 1)


@pytest.mark.parametrize("first", usual([True], [False, True]))
def test_a_leaf_without_numbers(first, x64):
    shapes = {"a": (3, 4), "A" if first else "b": (0,), "c": (4, 2), "d": (2,)}
    params = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in shapes.items()}
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"] + p["d"], params)
    x, y = RNG.normal(size=(9, 3)), RNG.integers(0, 2, size=9)
    la = bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y))
    np.testing.assert_allclose(la.functional_variance(x), dense_variance(la, x), rtol=1e-8)


WIDTHS = (8, 200, 1), (8, 64, 10), (20, 24, 24, 20)


@pytest.mark.parametrize(
    ("structure", "widths"),
    usual([("kron", WIDTHS[0]), ("full", WIDTHS[1])], ("diag", "kron", "full"), WIDTHS),
)
def test_memory_is_bounded(structure, widths, monkeypatch):
    """Temporary arrays of the compiled program, of all outputs and of the diagonal, at one and at many precisions."""
    monkeypatch.setattr(posterior, "JACOBIAN_BYTES", 2**22)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    params = [jnp.asarray(0.3 * RNG.normal(size=pair), jnp.float32) for pair in pairs]

    def outputs(params, x):
        for matrix in params[:-1]:
            x = jnp.tanh(x @ matrix)
        return x @ params[-1]

    network = bnnlaplace.Network.from_function(outputs, params)
    x = RNG.normal(size=(64, widths[0])).astype(np.float32)
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure).fit((x, outputs(params, x)))
    for unit, grid in ((1, [1.0]), (widths[-1], [1.0]), (1, list(np.linspace(1, 2, 7)))):
        sizes = posterior._sizes(la.network, x, la.structure, widths[-1] // unit, unit, len(grid), 64)
        covariance = la.structure.output_covariance(grid)
        compiled = posterior._microbatch_covariances.lower(la.network, covariance, sizes, x[: sizes.inputs]).compile()
        # The weights of products, and what a matrix is cut into, do not depend on the number of inputs.
        fixed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(covariance))
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2**22 + 2 * fixed, (unit, len(grid), sizes)


def test_single_precision_beside_double_with_few_outputs(x64):
    """All eigenpairs of a network in float32 where JAX has float64."""
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32))
    x, y = RNG.normal(size=(9, 4)).astype(np.float32), RNG.integers(0, 3, size=9)
    la = bnnlaplace.Laplace(network).fit((x, y))
    full = bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y))
    assert la.structure.eigenvectors.dtype == jnp.float32
    np.testing.assert_allclose(la.functional_variance(x), full.functional_variance(x), rtol=1e-3, atol=1e-5)
