"""Matrix products in the full precision of their arguments: the one place in the package that asks for it.

Accelerators multiply float32 matrices in fewer bits unless told otherwise: TensorFloat-32 keeps 11 of 24. In a product
with a GGN that is an error of 5e-4 of its *largest* eigenvalue, which is more than the prior precisions of interest,
and the product is no longer symmetric to rounding, as every Krylov method takes it to be. On CPU nothing changes.
"""

from functools import partial

import jax
import jax.numpy as jnp

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# `with all_products():` does the same for products and convolutions inside that state no precision of their own.
all_products = partial(jax.default_matmul_precision, "highest")
