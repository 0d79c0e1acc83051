"""Stochastic Lanczos quadrature: tr f(A) from products with A.

Two forms. `stochastic_lanczos_quadrature` runs Lanczos once per probe and is differentiable by the adjoint.
`trace_forms` reads the trace off one block decomposition: leading eigenpairs that have converged are summed exactly,
which removes their share of the variance, and for f with known sign of derivatives the truncation error is bracketed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Ritz
from bnnlaplace.krylov.lanczos import lanczos
from bnnlaplace.precise import matmul


def stochastic_lanczos_quadrature(
    function: Callable[[Float[Array, " K"]], Float[Array, " K"]],
    matvec: Callable[..., Float[Array, " n"]],
    probes: Float[Array, "S n"],
    *params: Any,
    num_matvecs: int,
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
) -> Float[Array, " S"]:
    """z' f(A) z for every probe z: with E[z z'] = I, their mean estimates tr f(A) without bias but for truncation.

    |z|^2 e_1' f(T) e_1 with T from `num_matvecs` Lanczos steps started at z (Ubaru, Chen and Saad 2017).

    Parameters
    ----------
    function
        f, elementwise on Ritz values.
    matvec, params
        As for `lanczos`; the result is differentiable with respect to `params` and closed-over arrays.
    probes
        Rows with independent entries of mean 0 and variance 1, or the rows of sqrt(n) times an orthogonal matrix,
        whose mean is the exact trace.
    num_matvecs
        Depth K; exact from the rank of A on.
    gradient
        As for `lanczos`.

    Notes
    -----
    Cost: S K products; S K more for the gradient. Probes run one after another; memory K n numbers.
    """

    def quadratic_form(probe: Array) -> Array:
        result = lanczos(matvec, probe, *params, num_matvecs=num_matvecs, gradient=gradient)
        return result.start_norm**2 * _first_entry(function, result.diagonal, result.off_diagonal)

    return jax.lax.map(quadratic_form, probes)


def trace_forms(
    ritz: Ritz, function: Callable[[np.ndarray], np.ndarray], *, tolerance: float = 1e-2
) -> Float[np.ndarray, " S"]:
    """tr f(A) as each probe of one block decomposition estimates it, f elementwise on Ritz values, f(0) = 0.

    Ritz pairs whose residual is at most `tolerance` times theta are eigenpairs: their f(theta) enter every estimate
    exactly. They are properties of A, not of the probes, so the rest of the trace is estimated without bias by what a
    probe sees of the rest: tr f(A) = sum_conv f(theta_j) + E sum_other f(theta_j) (z' x_j)^2. The mean over probes is
    the estimate, their spread its error.

    A block of S probes finds at most S vectors of an eigenspace. So S or more converged values that `tolerance` does
    not tell apart may stand for an eigenspace with more dimensions than were found: they stay with the rest, where a
    probe sees all of the space.
    """
    values = function(ritz.values)
    exact = ritz.couplings <= tolerance * ritz.values
    exact[exact] = ~_in_long_chain(ritz.values[exact], ritz.weights.shape[1], tolerance)
    return values[exact].sum() + (values[:, None] * ritz.weights**2)[~exact].sum(axis=0)


def _in_long_chain(ascending: Float[np.ndarray, " m"], length: int, tolerance: float) -> np.ndarray:
    """Which values belong to a chain of `length` or more, each within `tolerance` of the next, relative to it."""
    chain = np.cumsum(np.diff(ascending, prepend=0.0) > tolerance * ascending)
    return np.bincount(chain, minlength=1)[chain] >= length if len(chain) else chain.astype(bool)


def gauss_radau(decomposition: BlockDecomposition, ritz: Ritz) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the block Gauss-Radau rule with nodes prescribed at zero, the lower end of A's spectrum.

    For functions such as log1p, whose derivatives alternate in sign, the block Gauss rule (Ritz values and weights)
    lies above z' f(A) z and this rule below, both monotonically in depth: together they bracket it (Golub and Meurant
    1994; for blocks Zimmerling, Druskin and Simoncini 2024).

    Returns
    -------
    nodes, weights
        Shapes (m + S,) and (m + S, S): for each probe, sum_j f(nodes_j) weights_j^2 estimates z' f(A) z.
    """
    count, size = len(decomposition.start), len(decomposition.tridiagonal)
    last = ritz.vectors[-count:]
    floor = np.finfo(np.float64).eps * size * max(ritz.values.max(), np.finfo(np.float64).tiny)
    inverse_corner = (last / np.maximum(ritz.values, floor)) @ last.T
    coupling = decomposition.residual
    extended = np.zeros((size + count,) * 2)
    extended[:size, :size] = decomposition.tridiagonal
    extended[size - count : size, size:] = coupling
    extended[size:, size - count : size] = coupling.T
    # The last block that makes T singular S times over: its Schur complement is zero.
    extended[size:, size:] = coupling.T @ inverse_corner @ coupling
    nodes, vectors = np.linalg.eigh(extended)
    return np.maximum(nodes, 0.0), vectors[:count].T @ decomposition.start.T


def _first_entry(function: Callable, diagonal: Array, off_diagonal: Array) -> Array:
    """e_1' f(T) e_1, differentiable also where eigenvalues of T coincide."""
    converted, constants = jax.closure_convert(function, diagonal)
    return _spectral_first_entry(converted, diagonal, off_diagonal, constants)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _spectral_first_entry(function: Callable, diagonal: Array, off_diagonal: Array, constants: Any) -> Array:
    values, vectors = jnp.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
    return jnp.sum(vectors[0] ** 2 * function(values, *constants))


@_spectral_first_entry.defjvp
def _spectral_first_entry_jvp(function: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Autodiff through eigh divides by differences of eigenvalues, zero after a breakdown. The derivative of f(T) in
    # direction dT is U (F o (U' dT U)) U' with the divided differences F_ij = f[theta_i, theta_j] (Daleckii and
    # Krein), finite for every smooth f: it is used directly.
    diagonal, off_diagonal, constants = primals
    d_diagonal, d_off_diagonal, d_constants = tangents
    values, vectors = jnp.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
    first = vectors[0]
    images, d_images = jax.jvp(lambda *c: function(values, *c), tuple(constants), tuple(d_constants))
    rotated = matmul(matmul(vectors.T, _tridiagonal(d_diagonal, d_off_diagonal)), vectors)
    divided = _divided_differences(lambda x: function(x, *constants), values, images)
    slope = jnp.sum(first**2 * d_images) + matmul(matmul(first, divided * rotated), first)
    return jnp.sum(first**2 * images), slope


def _divided_differences(function: Callable, values: Array, images: Array) -> Array:
    """f[x_i, x_j]; for close arguments the derivative at the midpoint, where the quotient would cancel."""
    gap = values[:, None] - values[None, :]
    size = jnp.abs(values[:, None]) + jnp.abs(values[None, :])
    close = jnp.abs(gap) <= jnp.finfo(values.dtype).eps ** (1 / 3) * size
    middle = (values[:, None] + values[None, :]) / 2
    # Row by row: closure conversion fixed the length of the vectors that f takes.
    slope = jax.lax.map(lambda row: jax.jvp(function, (row,), (jnp.ones_like(row),))[1], middle)
    return jnp.where(close, slope, (images[:, None] - images[None, :]) / jnp.where(close, 1, gap))


def _tridiagonal(diagonal: Array, off_diagonal: Array) -> Array:
    return jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
