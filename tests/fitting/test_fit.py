"""Fitting: data in every form give the same curvature, once compiled, in the types of the network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.curvature import streamed


def test_a_subset_is_scaled_to_the_whole(trained, diagonal):
    network, x, y = trained
    twice = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y), num_data=800)
    np.testing.assert_allclose(twice.structure.diagonal, 2 * diagonal.structure.diagonal, rtol=1e-5)
    np.testing.assert_allclose(twice.fitted.log_likelihood.value, 2 * diagonal.fitted.log_likelihood.value, rtol=1e-5)


@pytest.mark.exhaustive  # as in `tests/model/test_data.py`
def test_batches_are_the_same_data(trained, diagonal):
    network, x, y = trained
    batches = [(x[:150], y[:150]), (x[150:], y[150:])]
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit(batches)
    np.testing.assert_allclose(la.structure.diagonal, diagonal.structure.diagonal, rtol=1e-5)


def test_a_list_of_two_arrays_is_the_same_data(trained, diagonal):
    network, x, y = trained
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit([x, y])
    np.testing.assert_array_equal(la.structure.diagonal, diagonal.structure.diagonal)


@pytest.mark.parametrize("shape", [lambda x, y: [x, y, y, y], lambda x, y: {"x": x, "y": y}, lambda x, y: [(x,)]])
def test_batches_are_pairs(trained, shape):
    network, x, y = trained
    with pytest.raises(ValueError, match=r"two arrays \(x, y\), or an iterable of batches, each such a pair; got"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit(shape(x, y))


TRACED = {
    "inputs": lambda la, d, x, y: la.fit((d * x, y)),
    "weights": lambda la, d, x, y: la.fit((x, y, d * np.ones(len(y)))),
    "later batch": lambda la, d, x, y: la.fit([(x, y), (x, y, d * np.ones(len(y)))]),
    "nothing": lambda la, d, x, y: la.fit((x, y)),
    "prior": lambda la, d, x, y: bnnlaplace.Laplace(la.network, hessian_structure="full", prior_precision=d).fit(
        (x, y)
    ),
    "temperature": lambda la, d, x, y: bnnlaplace.Laplace(
        la.network, bnnlaplace.tempered(bnnlaplace.categorical(), d), hessian_structure="kron"
    ).fit((x, y)),
    "validation": lambda la, d, x, y: la.validation_curve(d * x, y, [1.0]),
    "grid search": lambda la, d, x, y: la.optimize_prior_precision("gridsearch", validation=(d * x, y)),
}


@pytest.mark.parametrize("case", TRACED)
def test_what_computes_on_the_host_is_not_traced(trained, diagonal, case, unchecked_annotations):
    """JAX raised errors of its own, pages long, from wherever the first number was needed."""
    _, x, y = trained
    with pytest.raises(TypeError, match="must have known numbers, as it computes in float64 on the host"):
        jax.eval_shape(lambda d: TRACED[case](diagonal, d, x[:9], y[:9]), 1.0)


@pytest.mark.exhaustive  # as in `test_compilation.py`
def test_compiles_once_per_shape(trained):
    network, x, y = trained
    products = streamed.batch_product._cache_size()
    for seed in (11, 12):
        la = bnnlaplace.Laplace(network.with_params(jax.tree.map(lambda leaf: leaf * 1.01, network.params)))
        with pytest.warns(UserWarning, match="not converged"):
            la.fit((x[:90], y[:90]), key=jax.random.key(seed), num_probes=4, max_vectors=12).predictive(x[:7])
    assert streamed.batch_product._cache_size() == products + 1


@pytest.mark.parametrize(
    ("dtype", "enabled"),
    usual([(jnp.float32, True), (jnp.bfloat16, False)], (jnp.float32, jnp.bfloat16), (False, True)),
)
def test_weights_keep_their_precision(enabled, dtype):
    with jax.enable_x64(enabled):
        params = {"w": jnp.ones((2, 3), dtype), "b": jnp.zeros(3, jnp.float32)}
        network = bnnlaplace.Network.from_function(lambda p, x: x @ p["w"] + p["b"], params)
        data = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32), np.arange(8) % 3
        la = bnnlaplace.Laplace(network).fit(data, key=jax.random.key(0), num_probes=9, max_vectors=9)
        assert np.isfinite(la.log_marginal_likelihood().mean)
        assert la.sample(jax.random.key(1), 2)["w"].dtype == dtype


def test_linen_batch_statistics_are_frozen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    module = Model()
    x, y = jax.random.normal(jax.random.key(0), (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    variables = module.init(jax.random.key(1), x, train=False)
    network = bnnlaplace.Network.from_linen(module, variables, train=False)
    assert set(network.frozen) == {"batch_stats"}
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y))
    assert la.structure.diagonal.size == 2 * 3 + 3 + 2 * 2
    # two wrappings of one module share compiled code
    assert hash(network.forward) == hash(bnnlaplace.Network.from_linen(Model(), variables, train=False).forward)


def test_the_training_set_is_no_smaller_than_what_is_seen_of_it(trained):
    network, x, y = trained
    with pytest.raises(ValueError, match=r"num_data=...\) must be the size .* at least that of data, 400; got 399"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y), num_data=399)
