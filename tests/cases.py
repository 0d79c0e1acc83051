"""Marks for the rows of tables, a small problem with its exact GGN, and larger networks, for all tests."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax import lax

import bnnlaplace

# --- tables of which a usual run takes a few rows ---------------------------------------------------------------

exhaustive = partial(pytest.param, marks=pytest.mark.exhaustive)


def usual(rows: Sequence[Any], *columns: Iterable) -> list:
    """`rows`, and all others of a table marked as exhaustive: the values of one column, or combinations of several."""
    if len(columns) == 1:
        return [*rows, *(exhaustive(value) for value in columns[0] if value not in rows)]
    return [*rows, *(exhaustive(*row) for row in itertools.product(*columns) if row not in rows)]


# --- a problem with its exact GGN -------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A two-layer network of 43 weights, its data, and its GGN as a matrix."""

    network: bnnlaplace.Network
    likelihood: bnnlaplace.Likelihood
    inputs: np.ndarray
    targets: np.ndarray
    ggn: np.ndarray


def two_layers(params, x):
    """tanh network; outputs (B, 3)."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def random_problem(likelihood: bnnlaplace.Likelihood, targets: np.ndarray, seed: int = 0) -> Problem:
    """The network at random weights, and sum_n J_n' Lambda_n J_n in closed form, by NumPy alone."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    numbers = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    inputs = rng.normal(size=(len(targets), 4))
    network = bnnlaplace.Network.from_function(two_layers, numbers)
    hidden = np.tanh(inputs @ numbers["w1"] + numbers["b1"])
    curvatures = oracles.output_curvature(likelihood, hidden @ numbers["w2"] + numbers["b2"])
    ggn = oracles.ggn(oracles.two_layers_jacobian(numbers, inputs), curvatures)
    return Problem(network, likelihood, inputs, targets, ggn)


# Likelihoods of three outputs, with a function from a generator and a number of examples to targets.
LIKELIHOODS = {
    "classification": (bnnlaplace.categorical, lambda rng, count: rng.integers(0, 3, size=count)),
    "regression": (lambda: bnnlaplace.gaussian(0.4), lambda rng, count: rng.normal(size=(count, 3))),
    "binary": (bnnlaplace.bernoulli, lambda rng, count: rng.integers(0, 2, size=(count, 3))),
}


# --- networks that have every way in which weights enter --------------------------------------------------------


class Case(NamedTuple):
    """A network and how its weights enter.

    Attributes
    ----------
    make
        Builds the network.
    shape
        The shape of its inputs.
    layers
        The number of positions of each weight that is a layer.
    rest
        The weights whose entries cannot be told apart by examples.
    """

    make: Callable[[], bnnlaplace.Network]
    shape: tuple[int, ...]
    layers: dict[str, int]
    rest: frozenset[str] = frozenset()


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


