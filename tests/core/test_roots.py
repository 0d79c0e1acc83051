"""Derivatives of symmetric roots where those of eigenvectors, or of the root of zero, are infinite."""

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.core.roots import symmetric_root


def test_equal_eigenvalues_and_zeros_against_closed_forms(x64):
    """R(t) = sqrt(t) A for S = t A, with A a projection: all its eigenvalues are equal, or zero."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    for rank in (1, 3, 5):
        projection = jnp.asarray(directions[:, :rank] @ directions[:, :rank].T)

        def root(t, p=projection):
            return symmetric_root(t * p)

        for order, factor in enumerate((2.0, 0.25, -1 / 32)):
            np.testing.assert_allclose(root(4.0), factor * projection, atol=1e-7, err_msg=f"{rank} {order}")
            root = jax.jacrev(root)


def test_general_matrices_and_batches_against_differences(x64):
    """In both modes; matrices of a batch do not mix, whatever their ranks."""
    rng = np.random.default_rng(1)
    rows, change = jnp.asarray(rng.normal(size=(2, 3, 4, 2)))
    rows = rows.at[1, :, 1].set(0)
    weight = jnp.asarray(rng.normal(size=(3, 4, 4)))

    def value(t):
        factor = rows + t * change.at[1, :, 1].set(0)
        return jnp.sum(weight * symmetric_root(factor @ jnp.swapaxes(factor, -1, -2)))

    step = 1e-3
    expected = (value(step) - value(-step)) / (2 * step)
    for mode in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(mode(value))(0.0), expected, rtol=1e-4)
    single = jax.vmap(jax.grad(lambda s: symmetric_root(s).sum()))(rows @ jnp.swapaxes(rows, -1, -2))
    together = jax.grad(lambda s: symmetric_root(s).sum())(rows @ jnp.swapaxes(rows, -1, -2))
    np.testing.assert_allclose(single, together, rtol=1e-9, atol=1e-12)


def test_a_matrix_of_zeros_has_a_derivative():
    assert not jax.grad(lambda s: symmetric_root(s).sum())(jnp.zeros((2, 2))).any()
