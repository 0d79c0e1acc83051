"""Pytrees as flat vectors: the one place that ravels."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree


def ravel(tree: PyTree) -> Float[Array, " P"]:
    """Concatenate all leaves, in the order of `jax.tree.leaves`, into one vector."""
    return ravel_pytree(tree)[0]


def unraveler(tree: PyTree) -> Callable[[Float[Array, " P"]], Any]:
    """Return the map from a vector of `size(tree)` numbers to the structure, shapes and dtypes of `tree`.

    `tree` may hold arrays, tracers or `jax.ShapeDtypeStruct`s: only its structure and shapes are used, so that the
    result holds no array alive.
    """
    leaves, treedef = jax.tree.flatten(tree)
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()

    def unravel(vector: Float[Array, " P"]) -> Any:
        parts = jnp.split(vector, ends)
        return jax.tree.unflatten(treedef, [p.reshape(s).astype(d) for p, s, d in zip(parts, shapes, dtypes)])

    return unravel


def size(tree: PyTree) -> int:
    """Count the numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def as_vector(value: PyTree, like: PyTree) -> Float[Array, " P"]:
    """Broadcast a scalar, a vector or a pytree with the structure of `like` to one number per weight.

    Raises
    ------
    ValueError
        If `value` has neither no dimension, nor one number per weight, nor the structure of `like`.
    """
    count = size(like)
    if jax.tree.structure(value) == jax.tree.structure(like) and not isinstance(value, (int, float)):
        filled = jax.tree.map(lambda part, leaf: jnp.broadcast_to(part, leaf.shape), value, like)
        return ravel(filled)
    vector = jnp.asarray(value)
    if vector.shape not in ((), (count,)):
        raise ValueError(
            f"a value per weight must be a scalar, a vector of {count} numbers or a pytree like the weights; "
            f"got shape {vector.shape}; try a scalar"
        )
    return jnp.broadcast_to(vector, (count,))
