"""A matrix in float64 that JAX may trace, also where it knows no float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul


class Words(NamedTuple):
    """A matrix S M S as JAX may trace it, also where JAX knows no float64.

    Attributes
    ----------
    words
        The words of 32 bits that the numbers of M consist of, row by row: (P, P) or (P, 2 P), of type uint32.
    dtype
        The type of the numbers.
    scale
        The diagonal S, (P,); None for the identity.
    """

    words: Any
    dtype: Any
    scale: Any = None

    def numbers(self) -> Float[Array, "P P"]:
        """S M S. Call it where float64 is switched on."""
        size = len(self.words)
        words = self.words.reshape(size, size, -1) if self.words.shape[1] > size else self.words
        matrix = jax.lax.bitcast_convert_type(words, self.dtype).astype(jnp.float64)
        return matrix if self.scale is None else matrix * self.scale * self.scale[:, None]

    def product(self, vector: Float[Array, " P"]) -> Float[Array, " P"]:
        """S M S v, rounded after it was computed in float64."""
        with jax.enable_x64(True):
            scale = None if self.scale is None else jnp.asarray(self.scale, jnp.float64)
            return matmul(self._replace(scale=scale).numbers(), vector.astype(jnp.float64)).astype(vector.dtype)
