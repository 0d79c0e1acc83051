"""A network at any number of inputs, one microbatch at a time: outputs, features, derivatives along directions."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import num_examples, unraveler
from bnnlaplace.model import features
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes


def outputs(
    network: Network, inputs: PyTree[Float[Array, "B ..."]], *, microbatch: int = 64
) -> Float[Array, "B ... C"]:
    """f(x; theta*), one microbatch at a time; for no inputs no rows, here and below.

    Parameters
    ----------
    network
        At its own weights.
    inputs
        (B, ...).
    microbatch
        Inputs at a time; bounds memory.
    """
    return by_microbatch(partial(_outputs, network), inputs, microbatch)


def pushforward(
    network: Network,
    inputs: PyTree[Float[Array, "B ..."]],
    directions: Float[Array, "R P"],
    *,
    factors: Float[Array, " P"] | None = None,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Float[Array, "R B ... C"]:
    """J(x) (w v) for every input and every row v of `directions`, by forward mode, with factors w.

    Memory: `vectors_at_once` times the activations of a microbatch, and the result. Any number of inputs and rows
    shares one program.

    Parameters
    ----------
    network, inputs
        What is differentiated, and where.
    directions
        R vectors in the space of the weights.
    factors
        Of each weight, by default one.
    microbatch, vectors_at_once
        Inputs and vectors at a time; they bound memory.
    """
    images = []
    for start in range(0, len(directions), vectors_at_once):
        rows = directions[start : start + vectors_at_once]
        rows = rows if factors is None else rows * factors
        padded = jnp.pad(rows, ((0, vectors_at_once - len(rows)), (0, 0)))
        found = by_microbatch(partial(_pushforward, network, padded), inputs, microbatch)
        images.append(jnp.swapaxes(found, 0, 1)[: len(rows)])
    return jnp.concatenate(images)


def at_features(
    network: Network, inputs: PyTree[Float[Array, "B ..."]], *, microbatch: int
) -> tuple[Network, PyTree[Float[Array, "B ..."]]]:
    """What follows the features of a network, and those of all inputs, computed once; itself where there are none.

    Nor where they would take too much memory (`features.most_bytes`).

    Parameters
    ----------
    network, inputs, microbatch
        As for `outputs`.
    """
    cut = features.cut(network, inputs) if network.is_subset else None
    if cut is None or num_examples(inputs) * features.bytes_each(network, inputs) > features.most_bytes():
        return network, inputs
    return cut.network, by_microbatch(partial(_features, cut), inputs, microbatch)


def check_microbatch(microbatch: int) -> None:
    """Check that there is an input in a microbatch.

    Parameters
    ----------
    microbatch
        Inputs at a time.

    Raises
    ------
    ValueError
        If it is below one.
    """
    if microbatch < 1:
        raise ValueError(f"microbatch=... must be at least 1; got {microbatch}; try 64")


def by_microbatch(
    function: Callable[[Array], Array], inputs: PyTree[Float[Array, "B ..."]], microbatch: int
) -> Float[Array, "B ..."]:
    """Apply a compiled function to microbatches of one shape, the last one padded with copies of the last input.

    Called from Python rather than scanned, so that inputs of any number share one program.

    Parameters
    ----------
    function
        Inputs -> an array with a leading axis as long as theirs.
    inputs
        (B, ...); for none the result has no rows.
    microbatch
        Inputs at a time.

    Raises
    ------
    ValueError
        As `check_microbatch` does.
    """
    check_microbatch(microbatch)
    count = num_examples(inputs)
    if count == 0:
        one = jax.eval_shape(function, Shapes.of_example(inputs).batch(1))
        return jnp.zeros((0, *one.shape[1:]), one.dtype)
    microbatch = min(microbatch, count)
    found = []
    for start in range(0, count, microbatch):
        index = np.minimum(np.arange(start, start + microbatch), count - 1)
        found.append(function(jax.tree.map(partial(_rows, index), inputs)))
    return jnp.concatenate(found)[:count]


def _rows(index: np.ndarray, leaf: Array) -> Array:
    """Of an array on the host there; of one on the device by a compiled gather, as indexing takes a millisecond."""
    return leaf[index] if isinstance(leaf, np.ndarray) else _gathered(leaf, index)


@jax.jit
def _gathered(leaf: Array, index: Array) -> Array:
    return jnp.take(leaf, index, axis=0)


@jax.jit
def _features(head: features.Head, x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m ..."]:
    return head.features(x)


@jax.jit
def _outputs(network: Network, x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m ... C"]:
    return network(network.params, x)


@jax.jit
def _pushforward(
    network: Network, directions: Float[Array, "R P"], x: PyTree[Float[Array, "m ..."]]
) -> Float[Array, "m R ... C"]:
    unravel = unraveler(network.params)
    _, jvp = jax.linearize(lambda p: network(p, x), network.params)
    return jnp.swapaxes(jax.vmap(lambda v: jvp(unravel(v)))(directions), 0, 1)
