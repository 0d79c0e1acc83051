"""Models that compute in fewer bits, or hold their weights in fewer: all sums are float32."""

from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import evidence
from bnnlaplace.curvature import streamed

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 4)).astype(np.float32), RNG.integers(0, 3, 60)


class Model(nn.Module):
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(3, **options)(nn.tanh(nn.Dense(5, **options)(x)))


def network(dtype, param_dtype):
    params = Model(jnp.float32, jnp.float32).init(jax.random.key(0), X)["params"]
    # Weights that bfloat16 can hold, so that all networks are the same function but for rounding.
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(param_dtype), params)
    return bnnlaplace.Network.from_linen(Model(dtype, param_dtype), {"params": params})


@pytest.fixture(scope="module", params=usual(["bfloat16"], ["float32", "bfloat16"]), ids="weights {}".format)
def short(request):
    return network(jnp.bfloat16, jnp.dtype(request.param))


@pytest.fixture(scope="module")
def exact():
    return network(jnp.float32, jnp.float32)


def fitted(network, structure):
    la = bnnlaplace.Laplace(network, hessian_structure=structure)
    return la.fit((X, Y), key=jax.random.key(0), num_probes=38, max_vectors=76, tolerance=0.1)


@lru_cache
def reference_of(structure):
    return fitted(network(jnp.float32, jnp.float32), structure)


@pytest.mark.parametrize("structure", usual(["diag", "lanczos"], ["full", "kron", "diag", "lanczos"]))
def test_every_structure(short, structure):
    la, reference = fitted(short, structure), reference_of(structure)
    assert la.fitted.log_likelihood.num_targets == 180
    np.testing.assert_allclose(la.fitted.log_likelihood.value, reference.fitted.log_likelihood.value, rtol=5e-3)
    found, expected = la.log_marginal_likelihood(), reference.log_marginal_likelihood()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-2)
    assert isinstance(found.mean, float)
    np.testing.assert_allclose(la.predictive(X[:5]), reference.predictive(X[:5]), atol=2e-2)
    sample = la.sample(jax.random.key(1), 2)
    assert jax.tree.map(lambda w: w.dtype, sample) == jax.tree.map(lambda w: w.dtype, short.params)


def test_products_and_gradients(short, exact):
    options = {"likelihood": bnnlaplace.categorical(), "num_matvecs": 5, "num_probes": 4, "side": "primal"}

    def value(params, network):
        return evidence.log_marginal_likelihood(params, 1.0, (X, Y), jax.random.key(0), network=network, **options).mean

    (found, slope), (expected, reference) = (
        jax.jit(jax.value_and_grad(lambda p, n=n: value(p, n)))(n.params) for n in (short, exact)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    for ours, theirs in zip(jax.tree.leaves(slope), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(np.asarray(ours, float), theirs, atol=0.05 * np.abs(theirs).max())
    rows = RNG.normal(size=(2, 180)).astype(np.float32)
    pair = [streamed.operator(n, bnnlaplace.categorical(), (X, Y), side="dual").matvec(rows) for n in (short, exact)]
    np.testing.assert_allclose(*pair, atol=0.05 * np.abs(pair[1]).max())


@pytest.mark.parametrize("structure", usual(["kron"], ["diag", "full", "kron"]))
def test_a_prior_of_several_precisions_does_not_move_weights_of_half_precision(structure):
    """The network runs at weights that were scaled and scaled back."""
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16),
        "w2": jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16),
    }
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], params)
    x, y = rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=(20, 2)).astype(np.float32)
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure, prior_precision={"w1": 0.3, "w2": 7.0})
    la = la.fit((x, y))
    np.testing.assert_array_equal(la.predictive(x)[0], network(params, x))


def test_the_mode_of_a_linearised_network_in_16_bits_keeps_its_digits():
    """The best weights of a regression lie between numbers that bfloat16 can hold: before, they were rounded."""
    rng = np.random.default_rng(2)
    x = rng.integers(-2, 3, (40, 3)).astype(np.float32)
    y = (x @ [[1.003], [-1.001], [0.998]]).astype(np.float32)
    weights = jnp.asarray([[1], [-1], [1]], jnp.bfloat16)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w.astype(x.dtype), weights)
    la = bnnlaplace.Laplace(network, "regression", sigma_noise=0.1, prior_precision=1e-3)
    la = la.fit((x, y), mean="linear", key=jax.random.key(0))
    best = np.linalg.solve(x.T @ x.astype(float) + 1e-5 * np.eye(3), x.T @ y.astype(float))
    np.testing.assert_allclose(la.network.params, best, atol=3e-5)
    np.testing.assert_allclose(la.predictive(x)[0], x @ best, atol=2e-4)
