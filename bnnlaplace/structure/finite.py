"""A curvature that has left the range of its numbers. Infinite curvature would read as certainty: variance zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.kronecker import KroneckerStructure
from bnnlaplace.structure.protocol import Structure


class NotFiniteError(ValueError):
    """A curvature is not finite in the type of its numbers."""


def check_finite(curvature: PyTree) -> None:
    """Raise NotFiniteError if a number is infinite or NaN."""
    leaves = jax.tree.leaves(curvature)
    on_host = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    on_device = [leaf for leaf in leaves if not isinstance(leaf, np.ndarray)]
    # A sum over all entries is not finite if one of them is not, and needs no second array of their number.
    if not (all(np.isfinite(leaf.sum()) for leaf in on_host) and (not on_device or _are_finite(on_device))):
        raise not_finite(leaves[0].dtype)


def are_finite(arrays: list[Array]) -> Bool[Array, ""]:
    """Say whether all numbers of all arrays are finite. Call it inside `jit`."""
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


_are_finite = jax.jit(are_finite)


def check_in_range(structure: Structure) -> Structure:
    """Return a structure, or raise NotFiniteError if its curvature has left the range of its numbers.

    Curvature is checked where it is computed. It can leave the range later: multiplied by a scale, divided by a noise
    variance or by relative precisions, or as a product of Kronecker factors. A traced structure passes.
    """
    leaves = jax.tree.leaves(structure)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return structure
    # As a pytree a matrix is the words of its numbers.
    check_finite(structure.matrix if isinstance(structure, DenseStructure) else leaves)
    return check_products(structure)


def check_products(structure: Structure) -> Structure:
    """Return a structure of finite numbers, or raise NotFiniteError if a product of Kronecker factors is too large."""
    if isinstance(structure, KroneckerStructure):
        dtype = jax.tree.leaves(structure)[0].dtype
        if max(block.range[1] for block in structure.blocks) > float(jnp.finfo(dtype).max):
            raise not_finite(dtype)
    return structure


def not_finite(dtype: Any) -> NotFiniteError:
    """The error for a curvature that is not finite in a type."""
    return NotFiniteError(
        f"the curvature must be finite in {dtype}; got infinite or NaN entries, as it holds squares of derivatives "
        "that are too large; standardise the inputs (subtract their mean, divide by their standard deviation), or "
        "compute in float64"
    )
