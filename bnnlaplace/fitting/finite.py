"""A curvature that has left the range of its numbers. Infinite curvature would read as certainty: variance zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def check_finite(curvature: PyTree) -> None:
    """Raise ValueError if a number is infinite or NaN."""
    leaves = jax.tree.leaves(curvature)
    if not all(
        bool(np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else jnp.isfinite(leaf).all()) for leaf in leaves
    ):
        raise not_finite(leaves[0].dtype)


def not_finite(dtype: Any) -> ValueError:
    """The error for a curvature that is not finite in a type."""
    return ValueError(
        f"fit: the curvature must be finite in {dtype}; got infinite or NaN entries, as it holds squares of "
        "derivatives that are too large; standardise the inputs (subtract their mean, divide by their standard "
        "deviation), or compute in float64"
    )
