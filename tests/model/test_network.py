"""Networks of all three kinds: what they compute, subsets of their weights, and their features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, LAST_LAYER, NNXModel, X, linen_network, plain_network
from flax import nnx

import bnnlaplace
from bnnlaplace import Network
from bnnlaplace.core.tree import size
from bnnlaplace.curvature import dense
from bnnlaplace.model.features import cut
from bnnlaplace.model.subset import last_layer

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_an_nnx_model_is_copied():
    model = NNXModel()
    model.eval()
    network, outputs = Network.from_nnx(model), model(X)
    np.testing.assert_allclose(network(network.params, X), outputs, rtol=1e-6)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, network.params)
    nnx.update(model, doubled)  # the weights go back as they came
    np.testing.assert_allclose(network(doubled, X), model(X), rtol=1e-6)
    assert np.abs(network(network.params, X) - model(X)).max() > 0.1
    again = Network.from_nnx(model)
    assert again.forward == network.forward and hash(again.forward) == hash(network.forward)


@every_kind
def test_the_last_layer_is_the_last_to_enter(kind):
    assert last_layer(KINDS[kind](), X) == LAST_LAYER[kind]


def test_shared_weights_enter_where_they_are_first_used():
    def tied(params, x):
        return jnp.tanh((x @ params["embed"]) @ params["body"]) @ params["embed"].T

    network = Network.from_function(tied, {"embed": jnp.ones((4, 3)), "body": jnp.ones((3, 3))})
    assert last_layer(network, X) == {"body"}


@every_kind
def test_a_subset_is_the_same_function_of_fewer_weights(kind):
    network = KINDS[kind]()
    some = network.subset(LAST_LAYER[kind].__contains__)
    assert len(jax.tree.leaves(some.params)) == 2
    np.testing.assert_array_equal(some(some.params, X), network(network.params, X))
    moved = jax.tree.map(lambda leaf: leaf + 1, some.params)
    np.testing.assert_array_equal(some(moved, X), network(some.full_params(moved), X))
    assert jax.tree.structure(some.full_params(moved)) == jax.tree.structure(network.params)
    fewer = some.subset(lambda path: path in LAST_LAYER[kind] and "b" in path.rpartition("/")[2])
    assert len(jax.tree.leaves(fewer.params)) == 1
    assert jax.tree.structure(fewer.full_params(fewer.params)) == jax.tree.structure(network.params)


def test_a_subset_must_match(unchecked_annotations):
    for selected in (None, "a"):
        with pytest.raises(TypeError, match=r"subset\(selected=...\) must be a function .*; got .*; try lambda path"):
            plain_network().subset(selected)
    with pytest.raises(ValueError, match=r"match at least one of the paths \['a', 'b', 'w'\]; it matches none"):
        plain_network().subset(lambda path: path == "c")


@every_kind
def test_features_are_what_enters_the_last_layer(kind):
    network = KINDS[kind]()
    some = network.subset(LAST_LAYER[kind].__contains__)
    head = cut(some, X)
    features = jax.jit(head.features)(X)
    assert features.shape == (5, 6)
    np.testing.assert_allclose(head.network(some.params, features), network(network.params, X), rtol=1e-5)
    np.testing.assert_allclose(head.network(some.params, features[:2]), network(network.params, X[:2]), rtol=1e-5)
    arguments = bnnlaplace.categorical(), some.params
    compute = jax.jit(dense.ggn)
    expected, found = compute(some, *arguments, X), compute(head.network, *arguments, features)
    np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))
    assert cut(some, X).network.forward == head.network.forward  # so that compiled code is shared


def test_the_first_weights_have_no_features():
    network = plain_network()
    assert cut(network, X) is None
    assert cut(network.subset(lambda path: path == "w"), X) is None


def test_features_belong_to_single_examples():
    def centred(params, x):
        return jnp.tanh(x - x.mean()) @ params["w"] + x.mean()

    assert cut(Network.from_function(centred, {"w": jnp.ones((4, 3))}), X) is None


def test_prints_without_its_numbers():
    """JAX prints a function that it traces; the numbers would have to come from the device for that."""
    network = linen_network()
    printed = repr(network)
    assert printed == f"Network(LinenForward, {size(network.params)} weights)"


WRONG_OUTPUTS = {
    "tuple": lambda w, x: (x @ w, x),
    "dict": lambda w, x: {"logits": x @ w},
    "number": lambda w, x: (x @ w).sum(),
    "transposed": lambda w, x: (x @ w).T,
}


def test_outputs_of_another_shape(unchecked_annotations):
    for name, outputs in WRONG_OUTPUTS.items():
        network = bnnlaplace.Network.from_function(outputs, jnp.ones((2, 3)))
        with pytest.raises(ValueError, match=r"outputs must be one array of shape \(B, C\), .*; got"):
            bnnlaplace.Laplace(network, hessian_structure="diag").fit((X[:, :2], np.arange(5) % 3))
            pytest.fail(name)


def test_weights_and_modules_that_cannot_serve():
    with pytest.raises(ValueError, match=r"weights of from_function.* must be arrays .* got step \(int32\); keep"):
        Network.from_function(lambda w, x: x @ w["w"], {"w": jnp.ones((2, 3)), "step": jnp.zeros((), jnp.int32)})
    with pytest.raises(ValueError, match="must be arrays .* got none"):
        Network.from_function(lambda w, x: x, {})
    with pytest.raises(TypeError, match=r"from_linen\(module=...\) must be a flax.linen.Module; got type"):
        Network.from_linen(nn.Dense, {"params": {"kernel": jnp.ones((2, 3))}})
