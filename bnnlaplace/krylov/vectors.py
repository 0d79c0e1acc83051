"""Norms of flat vectors whose gradients are finite at zero, where a breakdown ends up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.precise import matmul


def norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """|v|, with a gradient of zero at zero."""
    square = matmul(vector, vector)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)


def safe_norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """The same without overflow or underflow of the squares, for one more pass over v."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vector)))
    largest = jnp.where(largest > 0, largest, 1)
    return largest * norm(vector / largest)
