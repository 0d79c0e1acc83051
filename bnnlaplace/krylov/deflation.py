"""Deflation of a trace: leading eigenpairs are found by Lanczos and summed exactly, and probes see only the rest.

With X the projector on some directions, tr f(A) = tr X f(A) X + tr (I - X) f(A) (I - X). The leading eigenpairs cause
most of the variance of a trace estimate. Summed exactly, they cause none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.linalg import eigh, matmul
from bnnlaplace.core.tree import concatenated
from bnnlaplace.krylov import finite
from bnnlaplace.krylov.checks import check_count, check_decomposable, check_number, check_real, is_traced
from bnnlaplace.krylov.functions import Converted
from bnnlaplace.krylov.gram_schmidt import anywhere, safe_norm
from bnnlaplace.krylov.lanczos import lanczos_forward
from bnnlaplace.krylov.operator import prepare
from bnnlaplace.krylov.tridiagonal import tridiagonal_matrix


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs A x = theta x with |x| = 1, largest |theta| first.

    Attributes
    ----------
    values
        theta. Zero for a pair that was not found.
    vectors
        x along the leading axis of each leaf. Zero for a pair that was not found.
    residual_norms
        |A x - theta x|, as the recurrence gives it in exact arithmetic. It bounds the distance of theta to an
        eigenvalue.
    """

    values: Float[Array, " M"]
    vectors: PyTree[Float[Array, "M ..."]]
    residual_norms: Float[Array, " M"]


def leading_eigenpairs(
    matvec: Callable[..., PyTree],
    start: PyTree,
    *params: Any,
    num_pairs: int,
    num_matvecs: int,
    tolerance: float = 1e-3,
    breakdown_tolerance: float | None = None,
) -> Eigenpairs:
    """Find the eigenpairs of largest |theta| by Lanczos. The result is not differentiable.

    Parameters
    ----------
    matvec, params, num_matvecs, breakdown_tolerance
        As for `lanczos`.
    start
        As for `lanczos`, in float32 or float64. In exact arithmetic one start vector finds one vector of each
        eigenspace. If rounding leads the recurrence past an invariant space, it finds further ones, which are
        orthogonal to those before and as accurate.
    num_pairs
        The number M of pairs to return, at most `num_matvecs`. Two to three times as many steps find most of them.
    tolerance
        A pair counts as found if its residual norm is at most this times |theta|; the relative error of theta is then
        of the order of `tolerance`^2. All other pairs are returned as zeros.

    Returns
    -------
    Eigenpairs
        M pairs, some of which may be zero.

    Raises
    ------
    ValueError
        As for `lanczos`, and if `num_pairs` is not between 1 and `num_matvecs`.
    TypeError
        As for `lanczos`, and if `start` is in half precision.

    Notes
    -----
    Cost: K products, full reorthogonalisation and 2 K M n multiplications. Memory: (K + M) n numbers.

    Source: Parlett 1998, The Symmetric Eigenvalue Problem, chapter 13.

    Examples
    --------
    >>> d = jnp.array([9.0, 1.0, 2.0, 3.0])
    >>> values = leading_eigenpairs(lambda v: d * v, jnp.ones(4), num_pairs=1, num_matvecs=4).values
    >>> bool(jnp.allclose(values, 9.0, atol=1e-4))
    True
    """
    caller = "leading_eigenpairs"
    options = {"num_matvecs": num_matvecs, "breakdown_tolerance": breakdown_tolerance}
    operator, settings = prepare(caller, "start", matvec, start, params, **options)
    check_decomposable(caller, "start", operator.start.dtype)
    num_pairs = check_count(caller, "num_pairs", num_pairs, settings.num_matvecs, "num_matvecs =")
    tolerance = check_number(caller, "tolerance", tolerance, positive=False)
    # Otherwise a derivative would pass through the eigendecomposition, which divides by differences of eigenvalues.
    first, arguments = jax.lax.stop_gradient((operator.start, operator.arguments))
    result = lanczos_forward(operator.matvec, settings, first, arguments)
    cause = partial(finite.cause_of_products, first.dtype)
    finite.warn_unless_finite(caller, "a decomposition", (result.diagonal, result.residual), cause)
    values, coordinates = eigh(tridiagonal_matrix(result.diagonal, result.off_diagonal))
    order = jnp.argsort(-jnp.abs(values))[:num_pairs]
    values, coordinates = values[order], coordinates[:, order]
    # A (Q u) - theta (Q u) = r e_K' u, which needs no further product.
    residual_norms = safe_norm(result.residual) * jnp.abs(coordinates[-1])
    # After a breakdown T has zero eigenvalues that stand for nothing.
    converged = (residual_norms <= tolerance * jnp.abs(values)) & (values != 0)
    vectors = jnp.where(converged[:, None], matmul(coordinates.T, result.basis), 0)
    return Eigenpairs(jnp.where(converged, values, 0), operator.unravel_rows(vectors), residual_norms)


def deflation_rows(caller: str, deflation: Eigenpairs, like: PyTree) -> Float[Array, "M n"]:
    """Return the vectors of `deflation` as constant rows.

    Raises
    ------
    TypeError
        If `deflation` is not an `Eigenpairs`.
    ValueError
        If its vectors do not have the structure and shapes of `like`, or are known to be neither orthonormal nor zero.
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
        nonzero = np.asarray(rows)[np.any(rows, axis=1)]
        error = np.abs(nonzero @ nonzero.T - np.eye(len(nonzero))).max(initial=0)
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
    """Sum f(x_i' A x_i) over the rows that are not zero, with the vectors held fixed.

    The identity for the trace holds for any fixed projector X, so the vectors need not move with A. For an eigenvector
    the derivative of x' f(A) x is f'(theta) x' dA x, which is the derivative of f(x' A x): so the gradient is exact.
    """
    values = jnp.sum(jax.lax.map(lambda x: matvec(x, *arguments), rows) * rows, axis=1)
    present = jnp.any(rows != 0, axis=1)

    def total() -> Array:
        # f need not be defined at the zero of a missing pair. It is evaluated at the value of another pair instead.
        filled = jnp.where(present, values, jax.lax.stop_gradient(values[jnp.argmax(present)]))
        return jnp.sum(jnp.where(present, jax.vmap(lambda x: function(x, constants))(filled), 0))

    # If all pairs are missing, there is no such value.
    return jax.lax.cond(anywhere(jnp.any(present)), total, lambda: jnp.zeros_like(values[0]))


def outside(rows: Float[Array, "M n"], probes: Float[Array, "S n"]) -> Float[Array, "S n"]:
    """Return the part of each probe that is orthogonal to the rows."""
    return probes - matmul(matmul(probes, rows.T), rows)
