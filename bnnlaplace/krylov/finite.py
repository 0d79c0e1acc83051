"""Values that are not finite are reported, with their cause: the products with A, or f at a Ritz value.

Inside of `jit` no number is known, and a record says it alone: an error estimate that is infinite, `converged` that is
false. Outside a warning names the cause. Finding it takes one more decomposition, for results that are lost anyway.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from bnnlaplace.core import checks
from bnnlaplace.krylov import breakdown
from bnnlaplace.krylov.checks import is_traced
from bnnlaplace.krylov.functions import Converted
from bnnlaplace.krylov.tridiagonal import reached_eigenpairs

OF_PRODUCTS = (
    "the products of matvec are not finite, or too large for {dtype}; look for NaN and infinite values in what matvec "
    "uses, or scale it"
)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all numbers are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(jax.lax.stop_gradient(tree))]))


def warn_unless_finite(caller: str, what: str, tree: PyTree, cause: Callable[[], str]) -> None:
    """Warn that numbers are not finite, if they are known, and why; `cause` is called only then."""
    if not is_traced(tree) and not is_finite(tree):
        checks.warn(f"{caller} has {what} that is not finite: {cause()}")


def cause_of_products(dtype: Any) -> str:
    """Say that a decomposition is not finite because the products are not."""
    return OF_PRODUCTS.format(dtype=dtype)


def cause_of_function(function: Converted, constants: Any, steps: Any) -> str:
    """Say why f(A) is not finite, from the `Lanczos` decomposition of A."""
    if not is_finite((steps.diagonal, steps.off_diagonal)):
        return cause_of_products(steps.diagonal.dtype)
    reached = breakdown.reached(steps.breakdown_step, len(steps.diagonal))
    values, _ = reached_eigenpairs(steps.diagonal, steps.off_diagonal, reached)
    images = np.asarray(jax.vmap(lambda x: function(x, constants))(values))
    values, bad = np.asarray(values), ~np.isfinite(images)
    if not bad.any():
        return f"the sum over Ritz values is too large for {values.dtype}; scale the operator or the function"
    worst = np.flatnonzero(bad)[0]
    return (
        f"function is {images[worst]} at the Ritz value {values[worst]:.4g}, and not finite at {bad.sum()} of "
        f"{len(values)}, which lie between {values.min():.4g} and {values.max():.4g}; shift the operator, or pass a "
        "function that is defined on its spectrum"
    )
