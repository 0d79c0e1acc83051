"""Check by products alone that an operator is symmetric, as Lanczos takes it to be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov.checks import check_count, check_number, check_real, is_traced
from bnnlaplace.krylov.finite import cause_of_products
from bnnlaplace.krylov.gram_schmidt import norm
from bnnlaplace.krylov.operator import flatten


def check_symmetric(
    matvec: Callable[..., PyTree],
    vector: PyTree,
    key: Array,
    *params: Any,
    num_probes: int = 3,
    tolerance: float | None = None,
) -> float:
    """Measure how far an operator is from symmetric, and refuse one that is not symmetric.

    For normal x and y, the difference x' A y - y' A x has standard deviation |A - A'|_F, and |A y| is about |A|_F. So
    the ratio |x' A y - y' A x| / (|A x| + |A y|) is about |A - A'|_F / (2 |A|_F). The largest ratio over all pairs of
    probes is returned.

    Parameters
    ----------
    matvec
        v, *params -> A v, on pytrees like `vector`.
    vector
        Any vector that `matvec` takes; only its structure, shapes and dtype are used.
    key
        The random key of the probes.
    params
        Further arguments of `matvec`.
    num_probes
        The number of pairs of probes. If only a few entries of A differ from those of A', few probes may miss them.
    tolerance
        The largest ratio that passes. The default is 1000 times the machine epsilon of the dtype.

    Returns
    -------
    float
        The largest ratio. For a symmetric operator it is zero or of the order of the machine epsilon.

    Raises
    ------
    ValueError
        If the ratio, which the message states, exceeds `tolerance` or is not finite, or `key` is not a random key.
    TypeError
        As for `lanczos`. Also if the function is called inside of `jit`, where there are no numbers to compare.

    Notes
    -----
    Cost: 2 `num_probes` products.
    """
    checks.key(key, "check_symmetric(key=...)")
    num_probes = check_count("check_symmetric", "num_probes", num_probes)
    vector = check_real("check_symmetric", "vector", vector)
    # Ones, since `flatten` refuses a vector of zeros, and the values of `vector` must not matter.
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), vector)
    operator = flatten("check_symmetric", "vector", matvec, ones, params)
    probes = jax.random.normal(key, (num_probes, 2, operator.start.size), operator.start.dtype)
    if is_traced((probes, operator.arguments)):
        raise TypeError(
            "check_symmetric(key=...) and what matvec uses must be known numbers; got traced ones; call it outside of "
            "jit, grad and vmap"
        )
    if tolerance is None:
        tolerance = 1e3 * float(jnp.finfo(operator.start.dtype).eps)
    tolerance = check_number("check_symmetric", "tolerance", tolerance, positive=False)

    @jax.jit
    def ratio(pair: Array, arguments: tuple[Any, ...]) -> Array:
        x, y = pair
        a_x, a_y = operator.matvec(x, *arguments), operator.matvec(y, *arguments)
        # Scaled first, since products of unscaled images may overflow or underflow.
        scale = jnp.maximum(jnp.max(jnp.abs(a_x)), jnp.max(jnp.abs(a_y)))
        scale = jnp.where(scale > 0, scale, 1)
        a_x, a_y = a_x / scale, a_y / scale
        size = norm(a_x) + norm(a_y)
        return jnp.abs(matmul(x, a_y) - matmul(y, a_x)) / jnp.where(size > 0, size, 1)

    # NumPy's maximum, unlike Python's, is NaN as soon as one ratio is.
    worst = float(np.max([float(ratio(pair, operator.arguments)) for pair in probes]))
    if not np.isfinite(worst):
        raise ValueError(
            f"check_symmetric(matvec=...) must return finite products; got a ratio of {worst}; "
            f"{cause_of_products(operator.start.dtype)}"
        )
    if not worst <= tolerance:
        raise ValueError(
            f"check_symmetric(matvec=...) must be symmetric; x'Ay and y'Ax differ by {worst:.3g} of |Ax| + |Ay|, more "
            f"than {tolerance:.3g}; use arnoldi for an operator that is not symmetric, or mend the product"
        )
    return worst
