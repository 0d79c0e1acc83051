"""Which outputs depend on which weights: entry by entry, and never fewer than the Jacobian says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NETWORKS, exhaustive
from jax import lax

from bnnlaplace import Network
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.model.reach import reached_outputs
from bnnlaplace.model.spec import NetworkSpec

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
SHAPES = {"a": (5, 1), "b": (5, 2), "s": (1,), "w": (4, 5)}


def hidden(p, x):
    return jnp.tanh(x @ p["w"])


def heads(p, x):
    """Outputs (B, 3): the first one of a, the others of b."""
    return jnp.concatenate([hidden(p, x) @ p["a"], hidden(p, x) @ p["b"]], axis=-1)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

A, B, ALL, NONE = [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]
# A network, and the outputs that a, b and all weights reach.
CASES = {
    "concatenated": (heads, A, B, ALL),
    "mapped afterwards": (lambda p, x: jax.nn.softplus(2 * heads(p, x) + 1).astype(jnp.float16), A, B, ALL),
    "a rule of its own": (lambda p, x: doubled(jax.nn.gelu(jax.nn.relu(heads(p, x)))), A, B, ALL),
    "reversed": (lambda p, x: heads(p, x)[:, ::-1].reshape(-1, 3, 1)[..., 0], A[::-1], B[::-1], ALL),
    "permuted": (lambda p, x: heads(p, x)[:, np.array([2, 0, 1])], [0, 1, 0], [1, 0, 1], ALL),
    "mixed": (lambda p, x: jax.nn.log_softmax(heads(p, x)), ALL, ALL, ALL),
    "scattered": (
        lambda p, x: (
            jnp.zeros((len(x), 3)).at[:, 0].set((hidden(p, x) @ p["a"])[:, 0]).at[:, 1:].add(hidden(p, x) @ p["b"])
        ),
        A,
        B,
        ALL,
    ),
    "chosen": (
        lambda p, x: jnp.where(
            jnp.arange(3) == 0, hidden(p, x) @ p["a"], jnp.pad(hidden(p, x) @ p["b"], ((0, 0), (1, 0)))
        ),
        A,
        B,
        ALL,
    ),
    "stacked with a number": (
        lambda p, x: jnp.stack([(hidden(p, x) @ p["a"])[:, 0], *[jnp.broadcast_to(p["s"], len(x))] * 2], axis=1),
        A,
        NONE,
        ALL,
    ),
    "without derivative": (
        lambda p, x: heads({**p, "b": lax.stop_gradient(p["b"])}, lax.stop_gradient(x)),
        A,
        NONE,
        None,
    ),
    "constant outputs": (lambda p, x: jnp.pad(hidden(p, x) @ p["a"], ((0, 0), (0, 2))), A, NONE, A),
    "in a loop": (
        lambda p, x: lax.fori_loop(0, 2, lambda _, h: h + heads(p, x), jnp.zeros((len(x), 3))),
        ALL,
        ALL,
        ALL,
    ),
}


def numbers(network, names):
    return frozenset(number for number, name in enumerate(leaf_names(network.params)) if name in names)


@pytest.mark.parametrize("case", CASES)
def test_outputs_that_weights_reach(case):
    function, *expected = CASES[case]
    network = Network.from_function(function, {name: jnp.ones(shape) for name, shape in SHAPES.items()})
    spec = NetworkSpec.of(network, X)
    for weights, outputs in zip((numbers(network, "a"), numbers(network, "b"), None), expected, strict=True):
        if outputs is not None:
            np.testing.assert_array_equal(reached_outputs(spec, weights), outputs)


def test_positions_are_told_apart():
    def outputs(p, x):
        return jnp.stack([hidden(p, x) @ p["b"], x[:, :2]], axis=1)

    network = Network.from_function(outputs, {name: jnp.ones(shape) for name, shape in SHAPES.items()})
    reached = reached_outputs(NetworkSpec.of(network, X), numbers(network, "b"))
    np.testing.assert_array_equal(reached, [[True, True], [False, False]])


@pytest.mark.parametrize("name", [name if name != "van" else exhaustive(name) for name in NETWORKS])
def test_whole_networks_are_reached(name):
    """Convolutions, attention and loops: every output depends on the weights."""
    case = NETWORKS[name]
    assert reached_outputs(NetworkSpec.of(case.make(), np.zeros(case.shape, np.float32))).all()
