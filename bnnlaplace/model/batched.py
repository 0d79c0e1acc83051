"""A network at any number of inputs, one microbatch at a time: outputs, features, derivatives along directions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.tree import num_examples, unraveler
from bnnlaplace.model import features
from bnnlaplace.model.arrays import as_arrays
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes


def outputs(
    network: Network, inputs: PyTree[Shaped[ArrayLike, "B ..."]], *, microbatch: int = 64
) -> Float[Array, "B ... C"]:
    """Compute the outputs of a network at its own weights, one microbatch at a time.

    Parameters
    ----------
    network
        The network.
    inputs
        B inputs; if there are none, the result has no rows.
    microbatch
        How many inputs are computed at a time. It bounds the memory.
    """
    return by_microbatch(partial(_outputs, network), as_arrays(inputs, "outputs(inputs=...)"), microbatch)


def pushforward(
    network: Network,
    inputs: PyTree[Shaped[ArrayLike, "B ..."]],
    directions: Float[Array, "R P"],
    *,
    factors: Float[Array, " P"] | None = None,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Float[Array, "R B ... C"]:
    """Differentiate the outputs at every input along each row of `directions`: J(x) (w v), by forward mode.

    Memory: `vectors_at_once` times the activations of a microbatch, and the result. All numbers of inputs and of rows
    share one program.

    Parameters
    ----------
    network, inputs
        The network, differentiated at its own weights, and B inputs.
    directions
        R vectors v in the space of the weights.
    factors
        A factor w for each weight, by default one.
    microbatch, vectors_at_once
        How many inputs and how many vectors are computed at a time. They bound the memory.
    """
    derivatives = []
    for start in range(0, len(directions), vectors_at_once):
        rows = directions[start : start + vectors_at_once]
        rows = rows if factors is None else rows * factors
        padded = jnp.pad(rows, ((0, vectors_at_once - len(rows)), (0, 0)))
        by_input = by_microbatch(partial(_pushforward, network, padded), inputs, microbatch)
        derivatives.append(jnp.swapaxes(by_input, 0, 1)[: len(rows)])
    return jnp.concatenate(derivatives)


def at_features(
    network: Network, inputs: PyTree[Shaped[ArrayLike, "B ..."]], *, microbatch: int
) -> tuple[Network, PyTree[Shaped[ArrayLike, "B ..."]]]:
    """Split the network at its features and compute those of all inputs once.

    Returns the network and the inputs themselves if there are no features, or they need too much memory
    (`features.memory_limit`). Inputs of another library are converted.
    """
    inputs = as_arrays(inputs, "inputs to predict at")
    head = features.cut(network, inputs) if network.is_subset else None
    if head is None:
        return network, inputs
    if num_examples(inputs) * features.bytes_per_example(network, inputs) > features.memory_limit():
        return network, inputs
    return head.network, by_microbatch(partial(_features, head), inputs, microbatch)


def check_microbatch(microbatch: Any) -> None:
    """Raise ValueError unless `microbatch` is an integer of at least one."""
    checks.count(microbatch, "microbatch=...", advice="try 64")


def by_microbatch(
    function: Callable[[Any], Array], inputs: PyTree[Shaped[ArrayLike, "B ..."]], microbatch: int
) -> Shaped[Array, "B ..."]:
    """Apply a compiled function to microbatches of one shape, and concatenate the results.

    The last microbatch is padded with copies of the last input. The loop runs in Python rather than in a scan, so that
    all numbers of inputs share one program.

    Parameters
    ----------
    function
        A function from inputs to an array whose leading axis has the same length.
    inputs
        B inputs; if there are none, the result has no rows.
    microbatch
        How many inputs are computed at a time.

    Raises
    ------
    ValueError
        If `microbatch` is below one.
    """
    check_microbatch(microbatch)
    count = num_examples(inputs)
    if count == 0:
        abstract = jax.eval_shape(function, Shapes.of_example(inputs).batch(1))
        return jnp.zeros((0, *abstract.shape[1:]), abstract.dtype)
    microbatch = min(microbatch, count)
    results = []
    for start in range(0, count, microbatch):
        index = np.minimum(np.arange(start, start + microbatch), count - 1)
        results.append(function(jax.tree.map(partial(_rows, index), inputs)))
    return jnp.concatenate(results)[:count]


def _rows(index: Int[np.ndarray, " m"], leaf: Shaped[ArrayLike, "B ..."]) -> Shaped[ArrayLike, "m ..."]:
    # An array on the host is sliced there, without a copy of the whole on the device. One on the device is sliced by a
    # compiled function, because indexing it from Python takes a millisecond.
    return leaf[index] if isinstance(leaf, np.ndarray) else _take(leaf, index)


@jax.jit
def _take(leaf: Shaped[Array, "B ..."], index: Int[Array, " m"]) -> Shaped[Array, "m ..."]:
    return jnp.take(leaf, index, axis=0)


@jax.jit
def _features(head: features.Head, x: PyTree[Shaped[Array, "m ..."]]) -> Shaped[Array, "m ..."]:
    return head.features(x)


@jax.jit
def _outputs(network: Network, x: PyTree[Shaped[Array, "m ..."]]) -> Float[Array, "m ... C"]:
    return network(network.params, x)


@jax.jit
def _pushforward(
    network: Network, directions: Float[Array, "R P"], x: PyTree[Shaped[Array, "m ..."]]
) -> Float[Array, "m R ... C"]:
    unravel = unraveler(network.params)
    _, jvp = jax.linearize(lambda params: network(params, x), network.params)
    return jnp.swapaxes(jax.vmap(lambda vector: jvp(unravel(vector)))(directions), 0, 1)
