"""Linear algebra in the full precision of its arguments: products, and eigenvectors of batches of matrices."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Accelerators multiply float32 matrices in fewer bits unless told otherwise: TensorFloat-32 keeps 11 of 24. In a
# product with a GGN that is an error of 5e-4 of its *largest* eigenvalue, which exceeds the prior precisions of
# interest. Such a product is also not symmetric to rounding, which every Krylov method assumes. On CPU nothing changes.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# `with all_products():` asks the same of every product and convolution inside that does not state a precision itself.
all_products = partial(jax.default_matmul_precision, "highest")


@jax.jit
def eigh(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    """Eigenvalues of symmetric matrices in ascending order, and their eigenvectors in columns.

    On CPU the matrices of a batch are decomposed one after another, elsewhere all at once. jaxlib on CPU would give
    them to a pool of threads and wait for them on one of its threads, so a program with several such batches can block
    for ever: with twenty batches of 16 matrices jaxlib 0.10.2 stands still on two cores.
    """
    if matrices.ndim == 2:
        return tuple(jnp.linalg.eigh(matrices))

    def one_after_another(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        lead, dimension = matrices.shape[:-2], matrices.shape[-1]
        values, vectors = jax.lax.map(jnp.linalg.eigh, matrices.reshape(-1, dimension, dimension))
        return values.reshape(*lead, dimension), vectors.reshape(matrices.shape)

    def all_at_once(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        return tuple(jnp.linalg.eigh(matrices))

    return jax.lax.platform_dependent(matrices, cpu=one_after_another, default=all_at_once)
