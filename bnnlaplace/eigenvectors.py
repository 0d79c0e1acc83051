"""Eigenvectors of many symmetric matrices, one after another where doing all at once can stand still forever."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def eigh(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    """Eigenvalues in ascending order, and eigenvectors in columns.

    On CPU jaxlib decomposes a batch of matrices by tasks for a pool of threads, on one of which it waits for them. A
    program with several such batches can have all threads waiting, and nobody at work: with twenty batches of 16
    matrices jaxlib 0.10.2 stands still on two cores (an equal batch of one matrix after another does not).

    Parameters
    ----------
    matrices
        Symmetric. On CPU those of a batch are decomposed one after another, elsewhere all at once.
    """
    if matrices.ndim == 2:
        return jnp.linalg.eigh(matrices)

    def in_turn(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        lead, extent = matrices.shape[:-2], matrices.shape[-1]
        values, vectors = jax.lax.map(jnp.linalg.eigh, matrices.reshape(-1, extent, extent))
        return values.reshape(*lead, extent), vectors.reshape(matrices.shape)

    def at_once(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        return tuple(jnp.linalg.eigh(matrices))

    return jax.lax.platform_dependent(matrices, cpu=in_turn, default=at_once)
