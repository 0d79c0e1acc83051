"""Linear algebra in the full precision of its arguments: products, and eigenvectors of batches of matrices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
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
    return tuple(_eigh.bind(matrices))


# A primitive, because a function with a rule for `vmap` alone has no derivatives in reverse mode.
_eigh = Primitive("eigh_one_after_another")
_eigh.multiple_results = True


@_eigh.def_abstract_eval
def _types_of_eigh(matrices: Any) -> list[Any]:
    return [matrices.update(shape=matrices.shape[:-1]), matrices]


@_eigh.def_impl
def _all_at_once(matrices: Float[Array, "... D D"]) -> list[Array]:
    return list(jnp.linalg.eigh(matrices))


def _one_after_another(matrices: Float[Array, "... D D"]) -> list[Array]:
    if matrices.ndim == 2:
        return list(jnp.linalg.eigh(matrices))
    lead, dimension = matrices.shape[:-2], matrices.shape[-1]
    values, vectors = jax.lax.map(lambda m: tuple(jnp.linalg.eigh(m)), matrices.reshape(-1, dimension, dimension))
    return [values.reshape(*lead, dimension), vectors.reshape(matrices.shape)]


def _of_batch(matrices: tuple[Array], axes: tuple[int]) -> tuple[list[Array], list[int]]:
    return _eigh.bind(jnp.moveaxis(*matrices, *axes, 0)), [0, 0]


def _derivative_of_eigh(matrices: tuple[Array], tangents: tuple[Array]) -> tuple[list[Array], list[Array]]:
    """The derivatives of eigenvalues and of eigenvectors, which are finite where no two eigenvalues are equal."""
    values, vectors = _eigh.bind(*matrices)
    turned = matmul(jnp.swapaxes(vectors, -1, -2), matmul(ad.instantiate_zeros(*tangents), vectors))
    turned = (turned + jnp.swapaxes(turned, -1, -2)) / 2  # as the matrices are, before they are decomposed
    gaps = values[..., None, :] - values[..., :, None]
    mixed = turned * jnp.where(gaps == 0, 0, 1 / jnp.where(gaps == 0, 1, gaps))
    return [values, vectors], [jnp.diagonal(turned, axis1=-2, axis2=-1), matmul(vectors, mixed)]


mlir.register_lowering(_eigh, mlir.lower_fun(_all_at_once, multiple_results=True))
mlir.register_lowering(_eigh, mlir.lower_fun(_one_after_another, multiple_results=True), platform="cpu")
batching.primitive_batchers[_eigh] = _of_batch
ad.primitive_jvps[_eigh] = _derivative_of_eigh
