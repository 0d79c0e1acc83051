"""Derivatives of single examples with respect to every weight, and which weights are found to be layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import bnnlaplace
from bnnlaplace.core.tree import leaf_names, ravel
from bnnlaplace.curvature import layers, layout, tapped
from bnnlaplace.model.features import cut
from training.models.van import VAN

RNG = np.random.default_rng(0)


class Convolutions(nn.Module):
    """Strides, padding, dilation, groups and normalisations."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), strides=2, padding=((1, 2), (0, 1)), name="strided")(x)
        x = nn.BatchNorm(use_running_average=True, name="batch_norm")(nn.tanh(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.GroupNorm(2, name="group_norm")(x)
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 1), name="transposed")(x)
        x = nn.Conv(2, (2, 2), kernel_dilation=2, padding="VALID", use_bias=False, name="dilated")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).reshape(x.shape[0], -1))


class Transformer(nn.Module):
    """Embeddings, attention, and a gate for each of several outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x) + self.param("position", nn.initializers.normal(), (5, 4))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        return nn.Dense(3, name="head")(nn.tanh(x)) * self.param("gate", nn.initializers.ones, ())


class Recurrent(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        # The kernel in a loop, the bias outside of it.
        steps = lax.scan(lambda h, a: (jnp.tanh(a @ self.first.kernel[...] + h), None), jnp.zeros((len(x), 3)), x[None])
        return self.last(steps[0] + self.first.bias[...])


def products(params, x):
    """Weights on either side, transposed, cut up, and used by one einsum."""
    hidden = jnp.tanh(lax.dot_general(params["left"], x, (((1,), (1,)), ((), ()))))  # (6, N): examples last
    hidden = jnp.tanh(params["cut"].transpose(1, 0, 2).reshape(6, 4).T @ hidden)  # (4, N)
    return jnp.einsum("in,oip->nop", hidden, params["middle"])


def shared(params, x):
    """A weight used twice, one that is scaled, one whose examples and positions share an axis, one of no use."""
    hidden = jnp.tanh(jnp.tanh(x @ params["twice"]) @ params["twice"].T)
    hidden = (hidden.reshape(-1, 2) @ params["merged"]).reshape(x.shape)
    return hidden @ (params["scale"] * params["scaled"])


def linen(module, shape):
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros(shape))
    return bnnlaplace.Network.from_linen(module, variables)


def plain(function, **shapes):
    return bnnlaplace.Network.from_function(function, {name: np.zeros(shape) for name, shape in shapes.items()})


def recurrent():
    return bnnlaplace.Network.from_nnx(Recurrent())


CASES = {
    "convolutions": (
        lambda: linen(Convolutions(), (1, 7, 6, 2)),
        (3, 7, 6, 2),
        {"strided/kernel": 12, "transposed/kernel": 24, "dilated/kernel": 6, "head/kernel": 1},
    ),
    "transformer": (
        lambda: linen(Transformer(), (1, 5, 3)),
        (2, 5, 3),
        dict.fromkeys(["embed/kernel", "head/kernel"], 5)
        | {f"attention/{name}/kernel": 5 for name in ("query", "key", "value", "out")},
    ),
    "recurrent": (recurrent, (3, 4), {"last/kernel": 1}),
    "products": (
        lambda: plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3)),
        (3, 4),
        {"left": 1, "cut": 1, "middle": 1},
    ),
    "shared": (
        lambda: plain(shared, twice=(4, 3), merged=(2, 2), scale=(4, 1), scaled=(4, 2), unused=(2,)),
        (3, 4),
        {},
    ),
    "images last": (
        lambda: linen(VAN(3, (2,), (1,), (2,), stem_kernel=3, stem_stride=2, depthwise="grouped"), (1, 4, 4, 1)),
        (2, 4, 4, 1),
        {f"block1_0/attn/{name}/kernel": 4 for name in ("proj_1", "conv1", "proj_2")}
        | {f"block1_0/mlp/{name}/kernel": 4 for name in ("fc1", "fc2")}
        | {"head/kernel": 1, "patch_embed1/kernel": 4},
    ),
}
REST = {"recurrent": {"first/kernel"}, "shared": {"merged"}}


def at_random(network):
    """Numbers away from zero everywhere, variances included."""

    def draw(leaf):
        return jnp.asarray((0.3 + 0.5 * RNG.random(leaf.shape)) * RNG.choice([-1, 1], leaf.shape))

    frozen = jax.tree.map(
        lambda leaf: jnp.abs(draw(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, network.frozen
    )
    return bnnlaplace.Network(network.forward, jax.tree.map(draw, network.params), frozen)


def example_gradients(network, inputs, cotangent):
    """(M, P) from one backward pass, as matrices of layers and as they come."""
    passed = tapped.forward(network, network.params, inputs)
    found = passed.gradients(cotangent)
    flat = []
    for leaf in sorted(found):
        layer = passed.weights.layers.get(leaf)
        gradient = found[leaf]
        if layer is not None:
            gradient = jnp.einsum("mti,mto->mio", passed.layer_inputs[leaf], gradient)
            gradient = layout.from_matrix(gradient, layer.layout.segments)
        flat.append(gradient.reshape(len(gradient), -1))
    return jnp.concatenate(flat, axis=1)


def naive_gradients(network, inputs, cotangent):
    """The same from a Jacobian in forward mode, one example after another."""
    flat, unravel = jax.flatten_util.ravel_pytree(network.params)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda p, x: network(unravel(p), x[None])[0]), in_axes=(None, 0)))
    count = len(inputs)
    rows = np.asarray(jacobian(flat, inputs)).reshape(count, -1, flat.size)
    return np.einsum("ncp,nc->np", rows, np.asarray(cotangent).reshape(count, -1))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_examples(name, x64):
    make, shape, expected = CASES[name]
    network, inputs = at_random(make()), jnp.asarray(RNG.normal(size=shape))
    weights, names = layers.find(network, inputs), leaf_names(network.params)
    assert {names[leaf]: layer.positions for leaf, layer in weights.layers.items()} == expected
    assert {names[leaf] for leaf in weights.rest} == REST.get(name, set())
    cotangent = RNG.normal(size=jax.eval_shape(network, network.params, inputs).shape)
    found = jax.jit(example_gradients)(network, inputs, cotangent)
    np.testing.assert_allclose(found, naive_gradients(network, inputs, cotangent), rtol=1e-9, atol=1e-11)


def test_subsets_and_heads(x64):
    whole = at_random(linen(Transformer(), (1, 5, 3)))
    network = whole.subset(lambda path: path in ("head/kernel", "head/bias", "position"))
    inputs, cotangent = jnp.asarray(RNG.normal(size=(2, 5, 3))), RNG.normal(size=(2, 5, 3))
    found = example_gradients(network, inputs, cotangent)
    assert len(layers.find(network, inputs).layers) == 1
    np.testing.assert_allclose(found, naive_gradients(network, inputs, cotangent), rtol=1e-9, atol=1e-11)
    last = whole.subset(lambda path: path.startswith("head"))
    head = cut(last, inputs)
    found = example_gradients(head.network, head.features(inputs), cotangent)
    assert layers.find(head.network, head.features(inputs)).layers.keys() == {1}
    np.testing.assert_allclose(found, naive_gradients(last, inputs, cotangent), rtol=1e-9, atol=1e-11)


def test_differentiable_in_the_weights(x64):
    network = at_random(plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3)))
    inputs, cotangent = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 2, 3))

    def length(gradients):
        return lambda params: jnp.sum(gradients(network.with_params(params), inputs, cotangent) ** 2)

    def by_examples(network, inputs, cotangent):
        def one(x, c):
            return ravel(jax.vjp(lambda p: network(p, x[None])[0], network.params)[1](c)[0])

        return jax.vmap(one)(inputs, cotangent)

    found, expected = (jax.jit(jax.grad(length(g)))(network.params) for g in (example_gradients, by_examples))
    np.testing.assert_allclose(ravel(found), ravel(expected), rtol=1e-9)


def test_single_precision_and_names_of_segments():
    network = plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3))
    network = network.with_params(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), network.params))
    passed = tapped.forward(network, network.params, jnp.ones((3, 4), jnp.float32))
    assert {leaf.dtype for leaf in (*passed.layer_inputs.values(), *passed.gradients(passed.outputs).values())} == {
        jnp.dtype("float32")
    }
    segments = [passed.weights.layers[leaf].layout.segments for leaf in range(3)]
    # cut: its middle axis comes first, but both belong to the rows; middle: rows between columns.
    assert segments == [((6, True), (4, False)), ((6, False), (4, True)), ((2, False), (4, True), (3, False))]


def test_matrices_and_back():
    segments = ((2, False), (4, True), (3, False), (5, True))
    flat = np.arange(240.0).reshape(2, 120)
    matrix = layout.as_matrix(flat, segments)
    assert matrix.shape == (2, 20, 6)
    np.testing.assert_array_equal(matrix[0, 5 * 1 + 2, 3 * 1 + 2], flat[0].reshape(2, 4, 3, 5)[1, 1, 2, 2])
    np.testing.assert_array_equal(layout.from_matrix(matrix, segments), flat)
