"""The compiler that is installed computes what the code says, at sizes that other tests do not reach."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace import categorical
from bnnlaplace.core.compiler import warn_of_wrong_sums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sums_of_products_with_a_shared_factor(x64, dtype):
    """At 40,000 numbers, more than other tests have: with jaxlib 0.10.2 the error is as large as the numbers are."""
    outputs = 3 * jax.random.normal(jax.random.key(0), (1000, 10), dtype)
    vectors = jax.random.normal(jax.random.key(1), (4, 1000, 10), dtype)
    product = jax.jit(jax.vmap(categorical().factor_transpose_mv, (None, 0)))
    probs = np.asarray(jax.nn.softmax(outputs), np.float64)
    along = np.sum(probs * np.asarray(vectors, np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(product(outputs, vectors), np.sqrt(probs) * (vectors - along), rtol=0, atol=1e-5)


def test_a_release_with_wrong_sums_is_named():
    with pytest.warns(RuntimeWarning, match=r"jaxlib 0\.10\.2 returns wrong sums on CPUs.*install another release"):
        warn_of_wrong_sums("0.10.2", "--xla_cpu_use_thunk_runtime=true")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_wrong_sums("0.10.2", "--xla_foo --xla_cpu_experimental_ynn_fusion_type=")
        warn_of_wrong_sums("0.10.1", "")
        warn_of_wrong_sums()
