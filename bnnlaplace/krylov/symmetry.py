"""Whether an operator known by its products is symmetric, as Lanczos takes it to be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov.checks import check_count, check_number, check_real, is_traced
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
    """Measure by products alone how far a `matvec` is from symmetric, and refuse one that is not.

    For normal x and y, x' A y - y' A x has standard deviation |A - A'|_F, and |A y| is about |A|_F. The largest of
    |x' A y - y' A x| / (|A x| + |A y|) over `num_probes` pairs is returned: about |A - A'|_F / (2 |A|_F).

    Parameters
    ----------
    matvec, params
        v, *params -> A v, on pytrees like `vector`.
    vector
        Any vector that `matvec` takes; only its structure, shapes and dtype are used.
    key
        Of `jax.random.key`.
    num_probes
        Pairs of probes. A difference in a few of many entries can escape few probes.
    tolerance
        The largest ratio that passes; 1000 times the machine epsilon of the dtype unless given.

    Returns
    -------
    float
        The largest ratio: zero, or of the order of the machine epsilon, for a symmetric operator.

    Raises
    ------
    ValueError
        If the ratio exceeds `tolerance` or is not finite; it states the ratio.
    TypeError
        As for `lanczos`; and inside of `jit`, where there is no number to look at.

    Notes
    -----
    Cost: 2 `num_probes` products.
    """
    num_probes = check_count("check_symmetric", "num_probes", num_probes)
    vector = check_real("check_symmetric", "vector", vector)
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
        # Scaled first: norms, products and their difference may be too small or too large for a number.
        scale = jnp.maximum(jnp.max(jnp.abs(a_x)), jnp.max(jnp.abs(a_y)))
        scale = jnp.where(scale > 0, scale, 1)
        a_x, a_y = a_x / scale, a_y / scale
        size = norm(a_x) + norm(a_y)
        return jnp.abs(matmul(x, a_y) - matmul(y, a_x)) / jnp.where(size > 0, size, 1)

    worst = float(np.max([float(ratio(pair, operator.arguments)) for pair in probes]))  # NaN wins
    if not worst <= tolerance:
        raise ValueError(
            f"check_symmetric(matvec=...) must be symmetric; x'Ay and y'Ax differ by {worst:.3g} of |Ax| + |Ay|, more "
            f"than {tolerance:.3g}; use arnoldi for an operator that is not symmetric, or mend the product"
        )
    return worst
