"""The symmetric root of positive semidefinite matrices, with derivatives where eigenvalues are equal or zero.

With S = R R the derivative of R solves the Sylvester equation R dR + dR R = dS. In the eigenbasis of S that is a
division by r_i + r_j, the sum of two eigenvalues of R, which is zero between two null directions alone. The derivative
of the eigenvectors, in contrast, divides by their difference, and that of a root of an eigenvalue by the root.

If S is J C J' with C positive definite, dS is zero between null directions of S too, so that nothing is lost there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import eigh, einsum, matmul


@jax.custom_jvp
def symmetric_root(matrices: Float[Array, "... D D"]) -> Float[Array, "... D D"]:
    """Return the R = R' >= 0 with R R = S for each positive semidefinite S; eigenvalues below zero count as zero.

    It is differentiable to any order where the rank of S does not change. Elsewhere it has no derivative, and what the
    changed rank adds to it is left out.

    Parameters
    ----------
    matrices
        S, symmetric.
    """
    values, vectors = eigh(matrices)
    return einsum("...ck,...k,...dk->...cd", vectors, jnp.sqrt(jnp.maximum(values, 0)), vectors)


@jax.custom_jvp
def sylvester(matrices: Float[Array, "... D D"], right: Float[Array, "... D D"]) -> Float[Array, "... D D"]:
    """Return the X with R X + X R = C for R = `symmetric_root` of S, and X = 0 between null directions of S.

    Parameters
    ----------
    matrices
        S, symmetric.
    right
        C, symmetric.
    """
    values, vectors = eigh(matrices)
    # Rounding makes eigenvalues of about this size of zeros. What their roots divide is of this size too, so divided by
    # the root of a larger one it is at most sqrt(eps).
    is_null = values <= jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    roots = jnp.where(is_null, 0, jnp.sqrt(jnp.where(is_null, 1, values)))
    sums = roots[..., :, None] + roots[..., None, :]
    turned = matmul(jnp.swapaxes(vectors, -1, -2), matmul(right, vectors))
    turned = jnp.where(sums > 0, turned / jnp.where(sums > 0, sums, 1), 0)
    return matmul(vectors, matmul(turned, jnp.swapaxes(vectors, -1, -2)))


@symmetric_root.defjvp
def _derivative_of_root(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrices,), (change,) = primals, tangents
    return symmetric_root(matrices), sylvester(matrices, (change + jnp.swapaxes(change, -1, -2)) / 2)


@sylvester.defjvp
def _derivative_of_sylvester(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (matrices, right), (d_matrices, d_right) = primals, tangents
    solution = sylvester(matrices, right)
    d_root = sylvester(matrices, (d_matrices + jnp.swapaxes(d_matrices, -1, -2)) / 2)
    moved = matmul(d_root, solution) + matmul(solution, d_root)
    return solution, sylvester(matrices, d_right - moved)
