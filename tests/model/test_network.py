"""Networks of all three kinds: what they compute, subsets of their weights, their features, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnnlaplace
from bnnlaplace import Network
from bnnlaplace.core.tree import size
from bnnlaplace.curvature import dense
from bnnlaplace.model.determinism import check_deterministic
from bnnlaplace.model.features import cut
from bnnlaplace.model.subset import last_layer

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class LinenModel(nn.Module):
    """Eleven layers are named so that alphabetical order is not that of execution."""

    @nn.compact
    def __call__(self, x, train, deterministic=True):
        x = nn.relu(nn.Dense(6, name="layer_9")(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = x + nn.Dense(6, name="layer_2")(nn.Dropout(0.5, deterministic=deterministic)(x))
        return nn.Dense(3, name="layer_10")(x)


class NNXModel(nnx.Module):
    def __init__(self, *, batch_norm=True, dropout=True):
        rngs = nnx.Rngs(0)
        self.z_first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs) if batch_norm else nnx.Sequential()
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else nnx.Sequential()
        self.a_last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.a_last(self.dropout(nnx.relu(self.norm(self.z_first(x)))))


def linen_network(train=False, **arguments):
    variables = LinenModel().init(jax.random.key(0), X, train=False)
    return Network.from_linen(LinenModel(), variables, train=train, **arguments)


def nnx_network(evaluate=True, **arguments):
    model = NNXModel(**arguments)
    if evaluate:
        model.eval()
    return Network.from_nnx(model)


@jax.jit
def two_layers(params, x):
    return jnp.tanh(x @ params["w"]) @ params["a"] + params["b"]


def plain_network(function=two_layers):
    params = {"w": jnp.ones((4, 6)), "a": jnp.linspace(-1, 1, 18).reshape(6, 3), "b": jnp.ones(3)}
    return Network.from_function(function, params)


NETWORKS = {"linen": linen_network, "nnx": nnx_network, "function": plain_network}
LAST = {
    "linen": {"layer_10/kernel", "layer_10/bias"},
    "nnx": {"a_last/kernel", "a_last/bias"},
    "function": {"a", "b"},
}
every_kind = pytest.mark.parametrize("kind", NETWORKS)


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
    assert last_layer(NETWORKS[kind](), X) == LAST[kind]


def test_shared_weights_enter_where_they_are_first_used():
    def tied(params, x):
        return jnp.tanh((x @ params["embed"]) @ params["body"]) @ params["embed"].T

    network = Network.from_function(tied, {"embed": jnp.ones((4, 3)), "body": jnp.ones((3, 3))})
    assert last_layer(network, X) == {"body"}


@every_kind
def test_a_subset_is_the_same_function_of_fewer_weights(kind):
    network = NETWORKS[kind]()
    some = network.subset(LAST[kind].__contains__)
    assert len(jax.tree.leaves(some.params)) == 2
    np.testing.assert_array_equal(some(some.params, X), network(network.params, X))
    moved = jax.tree.map(lambda leaf: leaf + 1, some.params)
    np.testing.assert_array_equal(some(moved, X), network(some.full_params(moved), X))
    assert jax.tree.structure(some.full_params(moved)) == jax.tree.structure(network.params)
    fewer = some.subset(lambda path: path in LAST[kind] and "b" in path.rpartition("/")[2])
    assert len(jax.tree.leaves(fewer.params)) == 1
    assert jax.tree.structure(fewer.full_params(fewer.params)) == jax.tree.structure(network.params)


def test_a_subset_must_match():
    with pytest.raises(ValueError, match=r"match at least one of the paths \['a', 'b', 'w'\]; it matches none"):
        plain_network().subset(lambda path: path == "c")


@every_kind
def test_features_are_what_enters_the_last_layer(kind):
    network = NETWORKS[kind]()
    some = network.subset(LAST[kind].__contains__)
    head = cut(some, X)
    features = jax.jit(head.features)(X)
    assert features.shape == (5, 6)
    np.testing.assert_allclose(head.network(some.params, features), network(network.params, X), rtol=1e-5)
    np.testing.assert_allclose(head.network(some.params, features[:2]), network(network.params, X[:2]), rtol=1e-5)
    arguments = bnnlaplace.categorical(), some.params
    expected = dense.ggn(some, *arguments, X)
    found = dense.ggn(head.network, *arguments, features)
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


REFUSED = {
    "Linen batch norm": (lambda: linen_network(train=True), "ModifyScopeVariableError.*train=False, determ.*=True"),
    "Linen dropout": (lambda: linen_network(deterministic=False), "InvalidRngError.*train=False, deterministic=True"),
    "NNX in training mode": (lambda: nnx_network(False), r"same outputs at every call.*model.eval\(\)"),
    "NNX batch norm": (lambda: nnx_network(False, dropout=False), r"whatever else is in its batch.*model.eval\(\)"),
    "NNX dropout": (lambda: nnx_network(False, batch_norm=False), r"same outputs at every call.*model.eval\(\)"),
    "random": (
        lambda: plain_network(lambda p, x: (x + np.random.default_rng().normal()) @ p["w"]),
        "same outputs at every call",
    ),
    "coupled": (lambda: plain_network(lambda p, x: (x - x.mean(0)) @ p["w"]), "whatever else is in its batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_function_of_one_example_is_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_deterministic(build(), X)


@every_kind
def test_what_is_one_passes(kind):
    check_deterministic(NETWORKS[kind](), X)


def test_prints_without_its_numbers():
    """JAX prints a function that it traces; the numbers would have to come from the device for that."""
    network = linen_network()
    printed = repr(network)
    assert printed == f"Network(LinenForward, {size(network.params)} weights)"


def test_is_called_to_be_checked_once():
    calls = []

    def counted(params, x):
        calls.append(len(x))
        return x @ params

    network = bnnlaplace.Network.from_function(counted, jnp.ones((2, 3)))
    check_deterministic(network, X[:, :2])
    assert calls == [5, 5, 1]
    check_deterministic(network.with_params(jnp.zeros((2, 3))), X[:, :2])
    assert calls == [5, 5, 1]
    broken = bnnlaplace.Network.from_function(lambda w, x: x @ w * np.random.default_rng().normal(), jnp.ones((2, 3)))
    for _ in range(2):  # what has not passed is not remembered
        with pytest.raises(ValueError, match="same outputs at every call"):
            check_deterministic(broken, jnp.ones((5, 2)))


def test_what_could_not_be_found_out_is_not_remembered():
    """Of one example, or of equal ones, nothing else in the batch can be seen."""
    network = bnnlaplace.Network.from_function(lambda w, x: (x - x.mean(axis=0)) @ w + 1, jnp.ones((2, 3)))
    for inputs in (X[:1, :2], np.ones((5, 2), np.float32)):
        check_deterministic(network, inputs)
    with pytest.raises(ValueError, match="whatever else is in its batch"):
        check_deterministic(network, X[:, :2])


@pytest.mark.parametrize(
    "outputs",
    [lambda w, x: (x @ w, x), lambda w, x: {"logits": x @ w}, lambda w, x: (x @ w).sum(), lambda w, x: (x @ w).T],
)
def test_outputs_of_another_shape(outputs):
    network = bnnlaplace.Network.from_function(outputs, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"outputs must be one array of shape \(B, C\), .*; got"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit((X[:, :2], np.arange(5) % 3))


def test_weights_and_modules_that_cannot_serve():
    with pytest.raises(ValueError, match=r"weights of from_function.* must be arrays .* got step \(int32\); keep"):
        Network.from_function(lambda w, x: x @ w["w"], {"w": jnp.ones((2, 3)), "step": jnp.zeros((), jnp.int32)})
    with pytest.raises(ValueError, match="must be arrays .* got none"):
        Network.from_function(lambda w, x: x, {})
    with pytest.raises(ValueError, match="from_linen: the module and its call arguments must be hashable"):
        Network.from_linen(nn.Dense(3), {"params": {"kernel": jnp.ones((2, 3))}}, mask=jnp.ones(3))