class Positions(nn.Module):
    """Convolutions that predict three classes at each of four positions of inputs (N, 5, 2)."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (2,), padding="VALID", name="second")(jnp.tanh(nn.Conv(4, (2,), name="first")(x)))


class Labelled(NamedTuple):
    """A network at random weights, inputs, labels of each position, and how much each example counts."""

    network: bnnlaplace.Network
    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def at_positions(count: int) -> Labelled:
    """`Positions` with that many examples, in float64 if that is on."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, 5, 2))
    params = Positions().init(jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    network = bnnlaplace.Network.from_linen(Positions(), {"params": params})
    return Labelled(network, inputs, rng.integers(3, size=(count, 4)), rng.uniform(0.5, 2, size=count))


class Transformer(nn.Module):
    """Embeddings, attention, and a gate for each of several outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x) + self.param("position", nn.initializers.normal(), (5, 4))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        return nn.Dense(3, name="head")(nn.tanh(x)) * self.param("gate", nn.initializers.ones, ())


class Recurrent(nnx.Module):
    """A kernel inside of a loop, and its bias outside of it."""

    def __init__(self):
        self.first = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
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


def van() -> nn.Module:
    """The smallest visual attention network: two channels, one block."""
    from training.models.van import VAN

    return VAN(3, (2,), (1,), (2,), stem_kernel=3, stem_stride=2, depthwise="grouped")


def linen(module: nn.Module, shape: tuple[int, ...]) -> bnnlaplace.Network:
    """A Linen module whose weights are all zero."""
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    return bnnlaplace.Network.from_linen(module, zeros)


def plain(function: Callable, **shapes: tuple[int, ...]) -> bnnlaplace.Network:
    """A function whose weights are all zero."""
    return bnnlaplace.Network.from_function(function, {name: np.zeros(shape) for name, shape in shapes.items()})


NETWORKS = {
    "convolutions": Case(
        lambda: linen(Convolutions(), (1, 7, 6, 2)),
        (3, 7, 6, 2),
        {"strided/kernel": 12, "transposed/kernel": 24, "dilated/kernel": 6, "head/kernel": 1},
    ),
    "transformer": Case(
        lambda: linen(Transformer(), (1, 5, 3)),
        (2, 5, 3),
        dict.fromkeys(["embed/kernel", "head/kernel"], 5)
        | {f"attention/{name}/kernel": 5 for name in ("query", "key", "value", "out")},
    ),
    "recurrent": Case(
        lambda: bnnlaplace.Network.from_nnx(Recurrent()),
        (3, 4),
        {"last/kernel": 1},
        frozenset(["first/kernel"]),
    ),
    "products": Case(
        lambda: plain(products, left=(6, 4), cut=(3, 2, 4), middle=(2, 4, 3)),
        (3, 4),
        {"left": 1, "cut": 1, "middle": 1},
    ),
    "shared": Case(
        lambda: plain(shared, twice=(4, 3), merged=(2, 2), scale=(4, 1), scaled=(4, 2), unused=(2,)),
        (3, 4),
        {},
        frozenset(["merged"]),
    ),
    "van": Case(
        lambda: linen(van(), (1, 4, 4, 1)),
        (2, 4, 4, 1),
        {f"block1_0/attn/{name}/kernel": 4 for name in ("proj_1", "conv1", "proj_2")}
        | {f"block1_0/mlp/{name}/kernel": 4 for name in ("fc1", "fc2")}
        | {"head/kernel": 1, "patch_embed1/kernel": 4},
    ),
}


def at_random(network: bnnlaplace.Network, seed: int = 0) -> bnnlaplace.Network:
    """The network with numbers away from zero everywhere, variances included."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray((0.3 + 0.5 * rng.random(leaf.shape)) * rng.choice([-1, 1], leaf.shape))

    frozen = jax.tree.map(
        lambda leaf: jnp.abs(draw(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, network.frozen
    )
    return bnnlaplace.Network(network.forward, jax.tree.map(draw, network.params), frozen)


class Drawn(NamedTuple):
    """A network of `NETWORKS` at random weights, random inputs, and its Jacobian (N, outputs, P) in forward mode."""

    network: bnnlaplace.Network
    inputs: jax.Array
    jacobian: np.ndarray


@cache
def drawn(name: str) -> Drawn:
    """Draw a network of the table in double precision. Its Jacobian is computed once in a run."""
    case = NETWORKS[name]
    with jax.enable_x64(True):
        network, inputs = at_random(case.make()), jnp.asarray(np.random.default_rng(1).normal(size=case.shape))
        rows = oracles.jacobian(network, network.params, inputs)
    return Drawn(network, inputs, rows.reshape(len(inputs), -1, rows.shape[-1]))


# --- one network of each kind, with a last layer ----------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class LinenModel(nn.Module):
    """Layers are named so that alphabetical order is not that of execution."""

    @nn.compact
    def __call__(self, x, train, deterministic=True):
        x = nn.relu(nn.Dense(6, name="layer_9")(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = x + nn.Dense(6, name="layer_2")(nn.Dropout(0.5, deterministic=deterministic)(x))
        return nn.Dense(3, name="layer_10")(x)


class NNXModel(nnx.Module):
    """Fields are named so that alphabetical order is not that of execution."""

    def __init__(self, *, batch_norm=True, dropout=True):
        rngs = nnx.Rngs(0)
        self.z_first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs) if batch_norm else nnx.Sequential()
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else nnx.Sequential()
        self.a_last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.a_last(self.dropout(nnx.relu(self.norm(self.z_first(x)))))


@cache
def _linen_variables():
    return jax.jit(partial(LinenModel().init, train=False))(jax.random.key(0), X)


def linen_network(train=False, **arguments):
    return bnnlaplace.Network.from_linen(LinenModel(), _linen_variables(), train=train, **arguments)


def nnx_network(evaluate=True, **arguments):
    model = NNXModel(**arguments)
    if evaluate:
        model.eval()
    return bnnlaplace.Network.from_nnx(model)


@jax.jit
def bias_last(params, x):
    return jnp.tanh(x @ params["w"]) @ params["a"] + params["b"]


def plain_network(function=bias_last):
    params = {"w": jnp.ones((4, 6)), "a": jnp.linspace(-1, 1, 18).reshape(6, 3), "b": jnp.ones(3)}
    return bnnlaplace.Network.from_function(function, params)


KINDS = {"linen": linen_network, "nnx": nnx_network, "function": plain_network}
LAST_LAYER = {
    "linen": {"layer_10/kernel", "layer_10/bias"},
    "nnx": {"a_last/kernel", "a_last/bias"},
    "function": {"a", "b"},
}
