"""Matrix products in the full precision of their arguments: the one place in the package that asks for it.

Accelerators multiply float32 matrices in fewer bits unless told otherwise: TensorFloat-32 keeps 11 of 24. In a product
with a GGN that is an error of 5e-4 of its *largest* eigenvalue, which is more than the prior precisions of interest,
and the product is no longer symmetric to rounding, as every Krylov method takes it to be. On CPU nothing changes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# `with all_products():` does the same for products and convolutions inside that state no precision of their own.
all_products = partial(jax.default_matmul_precision, "highest")


# Eigenvectors of many symmetric matrices, one after another where doing all at once can stand still forever.
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
