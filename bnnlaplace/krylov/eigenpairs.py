"""Leading eigenpairs of a symmetric operator by one Lanczos run, to deflate a trace by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.krylov.checks import check_count, check_decomposable, check_number
from bnnlaplace.krylov.lanczos import lanczos_forward
from bnnlaplace.krylov.operator import prepare
from bnnlaplace.krylov.tridiagonal import tridiagonal_matrix
from bnnlaplace.krylov.vectors import safe_norm
from bnnlaplace.precise import matmul


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs A x = theta x with |x| = 1, largest |theta| first.

    Attributes
    ----------
    values
        theta; zero for a pair that was not found.
    vectors
        x along the leading axis of each leaf; zero for a pair that was not found.
    residual_norms
        |A x - theta x|, in exact arithmetic; it bounds the distance of theta to an eigenvalue.
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
    """The eigenpairs of largest |theta| that `num_matvecs` Lanczos steps from `start` find. Not differentiable.

    Parameters
    ----------
    matvec, params, start, num_matvecs, breakdown_tolerance
        As for `lanczos`. In exact arithmetic one start vector finds one vector of each eigenspace; where rounding leads
        the recurrence past an invariant space, it finds more of them, orthogonal to those before and as good.
    num_pairs
        How many are asked for, at most `num_matvecs`; two to three times as many steps find most of them.
    tolerance
        A pair counts as found if its residual norm is at most this times |theta|. The error of theta is of the order
        of `tolerance`^2. Others are returned as zeros.

    Raises
    ------
    ValueError
        If `num_pairs` is not between 1 and `num_matvecs`; else as for `lanczos`.
    TypeError
        As for `lanczos`, for float32 or float64.

    Notes
    -----
    Cost: `num_matvecs` products, full reorthogonalisation and 2 K M n multiplications; memory (K + M) n numbers.
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
    # Not differentiable, and told so: otherwise a derivative would pass through the eigendecomposition.
    first, arguments = jax.lax.stop_gradient((operator.start, operator.arguments))
    result = lanczos_forward(operator.matvec, settings, first, arguments)
    values, coordinates = jnp.linalg.eigh(tridiagonal_matrix(result.diagonal, result.off_diagonal))
    order = jnp.argsort(-jnp.abs(values))[:num_pairs]
    values, coordinates = values[order], coordinates[:, order]
    residual_norms = safe_norm(result.residual) * jnp.abs(coordinates[-1])
    found = (residual_norms <= tolerance * jnp.abs(values)) & (values != 0)
    vectors = jnp.where(found[:, None], matmul(coordinates.T, result.basis), 0)
    return Eigenpairs(jnp.where(found, values, 0), operator.unravel_rows(vectors), residual_norms)
