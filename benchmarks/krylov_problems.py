"""Operators of `krylov.py`, and the libraries that decompose them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from bnnlaplace.krylov import arnoldi, lanczos
from bnnlaplace.krylov.arnoldi import Arnoldi
from bnnlaplace.krylov.lanczos import Lanczos

try:
    from matfree import decomp
except ImportError:
    decomp = None

LIBRARIES = ("matfree", "ours") if decomp else ("ours",)

CONVECTION = 0.3, 0.5  # The wind along both axes of the grid, which makes the operator of Arnoldi non-symmetric.


class Problem(NamedTuple):
    """An operator with its start vector and parameters. `mirror` maps each nonzero entry to its mirror image."""

    matvec: Callable[[Array, Array], Array]
    start: Array
    params: Array
    mirror: np.ndarray | None = None


def sparse_grid(side: int, wind: tuple[float, float] = (0.0, 0.0)) -> Problem:
    """The five-point stencil on a square grid in coordinate format, as a function of its nonzero values."""
    along = [sparse.diags_array([-1 - w, 2, w - 1], offsets=[-1, 0, 1], shape=(side, side)) for w in wind]
    identity = sparse.eye_array(side)
    matrix = sparse.csr_array(sparse.kron(along[0], identity) + sparse.kron(identity, along[1]))
    matrix.sort_indices()
    matrix = matrix.tocoo()
    rows, columns = jnp.asarray(matrix.row), jnp.asarray(matrix.col)

    def matvec(vector: Array, values: Array) -> Array:
        return jnp.zeros_like(vector).at[rows].add(values * vector[columns], indices_are_sorted=True)

    start = jax.random.normal(jax.random.key(0), (side * side,))
    return Problem(matvec, start, jnp.asarray(matrix.data, jnp.float32), np.lexsort((matrix.row, matrix.col)))


def stencil_grid(side: int) -> Problem:
    """The Laplacian of `sparse_grid` by shifts of the grid, as a function of its three coefficients."""

    def matvec(vector: Array, coefficients: Array) -> Array:
        grid = jnp.pad(vector.reshape(side, side), 1)
        vertical = grid[2:, 1:-1] + grid[:-2, 1:-1]
        horizontal = grid[1:-1, 2:] + grid[1:-1, :-2]
        centre, vertical_weight, horizontal_weight = coefficients
        return (centre * grid[1:-1, 1:-1] + vertical_weight * vertical + horizontal_weight * horizontal).ravel()

    start = jax.random.normal(jax.random.key(0), (side * side,))
    return Problem(matvec, start, jnp.array([4.0, -1.0, -1.0]))


def factorisation(library: str, method: str, matvec: Callable, depth: int, gradient: str = "adjoint") -> Callable:
    """Return the map from (start, params) to what the library returns."""
    if library == "ours":
        ours = {"lanczos": lanczos, "arnoldi": arnoldi}[method]
        return lambda start, params: ours(matvec, start, params, num_matvecs=depth, gradient=gradient)
    adjoint = gradient == "adjoint"
    if method == "lanczos":
        peer = decomp.tridiag_sym(depth, materialize=False, custom_vjp=adjoint)
    else:
        peer = decomp.hessenberg(depth, reortho="full", custom_vjp=adjoint)
    return lambda start, params: peer(matvec, start, params)


def projected(result: Any) -> Array:
    """Concatenate the entries of T or H that the library returns, each once."""
    if isinstance(result, Lanczos):
        return jnp.concatenate([result.diagonal, result.off_diagonal])
    matrix = result.hessenberg if isinstance(result, Arnoldi) else result.J_small
    return jnp.concatenate([jnp.ravel(part) for part in (matrix if isinstance(matrix, tuple) else (matrix,))])
