"""Symmetric tridiagonal matrices T, and f(T) e_1 with derivatives that stay finite where eigenvalues repeat."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.core.linalg import eigh, matmul
from bnnlaplace.krylov import breakdown
from bnnlaplace.krylov.functions import convert


def tridiagonal_matrix(diagonal: Float[Array, " K"], off_diagonal: Float[Array, " K-1"]) -> Float[Array, "K K"]:
    """Return T as a dense matrix.

    Parameters
    ----------
    diagonal, off_diagonal
        The entries of T, as `lanczos` returns them.
    """
    return jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)


def function_times_first(
    function: Callable[[Float[Array, ""]], Float[Array, ""]],
    diagonal: Float[Array, " K"],
    off_diagonal: Float[Array, " K-1"],
    breakdown_step: Int[Array, ""],
) -> Float[Array, " K"]:
    """f(T) e_1, differentiable in T and in what `function` closes over.

    Parameters
    ----------
    function
        f, from a scalar to a scalar, defined and smooth on the eigenvalues of T.
    diagonal, off_diagonal, breakdown_step
        T, as `lanczos` returns it. After a breakdown T has zeros, where f need not be defined. Their part of T does
        not act on e_1, and f is evaluated at an eigenvalue of the other part instead.

    Notes
    -----
    Cost: one eigendecomposition, of order K^3. Autodiff through it would divide by differences of eigenvalues, which
    are zero where eigenvalues repeat. Instead, with T = U diag(x) U', the derivative of f(T) in the direction dT is

        U (F o (U' dT U)) U',    F_ij = f[x_i, x_j]

    (Daleckii and Krein; Higham 2008, theorem 3.11). The divided differences F are finite for every smooth f.
    """
    reached = breakdown.reached(breakdown_step, len(diagonal))
    converted, constants = convert(function, diagonal[0])
    return _function_times_first(converted, diagonal, off_diagonal, reached, constants)


def reached_eigenpairs(
    diagonal: Float[Array, " K"], off_diagonal: Float[Array, " K-1"], reached: Bool[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, "K K"]]:
    """Eigenvalues and eigenvectors of T; eigenvalues of the part after a breakdown are replaced by one before it."""
    matrix = tridiagonal_matrix(diagonal, off_diagonal)
    # The part after a breakdown gets an eigenvalue away from all others, so that eigh does not mix eigenvectors of the
    # two parts.
    apart = 2 * jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    values, vectors = eigh(matrix + jnp.diag(jnp.where(reached, 0, apart)))
    is_reached = jnp.sum(jnp.where(reached[:, None], vectors**2, 0), axis=0) > 0.5
    return jnp.where(is_reached, values, values[jnp.argmax(jnp.abs(vectors[0]))]), vectors


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _function_times_first(
    function: Callable, diagonal: Array, off_diagonal: Array, reached: Array, constants: Any
) -> Array:
    """f(T) e_1, where `function` closes over nothing."""
    values, vectors = reached_eigenpairs(diagonal, off_diagonal, reached)
    return _apply(vectors, _evaluate(function, constants, values))


@_function_times_first.defjvp
def _function_times_first_jvp(function: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The formula of `function_times_first`, times e_1, and the derivative in the constants of f."""
    diagonal, off_diagonal, reached, constants = primals
    d_diagonal, d_off_diagonal, _, d_constants = tangents
    # What follows a breakdown is constant zero.
    d_diagonal, d_off_diagonal = jnp.where(reached, d_diagonal, 0), jnp.where(reached[1:], d_off_diagonal, 0)
    values, vectors = reached_eigenpairs(diagonal, off_diagonal, reached)
    first = vectors[0]
    images, d_images = jax.jvp(lambda *c: _evaluate(function, c, values), tuple(constants), tuple(d_constants))
    rotated = matmul(matmul(vectors.T, tridiagonal_matrix(d_diagonal, d_off_diagonal)), vectors)
    divided = divided_differences(partial(_evaluate, function, constants), values, images)
    slope = _apply(vectors, d_images) + matmul(vectors, matmul(divided * rotated, first))
    return _apply(vectors, images), slope


def _apply(vectors: Array, images: Array) -> Array:
    """U D U' e_1 with D = diag(images), computed as c e_1 + U (D - c I) U' e_1.

    c is the image of the eigenvector that weighs most in e_1. Where f is almost constant, all entries but the first are
    almost zero. Computed like this they keep their digits, and a gradient divides by them.
    """
    first = vectors[0]
    constant = images[jnp.argmax(jnp.abs(first))]
    return matmul(vectors, (images - constant) * first).at[0].add(constant)


def _evaluate(function: Callable, constants: Any, values: Array) -> Array:
    return jax.vmap(lambda value: function(value, *constants))(values)


# Rounding of a product, over eps times the largest eigenvalue. In products with GGNs of known rank the values that
# should be zero are up to 3.
ROUNDING = 4.0


def rounding_of_zero(values: Float[Array, " K"]) -> Float[Array, ""]:
    """The size below which a Ritz value cannot be told from zero, as products are off by eps times the largest one."""
    return ROUNDING * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))


def divided_differences(
    function: Callable[[Array], Array], values: Float[Array, " K"], images: Float[Array, " K"]
) -> Float[Array, "K K"]:
    """f[x_i, x_j] for all pairs of `values`: the quotient for distant pairs, f' at the midpoint for close ones.

    A pair is close if rounding in f would cost the quotient a third of its digits. If f changes by its own size over
    a length L, this is |x_i - x_j| < eps^(1/3) L, and there the midpoint has a relative error of eps^(2/3).
    """
    eps = jnp.finfo(values.dtype).eps
    gap = values[:, None] - values[None, :]
    # For a distant pair f' is taken at x_i, since f need not be defined at the midpoint.
    near = jnp.abs(gap) <= eps ** (1 / 3) * jnp.max(jnp.abs(values))
    middle = jnp.where(near, (values[:, None] + values[None, :]) / 2, values[:, None])
    slope = jax.jvp(function, (middle.reshape(-1),), (jnp.ones_like(middle).reshape(-1),))[1].reshape(gap.shape)
    # The slopes at x_i and x_j count as well: at a stationary point between them f' alone would call the pair close.
    ends = jnp.abs(jnp.diagonal(slope))
    size = jnp.abs(slope) + ends[:, None] + ends[None, :]
    rounding = eps * (jnp.abs(images)[:, None] + jnp.abs(images)[None, :])
    close = (gap == 0) | (near & (eps ** (2 / 3) * jnp.abs(gap) * size <= rounding))
    return jnp.where(close, slope, (images[:, None] - images[None, :]) / jnp.where(close, 1, gap))
