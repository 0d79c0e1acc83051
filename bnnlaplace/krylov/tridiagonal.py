"""Symmetric tridiagonal matrices, and functions of them with derivatives that are finite for repeated eigenvalues."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov import breakdown
from bnnlaplace.krylov.functions import convert


def tridiagonal_matrix(diagonal: Float[Array, " K"], off_diagonal: Float[Array, " K-1"]) -> Float[Array, "K K"]:
    """T as a dense matrix.

    Parameters
    ----------
    diagonal, off_diagonal
        As `lanczos` returns them.
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
        Of `lanczos`. After a breakdown T is zero, where f need not be defined: for eigenvalues of that part, which
        e_1 does not reach, one that it does stands in.

    Notes
    -----
    Cost: one eigendecomposition, of order K^3. Autodiff through it divides by differences of eigenvalues, zero where
    they repeat. The derivative of f(T) in the direction dT is U (F o (U' dT U)) U' with the divided differences F_ij =
    f[x_i, x_j] (Daleckii and Krein; Higham 2008, theorem 3.11), finite for every smooth f: it is used directly.
    """
    reached = breakdown.reached(breakdown_step, len(diagonal))
    converted, constants = convert(function, diagonal[0])
    return _function_times_first(converted, diagonal, off_diagonal, reached, constants)


def reached_eigenpairs(
    diagonal: Float[Array, " K"], off_diagonal: Float[Array, " K-1"], reached: Bool[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, "K K"]]:
    """Eigenvalues and eigenvectors of T, with one that e_1 reaches in place of each that it does not."""
    matrix = tridiagonal_matrix(diagonal, off_diagonal)
    # Apart from all others, so that eigenvectors do not mix.
    apart = 2 * jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(reached, 0, apart)))
    is_reached = jnp.sum(jnp.where(reached[:, None], vectors**2, 0), axis=0) > 0.5
    return jnp.where(is_reached, values, values[jnp.argmax(jnp.abs(vectors[0]))]), vectors


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _function_times_first(
    function: Callable, diagonal: Array, off_diagonal: Array, reached: Array, constants: Any
) -> Array:
    values, vectors = reached_eigenpairs(diagonal, off_diagonal, reached)
    return _apply(vectors, _evaluate(function, constants, values))


@_function_times_first.defjvp
def _function_times_first_jvp(function: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    diagonal, off_diagonal, reached, constants = primals
    d_diagonal, d_off_diagonal, _, d_constants = tangents
    d_diagonal, d_off_diagonal = jnp.where(reached, d_diagonal, 0), jnp.where(reached[1:], d_off_diagonal, 0)
    values, vectors = reached_eigenpairs(diagonal, off_diagonal, reached)
    first = vectors[0]
    images, d_images = jax.jvp(lambda *c: _evaluate(function, c, values), tuple(constants), tuple(d_constants))
    rotated = matmul(matmul(vectors.T, tridiagonal_matrix(d_diagonal, d_off_diagonal)), vectors)
    divided = divided_differences(partial(_evaluate, function, constants), values, images)
    slope = _apply(vectors, d_images) + matmul(vectors, matmul(divided * rotated, first))
    return _apply(vectors, images), slope


def _apply(vectors: Array, images: Array) -> Array:
    """U D U' e_1 with D = diag(images), as c e_1 + U (D - c I) U' e_1 with c the image that weighs most.

    Where f is almost constant, most entries are almost zero, and keep the digits that a gradient needs of them.
    """
    first = vectors[0]
    constant = images[jnp.argmax(jnp.abs(first))]
    return matmul(vectors, (images - constant) * first).at[0].add(constant)


def _evaluate(function: Callable, constants: Any, values: Array) -> Array:
    return jax.vmap(lambda value: function(value, *constants))(values)


def rounding_of_zero(values: Float[Array, " K"]) -> Float[Array, ""]:
    """Below this an eigenvalue cannot be told from zero, given products with an error of eps times the largest one."""
    return 4 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))


def divided_differences(function: Callable, values: Array, images: Array) -> Array:
    """f[x_i, x_j]; where rounding in f would take a third of the digits of the quotient, f' at the midpoint.

    For a function that changes by its own size over a length L that is so for |x_i - x_j| < eps^(1/3) L, where the
    midpoint is off by eps^(2/3), relative.
    """
    eps = jnp.finfo(values.dtype).eps
    gap = values[:, None] - values[None, :]
    # A midpoint far from both, where f need not be defined, is not looked at.
    near = jnp.abs(gap) <= eps ** (1 / 3) * jnp.max(jnp.abs(values))
    middle = jnp.where(near, (values[:, None] + values[None, :]) / 2, values[:, None])
    slope = jax.jvp(function, (middle.reshape(-1),), (jnp.ones_like(middle).reshape(-1),))[1].reshape(gap.shape)
    ends = jnp.abs(jnp.diagonal(slope))
    size = jnp.abs(slope) + ends[:, None] + ends[None, :]  # no stationary point alone makes a pair close
    rounding = eps * (jnp.abs(images)[:, None] + jnp.abs(images)[None, :])
    close = (gap == 0) | (near & (eps ** (2 / 3) * jnp.abs(gap) * size <= rounding))
    return jnp.where(close, slope, (images[:, None] - images[None, :]) / jnp.where(close, 1, gap))
