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

    On CPU the matrices of a batch are decomposed one after another, elsewhere all at once. So are those that `jax.vmap`
    makes a batch of. jaxlib on CPU would give them to a pool of threads and wait for them on one of its threads, so a
    program with several such batches can block for ever: with three batches of 16 matrices of size 64, jaxlib 0.10.2
    stands still on two cores.
    """
    return _differentiable_eigh(matrices)


@jax.custom_jvp
def _differentiable_eigh(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    return _eigh(matrices)


# What `_eigh` does with a batch is a rule of its own, and JAX does not differentiate such a function in reverse.
@_differentiable_eigh.defjvp
def _derivative_of_eigh(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    """The derivatives of eigenvalues and of eigenvectors, which are finite where no two eigenvalues are equal."""
    values, vectors = _differentiable_eigh(*primals)
    turned = matmul(jnp.swapaxes(vectors, -1, -2), matmul(*tangents, vectors))
    turned = (turned + jnp.swapaxes(turned, -1, -2)) / 2  # as the matrices are, before they are decomposed
    gaps = values[..., None, :] - values[..., :, None]
    mixed = turned * jnp.where(gaps == 0, 0, 1 / jnp.where(gaps == 0, 1, gaps))
    return (values, vectors), (jnp.diagonal(turned, axis1=-2, axis2=-1), matmul(vectors, mixed))


@jax.custom_batching.custom_vmap
def _eigh(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    if matrices.ndim == 2:
        return tuple(jnp.linalg.eigh(matrices))

    def one_after_another(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        lead, dimension = matrices.shape[:-2], matrices.shape[-1]
        values, vectors = jax.lax.map(lambda m: tuple(jnp.linalg.eigh(m)), matrices.reshape(-1, dimension, dimension))
        return values.reshape(*lead, dimension), vectors.reshape(matrices.shape)

    def all_at_once(matrices: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
        return tuple(jnp.linalg.eigh(matrices))

    return jax.lax.platform_dependent(matrices, cpu=one_after_another, default=all_at_once)


@_eigh.def_vmap
def _eigh_of_batch(axis_size: int, in_batched: list[bool], matrices: Array) -> tuple[tuple, tuple]:
    return _eigh(matrices), (True, True)
