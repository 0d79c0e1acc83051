"""Which weights are found to be layers, and derivatives of single examples with respect to every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import NETWORKS, Transformer, at_random, drawn, linen, plain, products, usual

from bnnlaplace.core.tree import leaf_names, ravel
from bnnlaplace.curvature import layers, layout, tapped
from bnnlaplace.model.features import cut

RNG = np.random.default_rng(0)


def example_gradients(network, inputs, cotangent):
    """(M, P) from one backward pass, as matrices of layers and as they come."""
    passed = tapped.forward(network, network.params, inputs)
    gradients = passed.gradients(cotangent)
    flat = []
    for leaf in sorted(gradients):
        layer = passed.weights.layers.get(leaf)
        gradient = gradients[leaf]
        if layer is not None:
            gradient = jnp.einsum("mti,mto->mio", passed.layer_inputs[leaf], gradient)
            gradient = layout.from_matrix(gradient, layer.layout.segments)
        flat.append(gradient.reshape(len(gradient), -1))
    return jnp.concatenate(flat, axis=1)


def weighted(jacobian, cotangent):
    """The same from a Jacobian in forward mode."""
    rows = jacobian.reshape(len(jacobian), -1, jacobian.shape[-1])
    return np.einsum("ncp,nc->np", rows, np.asarray(cotangent).reshape(len(rows), -1))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_a_layer(name, x64):
    case = NETWORKS[name]
    network = case.make()
    weights, names = layers.find(network, np.zeros(case.shape)), leaf_names(network.params)
    assert {names[leaf]: layer.positions for leaf, layer in weights.layers.items()} == case.layers
    assert {names[leaf] for leaf in weights.rest} == case.rest
    assert sorted([*weights.layers, *weights.entries, *weights.rest]) == list(range(len(names)))


# Jacobians of the other networks are in test_jacobian.py, made from the same derivatives.
@pytest.mark.parametrize("name", usual(["products"], ["products", "van"]))
def test_derivatives_of_examples(name, x64):
    network, inputs, jacobian = drawn(name)
    cotangent = RNG.normal(size=jax.eval_shape(network, network.params, inputs).shape)
    gradients = jax.jit(example_gradients)(network, inputs, cotangent)
    np.testing.assert_allclose(gradients, weighted(jacobian, cotangent), rtol=1e-9, atol=1e-11)


def test_subsets_and_heads(x64):
    whole = at_random(linen(Transformer(), (1, 5, 3)))
    network = whole.subset(lambda path: path in ("head/kernel", "head/bias", "position"))
    inputs, cotangent = jnp.asarray(RNG.normal(size=(2, 5, 3))), RNG.normal(size=(2, 5, 3))
    gradients = jax.jit(example_gradients)(network, inputs, cotangent)
    assert len(layers.find(network, inputs).layers) == 1
    jacobian = oracles.jacobian(network, network.params, inputs)
    np.testing.assert_allclose(gradients, weighted(jacobian, cotangent), rtol=1e-9, atol=1e-11)
    last = whole.subset(lambda path: path.startswith("head"))
    head = cut(last, inputs)
    features = jax.jit(head.features)(inputs)
    gradients = jax.jit(example_gradients)(head.network, features, cotangent)
    assert layers.find(head.network, features).layers.keys() == {1}
    of_head = jacobian[..., :-20]  # without the weights of position, which are the last leaf
    np.testing.assert_allclose(gradients, weighted(of_head, cotangent), rtol=1e-9, atol=1e-11)


def test_differentiable_in_the_weights(x64):
    network = at_random(plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3)))
    inputs, cotangent = RNG.normal(size=(3, 4)), jnp.asarray(RNG.normal(size=(3, 2, 3)))

    def length(gradients):
        return lambda params: jnp.sum(gradients(network.with_params(params), inputs, cotangent) ** 2)

    def by_examples(network, inputs, cotangent):
        def of_example(x, c):
            return ravel(jax.vjp(lambda p: network(p, x[None])[0], network.params)[1](c)[0])

        return jax.vmap(of_example)(inputs, cotangent)

    derivative, expected = (jax.jit(jax.grad(length(g)))(network.params) for g in (example_gradients, by_examples))
    np.testing.assert_allclose(ravel(derivative), ravel(expected), rtol=1e-9)


def test_single_precision_and_names_of_segments():
    network = plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3))
    network = network.with_params(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), network.params))

    @jax.jit
    def arrays(network, inputs):
        passed = tapped.forward(network, network.params, inputs)
        return [*passed.layer_inputs.values(), *passed.gradients(passed.outputs).values()]

    inputs = jnp.ones((3, 4), jnp.float32)
    assert {leaf.dtype for leaf in jax.eval_shape(arrays, network, inputs)} == {jnp.dtype("float32")}
    found = layers.find(network, inputs).layers
    # cut: its middle axis comes first, but both belong to the rows; middle: rows between columns.
    expected = [((6, True), (4, False)), ((6, False), (4, True)), ((2, False), (4, True), (3, False))]
    assert [found[leaf].layout.segments for leaf in range(3)] == expected


def test_matrices_and_back():
    segments = ((2, False), (4, True), (3, False), (5, True))
    flat = np.arange(240.0).reshape(2, 120)
    matrix = layout.as_matrix(flat, segments)
    assert matrix.shape == (2, 20, 6)
    np.testing.assert_array_equal(matrix[0, 5 * 1 + 2, 3 * 1 + 2], flat[0].reshape(2, 4, 3, 5)[1, 1, 2, 2])
    np.testing.assert_array_equal(layout.from_matrix(matrix, segments), flat)
    columns = layout.as_matrices(flat.T, segments)
    np.testing.assert_array_equal(np.moveaxis(columns, -1, 0), matrix)
