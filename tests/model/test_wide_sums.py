"""Networks in 16 bits: derivatives in weights that are copied to examples and positions are summed in float32.

Before, the derivative in a bias stopped growing after some hundred summands on CPU, and so did that in an embedding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bnnlaplace
from bnnlaplace.model.wide_sums import with_wide_sums

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(64, 6, 6, 1)).astype(np.float32)
TOKENS = np.zeros((64, 40), np.int32)


class Convolution(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), dtype=self.dtype)(x).reshape(len(x), -1)


class Embedding(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Embed(3, 4, dtype=self.dtype)(x).reshape(len(x), -1)


class Rematerialised(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.remat(Convolution)(self.dtype)(x)


def plain(dtype):
    def function(w, x):
        b = w["b"].astype(dtype)
        return lax.scan(lambda carry, _: (carry + jnp.tanh(b), None), x.astype(dtype), None, length=2)[0]

    return bnnlaplace.Network.from_function(function, {"b": jnp.zeros(4)}), np.zeros((64, 36, 4), np.float32)


def linen(module, x):
    return bnnlaplace.Network.from_linen(module, module.init(jax.random.key(0), x)), x


CASES = {
    "convolution": lambda dtype: linen(Convolution(dtype), IMAGES),
    "embedding": lambda dtype: linen(Embedding(dtype), TOKENS),
    "rematerialised": lambda dtype: linen(Rematerialised(dtype), IMAGES),
    "loop": plain,
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_many_positions(name):
    """Cotangents of one, whose sum over examples and positions is known from float32."""

    @jax.jit
    def derivative(network, x):
        outputs, pullback = jax.vjp(lambda p: network(p, x), network.params)
        return pullback(jnp.ones_like(outputs))[0]

    found, exact = (derivative(*CASES[name](dtype)) for dtype in ("bfloat16", "float32"))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(leaf, expected, atol=2 * float(jnp.finfo(jnp.bfloat16).eps) * scale)


def test_outputs_are_those_of_the_module():
    network, x = CASES["convolution"]("bfloat16")
    direct = jax.jit(lambda p: network.forward(network.frozen, p, x))(network.params)
    np.testing.assert_array_equal(jax.jit(lambda p: network(p, x))(network.params), direct.astype(jnp.float32))


def test_networks_without_short_numbers_run_as_they_are():
    calls = []

    def function(w, x):
        calls.append(len(x))
        return x @ w

    arguments = jnp.ones((2, 3)), jnp.ones((4, 2))
    assert "convert_element_type" not in str(jax.make_jaxpr(lambda *a: with_wide_sums(function, *a))(*arguments))
    before = len(calls)
    with_wide_sums(function, *arguments)
    assert len(calls) == before + 1  # what the first call found is remembered
