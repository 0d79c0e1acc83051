"""The part of a trace that lies in given directions, summed exactly, and what is left of probes beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.krylov.batching import anywhere
from bnnlaplace.krylov.checks import check_real, is_traced
from bnnlaplace.krylov.eigenpairs import Eigenpairs
from bnnlaplace.krylov.functions import Converted
from bnnlaplace.precise import matmul
from bnnlaplace.tree import concatenated


def deflation_rows(caller: str, deflation: Eigenpairs, like: PyTree) -> Float[Array, "M n"]:
    """The vectors of `deflation` as rows, held fixed.

    Raises
    ------
    TypeError
        If it is not of `Eigenpairs`.
    ValueError
        If its vectors do not have the structure and shapes of `like`, or, where their values are known, are neither
        orthonormal nor zero.
    """
    if not isinstance(deflation, Eigenpairs):
        raise TypeError(
            f"{caller}(deflation=...) must be what leading_eigenpairs returns; got {type(deflation).__name__}"
        )
    vectors = check_real(caller, "deflation", deflation.vectors)
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], vectors)
    wanted = jax.tree.map(jnp.shape, like)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(vectors) if leaf.ndim}
    if shapes != wanted or len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{caller}(deflation=...) must hold one or more vectors like the probes, of shapes {wanted}; got {counts} "
            f"of shapes {shapes}; find them with leading_eigenpairs for the same matvec"
        )
    dtype = jnp.result_type(jax.tree.leaves(like)[0])
    rows = jax.lax.stop_gradient(jax.vmap(concatenated)(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), vectors)))
    if not is_traced(rows):
        found = np.asarray(rows)[np.any(rows, axis=1)]
        error = np.abs(found @ found.T - np.eye(len(found))).max(initial=0)
        if not error <= 1e3 * float(jnp.finfo(rows.dtype).eps):
            raise ValueError(
                f"{caller}(deflation=...) must hold orthonormal vectors, or zeros for pairs that were not found; their "
                f"products are off by {error:.1g}; find them with leading_eigenpairs"
            )
    return rows


def deflated_trace(
    function: Converted,
    constants: Any,
    matvec: Callable,
    arguments: tuple[Any, ...],
    rows: Float[Array, "M n"],
) -> Float[Array, ""]:
    """sum_i f(x_i' A x_i) over the rows that are not zero, with the vectors held fixed.

    With X the projector on them, tr f(A) = tr X f(A) X + tr (I - X) f(A) (I - X) for any fixed X, and for eigenvectors
    the derivative of x' f(A) x is f'(theta) x' dA x: so the gradient is exact, though the vectors do not move.
    """
    values = jnp.sum(jax.lax.map(lambda x: matvec(x, *arguments), rows) * rows, axis=1)
    found = jnp.any(rows != 0, axis=1)

    def total() -> Array:
        # f need not be defined at the zero that stands for a pair not found.
        filled = jnp.where(found, values, jax.lax.stop_gradient(values[jnp.argmax(found)]))
        return jnp.sum(jnp.where(found, jax.vmap(lambda x: function(x, constants))(filled), 0))

    return jax.lax.cond(anywhere(jnp.any(found)), total, lambda: jnp.zeros_like(values[0]))


def outside(rows: Float[Array, "M n"], probes: Float[Array, "S n"]) -> Float[Array, "S n"]:
    """What of each probe is orthogonal to the rows."""
    return probes - matmul(matmul(probes, rows.T), rows)
