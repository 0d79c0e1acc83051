"""Lanczos alone: its projection, its third pass, and the check that an operator is symmetric."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import usual

from bnnlaplace.krylov import check_symmetric, lanczos, tridiagonal_matrix
from bnnlaplace.krylov.arnoldi import arnoldi_adjoint, arnoldi_forward
from bnnlaplace.krylov.lanczos import lanczos_adjoint, lanczos_forward
from bnnlaplace.krylov.operator import Settings, default_tolerance


def mean_digits(name, how, size):
    """Log10 of the error of the Jacobian of A -> Q H Q', the identity at full depth; averaged over start vectors."""
    adjoint, forward = {"lanczos": (lanczos_adjoint, lanczos_forward), "arnoldi": (arnoldi_adjoint, arnoldi_forward)}[
        name
    ]
    run = forward if how == "autodiff" else adjoint
    settings = Settings(size, default_tolerance(jnp.float64), project=how == "adjoint with projection")

    def rebuilt(matrix, start):
        result = run(lambda v, matrix: matrix @ v, settings, start, (matrix,))
        small = result.hessenberg if name == "arnoldi" else tridiagonal_matrix(result.diagonal, result.off_diagonal)
        return result.basis.T @ small @ result.basis

    jacobian, hilbert, digits = jax.jit(jax.jacrev(rebuilt)), jnp.asarray(scipy.linalg.hilbert(size)), []
    for seed in (1, 2, 3):
        ours = jacobian(hilbert, jax.random.normal(jax.random.key(seed), (size,)))
        error = np.asarray(ours).reshape(size**2, -1) - np.eye(size**2)
        if name == "lanczos":  # only derivatives in symmetric directions have a meaning
            error = error.reshape(-1, size, size)
            error = (error + error.transpose(0, 2, 1)) / 2
        digits.append(np.log10(np.sqrt(np.mean(error**2))))
    return np.mean(digits)


@pytest.mark.parametrize(
    ("name", "size"),
    usual([("arnoldi", 8)], ("lanczos", "arnoldi"), range(2, 9)),
)
def test_projection_keeps_the_adjoint_as_accurate_as_backpropagation(x64, name, size):
    """Hilbert matrices, averaged over start vectors, as in the table of Krämer et al. 2024."""
    projected = mean_digits(name, "adjoint with projection", size)
    assert projected <= mean_digits(name, "autodiff", size) + 1
    if size == 8:  # the projection is what does it
        assert mean_digits(name, "adjoint without projection", size) > projected + 6


def test_a_product_that_is_not_quite_symmetric_gets_a_third_pass():
    """The three-term recurrence leaves what the asymmetry adds. One pass would leave eps times that, over b_k."""
    size = 60
    rng = np.random.default_rng(0)
    matrix = np.diag(np.geomspace(1, 1e-6, size)) + 1e-4 * rng.normal(size=(size, size)) / np.sqrt(size)
    matrix = jnp.asarray(matrix, jnp.float32)
    result = lanczos(lambda v: matrix @ v, jnp.ones(size), num_matvecs=40)
    np.testing.assert_allclose(result.basis @ result.basis.T, np.eye(40), atol=2e-6)


def test_check_symmetric(x64):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)))
    key, vector = jax.random.key(0), {"a": jnp.ones(12), "b": jnp.ones((2, 4))}

    def matvec(tree, matrix):
        image = matrix @ jnp.concatenate([tree["a"], tree["b"].reshape(-1)])
        return {"a": image[:12], "b": image[12:].reshape(2, 4)}

    assert check_symmetric(matvec, vector, key, matrix + matrix.T) < 1e-14
    slightly = matrix + matrix.T + 1e-9 * matrix
    with pytest.raises(ValueError, match=r"check_symmetric\(matvec=...\) must be symmetric; .*use arnoldi"):
        check_symmetric(matvec, vector, key, slightly)
    assert 1e-11 < check_symmetric(matvec, vector, key, slightly, tolerance=1e-6) < 1e-8
    with pytest.raises(ValueError, match="must be symmetric"):
        check_symmetric(matvec, vector, key, matrix + matrix.T + 1e-11 * matrix)
    with pytest.raises(ValueError, match="must return finite products; got a ratio of nan"):
        check_symmetric(matvec, vector, key, matrix * jnp.nan)
    with pytest.raises(TypeError, match=r"check_symmetric\(matvec=...\) must return the structure"):
        check_symmetric(lambda v: v["a"], vector, key)
    with pytest.raises(ValueError, match="num_probes=.* at least 1"):
        check_symmetric(matvec, vector, key, matrix, num_probes=0)


@pytest.mark.parametrize("module", ["lanczos", "arnoldi", "quadrature", "matfun", "deflation"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"bnnlaplace.krylov.{module}"))
    assert result.attempted > 0 and result.failed == 0
